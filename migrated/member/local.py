"""The interface of a fleet's member to its own host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from migrated.environment import DaemonRole
from migrated.record.model import Record
from migrated.record.terms import Stage
from migrated.settings.parameters import MigrationParameters


@dataclass(frozen=True, slots=True)
class LocalGuest:
    """A guest of this host.

    Attributes:
        arriving: it is on its way here and does not run yet.
        in_doubt: it was handed over, and nobody knows yet whether it runs elsewhere.
    """

    name: str
    vmm: str
    memory_bytes: int
    arriving: bool
    in_doubt: bool = False


class GuestsHere(Protocol):
    """Which guests are on this host, and which never came to be."""

    def is_here(self, guest: str) -> bool:
        """Whether a process of a guest is here, whatever its state: also one that does not answer."""
        ...

    def processes(self) -> dict[str, int]:
        """The process of each guest that is here (its number), also of one that does not answer; not of one that is on
        its way here, or has gone on."""
        ...

    def discarded(self, migration_id: str) -> bool:
        """Whether an attempt to bring a guest here was discarded, so that the guest will never run of it."""
        ...


class LocalHost(GuestsHere, Protocol):
    """This host, as its membership in a fleet uses it. Calls raise OperationError when they are refused."""

    @property
    def role(self) -> DaemonRole:
        """Which directions of migration it serves."""
        ...

    def local_guests(self) -> list[LocalGuest]:
        """Guests that are here or on their way here, retired ones left out."""
        ...

    async def offers(self) -> frozenset[str]:
        """Return words for things of this host that not every host has and a guest may need."""
        ...

    async def needs(self, guest: str) -> frozenset[str] | None:
        """Return the words of ``offers`` that a guest needs; None while it does not say."""
        ...

    def attempts(self) -> tuple[int, int]:
        """The numbers of attempts that run into this host, and out of it."""
        ...

    def parameters(self, guest: str | None) -> MigrationParameters:
        """The parameters of a guest's next migration."""
        ...

    async def begin_migration(self, guest: str, uri: str, overrides: dict[str, object], migration_id: str) -> None:
        """Begin an attempt under an id that was written down before."""
        ...

    def stage(self, migration_id: str) -> Stage:
        """How far an attempt to move a guest away has come with the sending of memory; one that is not under way sends
        nothing."""
        ...

    def pace_first_round(self, migration_id: str, bytes_per_s: int) -> None:
        """Let the first round of an attempt go faster or slower than its cap, if it has not ended."""
        ...

    async def outcome(self, migration_id: str) -> dict[str, Any] | None:
        """The record of an attempt once it has ended, or is in doubt; None when there is none (yet)."""
        ...

    def is_open(self, migration_id: str) -> bool:
        """Whether an attempt to move a guest away is under way, or waits to be taken up after a restart."""
        ...

    async def fence(self, guest: str, token: int) -> None:
        """Let the ownership lock of a guest carry a fencing token, if the guest has one and holds it."""
        ...

    async def cancel(self, guest: str) -> None:
        """Cancel the attempt of a guest."""
        ...

    async def load(self) -> None:
        """Read the records of the last attempts. Before ``recent``, once."""
        ...

    @property
    def recent(self) -> Sequence[Record]:
        """Records of the last attempts, newest first."""
        ...
