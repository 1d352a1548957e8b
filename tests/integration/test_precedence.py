"""From stop to run the threads of daemons and VMMs go before others, and no longer.

a, b, both VMMs   usual ......... | stop   first in line   run | usual
"""

from __future__ import annotations

import contextlib
import os

import pytest

from migrated.kernel.scheduling import may_take_precedence, threads_of
from scripts.rig.pair import Pair
from scripts.rig.waiting import until

pytestmark = pytest.mark.skipif(not may_take_precedence(), reason="giving threads a policy takes CAP_SYS_NICE")

FIRST = os.SCHED_RR | os.SCHED_RESET_ON_FORK


def processes(pair: Pair) -> list[int]:
    """Both daemons and the VMMs that there are."""
    return [pid for host in pair.hosts for pid in (host.pid, *host.vmm_pids())]


def policies(threads: list[int]) -> set[int]:
    """Those of the threads that have not ended."""
    found: set[int] = set()
    for thread in threads:
        with contextlib.suppress(ProcessLookupError):
            found.add(os.sched_getscheduler(thread))
    return found


async def test_daemons_and_vmms_go_first_while_the_guest_stands_still(pair: Pair) -> None:
    await pair.a.create_guest("g1", 32, profile="slow-load")  # which takes a quarter of a second
    assert policies(threads_of(*processes(pair))) == {os.SCHED_OTHER}
    migration = await pair.a.begin_migration("g1", pair.b, downtime_limit=5000)

    async def first() -> bool:
        running = processes(pair)
        return len(running) == 4 and policies(running) == {FIRST}

    await until("daemons and VMMs go first", first)
    record = await pair.a.wait(migration)
    assert record["outcome"] == "completed", record["reason"]
    assert policies(threads_of(*processes(pair))) == {os.SCHED_OTHER}


async def test_nobody_waits_for_daemons_while_an_operator_holds_the_guest(pair: Pair) -> None:
    await pair.a.create_guest("g1", 32)
    migration = await pair.a.begin_migration("g1", pair.b, downtime_limit=5000, pause_before_switchover=True)
    await pair.a.until_status("g1", "pre-switchover")
    vmms = [pid for host in pair.hosts for pid in host.vmm_pids()]
    assert policies(threads_of(pair.a.pid, *vmms)) == {os.SCHED_OTHER}
    await pair.a.command("migrate-continue", {"guest": "g1", "state": "pre-switchover"})
    record = await pair.a.wait(migration)
    assert record["outcome"] == "completed", record["reason"]
    assert policies(threads_of(*processes(pair))) == {os.SCHED_OTHER}
