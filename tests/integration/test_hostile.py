"""Hostile peers against real daemons with TLS: whatever they do, they are refused by name, leave nothing behind, and an
honest guest gets through beside them. ``python -m scripts.prove_hostile`` has the long cases, and the figures.

    hostile:  HELLO  JOIN  (empty round)  lies    ->  NO | ERROR | REFUSE | hang-up
    honest:   ----------------- a whole migration ------------------>  completed
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from protocol.messages import FrameType
from scripts.basics import MIB
from scripts.hostile import destinations, sources, strangers
from scripts.hostile.beside import HONEST, create_honest, migrate_honest, run_case
from scripts.hostile.ground import PATIENT, VICTIM, Case, Ground, must_end, prepared
from scripts.rig.hostile import hello_of

LIMIT_MS = 20_000
"""This machine may be busy with other things."""
MOST_BYTES = 96 * MIB
"""What a daemon may have more of after a case than before it; some of these took 2 GiB."""
BRIEF = [case for case in (*strangers.CASES, *sources.CASES, *destinations.CASES) if case.brief]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def arena() -> AsyncIterator[Ground]:
    """The hosts of all cases, and the guest that migrates beside them."""
    async with prepared(patient=True) as ground:
        await create_honest(ground)
        yield ground


@pytest_asyncio.fixture(loop_scope="module")
async def ground(arena: Ground) -> AsyncIterator[Ground]:
    before = [host.anonymous_bytes() for host in arena.pair.hosts]
    yield arena
    print(arena.pair.log_tail())  # noqa: T201 - shown when the test failed
    for host, held in zip(arena.pair.hosts, before, strict=True):
        assert host.anonymous_bytes() - held < MOST_BYTES


@pytest.mark.parametrize("case", BRIEF, ids=lambda case: case.name)
async def test_nothing_comes_of_it_and_an_honest_guest_gets_through(ground: Ground, case: Case) -> None:
    found = await run_case(ground, case, LIMIT_MS)
    assert found.wrong == []
    assert found.downtimes_ms


async def test_a_record_of_another_attempt_replaces_nothing(ground: Ground) -> None:
    honest = await migrate_honest(ground, LIMIT_MS)
    forged = dict(honest, outcome="failed", reason="forged", started_at="2099-01-01T00:00:00+00:00", total_ns=1 << 70)
    async with ground.session() as (control, _):
        await control.send(FrameType.RECORD, {}, payload=json.dumps(forged).encode())
        await control.send(FrameType.ABORT, {"epoch": 1, "reason": "enough"})
        await ground.gone()
    kept = await ground.pair.b.record(honest["migration_id"])
    assert kept is not None
    assert (kept["outcome"], kept["started_at"]) == ("completed", honest["started_at"])


async def test_there_are_only_so_many_guests(ground: Ground) -> None:
    host, most = ground.pair.b, PATIENT["max_guests"]
    there = len(await host.guests())
    names = [f"own{number}" for number in range(int(most) - there)]
    for name in names:
        await host.create_guest(name, 16, workload="idle")
    control = await ground.connect()
    await control.send(FrameType.HELLO, hello_of(ground.description, secrets.token_hex(16)))
    await must_end(control, f"there are {most} guests on this host, the most that .limits. max_guests allows")
    control.wire.close()
    for name in names:
        await host.command("x-migrated-guest-destroy", {"guest": name})
    metrics = await host.command("x-migrated-metrics")
    assert 'migrated_offers_refused_total{reason="room"}' in metrics["text"]


async def test_the_guest_of_the_attacks_never_ran_on_the_host_that_was_attacked(ground: Ground) -> None:
    """Comes last: after all of the above."""
    assert not [entry for entry in ground.pair.b.run_log(VICTIM) if entry["event"] == "run"]
    assert HONEST in {**await ground.pair.a.guests(), **await ground.pair.b.guests()}
