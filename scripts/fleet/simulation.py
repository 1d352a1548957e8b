"""A whole fleet in virtual time: the planner, the jobs and the transactions that ship, over a fake store.

    worker of each job     next_work -> transaction -> ...
    daemon of each source  begin -> the migration's rounds on paper -> ended; some fail
    daemon of each host    publishes what it has, and keeps its lease alive

What takes time here is the migrations, at the rates that their links give them, the store's answers, and the news on
their way to whoever watches. Every transaction of the store, every watch and every renewal is counted.
"""

from __future__ import annotations

import heapq
import pickle
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from migrated.fleet.changes import claim_job, create_job, publish
from migrated.fleet.costs import limit_of, move_cost
from migrated.fleet.jobs import StepEvent, is_over
from migrated.fleet.keys import Keys, last_part
from migrated.fleet.mirror import Mirror
from migrated.fleet.model import (
    CurvePoint,
    Forecast,
    GuestDocument,
    HostDocument,
    JobKind,
    JobPhase,
    JobSpec,
    JobStep,
    Ownership,
    StepState,
)
from migrated.fleet.ownership import change_owner, settled, transferred
from migrated.fleet.store import Change, Put, Transaction
from migrated.fleet.worker import Work, begin, ended, next_work
from protocol.guest import PAGE_SIZE
from scripts.fleet.fake_store import FakeStore

KEYS: Final = Keys("/migrated/simulated/")
S: Final = 1_000_000_000
MS: Final = 1_000_000
MIB: Final = 1 << 20
GIB: Final = 1 << 30
ANSWER_NS: Final = 4 * MS
"""From a request to the store until whoever watches has seen the change."""
LEASE_S: Final = 15
RENEWALS_PER_LEASE: Final = 3


@dataclass(frozen=True)
class Size:
    """What is simulated.

    Attributes:
        hosts, guests: of the fleet.
        emptied: hosts that are emptied at once.
        failing: the share of attempts that fail.
    """

    hosts: int
    guests: int
    emptied: int
    failing: float = 0.02
    seed: int = 1


@dataclass
class Outcome:
    """What came of it. Times are virtual.

    Attributes:
        total_s: from the request to the end of the last job.
        planned_s: what the longest plan said.
        moved, left: guests that left their host, and those that did not.
        late: migrations whose downtime was expected to exceed the limit.
        attempts: of all guests together.
        calls: calls to the store, by kind.
        refused: transactions that compared old news.
        renewals: of leases, which the calls leave out.
        largest: bytes and name of the largest key.
        most_inbound, most_outbound: slots in use at once on any host, beside what it allows.
        overcommitted: hosts that were ever promised more memory than they have.
        peak_per_s: calls in the busiest second.
        events: keys that were written or deleted, each told to the daemons of all hosts.
        slowest_decision_s: real time of the slowest decision of a worker, which is a plan.
        question_bytes: the largest part of the mirror that a worker hands to the process that plans.
    """

    total_s: float = 0.0
    planned_s: float = 0.0
    moved: int = 0
    left: int = 0
    late: int = 0
    attempts: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    renewals: int = 0
    largest: tuple[int, str] = (0, "")
    most_inbound: int = 0
    most_outbound: int = 0
    overcommitted: int = 0
    peak_per_s: int = 0
    events: int = 0
    slowest_decision_s: float = field(default=0.0, compare=False)
    question_bytes: int = 0


class Fleet:
    """The hosts, guests and jobs of one simulation."""

    def __init__(self, size: Size) -> None:
        self.now_ns = 0
        self.outcome = Outcome()
        self.store = FakeStore(lambda: self.now_ns, keep=False)
        self.mirror = Mirror(KEYS)
        self.store.watchers += [self.mirror.apply, self._check]
        self._size = size
        self._dice = random.Random(size.seed)
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._order = count()
        self._leases: dict[str, int] = {}
        self._woken: set[str] = set()
        self._per_second: Counter[int] = Counter()
        self._attempts: defaultdict[str, int] = defaultdict(int)
        self._fill()

    def run(self) -> Outcome:
        """Empty the hosts. Returns the figures."""
        before = Counter(self.store.calls)
        self.outcome.events = 0
        hosts = [_host_name(number) for number in range(self._size.emptied)]
        for host in hosts:
            self._start_job(host)
        while self._events:
            self.now_ns, _, act = heapq.heappop(self._events)
            act()
        self._sum_up(hosts, before)
        return self.outcome

    # Section: the beginning

    def _fill(self) -> None:
        """Hosts of one rack have the same link; guests are spread evenly, and most are quiet."""
        per_host = -(-self._size.guests // self._size.hosts)
        used: Counter[str] = Counter()
        for number in range(self._size.guests):
            host = _host_name(number // per_host)
            guest = self._guest(number)
            used[host] += guest.memory_bytes
            owned = Ownership(owner=host, epoch=1)
            self._write(Put(KEYS.guest(guest.name), guest.to_bytes()), Put(KEYS.owner(guest.name), owned.to_bytes()))
        for number in range(self._size.hosts):
            name = _host_name(number)
            self._leases[name] = self.store.grant(LEASE_S)
            document = HostDocument(
                name=name,
                address=f"tcp:10.{number >> 8}.{number & 255}.1:7000",
                version="0.1.0",
                vmms=("qemu",),
                memory_bytes=256 * GIB,
                used_bytes=used[name],
                guests=len(self.mirror.by_owner[name]),
                link_bytes_per_s=(2400 if number % 4 else 1100) * MIB,
                max_inbound=2,
                max_outbound=2,
            )
            self._write(Put(KEYS.host(name), document.to_bytes(), self._leases[name]))

    def _guest(self, number: int) -> GuestDocument:
        dice = self._dice
        memory_bytes = dice.choice((2, 4, 4, 8, 8, 16)) * GIB
        dirtied_per_s, working_set = dice.choice(((5, 20), (20, 64), (100, 64), (400, 128)))  # MiB
        full_ns = working_set * S // dirtied_per_s
        pages = working_set * MIB // PAGE_SIZE
        forecast = Forecast(
            data_bytes=int(memory_bytes * dice.uniform(0.3, 0.9)),
            dirty=(CurvePoint(ns=full_ns, pages=pages), CurvePoint(ns=4 * full_ns, pages=pages)),
            fixed_ns=dice.randrange(20, 90) * MS,
            margin_ns=30 * MS,
            setup_ns=800 * MS,
        )
        return GuestDocument(
            name=f"vm{number:05}",
            vmm="qemu",
            memory_bytes=memory_bytes,
            downtime_limit_ns=300 * MS,
            group=f"group{number // 3}" if number % 7 == 0 else None,
            forecast=forecast,
        )

    def _write(self, *puts: Put) -> None:
        self.store.transact(Transaction((), puts))

    # Section: jobs

    def _start_job(self, host: str) -> None:
        spec = JobSpec(job=f"empty-{host}", kind=JobKind.EVACUATE, host=host, created_utc_ns=0, by="simulation")
        self._transact(create_job(self.mirror, spec))
        # Whoever sees the job first carries it on; here another host for each.
        worker = _host_name(self._dice.randrange(self._size.emptied, self._size.hosts))
        self._transact(claim_job(self.mirror, spec.job, worker, self._leases[worker], self.now_ns))
        self._wake(spec.job)

    def _wake(self, job: str) -> None:
        """The worker of a job looks again, once the news has reached it."""
        if job not in self._woken:
            self._woken.add(job)
            self._after(ANSWER_NS, lambda: self._work(job))

    def _work(self, job: str) -> None:
        self._woken.discard(job)
        if is_over(self.mirror.states[job]):
            return
        if not self.mirror.steps[job]:
            question = pickle.dumps(self.mirror.part(self.mirror.specs[job].host, job))
            self.outcome.question_bytes = max(self.outcome.question_bytes, len(question))
        begin = time.perf_counter()
        found = next_work(self.mirror, job, self.now_ns)
        self.outcome.slowest_decision_s = max(self.outcome.slowest_decision_s, time.perf_counter() - begin)
        if isinstance(found, Work):
            transaction = found.transaction
            self._after(ANSWER_NS // 2, lambda: self._carry_out(job, transaction))
        elif found.until_utc_ns is not None:
            self._at(found.until_utc_ns, lambda: self._wake(job))

    def _carry_out(self, job: str, transaction: Transaction) -> None:
        """What was decided reaches the store when others may have changed it."""
        if self._transact(transaction):
            self._begin_reserved(job)
        self._wake(job)

    def _begin_reserved(self, job: str) -> None:
        for step in self.mirror.steps[job].values():
            if step.state is StepState.RESERVED:
                self._after(ANSWER_NS, lambda guest=step.guest: self._begin(job, guest))  # type: ignore[misc]

    def _begin(self, job: str, guest: str) -> None:
        """The source's daemon begins the attempt of a step, unless it has already."""
        spec, step = self.mirror.specs[job], self.mirror.steps[job][guest]
        if step.state is not StepState.RESERVED:
            return
        self._attempts[guest] += 1
        migration_id = f"{job}-{guest}-{self._attempts[guest]}"
        if not self._transact(begin(self.mirror, spec, step, migration_id, self.now_ns).transaction):
            self._after(ANSWER_NS, lambda: self._begin(job, guest))
            return
        self.outcome.attempts += 1
        document = self.mirror.guests[guest]
        cost = move_cost(document, limit_of(document, spec.downtime_limit_ns), step.bytes_per_s)
        self.outcome.late += not cost.fits
        if self._dice.random() < self._size.failing:
            self._after(cost.total_ns // 2, lambda: self._end(job, guest, StepEvent.FAILED, None))
        else:
            self._after(cost.total_ns, lambda: self._hand_over(job, guest, cost.downtime_ns))

    def _hand_over(self, job: str, guest: str, downtime_ns: int) -> None:
        """Transfer before COMMIT, then the destination settles and counts the guest."""
        step, known = self.mirror.steps[job][guest], self.mirror.owners[guest]
        if step.destination is None or step.migration_id is None:
            raise RuntimeError(f"{guest} migrates nowhere")
        after = transferred(known, step.destination, step.migration_id)
        for owned in (after, settled(after, step.destination, step.migration_id)):
            revision = self.mirror.unchanged(KEYS.owner(guest)).revision
            if not self._transact(change_owner(KEYS, guest, revision, owned, by=step.source)):
                raise RuntimeError(f"the owner of {guest} was changed by nobody that is simulated")
        self._end(job, guest, StepEvent.COMPLETED, downtime_ns)
        for host, change in ((step.source, -1), (step.destination, 1)):
            self._count(host, guest, change)

    def _end(self, job: str, guest: str, event: StepEvent, downtime_ns: int | None) -> None:
        """The source's daemon says what became of an attempt, until that is written."""
        spec, step = self.mirror.specs[job], self.mirror.steps[job][guest]
        work = ended(self.mirror, spec, step, event, self.now_ns, reason="the link was lost", downtime_ns=downtime_ns)
        if self._transact(work.transaction):
            for other, waiting in self.mirror.specs.items():
                if len(self.mirror.slots_of(waiting.host).outbound) < self.mirror.hosts[waiting.host].max_outbound:
                    self._wake(other)
        else:
            self._after(ANSWER_NS, lambda: self._end(job, guest, event, downtime_ns))

    def _count(self, host: str, guest: str, change: int) -> None:
        """A host publishes that a guest came or went."""
        known = self.mirror.hosts[host]
        document = known.model_copy(
            update={
                "used_bytes": known.used_bytes + change * self.mirror.guests[guest].memory_bytes,
                "guests": known.guests + change,
            }
        )
        counted = {guest} if change > 0 else set[str]()
        if not self._transact(publish(self.mirror, document, self._leases[host], counted)):
            self._after(ANSWER_NS, lambda: self._count(host, guest, change))

    # Section: time and account

    def _transact(self, transaction: Transaction) -> bool:
        answer = self.store.transact(transaction)
        self._per_second[self.now_ns // S] += 1
        self.outcome.refused += not answer.succeeded
        return answer.succeeded

    def _after(self, ns: int, act: Callable[[], None]) -> None:
        self._at(self.now_ns + ns, act)

    def _at(self, ns: int, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (ns, next(self._order), act))

    def _check(self, changes: tuple[Change, ...]) -> None:
        """Look at the hosts whose slots have changed."""
        outcome, mirror = self.outcome, self.mirror
        outcome.events += len(changes)
        for change in changes:
            if change.key.startswith(KEYS.slots):
                document = mirror.hosts[last_part(change.key)]
                slots = mirror.slots_of(document.name)
                outcome.most_inbound = max(outcome.most_inbound, len(slots.arriving))
                outcome.most_outbound = max(outcome.most_outbound, len(slots.outbound))
                outcome.overcommitted += document.used_bytes + slots.inbound_bytes > document.memory_bytes

    def _sum_up(self, hosts: list[str], before: Counter[str]) -> None:
        outcome, mirror = self.outcome, self.mirror
        steps: list[JobStep] = [step for job in mirror.steps.values() for step in job.values()]
        states = list(mirror.states.values())
        unfinished = [state for state in states if not is_over(state)]
        if unfinished:
            raise RuntimeError(f"{len(unfinished)} jobs did not end")
        outcome.total_s = max((state.ended_utc_ns or 0 for state in states), default=0) / S
        outcome.planned_s = max((step.expected_end_ns for step in steps), default=0) / S
        outcome.moved = sum(step.state is StepState.DONE for step in steps)
        outcome.left = sum(len(mirror.by_owner[host]) for host in hosts)
        outcome.calls = Counter(self.store.calls)
        outcome.calls.subtract(before)
        outcome.renewals = int(self._size.hosts * outcome.total_s * RENEWALS_PER_LEASE / LEASE_S)
        outcome.largest = self.store.largest
        outcome.peak_per_s = max(self._per_second.values(), default=0)
        if any(state.phase is JobPhase.DONE for state in states) and outcome.moved == 0:
            raise RuntimeError("jobs are done and nothing moved")


def _host_name(number: int) -> str:
    return f"host{number:04}"
