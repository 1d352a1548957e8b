"""What this process may do on its host: its user, its capabilities, and giving both up for good.

A capability belongs to a thread. A thread that starts has those of the one that started it; one that is there already
loses all of them with the user root. So privileges are given up before threads are started that need what is kept.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from typing import Final, Literal, TypeAlias

Capability: TypeAlias = Literal["CAP_SYS_PTRACE", "CAP_SYS_NICE"]

NUMBERS: Final[dict[Capability, int]] = {"CAP_SYS_PTRACE": 19, "CAP_SYS_NICE": 23}
"""include/uapi/linux/capability.h"""

_PR_SET_DUMPABLE: Final = 4
_PR_SET_KEEPCAPS: Final = 8
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_VERSION: Final = 0x20080522
_WORD_BITS: Final = 32

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int, *(ctypes.c_ulong,) * 4]


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Word(ctypes.Structure):
    """32 capabilities in each of a thread's sets."""

    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


_Words = _Word * 2


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def permitted() -> int:
    """The capabilities that the calling thread may use, a bit for each.

    Raises:
        OSError: the kernel does not tell.
    """
    words = _Words()
    _check(_libc.capget(ctypes.byref(_Header(_VERSION, 0)), words), "capget")
    return int(words[0].permitted) | int(words[1].permitted) << _WORD_BITS


def keep_only(capabilities: Iterable[Capability]) -> None:
    """Give up all capabilities of the calling thread but these, and pass none on to a program that it starts. What it
    does not have it does not get.

    Raises:
        OSError: a filter of system calls does not let it.
    """
    had = permitted()
    kept = had & _bits(capabilities)
    clear_ambient()
    if kept != had:
        _set(kept)


def clear_ambient() -> None:
    """Pass no capability on to programs that this process starts, unless it is root: guests need none of the daemon's.

    Raises:
        OSError: the kernel cannot.
    """
    _check(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "prctl")


def become(name: str, uid: int, gid: int, capabilities: Iterable[Capability]) -> None:
    """Stop being root: go on as a user, in all of that user's groups, with only these capabilities, of which no program
    that is started gets any, and no way back.

    Raises:
        OSError: this process may not. Some of it may be done: the process should end.
    """
    kept = permitted() & _bits(capabilities)
    for number in range(2 * _WORD_BITS):
        if not kept >> number & 1 and _libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0) == 1:
            _check(_libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0), "prctl")
    _check(_libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0), "prctl")
    os.initgroups(name, gid)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    _set(kept)
    clear_ambient()
    _check(_libc.prctl(_PR_SET_KEEPCAPS, 0, 0, 0, 0), "prctl")
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    # A process that changed its user keeps root as the owner of its files in /proc, its own pagemap among them.
    _check(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl")


def _bits(capabilities: Iterable[Capability]) -> int:
    return sum(1 << NUMBERS[capability] for capability in set(capabilities))


def _set(bits: int) -> None:
    words = _Words()
    for index, word in enumerate(words):
        word.effective = word.permitted = bits >> index * _WORD_BITS & (1 << _WORD_BITS) - 1
    _check(_libc.capset(ctypes.byref(_Header(_VERSION, 0)), words), "capset")
