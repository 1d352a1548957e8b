"""What a peer may cost, against real daemons: it lies about sizes, numbers, names and times. Whatever it does, the
destination refuses it by name, its memory stays small, and an honest guest gets through beside it.

    hostile:  HELLO  JOIN  (empty round)  lies    ->  NO | ERROR | REFUSE | hang-up
    honest:   ----------------- a whole migration ------------------>  completed
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from protocol import messages
from protocol.guest import PAGE_SIZE
from protocol.messages import FrameType
from protocol.pages import RUN_BYTES
from scripts.basics import MIB
from scripts.rig.hostile import Hostile, connect, describe, hello_of, open_session
from scripts.rig.pair import Pair
from scripts.rig.waiting import until

STALL_S = 4.0
HANDSHAKE_S = 10.0
MOST_BYTES = 96 * MIB
"""What a daemon may take more at the end of a test of this module than at its begin; one of these lies took 2.1 GiB."""
STATE = {"name": "disk0", "kind": "non-iterable", "final": True, "offset": 0, "digest": 0, "save_ns": 0}


@pytest.fixture(scope="module")
def hosts() -> Iterator[Pair]:
    """Two hosts that the tests of this module share; they lose patience soon."""
    with Pair(limits={"stall_timeout_s": STALL_S, "handshake_timeout_s": HANDSHAKE_S, "max_guests": 3}) as pair:
        yield pair


@pytest.fixture
async def pair(hosts: Pair) -> AsyncIterator[Pair]:
    before_bytes = hosts.b.anonymous_bytes()
    yield hosts
    print(hosts.log_tail())  # noqa: T201 - shown when the test failed
    await hosts.remove_guests()
    assert await hosts.leftovers() == []
    assert hosts.b.anonymous_bytes() - before_bytes < MOST_BYTES


async def beside(pair: Pair, lie: Callable[[], Awaitable[None]]) -> None:
    """An honest migration while a peer lies."""
    await pair.a.create_guest("honest", 16, workload="idle")
    record, _ = await asyncio.gather(pair.a.migrate("honest", pair.b, downtime_limit=20_000), lie())
    assert record["outcome"] == "completed", record["reason"]
    assert (await pair.b.verify("honest"))["ok"]
    await pair.b.command("x-migrated-guest-destroy", {"guest": "honest"})


async def end_of(control: Hostile) -> str:
    """What the destination says at last: a reason, or that it hung up."""
    try:
        async with asyncio.timeout(20):
            while True:
                match await control.receive():
                    case messages.No(reason=reason) | messages.Refuse(reason=reason) | messages.Error(text=reason):
                        return reason
    except TimeoutError:
        raise
    except Exception as error:  # the wire's own, by platform and by where it is cut
        return f"hung up: {error}"


async def until_gone(pair: Pair, guest: str) -> None:
    """Wait until nothing of an incoming guest is left on the destination."""

    async def gone() -> bool:
        return guest not in await pair.b.guests()

    await until(f"guest {guest} gone", gone)


def device_of(description: dict[str, Any]) -> dict[str, Any]:
    """A device state of the guest's first device."""
    device = description["devices"][0]
    return {**STATE, "name": device["name"], "kind": device["kind"]}


async def huge_states(data: Hostile, description: dict[str, Any]) -> None:
    """Promises of 2 GiB, as many as get through."""
    for order in range(100):
        state = {**device_of(description), "order": order, "total_bytes": (1 << 31) - 1}
        await data.send(FrameType.DEVICE_STATE, state, payload=b"x")


async def many_states(data: Hostile, description: dict[str, Any]) -> None:
    """Promises that are each allowed."""
    state = {**device_of(description), "final": False}
    for order in range(1024):
        await data.send(FrameType.DEVICE_STATE, {**state, "order": order, "total_bytes": 16 * MIB}, payload=b"x")


async def announcements(data: Hostile, description: dict[str, Any]) -> None:
    """Announced memory that was not agreed on."""
    pages = description["memory"][0]["size_bytes"] // PAGE_SIZE
    await data.send(FrameType.EXTENTS, {"runs": pages.to_bytes(RUN_BYTES, "big")}, round_number=2)


async def zeros(data: Hostile, description: dict[str, Any]) -> None:
    """All pages of the guest as zero, again and again in one round."""
    pages = description["memory"][0]["size_bytes"] // PAGE_SIZE
    for _ in range(100_000 // pages * 4):
        await data.send(FrameType.ZERO_PAGES, {"runs": pages.to_bytes(RUN_BYTES, "big")}, round_number=2)


LIES: dict[str, tuple[Callable[[Hostile, dict[str, Any]], Awaitable[None]], str]] = {
    "huge states": (huge_states, r"has 2147483647 bytes, at most \d+ were announced"),
    "many states": (many_states, r"wait to be loaded, at most \d+ may"),
    "announcements without agreement": (announcements, "which was not agreed on"),
    "a flood of zero pages": (zeros, "zero pages on one channel"),
}


@pytest.mark.parametrize("name", LIES)
async def test_figures_of_the_peer_allocate_nothing(pair: Pair, name: str) -> None:
    lie, words = LIES[name]
    description = await describe(pair)

    async def tell() -> None:
        control, data, _ = await open_session(pair, description)
        with contextlib.suppress(OSError):  # hung up in the middle of it
            await lie(data, description)
        assert re.search(words, await end_of(control))
        control.wire.close()
        data.wire.close()

    await beside(pair, tell)


async def test_a_bomb_instead_of_a_record_stops_nobody(pair: Pair) -> None:
    description = await describe(pair)

    async def bomb() -> None:
        control, data, _ = await open_session(pair, description)
        await control.send(FrameType.RECORD, {}, payload=b"[" * (2 * MIB))
        await control.send(FrameType.ABORT, {"epoch": 1, "reason": "enough"})
        await until_gone(pair, "victim")
        control.wire.close()
        data.wire.close()

    await beside(pair, bomb)

    async def said() -> bool:
        return any(entry["event"] == "the source's record is not kept" for entry in pair.b.log())

    await until("a word on the record in the log", said)


async def test_a_record_of_another_attempt_replaces_nothing(pair: Pair) -> None:
    await pair.a.create_guest("honest", 16, workload="idle")
    honest = await pair.a.migrate("honest", pair.b, downtime_limit=20_000)
    description = await describe(pair)
    control, data, _ = await open_session(pair, description)
    forged = dict(honest, outcome="failed", reason="forged", started_at="2099-01-01T00:00:00+00:00", total_ns=1 << 70)
    await control.send(FrameType.RECORD, {}, payload=json.dumps(forged).encode())
    await control.send(FrameType.ABORT, {"epoch": 1, "reason": "enough"})
    await until_gone(pair, "victim")
    control.wire.close()
    data.wire.close()
    kept = await pair.b.record(honest["migration_id"])
    assert kept is not None
    assert (kept["outcome"], kept["started_at"]) == ("completed", honest["started_at"])


async def test_an_epoch_at_the_end_of_numbers_does_not_hold_a_guest(pair: Pair) -> None:
    """With it the guest could never be migrated from here again."""
    description = await describe(pair)
    migration_id = secrets.token_hex(16)
    control = await connect(pair)
    await control.send(FrameType.HELLO, {**hello_of(description, migration_id), "epoch": (1 << 63) - 1})
    assert "beyond what migrations can have come to" in await end_of(control)
    control.wire.close()
    journal = (pair.b.directory / "state" / "journal").read_text(encoding="utf-8")
    assert migration_id not in journal, "a refused offer leaves nothing"
    await pair.b.create_guest("victim", 16, workload="idle")
    record = await pair.b.migrate("victim", pair.a, downtime_limit=20_000)
    assert record["outcome"] == "completed", record["reason"]


@pytest.mark.parametrize("joined", [False, True])
async def test_who_only_answers_clocks_loses_its_place(pair: Pair, joined: bool) -> None:
    description = await describe(pair)
    if joined:
        control, data, _ = await open_session(pair, description)
    else:
        data = control = await connect(pair)
        await control.send(FrameType.HELLO, hello_of(description, secrets.token_hex(16)))
        assert isinstance(await control.receive(), messages.Welcome)
    words = r"the source sent \d+ bytes in 4 s" if joined else "not all data channels joined within 10 s"
    assert re.search(words, await end_of(control))
    await until_gone(pair, "victim")
    control.wire.close()
    data.wire.close()


async def test_there_are_only_so_many_guests(pair: Pair) -> None:
    description = await describe(pair)
    for number in range(3):
        await pair.b.create_guest(f"own{number}", 16, workload="idle")
    control = await connect(pair)
    await control.send(FrameType.HELLO, hello_of(description, secrets.token_hex(16)))
    assert "there are 3 guests on this host, the most that [limits] max_guests allows" in await end_of(control)
    control.wire.close()
    metrics = await pair.b.command("x-migrated-metrics")
    assert 'migrated_offers_refused_total{reason="room"}' in metrics["text"]


async def test_memory_that_the_host_does_not_have_is_not_promised(pair: Pair) -> None:
    description = await describe(pair)
    region = {**description["memory"][0], "size_bytes": 1 << 39}
    control = await connect(pair)
    offer = hello_of({**description, "memory": (region,)}, secrets.token_hex(16))
    await control.send(FrameType.HELLO, offer)
    assert re.search(r"the guest has 524288 MiB of memory; this host has \d+ MiB free", await end_of(control))
    control.wire.close()
    assert "victim" not in await pair.b.guests()
