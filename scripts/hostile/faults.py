"""Faults of a host: nothing to write on, no descriptors, no memory for a guest, a clock that jumps.

the fault -> a migration ends with a sentence, its guest runs where it was -> the fault is over -> migrations go on
"""

from __future__ import annotations

import resource
import subprocess
from pathlib import Path
from typing import Final

from migrated.control.client import CommandError
from scripts.hostile.ground import VICTIM, Case, Ground, NotHeldError
from scripts.rig.disk import full
from scripts.rig.host import Host
from scripts.rig.waiting import RigError

_PARAMETERS: Final = {"downtime_limit": 20_000, "timeout_s": 5, "on_timeout": "force"}
_SLOW: Final = {**_PARAMETERS, "max_bandwidth": 16 << 20}
_IN_ONE_PAGE: Final = 20
"""Migrations: each writes some hundred bytes."""
_HOUR_NS: Final = 3600 * 10**9
_STEPS_NS: Final = (_HOUR_NS, -_HOUR_NS, 400 * 24 * _HOUR_NS)


async def _attempt(here: Host, there: Host) -> tuple[str, str]:
    """Try to move the guest. Returns the outcome and the reason.

    Raises:
        NotHeldError: it did not complete, and the guest does not run where it was or nobody said why.
    """
    try:
        record = await here.migrate(VICTIM, there, **_PARAMETERS)
        outcome, reason = record["outcome"], str(record["reason"] or "")
    except CommandError as error:  # it did not even begin
        outcome, reason = "refused", str(error)
    guest = (await (there if outcome == "completed" else here).guests()).get(VICTIM)
    if outcome == "in-doubt" or guest is None or guest["state"] != "running" or (outcome != "completed" and not reason):
        raise NotHeldError(f"under the fault the attempt is {outcome} ({reason}), and its guest {guest}")
    return outcome, reason


async def _ends_here(here: Host, there: Host) -> None:
    """A migration that cannot complete: its guest runs where it was.

    Raises:
        NotHeldError: it completed, or the guest does not run.
    """
    outcome, _ = await _attempt(here, there)
    if outcome == "completed":
        raise NotHeldError("under the fault the attempt completed")


async def disk_full(ground: Ground) -> None:
    """Nothing more fits beside the journal of one host. What is left of the last page of its file may still hold a few
    migrations, so the guest goes to and fro until one ends where it began."""
    for broken in ground.pair.hosts:
        here, there = ground.pair.hosts
        async with ground.victim(here):
            with full(broken.directory / "state"):
                for _ in range(_IN_ONE_PAGE):
                    if (await _attempt(here, there))[0] != "completed":
                        break
                    here, there = there, here
                else:
                    raise NotHeldError(
                        f"{_IN_ONE_PAGE} migrations complete, and nothing more fits on host {broken.name}"
                    )
            outcome, reason = await _attempt(here, there)
            if outcome != "completed":
                raise NotHeldError(f"there is room again, and the attempt is {outcome}: {reason}")


def _remount(host: Host, mode: str) -> None:
    """Make a state directory read-only (ro) or writable (rw)."""
    subprocess.run(["mount", "-o", f"remount,{mode}", str(host.directory / "state")], check=True)


async def read_only(ground: Ground) -> None:
    """A daemon whose state directory is read-only does not start, and says why; when it can be written, it starts and
    has its guests."""
    host = ground.pair.b
    async with ground.victim(host):
        host.stop()
        _remount(host, "ro")
        try:
            host.start()
        except RigError as error:
            if "the daemon cannot start" not in str(error):
                raise NotHeldError(f"a daemon that cannot write its state ends otherwise: {error}") from error
        else:
            raise NotHeldError("a daemon that cannot write its state starts")
        finally:
            _remount(host, "rw")
            host.bugs()  # what it said at its end is no bug
            if not host.running:
                host.restart()
        if VICTIM not in await host.guests():
            raise NotHeldError("a guest was lost")


async def no_descriptors(ground: Ground) -> None:
    """A daemon has no file descriptor left, first where the guest would come from, then where it would go."""
    here, there = ground.pair.hosts
    async with ground.victim(here):
        for broken in (here, there):
            soft, hard = resource.prlimit(broken.pid, resource.RLIMIT_NOFILE)
            held = {int(entry.name) for entry in Path(f"/proc/{broken.pid}/fd").iterdir()}
            free = min(set(range(len(held) + 1)) - held)  # it bounds the number of a descriptor, not their count
            resource.prlimit(broken.pid, resource.RLIMIT_NOFILE, (free + 1, hard))
            try:
                await _ends_here(here, there)
            finally:
                resource.prlimit(broken.pid, resource.RLIMIT_NOFILE, (soft, hard))


async def no_memory(ground: Ground) -> None:
    """The kernel kills the process of the incoming guest while its memory comes."""
    here, there = ground.pair.hosts
    async with ground.victim(here, 128, workload="random", dirty_rate_bytes_per_s=8 << 20):
        migration_id = await here.begin_migration(VICTIM, there, **_SLOW)
        await here.until_status(VICTIM, "active")
        there.kill_vmm(VICTIM)
        record = await here.wait(migration_id)
        if record["outcome"] != "failed" or (await here.guest(VICTIM))["state"] != "running":
            raise NotHeldError(f"the attempt is {record['outcome']}: {record['reason']}")


async def clock_steps(ground: Ground) -> None:
    """The wall clock of a host jumps, forth and back: migrations complete, and their records are kept on both hosts."""
    host = ground.pair.b
    try:
        for step_ns in _STEPS_NS:
            host.stop()
            host.configure(clock={"wall_offset_ns": step_ns})
            host.restart()
            async with ground.victim(ground.pair.a):
                for here, there in (ground.pair.hosts, ground.pair.hosts[::-1]):
                    record = await here.migrate(VICTIM, there, **_PARAMETERS)
                    if record["outcome"] != "completed":
                        raise NotHeldError(
                            f"after a step of {step_ns} ns it is {record['outcome']}: {record['reason']}"
                        )
                    for one in ground.pair.hosts:
                        if await one.record(record["migration_id"]) is None:
                            raise NotHeldError(f"after a step of {step_ns} ns host {one.name} has no record")
    finally:
        host.stop()
        host.configure(clock={})
        host.restart()


CASES: Final = (
    Case("a full disk under the journal", disk_full, brief=False, alone=True),
    Case("a state directory that is read-only", read_only, brief=False, alone=True),
    Case("no file descriptor left", no_descriptors, brief=False, alone=True),
    Case("no memory for the incoming guest", no_memory, brief=False),
    Case("steps of the wall clock", clock_steps, brief=False, alone=True),
)
