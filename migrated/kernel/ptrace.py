"""ptrace requests on one thread of another process, for the Python thread that makes them (ptrace belongs to a thread).

Only requests that leave the traced thread running when we die are used: SEIZE without EXITKILL, no single step (its
SIGTRAP would be delivered, and kill, if we died before taking it away).
"""

from __future__ import annotations

import ctypes
import os
import time
from typing import Final

_SYSCALL: Final = 24
_CONT: Final = 7
_DETACH: Final = 17
_GETREGSET: Final = 0x4204
_SETREGSET: Final = 0x4205
_SEIZE: Final = 0x4206
_INTERRUPT: Final = 0x4207
_GETSIGMASK: Final = 0x420A
_SETSIGMASK: Final = 0x420B
_O_TRACESYSGOOD: Final = 1
_EVENT_STOP: Final = 128
_WALL: Final = 0x40000000
_SIGTRAP: Final = 5
_SPIN_NS: Final = 300_000
_PAUSE_S: Final = 0.000_05
_MOST_REGISTER_BYTES: Final = 65536

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class TracedGoneError(Exception):
    """The traced thread has ended."""


class NoStopError(Exception):
    """The traced thread did not stop in time."""


class Stop:
    """The reason why a traced thread stopped.

    Attributes:
        signal: the signal that would be delivered now; 0 in every other kind of stop.
        at_syscall: it is at the entry or the exit of a system call.
        by_interrupt: our INTERRUPT was answered.
        group: it is stopped by a signal like SIGSTOP, for everybody.
    """

    def __init__(self, status: int) -> None:
        number, event = os.WSTOPSIG(status), status >> 16
        self.at_syscall = number == _SIGTRAP | 0x80
        self.by_interrupt = event == _EVENT_STOP and number == _SIGTRAP
        self.group = event == _EVENT_STOP and number != _SIGTRAP
        self.signal = 0 if self.at_syscall or event else number


class TracedThread:
    """One thread of another process, seized by the calling thread. It runs on until ``interrupt``.

    Raises:
        OSError: it may not be traced, or there is none (ESRCH).
    """

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self._request(_SEIZE, 0, _O_TRACESYSGOOD)

    def interrupt(self) -> None:
        """Ask it to stop; ``wait`` tells when it has."""
        self._request(_INTERRUPT)

    def wait(self, deadline_ns: int) -> Stop:
        """Wait for its next stop.

        Args:
            deadline_ns: on the monotonic clock.

        Raises:
            TracedGoneError: it ended.
            NoStopError: it did not stop by then: it may hang in the kernel.
        """
        begin_ns = time.monotonic_ns()
        while True:
            try:
                pid, status = os.waitpid(self.tid, os.WNOHANG | _WALL)
            except ChildProcessError as error:
                raise TracedGoneError from error
            if pid and os.WIFSTOPPED(status):
                return Stop(status)
            if pid:
                raise TracedGoneError
            now_ns = time.monotonic_ns()
            if now_ns > deadline_ns:
                raise NoStopError
            if now_ns - begin_ns > _SPIN_NS:
                time.sleep(_PAUSE_S)

    def go_on(self, signal: int = 0) -> None:
        """Let it run, with a signal delivered first."""
        self._request(_CONT, 0, signal)

    def go_to_syscall(self) -> None:
        """Let it run to the next entry or exit of a system call."""
        self._request(_SYSCALL)

    def detach(self) -> None:
        """Detach from it while it is stopped: it runs on."""
        self._request(_DETACH)

    def registers(self, kind: int) -> bytes:
        """One set of its registers (``NT_PRSTATUS`` and so on)."""
        buffer = ctypes.create_string_buffer(_MOST_REGISTER_BYTES)
        vector = _Iovec(ctypes.addressof(buffer), _MOST_REGISTER_BYTES)
        self._request(_GETREGSET, kind, ctypes.addressof(vector))
        return buffer.raw[: vector.length]

    def set_registers(self, kind: int, data: bytes) -> None:
        """Replace one set of its registers."""
        buffer = ctypes.create_string_buffer(data, len(data))
        vector = _Iovec(ctypes.addressof(buffer), len(data))
        self._request(_SETREGSET, kind, ctypes.addressof(vector))

    def blocked_signals(self) -> int:
        """The mask of signals that it blocks, as it stands when no system call has replaced it for its own time."""
        mask = ctypes.c_uint64()
        self._request(_GETSIGMASK, ctypes.sizeof(mask), ctypes.addressof(mask))
        return mask.value

    def block_signals(self, mask: int) -> None:
        """Replace the mask of signals that it blocks."""
        value = ctypes.c_uint64(mask)
        self._request(_SETSIGMASK, ctypes.sizeof(value), ctypes.addressof(value))

    def _request(self, request: int, address: int = 0, data: int = 0) -> None:
        if _libc.ptrace(request, self.tid, address, data) == -1:
            number = ctypes.get_errno()
            raise OSError(number, f"ptrace request {request:#x}: {os.strerror(number)}")
