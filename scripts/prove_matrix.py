"""The fault matrix over real daemons and guests.

    python -m scripts.prove_matrix [--local] [--lanes 3] [PATTERN ...]

Every step of a migration x every fault (``scripts/rig/matrix.py``). A pattern names cells by a part of
``step/fault``; without one all cells run. With ``--local`` the daemons are on one host and hand memory over. Progress
goes to stderr; the last line on stdout is one JSON object: ``{"cells", "violations"}``. Exit code 1 when anything was
violated.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Sequence

from scripts.basics import say
from scripts.rig.faulty import FaultyPair
from scripts.rig.matrix import ALL_CELLS, LOCAL_CELLS, Cell, run_matrix

LANES = 3


def chosen(patterns: list[str], cells: Sequence[Cell] = ALL_CELLS) -> list[Cell]:
    """The cells whose name has one of the patterns in it; all without a pattern."""
    return [cell for cell in cells if not patterns or any(pattern in str(cell) for pattern in patterns)]


def prove_matrix(options: argparse.Namespace) -> tuple[dict[str, int], bool]:
    """Run the cells. Returns the counts and whether all held."""
    # Daemons and guests must not outlive a run that is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    begin = time.monotonic()
    cells = chosen(options.patterns, LOCAL_CELLS if options.local else ALL_CELLS)
    judged = asyncio.run(run_matrix(cells, options.lanes, say, lambda: FaultyPair(local=options.local)))
    violations = sum(len(one.violations) for one in judged)
    say(f"matrix: {len(judged)} cells, {violations} violations, {time.monotonic() - begin:.0f} s")
    return {"cells": len(judged), "violations": violations}, not violations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``prove_matrix``."""
    parser.add_argument("--local", action="store_true", help="over unix sockets: memory is handed over, not copied")
    parser.add_argument("--lanes", type=int, default=LANES, help="pairs of hosts side by side")
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="part of a cell's name, for example commit/cut")
    parser.set_defaults(prove=prove_matrix)


def main() -> int:
    """Run the matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    options = parser.parse_args()
    counts, held = prove_matrix(options)
    print(json.dumps(counts))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
