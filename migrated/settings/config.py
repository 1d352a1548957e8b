"""The daemon's configuration: one TOML file, checked whole, every problem reported at once.

    MIGRATED_SECTION__KEY in the environment  >  the file  >  the defaults here

Relative paths count from the working directory; ``~`` is the home directory of the daemon's user. The module is longer
than others because every section of the file is declared here, with its units, ranges and rules.
"""

from __future__ import annotations

import difflib
import os
import shutil
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from migrated.kernel.privileges import Capability
from migrated.settings.parameters import Bytes, BytesPerSecond, MigrationParameters, Milliseconds, Seconds
from protocol.guest import NAME_PATTERN
from protocol.wrong_values import fault

ENV_PREFIX: Final = "MIGRATED_"
MAX_SOCKET_PATH_BYTES: Final = 107
"""A unix socket address holds no longer path (sun_path, with its final zero)."""


class Address(NamedTuple):
    """The address of a TCP listener: ``host`` without brackets, ``port`` 0 for any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_wildcard(self) -> bool:
        """Whether it stands for all addresses of a host, so that nobody else can connect to it."""
        try:
            return ip_address(self.host).is_unspecified
        except ValueError:  # a name
            return False


def parse_address(text: str) -> Address:
    """The address in ``HOST:PORT`` or ``[IPV6]:PORT``.

    Raises:
        ValueError: with a phrase that says which part is wrong.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r} needs brackets around the IPv6 address: [HOST]:PORT")
    if not colon or not host or any(c.isspace() for c in host):
        raise ValueError(f"{text!r} is not HOST:PORT")
    if not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise ValueError(f"{text!r} needs a port from 0 to 65535 after the colon")
    return Address(host, int(port))


def parse_uri(uri: str) -> Address | Path:
    """The destination in ``tcp:HOST:PORT``, or in ``unix:PATH``.

    Raises:
        ValueError: with a sentence that says what is wrong and what the form is.
    """
    scheme, _, rest = uri.partition(":")
    try:
        if scheme == "unix":
            if not rest.startswith("/"):
                raise ValueError(f"{rest!r} is not the whole path of a socket")
            return _fits_socket(Path(rest))
        if scheme != "tcp":
            raise ValueError(f"{uri!r} begins neither with 'tcp:' nor with 'unix:'")
        address = parse_address(rest)
        if address.port == 0:
            raise ValueError("port 0 is no port to connect to")
    except ValueError as error:
        raise ValueError(
            f"The migration URI cannot be used: {error}. Give the destination as tcp:HOST:PORT, "
            "for example tcp:192.0.2.7:4460 or tcp:[2001:db8::7]:4460; or, on this host, as unix:PATH."
        ) from error
    return address


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a configuration. ``source`` is the file, or the environment variable."""

    source: str
    key: str
    reason: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.source, self.key, self.reason) if part)


class ConfigError(Exception):
    """A configuration that cannot be used; the message has one line per problem."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


def _expand(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"the home directory in {str(path)!r} is not known; write the whole path") from None


def _fits_socket(path: Path) -> Path:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise ValueError(f"{path} is longer than the {MAX_SOCKET_PATH_BYTES} bytes a socket path may have")
    return path


def _program(name: str) -> str:
    """Resolve a program beside the daemon's own interpreter, then on PATH."""
    if "/" in name:
        path = _expand(Path(name))
    else:
        beside = Path(sys.executable).parent / name
        path = beside if beside.exists() else Path(shutil.which(name) or beside)
    if not os.access(path, os.X_OK) or path.is_dir():
        raise ValueError(
            f"there is no program {name!r} beside {sys.executable} nor on PATH; install it or name its path"
        )
    return str(path)


def _command(argv: tuple[str, ...]) -> tuple[str, ...]:
    """A program with fixed arguments, resolved."""
    return (_program(argv[0]), *argv[1:])


def _address(value: object) -> object:
    return parse_address(value) if isinstance(value, str) else value


DirectoryPath = Annotated[Path, AfterValidator(_expand)]
SocketPath = Annotated[Path, AfterValidator(_expand), AfterValidator(_fits_socket)]
AddressText = Annotated[Address, BeforeValidator(_address)]
Command = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_command)]
Program = Annotated[str, Field(min_length=1), AfterValidator(_program)]
NamePattern = Annotated[str, Field(pattern=r"^[^/\s]{1,255}$")]
Rule = Annotated[str, Field(pattern=r"^[^/\s]{1,255}(/[^/\s]{1,64})?$")]
EndpointUrl = Annotated[str, Field(pattern=r"^https?://[^/\s@]{1,255}/?$")]
PositiveSeconds = Annotated[Seconds, Field(gt=0, le=1_000_000)]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys are errors, defaults are checked and expanded like given values."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class ControlConfig(Section):
    """``[control]``: the socket that migratectl and QMP clients use, and who may use it: root and the daemon's own user
    for everything, and the groups below."""

    socket: SocketPath = Path("/run/migrated/control.sock")
    operators: str | None = Field(default=None, min_length=1)
    """Group whose members may do everything."""
    readers: str | None = Field(default=None, min_length=1)
    """Group whose members may look but change nothing."""


class ProcessConfig(Section):
    """``[process]``: the daemon gives up what it does not need. Without a user it stays who started it."""

    user: str | None = Field(default=None, min_length=1)
    """Who the daemon, started as root, goes on as once its address is bound; all files of the configuration but this
    one must be that user's to read."""
    capabilities: tuple[Capability, ...] = ("CAP_SYS_NICE",)
    """What it keeps then, of what it has: CAP_SYS_NICE lets threads run before others from stop to run, CAP_SYS_PTRACE
    is for QEMUs that their user may not trace (Yama). Guests get none."""


class StateConfig(Section):
    """``[state]``: the files that must survive a restart: the journal and the history."""

    directory: DirectoryPath = Path("/var/lib/migrated")


class HistoryConfig(Section):
    """``[history]``: records of past attempts, in the state directory."""

    max_records: int = Field(default=10_000, ge=1, le=1_000_000)
    """How many are kept; beyond them the oldest go, but for those in doubt."""
    max_bytes: Bytes = Field(default=1 << 30, ge=64 << 20)
    """How much the documents of all records may take together; beyond it the oldest go, but for those in doubt."""


class ListenConfig(Section):
    """``[listen]``: where a destination takes migrations."""

    address: AddressText = Address("127.0.0.1", 4460)
    unix: SocketPath | None = None
    """A unix socket beside it, for daemons on this host: memory that is shared is handed over there, not copied."""


class TlsConfig(Section):
    """``[tls]``: how the hosts prove who they are. With a certificate every connection between daemons is mutual TLS
    1.3; without one they are plain, and only on loopback."""

    certificate: DirectoryPath | None = None
    """This host's certificate (PEM), followed by those between it and the authority; SIGHUP reads it again."""
    key: DirectoryPath | None = None
    """The certificate's private key (PEM, not encrypted), readable by the daemon alone; SIGHUP reads it again."""
    authority: DirectoryPath | None = None
    """Certificates (PEM) of the authority that certifies the hosts; no other is believed. SIGHUP reads it again."""
    revoked: DirectoryPath | None = None
    """Lists (PEM) of revoked certificates, one of each authority in `authority`: who is on one is refused, and so is
    everybody when it has run out. SIGHUP reads it again."""
    names: tuple[NamePattern, ...] = ("*",)
    """Certificate names, with `*` for any text, of the hosts that this one talks to at all, in either direction."""
    insecure: bool = False
    """Talk without TLS to other hosts than this one. Whoever is on the way can then read, change and take guests."""

    @model_validator(mode="after")
    def _whole(self) -> TlsConfig:
        files = {"certificate": self.certificate, "key": self.key, "authority": self.authority}
        missing = [name for name, path in files.items() if path is None]
        if 0 < len(missing) < len(files):
            raise ValueError(f"certificate, key and authority go together; missing: {', '.join(missing)}")
        if missing and self.revoked is not None:
            raise ValueError("revoked needs certificate, key and authority")
        if not missing and self.insecure:
            raise ValueError("insecure contradicts certificate: take one of them out")
        return self


class AuthorisationConfig(Section):
    """``[authorisation]``: which hosts may do what, by the names in their certificates. A rule is `"NAME"`, or
    `"NAME/GUEST"` for some guests only; `*` stands for any text in both."""

    accept_from: tuple[Rule, ...] = ("*",)
    """Hosts that may send guests here, and which guests."""
    send_to: tuple[Rule, ...] = ("*",)
    """Hosts that guests may be sent to from here, and which guests."""


class VmmConfig(Section):
    """``[vmm]``: how guests are started and found again."""

    directory: DirectoryPath = Path("/run/migrated/guests")
    """API sockets of guests; a restarted daemon finds its guests by them."""
    driver: str = "sim"
    """The driver with which ``guest create`` starts guests."""
    drivers: tuple[str, ...] = ()
    """Drivers beside the built-in ones, each as ``module:Class``, with a module on the daemon's import path."""
    command: Command = ("vmm-sim",)
    """The simulated VMM and fixed arguments; a bare name is looked up beside the daemon's interpreter, then on PATH."""
    start_timeout_s: PositiveSeconds = 10.0
    profiles: DirectoryPath = Path("configs/guests")
    """Guest profiles that ``guest create --profile NAME`` finds by name."""

    @model_validator(mode="after")
    def _room_for_names(self) -> VmmConfig:
        _fits_socket(self.directory / ("g" * 32 + ".sock"))
        return self


class QemuConfig(Section):
    """``[qemu]``: how QEMU guests are started."""

    binary: Program | None = None
    """QEMU's program: a path, or a name that is looked up on PATH. ``qemu-system-x86_64`` unless given."""
    definitions: DirectoryPath = Path("configs/qemu")
    """Definitions of guests, NAME.toml: the only source of paths and arguments for a guest that arrives."""
    ram_directory: DirectoryPath = Path("/dev/shm/migrated")
    """Memory files of guests that arrive: a tmpfs or hugetlbfs with room for their memory."""


class LimitsConfig(Section):
    """``[limits]``: limits on the requests of a peer, and the bound of every wait."""

    max_incoming: int = Field(default=4, ge=1, le=1024)
    """Incoming migrations at once."""
    max_memory_bytes: Bytes = Field(default=1 << 40, ge=1 << 20)
    """Memory of one incoming guest."""
    max_guests: int = Field(default=256, ge=1, le=65_536)
    """Guests on this host, those that come in among them."""
    spare_memory_bytes: Bytes = Field(default=256 << 20, ge=0)
    """Memory that must stay free on this host beside what is promised to guests that come in."""
    connect_timeout_s: PositiveSeconds = 5.0
    handshake_timeout_s: PositiveSeconds = 15.0
    max_connections: int = Field(default=512, ge=8, le=65_536)
    """Migration connections that this host holds at once, in all."""
    max_connections_per_address: int = Field(default=128, ge=4, le=65_536)
    """Migration connections that one address may hold at once."""
    max_handshakes: int = Field(default=32, ge=1, le=4096)
    """Connections that have not told yet what they are; TLS handshakes are among them."""
    max_handshakes_per_address: int = Field(default=16, ge=1, le=4096)
    """Such connections of one address."""
    round_timeout_s: PositiveSeconds = 60.0
    """A round without any acknowledged progress for this long is lost."""
    stall_timeout_s: PositiveSeconds = 300.0
    """An incoming migration that sends less than 1 MiB in this time before its guest is handed over is given up. While
    its operator holds the switchover (pause-before-switchover) it may send nothing."""
    incoming_timeout_s: PositiveSeconds = 86_400.0
    """An incoming migration whose guest has not been handed over after this long is given up, however much it sends."""
    stop_timeout_s: PositiveSeconds = 5.0
    """How long the VMM may take to stop or resume its vCPUs."""
    heartbeat_interval_s: PositiveSeconds = 0.5
    heartbeat_timeout_s: PositiveSeconds = 5.0
    """A control channel silent for this long is lost."""
    ready_timeout_s: PositiveSeconds = 10.0
    """A destination that voted READY and hears no decision discards the guest after this."""
    guessed_resume_reserve_ms: Milliseconds = Field(default=10.0, gt=0, le=60_000)
    """Kept back from the downtime limit for the resume of a guest whose VMM can only guess what that costs, until
    resumes on this host have shown it."""
    outcome_retry_s: PositiveSeconds = 1.0
    """First pause between two questions for the outcome of an attempt in doubt; it backs off from here."""
    tcp_user_timeout_s: PositiveSeconds = 10.0
    """Unacknowledged data for this long breaks a connection (TCP_USER_TIMEOUT)."""

    @model_validator(mode="after")
    def _heartbeats_fit(self) -> LimitsConfig:
        if self.heartbeat_timeout_s < 2 * self.heartbeat_interval_s:
            raise ValueError("heartbeat_timeout_s must be at least twice heartbeat_interval_s")
        return self


class LogConfig(Section):
    """``[log]``: to standard error, or to a file."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["console", "json"] = "console"
    file: DirectoryPath | None = None


class MetricsConfig(Section):
    """``[metrics]``: where Prometheus scrapes; nowhere unless an address is given."""

    address: AddressText | None = None


class LockConfig(Section):
    """``[lock]``: the ownership lock of a guest's identity; on a directory that both hosts share it fences for real."""

    directory: DirectoryPath | None = None


class ClockConfig(Section):
    """``[clock]``: shifts this daemon's view of its host's clocks, so that tests can play two hosts on one."""

    hrtime_offset_ns: int = 0
    wall_offset_ns: int = 0
    drift_ppm: int = Field(default=0, ge=-1000, le=1000)


class FleetConfig(Section):
    """``[fleet]``: the etcd cluster that many hosts share: membership, who owns a guest, evacuations. Without endpoints
    this host stands alone, and nothing of that happens."""

    endpoints: tuple[EndpointUrl, ...] = ()
    """URLs of etcd's members, `http://HOST:PORT` or `https://HOST:PORT`; any of them will do while others are away."""
    prefix: str = Field(default="/migrated/", pattern=r"^/[A-Za-z0-9_./-]{0,120}$")
    """Where the fleet's keys begin; hosts with the same one are one fleet."""
    name: str | None = Field(default=None, max_length=64, pattern=NAME_PATTERN)
    """This host's name in the fleet, which no other host has; the machine's name unless given."""
    address: AddressText | None = None
    """Where other hosts reach this one; `[listen] address` unless given."""
    certificate: DirectoryPath | None = None
    """Client certificate (PEM) for https, where etcd asks for one."""
    key: DirectoryPath | None = None
    """Its private key (PEM)."""
    authority: DirectoryPath | None = None
    """Certificates (PEM) of the authority of etcd's members; the system's authorities unless given."""
    user: str | None = Field(default=None, min_length=1)
    """User of etcd, where it asks for one."""
    password_file: DirectoryPath | None = None
    """File whose first line is the user's password, readable by the daemon alone."""
    timeout_s: PositiveSeconds = 3.0
    """How long a call of etcd may take, all endpoints together."""
    lease_s: Seconds = Field(default=10.0, ge=2, le=3600)
    """A host that etcd has not heard of for this long is shown as gone, and its jobs go on at another host."""
    memory_bytes: Bytes = Field(default=0, ge=0)
    """Memory that this host gives to guests in all; 0 for all it has less `[limits] spare_memory_bytes`."""
    max_inbound: int = Field(default=2, ge=0, le=16)
    """Migrations of jobs to here at once; `[limits] max_incoming` holds beside it."""
    max_outbound: int = Field(default=2, ge=0, le=16)
    """Migrations of jobs from here at once."""
    link_bytes_per_s: BytesPerSecond = Field(default=0, ge=0, le=1 << 40)
    """What the link of this host moves; 0 for what migrations have shown."""
    groups: tuple[NamePattern, ...] = ()
    """Patterns of guest names, with `*` for any text: guests of one pattern are kept on different hosts where that is
    possible. The same on all hosts."""

    @model_validator(mode="after")
    def _whole(self) -> FleetConfig:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together")
        if (self.user is None) != (self.password_file is None):
            raise ValueError("user and password_file go together")
        if self.address is not None and self.address.port == 0:
            raise ValueError("address needs the port that other hosts connect to")
        return self


class Config(Section):
    """The whole configuration."""

    control: ControlConfig = ControlConfig()
    process: ProcessConfig = ProcessConfig()
    state: StateConfig = StateConfig()
    history: HistoryConfig = HistoryConfig()
    listen: ListenConfig = ListenConfig()
    tls: TlsConfig = TlsConfig()
    authorisation: AuthorisationConfig = AuthorisationConfig()
    vmm: VmmConfig = Field(default_factory=VmmConfig)
    qemu: QemuConfig = QemuConfig()
    limits: LimitsConfig = LimitsConfig()
    migration: MigrationParameters = MigrationParameters()
    log: LogConfig = LogConfig()
    metrics: MetricsConfig = MetricsConfig()
    lock: LockConfig = LockConfig()
    clock: ClockConfig = ClockConfig()
    fleet: FleetConfig = FleetConfig()

    @model_validator(mode="after")
    def _fleet_knows_where(self) -> Config:
        """Hosts of a fleet are told apart by their addresses."""
        where = self.fleet.address or self.listen.address
        if self.fleet.endpoints and where.is_wildcard:
            raise ValueError(
                f"[fleet] address must say where other hosts reach this one: {where} stands for all of its addresses"
            )
        return self

    @model_validator(mode="after")
    def _rules_need_names(self) -> Config:
        if (
            self.tls.certificate is None
            and (self.tls.names, *self.authorisation.model_dump().values()) != (("*",),) * 3
        ):
            raise ValueError(
                "rules in [tls] names or [authorisation] need certificates: without TLS nobody has a name; set "
                "[tls] certificate, key and authority"
            )
        return self


def load_config(path: Path, environment: Mapping[str, str] | None = None) -> Config:
    """Read and check a configuration file, with overrides from the environment (default: the process's own).

    Raises:
        ConfigError: with every problem found.
    """
    environment = os.environ if environment is None else environment
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = f"cannot be read ({error.strerror}); name an existing file"
        raise ConfigError([Problem(str(path), "", reason)]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([Problem(str(path), "", f"is not valid TOML: {error}")]) from error
    origins = _override(document, environment)
    for section in Config.model_fields:
        document.setdefault(section, {})
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        problems = [_problem(details, str(path), origins) for details in error.errors(include_url=False)]
        raise ConfigError(problems) from None


def _override(document: dict[str, Any], environment: Mapping[str, str]) -> dict[tuple[str, ...], str]:
    """Put MIGRATED_SECTION__KEY into ``document``; returns which variable each overridden key came from."""
    origins: dict[tuple[str, ...], str] = {}
    for variable, text in sorted(environment.items()):
        section, separator, key = variable.removeprefix(ENV_PREFIX).lower().partition("__")
        if not variable.startswith(ENV_PREFIX) or not separator:
            continue
        table = document.setdefault(section, {})
        if isinstance(table, dict):
            table[key] = _env_value(text)
            origins[section, key] = variable
            origins.setdefault((section,), variable)
    return origins


def _env_value(text: str) -> object:
    """A number, a truth value or a list as TOML writes it; everything else is the text itself."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float | list) else text


def _problem(details: ErrorDetails, path: str, origins: Mapping[tuple[str, ...], str]) -> Problem:
    location = tuple(str(part) for part in details["loc"])
    reason = fault(details)
    if details["type"] == "extra_forbidden":
        reason = _unknown(location)
        source = origins.get(location[:2], path)
    else:
        source = origins.get(location[:2], path) if len(location) > 1 else path
    return Problem(source, ".".join(location), reason)


def _unknown(location: tuple[str, ...]) -> str:
    """The reason for a key that does not exist, with the nearest one that does."""
    what, known = "key", list(Config.model_fields)
    if len(location) == 1:
        what = "section"
    else:
        section = Config.model_fields[location[0]].annotation
        candidates = [section, *get_args(section)]
        known = [
            name for c in candidates if isinstance(c, type) and issubclass(c, BaseModel) for name in c.model_fields
        ]
    near = difflib.get_close_matches(location[-1], known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "known here: " + ", ".join(known)
    return f"is an unknown {what}; {hint}"
