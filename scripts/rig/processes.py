"""The state of a process as the kernel reports it: whether it runs, and what it holds."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Footprint:
    """Resources of a process: descriptors by kind, mappings of guest memory, threads."""

    descriptors: Counter[str]
    mapped_memories: int
    threads: int


def footprint(pid: int) -> Footprint:
    """Count the resources of a process."""
    kinds: Counter[str] = Counter()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(entry.path)
            kinds[target.partition(":")[0] if target.startswith(("socket:", "pipe:")) else target] += 1
    mapped = sum("/memfd:" in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    return Footprint(kinds, mapped, len(os.listdir(f"/proc/{pid}/task")))


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is its own, not mapped from a file or a guest (RssAnon).

    Raises:
        OSError: there is no such process, or the kernel does not tell.
    """
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise OSError(f"the kernel does not say what memory process {pid} has")


def cpu_s(pid: int) -> float:
    """Processor time that a process has used, user and system, in steps of a clock tick (10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")
