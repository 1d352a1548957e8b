"""The configuration of a guest: the model, its defaults scaled to memory, and the TOML profiles it is read from.

The model is also what the description carries (``vmm_config``) from which the other host builds an equal guest, so it
holds nothing of the host; a peer may have written it, so every value is bounded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, model_validator

from protocol.guest import MAX_DEVICES, PAGE_SIZE, GuestName, Name, WireModel
from protocol.units import UnitError, parse_rate, parse_size
from protocol.wrong_values import first_fault

WorkloadName = Literal["idle", "sequential", "random", "hot-cold", "phased", "fill", "delta", "stride"]

MIN_MEMORY_BYTES: Final = 1 << 20
MAX_SIM_MEMORY_BYTES: Final = 1 << 40
MAX_SIM_STATE_BYTES: Final = (1 << 30) - (1 << 12)
"""A device state must fit one payload of the API socket."""
DEFAULT_GUEST_FREQ: Final = 2_100_000_000
DEFAULT_DIRTY_RATE: Final = 50 << 20

Micros = Annotated[int, Field(ge=0, le=3_600_000_000)]
Fraction = Annotated[float, Field(ge=0, le=1)]
StateBytes = Annotated[int, Field(ge=0, le=MAX_SIM_STATE_BYTES)]


class ConfigError(Exception):
    """A guest configuration that cannot be used; the message names the key and the reason."""


class Costs(WireModel):
    """The variation of the costs of one thing: every real cost is a draw around its figure."""

    jitter: Fraction = 0.0
    """Standard deviation as a fraction of the figure."""
    outlier_probability: Fraction = 0.0
    outlier_factor: Annotated[float, Field(ge=1, le=1000)] = 1.0
    stop_us: Micros = 0
    resume_us: Micros = 0


class DeviceConfig(Costs):
    """One device with made-up state. Sizes in bytes, costs in microseconds of elapsed time."""

    name: Name
    kind: Literal["iterable", "non-iterable"]
    state: StateBytes = 4096
    """Bytes of the final state, which is saved while the guest is stopped (for an iterable device: at least)."""
    save_us: Micros = 0
    load_us: Micros = 0
    initial_state: StateBytes = 0
    """Iterable: bytes that the first pre-copy round saves; halves towards ``shrink_to`` from round to round."""
    shrink_to: StateBytes = 0
    writes_pages: Annotated[int, Field(ge=0, le=4096)] = 0
    """Pages of guest memory that the final save writes (a device flushing to its guest)."""
    load_writes_pages: Annotated[int, Field(ge=0, le=4096)] = 0
    """Pages of guest memory that loading the state writes (as QEMU's vmgenid and virtio rings do)."""

    @model_validator(mode="after")
    def _shrinks(self) -> DeviceConfig:
        if self.shrink_to > self.initial_state:
            raise ValueError("shrink_to is larger than initial_state")
        if self.kind == "non-iterable" and self.initial_state:
            raise ValueError("initial_state is for iterable devices")
        return self


class GuestConfig(Costs):
    """One guest, with nothing left to defaults: equal configs and step counts mean equal memory."""

    name: GuestName
    uuid: Annotated[str, Field(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]
    memory_bytes: Annotated[int, Field(ge=MIN_MEMORY_BYTES, le=MAX_SIM_MEMORY_BYTES, multiple_of=PAGE_SIZE)]
    vcpus: Annotated[int, Field(ge=1, le=4096)]
    seed: Annotated[int, Field(ge=0, lt=1 << 64)]
    guest_freq: Annotated[int, Field(ge=1_000_000, lt=1 << 40)]
    boot_tsc: Annotated[int, Field(ge=0, lt=1 << 64)]
    """Guest TSC at boot."""
    vcpu_tsc_skew: Annotated[int, Field(ge=0, lt=1 << 48)]
    """vCPU i's TSC is ahead of the VM-wide one by i times this many ticks."""
    workload: WorkloadName
    dirty_rate_bytes_per_s: Annotated[int, Field(ge=0, le=1 << 40)]
    """0: no pacing (``fill`` only)."""
    content: Literal["random", "zero"]
    """Content of touched pages at boot."""
    huge_pages: bool
    touched_pages: Annotated[int, Field(ge=1)]
    working_set_pages: Annotated[int, Field(ge=0)]
    hot_pages: Annotated[int, Field(ge=0)]
    phase_steps: Annotated[int, Field(ge=1, le=1 << 40)]
    stride: Annotated[int, Field(ge=1, le=1 << 20)]
    devices: Annotated[tuple[DeviceConfig, ...], Field(max_length=MAX_DEVICES - 16)]

    @property
    def pages(self) -> int:
        """Guest pages."""
        return self.memory_bytes // PAGE_SIZE

    @property
    def device_write_pages(self) -> int:
        """Pages of the range that devices write while they save and load."""
        return sum(device.writes_pages + device.load_writes_pages for device in self.devices)

    @model_validator(mode="after")
    def _fits(self) -> GuestConfig:
        used = 1 + self.device_write_pages + self.working_set_pages
        if used > self.touched_pages or self.touched_pages > self.pages:
            raise ValueError(
                f"{used} pages of heartbeat, devices and working set must fit {self.touched_pages} touched pages,"
                f" and these the guest's {self.pages}"
            )
        if self.workload != "idle" and not self.working_set_pages >= 64:
            raise ValueError(f"working_set_pages is {self.working_set_pages}, a workload needs at least 64")
        if self.workload in ("hot-cold", "phased", "delta") and not 0 < self.hot_pages < self.working_set_pages:
            raise ValueError(f"hot_pages is {self.hot_pages}, not between 0 and {self.working_set_pages}")
        if self.workload == "stride" and self.stride > self.working_set_pages:
            raise ValueError(f"stride is {self.stride}, larger than the working set of {self.working_set_pages} pages")
        if self.workload not in ("idle", "fill") and not self.dirty_rate_bytes_per_s:
            raise ValueError(f"workload {self.workload} needs a dirty_rate above 0; only fill runs unpaced")
        keys = [(device.name, device.kind) for device in self.devices]
        if len(set(keys)) != len(keys):
            raise ValueError("a device is listed twice with the same name and kind")
        return self


def build_config(options: dict[str, Any]) -> GuestConfig:
    """A guest's config from options (``[guest]`` of a profile, command line), defaults scaled to its memory.

    Sizes may be numbers or texts such as ``256MiB``; ``touched`` may also be ``75%``. Raises ConfigError.
    """
    options = dict(options)
    try:
        memory_bytes = _size(options.pop("memory", "256MiB"))
        pages = memory_bytes // PAGE_SIZE
        workload = options.setdefault("workload", "hot-cold")
        options["touched_pages"] = touched = _touched(options.pop("touched", "50%"), memory_bytes)
        rate = options.pop("dirty_rate", None)
        default_rate = 0 if workload in ("fill", "idle") else DEFAULT_DIRTY_RATE
        options["dirty_rate_bytes_per_s"] = default_rate if rate is None else _rate(rate)
        devices = tuple(_device(entry) for entry in options.pop("devices", ()))
    except UnitError as error:
        raise ConfigError(str(error)) from error
    available = touched - 1 - sum(device.writes_pages + device.load_writes_pages for device in devices)
    if workload == "fill":
        share = available
    elif workload == "idle":
        share = 0
    else:
        share = min(max(touched // 4, 64), available)
    working = options.setdefault("working_set_pages", share)
    if isinstance(working, int):
        options.setdefault("hot_pages", max(working // (4 if workload == "phased" else 8), 1))
    defaults = {
        "vcpus": 2,
        "seed": 1,
        "guest_freq": DEFAULT_GUEST_FREQ,
        "boot_tsc": 0,
        "vcpu_tsc_skew": 0,
        "content": "random",
        "huge_pages": False,
        "phase_steps": max(pages // 16, 64),
        "stride": 8,
    }
    try:
        return GuestConfig.model_validate({**defaults, **options, "memory_bytes": memory_bytes, "devices": devices})
    except ValidationError as error:
        raise ConfigError(f"The guest configuration is not usable: {first_fault(error)}.") from error


def read_profile(path: Path) -> dict[str, Any]:
    """Options of a profile file: its ``[guest]`` table with ``devices`` from ``[[device]]``. Raises ConfigError."""
    import tomllib

    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"The guest profile {path} cannot be read: {error}.") from error
    unknown = sorted(set(document) - {"guest", "device", "about"})
    if unknown:
        raise ConfigError(f"The guest profile {path} has unknown tables: {', '.join(unknown)}.")
    guest, devices = document.get("guest", {}), document.get("device", [])
    if not isinstance(guest, dict) or not isinstance(devices, list):
        raise ConfigError(f"The guest profile {path} needs a table [guest] and tables [[device]].")
    return {**guest, "devices": devices}


def _size(value: Any) -> int:
    return parse_size(value) if isinstance(value, str) else _integer(value, "size")


def _rate(value: Any) -> int:
    return parse_rate(value) if isinstance(value, str) else _integer(value, "rate")


def _integer(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{value!r} is not a {what}: use a number of bytes or a text such as 256MiB.")
    return value


def _touched(value: Any, memory_bytes: int) -> int:
    """Touched pages of ``"75%"``, a fraction such as 0.75, or a size."""
    if isinstance(value, float):
        size = int(memory_bytes * value)
    elif isinstance(value, str) and value.endswith("%") and value[:-1].isdigit():
        size = memory_bytes * int(value[:-1]) // 100
    else:
        size = _size(value)
    return max(size // PAGE_SIZE, 1)


def _device(entry: Any) -> DeviceConfig:
    if isinstance(entry, DeviceConfig):
        return entry
    if not isinstance(entry, dict):
        raise ConfigError(f"A device must be a table, not {type(entry).__name__}.")
    fields = dict(entry)
    for key in ("state", "initial_state", "shrink_to"):
        if key in fields:
            fields[key] = _size(fields[key])
    try:
        return DeviceConfig.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"Device {fields.get('name')!r} is not usable: {first_fault(error)}.") from error
