"""Two hosts with real QEMU guests, faults on the way between them, and a witness who hears all that the guests say.

    QEMU a   beats, console, run log, lane 0 of the disk    |  all read from each QEMU's first moment to its end,
    QEMU b   beats, console, run log, lane 1 of the disk    |  by a thread that outlives daemons, QEMUs and faults

It is the guest itself that tells whether two copies of it ran: by numbers that two QEMUs say, or that are written into
two lanes of its disk. QEMU's own logs of its run state are looked at all the while as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any, ClassVar, Final

from scripts.qemu_rig.console import Console
from scripts.qemu_rig.definition import console_paths, write_definition
from scripts.qemu_rig.disk import make_disk, read_log, written_twice
from scripts.qemu_rig.gaps import said_twice
from scripts.qemu_rig.image import GuestImage
from scripts.qemu_rig.launcher import BOOT_TIMEOUT_S, QemuSpec
from scripts.rig.faulty import FaultyPair
from scripts.rig.host import Host
from scripts.rig.processes import is_alive
from scripts.rig.waiting import RigError, until

GUEST: Final = "g1"
_LOOK_S: Final = 0.003
_CONNECT_S: Final = 0.05
_BEATS: Final = 20
_BEATS_S: Final = 60.0
_RUN_STATE: Final = re.compile(rb"\bvm_state_notify running ([01])\b")
_SHARED_MEMORY: Final = Path("/dev/shm")


class QemuHost(Host):
    """A host whose guests are QEMU's.

    Attributes:
        consoles: those of every QEMU that ran the guest here, the newest last.
    """

    def __init__(
        self, directory: Path, name: str, *, role: str = "host", namespace: str | None = None,
        address: str = "127.0.0.1", **sections: dict[str, Any],
    ) -> None:  # fmt: skip
        super().__init__(directory, name, role=role, namespace=namespace, address=address, **sections)
        self.consoles: list[Console] = []
        self._known: dict[str, tuple[int, int]] = {}
        self._newest = GUEST
        """The place of the newest QEMU."""
        self.configure(qemu={**sections.get("qemu", {}), "definitions": str(self.definitions)})

    @property
    def definitions(self) -> Path:
        """Where the definitions of its guests are."""
        return self.directory / "definitions"

    @property
    def run_directory(self) -> Path:
        """Where the sockets and logs of its QEMUs are."""
        return self.directory / "guests" / "qemu"

    def vmm_pids(self) -> dict[int, str]:
        marker = f"unix:{self.run_directory}/"
        found: dict[int, str] = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                for word in os.fsdecode(path.read_bytes()).split("\0"):
                    if word.startswith(marker):
                        place = Path(word.removeprefix(marker).partition(",")[0]).stem
                        found[int(path.parent.name)] = place.removesuffix("~")
        return found

    async def verify(self, name: str = GUEST) -> dict[str, Any]:
        """Have the guest check all of its pages, and see that it goes on meanwhile."""
        console = self.consoles[-1]
        bad = await asyncio.to_thread(console.check)
        await asyncio.to_thread(console.wait_for_beats, _BEATS, _BEATS_S)
        complaints = console.complaints()
        return {"ok": not bad and not complaints, "message": f"{bad} pages of {name} are wrong: {complaints}"}

    def look(self) -> None:
        """Begin to listen to a QEMU that has appeared since."""
        for place in (GUEST, f"{GUEST}~"):
            console, beats = console_paths(self.directory / "guests", place)
            with contextlib.suppress(OSError, RigError):
                status = beats.stat()
                if (identity := (status.st_ino, status.st_ctime_ns)) != self._known.get(place):
                    self.consoles.append(Console(console, beats, _CONNECT_S))
                    self._known[place], self._newest = identity, place

    def run_state(self) -> tuple[bool, int]:
        """Whether the newest QEMU lives and its vCPUs run, by its own log, and how long that log is."""
        if not self.consoles or not is_alive(self.consoles[-1].pid):
            return False, 0
        try:
            log = (self.run_directory / f"{self._newest}.runlog").read_bytes()
        except FileNotFoundError:
            return False, 0
        states = _RUN_STATE.findall(log)
        return bool(states) and states[-1] == b"1", len(log)


class QemuPair(FaultyPair):
    """Two such hosts, with a definition of the guest on each.

    Args:
        spec: the guest. Its disk, if it has one, is made anew for each new guest.
        image: what it boots.
        quick: as of ``Pair``.
    """

    host_type: ClassVar[type[Host]] = QemuHost
    # On a busy machine a QEMU alone may take as long to start as the whole migration of a simulated guest.
    fire_timeout_s: ClassVar[float] = 90.0
    cell_timeout_s: ClassVar[float] = 300.0

    def __init__(self, spec: QemuSpec, image: GuestImage, *, quick: bool = True, **options: Any) -> None:
        self._ram = Path(tempfile.mkdtemp(prefix="mig-", dir=_SHARED_MEMORY))
        super().__init__(quick=quick, vmm={"driver": "qemu"}, qemu={"ram_directory": str(self._ram)}, **options)
        self.spec = spec
        self._both_ran: list[str] = []
        self._over = threading.Event()
        self._witness = threading.Thread(target=self._watch)
        for number, host in enumerate(self.qemu_hosts):
            write_definition(host.definitions, GUEST, spec, image, number)

    @property
    def qemu_hosts(self) -> tuple[QemuHost, ...]:
        """Both hosts, as what they are."""
        return tuple(host for host in self.hosts if isinstance(host, QemuHost))

    def start(self) -> None:
        self._witness.start()
        super().start()

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._over.set()
            if self._witness.ident is not None:
                self._witness.join()
            for host in self.qemu_hosts:
                for console in host.consoles:
                    console.close()
            shutil.rmtree(self._ram, ignore_errors=True)

    async def new_guest(self, host: Host, name: str, seed: int = 0) -> None:
        if self.spec.disk is not None:
            make_disk(self.spec.disk.path, self.spec.disk.read_mib)
        await host.create_guest(name, self.spec.memory_mib)
        console = await self.console(host)
        await asyncio.to_thread(console.wait_for, "READY", BOOT_TIMEOUT_S)

    async def console(self, host: Host) -> Console:
        """The console of the QEMU that has the guest on a host, once it is heard.

        Raises:
            RigError: there is none.
        """
        (of_ours,) = (one for one in self.qemu_hosts if one is host)

        async def heard() -> Console | None:
            return next((console for console in of_ours.consoles[-1:] if not console.ended), None)

        return await until(f"a QEMU with the guest on host {host.name}", heard)

    def forget_runs(self) -> None:
        self._both_ran.clear()
        for host in self.qemu_hosts:
            gone, host.consoles = host.consoles, []
            for console in gone:
                console.close()

    def double_runs(self, name: str = GUEST) -> list[str]:
        consoles = [console for host in self.qemu_hosts for console in host.consoles]
        found = list(self._both_ran)
        if said := said_twice(*(console.beats() for console in consoles)):
            found.append(f"two QEMUs said the beats {said[:5]} of {name}, or it went on from older memory")
        if self.spec.disk is not None and (written := written_twice(read_log(self.spec.disk.path))):
            found.append(f"records {written[:5]} of {name}'s log were written on two hosts")
        for console in consoles:
            found += [f"the guest in QEMU {console.pid} says: {complaint}" for complaint in console.complaints()]
        return found

    def _watch(self) -> None:
        """Listen to every QEMU there is, and compare the run logs of both hosts, until the end."""
        first, second = self.qemu_hosts
        while not self._over.wait(_LOOK_S):
            for host in (first, second):
                host.look()
            before = first.run_state()
            # The first must have run all the while: its log did not grow between two looks at it.
            if before[0] and second.run_state()[0] and first.run_state() == before and not self._both_ran:
                self._both_ran.append("by QEMU's logs of their run states, both copies of the guest run")
