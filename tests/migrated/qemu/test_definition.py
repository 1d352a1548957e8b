"""A guest's definition becomes command lines; nothing of a source can."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from migrated.base.errors import VmmError
from migrated.vmm.qemu.definition import CommandLine, load_definition

WEB = """\
machine = "q35"
accelerator = "tcg"
memory = "64MiB"
vcpus = 2
serial = "file:{run}/{name}.serial"
kernel = "{directory}/vmlinuz"
extra = ["-device", "virtio-rng-pci"]

[[disk]]
file = "/images/{name}, really.qcow2"
format = "qcow2"

[[network]]
options = "restrict=on"
mac = "52:54:00:00:00:01"
"""


def write(directory: Path, text: str, name: str = "web") -> None:
    (directory / f"{name}.toml").write_text(text)


def line(directory: Path, name: str = "web") -> CommandLine:
    definition = load_definition(directory, "web")
    return CommandLine(definition, name, ("qemu",), directory, Path("/run/guests/qemu/web.sock"), Path("/ram"))


def after(command: list[str], option: str) -> list[str]:
    """The values of an option that may be given several times."""
    return [value for given, value in pairwise(command) if given == option]


def test_a_guest_that_runs(tmp_path: Path) -> None:
    write(tmp_path, WEB)
    command = line(tmp_path).running(paused=False)
    assert after(command, "-machine") == ["q35,accel=tcg"]
    assert after(command, "-m") == ["65536K"]
    assert after(command, "-serial") == ["file:/run/guests/qemu/web.serial"]
    assert after(command, "-kernel") == [f"{tmp_path}/vmlinuz"]
    assert after(command, "-qmp") == ["unix:/run/guests/qemu/web.sock,server=on,wait=off"]
    assert after(command, "-D") == ["/run/guests/qemu/web.runlog"]
    assert after(command, "-trace") == ["vm_state_notify"]
    assert after(command, "-drive")[0].startswith(
        "file=/images/web,, really.qcow2,if=none,id=disk0,format=qcow2,cache=none"
    )
    assert after(command, "-netdev") == ["user,id=net0,restrict=on"]
    assert after(command, "-device") == [
        "virtio-blk-pci,drive=disk0,id=disk0-device",
        "virtio-net-pci,netdev=net0,id=net0-device,mac=52:54:00:00:00:01",
        "virtio-rng-pci",
    ]
    assert "-S" not in command
    assert "-S" in line(tmp_path).running(paused=True)


def test_an_incoming_guest_differs_in_memory_and_in_waiting_alone(tmp_path: Path) -> None:
    write(tmp_path, WEB)
    running, incoming = line(tmp_path).running(paused=False), line(tmp_path).incoming()
    assert incoming[-3:] == ["-incoming", "defer", "-S"]
    assert after(incoming, "-object") == [
        "memory-backend-file,id=ram0,size=67108864,mem-path=/ram/web.0.ram,share=on,prealloc=off"
    ]
    assert [word for word in running if word not in incoming] == ["q35,accel=tcg"]
    assert line(tmp_path).ram_files() == [Path("/ram/web.0.ram")]


def test_numa_nodes_have_a_backend_each(tmp_path: Path) -> None:
    nodes = '[[numa]]\nmemory = "32MiB"\ncpus = "0"\n[[numa]]\nmemory = "32MiB"\n'
    write(tmp_path, WEB + nodes)
    incoming = line(tmp_path).incoming()
    assert [value.split(",")[1] for value in after(incoming, "-object")] == ["id=ram0", "id=ram1"]
    assert after(incoming, "-numa") == ["node,nodeid=0,memdev=ram0,cpus=0", "node,nodeid=1,memdev=ram1"]
    assert len(line(tmp_path).ram_files()) == 2
    assert after(incoming, "-machine") == ["q35,accel=tcg"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("memory = 1", r"machine: is missing"),
        (WEB.replace("vcpus", "cpus"), r"cpus: is not known here"),
        (WEB.replace('machine = "q35"', 'machine = "q35 -evil"'), r"machine: must match .*, not 'q35 -evil'"),
        (WEB + '[[numa]]\nmemory = "1MiB"\n', r"does not add up to memory"),
        (WEB.replace('"-device", "virtio-rng-pci"', '"-incoming", "defer"'), r"gives -incoming in extra"),
        ("not toml", r"cannot be read"),
    ],
)
def test_a_wrong_definition_is_refused_with_what_is_wrong(tmp_path: Path, text: str, sentence: str) -> None:
    write(tmp_path, text)
    with pytest.raises(VmmError, match=sentence):
        load_definition(tmp_path, "web")


def test_a_missing_definition_names_those_there_are(tmp_path: Path) -> None:
    write(tmp_path, WEB, "database")
    with pytest.raises(VmmError, match=r"no definition of a QEMU guest 'web'.*definitions here: database"):
        load_definition(tmp_path, "web")


def test_a_port_for_the_guest_agent_which_may_set_the_clock(tmp_path: Path) -> None:
    write(tmp_path, f"guest_agent = true\n{WEB}")
    assert "path=/run/guests/qemu/web.agent,server=on" in after(line(tmp_path).incoming(), "-chardev")[0]
    assert line(tmp_path).clock_setter is None
    write(tmp_path, f"guest_agent = true\nset_guest_time = true\n{WEB}")
    assert line(tmp_path).clock_setter == Path("/run/guests/qemu/web.agent")
    write(tmp_path, f"set_guest_time = true\n{WEB}")
    with pytest.raises(VmmError, match="set_guest_time needs guest_agent"):
        line(tmp_path)
