"""A source that lies: hand-made frames against a real destination daemon. Whatever comes, the destination answers with
a reason or hangs up, keeps nothing, and takes the next honest guest.

    hostile:  HELLO  JOIN  (empty round)  DOWNTIME  <- TIME_ASK  TIME_DATA with nonsense  -> NO | ERROR
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import pytest

from protocol import messages
from protocol.messages import FrameType
from scripts.basics import MIB
from scripts.rig.hostile import LIMITS, Hostile, connect, describe, hello_of, open_session
from scripts.rig.pair import Pair
from scripts.rig.waiting import until

U64 = (1 << 64) - 1
I64 = (1 << 63) - 1
DOWNTIME = {"epoch": 1, "limits": LIMITS, "resume_reserve_ns": 0, "source_downtime_ns": 0, "sent_at_ns": 0}
GOOD = {"guest_freq": 2_100_000_000, "guest_tsc": 1, "hrtime": 10**12, "hres_sec": 1, "hres_ns": 0, "boot_hrtime": 0}

HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
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
"""What is changed in good time data, and what the destination must say of it. The guest of these tests has no device
states sent: what no check of the time data catches is refused for that, as the last row shows."""


async def answer_to(control: Hostile) -> messages.Message | None:
    """NO or ERROR, or None when the destination just hung up."""
    try:
        async with asyncio.timeout(20):
            while True:
                message = await control.receive()
                if isinstance(message, messages.No | messages.Error | messages.Refuse):
                    return message
    except (ConnectionError, OSError):
        return None
    except Exception as error:
        if "closed" in str(error):
            return None
        raise


async def honest_again(pair: Pair) -> None:
    """The destination kept nothing and takes the next guest."""
    await pair.a.create_guest("honest", 16, workload="idle")
    record = await pair.a.migrate("honest", pair.b, downtime_limit=20_000)
    assert record["outcome"] == "completed", record["reason"]
    assert (await pair.b.verify("honest"))["ok"]
    await pair.b.command("x-migrated-guest-destroy", {"guest": "honest"})


async def test_hostile_time_data_is_refused_by_name_and_never_crashes(pair: Pair) -> None:
    description = await describe(pair)
    for name, (changes, said) in HOSTILE.items():
        control, data, _ = await open_session(pair, description)
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        await control.send(FrameType.DOWNTIME, {**DOWNTIME, "sent_at_ns": now})
        ask = await control.receive()
        assert isinstance(ask, messages.TimeAsk), name
        stamp = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        lie = {**GOOD, "guest_freq": description["guest_freq"], "hrtime": stamp, **changes}
        lie = {key: value for key, value in lie.items() if value is not ...}
        await control.send(FrameType.TIME_DATA, {"nonce": ask.nonce, "time": lie, "t2_ns": stamp, "t3_ns": stamp})
        await control.send(
            FrameType.STATE_END,
            {"epoch": 1, "last_round": 1, "devices": 0, "digest": 0, "source_downtime_ns": 0, "sent_at_ns": stamp},
        )
        answer = await answer_to(control)
        assert isinstance(answer, messages.No | messages.Error), name
        assert re.search(said, answer.reason if isinstance(answer, messages.No) else answer.text), (name, answer)
        control.wire.close()
        data.wire.close()
    await honest_again(pair)


@pytest.mark.parametrize(
    ("kind", "meta"),
    [
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
        (FrameType.TIME_DATA, {"nonce": 7, "time": GOOD, "t2_ns": 0, "t3_ns": 0}),
    ],
)
async def test_messages_out_of_turn_never_start_the_guest(pair: Pair, kind: FrameType, meta: dict[str, Any]) -> None:
    description = await describe(pair)
    control, data, _ = await open_session(pair, description)
    await control.send(kind, meta)
    answer = await answer_to(control)
    assert answer is None or isinstance(answer, messages.No | messages.Error)
    control.wire.close()
    data.wire.close()
    await honest_again(pair)  # which gives a guest that was wrongly committed the time to run
    assert not [entry for entry in pair.b.run_log("victim") if entry["event"] == "run"]


@pytest.mark.parametrize("largest", [False, True])
async def test_the_destination_counts_by_the_limits_of_the_last_downtime_message(pair: Pair, largest: bool) -> None:
    """HELLO offered 10 s; a source that never decides cannot hold the destination beyond what DOWNTIME said last."""
    description = await describe(pair)
    control, data, _ = await open_session(pair, description)
    if largest:  # as large as the protocol lets it be, and not enforced: it must not confuse the deadline that follows
        limits = {"downtime_limit_ns": I64, "switchover_limit_ns": I64, "switchover_abort": False}
        await control.send(FrameType.DOWNTIME, {**DOWNTIME, "limits": limits})
    began = time.monotonic()
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    limits = {"downtime_limit_ns": 40 * 10**6, "switchover_limit_ns": 10 * 10**6, "switchover_abort": True}
    await control.send(FrameType.DOWNTIME, {**DOWNTIME, "limits": limits, "sent_at_ns": now})
    answer = await answer_to(control)
    assert isinstance(answer, messages.No), answer
    assert answer.cause == "limit"
    assert "downtime limit of 50 ms" in answer.reason
    assert time.monotonic() - began < 5, "HELLO's limit would have taken twice as long"
    control.wire.close()
    data.wire.close()
    await honest_again(pair)


async def flood(control: Hostile, kind: FrameType, meta: dict[str, Any]) -> None:
    """Send a message until the destination has hung up."""
    while True:
        await control.send(kind, meta)


@pytest.mark.parametrize(
    ("kind", "meta"),
    [(FrameType.CLOCK_ASK, {"nonce": 1}), (FrameType.ROUND_END, {"round": 2, "pages": 0, "zero_pages": 0})],
    ids=["CLOCK_ASK without reading", "ROUND_END"],
)
async def test_a_flood_on_the_control_channel_ends_it_and_keeps_nothing(
    pair: Pair, kind: FrameType, meta: dict[str, Any]
) -> None:
    """More messages than any migration needs, and none of the answers is read."""
    description = await describe(pair)
    before = pair.b.anonymous_bytes()
    control, data, _ = await open_session(pair, description)
    async with asyncio.timeout(60):
        with pytest.raises(ConnectionError):
            await flood(control, kind, meta)
    control.wire.close()
    data.wire.close()

    async def said() -> bool:
        return any("more was sent on the control channel" in str(entry) for entry in pair.b.log())

    await until("host b says why it hung up", said)
    await honest_again(pair)
    assert pair.b.anonymous_bytes() - before < 48 * MIB


async def test_a_message_that_has_no_payload_may_not_bring_one(pair: Pair) -> None:
    description = await describe(pair)
    control, data, _ = await open_session(pair, description)
    await control.send(FrameType.ROUND_END, {"round": 2, "pages": 0, "zero_pages": 0}, payload=bytes(4 * MIB))
    answer = await answer_to(control)
    assert answer is None or isinstance(answer, messages.Error | messages.No)
    control.wire.close()
    data.wire.close()
    await honest_again(pair)


async def test_a_plain_session_that_is_sent_again_is_refused(pair: Pair) -> None:
    """The same migration id, epoch and token as in a session that has ended."""
    description = await describe(pair)
    control, data, welcome = await open_session(pair, description)
    control.wire.close()
    data.wire.close()
    await honest_again(pair)
    again = await connect(pair)
    await again.send(FrameType.HELLO, hello_of(description, control.migration_id))
    refused = await again.receive()
    assert isinstance(refused, messages.Refuse)
    assert refused.reason == "this migration id was used before"
    again.wire.close()
    late = await connect(pair)
    await late.send(FrameType.JOIN, {"migration_id": control.migration_id, "token": welcome.token, "channel": 0})
    answer = await late.receive()
    assert isinstance(answer, messages.Error)
    assert "not under way" in answer.text
    late.wire.close()


async def test_a_record_of_nothing_but_nesting_costs_nothing(pair: Pair) -> None:
    """Four megabytes of nesting, in the middle of the rounds: decoding them would stop the daemon for seconds."""
    control, data, _ = await open_session(pair, await describe(pair))
    before = pair.b.anonymous_bytes()
    await control.send(FrameType.RECORD, {}, payload=b"[" * (4 * MIB))
    await control.send(FrameType.CLOCK_ASK, {"nonce": 7})
    while not isinstance(await control.receive(), messages.ClockReply):
        pass
    assert pair.b.anonymous_bytes() - before < 48 * MIB
    control.wire.close()
    data.wire.close()
    await honest_again(pair)
