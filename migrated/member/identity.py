"""Whether the name of this host in its fleet is its own: owners, slots and steps go by it, so one daemon has it.

hosts/NAME is missing, or this daemon wrote it     -> the name is free, or ours
the daemon before this one wrote it, in this boot  -> ours: it has ended, its lease has not yet
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
        state: the state directory, whose lock no two daemons of one machine have at once.
        boot: the kernel's name of this boot. A machine that was copied with its state directory has another one.

    Attributes:
        daemon: goes into ``HostDocument.daemon``: the id of the state directory, the boot, and an id of this run.
    """

    def __init__(self, host: str, state: Path, boot: str) -> None:
        self._host = host
        self._member = f"{_kept_id(state / MEMBER_ID)}{_LIFE}{boot}"
        self.daemon: Final = f"{self._member}{_LIFE}{secrets.token_hex(8)}"
        self._told = False

    def told(self) -> None:
        """Note that this daemon has written the key of its host: what stands there from now on is not of an earlier
        daemon."""
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


def boot_id() -> str:
    """Return the kernel's name of this boot of the host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _kept_id(path: Path) -> str:
    """The id in a file, a new one the first time."""
    known = path.read_text(encoding="ascii").strip() if path.exists() else ""
    if not known:
        known = secrets.token_hex(16)
        path.write_text(f"{known}\n", encoding="ascii")
    return known
