"""QEMU's own guest agent, as the distribution packs it, and the libraries that it needs: files for a guest's initramfs.

The libraries are those of this machine, which QEMU itself needs too. Tests may have the package downloaded into the
cache; nothing is installed by that.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

from scripts.qemu_rig.kernel import cache_directory, unpacked_package
from scripts.rig.waiting import RigError

AGENT_PACKAGE: Final = "qemu-guest-agent"
AGENT: Final = "usr/sbin/qemu-ga"
"""Where it is in a guest, where guest_init.c looks for it."""
_LIBRARY: Final = re.compile(r"^\s*(?:\S+ => )?(/\S+) \(0x", re.MULTILINE)


def find_agent() -> Path | None:
    """The agent's program: the installed one, else the one in the cache."""
    installed = shutil.which("qemu-ga", path="/usr/sbin:/usr/bin")
    cached = cache_directory() / "qemu-ga"
    return Path(installed) if installed else cached if cached.exists() else None


def download_agent() -> None:
    """Download the distribution's agent with apt into the cache; nothing is installed.

    Raises:
        RigError: the package cannot be had here.
    """
    with unpacked_package(lambda _directory: AGENT_PACKAGE) as unpacked:
        (unpacked / AGENT).rename(cache_directory() / "qemu-ga")


def agent_files() -> list[tuple[str, bytes]]:
    """The agent and its libraries: (path in the guest, content).

    Raises:
        RigError: there is no agent, or this machine lacks a library of it.
    """
    program = find_agent()
    if program is None:
        raise RigError(f"A guest with an agent needs this package of the distribution: {AGENT_PACKAGE}.")
    needed = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False).stdout
    if "not found" in needed or not _LIBRARY.search(needed):
        raise RigError(f"The guest agent {program} lacks libraries on this machine: {needed.strip()}")
    libraries = [Path(found) for found in _LIBRARY.findall(needed)]
    return [(AGENT, program.read_bytes()), *((str(path).lstrip("/"), path.read_bytes()) for path in libraries)]
