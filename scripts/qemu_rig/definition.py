"""The rig's guest as a definition for the daemons' QEMU driver: the same machine that ``launcher`` starts by hand."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.qemu_rig.image import GuestImage
from scripts.qemu_rig.launcher import KERNEL_ARGUMENTS, QemuSpec, video_card

PORTS = ("console", "beats")
"""The guest's serial ports, each a socket NAME.PORT beside the guest's QMP socket."""


def definition(spec: QemuSpec, image: GuestImage, incarnation: int = 0) -> str:
    """The TOML text of a guest's definition.

    Args:
        incarnation: what the guest writes into its log while it runs on the host of this definition.
    """
    arguments = spec.workload.arguments()
    if spec.disk:
        arguments += [f"log_ms={spec.disk.log_ms}", f"read_mib={spec.disk.read_mib}"]
    extra = ["-no-reboot", "-fw_cfg", f"name=opt/rig/incarnation,string={incarnation}"]
    for port in PORTS:
        extra += ["-chardev", f"socket,id={port},path={{run}}/{{place}}.{port},server=on,wait=off"]
        extra += ["-device", f"isa-serial,chardev={port}"]
    extra += video_card(spec)
    if spec.rng:
        extra += ["-device", "virtio-rng-pci"]
    lines = [
        f'machine = "{spec.machine}"',
        'accelerator = "tcg"',
        f"memory = {sum(spec.node_bytes)}",
        f'memory_kind = "{spec.backing}"',
        f"vcpus = {spec.cpus}",
        f"kernel = {json.dumps(str(image.kernel))}",
        f"initrd = {json.dumps(str(image.initramfs))}",
        f"append = {json.dumps(' '.join((KERNEL_ARGUMENTS, '--', *arguments)))}",
        f"extra = {json.dumps(extra)}",
    ]
    if spec.numa:
        for size in spec.node_bytes:
            lines += ["[[numa]]", f"memory = {size}"]
    if spec.disk:
        lines += ["[[disk]]", f"file = {json.dumps(str(spec.disk.path))}", f'cache = "{spec.disk.cache}"']
    if spec.network:
        lines += ["[[network]]", 'options = "restrict=on"']
    return "\n".join(lines) + "\n"


def write_definition(directory: Path, name: str, spec: QemuSpec, image: GuestImage, incarnation: int = 0) -> None:
    """Write a guest's definition where a daemon looks for it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.toml").write_text(definition(spec, image, incarnation), encoding="utf-8")


def console_paths(guests: Path, place: str) -> tuple[Path, Path]:
    """Where the serial ports of a guest of these definitions are, console first.

    Args:
        guests: the [vmm] directory.
        place: of the guest's process: its name, or NAME~ for one that took over from another here.
    """
    console, beats = (guests / "qemu" / f"{place}.{port}" for port in PORTS)
    return console, beats
