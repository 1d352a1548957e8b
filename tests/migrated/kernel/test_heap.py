"""What a migration needed goes back to the kernel."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
from migrated.kernel.memory import bound_heap, give_back_heap

def own_kib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:"))

bound_heap()
before = own_kib()
{make}
held = own_kib()
{free}
print(held - before, own_kib() - before)
"""
MIB_IN_KIB = 1 << 10


def run(make: str, free: str) -> tuple[int, int]:
    """What a program holds more of in the middle and at its end (KiB)."""
    program = PROGRAM.format(make=make, free=free)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    held, kept = done.stdout.split()
    return int(held), int(kept)


def test_buffers_of_a_round_go_back_when_they_are_let_go_of() -> None:
    """A small piece that stays, behind a large buffer, does not keep the buffer."""
    make = "pairs = [(bytearray(2 << 20), bytearray(4 << 10)) for _ in range(32)]"
    held, kept = run(make, "small = [pair[1] for pair in pairs]\ndel pairs")
    assert held > 60 * MIB_IN_KIB
    assert kept < 8 * MIB_IN_KIB


def test_what_is_free_between_pieces_in_use_is_given_back() -> None:
    make = "pairs = [(bytearray(256 << 10), bytearray(4 << 10)) for _ in range(128)]"
    free = "small = [pair[1] for pair in pairs]\ndel pairs\ngive_back_heap()"
    held, kept = run(make, free)
    assert held > 30 * MIB_IN_KIB
    assert kept < 8 * MIB_IN_KIB
