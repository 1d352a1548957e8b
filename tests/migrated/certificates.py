"""Hosts with certificates, for tests of their connections."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from migrated.link.security import LinkSecurity
from migrated.settings.config import AuthorisationConfig, TlsConfig
from scripts.authority import HostFiles


def security_of(files: HostFiles | None, names: tuple[str, ...] = ("*",), **rules: tuple[str, ...]) -> LinkSecurity:
    """A host with a certificate, or without one.

    Args:
        files: its certificate, key and authority.
        names: of hosts that it talks to at all.
        rules: ``accept_from`` and ``send_to``.
    """
    tls = TlsConfig(**files.section(), names=names) if files is not None else TlsConfig()
    return LinkSecurity(tls, AuthorisationConfig(**rules))


def past(days: float) -> datetime:
    """So many days ago."""
    return datetime.now(UTC) - timedelta(days=days)
