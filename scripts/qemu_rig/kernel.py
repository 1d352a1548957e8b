"""The guest's kernel, as the distribution packs it, and the modules that the guest's devices need.

    /boot/vmlinuz-VERSION          the newest one, or the one that is named
    /lib/modules/VERSION/...       of the same version, below the same root

Tests may have the distribution's package downloaded and unpacked below a cache directory, where the same two paths are
found; nothing is installed by that.
"""

from __future__ import annotations

import contextlib
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import zstandard

from scripts.rig.waiting import RigError

QEMU: Final = "qemu-system-x86_64"
KERNEL_PACKAGE: Final = "linux-image-cloud-amd64"
GUEST_MODULES: Final = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "qemu_fw_cfg")
"""Kernel modules that the guest's devices need. One that is not found is taken to be built into the kernel."""
MISSING: Final = 3
"""Exit status of every program here when this machine lacks what QEMU guests need."""
_PACKAGES: Final = {QEMU: "qemu-system-x86", "gcc": "gcc"}
_LIBC: Final = "libc6-dev"
_DOWNLOAD_TIMEOUT_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel image and the directory of its modules (which may not exist)."""

    image: Path
    modules: Path


def cache_directory() -> Path:
    """Where unpacked kernels and finished guest images are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "migrated-qemu-rig"


def find_kernel(image: Path | None = None) -> Kernel | None:
    """The kernel that is named, else the newest installed one, else the newest one in the cache."""
    if image:
        return _kernel(image) if os.access(image, os.R_OK) else None
    return newest_kernel(Path("/")) or newest_kernel(cache_directory())


def newest_kernel(root: Path) -> Kernel | None:
    """The newest kernel below a directory that holds ``boot`` and ``lib``, of those that may be read."""
    images = [found for found in (root / "boot").glob("vmlinuz-*") if os.access(found, os.R_OK)]
    return _kernel(max(images, key=_version_key)) if images else None


def missing_packages(image: Path | None = None) -> list[str]:
    """The distribution's packages (Debian's names) that have to be installed before a guest can be started."""
    missing = [package for program, package in _PACKAGES.items() if not shutil.which(program)]
    if not _links_statically():
        missing.append(_LIBC)
    if find_kernel(image) is None:
        missing.append(KERNEL_PACKAGE)
    return missing


def download_kernel() -> None:
    """Download the distribution's kernel with apt and unpack it in the cache; nothing is installed.

    Raises:
        RigError: the package cannot be had here.
    """
    with unpacked_package(_kernel_package) as unpacked:
        # The modules first: a kernel that is found has its modules.
        for part in ("lib/modules", "boot"):
            target = cache_directory() / part
            target.mkdir(parents=True, exist_ok=True)
            for entry in (unpacked / part).iterdir():
                if not (target / entry.name).exists():
                    entry.rename(target / entry.name)


def _kernel_package(directory: str) -> str:
    """The name of the package that the distribution's latest kernel is in."""
    depends = _run(["apt-cache", "depends", "--important", KERNEL_PACKAGE], directory)
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if not found:
        raise RigError(f"apt knows no package {KERNEL_PACKAGE}; install a kernel image or name one.")
    return found[1]


@contextlib.contextmanager
def unpacked_package(name: Callable[[str], str]) -> Iterator[Path]:
    """A package of the distribution, downloaded with apt and unpacked in the cache until the block is left.

    Args:
        name: called for the package's name, with a directory to work in.

    Raises:
        RigError: it cannot be had here.
    """
    cache = cache_directory()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as directory:
            _run(["apt-get", "download", name(directory)], directory)
            [package] = Path(directory).glob("*.deb")
            unpacked = Path(directory) / "unpacked"
            _run(["dpkg-deb", "-x", str(package), str(unpacked)], directory)
            yield unpacked
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise RigError(f"A package cannot be downloaded with apt: {error}.") from error


def modules(kernel: Kernel, wanted: tuple[str, ...] = GUEST_MODULES) -> list[tuple[str, bytes]]:
    """The wanted modules and all that they depend on, uncompressed, in the order to load them: (name, content)."""
    files = {_module_name(path): path for path in kernel.modules.rglob("*.ko*")}
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in ordered or name not in files:
            return
        content = _uncompressed(files[name])
        for needed in _dependencies(content):
            add(needed)
        ordered[name] = content

    for name in wanted:
        add(name)
    return list(ordered.items())


def _kernel(image: Path) -> Kernel:
    version = image.name.removeprefix("vmlinuz-")
    return Kernel(image, image.parent.parent / "lib" / "modules" / version)


def _version_key(image: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", image.name)]


def _links_statically() -> bool:
    """Whether the C library is there to link with: gcc names the file with its directory only when it finds it."""
    if not shutil.which("gcc"):
        return False
    found = subprocess.run(["gcc", "-print-file-name=libc.a"], capture_output=True, text=True, check=False)
    return Path(found.stdout.strip()).is_absolute()


def _run(command: list[str], directory: str) -> str:
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=True
    )
    return done.stdout


def _module_name(path: Path) -> str:
    return path.name.partition(".")[0].replace("-", "_")


def _uncompressed(path: Path) -> bytes:
    content = path.read_bytes()
    match path.suffix:
        case ".xz":
            return lzma.decompress(content)
        case ".zst":
            return zstandard.ZstdDecompressor().decompressobj().decompress(content)
    return content


def _dependencies(module: bytes) -> Iterator[str]:
    """Yield the names of the modules that a module depends on, from its .modinfo, whose entries end with a 0 byte."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    if found and found[1]:
        for name in found[1].decode().split(","):
            yield name.replace("-", "_")
