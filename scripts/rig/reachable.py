"""Runs a command where any user can reach this checkout and its interpreter, wherever they lie.

    unshare --mount python -m scripts.rig.reachable COMMAND ...

A home directory is often closed to others, and an interpreter may lie below one. In a mount namespace of the command's
own, such a directory is replaced by an open one that holds nothing else. Needs root.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from scripts.basics import ROOT

COMMAND: Final = ("unshare", "--mount", sys.executable, "-m", "scripts.rig.reachable")
"""What stands before the command."""


def closed_above(path: Path) -> Path | None:
    """The first directory on the way to a path that others may not enter, None where they may enter all."""
    return next((one for one in reversed(path.parents) if not one.stat().st_mode & stat.S_IXOTH), None)


def open_the_way(paths: Iterable[Path]) -> None:
    """Replace closed directories above these paths, in this mount namespace."""
    paths = sorted(paths)
    for path in paths:
        if (closed := closed_above(path)) is None:
            continue
        kept = [one for one in paths if one.is_relative_to(closed)]
        with tempfile.TemporaryDirectory() as stage:
            places = {one: Path(stage) / str(number) for number, one in enumerate(kept)}
            for one, place in places.items():
                place.mkdir()
                subprocess.run(["mount", "--bind", one, place], check=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", closed], check=True)
            for one, place in places.items():
                one.mkdir(parents=True, exist_ok=True)
                subprocess.run(["mount", "--move", place, one], check=True)


def main() -> None:
    """Open the way and run the command in this process."""
    open_the_way({ROOT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()})
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
