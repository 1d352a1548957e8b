"""One stock QEMU with the rig's guest, started as anyone would start it: no option is there for our sake but the number
of the incarnation, which the guest writes into its log.

    async with running_qemu(QemuSpec(...), image, directory) as qemu:
        qemu.console.wait_for("READY", BOOT_TIMEOUT_S)
        await qemu.execute("stop")

Whatever happens inside, the process has ended and its RAM file is gone when the block is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError

from scripts.qemu_rig.console import CONNECT_TIMEOUT_S, Console
from scripts.qemu_rig.image import GuestImage
from scripts.qemu_rig.kernel import QEMU
from scripts.qemu_rig.workload import Workload
from scripts.rig.waiting import RigError, until

Backing: TypeAlias = Literal["private", "file", "memfd", "hugetlb"]
Cache: TypeAlias = Literal["none", "writeback"]
Machine: TypeAlias = Literal["q35", "pc"]

BOOT_TIMEOUT_S: Final = 120.0
"""From the start of QEMU to READY, under emulation on a busy machine."""
_END_TIMEOUT_S: Final = 60.0
_SHARED_MEMORY: Final = Path("/dev/shm")
KERNEL_ARGUMENTS: Final = "console=ttyS0 quiet panic=-1 no_timer_check rdinit=/init"
"""``no_timer_check``: on a busy host an emulated timer can come so late that the kernel takes it for broken at boot."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A raw image as virtio-blk device. ``cache="none"`` is O_DIRECT: it goes past the page tables."""

    path: Path
    cache: Cache = "writeback"
    log_ms: int = 0
    """Period of the guest's log records; 0 is no log."""
    read_mib: int = 0
    """How much data behind the log the guest reads, again and again; 0 is none."""


@dataclass(frozen=True, slots=True)
class QemuSpec:
    """The kind of guest to start. Source and destination of a move are started from equal ones.

    Attributes:
        backing: ``private`` is what QEMU does when it is told nothing; ``file`` is shared memory on tmpfs; ``hugetlb``
            takes huge pages that the host has set aside, and is not known to definitions.
        numa: memory in two halves, each with a backend and a node of its own.
        video_mib: memory of a VGA card; 0 is no card.
        network: a virtio card on QEMU's user network, which lets nothing out.
        extra_kib: memory on top of ``memory_mib``, a multiple of 8.
    """

    memory_mib: int = 256
    workload: Workload = field(default_factory=Workload.idle)
    backing: Backing = "private"
    numa: bool = False
    machine: Machine = "q35"
    cpus: int = 1
    disk: Disk | None = None
    video_mib: int = 0
    network: bool = True
    rng: bool = True
    extra_kib: int = 0

    @property
    def node_bytes(self) -> tuple[int, ...]:
        """The size of each memory node: one, or two with ``numa``."""
        extra, mib = self.extra_kib << 10, self.memory_mib
        return ((mib << 19) + extra, mib << 19) if self.numa else ((mib << 20) + extra,)


def command_line(
    spec: QemuSpec, image: GuestImage, directory: Path, incarnation: int, incoming: bool, extra: Sequence[str] = ()
) -> list[str]:
    """QEMU's command line. Sockets are in ``directory``: ``qmp``, ``console`` and ``beats``."""
    machine, memory = _memory_options(spec, directory)
    guest_arguments = spec.workload.arguments()
    if spec.disk:
        guest_arguments += [f"log_ms={spec.disk.log_ms}", f"read_mib={spec.disk.read_mib}"]
    command = [
        QEMU, "-machine", f"{spec.machine},accel=tcg{machine}", "-cpu", "max", "-smp", str(spec.cpus),
        "-m", f"{sum(spec.node_bytes) >> 10}K", *memory,
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-kernel", str(image.kernel), "-initrd", str(image.initramfs),
        "-append", f"{KERNEL_ARGUMENTS} -- {' '.join(guest_arguments)}",
        "-qmp", f"unix:{directory}/qmp,server=on,wait=off",
        "-fw_cfg", f"name=opt/rig/incarnation,string={incarnation}",
    ]  # fmt: skip
    for port in ("console", "beats"):
        command += ["-chardev", f"socket,id={port},path={directory}/{port},server=on,wait=off"]
        command += ["-device", f"isa-serial,chardev={port}"]
    if spec.disk:
        drive = f"file={spec.disk.path},format=raw,cache={spec.disk.cache},if=none,id=disk"
        command += ["-drive", drive, "-device", "virtio-blk-pci,drive=disk"]
    if spec.network:
        command += ["-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net"]
    command += video_card(spec)
    if spec.rng:
        command += ["-device", "virtio-rng-pci"]
    return [*command, *(("-incoming", "defer") if incoming else ()), *extra]


def video_card(spec: QemuSpec) -> list[str]:
    """The arguments for the guest's VGA card, if it has one."""
    return ["-device", f"VGA,vgamem_mb={spec.video_mib}"] if spec.video_mib else []


def _memory_options(spec: QemuSpec, directory: Path) -> tuple[str, list[str]]:
    """Return the suffix of the ``-machine`` option and the further options that give the guest its memory."""
    if spec.backing == "private" and not spec.numa:
        return "", []
    names = ("ram0", "ram1") if spec.numa else ("ram0",)
    options: list[str] = []
    for number, (name, size) in enumerate(zip(names, spec.node_bytes, strict=True)):
        kind = {
            "private": "memory-backend-ram",
            "file": f"memory-backend-file,share=on,mem-path={_ram_file(directory, name)}",
            "memfd": "memory-backend-memfd,share=on",
            "hugetlb": "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M",
        }[spec.backing]
        options += ["-object", f"{kind},id={name},size={size}"]
        if spec.numa:
            options += ["-numa", f"node,nodeid={number},memdev={name}"]
    return ("" if spec.numa else ",memory-backend=ram0"), options


def _ram_file(directory: Path, name: str) -> Path:
    return _SHARED_MEMORY / f"{directory.parent.name}-{directory.name}-{name}"


class Process:
    """A child process that somebody may trace.

    A process that waits for its child the usual way also gets the stops of a traced one, takes them from the tracer,
    and may take them for the end. So this waits for the process descriptor, which tells of the end only.
    """

    def __init__(self, command: Sequence[str], output: Path) -> None:
        with output.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self.pid = self._process.pid
        self._fd = os.pidfd_open(self.pid)

    def has_ended(self) -> bool:
        """Whether it has; it need not have been waited for yet."""
        return bool(select.select([self._fd], [], [], 0)[0])

    async def ended(self, timeout_s: float) -> int:
        """Wait for the end. Returns the exit status, negative for a signal.

        Raises:
            RigError: it still runs.
        """

        async def over() -> bool:
            return self.has_ended()

        await until(f"the end of process {self.pid}", over, timeout_s)
        return self._process.wait()

    async def end(self) -> None:
        """Kill it if it still runs, and collect it. Nothing can be done with this object afterwards."""
        if not self.has_ended():
            signal.pidfd_send_signal(self._fd, signal.SIGKILL)
        try:
            await self.ended(_END_TIMEOUT_S)
        finally:
            os.close(self._fd)


class Qemu:
    """A QEMU that runs: its process id, its monitor and its guest's console."""

    def __init__(self, process: Process, directory: Path, monitor: QMPClient, console: Console) -> None:
        self._process = process
        self._monitor = monitor
        self.directory = directory
        self.console = console

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def qmp_socket(self) -> Path:
        """Where its monitor listens. It serves one client at a time, and this rig is one: see ``release_monitor``."""
        return self.directory / "qmp"

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a command of the machine protocol and return its result.

        Raises:
            RigError: QEMU refused it.
        """
        try:
            return await self._monitor.execute(command, arguments)
        except ExecuteError as error:
            raise RigError(f"QEMU refused {command}: {error}") from error
        except QMPError as error:
            raise RigError(f"QEMU did not answer {command}: {error}") from error

    async def human(self, command: str) -> str:
        """Run a command of the monitor for people and return what it printed."""
        return str(await self.execute("human-monitor-command", {"command-line": command}))

    async def host_address(self, guest_physical: int) -> int:
        """Where a byte of the guest's memory is in QEMU's own address space."""
        answer = await self.human(f"gpa2hva {guest_physical:#x}")
        try:
            return int(answer.split()[-1], 16)
        except (ValueError, IndexError):
            raise RigError(f"QEMU does not say where guest address {guest_physical:#x} is: {answer}") from None

    async def release_monitor(self) -> None:
        """Leave the monitor to someone else."""
        await self._monitor.disconnect()

    async def ended(self, timeout_s: float) -> int:
        """Wait until the process has ended by itself. Returns its exit status.

        Raises:
            RigError: it has not.
        """
        return await self._process.ended(timeout_s)


@contextlib.asynccontextmanager
async def running_qemu(
    spec: QemuSpec,
    image: GuestImage,
    directory: Path,
    incarnation: int = 0,
    *,
    incoming: bool = False,
    extra: Sequence[str] = (),
) -> AsyncIterator[Qemu]:
    """Start a QEMU with everything of its own in ``directory`` (which is made), and end it with the block.

    Args:
        incarnation: what the guest writes into its log while it runs here.
        incoming: it waits for ``migrate-incoming``.
        extra: more arguments.

    Raises:
        RigError: it did not start; the sentence has what it printed.
    """
    directory.mkdir(parents=True)
    output = directory / "output"
    process = Process(command_line(spec, image, directory, incarnation, incoming, extra), output)
    monitor = QMPClient(directory.name)
    async with contextlib.AsyncExitStack() as stack:
        for name in ("ram0", "ram1"):
            stack.callback(_ram_file(directory, name).unlink, missing_ok=True)
        console_stack = stack.enter_context(contextlib.ExitStack())
        stack.push_async_callback(process.end)  # before the console is closed: it reads to the end
        stack.push_async_callback(_disconnect, monitor)
        await _connect(monitor, directory / "qmp", process, output)
        # In a thread: this waits for sockets, and another QEMU may be served meanwhile.
        console = await asyncio.to_thread(Console, directory / "console", directory / "beats")
        console_stack.enter_context(console)
        yield Qemu(process, directory, monitor, console)


async def _disconnect(monitor: QMPClient) -> None:
    with contextlib.suppress(QMPError, EOFError, OSError):
        await monitor.disconnect()


async def _connect(monitor: QMPClient, path: Path, process: Process, output: Path) -> None:
    async def connected() -> bool:
        if process.has_ended():
            raise RigError(f"QEMU did not start: {output.read_text(errors='replace').strip()[-1000:]}")
        with contextlib.suppress(ConnectError):
            if path.exists():
                await monitor.connect(str(path))
                return True
        return False

    await until(f"QEMU's monitor at {path} did not answer", connected, CONNECT_TIMEOUT_S)
