"""The guest's image: a kernel, and an initramfs with guest_init.c as its only program and the modules that it loads."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from scripts.qemu_rig import cpio
from scripts.qemu_rig.guest_agent import agent_files
from scripts.qemu_rig.kernel import GUEST_MODULES, cache_directory, find_kernel, missing_packages, modules
from scripts.rig.waiting import RigError

_SOURCE: Final = Path(__file__).with_name("guest_init.c")
_COMPILE: Final = ("gcc", "-O2", "-static", "-pthread", "-Wall", "-Wextra", "-Werror")
_CONSOLE: Final = (5, 1)
"""The device number of /dev/console, which the kernel opens for its first program."""


@dataclass(frozen=True, slots=True)
class GuestImage:
    """The files that QEMU boots: ``-kernel`` and ``-initrd``."""

    kernel: Path
    initramfs: Path


def guest_image(kernel_image: Path | None = None, *, agent: bool = False) -> GuestImage:
    """The image for the named kernel, or for the one that ``find_kernel`` finds. It is made once and then kept.

    Args:
        agent: QEMU's guest agent runs in the guest.

    Raises:
        RigError: packages are missing, or the program does not compile.
    """
    kernel = find_kernel(kernel_image)
    missing = missing_packages(kernel_image)
    if kernel is None or missing:
        raise RigError(f"A Linux guest needs these packages of the distribution: {', '.join(missing)}.")
    kernel_identity = f"{kernel.image}{kernel.image.stat()}".encode()
    sources = b"".join(path.read_bytes() for path in (_SOURCE, Path(cpio.__file__), Path(__file__)))
    more = agent_files() if agent else []
    contents = kernel_identity + sources + b"".join(content for _, content in more)
    target = cache_directory() / f"initramfs-{hashlib.sha256(contents).hexdigest()[:16]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        wanted = (*GUEST_MODULES, "virtio_console") if agent else GUEST_MODULES
        content = initramfs(compiled_init(), modules(kernel, wanted), more)
        # Complete or not there: others may look for it at this moment.
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, target)
    return GuestImage(kernel.image, target)


def compiled_init() -> bytes:
    """The guest's program as a static binary.

    Raises:
        RigError: the compiler refused it; the sentence has what it said.
    """
    with tempfile.TemporaryDirectory() as directory:
        binary = Path(directory) / "init"
        command = [*_COMPILE, "-o", str(binary), str(_SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RigError(f"{_SOURCE.name} does not compile: {done.stderr.strip()[-2000:]}")
        return binary.read_bytes()


def initramfs(init: bytes, loaded: list[tuple[str, bytes]], programs: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """An initramfs with the program and with modules, which it loads in their order.

    Args:
        programs: other programs and libraries, (path, content). With them the first program is ``hwclock`` too, which
            an agent calls.
    """
    if programs:
        programs = [*programs, ("sbin/hwclock", init)]
    parents = {str(parent) for path, _ in programs for parent in PurePosixPath(path).parents} - {"."}
    order = "".join(f"/modules/{name}.ko\n" for name, _ in loaded)
    return cpio.archive(
        [
            cpio.directory("dev"),
            cpio.character_device("dev/console", *_CONSOLE),
            cpio.directory("modules"),
            *(cpio.file(f"modules/{name}.ko", content) for name, content in loaded),
            cpio.file("modules/order", order.encode()),
            cpio.program("init", init),
            *(cpio.directory(parent) for parent in sorted(parents)),
            *(cpio.program(path, content) for path, content in programs),
        ]
    )
