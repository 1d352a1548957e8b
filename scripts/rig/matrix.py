"""The fault matrix: every step of a migration x every fault, over real daemons and guests.

A step is a frame on its way through the proxy; the fault happens before the frame is forwarded (or to it). Afterwards
the network is healed, what was killed is started again, and the outcome is judged:

    the guest is on one host, the one that the hand-over allows | no two copies ran, no step was lost | it verifies
    | the record names the cause | the next migration completes | nothing is left behind
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

from migrated.control.client import CommandError, DaemonUnreachableError
from protocol.messages import FrameType
from scripts.rig.faults import Action, AtFrame, Call, Corrupt, Cut, Duplicate, Reset, Stall, Truncate, Way
from scripts.rig.faulty import FaultyPair
from scripts.rig.host import Host
from scripts.rig.waiting import RigError

Place = Literal["source", "destination", "nowhere"]

BLACKOUT_S: Final = 1.5
"""How long a cut, a stall or a stopped process lasts: longer than heartbeats and the limit allow."""
RESTART_S: Final = 0.2
PARAMETERS: Final = {"downtime_limit": 1_000, "timeout_s": 0.1, "on_timeout": "force"}
LOG_LINES: Final = 16
TRIES: Final = 3
"""A busy machine may miss the limit before a migration comes to the step."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a migration: the frame that carries it, and how far the hand-over is before it is forwarded."""

    name: str
    frame: FrameType
    phase: Literal["negotiation", "rounds", "stopped", "ready", "committed", "running"]


STEPS: Final = (
    Step("hello", FrameType.HELLO, "negotiation"),
    Step("welcome", FrameType.WELCOME, "negotiation"),
    Step("join", FrameType.JOIN, "negotiation"),
    Step("round-end", FrameType.ROUND_END, "rounds"),
    Step("round-done", FrameType.ROUND_DONE, "rounds"),
    Step("downtime", FrameType.DOWNTIME, "stopped"),
    Step("time-ask", FrameType.TIME_ASK, "rounds"),
    Step("time-data", FrameType.TIME_DATA, "stopped"),
    Step("device-state", FrameType.DEVICE_STATE, "stopped"),
    Step("state-end", FrameType.STATE_END, "stopped"),
    Step("ready", FrameType.READY, "ready"),
    Step("commit", FrameType.COMMIT, "committed"),
    Step("running", FrameType.RUNNING, "running"),
    Step("report", FrameType.REPORT, "running"),
    Step("record", FrameType.RECORD, "running"),
)

NETWORK_FAULTS: Final = (
    "cut", "cut-to-destination", "cut-to-source", "reset", "stall", "corrupt", "truncate", "duplicate",
)  # fmt: skip
PROCESSES: Final = ("source-daemon", "destination-daemon", "source-vmm", "destination-vmm")
FAULTS: Final = (
    *NETWORK_FAULTS,
    "cancel",
    *(f"kill-{process}" for process in PROCESSES),
    *(f"stop-{process}" for process in PROCESSES),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One fault at one step."""

    step: Step
    fault: str

    def __str__(self) -> str:
        return f"{self.step.name}/{self.fault}"

    def places(self) -> frozenset[Place]:
        """Where the guest may be in the end (docs/handover.md, what each failure means)."""
        step, fault = self.step, self.fault
        if fault == "kill-source-vmm":
            # A guest whose own VMM dies is lost like in any crash, unless all of it was on its way already.
            if step.phase == "running":
                return frozenset({"destination"})
            return frozenset({"nowhere"} if step.phase in ("negotiation", "rounds") else {"nowhere", "destination"})
        if fault == "kill-destination-vmm":
            return frozenset({"nowhere"} if step.phase == "running" else {"source"})
        if step.phase == "running":
            return frozenset({"destination"})
        if step.phase == "committed":
            return frozenset({"source", "destination"})
        if step.phase == "ready" and fault in ("cut-to-destination", "duplicate", "kill-destination-daemon"):
            return frozenset({"source", "destination"})  # the vote is heard, and COMMIT may be
        if fault.startswith("stop-") or fault == "stall":
            return frozenset({"source", "destination"})  # late, but perhaps in time
        return frozenset({"source"})


ALL_CELLS: Final = tuple(
    cell
    for cell in itertools.starmap(Cell, itertools.product(STEPS, FAULTS))
    if not (cell.step.name == "hello" and cell.fault.endswith("-destination-vmm"))  # it does not exist yet
)


LOCAL_CELLS: Final = tuple(
    cell for cell in ALL_CELLS if cell.step.phase != "rounds" and not cell.fault.startswith("cut-to-")
)
"""Between daemons on one host, which hand memory over: no rounds, and no packets that are lost in one direction."""


@dataclass(slots=True)
class Judged:
    """The result of one cell."""

    cell: Cell
    seconds: float = 0.0
    outcome: str = ""
    place: Place | None = None
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        place = self.place or "?"
        head = f"{self.cell!s:38} {self.outcome:10} guest: {place:12} {self.seconds:5.1f} s"
        return "\n".join([head, *(f"    VIOLATION: {violation}" for violation in self.violations)])


def action_of(fault: str, source: Host, destination: Host, guest: str) -> Action:
    """The proxy's action for a fault."""
    match fault:
        case "cut":
            return Cut()
        case "cut-to-destination":
            return Cut((Way.TO_DESTINATION,))
        case "cut-to-source":
            return Cut((Way.TO_SOURCE,))
        case "reset":
            return Reset()
        case "stall":
            return Stall(BLACKOUT_S)
        case "corrupt":
            return Corrupt()
        case "truncate":
            return Truncate()
        case "duplicate":
            return Duplicate()
        case "cancel":
            return Call(lambda: source.cancel(guest), fault)
    verb, _, process = fault.partition("-")
    side, _, kind = process.partition("-")
    host = source if side == "source" else destination
    if verb == "kill":
        return Call(host.kill if kind == "daemon" else lambda: host.kill_vmm(guest), fault)
    return Call(lambda: _freeze(host, kind, guest), fault)


def _freeze(host: Host, kind: str, guest: str) -> None:
    pids = [host.pid] if kind == "daemon" else [pid for pid, name in host.vmm_pids().items() if name == guest]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)


async def judge(cell: Cell, pair: FaultyPair, guest: str = "g1") -> Judged:
    """Run one cell. The guest is created when neither host has it, and stays for the next cell."""
    judged = Judged(cell)
    begin = time.monotonic()
    try:
        async with asyncio.timeout(pair.cell_timeout_s):
            await _run(cell, pair, guest, judged)
    except (RigError, CommandError, DaemonUnreachableError, TimeoutError) as error:
        judged.violations.append(
            f"{str(error) or f'it took more than {pair.cell_timeout_s:g} s'}\n{pair.log_tail(LOG_LINES)}"
        )
    if judged.violations:
        await pair.start_over()  # so that the next cell is judged by itself
    judged.seconds = time.monotonic() - begin
    return judged


async def _run(cell: Cell, pair: FaultyPair, guest: str, judged: Judged) -> None:
    ends: list[str] = []
    for _ in range(TRIES):
        source = await pair.settled(guest)
        if source is None:
            source = pair.a
            pair.forget_runs()
            await pair.new_guest(source, guest)
        destination = pair.other(source)
        proxy = pair.way_to(destination)
        fault = proxy.arm(AtFrame(cell.step.frame), action_of(cell.fault, source, destination, guest))
        migration_id = await source.begin_migration(guest, proxy.uri, **PARAMETERS)
        if await pair.fired(fault, source, migration_id):
            break
        if (record := await source.record(migration_id)) is not None:
            ends.append(f"{record['outcome']}: {record['reason']}")
        proxy.heal()
    else:
        judged.violations.append(f"the migration never came to the step in {TRIES} tries: {'; '.join(ends)}")
        return
    await asyncio.sleep(RESTART_S if cell.fault.startswith("kill-") else BLACKOUT_S)  # the fault's own length
    await pair.recover()
    at = await pair.settled(guest)
    judged.place = "nowhere" if at is None else "source" if at is source else "destination"
    violations = judged.violations
    if judged.place not in cell.places():
        violations.append(f"the guest is {judged.place}, which is none of {sorted(cell.places())}")
    violations += pair.double_runs(guest)
    record = await source.record(migration_id)
    if record is None:
        judged.outcome = "no record"
        # A daemon that is killed before it journaled the attempt knows nothing of it.
        if not (cell.fault == "kill-source-daemon" and cell.step.phase == "negotiation"):
            violations.append("the source has no record of the attempt")
    else:
        judged.outcome = record["outcome"]
        completed = record["outcome"] == "completed"
        if record["outcome"] == "in-doubt":
            violations.append("the record still says in doubt")
        if (judged.place == "destination") != completed and judged.place != "nowhere":
            violations.append(f"the record says {record['outcome']}, the guest is {judged.place}")
        if not completed and not record["reason"]:
            violations.append("the record names no cause")
        if "internal error" in (record["reason"] or ""):
            violations.append(f"the record's reason is a bug: {record['reason']}")
    if at is not None:
        verdict = await at.verify(guest)
        if not verdict["ok"]:
            violations.append(f"the guest does not verify: {verdict['message']}")
        state = (await at.guests())[guest]["state"]
        if state != "running":
            violations.append(f"the guest is {state} in the end")
        violations += await pair.check_retry(guest, at)
        violations += pair.double_runs(guest)
    violations += await pair.leftovers()
    if violations:
        violations[-1] += f"\n{pair.log_tail(LOG_LINES)}"


async def run_matrix(
    cells: Iterable[Cell],
    lanes: int,
    say: Callable[[str], None] = lambda _text: None,
    make_pair: Callable[[], FaultyPair] = FaultyPair,
) -> list[Judged]:
    """Run cells on several pairs of hosts side by side: most of a cell's time is waiting.

    Args:
        lanes: how many pairs.
        say: told of every cell as it is judged.
        make_pair: makes the hosts, with the kind of guest that is to be tried.
    """
    waiting = list(cells)[::-1]
    done: list[Judged] = []

    async def lane() -> None:
        pair = make_pair()
        try:
            await asyncio.to_thread(pair.start)
            while waiting:
                judged = await judge(waiting.pop(), pair)
                done.append(judged)
                say(str(judged))
        finally:
            await asyncio.to_thread(pair.close)

    async with asyncio.TaskGroup() as group:
        for _ in range(lanes):
            group.create_task(lane())
    return done
