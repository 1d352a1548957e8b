"""Attacks of a certified host that sends a guest: it lies about sizes, numbers, names and times, floods, and dawdles.

    HELLO  JOIN  (empty round)  the attack  ->  NO | ERROR | REFUSE | hang-up, and nothing of the guest is left

The module is longer than others because every attack is here, each in a few lines.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from migrated.base.errors import LinkLostError
from protocol import messages
from protocol.guest import PAGE_SIZE
from protocol.messages import FrameType
from protocol.pages import RUN_BYTES
from scripts.basics import MIB
from scripts.hostile.ground import (
    HANDSHAKE_S,
    INCOMING_S,
    STALL_S,
    VICTIM,
    Case,
    Ground,
    NotHeldError,
    connections_gone,
    end_of,
    must_end,
    never_ran,
)
from scripts.rig.hostile import LIMITS, Hostile, hello_of

U64: Final = (1 << 64) - 1
I64: Final = (1 << 63) - 1
DOWNTIME: Final = {
    "epoch": 1, "limits": LIMITS, "resume_reserve_ns": 0, "source_downtime_ns": 0, "sent_at_ns": 0,
}  # fmt: skip
GOOD_TIME: Final = {
    "guest_freq": 2_100_000_000, "guest_tsc": 1, "hrtime": 10**12, "hres_sec": 1, "hres_ns": 0, "boot_hrtime": 0,
}  # fmt: skip
STATE: Final = {"name": "disk0", "kind": "non-iterable", "final": True, "offset": 0, "digest": 0, "save_ns": 0}
ROUND_2: Final = {"round": 2, "pages": 0, "zero_pages": 0}

BAD_TIMES: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "frequency 0": ({"guest_freq": 0}, "TSC frequency is 0 Hz"),
    "the largest frequency": ({"guest_freq": U64}, f"FrequencyMismatch: .* a guest TSC of {U64} Hz"),
    "a negative frequency": ({"guest_freq": -1}, "time.guest_freq: Input should be greater than or equal to 0"),
    "a frequency beyond u64": ({"guest_freq": float(U64 + 1)}, "time.guest_freq: Input should be a valid integer"),
    "another frequency": ({"guest_freq": 3_000_000_000}, "FrequencyMismatch: .* a guest TSC of 3000000000 Hz"),
    "nanoseconds out of range": ({"hres_ns": 10**9}, "wall clock is out of range"),
    "boot in the future": ({"boot_hrtime": I64}, "boot time lies in the source's future"),
    "an export long after the answer": ({"hrtime": I64, "boot_hrtime": -(1 << 63)}, "do not use its time data"),
    "an export long before the ask": ({"hrtime": -1}, "do not use its time data"),
    "a float": ({"guest_tsc": 1.5}, "time.guest_tsc: Input should be a valid integer"),
    "NaN": ({"hrtime": float("nan")}, "time.hrtime: Input should be a valid integer"),
    "infinity": ({"hres_sec": float("inf")}, "time.hres_sec: Input should be a valid integer"),
    "a text": ({"boot_hrtime": "0"}, "time.boot_hrtime: Input should be a valid integer"),
    "a truth value": ({"guest_freq": True}, "time.guest_freq: Input should be a valid integer"),
    "nothing": ({"guest_tsc": None}, "time.guest_tsc: Input should be a valid integer"),
    "an extra field": ({"extra": 1}, "time.extra: Extra inputs are not permitted"),
    "a missing field": ({"guest_tsc": ...}, "time.guest_tsc: Field required"),
    "no lie at all": ({}, "the final state of .* never arrived"),
}
"""What is changed in good time data, and what the destination must say of it. No device state is sent: what no check of
the time data catches is refused for that, as the last row shows."""

OUT_OF_TURN: Final[tuple[tuple[FrameType, dict[str, Any]], ...]] = (
    (FrameType.COMMIT, {"epoch": 1}),
    (FrameType.COMMIT, {"epoch": 2}),
    (FrameType.READY, {"epoch": 1, "digest": 0, "elapsed_ns": 0, "completing_ns": 0}),
    (FrameType.RUNNING, {"epoch": 1, "resumed_after_ns": 0, "sent_after_ns": 0}),
    (FrameType.DOWNTIME, {**DOWNTIME, "source_downtime_ns": -1}),
    (FrameType.DOWNTIME, {**DOWNTIME, "limits": {**LIMITS, "downtime_limit_ns": -1}}),
    (FrameType.DOWNTIME, {**DOWNTIME, "limits": {**LIMITS, "switchover_limit_ns": I64 + 1}}),
    (FrameType.DOWNTIME, {**DOWNTIME, "limits": {**LIMITS, "downtime_limit_ns": 1e9}}),
    (FrameType.DOWNTIME, {**DOWNTIME, "limits": {**LIMITS, "switchover_abort": 0}}),
    (FrameType.DOWNTIME, {**DOWNTIME, "limits": None}),
    (FrameType.DOWNTIME, {key: value for key, value in DOWNTIME.items() if key != "limits"}),
    (FrameType.TIME_DATA, {"nonce": 7, "time": GOOD_TIME, "t2_ns": 0, "t3_ns": 0}),
)


def _now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)


def _pages(ground: Ground) -> int:
    """Pages of the guest's first region."""
    return int(ground.description["memory"][0]["size_bytes"]) // PAGE_SIZE


def _runs(first: int, count: int) -> bytes:
    """A run table of one run."""
    return first.to_bytes(RUN_BYTES // 2, "big") + count.to_bytes(RUN_BYTES // 2, "big")


# Section: figures of the peer


def _on_data(lie: Callable[[Ground, Hostile], Awaitable[None]], words: str) -> Callable[[Ground], Awaitable[None]]:
    """An attack over the data channel of a session, which the destination ends with these words."""

    async def attack(ground: Ground) -> None:
        async with ground.session() as (control, data):
            with contextlib.suppress(OSError):  # hung up in the middle of it
                await lie(ground, data)
            await must_end(control, words)

    return attack


def _state_of(ground: Ground) -> dict[str, Any]:
    device = ground.description["devices"][0]
    return {**STATE, "name": device["name"], "kind": device["kind"]}


async def _huge_states(ground: Ground, data: Hostile) -> None:
    """Promises of 2 GiB, as many as get through."""
    for order in range(100):
        state = {**_state_of(ground), "order": order, "total_bytes": (1 << 31) - 1}
        await data.send(FrameType.DEVICE_STATE, state, payload=b"x")


async def _states_of_rounds(ground: Ground, data: Hostile) -> None:
    """States in rounds of a device that has none."""
    state = {**_state_of(ground), "final": False, "total_bytes": 512}
    for order in range(1024):
        await data.send(FrameType.DEVICE_STATE, {**state, "order": order}, payload=b"x")


async def _whole_states(ground: Ground, data: Hostile) -> None:
    """Final states of all devices, larger than they are, with all their content but the last byte; then once more."""
    devices = ground.description["devices"]
    for order in range(2 * len(devices)):
        device = devices[order % len(devices)]
        content = bytes(2 * device["state_bytes"] - 1)
        meta = {**STATE, "name": device["name"], "kind": device["kind"], "total_bytes": len(content) + 1}
        await data.send(FrameType.DEVICE_STATE, {**meta, "order": order}, payload=content)


async def _announcements(ground: Ground, data: Hostile) -> None:
    """Announced memory that was not agreed on."""
    await data.send(FrameType.EXTENTS, {"runs": _runs(0, _pages(ground))}, round_number=2)


async def _zeros(ground: Ground, data: Hostile) -> None:
    """All pages of the guest as zero, again and again in one round."""
    pages = _pages(ground)
    for _ in range(100_000 // pages * 4):
        await data.send(FrameType.ZERO_PAGES, {"runs": _runs(0, pages)}, round_number=2)


async def _pages_outside(ground: Ground, data: Hostile) -> None:
    """A page behind the last one."""
    meta = {"encoding": "plain", "runs": _runs(_pages(ground), 1 << 31), "digest": 0}
    await data.send(FrameType.PAGES, meta, 2, bytes(PAGE_SIZE))


async def _compression_bomb(ground: Ground, data: Hostile) -> None:
    """A batch that was not agreed on, and would be 1 GiB."""
    meta = {"encoding": "zstd", "runs": _runs(0, 1), "digest": 0}
    await data.send(FrameType.PAGES, meta, 2, bytes.fromhex("28b52ffd80580000004054000010000001000000"))


async def _rounds_ahead(ground: Ground, data: Hostile) -> None:
    """Ends of rounds that nobody has announced."""
    for number in range(2, 4000):
        await data.send(FrameType.BARRIER, {"round": number}, round_number=number)


async def forged_record(ground: Ground) -> None:
    """A bomb instead of a record, and a record of nothing: neither is kept, and nobody waits for it."""
    mark = ground.pair.b.log_path.stat().st_size
    async with ground.session() as (control, _):
        await control.send(FrameType.RECORD, {}, payload=b"[" * (2 * MIB))
        await control.send(FrameType.ABORT, {"epoch": 1, "reason": "enough"})
        await ground.gone()
    await ground.said("the source's record is not kept", mark)


async def nested_record(ground: Ground) -> None:
    """Four megabytes of nesting in the middle of the rounds: decoding them would stop the daemon for seconds."""
    async with ground.session() as (control, _):
        await control.send(FrameType.RECORD, {}, payload=b"[" * (4 * MIB))
        await control.send(FrameType.CLOCK_ASK, {"nonce": 7})
        while not isinstance(await control.receive(), messages.ClockReply):
            pass


async def epoch_at_the_end(ground: Ground) -> None:
    """An epoch with which the guest could never be migrated from there again."""
    control = await ground.connect()
    migration_id = secrets.token_hex(16)
    await control.send(FrameType.HELLO, {**hello_of(ground.description, migration_id), "epoch": I64})
    await must_end(control, "beyond what migrations can have come to")
    control.wire.close()
    if migration_id in (ground.pair.b.directory / "state" / "journal").read_text(encoding="utf-8"):
        raise NotHeldError("a refused offer left something in the journal")


async def more_memory_than_there_is(ground: Ground) -> None:
    """A guest of 512 GiB."""
    region = {**ground.description["memory"][0], "size_bytes": 1 << 39}
    control = await ground.connect()
    await control.send(FrameType.HELLO, hello_of({**ground.description, "memory": (region,)}, secrets.token_hex(16)))
    await must_end(control, r"the guest has 524288 MiB of memory; this host has \d+ MiB free")
    control.wire.close()


async def session_again(ground: Ground) -> None:
    """The same migration id, epoch and token as in a session that has ended."""
    async with ground.session() as (control, _):
        migration_id = control.migration_id
    again = await ground.connect()
    await again.send(FrameType.HELLO, hello_of(ground.description, migration_id))
    await must_end(again, "this migration id was used before")
    again.wire.close()


# Section: lies about time and downtime


async def bad_times(ground: Ground) -> None:
    """Time data with nonsense, kind by kind."""
    for name, (changes, words) in BAD_TIMES.items():
        async with ground.session() as (control, _):
            await control.send(FrameType.DOWNTIME, {**DOWNTIME, "sent_at_ns": _now_ns()})
            ask = await control.receive()
            if not isinstance(ask, messages.TimeAsk):
                raise NotHeldError(f"it does not ask for the time, but says {ask!r:.200}")
            stamp = _now_ns()
            lie = {**GOOD_TIME, "guest_freq": ground.description["guest_freq"], "hrtime": stamp, **changes}
            lie = {key: value for key, value in lie.items() if value is not ...}
            await control.send(FrameType.TIME_DATA, {"nonce": ask.nonce, "time": lie, "t2_ns": stamp, "t3_ns": stamp})
            await control.send(FrameType.STATE_END, _state_end(sent_at_ns=stamp))
            try:
                await must_end(control, words)
            except NotHeldError as error:
                raise NotHeldError(f"{name}: {error}") from error


def _state_end(**changes: Any) -> dict[str, Any]:
    return {
        "epoch": 1, "last_round": 1, "devices": 0, "digest": 0, "source_downtime_ns": 0, "sent_at_ns": 0, **changes,
    }  # fmt: skip


async def out_of_turn(ground: Ground) -> None:
    """Messages at the wrong time, or with the wrong values: none of them starts the guest."""
    for kind, meta in OUT_OF_TURN:
        async with ground.session() as (control, _):
            await control.send(kind, meta)
            await end_of(control)
    await never_ran(ground)


_SHORT: Final = {"downtime_limit_ns": 300 * 10**6, "switchover_limit_ns": 0, "switchover_abort": True}
_AT_MOST_S: Final = 6.0
DOWNTIME_LIES: Final[dict[str, list[tuple[FrameType, dict[str, Any]]]]] = {
    "it took nothing, and never ends": [(FrameType.DOWNTIME, {})],
    "it will only be sent tomorrow": [(FrameType.DOWNTIME, {"sent_at_ns": I64})],
    "it was sent before the host was built": [(FrameType.DOWNTIME, {"sent_at_ns": -I64})],
    "it took 292 years": [(FrameType.DOWNTIME, {"source_downtime_ns": I64})],
    "giving back takes 292 years": [(FrameType.DOWNTIME, {"resume_reserve_ns": I64})],
    "it took a second, and then less": [
        (FrameType.DOWNTIME, {"source_downtime_ns": 10**9}),
        (FrameType.DOWNTIME, {"source_downtime_ns": 0}),
    ],
    "the limit was 292 years, and is short": [
        (FrameType.DOWNTIME, {"limits": {**_SHORT, "downtime_limit_ns": I64, "switchover_limit_ns": I64}}),
        (FrameType.DOWNTIME, {}),
    ],
    "the limit does not hold, and then does": [
        (FrameType.DOWNTIME, {"limits": {**_SHORT, "switchover_abort": False}}),
        (FrameType.DOWNTIME, {}),
    ],
    "all is sent, in no time": [(FrameType.DOWNTIME, {}), (FrameType.STATE_END, {"last_round": 9})],
}
"""What a source says of a downtime under a limit of 300 ms, in which it never ends the state. Whatever it says, the
destination votes NO for the limit, by its own clock."""


async def downtime_lies(ground: Ground) -> None:
    """A source that says what it likes of how long its guest stands still."""
    for name, told in DOWNTIME_LIES.items():
        async with ground.session() as (control, _):
            began_s = time.monotonic()
            for kind, changes in told:
                meta = {**DOWNTIME, "limits": _SHORT} if kind is FrameType.DOWNTIME else _state_end()
                await control.send(kind, {**meta, "sent_at_ns": _now_ns(), **changes})
            try:
                await must_end(control, "downtime limit of 300 ms")
            except NotHeldError as error:
                raise NotHeldError(f"{name}: {error}") from error
            if (took_s := time.monotonic() - began_s) > _AT_MOST_S:
                raise NotHeldError(f"{name}: the destination waited {took_s:.1f} s under a limit of 0.3 s")
    await never_ran(ground)


# Section: floods and patience


def _flood(kind: FrameType, meta: dict[str, Any], words: str) -> Callable[[Ground], Awaitable[None]]:
    """One message without end on the control channel; none of the answers is read, and these words are in the log."""

    async def attack(ground: Ground) -> None:
        mark = ground.pair.b.log_path.stat().st_size
        async with ground.session() as (control, _):
            with contextlib.suppress(OSError):
                while True:
                    await control.send(kind, meta)
        await ground.said(words, mark)

    return attack


async def payload_where_none_belongs(ground: Ground) -> None:
    """Four megabytes behind a message that has none."""
    async with ground.session() as (control, _):
        await control.send(FrameType.ROUND_END, ROUND_2, payload=bytes(4 * MIB))
        await end_of(control)


async def clocks_only(ground: Ground) -> None:
    """Who only answers clocks loses its place: with data channels and without."""
    control = await ground.connect()
    await control.send(FrameType.HELLO, hello_of(ground.description, secrets.token_hex(16)))
    await must_end(control, f"not all data channels joined within {HANDSHAKE_S:g} s")
    control.wire.close()
    await ground.gone()
    async with ground.session() as (control, _):
        await must_end(control, rf"the source sent \d+ bytes in {STALL_S:g} s")


async def _rounds_without_end(ground: Ground, page_bytes: int, words: str) -> None:
    """Rounds for as long as they are taken, each with so much of memory."""
    pages = page_bytes // PAGE_SIZE
    async with ground.session() as (control, data):
        ended = asyncio.create_task(must_end(control, words))
        number = 2
        with contextlib.suppress(OSError, LinkLostError):
            while not ended.done():
                if pages:
                    meta = {"encoding": "plain", "runs": _runs(0, pages), "digest": 0}
                    await data.send(FrameType.PAGES, meta, number, bytes(page_bytes))
                await data.send(FrameType.BARRIER, {"round": number}, round_number=number)
                await control.send(FrameType.ROUND_END, {"round": number, "pages": pages, "zero_pages": 0})
                number += 1
                await asyncio.sleep(0.003)  # slower than what a flood is hung up on for
        await ended


async def empty_rounds(ground: Ground) -> None:
    """Rounds that bring nothing."""
    await _rounds_without_end(ground, 0, rf"the source sent \d+ bytes in {STALL_S:g} s")


async def endless_rounds(ground: Ground) -> None:
    """Rounds that bring a megabyte each, so that it never seems to stall."""
    await _rounds_without_end(ground, MIB, rf"has not handed its guest over within {INCOMING_S:g} s")


async def _drip(connection: Hostile, data: bytes) -> None:
    """Send bytes one by one for some time, or until the peer has hung up."""
    with contextlib.suppress(OSError):
        async with asyncio.timeout(2 * HANDSHAKE_S):
            for byte in data:
                await connection.wire.send(bytes([byte]))
                await asyncio.sleep(0.25)  # the slowness is the attack


async def slow_everywhere(ground: Ground) -> None:
    """Byte by byte in every phase: the first frame, a frame of the control channel, of a data channel, its payload."""
    first = await ground.connect()
    async with ground.session() as (control, data):
        control.answers_clocks = False
        page = {"encoding": "plain", "runs": _runs(0, 1), "digest": 0}
        await data.wire.send(data.frame(FrameType.PAGES, page, 2, missing_bytes=PAGE_SIZE))
        await asyncio.gather(
            _drip(first, first.frame(FrameType.HELLO, hello_of(ground.description, secrets.token_hex(16)))),
            _drip(control, control.frame(FrameType.ROUND_END, ROUND_2)),
            _drip(data, bytes(PAGE_SIZE)),
            must_end(control, rf"the source sent \d+ bytes in {STALL_S:g} s"),
        )
    first.wire.close()
    await connections_gone(ground, 15.0)


async def many_offers(ground: Ground) -> None:
    """More guests than the host takes at once, with names of their own."""
    taken: list[Hostile] = []
    refused = 0
    try:
        for number in range(16):
            control = await ground.connect()
            taken.append(control)
            guest = {**ground.description, "name": f"{VICTIM}{number}"}
            await control.send(FrameType.HELLO, hello_of(guest, secrets.token_hex(16)))
            refused += isinstance(await control.receive(), messages.Refuse)
        if refused < 8:
            raise NotHeldError(f"{16 - refused} guests were taken in at once")
    finally:
        for control in taken:
            control.wire.close()

    for number in range(16):
        await ground.gone(f"{VICTIM}{number}")


CASES: Final = (
    Case("device states of 2 GiB", _on_data(_huge_states, r"has 2147483647 bytes, our VMM takes at most \d+")),
    Case("device states in rounds", _on_data(_states_of_rounds, "which only iterable devices have")),
    Case("device states with all their content", _on_data(_whole_states, "the final state of .* comes twice")),
    Case("announcements without agreement", _on_data(_announcements, "which was not agreed on")),
    Case("zero pages without end", _on_data(_zeros, "zero pages on one channel")),
    Case("pages outside of the guest", _on_data(_pages_outside, "are outside the guest's memory")),
    Case("a batch that would be 1 GiB", _on_data(_compression_bomb, "which was not agreed on")),
    Case("rounds far ahead", _on_data(_rounds_ahead, r"round \d+ comes twice or out of turn")),
    Case("a bomb as a record", forged_record),
    Case("nesting as a record", nested_record),
    Case("an epoch at the end of numbers", epoch_at_the_end),
    Case("more memory than there is", more_memory_than_there_is),
    Case("a session sent again", session_again),
    Case("bad time data", bad_times),
    Case("messages out of turn", out_of_turn),
    Case("lies about downtime", downtime_lies),
    Case("CLOCK_ASK without end", _flood(FrameType.CLOCK_ASK, {"nonce": 1}, "more was sent on the control channel")),
    Case("ROUND_END without end", _flood(FrameType.ROUND_END, ROUND_2, "round 2 comes twice or out of turn")),
    Case("a payload where none belongs", payload_where_none_belongs),
    Case("clocks and nothing else", clocks_only, brief=False),
    Case("rounds with nothing in them", empty_rounds, brief=False),
    Case("rounds without end", endless_rounds, brief=False),
    Case("byte by byte in every phase", slow_everywhere, brief=False),
    Case("sixteen offers at once", many_offers, brief=False),
)
