"""System calls made inside another process, in its main thread, which stands still meanwhile; its other threads run on.

    SEIZE - INTERRUPT - [stopped in a system call] - registers saved, frame written - calls - registers back - DETACH

If this process dies at any point, the thread still runs on unchanged (``signal_frame``). Signals that
come for it first are delivered; later ones wait for the end. All of it happens in a thread of its own: when that thread
ends, the kernel detaches every thread that is still traced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Final, TypeVar

from migrated.kernel.errors import InjectionError
from migrated.kernel.ptrace import NoStopError, TracedGoneError, TracedThread
from migrated.kernel.signal_frame import MACHINES, NT_PRSTATUS, CodeSites, Machine
from migrated.kernel.syscalls import MACHINE, number_of

T = TypeVar("T")

_ATTEMPTS: Final = 400
_BETWEEN_ATTEMPTS_S: Final = 0.002
_STOP_NS: Final = 1_000_000_000
_ALL_SIGNALS: Final = (1 << 64) - 1
_YAMA: Final = Path("/proc/sys/kernel/yama/ptrace_scope")


class Inside:
    """The stopped main thread of another process: makes system calls there. Use it only within ``run_inside``."""

    def __init__(self, thread: TracedThread, machine: Machine, memory_fd: int, sites: CodeSites) -> None:
        self._thread = thread
        self._machine = machine
        self._memory_fd = memory_fd
        self._sites = sites
        self._registers = b""
        self._blocked_signals = 0
        self._frame_address = 0
        self._changed = False

    def prepare(self) -> bool:
        """Save the registers and write the frame. Returns False where the thread must not be disturbed just now."""
        machine, thread = self._machine, self._thread
        registers = thread.registers(NT_PRSTATUS)
        code = os.pread(self._memory_fd, 8, machine.code_pointer(registers) - 4)
        if not machine.inside_call(registers, code):
            return False
        extra, blocked = thread.registers(machine.extra_registers), thread.blocked_signals()
        self._frame_address, frame = machine.frame(registers, extra, blocked, self._sites)
        os.pwrite(self._memory_fd, frame, self._frame_address)
        self._registers, self._blocked_signals = registers, blocked
        return True

    def call(self, name: str, *arguments: int) -> int:
        """Make one system call of at most six arguments; returns its result, negative for an error number."""
        thread = self._thread
        registers = self._machine.with_call(
            self._registers, self._frame_address, self._sites, number_of(name), arguments
        )
        thread.set_registers(NT_PRSTATUS, registers)
        if not self._changed:
            # Only now, when the frame would give the mask back: signals wait until we are done.
            self._changed = True
            thread.block_signals(_ALL_SIGNALS)
        for _ in ("entry", "exit"):
            thread.go_to_syscall()
            if not thread.wait(time.monotonic_ns() + _STOP_NS).at_syscall:
                raise InjectionError(
                    f"the system call {name} could not be made inside process {thread.tid}: a signal that cannot be "
                    "held back stopped its main thread first; try again"
                )
        return self._machine.result(thread.registers(NT_PRSTATUS))

    def give_back(self) -> None:
        """Restore the registers and the signal mask; the thread still stands."""
        if self._changed:
            self._thread.block_signals(self._blocked_signals)
            self._thread.set_registers(NT_PRSTATUS, self._registers)


def find_sites(pid: int) -> CodeSites:
    """Find what an injection into a process needs, ahead of one that must not take long. Blocks for milliseconds.

    Raises:
        InjectionError: nothing can be injected there; the sentence says why.
    """
    machine = _machine()
    try:
        with _memory_of(pid) as memory_fd:
            return _code_sites(pid, machine, memory_fd)
    except OSError as error:
        raise InjectionError(why_not(pid, error)) from error


def run_inside(pid: int, work: Callable[[Inside], T], sites: CodeSites | None = None) -> T:
    """Stop the main thread of a process, do some work with it, and let it run on. Blocks: call it off the event loop.

    If the process is our own child, nobody here may wait for its end meanwhile: a wait takes the stops away.

    Args:
        pid: of the process.
        work: called while the thread stands still; makes the system calls.
        sites: what ``find_sites`` found in this process; None to look now.

    Raises:
        InjectionError: it cannot be done there; the sentence says why. The process runs on as before.
    """
    outcome: Future[T] = Future()

    def trace() -> None:
        try:
            outcome.set_result(_trace(pid, work, sites))
        except BaseException as error:  # it is raised again where somebody waits for it
            outcome.set_exception(error)

    tracer = threading.Thread(target=trace, name=f"trace-{pid}", daemon=True)
    tracer.start()
    tracer.join()
    return outcome.result()


def _machine() -> Machine:
    machine = MACHINES.get(MACHINE)
    if machine is None:
        raise InjectionError(
            f"system calls cannot be made inside other processes on {MACHINE}: only x86_64 and aarch64"
        )
    return machine


def _trace(pid: int, work: Callable[[Inside], T], known: CodeSites | None) -> T:
    machine = _machine()
    try:
        with _memory_of(pid) as memory_fd:
            sites = known or _code_sites(pid, machine, memory_fd)
            for _ in range(_ATTEMPTS):
                results = _attempt(TracedThread(pid), machine, memory_fd, sites, work)
                if results:
                    return results[0]
                time.sleep(_BETWEEN_ATTEMPTS_S)
    except TracedGoneError:
        raise InjectionError(f"process {pid} ended while a system call was made inside it") from None
    except NoStopError:
        raise InjectionError(
            f"the main thread of process {pid} did not stop within {_STOP_NS / 1e9:g} s: it hangs in the kernel "
            "(state D in ps); nothing was changed in it"
        ) from None
    except OSError as error:
        raise InjectionError(why_not(pid, error)) from error
    raise InjectionError(
        f"the main thread of process {pid} was busy in {_ATTEMPTS} attempts to make a system call inside it: it never "
        "waited. Try again when the guest does less I/O"
    )


def _attempt(
    thread: TracedThread, machine: Machine, memory_fd: int, sites: CodeSites, work: Callable[[Inside], T]
) -> list[T]:
    """Try once. Returns a list with the result of the work; an empty one when the thread could not be disturbed just
    then."""
    inside = Inside(thread, machine, memory_fd, sites)
    try:
        _stop(thread)
        return [work(inside)] if inside.prepare() else []
    finally:
        # If the thread does not stand still, the end of this Python thread detaches it, and the frame restores its
        # registers.
        with contextlib.suppress(OSError):
            inside.give_back()
            thread.detach()


def _stop(thread: TracedThread) -> None:
    """Stop a seized thread; signals that come first are delivered.

    Raises:
        InjectionError: the process is stopped by a signal.
    """
    deadline_ns = time.monotonic_ns() + _STOP_NS
    thread.interrupt()
    while True:
        stop = thread.wait(deadline_ns)
        if stop.by_interrupt:
            return
        if stop.group:
            raise InjectionError(
                f"process {thread.tid} is stopped by a signal (SIGSTOP or a debugger's); continue it with "
                f"'kill -CONT {thread.tid}' and try again"
            )
        thread.go_on(stop.signal)


@contextlib.contextmanager
def _memory_of(pid: int) -> Iterator[int]:
    fd = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _code_sites(pid: int, machine: Machine, memory_fd: int) -> CodeSites:
    """Find the two pieces of code that an injection needs, in the process's own C library as a rule."""
    if "shstk" in _status_field(pid, "x86_Thread_features"):
        raise InjectionError(
            f"process {pid} runs with a shadow stack, which does not let a system call be injected; start it with "
            "GLIBC_TUNABLES=glibc.cpu.x86_shstk=off"
        )
    found: dict[bytes, int] = {}
    lines = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    # Files alone, the C library first: code that a process makes for itself is large, and may go at any time.
    code_files = [fields for fields in lines if fields[1][2] == "x" and fields[-1].startswith("/")]
    for fields in sorted(code_files, key=lambda fields: "/libc" not in fields[-1]):
        begin, end = (int(part, 16) for part in fields[0].split("-"))
        with contextlib.suppress(OSError):
            code = os.pread(memory_fd, end - begin, begin)
            for pattern in (machine.syscall_code, machine.sigreturn_code):
                if pattern not in found and (at := code.find(pattern)) >= 0:
                    found[pattern] = begin + at
        if len(found) == 2:
            return CodeSites(found[machine.syscall_code], found[machine.sigreturn_code])
    raise InjectionError(
        f"process {pid} has no code that makes a system call and returns: its C library is of an unknown kind"
    )


def why_not(pid: int, error: OSError) -> str:
    """The sentence for a process that may not be traced."""
    if error.errno in (errno.ESRCH, errno.ENOENT):
        return f"process {pid} has ended"
    if error.errno not in (errno.EPERM, errno.EACCES):
        return f"process {pid} cannot be traced: {error.strerror}"
    tracer = tracer_of(pid)
    if tracer is not None:
        return (
            f"process {pid} is traced by process {tracer[0]} ({tracer[1]}) already, and a process has one tracer at "
            "most; end that debugger or strace first"
        )
    with contextlib.suppress(OSError, ValueError):
        scope = int(_YAMA.read_text())
        if scope >= 2 and (scope == 3 or os.geteuid() != 0):
            return (
                f"process {pid} may not be traced: kernel.yama.ptrace_scope is {scope}, which forbids tracing "
                f"{'to everybody until the next boot' if scope == 3 else 'without CAP_SYS_PTRACE'}; set it to 1 or 0"
            )
    with contextlib.suppress(OSError):
        if os.readlink(f"/proc/{pid}/ns/user") != os.readlink("/proc/self/ns/user"):
            return (
                f"process {pid} lives in another user namespace than this daemon, which may not trace it; run the "
                "daemon in the same one, or in its parent as root"
            )
    return (
        f"process {pid} may not be traced by this daemon ({error.strerror}): run the daemon as root, or as the same "
        "user with CAP_SYS_PTRACE, and see whether SELinux (deny_ptrace), AppArmor or a filter of system calls forbids "
        "it: the daemon's systemd unit needs the drop-in qemu.conf"
    )


def tracer_of(pid: int) -> tuple[int, str] | None:
    """Return the tracer of a process as process id and name; None when nobody does, or there is no such process."""
    number = _status_field(pid, "TracerPid")
    if number in ("", "0"):
        return None
    try:
        return int(number), Path(f"/proc/{number}/comm").read_text().strip()
    except OSError:
        return int(number), "unknown"


def _status_field(pid: int, name: str) -> str:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:")), "")
