"""The target of a migration: the URI that an operator gives, and the place behind it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final

from migrated.environment import Environment
from migrated.link.sockets import OwnPlace, Place
from migrated.settings.config import parse_uri
from migrated.vmm.seam import Replacement

HERE: Final = "local:"
"""The URI of this daemon itself, in journal and record: the guest gets another VMM on this host."""


@dataclass(frozen=True, slots=True)
class Target:
    """A destination: its URI, and the place to connect to."""

    uri: str
    place: Place


def target_of(uri: str) -> Target:
    """The target of a migration from ``tcp:HOST:PORT`` or ``unix:PATH``.

    Raises:
        ValueError: it is not such a URI; the sentence says what is wrong.
    """
    return Target(uri, parse_uri(uri))


def target_here(env: Environment, replacement: Replacement = Replacement()) -> Target:  # noqa: B008 - it is frozen
    """This daemon itself, with what an operator wants of the new VMM."""
    return Target(HERE, OwnPlace(partial(env.open_own, replacement)))
