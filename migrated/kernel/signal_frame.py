"""Registers of a stopped thread, and a signal frame that restores them without the tracing process.

A system call is injected by pointing the thread at ``syscall; ret`` with a frame on its stack, below everything in
use, that looks as if a signal handler were about to return. We read the result at the exit of the call and put the
saved registers back. Should we die in between, the thread runs on by itself into ``rt_sigreturn``, which takes every
register from the frame:

    thread          we trace                       we are gone
    syscall         registers saved, replaced
      ...           result read
    ret   --------  saved registers restored       goes to the trampoline: rt_sigreturn(frame)
    (where it was)  (where it was)                 (where it was; an interrupted call is made again)

Layouts: arch/x86/include/uapi/asm/sigcontext.h, arch/arm64/include/uapi/asm/sigcontext.h.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

NT_PRSTATUS: Final = 1
_NO_CALL: Final = (1 << 64) - 1
_RESTART: Final = frozenset((-512, -513, -514, -516))
"""ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK: the kernel makes an interrupted call again."""


@dataclass(frozen=True, slots=True)
class CodeSites:
    """Addresses in the process: a system call that returns, and the trampoline that calls ``rt_sigreturn``."""

    syscall_return: int
    sigreturn: int


class Machine(ABC):
    """The parts that differ from one architecture to the next.

    Attributes:
        syscall_code, sigreturn_code: the bytes of the two code sites.
        extra_registers: the register set that the frame needs beside the general ones.
    """

    syscall_code: bytes
    sigreturn_code: bytes
    extra_registers: int

    @abstractmethod
    def code_pointer(self, registers: bytes) -> int:
        """Return the address at which the thread would run on."""

    @abstractmethod
    def inside_call(self, registers: bytes, code: bytes) -> bool:
        """Return whether the thread was stopped inside a system call. Only there is it sure that no restartable
        sequence (rseq) is cut in two. ``code`` is the 4 bytes before ``code_pointer`` and the 4 from there on."""

    @abstractmethod
    def frame(self, registers: bytes, extra: bytes, blocked_signals: int, sites: CodeSites) -> tuple[int, bytes]:
        """Return the frame's address on the thread's stack, and its bytes."""

    @abstractmethod
    def with_call(
        self, registers: bytes, frame_address: int, sites: CodeSites, number: int, arguments: tuple[int, ...]
    ) -> bytes:
        """Registers that make a system call (of at most six arguments) and then return into the frame."""

    @abstractmethod
    def result(self, registers: bytes) -> int:
        """The result of a call at its exit: negative for an error number."""


_NO_ARGUMENTS: Final = (0,) * 6


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


class X86(Machine):
    """x86-64."""

    syscall_code = bytes.fromhex("0f05c3")  # syscall; ret
    sigreturn_code = bytes.fromhex("48c7c00f0000000f05")  # mov $15, %rax; syscall
    extra_registers = 0x202  # NT_X86_XSTATE

    _GENERAL = struct.Struct("=27Q")
    _NAMES = (
        "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
        "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
    )  # fmt: skip
    _CONTEXT_ORDER = (
        "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rdi", "rsi", "rbp", "rbx", "rdx", "rax", "rcx", "rsp",
        "rip", "eflags",
    )  # fmt: skip
    _ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
    _RED_ZONE = 128
    _FLAGS = 1 | 2 | 4  # UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS
    _XSTATE_WITHOUT_TILES = 2816
    """Offset of the state of AMX tiles: it is no part of a frame unless the process asked for it."""
    _SOFTWARE_BYTES = 464
    _MAGIC1, _MAGIC2 = 0x46505853, 0x46505845
    _WITHOUT_TILES = ~(3 << 17)

    def _read(self, registers: bytes) -> dict[str, int]:
        return dict(zip(self._NAMES, self._GENERAL.unpack(registers), strict=True))

    def code_pointer(self, registers: bytes) -> int:
        return self._read(registers)["rip"]

    def inside_call(self, registers: bytes, code: bytes) -> bool:
        return _signed(self._read(registers)["orig_rax"]) >= 0

    def frame(self, registers: bytes, extra: bytes, blocked_signals: int, sites: CodeSites) -> tuple[int, bytes]:
        values = self._read(registers)
        if _signed(values["orig_rax"]) >= 0 and _signed(values["rax"]) in _RESTART:
            values["rax"], values["rip"] = values["orig_rax"], values["rip"] - 2
        size = min(len(extra), self._XSTATE_WITHOUT_TILES)
        state = bytearray(extra[:size])
        features = struct.unpack_from("=Q", state, self._SOFTWARE_BYTES)[0] & self._WITHOUT_TILES
        struct.pack_into("=IIQI28x", state, self._SOFTWARE_BYTES, self._MAGIC1, size + 4, features, size)
        state += struct.pack("=I", self._MAGIC2)
        state_at = (values["rsp"] - self._RED_ZONE - len(state)) & ~63
        context = struct.pack("=18Q", *(values[name] for name in self._CONTEXT_ORDER))
        context += struct.pack("=4H", values["cs"], 0, 0, values["ss"])
        context += struct.pack("=5Q64x", 0, 0, 0, 0, state_at)
        # An alternate stack of size 0 is refused without a word: the thread keeps the one it has.
        head = struct.pack("=3QQIIQ", sites.sigreturn, self._FLAGS, 0, 0, 0, 0, 0)
        information = bytes(128)
        frame = head + context + struct.pack("=Q", blocked_signals) + information
        # As at the entry of a function: 8 below a multiple of 16.
        address = ((state_at - len(frame)) & ~15) - 8
        return address, frame + bytes(state_at - address - len(frame)) + bytes(state)

    def with_call(
        self, registers: bytes, frame_address: int, sites: CodeSites, number: int, arguments: tuple[int, ...]
    ) -> bytes:
        values = self._read(registers)
        values.update(zip(self._ARGUMENTS, (*arguments, *_NO_ARGUMENTS), strict=False))
        values.update(rip=sites.syscall_return, rsp=frame_address, rax=number, orig_rax=_NO_CALL)
        return self._GENERAL.pack(*values.values())

    def result(self, registers: bytes) -> int:
        return _signed(self._read(registers)["rax"])


class Arm(Machine):
    """aarch64. Written from the kernel's headers and not run: there was no such machine to try it on."""

    syscall_code = bytes.fromhex("010000d4c0035fd6")  # svc #0; ret
    sigreturn_code = bytes.fromhex("681180d2010000d4")  # mov x8, #139; svc #0
    extra_registers = 2  # NT_PRFPREG

    _GENERAL = struct.Struct("=34Q")  # x0 to x30, sp, pc, pstate
    _X8, _LINK, _SP, _PC = 8, 30, 31, 32
    _FLOATING_MAGIC, _FLOATING_BYTES = 0x46508001, 528
    _RESERVED_BYTES = 4096

    def code_pointer(self, registers: bytes) -> int:
        pointer: int = self._GENERAL.unpack(registers)[self._PC]
        return pointer

    def inside_call(self, registers: bytes, code: bytes) -> bool:
        # The kernel has taken back the number of the call by now; one that it makes again stands at its svc already.
        return self.syscall_code[:4] in (code[:4], code[4:])

    def frame(self, registers: bytes, extra: bytes, blocked_signals: int, sites: CodeSites) -> tuple[int, bytes]:
        values = self._GENERAL.unpack(registers)
        vectors, status, control = extra[:512], *struct.unpack_from("=II", extra, 512)
        floating = struct.pack("=IIII", self._FLOATING_MAGIC, self._FLOATING_BYTES, status, control) + vectors
        # siginfo; then the context: flags, link, alternate stack (of size 0: kept), mask with room, registers, records
        frame = bytes(128) + struct.pack("=QQQIIQ", 0, 0, 0, 0, 0, 0) + struct.pack("=Q120x8x", blocked_signals)
        frame += bytes(8) + registers[: self._GENERAL.size] + bytes(8)  # fault address; then up to a multiple of 16
        frame += floating + bytes(self._RESERVED_BYTES - len(floating))
        return (values[self._SP] - len(frame)) & ~15, frame

    def with_call(
        self, registers: bytes, frame_address: int, sites: CodeSites, number: int, arguments: tuple[int, ...]
    ) -> bytes:
        values = list(self._GENERAL.unpack(registers))
        values[:6] = (*arguments, *_NO_ARGUMENTS)[:6]
        values[self._X8], values[self._LINK] = number, sites.sigreturn
        values[self._SP], values[self._PC] = frame_address, sites.syscall_return
        return self._GENERAL.pack(*values)

    def result(self, registers: bytes) -> int:
        return _signed(self._GENERAL.unpack(registers)[0])


MACHINES: Final[Mapping[str, Machine]] = {"x86_64": X86(), "aarch64": Arm()}
