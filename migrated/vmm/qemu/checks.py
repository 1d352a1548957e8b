"""Everything about a QEMU guest that could break the promise of a migration, looked for before one begins.

Each finding is a row: what was looked at, whether it is in order, and a sentence that says what was found and where,
why it matters, and what to change. Nothing is assumed: what cannot be seen is said.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

from migrated.kernel.tracking import why_no_tracking
from migrated.vmm.qemu.findings import Row
from migrated.vmm.qemu.process_checks import check_process
from migrated.vmm.qemu.qmp import Qmp, QmpCommandError
from migrated.vmm.qemu.ram import Ram

Nodes: TypeAlias = Iterable[Mapping[str, Any]]

_OLDEST: Final = (7, 2, 0)
_VIRTIO_MEM_SINCE: Final = (8, 1, 0)
_UNTRACKED_DEVICES: Final = re.compile(
    r'dev: (?P<type>(?:vhost-user|vfio|vhost-vdpa|vhost-scsi|nvme-vfio)[^,]*), id "(?P<id>[^"]*)"'
)
_BALLOONS: Final = re.compile(r'dev: (?P<type>virtio-balloon[^,]*), id "(?P<id>[^"]*)"')
_VIRTIO_MEM: Final = re.compile(r'dev: (?P<type>virtio-mem[^,]*), id "(?P<id>[^"]*)"')
_CONFIDENTIAL: Final = frozenset({"sev-guest", "sev-snp-guest", "tdx-guest", "pef-guest", "s390-pv-guest"})
_TRIAL_LOOKS: Final = 200
_TRIAL_PAUSE_S: Final = 0.01
_NOWHERE: Final = "/proc/self/migrated-asks-what-blocks-a-migration"
_UNDER_WAY: Final = frozenset({"setup", "active", "device", "pre-switchover", "postcopy-active", "cancelling"})


async def check_guest(qmp: Qmp, ram: Ram) -> list[Row]:
    """Look at everything. The guest is not disturbed."""
    tree = await qmp.human("info qtree")
    nodes = await qmp.call("query-named-block-nodes")
    return [
        _version(qmp),
        _kernel(),
        await _way(qmp, ram),
        *_memory(ram),
        *await asyncio.to_thread(check_process, qmp.pid, ram),  # reads the map of every process
        *_devices(qmp, tree),
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
            f"device {match['type']} {match['id']!r} gives memory back with no trace in the tracking: a page that the "
            "guest gave up between two rounds keeps its old content at the destination, where the guest expects "
            "nothing in particular; keep the balloon still if you compare whole memories",
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
    for _ in range(_TRIAL_LOOKS):  # refused is not ended: a migration that is asked for meanwhile would be refused
        if (await qmp.call("query-migrate")).get("status") not in _UNDER_WAY:
            break
        await asyncio.sleep(_TRIAL_PAUSE_S)
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
