"""The parameters of a migration: names, units, ranges and defaults, in one place for config, control socket, CLI and
record. Times and sizes also take a string with a unit ("300ms", "64MiB", "100MiB/s").
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from protocol.units import parse_duration_ns, parse_rate, parse_size


def _milliseconds(value: object) -> object:
    return parse_duration_ns(value) / 1e6 if isinstance(value, str) else value


def _seconds(value: object) -> object:
    return parse_duration_ns(value) / 1e9 if isinstance(value, str) else value


def _bytes(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def _rate(value: object) -> object:
    if value == "0":
        return 0
    return parse_rate(value) if isinstance(value, str) else value


Milliseconds = Annotated[float, BeforeValidator(_milliseconds)]
Seconds = Annotated[float, BeforeValidator(_seconds)]
Bytes = Annotated[int, BeforeValidator(_bytes)]
BytesPerSecond = Annotated[int, BeforeValidator(_rate)]


class MigrationParameters(BaseModel):
    """Parameters of one migration. What QEMU has too keeps QEMU's name, with ``_`` for ``-`` and the unit behind it.

    A limit of 0: ``downtime_limit_ms`` lets no switchover fit while it is enforced, ``switchover_limit_ms`` is no
    tolerance, and of the others (bandwidth, time-out, guest time) 0 is no limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    downtime_limit_ms: Milliseconds = Field(default=300.0, ge=0, le=2_000_000)
    """The whole budget from the stop of the guest to its run on the destination."""
    switchover_limit_ms: Milliseconds = Field(default=0.0, ge=0, le=2_000_000)
    """Tolerance on top before the switchover is aborted."""
    switchover_abort: bool = True
    """Enforce the limit. When off, a violation is only flagged in the record."""
    channels: int = Field(default=2, ge=1, le=16)
    """Data channels (TCP connections for memory and device state)."""
    max_bandwidth_bytes_per_s: BytesPerSecond = Field(default=0, ge=0, le=1 << 40)
    """Cap over all data channels together."""
    timeout_s: Seconds = Field(default=600.0, ge=0, le=1_000_000)
    """How long pre-copy may take."""
    on_timeout: Literal["abort", "force"] = "abort"
    """Action when the time-out passes: give up, or stop the guest although the prediction does not fit."""
    digest: bool = True
    """Keep and compare the running digest of guest memory."""
    dirty_tracking: Literal["auto", "pagemap-scan", "logged"] = "auto"
    """How dirty pages are found: by the kernel, or by the log that the VMM keeps."""
    time_policy: Literal["midpoint", "never-ahead", "never-behind", "freeze"] = "midpoint"
    """Which end of the elapsed-time interval guest time advances by."""
    max_time_jump_ms: Milliseconds = Field(default=0.0, ge=0, le=2_000_000)
    """Abort when guest time would have to jump further."""
    max_time_error_ms: Milliseconds = Field(default=0.0, ge=0, le=2_000_000)
    """Abort when the elapsed time is not known better than this."""
    compression: Literal["none", "zstd", "lz4"] = "none"
    """Encoding tried on page batches; a batch that does not gain travels plain."""
    compression_level: int = Field(default=1, ge=-5, le=19)
    """Level for zstd."""
    xor_delta: bool = False
    """Send pages that were sent before as XOR against what was sent, where it gains."""
    xor_delta_cache_bytes: Bytes = Field(default=64 << 20, ge=1 << 20, le=1 << 40)
    """Memory for the pages last sent, on the source."""
    prediction_coverage_pct: float = Field(default=95.0, ge=50, le=99.9)
    """How often the upper bound of a prediction must hold; the stop waits until the bound fits the limit."""
    downtime_goal: Literal["least", "first-fit"] = "least"
    """Go on with rounds as long as they shorten the downtime by more than they cost, or stop the guest as soon as the
    bound fits the limit."""
    downtime_steps: int = Field(default=1, ge=1, le=100)
    """In how many steps the target rises to the limit, so that an idle guest gets a shorter pause."""
    auto_converge: bool = False
    """Throttle the vCPUs when rounds make no progress (QEMU's auto-converge)."""
    cpu_throttle_initial: int = Field(default=20, ge=1, le=99)
    """First throttling step (%)."""
    cpu_throttle_increment: int = Field(default=10, ge=1, le=99)
    """Further steps (%)."""
    max_cpu_throttle: int = Field(default=99, ge=1, le=99)
    """Most throttling (%)."""
    pause_before_switchover: bool = False
    """Stop the guest, then wait for ``continue`` before the switchover (QEMU's pause-before-switchover)."""


CHANGE_WHILE_RUNNING: Final = (
    "downtime_limit_ms", "switchover_limit_ms", "switchover_abort", "max_bandwidth_bytes_per_s", "timeout_s",
    "on_timeout", "prediction_coverage_pct", "downtime_goal", "downtime_steps", "auto_converge", "cpu_throttle_initial",
    "cpu_throttle_increment", "max_cpu_throttle", "pause_before_switchover",
)  # fmt: skip
"""The parameters that a running migration takes up at once; the others are agreed on when it begins."""


def in_force(running: MigrationParameters, wished: MigrationParameters) -> MigrationParameters:
    """Return the parameters of a running migration after an operator set others: only those that can change while it
    runs are taken."""
    return running.model_copy(update={name: getattr(wished, name) for name in CHANGE_WHILE_RUNNING})


def limit_of(parameters: MigrationParameters) -> int:
    """Return the downtime that a switchover must stay under (ns)."""
    return int((parameters.downtime_limit_ms + parameters.switchover_limit_ms) * 1e6)
