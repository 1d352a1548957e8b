"""What tells a process from every other one of this boot: its number may be given to another one once it has ended."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_STATE: Final = 0
_STARTED: Final = 19
"""Places in /proc/PID/stat behind the command's name: the state, and when it was started (ticks since the boot)."""
_ENDED: Final = frozenset({"Z", "X"})


def pid_namespace() -> str:
    """The kernel's name of the namespace in which this process sees others: elsewhere their numbers mean others."""
    return str(Path("/proc/self/ns/pid").readlink())


def started_at(pid: int) -> int | None:
    """When a process was started, in ticks since the boot; None when there is none of this number, or it has ended."""
    try:
        # The name may hold spaces and brackets; what follows the last bracket does not.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[_STATE] in _ENDED else int(fields[_STARTED])
