"""Owner keys that name this host, of guests that are not here.

    it came by a migration that was discarded here     -> given back to the host that it came from
    it was here before this host was booted            -> deleted: its process ended with the host
    it was here, and the process that it had has ended -> deleted: it ended while no daemon was here to see it

All others stay: only somebody's word (a fence) says that a guest runs nowhere.
"""

from __future__ import annotations

from pathlib import Path

import structlog

from migrated.fleet.mirror import Mirror
from migrated.member.follower import Follower
from migrated.member.identity import boot_id
from migrated.member.local import GuestsHere
from migrated.member.owners import Owners
from migrated.state.guest_processes import GuestProcesses
from migrated.state.whole_files import replace_file

log = structlog.get_logger()

BOOT_ID = "boot-id"
"""Name of the file in the state directory with the boot in which the daemon last saw to these keys."""


class Leftovers:
    """Sees to the keys of guests that are not here.

    Args:
        follower: its mirror.
        local: this host.
        owners: writes the keys.
        host: this host's name in the fleet.
        state: the state directory.
    """

    def __init__(self, follower: Follower, local: GuestsHere, owners: Owners, host: str, state: Path) -> None:
        self._follower = follower
        self._local = local
        self._owners = owners
        self._host = host
        self._kept = state / BOOT_ID
        self._boot = boot_id()
        self._processes = GuestProcesses(state, self._boot)
        self._ended: set[str] | None = None
        """Guests that ended before this daemon began; None before the first look."""
        self._noted = False

    async def see_to(self) -> None:
        """Change the keys that can be changed. Raises StoreError when the store does not answer."""
        mirror = self._follower.mirror
        for guest in self._missing(mirror):
            known = mirror.owners[guest]
            migration_id = known.migration_id
            if known.previous is not None and migration_id is not None and self._local.discarded(migration_id):
                log.info("a guest that was discarded here is given back", guest=guest, to=known.previous)
                await self._owners.give_back(guest, migration_id)
        if self._ended is None:
            self._ended = self._ended_before(mirror)
            for guest in self._ended:
                log.warning("a guest ended while no daemon was here: other hosts may start it", guest=guest)
                self._owners.release(guest)
        still_owned = self._ended & self._missing(mirror)
        if not still_owned and not self._noted:
            self._note_boot()
        self._processes.note(self._local.processes(), still_owned)

    def _ended_before(self, mirror: Mirror) -> set[str]:
        """Guests of this host that ended with the last boot, or since the last daemon noted their process."""
        missing = {guest for guest in self._missing(mirror) if mirror.owners[guest].previous is None}
        try:
            before = self._kept.read_text(encoding="ascii").strip()
        except OSError:
            before = ""
        # An empty file is one that an older version could not write to its end.
        return missing if before not in ("", self._boot) else missing & self._processes.ended()

    def _note_boot(self) -> None:
        """Note that this boot was seen to; the next time if it cannot be written."""
        try:
            replace_file(self._kept, f"{self._boot}\n")
        except OSError as error:
            log.warning("that this boot was seen to cannot be noted", file=str(self._kept), reason=error.strerror)
        else:
            self._noted = True

    def _missing(self, mirror: Mirror) -> set[str]:
        owned = mirror.by_owner.get(self._host, set()) - self._owners.started
        return {guest for guest in owned if not self._local.is_here(guest)}
