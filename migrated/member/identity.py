"""Whether the name of this host in its fleet is its own: owners, slots and steps go by it, so one daemon has it.

hosts/NAME is missing, or this daemon wrote it     -> the name is free, or ours
the daemon before this one wrote it                -> ours: it has ended, its lease has not yet
anybody else wrote it, and their lease lives       -> taken: this daemon keeps out of the fleet until that ends
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Final

from migrated.fleet.mirror import Mirror

MEMBER_ID: Final = "fleet-member-id"
"""Name of the file in the state directory by which the daemons of one host know each other."""
_LIFE: Final = "."


class Identity:
    """This daemon, as it tells itself from another one that has the same name.

    Args:
        host: this host's name in the fleet.
        state: the state directory.

    Attributes:
        daemon: goes into ``HostDocument.daemon``: the id of the state directory, and that of this run of the daemon. A
            machine that was copied with its state directory is told apart by the second.
    """

    def __init__(self, host: str, state: Path) -> None:
        self._host = host
        self._member = _kept_id(state / MEMBER_ID)
        self.daemon: Final = f"{self._member}{_LIFE}{secrets.token_hex(8)}"
        self._told = False

    def told(self) -> None:
        """This daemon has written the key of its host: no earlier one can be what is found there from now on."""
        self._told = True

    def stranger(self, mirror: Mirror) -> str | None:
        """Return why this daemon is not the host that the fleet knows under its name, a sentence; None when it is, or
        can be."""
        there = mirror.hosts.get(self._host)
        if there is None or there.daemon == self.daemon:
            return None
        if not self._told and there.daemon.startswith(f"{self._member}{_LIFE}"):
            return None
        return (
            f"Another daemon is in the fleet as {self._host!r}, at {there.address}: this one keeps out of the fleet "
            "until that one has left. Give one of the two another [fleet] name and restart it."
        )


def _kept_id(path: Path) -> str:
    """The id in a file, a new one the first time."""
    known = path.read_text(encoding="ascii").strip() if path.exists() else ""
    if not known:
        known = secrets.token_hex(16)
        path.write_text(f"{known}\n", encoding="ascii")
    return known
