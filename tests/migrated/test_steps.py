"""What the daemon of a source says of the end of a step's attempt, over a fake store."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from migrated.control.operations import OperationError
from migrated.fleet.model import JobState, JobStep, StepState
from migrated.fleet.store import put
from migrated.member.follower import Follower
from migrated.member.identity import Identity, boot_id
from migrated.member.local import LocalHost
from migrated.member.steps import StepRunner
from scripts.fleet.fake_store import FakeStore, FakeStoreClient
from tests.migrated.fleet.fleets import GIB, KEYS, spec

ENDED = {"outcome": "completed", "downtime": None, "reason": None}
IN_DOUBT = {"outcome": "in-doubt", "downtime": None, "reason": "COMMIT was not answered"}


class Attempt:
    """What is known of an attempt at each look: whether it is open, and its record, or why that cannot be read."""

    def __init__(self, *looks: tuple[bool, dict[str, Any] | OperationError | None]) -> None:
        self.looks = list(looks)

    def is_open(self, _migration_id: str) -> bool:
        return self.looks[0][0]

    async def outcome(self, _migration_id: str) -> dict[str, Any] | None:
        _, found = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if isinstance(found, OperationError):
            raise found
        return found


UNREADABLE = OperationError("The history cannot be read: disk I/O error.")


@pytest.mark.parametrize(
    ("attempt", "state", "reason"),
    [
        (Attempt((True, UNREADABLE), (False, ENDED)), StepState.DONE, ""),
        (Attempt((True, IN_DOUBT), (False, ENDED)), StepState.DONE, ""),
        (Attempt((False, UNREADABLE)), StepState.PLANNED, str(UNREADABLE)),
        (Attempt((False, None)), StepState.PLANNED, "The daemon ended before the migration had begun."),
        (
            Attempt((True, IN_DOUBT), (False, IN_DOUBT)),
            StepState.PLANNED,
            "It was in doubt, and the record of its end could not be kept.",
        ),
    ],
    ids=["unreadable while it is open", "in doubt, then ended", "unreadable", "never begun", "its end was not kept"],
)
async def test_a_step_ends_when_its_attempt_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempt: Attempt, state: StepState, reason: str
) -> None:
    monkeypatch.setattr("migrated.member.steps._AGAIN_S", 0.01)
    store = FakeStoreClient(FakeStore(lambda: 0))
    step = JobStep(
        guest="g", state=StepState.MIGRATING, source="a", destination="b", memory_bytes=GIB, attempt=1, migration_id="m"
    )
    await put(store, KEYS.job_spec("j1"), spec().to_bytes())
    await put(store, KEYS.job_state("j1"), JobState().to_bytes())
    await put(store, KEYS.job_step("j1", "g"), step.to_bytes())
    follower = Follower(store, KEYS)
    runner = StepRunner(
        cast("LocalHost", attempt), follower, "a", Identity("a", tmp_path, boot_id()), lambda: runner.look_again()
    )
    running = [asyncio.create_task(run()) for run in (follower.run, runner.run)]
    try:
        assert await follower.until(lambda: ended(follower) is not None, 10)
        found = ended(follower)
        assert found is not None
        assert (found.state, found.reason) == (state, reason)
    finally:
        await runner.close()
        for task in running:
            task.cancel()


def ended(follower: Follower) -> JobStep | None:
    step = follower.mirror.steps["j1"].get("g")
    return step if step is not None and step.state is not StepState.MIGRATING else None
