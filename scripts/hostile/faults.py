"""Faults of a host: nothing to write on, no descriptors, no memory for a guest, a clock that jumps.

the fault -> a migration ends with a sentence, its guest runs where it was -> the fault is over -> migrations go on
"""

from __future__ import annotations

import contextlib
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from migrated.control.client import CommandError
from scripts.hostile.ground import VICTIM, Case, Ground, NotHeldError
from scripts.rig.host import Host
from scripts.rig.waiting import RigError, until

_PARAMETERS: Final = {"downtime_limit": 20_000, "timeout_s": 5, "on_timeout": "force"}
_SLOW: Final = {**_PARAMETERS, "max_bandwidth": 16 << 20}
_HOUR_NS: Final = 3600 * 10**9
_STEPS_NS: Final = (_HOUR_NS, -_HOUR_NS, 400 * 24 * _HOUR_NS)


async def _ends_here(here: Host, there: Host, **parameters: Any) -> str:
    """A migration that cannot complete: its guest runs where it was. Returns the reason.

    Raises:
        NotHeldError: it completed, or the guest does not run.
    """
    try:
        record = await here.migrate(VICTIM, there, **{**_PARAMETERS, **parameters})
        outcome, reason = record["outcome"], record["reason"]
    except CommandError as error:  # it did not even begin
        outcome, reason = "refused", str(error)
    guest = (await here.guests()).get(VICTIM)
    if outcome in ("completed", "in-doubt") or guest is None or guest["state"] != "running" or not reason:
        raise NotHeldError(f"under the fault the attempt is {outcome} ({reason}), and its guest {guest}")
    return str(reason)


@contextlib.contextmanager
def _full(host: Host) -> Iterator[None]:
    """A state directory on which nothing more fits."""
    filler = host.directory / "state" / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(b"x")
    try:
        yield
    finally:
        filler.unlink()


async def disk_full(ground: Ground) -> None:
    """Nothing more fits beside the journal, first where the guest would come from, then where it would go."""
    for here, there in (ground.pair.hosts, ground.pair.hosts[::-1]):
        async with ground.victim(here):
            for broken in (here, there):
                with _full(broken):
                    await _ends_here(here, there)


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
            held = max(int(entry.name) for entry in Path(f"/proc/{broken.pid}/fd").iterdir())
            resource.prlimit(broken.pid, resource.RLIMIT_NOFILE, (held + 3, hard))
            try:
                await _ends_here(here, there)
            finally:
                resource.prlimit(broken.pid, resource.RLIMIT_NOFILE, (soft, hard))


async def no_memory(ground: Ground) -> None:
    """The kernel kills the process of the incoming guest while its memory comes."""
    here, there = ground.pair.hosts
    async with ground.victim(here, 128, workload="random", dirty_rate_bytes_per_s=8 << 20):
        migration_id = await here.begin_migration(VICTIM, there, **_SLOW)

        async def arriving() -> bool:
            return VICTIM in there.vmm_pids().values()

        await until("the guest arrives", arriving)
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
