"""Checks of a QEMU process by what the kernel says of it: who else could write guest memory, past its page tables
or through them."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from migrated.kernel.injection import tracer_of
from migrated.vmm.qemu.findings import Row
from migrated.vmm.qemu.ram import Ram

_DEVICE_FILES: Final = (
    (
        re.compile(r"^/dev/(vfio/(?!vfio$).+|iommu)$"),
        "VFIO",
        "a passed-through device writes guest memory past the page tables, and its state is not in QEMU's",
        "unplug it (device_del) before the migration",
    ),
    (
        re.compile(r"^/dev/vhost-vdpa"),
        "vDPA",
        "its hardware writes guest memory past the page tables",
        "use a virtio device of QEMU's, or vhost-net",
    ),
    (
        re.compile(r"^/dev/vhost-scsi$"),
        "vhost-scsi",
        "the kernel's target writes guest memory past the page tables",
        "use virtio-scsi with a drive of QEMU's",
    ),
)
_FIXED_BUFFERS: Final = re.compile(r"^UserBufs:\s*(\d+)", re.MULTILINE)
_NAMED: Final = 5


def check_process(pid: int, ram: Ram) -> list[Row]:
    """Look at everything that the kernel says of a QEMU. Blocks: call it off the event loop."""
    return [
        tracer(pid),
        *other_mappers(pid, ram),
        *device_files(pid),
        fixed_buffers(pid),
        pinned(pid),
    ]


def tracer(pid: int) -> Row:
    found = tracer_of(pid)
    if found is not None:
        return Row(
            "tracer",
            "refused",
            f"QEMU (process {pid}) is traced by process {found[0]} ({found[1]}), so that no tracking can be set up "
            "in it; "
            "end that debugger or strace",
        )
    return Row("tracer", "ok", "no other process traces QEMU")


def other_mappers(pid: int, ram: Ram) -> Iterator[Row]:
    """Other processes that have the RAM file mapped or open could write it, and nobody would notice."""
    files = {
        (carried.mapping.device, carried.mapping.inode): carried.block.name
        for carried in ram.carried
        if carried.block.shared
    }
    if not files:
        yield Row("other mappers", "ok", "guest memory is private to QEMU: no other process can map it")
        return
    unseen: list[str] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) in (pid, os.getpid()):
            continue
        try:
            found = _maps_one(entry, files)
        except PermissionError:
            unseen.append(f"{entry.name} ({_read(entry / 'comm').strip()})")
            continue
        except OSError:
            continue
        if found is not None:
            comm = _read(entry / "comm").strip()
            yield Row(
                "other mappers",
                "refused",
                f"process {entry.name} ({comm}) has the memory {found} of the guest mapped as well (vhost-user, "
                "virtiofsd, "
                "DPDK?): what it writes is not tracked and would be lost; end it, or use a device of QEMU's own",
            )
            return
    if unseen:
        yield Row(
            "other mappers",
            "warning",
            f"nobody else was found to have guest memory mapped, but these processes may not be looked into: "
            f"{', '.join(unseen[:_NAMED])}{' and more' if len(unseen) > _NAMED else ''}; run the daemon as root",
        )
        return
    yield Row("other mappers", "ok", "no other process has guest memory mapped")


def _maps_one(entry: Path, files: Mapping[tuple[str, int], str]) -> str | None:
    for line in (entry / "maps").read_text(errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        if (name := files.get((fields[3], int(fields[4])))) is not None:
            return name
    return None


def device_files(pid: int) -> Iterator[Row]:
    clean = True
    try:
        targets = _open_files(pid)
    except OSError as error:
        yield _unseen("device files", pid, "the files that it has open", error)
        return
    for target in targets:
        for pattern, name, why, change in _DEVICE_FILES:
            if pattern.match(target):
                clean = False
                yield Row(name, "refused", f"QEMU (process {pid}) has {target} open: {why}; {change}")
    if clean:
        yield Row("device files", "ok", "QEMU has no VFIO, vDPA or vhost-scsi device open")


def _open_files(pid: int) -> list[str]:
    targets = []
    for name in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            targets.append(os.readlink(name))
    return targets


def _unseen(check: str, pid: int, what: str, error: OSError) -> Row:
    return Row(
        check,
        "refused",
        f"{what} cannot be seen of QEMU (process {pid}): {error.strerror}; run the daemon as root or as QEMU's user",
    )


def fixed_buffers(pid: int) -> Row:
    """io_uring's fixed buffers stay pinned: reads into them bypass the page tables for as long as they exist."""
    try:
        names = list(Path(f"/proc/{pid}/fdinfo").iterdir())
    except OSError as error:
        return _unseen("io_uring", pid, "its buffers of io_uring", error)
    for name in names:
        found = _FIXED_BUFFERS.search(_read(name))
        if found is not None and int(found[1]):
            return Row(
                "io_uring",
                "refused",
                f"QEMU (process {pid}) has {found[1]} buffers registered with io_uring: what is read into them is not "
                "tracked; set aio=threads or aio=native on its drives",
            )
    return Row("io_uring", "ok", "no buffers of QEMU are registered with io_uring")


def pinned(pid: int) -> Row:
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError as error:
        return _unseen("pinned memory", pid, "its pinned memory", error)
    for field in ("VmPin", "VmLck"):
        found = re.search(rf"^{field}:\s*(\d+) kB", status, re.MULTILINE)
        if found is not None and int(found[1]):
            if field == "VmLck":
                sentence = f"{found[1]} KiB of QEMU are locked (mlock): they are tracked, but cannot be swapped out"
                return Row("pinned memory", "warning", sentence)
            return Row(
                "pinned memory",
                "refused",
                f"{found[1]} KiB of QEMU (process {pid}) are pinned for a device that may write them unseen (VFIO, "
                "RDMA); unplug that device",
            )
    return Row("pinned memory", "ok", "none of QEMU's memory is pinned")


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
