"""Rules on who this host talks to and who may do what: the certificates, the rules of the configuration, and what plain
TCP is still good for.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import structlog

from migrated.base.errors import RefusedError
from migrated.link.tls import Credentials, CredentialsError, TlsSession
from migrated.settings.config import AuthorisationConfig, TlsConfig

log = structlog.get_logger()

Names = tuple[str, ...]
"""Names of a peer in its certificate: DNS names and IP addresses, sorted; empty without TLS. A renewed certificate has
the same names, so what belongs to a peer is bound to them."""

THIS_HOST: Names = ("unix:",)
"""Stands for a peer on this host, which came over a unix socket; no certificate has such a name. The socket's mode says
who may open it, and no rule has a say in that."""


class PlainRefusedError(RefusedError):
    """Plain TCP to or from another host, which nobody has allowed."""


class LinkSecurity:
    """The rules of ``[tls]`` and ``[authorisation]``, for every connection from now on.

    Raises:
        CredentialsError: a file cannot be used.
    """

    def __init__(self, tls: TlsConfig, rules: AuthorisationConfig) -> None:
        self._tls = tls
        self._rules = rules
        self._credentials = Credentials.of(tls)

    def reload(self, tls: TlsConfig, rules: AuthorisationConfig) -> None:
        """Read configuration and files anew: connections that are there stay as they are.

        Raises:
            CredentialsError: a file cannot be used, or TLS would be switched on or off; nothing has changed.
        """
        credentials = Credentials.of(tls)
        if (credentials is None, tls.insecure) != (self._credentials is None, self._tls.insecure):
            raise CredentialsError("switching TLS on or off needs a restart of the daemon")
        self._credentials = credentials
        self._tls, self._rules = tls, rules

    @property
    def credentials(self) -> Credentials | None:
        """This host's certificate and what belongs to it, None without TLS."""
        return self._credentials

    def accepting(self, peer: str) -> TlsSession | None:
        """TLS for a connection that was accepted, None for a plain one."""
        return TlsSession(self._credentials.server, peer) if self._credentials is not None else None

    def connecting(self, host: str, address: str, peer: str) -> TlsSession | None:
        """TLS for a connection to a host that has been found at an IP address, None for a plain one.

        Raises:
            PlainRefusedError: it would be a plain one to another host.
        """
        if self._credentials is not None:
            return TlsSession(self._credentials.client, peer, host)
        if not is_loopback(address):
            if not self._tls.insecure:
                raise PlainRefusedError(
                    f"{peer} is another host and [tls] is not set here: set [tls] certificate, key and authority on "
                    "both hosts, or write out [tls] insecure = true to send guests over plain TCP"
                )
            log.warning("INSECURE: guests go to another host over plain TCP, as [tls] insecure says", peer=peer)
        return None

    def check_listen(self, address: str) -> None:
        """Whether this host may listen on an IP address.

        Raises:
            PlainRefusedError: anybody on the network could come, without TLS.
        """
        if self._credentials is not None or is_loopback(address):
            return
        if not self._tls.insecure:
            raise PlainRefusedError(
                f"[listen] address {address} is open to other hosts and [tls] is not set: set [tls] certificate, key "
                "and authority, listen on 127.0.0.1, or write out [tls] insecure = true"
            )
        log.warning(
            "INSECURE: guests are taken in over plain TCP from whoever reaches this address, as [tls] insecure says",
            address=address,
        )

    def check_peer(self, names: Names, peer: str) -> None:
        """Whether this host talks to a peer at all.

        Raises:
            RefusedError: its certificate has no name that ``[tls] names`` lets in.
        """
        if names == THIS_HOST:
            return
        if self._credentials is not None and not any(_fits(names, pattern) for pattern in self._tls.names):
            raise RefusedError(
                f"{peer} is {_called(names)}, and [tls] names lets only {', '.join(self._tls.names)} in; add it there "
                "if it belongs to these hosts"
            )

    def check_accept(self, names: Names, guest: str) -> None:
        """Whether a peer may send a guest here.

        Raises:
            RefusedError: no rule of ``[authorisation] accept_from`` allows it.
        """
        if not self._allows(self._rules.accept_from, names, guest):
            raise RefusedError(
                f"{_called(names)} may not send guest {guest!r} here: no rule of [authorisation] accept_from allows it"
            )

    def check_send(self, names: Names, guest: str) -> None:
        """Whether a guest may be sent to a peer.

        Raises:
            RefusedError: no rule of ``[authorisation] send_to`` allows it.
        """
        if not self._allows(self._rules.send_to, names, guest):
            raise RefusedError(
                f"{_called(names)} may not get guest {guest!r} from here: no rule of [authorisation] send_to allows it"
            )

    def _allows(self, rules: Sequence[str], names: Names, guest: str) -> bool:
        """Whether a rule is for one of the names and for the guest; without TLS there are no names, and no rules."""
        if self._credentials is None or names == THIS_HOST:
            return True
        for rule in rules:
            name, _, guests = rule.partition("/")
            if _fits(names, name) and fnmatchcase(guest, guests or "*"):
                return True
        return False


def is_loopback(address: str) -> bool:
    """Whether an IP address, with or without a scope, reaches this host only."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback


def _fits(names: Iterable[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern.lower()) for name in names)


def _called(names: Names) -> str:
    return " or ".join(names) if names else "a host without a name in its certificate"
