"""Small files that are replaced whole or not at all, whenever this process is killed or the disk is full."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Give a file another content. One writer at a time for each file.

    Raises:
        OSError: it cannot be written, and is as it was.
    """
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640), "w") as file:
        file.write(text)
    fresh.replace(path)
