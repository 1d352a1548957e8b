"""Everything about a QEMU guest that could break the promise of a migration, looked for before one begins.

Each finding is a row: what was looked at, whether it is in order, and a sentence that says what was found and where,
why it matters, and what to change. Nothing is assumed: what cannot be seen is said.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from migrated.kernel.injection import tracer_of
from migrated.kernel.tracking import why_no_tracking
from migrated.vmm.qemu.qmp import Qmp, QmpCommandError
from migrated.vmm.qemu.ram import Ram

Verdict: TypeAlias = Literal["ok", "warning", "refused"]
Nodes: TypeAlias = Iterable[Mapping[str, Any]]

_OLDEST: Final = (7, 2, 0)
_VIRTIO_MEM_SINCE: Final = (8, 1, 0)
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
_UNTRACKED_DEVICES: Final = re.compile(
    r'dev: (?P<type>(?:vhost-user|vfio|vhost-vdpa|vhost-scsi|nvme-vfio)[^,]*), id "(?P<id>[^"]*)"'
)
_BALLOONS: Final = re.compile(r'dev: (?P<type>virtio-balloon[^,]*), id "(?P<id>[^"]*)"')
_VIRTIO_MEM: Final = re.compile(r'dev: (?P<type>virtio-mem[^,]*), id "(?P<id>[^"]*)"')
_FIXED_BUFFERS: Final = re.compile(r"^UserBufs:\s*(\d+)", re.MULTILINE)
_CONFIDENTIAL: Final = frozenset({"sev-guest", "sev-snp-guest", "tdx-guest", "pef-guest", "s390-pv-guest"})
_NAMED: Final = 5
_NOWHERE: Final = "/proc/self/migrated-asks-what-blocks-a-migration"
_UNDER_WAY: Final = frozenset({"setup", "active", "device", "pre-switchover", "postcopy-active", "cancelling"})


class Row(NamedTuple):
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    sentence: str


def refusals(rows: Iterable[Row]) -> str | None:
    """The sentences of everything that is refused, as one; None when nothing is."""
    return "; ".join(row.sentence for row in rows if row.verdict == "refused") or None


async def check_guest(qmp: Qmp, ram: Ram) -> list[Row]:
    """Look at everything. The guest is not disturbed."""
    tree = await qmp.human("info qtree")
    nodes = await qmp.call("query-named-block-nodes")
    return [
        _version(qmp),
        _kernel(),
        _tracer(qmp.pid),
        await _way(qmp, ram),
        *_memory(ram),
        *_other_mappers(qmp.pid, ram),
        *_device_files(qmp.pid),
        *_devices(qmp, tree),
        _fixed_buffers(qmp.pid),
        _pinned(qmp.pid),
        await _confidential(qmp),
        await _blocked(qmp),
        *_drives(nodes),
        await _monitors(qmp),
        await _run_log(qmp),
    ]


def _version(qmp: Qmp) -> Row:
    text = ".".join(str(part) for part in qmp.version)
    if qmp.version < _OLDEST:
        oldest = ".".join(str(part) for part in _OLDEST[:2])
        return Row(
            "qemu", "refused", f"QEMU {text} is older than {oldest}, the oldest that this was tried with; update QEMU"
        )
    return Row("qemu", "ok", f"QEMU {text}, process {qmp.pid}")


def _kernel() -> Row:
    reason = why_no_tracking()
    if reason is not None:
        return Row("kernel", "refused", reason)
    return Row("kernel", "ok", f"Linux {os.uname().release} tracks writes from outside")


def _tracer(pid: int) -> Row:
    tracer = tracer_of(pid)
    if tracer is not None:
        return Row(
            "tracer",
            "refused",
            f"QEMU (process {pid}) is traced by process {tracer[0]} ({tracer[1]}), so that no tracking can be set up "
            "in it; "
            "end that debugger or strace",
        )
    return Row("tracer", "ok", "no other process traces QEMU")


async def _way(qmp: Qmp, ram: Ram) -> Row:
    commands = {command["name"] for command in await qmp.call("query-commands")}
    if "xen-save-devices-state" not in commands:
        return Row(
            "device state",
            "refused",
            "this QEMU cannot save its devices without memory: it lacks xen-save-devices-state; use a QEMU built "
            "with it "
            "(every distribution's is)",
        )
    backings = ", ".join(sorted({carried.block.backing for carried in ram.carried if carried.block.role == "main"}))
    return Row(
        "device state",
        "ok",
        f"saved by xen-save-devices-state, which leaves memory to us whatever backs it ({backings or 'none found'})",
    )


def _memory(ram: Ram) -> Iterator[Row]:
    for carried in ram.carried:
        block = carried.block
        shared = "shared" if block.shared else "private"
        where = f"{block.size >> 10} KiB, {block.backing}, {shared}, at {carried.address:#x}"
        yield Row(f"memory {block.name}", "ok", f"travels as pages: {where}")
    for block in ram.lost:
        yield Row(
            f"memory {block.name}",
            "refused",
            f"{block.size >> 10} KiB of memory that the guest can write cannot be found in QEMU's process, and would "
            "be "
            "lost; use QEMU 10.0 or newer, which tells where it is, or remove the device",
        )
    if ram.rebuilt:
        names = ", ".join(block.name for block in ram.rebuilt)
        yield Row(
            "option ROMs and tables",
            "ok",
            f"do not travel, as no guest can write them and the destination's QEMU makes equal ones: {names}",
        )


def _other_mappers(pid: int, ram: Ram) -> Iterator[Row]:
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


def _device_files(pid: int) -> Iterator[Row]:
    clean = True
    for target in _open_files(pid):
        for pattern, name, why, change in _DEVICE_FILES:
            if pattern.match(target):
                clean = False
                yield Row(name, "refused", f"QEMU (process {pid}) has {target} open: {why}; {change}")
    if clean:
        yield Row("device files", "ok", "QEMU has no VFIO, vDPA or vhost-scsi device open")


def _open_files(pid: int) -> list[str]:
    targets = []
    root = Path(f"/proc/{pid}/fd")
    try:
        names = list(root.iterdir())
    except OSError:
        return []
    for name in names:
        try:
            targets.append(os.readlink(name))
        except OSError:
            continue
    return targets


def _devices(qmp: Qmp, tree: str) -> Iterator[Row]:
    for match in _UNTRACKED_DEVICES.finditer(tree):
        yield Row(
            "devices",
            "refused",
            f"device {match['type']} {match['id']!r} is served by somebody else than QEMU, who writes guest memory "
            "unseen; "
            "use its counterpart of QEMU's own",
        )
    for match in _BALLOONS.finditer(tree):
        yield Row(
            "balloon",
            "warning",
            f"device {match['type']} {match['id']!r} gives memory back with no trace in the tracking: a page that "
            "the guest "
            "gave up between two rounds may differ at the destination in what nobody reads. With verification on, "
            "such a "
            "migration can be refused by its digest; keep the balloon still while it runs",
        )
    for match in _VIRTIO_MEM.finditer(tree):
        if qmp.version < _VIRTIO_MEM_SINCE:
            yield Row(
                "virtio-mem",
                "refused",
                f"device {match['type']} {match['id']!r}: a QEMU before 8.1 empties its memory when it starts, "
                "incoming or "
                "not; update QEMU on both hosts",
            )


def _fixed_buffers(pid: int) -> Row:
    """io_uring's fixed buffers stay pinned: reads into them bypass the page tables for as long as they exist."""
    for name in Path(f"/proc/{pid}/fdinfo").iterdir():
        found = _FIXED_BUFFERS.search(_read(name))
        if found is not None and int(found[1]):
            return Row(
                "io_uring",
                "refused",
                f"QEMU (process {pid}) has {found[1]} buffers registered with io_uring: what is read into them is not "
                "tracked; set aio=threads or aio=native on its drives",
            )
    return Row("io_uring", "ok", "no buffers of QEMU are registered with io_uring")


def _pinned(pid: int) -> Row:
    status = _read(Path(f"/proc/{pid}/status"))
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


async def _confidential(qmp: Qmp) -> Row:
    try:
        objects = await qmp.call("qom-list", path="/objects")
    except QmpCommandError:
        objects = []
    for item in objects:
        kind = str(item["type"]).removeprefix("child<").removesuffix(">")
        if kind in _CONFIDENTIAL:
            return Row(
                "confidential guest",
                "refused",
                f"object {item['name']!r} is a {kind}: the guest's memory is encrypted and cannot be moved by "
                "anybody but its "
                "hardware",
            )
    return Row("confidential guest", "ok", "the guest's memory is not encrypted")


async def _blocked(qmp: Qmp) -> Row:
    """Ask QEMU to migrate to a place where nobody listens: whatever it would refuse by itself it refuses before it
    connects. Saving devices alone would leave out a device that cannot be migrated, without a word."""
    name = "QEMU's own blockers"
    state = await qmp.call("query-migrate")
    if reasons := state.get("blocked-reasons"):
        return Row(name, "refused", f"QEMU does not let this guest migrate: {'; '.join(reasons)}")
    if state.get("status") in _UNDER_WAY:
        return Row(name, "refused", "a migration of QEMU's own is under way; let it end, or cancel it (migrate_cancel)")
    try:
        await qmp.call("migrate", uri=f"unix:{_NOWHERE}")
    except QmpCommandError as error:
        if Path(_NOWHERE).name not in error.description:
            return Row(name, "refused", f"QEMU does not let this guest migrate: {error.description}")
    return Row(name, "ok", "QEMU names nothing that blocks a migration")


def drives_bypass_page_tables(nodes: Nodes) -> bool:
    """Whether a drive reads into guest memory past the page tables, so that a fence is needed."""
    return any(_bypasses(node) for node in nodes)


def _bypasses(node: Mapping[str, Any]) -> bool:
    direct = bool(node.get("cache", {}).get("direct"))
    return direct or node.get("drv") in ("host_device", "nvme", "nvme-io_uring", "virtio-blk-vhost-vdpa", "iscsi")


def _drives(nodes: Nodes) -> Iterator[Row]:
    named = list(nodes)
    if not named:
        yield Row("drives", "ok", "the guest has no drives: no fence is needed")
        return
    direct = sorted({str(node.get("file") or node.get("node-name")) for node in named if _bypasses(node)})
    if direct:
        yield Row(
            "drives",
            "ok",
            f"read past the page tables (cache=none or a device of the host): {', '.join(direct)}; every round waits "
            "until "
            "their requests in flight have landed",
        )
    else:
        yield Row("drives", "ok", "all drives go through QEMU's page tables: no fence is needed")
    bitmaps = [
        f"{bitmap.get('name')} on {node.get('node-name')}"
        for node in named
        for bitmap in node.get("dirty-bitmaps") or []
    ]
    if bitmaps:
        yield Row(
            "dirty bitmaps",
            "warning",
            f"do not travel with the devices: {', '.join(bitmaps)}; the next incremental backup must be a full one, "
            "unless they "
            "are persistent in an image that both hosts open",
        )


async def _monitors(qmp: Qmp) -> Row:
    held = [
        str(chardev["label"])
        for chardev in await qmp.call("query-chardev")
        if "mon" in chardev["label"] and not chardev["filename"].startswith("disconnected:")
    ]
    if len(held) > 1:
        return Row(
            "monitors",
            "warning",
            f"QEMU has {len(held)} monitors ({', '.join(held)}): whoever holds another one can stop, resume or "
            "change the "
            "guest in the middle of a migration; let nobody do that meanwhile",
        )
    return Row("monitors", "ok", "this monitor is the only one")


async def _run_log(qmp: Qmp) -> Row:
    try:
        states = await qmp.call("trace-event-get-state", name="vm_state_notify")
        enabled = bool(states) and states[0]["state"] == "enabled"
    except QmpCommandError:
        enabled = False
    if enabled:
        return Row("run log", "ok", "QEMU logs its run state (vm_state_notify)")
    return Row(
        "run log",
        "warning",
        "QEMU keeps no log of its run state: should it end in the middle of a hand-over, whether the guest ran here "
        "is told "
        "by the daemon's own mark alone; start it with -D FILE -trace vm_state_notify",
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
