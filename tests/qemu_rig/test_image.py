"""The initramfs is one that cpio itself can read, and the modules in it are in an order in which they load."""

from __future__ import annotations

import lzma
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import zstandard

from scripts.qemu_rig import cpio, kernel
from scripts.qemu_rig.image import initramfs
from scripts.qemu_rig.kernel import Kernel, missing_packages, modules

needs_cpio = pytest.mark.skipif(not shutil.which("cpio"), reason="cpio is not installed")


def read_with_cpio(archive: bytes, *options: str, directory: Path) -> str:
    """What cpio prints."""
    done = subprocess.run(["cpio", *options], input=archive, cwd=directory, capture_output=True, check=True)
    return done.stdout.decode()


@needs_cpio
def test_cpio_lists_every_entry_in_order(tmp_path: Path) -> None:
    """Names of every length modulo four, contents of none."""
    names = ["a" * length for length in range(1, 9)]
    archive = cpio.archive([cpio.directory(name) for name in names])
    assert read_with_cpio(archive, "-t", directory=tmp_path).split() == names


@needs_cpio
def test_cpio_unpacks_what_was_packed(tmp_path: Path) -> None:
    """Contents of every length modulo four, types and permissions."""
    contents = {f"d/f{length}": bytes(range(length)) for length in range(9)}
    archive = cpio.archive(
        [cpio.directory("d"), *(cpio.file(*item) for item in contents.items()), cpio.program("d/run", b"#!")]
    )
    read_with_cpio(archive, "-i", directory=tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in contents} == contents
    assert stat.S_IMODE((tmp_path / "d/run").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "d/f1").stat().st_mode) == 0o644


@needs_cpio
def test_the_initramfs_has_what_the_kernel_and_the_program_look_for(tmp_path: Path) -> None:
    """/init, a console to open, and the order of modules."""
    archive = initramfs(b"program", [("one", b"1"), ("two", b"2")])
    listing = read_with_cpio(archive, "-tv", directory=tmp_path).splitlines()
    console = next(line for line in listing if line.endswith("dev/console"))
    assert console.startswith("crw-------")
    assert "5,   1" in console
    order = read_with_cpio(archive, "-i", "--to-stdout", "modules/order", directory=tmp_path)
    assert order == "/modules/one.ko\n/modules/two.ko\n"
    assert read_with_cpio(archive, "-i", "--to-stdout", "init", directory=tmp_path) == "program"


def module(*depends: str) -> bytes:
    """As much of a module as its dependencies are read from."""
    return b"\x7fELF\0license=GPL\0depends=" + ",".join(depends).encode() + b"\0name=any\0"


def test_modules_come_after_what_they_depend_on(tmp_path: Path) -> None:
    """Compressed or not, with a dash or an underscore in the name; what is built in is left out."""
    (tmp_path / "virtio_net.ko").write_bytes(module("net_failover", "virtio-ring"))
    (tmp_path / "net-failover.ko.xz").write_bytes(lzma.compress(module("failover")))
    (tmp_path / "failover.ko.zst").write_bytes(zstandard.ZstdCompressor().compress(module()))
    (tmp_path / "virtio_ring.ko").write_bytes(module("built_in"))
    loaded = modules(Kernel(tmp_path / "vmlinuz", tmp_path), ("virtio_net", "virtio_blk"))
    assert [name for name, _ in loaded] == ["failover", "net_failover", "virtio_ring", "virtio_net"]
    assert dict(loaded)["failover"] == module()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a machine with no programs and no kernel: every package."""
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = missing_packages(tmp_path / "vmlinuz-none")
    assert missing == ["qemu-system-x86", "gcc", "libc6-dev", "linux-image-cloud-amd64"]


def test_the_newest_kernel_in_the_cache_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Newer by its numbers, not by its letters."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    boot = kernel.cache_directory() / "boot"
    boot.mkdir(parents=True)
    for version in ("6.1.0-9-cloud", "6.1.0-10-cloud"):
        (boot / f"vmlinuz-{version}").touch()
    found = kernel.newest_kernel(kernel.cache_directory())
    assert found == Kernel(boot / "vmlinuz-6.1.0-10-cloud", kernel.cache_directory() / "lib/modules/6.1.0-10-cloud")
