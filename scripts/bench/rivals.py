"""The rivals of the benchmark: the bare socket, iperf3 and stock QEMU, each on the same machine in the same run.

As a program it is one bare pair: ``python -m scripts.bench.rivals SIZE_MIB`` prints, as JSON, GiB/s of ``sendall`` in
one process to ``recv_into`` in another, into fresh shared memory that asks for huge pages as the daemons' does, and the
processor time of both.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from scripts.basics import GIB, MIB, ROOT
from scripts.rig.ports import free_port
from scripts.rig.processes import cpu_s

PIECE_BYTES: Final = MIB
BUFFER_BYTES: Final = 4 * MIB
QEMU: Final = "qemu-system-x86_64"
QEMU_TIMEOUT_S: Final = 120.0
POLL_S: Final = 0.002
_SPENT: Final = struct.Struct("=d")
"""How the receiving process of the bare pair says that it has everything: by its processor time (s)."""


class RivalError(Exception):
    """A rival could not be measured; the sentence says why."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What moving some memory took: its rate, and the processor time (user and system) of the two processes."""

    gib_per_s: float
    source_s_per_gib: float
    destination_s_per_gib: float


def shared_memory(size_bytes: int) -> mmap.mmap:
    """Fresh shared memory, as a guest's is."""
    descriptor = os.memfd_create("bench", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size_bytes)
    memory = mmap.mmap(descriptor, size_bytes)
    os.close(descriptor)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def fill_random(memory: mmap.mmap | np.memmap[Any, Any], size_bytes: int) -> None:
    """Fill with bytes that do not compress."""
    generator = np.random.default_rng(1)
    words = np.frombuffer(memory, np.uint64)
    for begin in range(0, size_bytes // 8, MIB):
        part = words[begin : begin + MIB]
        part[:] = generator.integers(1, 1 << 63, len(part), np.uint64)


def warm(size_mib: int) -> None:
    """Have the host back half as much memory again as the next sample touches, without keeping it."""
    child = os.fork()
    if child == 0:
        np.frombuffer(shared_memory((size_mib + size_mib // 2) * MIB), np.uint8)[::4096] = 1
        os._exit(0)
    os.waitpid(child, 0)


# Section: the bare pair


def raw_pair(size_bytes: int) -> Moved:
    """One bare connection, from the first byte sent to the last one read."""
    source = shared_memory(size_bytes)
    fill_random(source, size_bytes)
    warm(size_bytes // MIB)  # for the receiver; what was warm before went to the source
    listener = socket.create_server(("127.0.0.1", 0))
    child = os.fork()
    if child == 0:
        _receive(socket.create_connection(listener.getsockname()), size_bytes)
        os._exit(0)
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    connection.recv(1)  # its memory is there
    view = memoryview(source)
    begin, used = time.perf_counter(), time.process_time()
    for offset in range(0, size_bytes, PIECE_BYTES):
        connection.sendall(view[offset : offset + PIECE_BYTES])
    used = time.process_time() - used
    answer = connection.recv(_SPENT.size, socket.MSG_WAITALL)
    if len(answer) != _SPENT.size:
        raise RivalError("the receiving process of the bare pair failed")
    seconds = time.perf_counter() - begin
    os.waitpid(child, 0)
    size_gib = size_bytes / GIB
    return Moved(size_gib / seconds, used / size_gib, _SPENT.unpack(answer)[0] / size_gib)


def _receive(connection: socket.socket, size_bytes: int) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    view = memoryview(shared_memory(size_bytes))
    connection.sendall(b"b")
    used = time.process_time()
    for offset in range(0, size_bytes, PIECE_BYTES):
        piece = view[offset : offset + PIECE_BYTES]
        filled = 0
        while filled < len(piece):
            filled += connection.recv_into(piece[filled:], 0, socket.MSG_WAITALL)
    connection.sendall(_SPENT.pack(time.process_time() - used))


def raw(size_mib: int) -> Moved:
    """A bare pair in processes of its own."""
    command = [sys.executable, "-m", __name__, str(size_mib)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RivalError(f"the bare pair failed: {done.stderr.strip()[-500:]}")
    return Moved(**json.loads(done.stdout))


# Section: iperf3


def iperf3(seconds: int = 2) -> float:
    """GiB/s of one iperf3 stream over loopback."""
    port = str(free_port())
    listen = ["iperf3", "-s", "-1", "-B", "127.0.0.1", "-p", port, "--forceflush"]
    server = subprocess.Popen(listen, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        while "listening" not in (line := server.stdout.readline()):
            if not line:
                raise RivalError("the iperf3 server ended before it listened")
        client = ["iperf3", "-c", "127.0.0.1", "-p", port, "-t", str(seconds), "-J"]
        done = subprocess.run(client, capture_output=True, text=True, check=False)
        try:
            return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 8 / GIB
        except (ValueError, KeyError) as error:
            raise RivalError(f"iperf3 failed: {done.stdout.strip()[-300:]}") from error
    finally:
        server.terminate()
        server.communicate()


# Section: QEMU


class QemuSource:
    """RAM of a stopped QEMU guest that was filled beforehand, in a file on shared memory; every sample migrates it to
    a fresh QEMU."""

    def __init__(self, directory: Path, size_mib: int, content: str) -> None:
        self._directory = directory
        self._size_mib = size_mib
        self._file = Path("/dev/shm") / f"{directory.name}-{content}"
        with self._file.open("wb+") as file:
            file.truncate(size_mib * MIB)
            memory = mmap.mmap(file.fileno(), size_mib * MIB)
        if content == "random":
            fill_random(memory, size_mib * MIB)
        else:
            np.frombuffer(memory, np.uint8)[::4096] = 0  # touched, all zero

    def close(self) -> None:
        """Give the RAM file back."""
        self._file.unlink(missing_ok=True)

    async def migrate(self, channels: int) -> Moved:
        """One migration (multifd with more than one channel), of guest RAM, from the command to the end
        on the destination: the source alone is done while the destination still works off what sockets hold."""
        async with contextlib.AsyncExitStack() as stack:
            file = f"memory-backend-file,mem-path={self._file},share=on"
            source = await stack.enter_async_context(self._qemu("source", file))
            fresh = await stack.enter_async_context(self._qemu("fresh", "memory-backend-memfd,share=on", "defer"))
            for side in (source, fresh):
                await side.set("migrate-set-parameters", {"max-bandwidth": 1 << 40})
                if channels > 1:
                    on = [{"capability": "multifd", "state": True}]
                    await side.set("migrate-set-capabilities", {"capabilities": on})
                    await side.set("migrate-set-parameters", {"multifd-channels": channels})
            with socket.create_server(("127.0.0.1", 0)) as probe:
                uri = f"tcp:127.0.0.1:{probe.getsockname()[1]}"
            await fresh.set("migrate-incoming", {"uri": uri})
            sides = (source.pid, fresh.pid)
            begin, used = time.perf_counter(), [cpu_s(pid) for pid in sides]
            await source.set("migrate", {"uri": uri})
            await source.migrated()
            await fresh.migrated()
            seconds = time.perf_counter() - begin
            size_gib = self._size_mib * MIB / GIB
            spent = [(cpu_s(pid) - before) / size_gib for pid, before in zip(sides, used, strict=True)]
        return Moved(size_gib / seconds, *spent)

    @contextlib.asynccontextmanager
    async def _qemu(self, name: str, backend: str, incoming: str | None = None) -> AsyncIterator[_Qmp]:
        path = self._directory / f"{name}.qmp"
        command = [
            QEMU, "-machine", "pc,memory-backend=ram", "-m", str(self._size_mib), "-S", "-nodefaults",
            "-display", "none",
            "-object", f"{backend},id=ram,size={self._size_mib}M", "-qmp", f"unix:{path},server=on,wait=off",
            *(("-incoming", incoming) if incoming else ()),
        ]  # fmt: skip
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        try:
            yield await _Qmp.connect(path, process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            await process.wait()
            path.unlink(missing_ok=True)


class _Qmp:
    """As much of QMP as a migration needs."""

    def __init__(self, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.pid = pid
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, path: Path, process: asyncio.subprocess.Process) -> _Qmp:
        deadline = time.monotonic() + QEMU_TIMEOUT_S
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                qmp = cls(process.pid, *await asyncio.open_unix_connection(path))
                await qmp.set("qmp_capabilities", {})
                return qmp
            if process.returncode is not None or time.monotonic() > deadline:
                assert process.stderr is not None
                raise RivalError(f"QEMU did not start: {(await process.stderr.read(500)).decode(errors='replace')}")
            await asyncio.sleep(POLL_S)

    async def set(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Execute a command and return its result."""
        self._writer.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            line = await self._reader.readline()
            if not line:
                raise RivalError(f"QEMU ended during {command}")
            answer = json.loads(line)
            if "error" in answer:
                raise RivalError(f"QEMU refused {command}: {answer['error']['desc']}")
            if "return" in answer:
                return dict(answer["return"])

    async def migrated(self) -> None:
        """Wait until the migration is complete for this side."""
        deadline = time.monotonic() + QEMU_TIMEOUT_S
        while (info := await self.set("query-migrate", {})).get("status") != "completed":
            if info.get("status") in ("failed", "cancelled") or time.monotonic() > deadline:
                raise RivalError(f"QEMU did not migrate: {info.get('error-desc', info.get('status'))}")
            await asyncio.sleep(POLL_S)


def installed(program: str) -> bool:
    """Whether a program can be run here."""
    return shutil.which(program) is not None


if __name__ == "__main__":
    print(json.dumps(asdict(raw_pair(int(sys.argv[1]) * MIB))))
