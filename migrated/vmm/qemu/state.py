"""Device state of a QEMU process, out of it and into it, without a file on disk and without a word about Xen.

``xen-save-devices-state`` writes the state of all devices of a stopped guest, no memory, into a memfd of ours, and
lets go of the disks; 1.4 to 3 ms here. What it lacks to be a whole migration stream is put in: the section that names
the machine type, so that any ``-incoming defer`` takes it with its defaults. There it enters through one end of a
socket pair, which is handed over while the guest still runs at the source.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time
from typing import Final

from migrated.base.errors import VmmError
from migrated.vmm.qemu.qmp import Qmp
from migrated.vmm.seam import StateBytes

_SAVE_S: Final = 30.0
_LOAD_S: Final = 60.0
_HEADER: Final = struct.Struct(">4sI")
_MAGIC: Final = b"QEVM"
_VERSION: Final = 3
_CONFIGURATION: Final = 0x07
_DESCRIPTOR_NAME: Final = "migrated-state"
CAPABILITIES: Final = ({"capability": "events", "state": True}, {"capability": "late-block-activate", "state": True})
"""At the destination: its disks are opened when it is resumed, not when state is loaded."""


def with_machine(saved: bytes, machine: str) -> bytes:
    """A migration stream that begins with the machine type, out of what ``xen-save-devices-state`` wrote.

    Raises:
        VmmError: it is of an unknown format.
    """
    if len(saved) < _HEADER.size or _HEADER.unpack_from(saved) != (_MAGIC, _VERSION):
        raise VmmError("QEMU saved its devices in an unknown format: this version of QEMU cannot be used")
    name = machine.encode()
    section = struct.pack(">BI", _CONFIGURATION, len(name)) + name
    return saved[: _HEADER.size] + section + saved[_HEADER.size :]


class StateSave:
    """Saves the devices of one guest. ``prepare`` may be called while it runs."""

    def __init__(self, qmp: Qmp) -> None:
        self._qmp = qmp
        self._reading = -1
        self._writing = -1
        self._path = ""

    async def prepare(self) -> None:
        """Give QEMU the file that it will write to; without effect a second time."""
        if self._path:
            return
        self._reading = os.memfd_create("device-state", os.MFD_CLOEXEC)
        # QEMU takes a descriptor for writing only where that is all that it allows.
        self._writing = os.open(f"/proc/self/fd/{self._reading}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            self._path = await self._qmp.add_descriptor(self._writing)
        except BaseException:
            self.close()
            raise

    async def save(self, machine: str, *, release_disks: bool) -> tuple[bytes, int]:
        """Save the state of a stopped guest.

        Args:
            machine: its type, for the stream.
            release_disks: let go of its disks, so that the destination can open them; until ``cont`` QEMU must not be
                asked for that again: 7.2 aborts.

        Returns:
            The stream, and what saving took (ns).
        """
        await self.prepare()
        os.ftruncate(self._writing, 0)
        os.lseek(self._writing, 0, os.SEEK_SET)
        begin_ns = time.monotonic_ns()
        await self._qmp.call("xen-save-devices-state", _SAVE_S, filename=self._path, live=release_disks)
        took_ns = time.monotonic_ns() - begin_ns
        return with_machine(os.pread(self._reading, os.fstat(self._reading).st_size, 0), machine), took_ns

    async def release(self) -> None:
        """Take the file back from QEMU, which runs on."""
        if self._path:
            with contextlib.suppress(VmmError):
                await self._qmp.call("remove-fd", fdset_id=int(self._path.rpartition("/")[2]))
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        for fd in (self._reading, self._writing):
            if fd >= 0:
                os.close(fd)
        self._reading = self._writing = -1
        self._path = ""


class StateLoad:
    """Loads the devices of one incoming guest, once."""

    def __init__(self, qmp: Qmp) -> None:
        self._qmp = qmp
        self._stream: socket.socket | None = None
        self._interrupted = False

    async def prepare(self) -> None:
        """Let QEMU wait for the stream; without effect a second time."""
        if self._stream is not None:
            return
        await self._qmp.call("migrate-set-capabilities", capabilities=list(CAPABILITIES))
        await self._qmp.call("migrate-set-parameters", **{"announce-rounds": 0})  # it announces itself when it runs
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setblocking(False)
            await self._qmp.pass_descriptor(_DESCRIPTOR_NAME, theirs.fileno())
        self._stream = ours
        await self._qmp.call("migrate-incoming", uri=f"fd:{_DESCRIPTOR_NAME}")

    async def load(self, data: StateBytes) -> int:
        """Load a stream; the guest stays stopped. Returns what it took (ns).

        Raises:
            VmmError: QEMU refused it, or it was interrupted.
        """
        await self.prepare()
        stream = self._stream
        if stream is None:
            raise VmmError("the state of a guest can be loaded once only")
        loop, begin_ns = asyncio.get_running_loop(), time.monotonic_ns()
        try:
            async with self._qmp.listen("MIGRATION") as next_event, asyncio.timeout(_LOAD_S):
                await loop.sock_sendall(stream, data)
                stream.shutdown(socket.SHUT_WR)
                while True:
                    status = (await next_event())["data"]["status"]
                    if status == "completed":
                        return time.monotonic_ns() - begin_ns
                    if status == "failed":
                        raise VmmError(f"QEMU (process {self._qmp.pid}) refused the guest's device state; {_LOOK}")
        except TimeoutError as error:
            raise VmmError(f"QEMU (process {self._qmp.pid}) did not load device state in {_LOAD_S:g} s") from error
        except OSError as error:
            why = "loading was interrupted" if self._interrupted else f"it hung up ({error.strerror}); {_LOOK}"
            raise VmmError(f"QEMU (process {self._qmp.pid}) did not load the guest's device state: {why}") from error
        finally:
            stream.close()

    def interrupt(self) -> None:
        """End a running load: QEMU, which cannot take a stream twice, gives up and ends."""
        self._interrupted = True
        if self._stream is not None:
            self._stream.close()

    def close(self) -> None:
        """Let go of the stream."""
        if self._stream is not None:
            self._stream.close()


_LOOK: Final = "its own words are in its log"
