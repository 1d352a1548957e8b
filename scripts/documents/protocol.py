"""The parts of docs/protocol.md that follow from the code: the table of messages, and the worked example in hex.

python -m scripts.documents.protocol            print the document as it should be
python -m scripts.documents.protocol --write    bring docs/protocol.md up to date
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal, get_args, get_origin

import numpy as np
import xxhash
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo

from protocol.digest import MemoryDigest
from protocol.errors import ErrorCode
from protocol.frames import HEADER_BYTES
from protocol.guest import DeviceDescription, GuestDescription, MemoryRegion, WireModel
from protocol.guest_time import VmTimeData
from protocol.messages import (
    MESSAGES,
    Barrier,
    Commit,
    DeviceCost,
    Hello,
    Join,
    Joined,
    Limits,
    Message,
    Pages,
    RoundDone,
    RoundEnd,
    TimeRules,
    Welcome,
    ZeroPages,
    frame_head,
)
from protocol.pages import pack_runs
from protocol.versions import MAJOR, pack_preface
from scripts.basics import ROOT
from scripts.documents.blocks import Blocks, main

DOCUMENT: Final = ROOT / "docs" / "protocol.md"

MEANINGS: Final = {
    "Hello.migration_id": "names the attempt on both hosts: never used twice",
    "Hello.epoch": "number of this hand-over of this guest, above every earlier one",
    "Hello.guest": "what the destination must build an empty equal of",
    "Hello.guest_paused": "the guest was paused when the migration began, and arrives paused",
    "Hello.capabilities": "what the source can do",
    "Hello.required": "what must be in force, or the destination refuses",
    "Hello.limits": "the downtime budget, as it is now; DOWNTIME says what counts",
    "Hello.time_rules": "how guest time is carried over",
    "Hello.channels": "number of data channels that will join, numbered from 0",
    "Hello.host": "name of the source host, for people",
    "Welcome.token": "secret that every data channel must show",
    "Welcome.capabilities": "what is in force: offered and supported",
    "Welcome.load_costs": "what loading each device cost in a dry run, or is expected to cost",
    "Welcome.resume_ns": "what resuming the guest is expected to cost",
    "Welcome.ready_timeout_ns": "how long a READY waits for a decision",
    "Welcome.host": "name of the destination host, for people",
    "Refuse.code": "see Errors",
    "Refuse.reason": "a whole sentence for the user of the source",
    "ClockAsk.nonce": "repeated in the reply",
    "ClockReply.nonce": "of the ask",
    "ClockReply.t2_ns": "raw clock of the replying host after it read the ask",
    "ClockReply.t3_ns": "its raw clock before it wrote this",
    "RoundEnd.round": "counts from 1; rounds of the blackout count on",
    "RoundEnd.pages": "pages with payload in this round, over all channels",
    "RoundEnd.zero_pages": "zero pages in this round, over all channels",
    "RoundDone.round": "of the ROUND_END",
    "RoundDone.bytes": "payload bytes of page frames received in the round",
    "RoundDone.digest": "the destination's running digest after the round, 0 without digest",
    "Downtime.epoch": "of HELLO",
    "Downtime.limits": "the downtime budget of this switchover; the same in all its DOWNTIME messages",
    "Downtime.resume_reserve_ns": "upper bound of what the source's own resume takes",
    "Downtime.source_downtime_ns": "since just before the stop was asked for, without what an operator held",
    "Downtime.sent_at_ns": "raw clock of the source right before the write",
    "Hold.epoch": "of HELLO",
    "TimeAsk.nonce": "repeated in the answer",
    "TimeData.nonce": "of the ask",
    "TimeData.time": "the guest's clocks at the export; `hrtime` is the instant of the export",
    "TimeData.t2_ns": "raw clock of the source after it read TIME_ASK",
    "TimeData.t3_ns": "its raw clock before it wrote this",
    "StateEnd.epoch": "of HELLO",
    "StateEnd.last_round": "the round whose acknowledgement completes memory",
    "StateEnd.devices": "how many device states were sent in all, those of rounds included",
    "StateEnd.digest": "the source's running digest, 0 without digest",
    "StateEnd.source_downtime_ns": "as in DOWNTIME",
    "StateEnd.sent_at_ns": "as in DOWNTIME",
    "Ready.epoch": "of HELLO",
    "Ready.digest": "the destination's running digest, 0 without digest",
    "Ready.elapsed_ns": "the downtime so far as the destination counts it",
    "Ready.completing_ns": "from reading STATE_END to writing this",
    "No.epoch": "of HELLO",
    "No.cause": "for programs",
    "No.reason": "for people",
    "Owned.epoch": "of HELLO",
    "Owned.token": "revision of the store at which the destination became the owner",
    "Commit.epoch": "of HELLO",
    "Abort.epoch": "of HELLO",
    "Abort.reason": "for people",
    "Running.epoch": "of HELLO",
    "Running.resumed_after_ns": "from reading COMMIT to running vCPUs; 0 when a restarted daemon does not know",
    "Running.sent_after_ns": "from reading COMMIT to writing this; 0 when a restarted daemon does not know",
    "Discarded.epoch": "of HELLO",
    "Discarded.reason": "for people",
    "OutcomeAsk.migration_id": "of HELLO",
    "OutcomeAsk.epoch": "of HELLO",
    "OutcomeAsk.decision": "what the source decided",
    "OutcomeOpen.epoch": "of the ask",
    "OutcomeOpen.reason": "for people",
    "Error.code": "see Errors",
    "Error.text": "a whole sentence",
    "Join.migration_id": "of HELLO",
    "Join.token": "of WELCOME",
    "Join.channel": "which of HELLO's `channels` this is",
    "Joined.channel": "of JOIN",
    "Pages.encoding": "see Encodings",
    "Pages.runs": "run table of the pages in the payload",
    "Pages.digest": "XXH3-64 of the decoded pages in the order of the table; not checked without digest",
    "ZeroPages.runs": "run table of pages that are zero now",
    "Extents.runs": "run table of pages that hold data",
    "Barrier.round": "the round that ends here",
    "DeviceState.order": "counts the device states of the migration from 0, in the order in which they are loaded",
    "DeviceState.name": "as in HELLO's guest",
    "DeviceState.kind": "as in HELLO's guest",
    "DeviceState.final": "false for what an iterable device sends during rounds",
    "DeviceState.offset": "place of the payload in the whole state (bytes)",
    "DeviceState.total_bytes": "size of the whole state",
    "DeviceState.digest": "XXH3-64 of the whole state",
    "DeviceState.save_ns": "what saving it cost",
    "Limits.downtime_limit_ns": "the whole budget from stop to run",
    "Limits.switchover_limit_ns": "tolerance on top before the destination aborts",
    "Limits.switchover_abort": "false: a violation is only flagged",
    "TimeRules.policy": "which end of the elapsed-time interval guest time advances by",
    "TimeRules.max_time_jump_ns": "largest elapsed time, 0 for no limit",
    "TimeRules.max_time_error_ns": "widest interval, 0 for no limit",
    "DeviceCost.name": "as in HELLO's guest",
    "DeviceCost.kind": "as in HELLO's guest",
    "DeviceCost.ns": "the cost",
    "DeviceCost.spread_ns": "how far single tries usually lay from it; 0 where it was not tried",
    "GuestDescription.name": "name of the guest",
    "GuestDescription.uuid": "its identity",
    "GuestDescription.vmm": "the driver that the guest needs; must be equal",
    "GuestDescription.machine": "kind of machine; must be equal",
    "GuestDescription.page_size": "4096",
    "GuestDescription.memory": "the memory map, in the order of page numbers",
    "GuestDescription.devices": "devices whose state travels",
    "GuestDescription.vcpus": "number of vCPUs",
    "GuestDescription.guest_freq": "TSC frequency (Hz), 0 if not known; must be equal",
    "GuestDescription.guest_time": "whether guest time travels apart from devices; if not, no TIME_ASK is sent",
    "GuestDescription.expected_stop_ns": "what stopping is expected to cost, 0 if not known",
    "GuestDescription.expected_resume_ns": "what resuming is expected to cost, 0 if not known",
    "GuestDescription.vmm_config": "for the VMM; daemons pass it on unread",
    "MemoryRegion.name": "name of the region",
    "MemoryRegion.guest_address": "where the guest sees it (bytes)",
    "MemoryRegion.size_bytes": "a multiple of the page size",
    "MemoryRegion.offset_pages": "number of its first page: the pages of the regions before it",
    "DeviceDescription.name": "name of the device",
    "DeviceDescription.kind": "a device with both kinds of state is listed once for each",
    "DeviceDescription.state_bytes": "usual size of its state",
    "DeviceDescription.expected_save_ns": "what saving is expected to cost on the host that says so, 0 if not known",
    "DeviceDescription.expected_load_ns": "what loading is expected to cost on the host that says so, 0 if not known",
    "VmTimeData.guest_freq": "guest TSC frequency (Hz)",
    "VmTimeData.guest_tsc": "guest TSC (ticks)",
    "VmTimeData.hrtime": "host's monotonic clock (ns)",
    "VmTimeData.hres_sec": "host's wall clock, seconds",
    "VmTimeData.hres_ns": "host's wall clock, nanosecond part",
    "VmTimeData.boot_hrtime": "`hrtime` at which the guest booted (ns), negative if it is older than its host",
}
"""The meaning of each field."""

DIRECTIONS: Final = {
    "HELLO": "S → D", "WELCOME": "D → S", "REFUSE": "D → S", "CLOCK_ASK": "both", "CLOCK_REPLY": "both",
    "ROUND_END": "S → D", "ROUND_DONE": "D → S", "DOWNTIME": "S → D", "HOLD": "S → D", "TIME_ASK": "D → S",
    "TIME_DATA": "S → D", "STATE_END": "S → D", "READY": "D → S", "NO": "D → S", "OWNED": "S → D", "COMMIT": "S → D",
    "ABORT": "S → D", "RUNNING": "D → S", "DISCARDED": "D → S", "OUTCOME_ASK": "S → D, fresh connection",
    "OUTCOME_OPEN": "D → S", "REPORT": "D → S", "RECORD": "S → D", "ERROR": "both", "JOIN": "S → D, data",
    "JOINED": "D → S, data", "PAGES": "S → D, data", "ZERO_PAGES": "S → D, data", "EXTENTS": "S → D, data",
    "BARRIER": "S → D, data", "DEVICE_STATE": "S → D, data",
}  # fmt: skip
PARTS: Final[tuple[type[WireModel], ...]] = (
    GuestDescription, MemoryRegion, DeviceDescription, Limits, TimeRules, DeviceCost, VmTimeData,
)  # fmt: skip
"""Maps inside messages."""

_FORMS: Final = {
    r"^[^\x00-\x1f\x7f]+$": "text without control characters",
    r"^[0-9a-f]{32}$": "text, 32 hex digits in lower case",
}
_WIDTHS: Final = {
    (0, (1 << 32) - 1): "u32",
    (0, (1 << 64) - 1): "u64",
    (-(1 << 63), (1 << 63) - 1): "i64",
    (0, (1 << 63) - 1): "0 … 2⁶³-1",
    (1, (1 << 63) - 1): "1 … 2⁶³-1",
}


def _type_of(annotation: Any, metadata: list[Any]) -> str:
    """The wire type of a field in words."""
    if get_origin(annotation) is Annotated:
        annotation, *inner = get_args(annotation)
        expanded = [item for extra in inner for item in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return _type_of(annotation, [*expanded, *metadata])
    low: int | None = None
    high: int | None = None
    pattern = ""
    for item in metadata:
        match item:
            case Ge(int(value)):
                low = value
            case Gt(int(value)):
                low = value + 1
            case Le(int(value)):
                high = value
            case Lt(int(value)):
                high = value - 1
            case MinLen(length):
                low = length
            case MaxLen(length):
                high = length
            case _:
                pattern = getattr(item, "pattern", "") or pattern
    size = f"{high}" if low == high else f"{low or 0} … {high}"
    if get_origin(annotation) is Literal:
        return " \\| ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"array of {_type_of(get_args(annotation)[0], [])}, {size}"
    if annotation is bool:
        return "boolean"
    if annotation is int:
        return f"integer, {_WIDTHS.get((low or 0, high or 0), f'{low} … {high}')}"
    if annotation is bytes:
        return f"binary, {size} bytes"
    if annotation is str:
        form = _FORMS.get(pattern, f"text `{pattern}`") if pattern else "text"
        return form + (f", {size} characters" if high is not None else "")
    name: str = annotation.__name__
    return f"map {name}"


def _fields_of(model: type[WireModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        optional = "" if field.is_required() else " (may be left out)"
        kind = _type_of(field.annotation, field.metadata)
        yield f"| `{name}` | {kind}{optional} | {MEANINGS[f'{model.__name__}.{name}']} |"


def messages_block() -> str:
    """The reference of all messages and of the maps in them."""
    lines: list[str] = []
    for model in (*MESSAGES, *PARTS):
        if issubclass(model, Message):
            lines.append(f"### {model.TYPE.name} ({int(model.TYPE)}), {DIRECTIONS[model.TYPE.name]}\n")
        else:
            lines.append(f"### Map {model.__name__}\n")
        summary = " ".join((model.__doc__ or "").split()).replace("``", "`")
        lines += [textwrap.fill(summary, 118, break_on_hyphens=False), ""]
        if model.model_fields:
            lines += ["| key | type | meaning |", "|---|---|---|", *_fields_of(model), ""]
    return "\n".join(lines)


def errors_block() -> str:
    """The table of error codes."""
    rows = [f"| {int(code)} | `{code.name}` |" for code in ErrorCode]
    return "\n".join(["| code | name |", "|---|---|", *rows, ""])


def _hex(data: bytes, cuts: list[tuple[int, str]]) -> list[str]:
    """Hex lines of at most 16 bytes, a new one for each named piece."""
    lines, begin = [], 0
    for length, name in cuts:
        piece = data[begin : begin + length]
        for at in range(0, max(1, length), 16):
            note = f"  {name}" if at == 0 else ""
            lines.append(f"{begin + at:5}  {piece[at : at + 16].hex(' '):47}{note}".rstrip())
        begin += length
    return lines


def _frame(message: Message, sequence: int, round_number: int = 0, payload: str = "", payload_bytes: int = 0) -> str:
    head = frame_head(MAJOR, message, sequence, payload_bytes=payload_bytes, round_number=round_number)
    meta_bytes = len(head) - HEADER_BYTES
    cuts = [
        (4, "magic"), (1, "version"), (1, f"type {message.TYPE.name}"), (2, "flags"), (4, f"{meta_bytes} meta bytes"),
        (4, f"{payload_bytes} payload bytes"), (8, f"sequence {sequence}"), (4, f"round {round_number}"),
        (4, "CRC-32 of the meta"), (4, "CRC-32 of the header"), (meta_bytes, "meta"),
    ]  # fmt: skip
    lines = _hex(head, cuts)
    if payload:
        lines.append(f"{len(head):5}  … {payload}")
    return "\n".join(["```", *lines, "```", ""])


def example_block() -> str:
    """A migration of a guest with 8 pages, byte for byte where it is short."""
    token = bytes(range(16))
    migration_id = "000102030405060708090a0b0c0d0e0f"
    pages = b"".join(bytes([value]) * 4096 for value in (0x11, 0x22, 0x33))
    runs, zero_runs = np.array([[1, 2], [5, 1]], np.int64), np.array([[0, 1], [7, 1]], np.int64)
    batch_hash = xxhash.xxh3_64_intdigest(pages)
    digest = MemoryDigest(8)
    digest.add(digest.set_pages(np.array([1, 2, 5], np.int64), batch_hash))
    digest.add(digest.set_zero(np.array([0, 7], np.int64)))
    entries = "\n".join(f"    page {page}  {int(digest.entries[page]):016x}" for page in (1, 2, 5))
    hello = Hello(
        migration_id=migration_id,
        epoch=1,
        guest=GuestDescription(
            name="g1",
            uuid="00000000-0000-0000-0000-0000000000a1",
            vmm="sim",
            guest_time=True,
            machine="sim",
            page_size=4096,
            memory=(MemoryRegion(name="ram", guest_address=0, size_bytes=8 * 4096, offset_pages=0),),
            devices=(),
            vcpus=1,
            guest_freq=2_000_000_000,
        ),
        guest_paused=False,
        capabilities=("digest-xxh3-frames", "switchover-abort", "zero-runs"),
        required=("digest-xxh3-frames", "switchover-abort", "zero-runs"),
        limits=Limits(downtime_limit_ns=300_000_000, switchover_limit_ns=0, switchover_abort=True),
        time_rules=TimeRules(policy="midpoint", max_time_jump_ns=0, max_time_error_ns=0),
        channels=1,
        host="a",
    )
    welcome = Welcome(
        token=token,
        capabilities=hello.capabilities,
        load_costs=(),
        resume_ns=1_000_000,
        ready_timeout_ns=10_000_000_000,
        host="b",
    )
    preface = pack_preface(4 << 20)
    cuts = [(4, "magic"), (1, "major"), (1, "minor"), (2, "reserved"), (4, "largest payload"), (4, "reserved")]
    return "\n".join(
        [
            "The guest has 8 pages. Pages 1, 2 and 5 are filled with the bytes 0x11, 0x22 and 0x33; pages 0 and 7 were",
            "used and are zero again; the others were never touched and do not travel.",
            "",
            "Both sides open the control connection:",
            "",
            "```",
            *_hex(preface, cuts),
            "```",
            "",
            "The source proposes:",
            "",
            _frame(hello, 0),
            "The destination takes the guest:",
            "",
            _frame(welcome, 0),
            "A second connection, after its prefaces, joins as data channel 0, and is accepted:",
            "",
            _frame(Join(migration_id=migration_id, token=token, channel=0), 0),
            _frame(Joined(channel=0), 0),
            f"Round 1 on that channel. XXH3-64 of the 12288 bytes of payload is {batch_hash:016x}:",
            "",
            _frame(
                Pages(encoding="plain", runs=pack_runs(runs), digest=batch_hash),
                1,
                1,
                "4096 × 11, 4096 × 22, 4096 × 33",
                len(pages),
            ),
            _frame(ZeroPages(runs=pack_runs(zero_runs)), 2, 1),
            _frame(Barrier(round=1), 3, 1),
            "On the control channel the source announces the round. Both sides now hold the entries",
            "",
            entries,
            "",
            f"and 0 for every other page; the digest is {digest.value:016x}, which the destination acknowledges:",
            "",
            _frame(RoundEnd(round=1, pages=3, zero_pages=2), 1),
            _frame(RoundDone(round=1, bytes=len(pages), digest=digest.value), 1),
            "Much later, after READY (clock exchanges and the blackout's messages between them are left out here, so",
            "the sequence number is only an example), the permission to run:",
            "",
            _frame(Commit(epoch=1), 40),
        ]
    )


BLOCKS: Final[Blocks] = {
    "messages": messages_block,
    "errors": errors_block,
    "example": example_block,
}


if __name__ == "__main__":
    sys.exit(main(DOCUMENT, BLOCKS))
