"""A guest's definition: a TOML file of this host's own, and the command lines that come of it.

A source can name a definition, by the guest's name, and nothing else: every path and argument is this host's.

    {name}        in ``extra``, ``file`` and ``serial``: the guest's name
    {place}       likewise: the name of its place, by which two processes of one guest on a host differ
    {directory}   [qemu] definitions, where the file lies
    {run}         where sockets and logs of the guest lie
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from migrated.base.errors import VmmError
from migrated.settings.parameters import Bytes
from migrated.vmm.qemu.places import agent_path
from protocol.wrong_values import fault

MemoryKind = Literal["private", "memfd", "file"]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+:=-]*$", max_length=128)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NumaNode(_Part):
    """``[[numa]]``: one node of memory with its vCPUs ("0-1")."""

    memory: Annotated[Bytes, Field(ge=1 << 20)]
    cpus: Annotated[str, Field(pattern=r"^\d+(-\d+)?$")] | None = None


class Disk(_Part):
    """``[[disk]]``: a drive. ``file`` must be the same storage on every host that shall take the guest."""

    file: str
    format: Literal["raw", "qcow2"] = "raw"
    device: Word = "virtio-blk-pci"
    cache: Literal["none", "writeback", "writethrough", "directsync", "unsafe"] = "none"
    aio: Literal["threads", "native", "io_uring"] = "threads"
    read_only: bool = False


class Network(_Part):
    """``[[network]]``: an interface. ``kind`` is QEMU's; ``options`` are those of -netdev."""

    kind: Literal["user", "tap", "bridge", "hubport"] = "user"
    device: Word = "virtio-net-pci"
    mac: Annotated[str, Field(pattern=r"^[0-9a-f]{2}(:[0-9a-f]{2}){5}$")] | None = None
    options: Annotated[str, Field(pattern=r"^[^\x00-\x1f]*$")] = ""


class Definition(_Part):
    """One guest."""

    machine: Word
    accelerator: Literal["kvm", "tcg"] = "kvm"
    cpu: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,+=-]*$")] = "max"
    memory: Annotated[Bytes, Field(ge=1 << 20)]
    memory_kind: MemoryKind = "private"
    """Of a guest that is started here; one that arrives has its memory in a file of ours."""
    vcpus: Annotated[int, Field(ge=1, le=1024)] = 1
    uuid: Annotated[str, Field(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")] | None = None
    numa: tuple[NumaNode, ...] = ()
    disk: tuple[Disk, ...] = ()
    network: tuple[Network, ...] = ()
    kernel: str | None = None
    initrd: str | None = None
    append: str | None = None
    serial: str = "none"
    guest_agent: bool = False
    """Give it a port for QEMU's guest agent, behind a socket NAME.agent in ``{run}``."""
    set_guest_time: bool = False
    """Have the agent set the guest's wall clock when it has moved here."""
    extra: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _fits_together(self) -> Definition:
        if self.numa and sum(node.memory for node in self.numa) != self.memory:
            raise ValueError("the memory of the [[numa]] nodes does not add up to memory")
        if self.set_guest_time and not self.guest_agent:
            raise ValueError("set_guest_time needs guest_agent: it is the agent that sets the time")
        return self


_OURS: Final = ("-qmp", "-incoming", "-D", "-trace", "-daemonize", "-S", "-name", "-m", "-pidfile")
"""Arguments that the driver itself gives."""


def load_definition(directory: Path, name: str) -> Definition:
    """The definition of a guest.

    Raises:
        VmmError: there is none of this name, or it is wrong; the sentence lists every problem.
    """
    path = directory / f"{name}.toml"
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        known = ", ".join(sorted(other.stem for other in directory.glob("*.toml"))) or "none"
        raise VmmError(
            f"this host has no definition of a QEMU guest {name!r} ({path}); definitions here: {known}"
        ) from error
    except (OSError, ValueError) as error:
        raise VmmError(f"the definition {path} cannot be read: {error}") from error
    try:
        made = Definition.model_validate(document)
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'as a whole'}: {fault(problem)}"
            for problem in error.errors(include_url=False)
        )
        raise VmmError(f"the definition {path} cannot be used: {found}") from error
    for argument in made.extra:
        if argument in _OURS:
            raise VmmError(f"the definition {path} gives {argument} in extra, which the driver gives itself; remove it")
    return made


class CommandLine:
    """Builds the command lines of one guest.

    Args:
        definition: of the guest.
        name: of the guest.
        program: QEMU and fixed arguments.
        definitions: the directory of definitions.
        api_socket: where QMP shall listen, named after the guest's place; logs lie beside it.
        ram_directory: where memory files are made.
        memory: descriptors of memory that is handed over, one for each backend, which QEMU inherits; empty for fresh
            memory.

    Raises:
        VmmError: there are not as many as the definition makes backends.
    """

    def __init__(
        self,
        definition: Definition,
        name: str,
        program: tuple[str, ...],
        definitions: Path,
        api_socket: Path,
        ram_directory: Path,
        memory: tuple[int, ...] = (),
    ) -> None:
        backends = len(definition.numa) or 1
        if len(memory) not in (0, backends):
            raise VmmError(
                f"the memory of guest {name!r} came in {len(memory)} files, and its definition has {backends} here"
            )
        self._definition = definition
        self._name = name
        self._program = program
        self._memory = memory
        self._words = {
            "{name}": name,
            "{place}": api_socket.stem,
            "{directory}": str(definitions),
            "{run}": str(api_socket.parent),
        }
        self._api_socket = api_socket
        self._ram_directory = ram_directory

    @property
    def run_log(self) -> Path:
        """Path of the log of QEMU's run state."""
        return self._api_socket.with_suffix(".runlog")

    @property
    def clock_setter(self) -> Path | None:
        """The socket of the guest agent that shall set the guest's clock; None where none shall."""
        return agent_path(self._api_socket) if self._definition.set_guest_time else None

    def ram_files(self) -> list[Path]:
        """The files that memory of kind ``file`` is made in, one for each backend; none where it is handed over."""
        if self._memory:
            return []
        count = len(self._definition.numa) or 1
        return [self._ram_directory / f"{self._api_socket.stem}.{number}.ram" for number in range(count)]

    def running(self, *, paused: bool) -> list[str]:
        """The command line of a guest that starts here; with ``paused`` its vCPUs wait."""
        return [*self._common(self._definition.memory_kind), *(["-S"] if paused else [])]

    def incoming(self) -> list[str]:
        """The command line of an empty guest that waits for state, with its memory in files of ours."""
        return [*self._common("file"), "-incoming", "defer", "-S"]

    def _common(self, kind: MemoryKind) -> list[str]:
        made = self._definition
        machine = f"{made.machine},accel={made.accelerator}"
        memory = self._numa(kind) if made.numa else self._plain(kind)
        if kind != "private" and not made.numa:
            machine += ",memory-backend=ram0"
        return [
            *self._program,
            "-name", f"guest={_escape(self._name)}",
            "-machine", machine,
            "-cpu", made.cpu,
            "-smp", str(made.vcpus),
            "-m", f"{made.memory >> 10}K",
            *memory,
            *(["-uuid", made.uuid] if made.uuid is not None else []),
            "-nodefaults", "-no-user-config", "-display", "none",
            *self._boot(),
            *self._disks(),
            *self._networks(),
            "-serial", self._put(made.serial),
            *self._agent(),
            *(self._put(argument) for argument in made.extra),
            "-qmp", f"unix:{_escape(str(self._api_socket))},server=on,wait=off",
            "-D", str(self.run_log), "-trace", "vm_state_notify",
        ]  # fmt: skip

    def _backend(self, number: int, size: int, kind: MemoryKind) -> list[str]:
        common = f"id=ram{number},size={size}"
        match kind:
            case "private":
                return ["-object", f"memory-backend-ram,{common}"]
            case "memfd":
                return ["-object", f"memory-backend-memfd,{common},share=on"]
            case "file":
                handed_over = f"/proc/self/fd/{self._memory[number]}" if self._memory else None
                path = handed_over or _escape(str(self.ram_files()[number]))
                return ["-object", f"memory-backend-file,{common},mem-path={path},share=on,prealloc=off"]

    def _plain(self, kind: MemoryKind) -> list[str]:
        return [] if kind == "private" else self._backend(0, self._definition.memory, kind)

    def _numa(self, kind: MemoryKind) -> list[str]:
        arguments: list[str] = []
        for number, node in enumerate(self._definition.numa):
            arguments += self._backend(number, node.memory, kind)
            cpus = f",cpus={node.cpus}" if node.cpus is not None else ""
            arguments += ["-numa", f"node,nodeid={number},memdev=ram{number}{cpus}"]
        return arguments

    def _boot(self) -> list[str]:
        made = self._definition
        pairs = (("-kernel", made.kernel), ("-initrd", made.initrd), ("-append", made.append))
        return [word for option, value in pairs if value is not None for word in (option, self._put(value))]

    def _disks(self) -> list[str]:
        arguments: list[str] = []
        for number, disk in enumerate(self._definition.disk):
            file = _escape(self._put(disk.file))
            flags = f"cache={disk.cache},aio={disk.aio},read-only={'on' if disk.read_only else 'off'}"
            arguments += ["-drive", f"file={file},if=none,id=disk{number},format={disk.format},{flags}"]
            arguments += ["-device", f"{disk.device},drive=disk{number},id=disk{number}-device"]
        return arguments

    def _networks(self) -> list[str]:
        arguments: list[str] = []
        for number, network in enumerate(self._definition.network):
            options = f",{self._put(network.options)}" if network.options else ""
            mac = f",mac={network.mac}" if network.mac is not None else ""
            arguments += ["-netdev", f"{network.kind},id=net{number}{options}"]
            arguments += ["-device", f"{network.device},netdev=net{number},id=net{number}-device{mac}"]
        return arguments

    def _agent(self) -> list[str]:
        if not self._definition.guest_agent:
            return []
        return [
            "-chardev", f"socket,id=agent,path={_escape(str(agent_path(self._api_socket)))},server=on,wait=off",
            "-device", "virtio-serial-pci,id=agent-bus",
            "-device", "virtserialport,bus=agent-bus.0,chardev=agent,name=org.qemu.guest_agent.0",
        ]  # fmt: skip

    def _put(self, text: str) -> str:
        for word, value in self._words.items():
            text = text.replace(word, value)
        return text


def _escape(text: str) -> str:
    """A value inside one of QEMU's lists of options."""
    return text.replace(",", ",,")
