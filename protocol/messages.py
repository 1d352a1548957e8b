"""Every message of the protocol: one frozen model each, one catalogue, one encoder and one decoder.

Longer than other modules because the catalogue of the wire is best read in one piece; there is no logic in it.

Control channel (S source, D destination; the whole story is drawn in docs/protocol.md):

    S HELLO  -> D WELCOME | REFUSE        S ROUND_END … D ROUND_DONE      S (HOLD,) DOWNTIME, STATE_END -> D READY | NO
    S (OWNED,) COMMIT -> D RUNNING | DISCARDED     S ABORT -> D DISCARDED          D REPORT, S RECORD
    either side: CLOCK_ASK -> CLOCK_REPLY (also the heartbeat), ERROR

Data channels: S JOIN -> D JOINED, then S EXTENTS, PAGES, ZERO_PAGES, DEVICE_STATE, BARRIER. A fresh connection may
open with OUTCOME_ASK instead: the source sends its decision again and learns the outcome.
"""

from __future__ import annotations

from collections.abc import Hashable
from enum import IntEnum
from typing import Annotated, Any, ClassVar, Final, Literal, NoReturn, TypeAlias

import msgpack
from pydantic import Field, ValidationError

from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.frames import pack_header
from protocol.guest import DeviceKind, GuestDescription, Name, NonNegativeNs, WireModel
from protocol.guest_time import Policy, VmTimeData

U32 = Annotated[int, Field(ge=0, lt=1 << 32)]
U64 = Annotated[int, Field(ge=0, lt=1 << 64)]
I64 = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Epoch = Annotated[int, Field(ge=1, lt=1 << 63)]
Sentence = Annotated[str, Field(max_length=2048)]
MigrationId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Capabilities = Annotated[tuple[Name, ...], Field(max_length=64)]
Token = Annotated[bytes, Field(min_length=16, max_length=16)]
Nonce = U64

MAX_RUNS_BYTES: Final = 48 << 10
"""Longest run table of one page frame: 6,144 runs of 8 bytes."""


MAX_STATES: Final = 1024
"""Most device states of one migration, those of rounds among them."""


class FrameType(IntEnum):
    """Message type numbers on the wire. 0 is never valid; a number is never used again for something else."""

    HELLO = 1
    WELCOME = 2
    REFUSE = 3
    CLOCK_ASK = 4
    CLOCK_REPLY = 5
    ROUND_END = 6
    ROUND_DONE = 7
    DOWNTIME = 8
    TIME_ASK = 9
    TIME_DATA = 10
    STATE_END = 11
    READY = 12
    NO = 13
    COMMIT = 14
    ABORT = 15
    RUNNING = 16
    DISCARDED = 17
    OUTCOME_ASK = 18
    OUTCOME_OPEN = 19
    REPORT = 20
    RECORD = 21
    ERROR = 22
    HOLD = 23
    OWNED = 24
    JOIN = 32
    JOINED = 33
    PAGES = 34
    ZERO_PAGES = 35
    BARRIER = 36
    DEVICE_STATE = 37
    EXTENTS = 38


class Message(WireModel):
    """Base of all messages. ``TYPE`` is the frame type number."""

    TYPE: ClassVar[FrameType]


class Limits(WireModel):
    """Limits of the downtime, and whether the destination must abort when they are exceeded (protocol/budget.py)."""

    downtime_limit_ns: NonNegativeNs
    switchover_limit_ns: NonNegativeNs
    switchover_abort: bool


class TimeRules(WireModel):
    """The rules by which guest time is carried over. A limit of 0 means none (protocol/guest_time.py)."""

    policy: Policy
    max_time_jump_ns: NonNegativeNs
    max_time_error_ns: NonNegativeNs


class DeviceCost(WireModel):
    """Cost of saving or loading one device (ns), and how far single tries lay from it, 0 where it was not tried."""

    name: Name
    kind: DeviceKind
    ns: NonNegativeNs
    spread_ns: NonNegativeNs = 0


class Hello(Message):
    """The source proposes a migration. Sent once, first on the control channel.

    With the capability ``shared-memory`` the descriptors of all guest memory come with it (SCM_RIGHTS), in the order of
    the guest's page numbers: on a unix socket only.
    """

    TYPE = FrameType.HELLO
    migration_id: MigrationId
    epoch: Epoch
    guest: GuestDescription
    guest_paused: bool
    capabilities: Capabilities
    required: Capabilities
    limits: Limits
    time_rules: TimeRules
    channels: Annotated[int, Field(ge=1, le=16)]
    host: Name


class Welcome(Message):
    """The destination takes the guest: it built an empty equal one and measured what loading would cost."""

    TYPE = FrameType.WELCOME
    token: Token
    capabilities: Capabilities
    load_costs: Annotated[tuple[DeviceCost, ...], Field(max_length=1024)]
    resume_ns: NonNegativeNs
    ready_timeout_ns: NonNegativeNs
    host: Name


class Refuse(Message):
    """The destination does not take the guest. Nothing was kept."""

    TYPE = FrameType.REFUSE
    code: Annotated[int, Field(ge=1, le=255)]
    reason: Sentence


class ClockAsk(Message):
    """One clock exchange begins. Also the heartbeat of the control channel."""

    TYPE = FrameType.CLOCK_ASK
    nonce: Nonce


class ClockReply(Message):
    """The answer: when the ask was read (t2) and this reply is written (t3), on the answering host's raw clock."""

    TYPE = FrameType.CLOCK_REPLY
    nonce: Nonce
    t2_ns: I64
    t3_ns: I64


class RoundEnd(Message):
    """All pages of the round are on the data channels, each closed by a BARRIER."""

    TYPE = FrameType.ROUND_END
    round: U32
    pages: U64
    zero_pages: U64


class RoundDone(Message):
    """Every page of the round is in place on the destination, with the memory digest over what it holds."""

    TYPE = FrameType.ROUND_DONE
    round: U32
    bytes: U64
    digest: U64


class Downtime(Message):
    """The guest has stopped: the source's downtime at ``sent_at_ns`` (raw clock), stamped right before the write, and
    the limits that this switchover runs under, in place of HELLO's: an operator may change them while rounds run.

    ``resume_reserve_ns`` is the part of the limits that the source reserves for resuming its guest after an abort; the
    source does not wait for a NO that would come later.
    """

    TYPE = FrameType.DOWNTIME
    epoch: Epoch
    limits: Limits
    resume_reserve_ns: NonNegativeNs
    source_downtime_ns: NonNegativeNs
    sent_at_ns: I64


class Hold(Message):
    """The guest has stopped and the operator holds the switchover: nothing comes before DOWNTIME, for as long as he
    likes. Only with the capability ``hold``."""

    TYPE = FrameType.HOLD
    epoch: Epoch


class TimeAsk(Message):
    """The destination asks for the guest's time, with every round that is in place; the source answers the newest ask
    once the guest has stopped. The exchange wraps the export (protocol/clock.py)."""

    TYPE = FrameType.TIME_ASK
    nonce: Nonce


class TimeData(Message):
    """The guest's time at the export, with the stamps of the exchange on the source's raw clock."""

    TYPE = FrameType.TIME_DATA
    nonce: Nonce
    time: VmTimeData
    t2_ns: I64
    t3_ns: I64


class StateEnd(Message):
    """All of the final state is sent; the message lists what must have arrived before READY."""

    TYPE = FrameType.STATE_END
    epoch: Epoch
    last_round: U32
    devices: Annotated[int, Field(ge=0, le=MAX_STATES)]
    digest: U64
    source_downtime_ns: NonNegativeNs
    sent_at_ns: I64


class Ready(Message):
    """The destination's vote: complete, equal, in time. It can run the guest and will not before COMMIT.

    ``completing_ns`` is the time from reading STATE_END to writing READY (destination's clock); ``elapsed_ns`` is the
    downtime so far by the destination's count.
    """

    TYPE = FrameType.READY
    epoch: Epoch
    digest: U64
    elapsed_ns: NonNegativeNs
    completing_ns: NonNegativeNs


NoCause: TypeAlias = Literal["limit", "load", "digest", "time", "lock", "lost", "cancelled", "fault"]


class No(Message):
    """The destination's vote against the switchover. It is final: the guest of this epoch will never run there."""

    TYPE = FrameType.NO
    epoch: Epoch
    cause: NoCause
    reason: Sentence


class Owned(Message):
    """Right before COMMIT, in a fleet: the fencing token with which the destination takes the guest's lock. It is the
    revision at which the destination became the owner. Only with the capability ``owner-token``."""

    TYPE = FrameType.OWNED
    epoch: Epoch
    token: U64


class Commit(Message):
    """The single permission to run. Journaled by the source before it is sent."""

    TYPE = FrameType.COMMIT
    epoch: Epoch


class Abort(Message):
    """The source keeps its guest."""

    TYPE = FrameType.ABORT
    epoch: Epoch
    reason: Sentence


class Running(Message):
    """The destination runs the guest. Durations on its clock, counted from reading COMMIT."""

    TYPE = FrameType.RUNNING
    epoch: Epoch
    resumed_after_ns: NonNegativeNs
    sent_after_ns: NonNegativeNs


class Discarded(Message):
    """The proof: this epoch was journaled as discarded on the destination and will never run there."""

    TYPE = FrameType.DISCARDED
    epoch: Epoch
    reason: Sentence


class OutcomeAsk(Message):
    """On a fresh connection: the source's decision for a migration, sent again until it is answered."""

    TYPE = FrameType.OUTCOME_ASK
    migration_id: MigrationId
    epoch: Epoch
    decision: Literal["commit", "abort"]


class OutcomeOpen(Message):
    """Answer to OUTCOME_ASK while the outcome is still open, or when the destination knows nothing of it."""

    TYPE = FrameType.OUTCOME_OPEN
    epoch: Epoch
    reason: Sentence


class Report(Message):
    """The destination's half of the record, as JSON in the payload."""

    TYPE = FrameType.REPORT


class Record(Message):
    """The completed record of the attempt, as JSON in the payload."""

    TYPE = FrameType.RECORD


class Error(Message):
    """The reason why this side closes the connection."""

    TYPE = FrameType.ERROR
    code: Annotated[int, Field(ge=1, le=255)]
    text: Sentence

    @classmethod
    def about(cls, error: RemoteProtocolError) -> Error:
        """Return the message that tells the peer which rule it broke."""
        return cls(code=int(error.code), text=str(error)[:2000])


class Join(Message):
    """A data channel proves that it belongs to the session."""

    TYPE = FrameType.JOIN
    migration_id: MigrationId
    token: Token
    channel: Annotated[int, Field(ge=0, lt=16)]


class Joined(Message):
    """The data channel is accepted."""

    TYPE = FrameType.JOINED
    channel: Annotated[int, Field(ge=0, lt=16)]


Encoding: TypeAlias = Literal["plain", "zstd", "lz4", "xor-lz4"]


class Pages(Message):
    """A batch of pages. ``runs`` is the run table (protocol/pages.py), ``digest`` the XXH3-64 of the page contents
    before encoding, in the order of the table."""

    TYPE = FrameType.PAGES
    encoding: Encoding
    runs: Annotated[bytes, Field(min_length=8, max_length=MAX_RUNS_BYTES)]
    digest: U64


class ZeroPages(Message):
    """Runs of pages that are all zero. No payload."""

    TYPE = FrameType.ZERO_PAGES
    runs: Annotated[bytes, Field(min_length=8, max_length=MAX_RUNS_BYTES)]


class Extents(Message):
    """Runs of pages that hold data and will travel in this round, ahead of them. A hint: the destination may populate
    them meanwhile. Only in round 1, only with the capability ``extents``. No payload."""

    TYPE = FrameType.EXTENTS
    runs: Annotated[bytes, Field(min_length=8, max_length=MAX_RUNS_BYTES)]


class Barrier(Message):
    """End of a round on this channel: no page of a later round was sent before it."""

    TYPE = FrameType.BARRIER
    round: U32


class DeviceState(Message):
    """A piece of one device's state. ``digest`` is the XXH3-64 of the whole state of ``total_bytes``.

    ``final`` is false for state that an iterable device sends during rounds. ``order`` numbers the states of a
    migration in the order in which they must be loaded.
    """

    TYPE = FrameType.DEVICE_STATE
    order: U32
    name: Name
    kind: DeviceKind
    final: bool
    offset: U32
    total_bytes: U32
    digest: U64
    save_ns: NonNegativeNs


MESSAGES: tuple[type[Message], ...] = (
    Hello,
    Welcome,
    Refuse,
    ClockAsk,
    ClockReply,
    RoundEnd,
    RoundDone,
    Downtime,
    Hold,
    TimeAsk,
    TimeData,
    StateEnd,
    Ready,
    No,
    Owned,
    Commit,
    Abort,
    Running,
    Discarded,
    OutcomeAsk,
    OutcomeOpen,
    Report,
    Record,
    Error,
    Join,
    Joined,
    Pages,
    ZeroPages,
    Extents,
    Barrier,
    DeviceState,
)
CATALOGUE: dict[int, type[Message]] = {int(model.TYPE): model for model in MESSAGES}


def encode(message: Message) -> bytes:
    """Return the packed meta of a message; its frame type is ``message.TYPE``."""
    packed: bytes = msgpack.packb(message.model_dump(), use_bin_type=True)
    return packed


def frame_head(
    version: int, message: Message, sequence: int, *, payload_bytes: int = 0, round_number: int = 0
) -> bytes:
    """Return the header and the meta of the frame that carries a message: all of it but the payload.

    Args:
        version: the version that the prefaces settled.
        sequence: number of the frame on its channel and direction.
        payload_bytes: length of the payload that follows.
        round_number: the pre-copy round that the frame belongs to, 0 outside rounds.

    Raises:
        LocalProtocolError: a length is beyond what any peer accepts.
    """
    meta = encode(message)
    return pack_header(version, message.TYPE, meta, payload_bytes, sequence, round_number) + meta


def decode(frame_type: int, meta: bytes | bytearray | memoryview) -> Message:
    """Decode the meta of a frame.

    Raises:
        RemoteProtocolError: unknown type, not msgpack, trailing bytes, duplicate keys, an unknown or missing key, or
            a value of the wrong type or out of range; the sentence names the first fault.
    """
    model = CATALOGUE.get(frame_type)
    if model is None:
        raise RemoteProtocolError(f"frame type {frame_type} is unknown", ErrorCode.UNEXPECTED)
    try:
        value = msgpack.unpackb(
            meta,
            raw=False,
            use_list=False,
            strict_map_key=True,
            object_pairs_hook=_unique_keys,
            ext_hook=_reject_extension,
            max_array_len=4096,
            max_map_len=64,
        )
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the message"
        raise RemoteProtocolError(f"message {model.TYPE.name}: {place}: {first['msg']}") from error
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise RemoteProtocolError(f"message {model.TYPE.name} is not valid msgpack: {error!s:.200}") from error


def _unique_keys(pairs: list[tuple[Hashable, Any]]) -> dict[Hashable, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a map has the same key twice")
    return value


def _reject_extension(code: int, _data: bytes) -> NoReturn:
    raise ValueError(f"extension type {code} is not part of the protocol")
