"""Jobs: plan -> reserve -> migrate -> done, with whatever goes wrong on the way, over a fake store.

The fleet here is a mirror that sees every change at once; ``Fleet`` plays the worker and the daemons of the sources.
The module is longer than others because all of it is about one state machine, with one such fleet.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from migrated.fleet import changes, jobs
from migrated.fleet.jobs import JOBS, STEPS, JobError, JobEvent, StepEvent, back_off_ns, step_after
from migrated.fleet.mirror import Mirror
from migrated.fleet.model import (
    HostDocument,
    HostSlots,
    JobKind,
    JobPhase,
    JobState,
    JobStep,
    Ownership,
    StepState,
)
from migrated.fleet.store import Delete, Put, Transaction
from migrated.fleet.worker import Wait, Work, begin, ended, next_work, resume_steps, steps_here
from migrated.member.views import job_view
from scripts.fleet.fake_store import FakeStore
from tests.migrated.fleet.fleets import GIB, KEYS, MS, S, guest, host, spec

LEASE_S = 10


def _owned(name: str, owner: str) -> Put:
    return Put(KEYS.owner(name), Ownership(owner=owner, epoch=2).to_bytes())


class Fleet:
    """A store, a mirror of it, and the time (ns)."""

    def __init__(self, hosts: list[HostDocument], guests: int = 4, owner: str = "a") -> None:
        self.now_ns = 0
        self.store = FakeStore(lambda: self.now_ns)
        self.mirror = Mirror(KEYS)
        self.store.watchers.append(self.mirror.apply)
        self.leases = {one.name: self.store.grant(LEASE_S) for one in hosts}
        for one in hosts:
            self.must(Transaction((), (Put(KEYS.host(one.name), one.to_bytes(), self.leases[one.name]),)))
        for number in range(guests):
            self.add(f"g{number}", owner)

    def add(self, name: str, owner: str) -> None:
        """A guest appears on a host."""
        documents = (Put(KEYS.guest(name), guest(name).to_bytes()), _owned(name, owner))
        self.must(Transaction((), documents))

    def must(self, transaction: Transaction) -> None:
        assert self.store.transact(transaction).succeeded

    def start(self, worker: str = "b", **fields: Any) -> None:
        """Create job j1 and claim it."""
        self.must(changes.create_job(self.mirror, spec(**fields)))
        self.claim(worker)

    def claim(self, worker: str) -> None:
        self.must(changes.claim_job(self.mirror, "j1", worker, self.leases[worker], self.now_ns))

    def work(self) -> Wait:
        """Let the worker do all that it can."""
        while isinstance(found := next_work(self.mirror, "j1", self.now_ns), Work):
            self.must(found.transaction)
        return found

    def begin(self) -> list[str]:
        """Let the sources begin what is reserved. Returns the guests whose attempts run."""
        for _, step in list(steps_here(self.mirror, "a")):
            if step.state is StepState.RESERVED:
                self.must(begin(self.mirror, self.mirror.specs["j1"], step, f"m-{step.guest}", self.now_ns).transaction)
        return sorted(step.guest for _, step in steps_here(self.mirror, "a"))

    def end(self, name: str, event: StepEvent = StepEvent.COMPLETED, reason: str = "") -> None:
        """Let the attempt of a guest end; a completed one has another owner."""
        job, step = self.mirror.specs["j1"], self.step(name)
        if event is StepEvent.COMPLETED and step.destination is not None:
            self.must(Transaction((), (_owned(name, step.destination),)))
        self.must(ended(self.mirror, job, step, event, self.now_ns, reason=reason, downtime_ns=50 * MS).transaction)

    def step(self, name: str) -> JobStep:
        return self.mirror.steps["j1"][name]

    def phase(self) -> JobPhase:
        return self.mirror.states["j1"].phase

    def run(self) -> None:
        """All attempts complete, until the job is over."""
        for _ in range(100):
            self.work()
            running = self.begin()
            if not running:
                return
            self.end(running[0])


def test_a_host_is_emptied_and_nothing_stays_reserved() -> None:
    fleet = Fleet([host("a"), host("b"), host("c")], guests=5)
    fleet.start()
    fleet.run()
    assert fleet.phase() is JobPhase.DONE
    assert {step.state for step in fleet.mirror.steps["j1"].values()} == {StepState.DONE}
    assert not fleet.mirror.by_owner["a"]
    assert all(not slots.outbound and not slots.arriving for slots in fleet.mirror.slots.values())
    assert all(step.downtime_ns == 50 * MS for step in fleet.mirror.steps["j1"].values())
    assert "a" in fleet.mirror.cordons, "what is emptied takes nothing in until somebody says so"


def test_a_guest_whose_hand_over_is_not_settled_is_not_gone() -> None:
    """The store was too late with its yes: the source keeps the guest, and the owner's key follows a moment later."""
    fleet = Fleet([host("a"), host("b")], guests=1)
    fleet.start()
    fleet.work()
    fleet.begin()
    unsettled = Ownership(owner="b", epoch=3, previous="a", migration_id="m-g0")
    fleet.must(Transaction((), (Put(KEYS.owner("g0"), unsettled.to_bytes()),)))
    fleet.end("g0", StepEvent.FAILED, "the store did not answer in time")
    fleet.now_ns += 10 * S
    fleet.work()
    assert fleet.step("g0").state is StepState.PLANNED
    fleet.must(Transaction((), (_owned("g0", "a"),)))
    fleet.run()
    assert fleet.mirror.owners["g0"].owner == "b"
    assert fleet.phase() is JobPhase.DONE


def test_memory_stays_promised_until_the_destination_counts_the_guest() -> None:
    fleet = Fleet([host("a"), host("b", memory_bytes=8 * GIB)], guests=1)
    fleet.start()
    fleet.run()
    there = fleet.mirror.hosts["b"]
    assert fleet.mirror.free_bytes(there) == 4 * GIB, "reserved, not counted"
    counted = there.model_copy(update={"used_bytes": 4 * GIB, "guests": 1})
    fleet.must(changes.publish(fleet.mirror, counted, fleet.leases["b"], {"g0"}))
    assert fleet.mirror.slots_of("b") == HostSlots()
    assert fleet.mirror.free_bytes(fleet.mirror.hosts["b"]) == 4 * GIB, "counted, not reserved"


def test_slots_of_both_ends_are_kept() -> None:
    """Six guests; the source allows three at once, each of two destinations one."""
    fleet = Fleet([host("a", max_outbound=3), host("b", max_inbound=1), host("c", max_inbound=1)], guests=6)
    fleet.start()
    for left in range(6, 0, -1):
        fleet.work()
        running = fleet.begin()
        assert len(running) == min(2, left)
        assert max(Counter(fleet.step(name).destination for name in running).values()) == 1
        fleet.end(running[0])
    fleet.work()
    assert fleet.phase() is JobPhase.DONE


def test_a_job_has_no_more_at_once_than_it_was_allowed() -> None:
    fleet = Fleet([host("a", max_outbound=4), host("b", max_inbound=4)])
    fleet.start(max_parallel=1)
    fleet.work()
    assert len(fleet.begin()) == 1


def test_a_failed_guest_is_tried_elsewhere_after_a_back_off() -> None:
    fleet = Fleet([host("a"), host("b"), host("c")], guests=1)
    fleet.start()
    fleet.work()
    fleet.begin()
    first = fleet.step("g0").destination
    fleet.end("g0", StepEvent.FAILED, "the link was lost")
    step = fleet.step("g0")
    assert (step.state, step.attempt, step.reason, step.tried) == (StepState.PLANNED, 1, "the link was lost", (first,))
    assert all(slots == HostSlots() for slots in fleet.mirror.slots.values())
    wait = fleet.work()
    assert wait.until_utc_ns == jobs.FIRST_BACK_OFF_NS
    fleet.now_ns = wait.until_utc_ns
    fleet.run()
    assert fleet.step("g0").destination != first
    assert fleet.phase() is JobPhase.DONE


def test_a_clock_that_is_set_back_holds_no_guest_up() -> None:
    """The worker that began the back-off had a clock that was a day ahead; no back-off is that long."""
    day_ns = 86_400 * S
    fleet = Fleet([host("a"), host("b"), host("c")], guests=1)
    fleet.start()
    fleet.work()
    fleet.begin()
    fleet.now_ns = day_ns
    fleet.end("g0", StepEvent.FAILED, "the link was lost")
    fleet.now_ns = S
    fleet.run()
    assert fleet.phase() is JobPhase.DONE


def test_a_guest_that_fails_everywhere_is_listed_with_its_reason_and_others_go_on() -> None:
    fleet = Fleet([host("a"), host("b")], guests=2)
    fleet.start(max_attempts=2)
    for _ in range(2):
        fleet.work()
        for name in fleet.begin():
            fleet.end(name, *((StepEvent.FAILED, "it does not converge") if name == "g0" else ()))
        fleet.now_ns += jobs.LONGEST_BACK_OFF_NS
    fleet.work()
    assert fleet.phase() is JobPhase.FAILED
    assert fleet.mirror.states["j1"].reason == "1 of 2 guests did not move."
    assert (fleet.step("g0").state, fleet.step("g0").reason) == (StepState.FAILED, "it does not converge")
    assert fleet.step("g1").state is StepState.DONE
    for work in resume_steps(fleet.mirror, "j1", fleet.now_ns):
        fleet.must(work.transaction)
    fleet.run()
    assert fleet.phase() is JobPhase.DONE


def test_another_worker_carries_on_when_a_lease_ends_and_the_first_changes_nothing_more() -> None:
    fleet = Fleet([host("a"), host("b"), host("c")], guests=3)
    fleet.start(worker="b")
    fleet.work()
    fleet.end(fleet.begin()[0])
    late = next_work(fleet.mirror, "j1", fleet.now_ns)
    assert isinstance(late, Work)
    with pytest.raises(AssertionError):
        fleet.claim("c")
    fleet.store.revoke(fleet.leases["b"])
    fleet.must(Transaction((), (Put(KEYS.host("b"), host("b").to_bytes()),)))  # its daemon is back, with another lease
    fleet.claim("c")
    assert not fleet.store.transact(late.transaction).succeeded
    fleet.run()
    assert fleet.phase() is JobPhase.DONE
    assert all(step.attempt == 1 for step in fleet.mirror.steps["j1"].values()), "nothing was done twice"


def test_a_change_that_was_made_already_is_not_made_again() -> None:
    """Its answer was lost, and it is sent once more."""
    fleet = Fleet([host("a"), host("b")], guests=1)
    fleet.start()
    while isinstance(found := next_work(fleet.mirror, "j1", fleet.now_ns), Work):
        fleet.must(found.transaction)
        revision = fleet.store.revision
        assert not fleet.store.transact(found.transaction).succeeded
        assert fleet.store.revision == revision


def test_a_cancelled_job_begins_nothing_more_and_ends_when_its_attempts_have() -> None:
    fleet = Fleet([host("a"), host("b")], guests=4)
    fleet.start()
    fleet.work()
    running = fleet.begin()
    fleet.must(changes.change_job(fleet.mirror, "j1", JobEvent.CANCEL, fleet.now_ns))
    fleet.work()
    assert fleet.phase() is JobPhase.CANCELLING
    assert fleet.begin() == running
    fleet.end(running[0], StepEvent.CANCELLED)
    fleet.end(running[1], StepEvent.COMPLETED)
    fleet.work()
    assert fleet.phase() is JobPhase.CANCELLED
    assert Counter(step.state for step in fleet.mirror.steps["j1"].values()) == {
        StepState.CANCELLED: 3,
        StepState.DONE: 1,
    }
    assert all(not slots.outbound and not slots.arriving for slots in fleet.mirror.slots.values())


def test_a_job_that_is_cancelled_before_its_guests_were_planned_is_cancelled_and_can_be_resumed() -> None:
    fleet = Fleet([host("a"), host("b")], guests=3)
    fleet.start()
    fleet.must(changes.change_job(fleet.mirror, "j1", JobEvent.CANCEL, fleet.now_ns))
    fleet.work()
    assert fleet.phase() is JobPhase.CANCELLED
    assert fleet.mirror.states["j1"].reason == "3 of 3 guests did not move."
    assert not fleet.mirror.steps["j1"]
    for work in list(resume_steps(fleet.mirror, "j1", fleet.now_ns)):
        fleet.must(work.transaction)
    fleet.run()
    assert fleet.phase() is JobPhase.DONE
    assert not fleet.mirror.by_owner["a"]


def test_two_jobs_that_overlap_keep_slots_and_memory_and_move_no_guest_twice() -> None:
    fleet = Fleet([host("a"), host("b", memory_bytes=8 * GIB), host("c", memory_bytes=8 * GIB)], guests=4)
    fleet.start(worker="b")
    guests = tuple(fleet.mirror.guests)
    fleet.must(changes.create_job(fleet.mirror, spec(job="j2", by="another", kind=JobKind.MIGRATE, guests=guests)))
    fleet.must(changes.claim_job(fleet.mirror, "j2", "c", fleet.leases["c"], 0))
    for _ in range(40):
        for job in ("j1", "j2"):
            if isinstance(found := next_work(fleet.mirror, job, fleet.now_ns), Work):
                fleet.must(found.transaction)
        for name, slots in fleet.mirror.slots.items():
            assert fleet.mirror.hosts[name].used_bytes + slots.inbound_bytes <= fleet.mirror.hosts[name].memory_bytes
            assert len(slots.outbound) <= 2
            assert len(slots.arriving) <= 2
        for wanted, step in list(steps_here(fleet.mirror, "a")):
            if step.state is StepState.RESERVED:
                fleet.must(begin(fleet.mirror, wanted, step, "m", fleet.now_ns).transaction)
            elif step.destination is not None:
                fleet.must(Transaction((), (_owned(step.guest, step.destination),)))
                fleet.must(ended(fleet.mirror, wanted, step, StepEvent.COMPLETED, fleet.now_ns).transaction)
    assert {state.phase for state in fleet.mirror.states.values()} == {JobPhase.DONE}
    assert not fleet.mirror.by_owner["a"]
    for name in ("g0", "g1", "g2", "g3"):
        assert sum(fleet.mirror.steps[job][name].migration_id is not None for job in ("j1", "j2")) == 1


@pytest.mark.parametrize("deadline_ns", [0, 60 * S])
def test_a_host_is_not_empty_while_a_guest_is_on_its_way_to_it(deadline_ns: int) -> None:
    """It was promised before the host was cordoned, and would be left there by a job that is over."""
    fleet = Fleet([host("a"), host("b"), host("c")], guests=1)
    fleet.start(to=("b",))
    fleet.work()
    assert fleet.begin() == ["g0"]
    fleet.must(changes.create_job(fleet.mirror, spec(job="j2", host="b", deadline_ns=deadline_ns)))
    fleet.must(changes.claim_job(fleet.mirror, "j2", "c", fleet.leases["c"], 0))
    assert next_work(fleet.mirror, "j2", S) == Wait(deadline_ns or None)
    if deadline_ns:
        late = next_work(fleet.mirror, "j2", deadline_ns)
        assert isinstance(late, Work)
        fleet.must(late.transaction)
        assert fleet.mirror.states["j2"].phase is JobPhase.FAILED
        assert fleet.mirror.states["j2"].reason == "g0 may still come to b by another job."
        return
    fleet.end("g0")
    found = next_work(fleet.mirror, "j2", S)
    assert isinstance(found, Work)
    assert found.what == "plan 1 guests"


@pytest.mark.parametrize("cordoned_before", [False, True])
def test_of_two_who_empty_a_host_at_once_one_is_told_of_the_other(cordoned_before: bool) -> None:
    fleet = Fleet([host("a"), host("b")], guests=1)
    if cordoned_before:
        fleet.must(changes.cordon(fleet.mirror, "a", "me", 0, "a broken fan"))
    first, second = (changes.create_job(fleet.mirror, spec(job=job)) for job in ("j1", "j2"))
    fleet.must(first)
    assert not fleet.store.transact(second).succeeded
    assert set(fleet.mirror.specs) == {"j1"}
    with pytest.raises(JobError, match="The host a is being emptied already, by job j1"):
        changes.create_job(fleet.mirror, spec(job="j2"))
    if cordoned_before:
        assert fleet.mirror.cordons["a"].reason == "a broken fan"


def test_a_job_that_missed_its_deadline_can_be_resumed_and_has_its_host_cordoned_again() -> None:
    fleet = Fleet([host("a"), host("b", max_inbound=0)], guests=1)
    fleet.start(deadline_ns=30 * S)
    fleet.now_ns = 100 * S
    fleet.work()
    assert fleet.phase() is JobPhase.FAILED
    fleet.must(changes.uncordon(fleet.mirror, "a"))
    fleet.must(changes.publish(fleet.mirror, host("b"), fleet.leases["b"], ()))
    for work in list(resume_steps(fleet.mirror, "j1", fleet.now_ns)):
        fleet.must(work.transaction)
    assert "a" in fleet.mirror.cordons
    fleet.run()
    assert fleet.phase() is JobPhase.DONE


def test_a_job_is_not_resumed_beside_another_one_that_empties_its_host() -> None:
    fleet = Fleet([host("a"), host("b")], guests=1)
    fleet.start()
    fleet.work()
    fleet.must(changes.change_job(fleet.mirror, "j1", JobEvent.CANCEL, fleet.now_ns))
    fleet.work()
    fleet.must(changes.create_job(fleet.mirror, spec(job="j2")))
    with pytest.raises(JobError, match="being emptied already, by job j2"):
        next(resume_steps(fleet.mirror, "j1", fleet.now_ns))
    assert fleet.step("g0").state is StepState.CANCELLED


def test_a_guest_that_is_on_its_host_again_is_moved_again() -> None:
    """Moved back by hand, or another one of its name: the job would be done, and its host not empty."""
    fleet = Fleet([host("a"), host("b")], guests=3)
    fleet.start(max_parallel=1)
    fleet.work()
    (first,) = fleet.begin()
    fleet.end(first)
    fleet.add(first, "a")
    fleet.run()
    assert fleet.phase() is JobPhase.DONE
    assert not fleet.mirror.by_owner["a"]
    assert fleet.step(first).attempt == 1, "counted anew"


def test_a_host_is_not_empty_while_its_guest_is_not_settled_elsewhere_or_one_comes_by_hand() -> None:
    fleet = Fleet([host("a", cordon_seen=False), host("b")], guests=0)
    fleet.must(changes.create_job(fleet.mirror, spec(deadline_ns=60 * S)))
    fleet.claim("b")

    def tell(**fields: Any) -> None:
        fleet.must(changes.publish(fleet.mirror, host("a", **fields), fleet.leases["a"], ()))

    def reason() -> str:
        found = next_work(fleet.mirror, "j1", 60 * S)
        assert isinstance(found, Work)
        state = next(one for one in found.transaction.then if isinstance(one, Put))
        return JobState.model_validate_json(state.value).reason

    assert fleet.work() == Wait(60 * S)
    assert reason() == "a has not said yet that it takes no guests in."
    tell(cordon_seen=True, inbound=1)
    assert fleet.work() == Wait(60 * S)
    assert reason() == "migrations to a that were begun by hand are under way."
    unsettled = Ownership(owner="b", epoch=3, previous="a", migration_id="m")
    fleet.must(Transaction((), (Put(KEYS.owner("x"), unsettled.to_bytes()),)))
    tell(cordon_seen=True)
    assert fleet.work() == Wait(60 * S)
    assert reason() == "x was handed over by a and does not surely run elsewhere."
    waiting = "It waits: x was handed over by a and does not surely run elsewhere."
    assert job_view(fleet.mirror, "j1", S)["reason"] == waiting
    fleet.must(Transaction((), (_owned("x", "b"),)))
    fleet.work()
    assert fleet.phase() is JobPhase.DONE


def test_a_decision_on_old_news_changes_nothing() -> None:
    """Between decision and transaction the destination is cordoned, is fuller, or the guest has another owner."""
    for key, value in (
        (KEYS.cordon("b"), b"{}"),
        (KEYS.fence("b"), b"{}"),
        (KEYS.fence("a"), b"{}"),
        (KEYS.host("b"), host("b", used_bytes=GIB).to_bytes()),
        (KEYS.slots_of("b"), HostSlots().to_bytes()),
        (KEYS.owner("g0"), Ownership(owner="c", epoch=2).to_bytes()),
    ):
        fleet = Fleet([host("a"), host("b")], guests=1)
        fleet.start()
        plan = next_work(fleet.mirror, "j1", 0)
        assert isinstance(plan, Work)
        fleet.must(plan.transaction)
        reserve = next_work(fleet.mirror, "j1", 0)
        assert isinstance(reserve, Work)
        assert reserve.what == "g0: reserve"
        fleet.must(Transaction((), (Put(key, value),)))
        assert not fleet.store.transact(reserve.transaction).succeeded, key


def test_guests_that_went_or_came_by_hand_are_noticed() -> None:
    fleet = Fleet([host("a"), host("b")], guests=2)
    fleet.start(max_parallel=1)
    fleet.work()
    fleet.must(Transaction((), (_owned("g1", "b"),)))
    fleet.add("late", "a")
    fleet.run()
    assert fleet.phase() is JobPhase.DONE
    assert fleet.step("g1").reason == "The guest is not on a any more: b owns it."
    assert fleet.step("late").attempt == 1


def test_a_source_that_was_fenced_ends_its_steps() -> None:
    fleet = Fleet([host("a"), host("b")], guests=3)
    fleet.start()
    fleet.work()
    fleet.begin()
    fleet.must(changes.fence(fleet.mirror, "a", "me", 0))
    fleet.work()
    assert fleet.phase() is JobPhase.FAILED
    assert {step.reason for step in fleet.mirror.steps["j1"].values()} == {
        "The host a was fenced; its guests can be started elsewhere."
    }
    assert all(slots == HostSlots() for slots in fleet.mirror.slots.values())


def test_nothing_begins_after_the_deadline() -> None:
    fleet = Fleet([host("a"), host("b")], guests=4)
    fleet.start(deadline_ns=30 * S)
    fleet.work()
    running = fleet.begin()
    fleet.now_ns = 30 * S
    for name in running:
        fleet.end(name)
    fleet.work()
    assert fleet.phase() is JobPhase.FAILED
    left = [step for step in fleet.mirror.steps["j1"].values() if step.state is StepState.FAILED]
    assert len(left) == 2
    assert left[0].reason == f"The job's deadline passed before {left[0].guest} could begin."


def test_a_guest_that_no_host_can_take_is_tried_again_and_then_given_up() -> None:
    fleet = Fleet([host("a"), host("b", memory_bytes=GIB)], guests=1)
    fleet.start(max_attempts=3)
    waits = []
    while (wait := fleet.work()).until_utc_ns is not None:
        waits.append(wait.until_utc_ns - fleet.now_ns)
        fleet.now_ns = wait.until_utc_ns
    assert waits == [back_off_ns(1), back_off_ns(2)]
    assert fleet.phase() is JobPhase.FAILED
    assert fleet.step("g0").reason == "No other host can take g0: 1 with less than 4GiB free."


def test_one_guest_moves_and_one_that_is_not_there_fails() -> None:
    fleet = Fleet([host("a"), host("b")], guests=2)
    fleet.start(kind=JobKind.MIGRATE, guests=("g1",))
    fleet.run()
    assert fleet.phase() is JobPhase.DONE
    assert fleet.mirror.by_owner["a"] == {"g0"}
    assert "a" not in fleet.mirror.cordons
    fleet = Fleet([host("a"), host("b")], guests=0)
    fleet.start(kind=JobKind.MIGRATE, guests=("x",))
    fleet.work()
    assert fleet.phase() is JobPhase.FAILED
    assert fleet.mirror.states["j1"].reason == "The host a owns no guest named x."


def test_an_empty_host_is_emptied_at_once() -> None:
    fleet = Fleet([host("a"), host("b")], guests=0)
    fleet.start()
    fleet.work()
    assert fleet.phase() is JobPhase.DONE


def test_cordon_and_fence_are_taken_back() -> None:
    fleet = Fleet([host("a"), host("b")])
    fleet.must(changes.cordon(fleet.mirror, "b", "me", 0))
    fleet.must(changes.fence(fleet.mirror, "b", "me", 0))
    assert "b" in fleet.mirror.cordons
    assert "b" in fleet.mirror.fences
    fleet.must(changes.uncordon(fleet.mirror, "b"))
    fleet.must(changes.unfence(fleet.mirror, "b"))
    assert "b" not in fleet.mirror.cordons
    assert "b" not in fleet.mirror.fences


def test_every_state_leads_to_an_end_and_what_is_not_in_the_table_is_an_error() -> None:
    reached = {StepState.DONE}
    while len(before := set(reached)) < len(
        reached := before | {state for (state, _), (after, _) in STEPS.items() if after in before}
    ):
        pass
    assert reached == set(StepState)
    step = JobStep(guest="g", source="a", memory_bytes=1, state=StepState.DONE)
    with pytest.raises(JobError, match="The step of g is done and cannot take reserve"):
        step_after(step, StepEvent.RESERVE, 0)
    assert all((JobPhase.DONE, event) not in JOBS for event in JobEvent)


def test_a_key_that_is_broken_is_told_and_leaves_the_rest_alone() -> None:
    fleet = Fleet([host("a"), host("b")], guests=1)
    fleet.must(Transaction((), (Put(KEYS.host("bad"), b"{}"), Put(f"{KEYS.prefix}unknown/x", b"?"))))
    assert list(fleet.mirror.problems) == [KEYS.host("bad")]
    fleet.must(Transaction((), (Delete(KEYS.host("bad")),)))
    assert not fleet.mirror.problems
    assert set(fleet.mirror.hosts) == {"a", "b"}
