"""The reservation of a guest for one attempt: nobody else may stop, run, end or migrate it meanwhile."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from migrated.guests.registry import Guest


class Reservation:
    """Holds a guest from its construction on. As a context manager it ends whatever happens inside, so that no failed
    clean-up can leave a guest behind as "being migrated".

    Args:
        guest: the guest, not reserved.
        holder: who holds it: a migration id, or a word for an operator to read.
    """

    def __init__(self, guest: Guest, holder: str) -> None:
        self._guest = guest
        self._holder = holder
        guest.migration_id = holder

    def end(self) -> None:
        """Let the guest go; without effect when this reservation does not hold it any more."""
        if self._guest.migration_id == self._holder:
            self._guest.migration_id = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()
