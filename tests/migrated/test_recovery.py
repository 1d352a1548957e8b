"""What a restarted daemon makes of each state of its journal, with real guests that ran on while it was gone.

first daemon: guests -> stops in order;  the journal of one that was killed is written;  second daemon: what it does

The module is longer than others because each state of a journal has its test here.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from migrated.link.listener import Listener, bind
from migrated.link.security import LinkSecurity
from migrated.link.sockets import Connection, ask_first, connect, send_first
from migrated.record.terms import Role
from migrated.savefile.writer import SaveWriter
from migrated.settings.config import Address, AuthorisationConfig, LimitsConfig, TlsConfig, parse_uri
from migrated.state.journal import Attempt
from migrated.state.save_notes import SaveNote, SaveNotes
from protocol import messages
from protocol.handover import Decision
from protocol.messages import Message
from protocol.savefile import Closing
from scripts.rig.processes import is_alive
from scripts.rig.waiting import until
from tests.tiny_vmm.hosts import TinyHost, leave_attempt, standing_still

BEGIN, READY, COMMIT, RUNNING, RETIRED, ABORT, DISCARD = Decision
SECURITY = LinkSecurity(TlsConfig(), AuthorisationConfig())


async def closed(host: TinyHost, migration_id: str, role: Role) -> Attempt:
    """An attempt of the journal once nothing of it is left to do."""

    async def found() -> Attempt | None:
        attempt = host.operations._env.journal.attempt(migration_id, role)
        return attempt if attempt is not None and attempt.closed else None

    return await until(f"the attempt {migration_id} is closed", found)


@asynccontextmanager
async def answering(answer: Message) -> AsyncIterator[tuple[str, list[Message]]]:
    """A destination that answers the question for an outcome. Gives its address and what it was asked."""
    asked: list[Message] = []

    async def hear(first: Message, connection: Connection) -> None:
        asked.append(first)
        await send_first(connection, answer)
        connection.wire.close()

    listener = Listener(hear, LimitsConfig(), SECURITY)
    listener.start(bind(Address("127.0.0.1", 0)))
    yield f"tcp:{listener.address}", asked
    await listener.stop()


# Section: outgoing attempts


async def paused_guest(directory: Path) -> int:
    """Leave a guest that a migration has stopped. Returns its process id."""
    async with TinyHost(directory) as host:
        pid = await host.add_guest("g1", paused=True)
        await host.let_go()
    return pid


@pytest.mark.parametrize(("was_paused", "state"), [(False, "running"), (True, "paused")])
async def test_without_commit_the_guest_is_ours_and_does_what_it_did(
    short_directory: Path, was_paused: bool, state: str
) -> None:
    pid = await paused_guest(short_directory)
    migration_id = leave_attempt(short_directory, "g1", "source", paused=was_paused)
    async with TinyHost(short_directory) as host:
        await closed(host, migration_id, "source")
        assert (await host.state_of("g1"), host.guest("g1").vmm.pid) == (state, pid)
        assert host.guest("g1").migration_id is None
        record = await host.operations.wait(migration_id)
        assert (record["outcome"], record["guest"]) == ("aborted", "g1")
        assert "the source's daemon was restarted" in record["reason"]


async def test_an_abort_is_carried_out_to_its_end(short_directory: Path) -> None:
    """Killed between the journal and the resume."""
    await paused_guest(short_directory)
    migration_id = leave_attempt(short_directory, "g1", "source", ABORT)
    async with TinyHost(short_directory) as host:
        await closed(host, migration_id, "source")
        assert await host.state_of("g1") == "running"
        assert (await host.operations.wait(migration_id))["outcome"] == "aborted"


async def test_a_retired_guest_is_ended(short_directory: Path) -> None:
    """Killed between RUNNING and the end of the copy."""
    pid = await paused_guest(short_directory)
    migration_id = leave_attempt(short_directory, "g1", "source", COMMIT, RETIRED)
    async with TinyHost(short_directory) as host:
        await closed(host, migration_id, "source")
        assert host.operations.guest_names() == []
        assert not is_alive(pid)
        assert (await host.operations.wait(migration_id))["outcome"] == "completed"


async def test_after_commit_the_destination_is_asked_and_running_retires_the_copy(short_directory: Path) -> None:
    pid = await paused_guest(short_directory)
    running = messages.Running(epoch=1, resumed_after_ns=1, sent_after_ns=2)
    async with answering(running) as (uri, asked):
        migration_id = leave_attempt(short_directory, "g1", "source", COMMIT, peer=uri)
        async with TinyHost(short_directory) as host:
            attempt = await closed(host, migration_id, "source")
            assert attempt.decisions == [COMMIT, RETIRED]
            assert host.operations.guest_names() == []
            assert not is_alive(pid)
            assert (await host.operations.wait(migration_id))["outcome"] == "completed"
    assert asked == [messages.OutcomeAsk(migration_id=migration_id, epoch=1, decision="commit")]


async def test_after_commit_a_destination_that_discarded_gives_the_guest_back(short_directory: Path) -> None:
    pid = await paused_guest(short_directory)
    async with answering(messages.Discarded(epoch=1, reason="it could not run")) as (uri, _):
        migration_id = leave_attempt(short_directory, "g1", "source", COMMIT, peer=uri)
        async with TinyHost(short_directory) as host:
            await closed(host, migration_id, "source")
            assert (await host.state_of("g1"), host.guest("g1").vmm.pid) == ("running", pid)
            record = await host.operations.wait(migration_id)
            assert record["outcome"] == "aborted"
            assert "it could not run" in record["reason"]


async def test_after_commit_without_an_answer_it_is_in_doubt_and_the_guest_stands(short_directory: Path) -> None:
    await paused_guest(short_directory)
    async with answering(messages.OutcomeOpen(epoch=1, reason="still open")) as (uri, asked):
        migration_id = leave_attempt(short_directory, "g1", "source", COMMIT, peer=uri)
        async with TinyHost(short_directory, outcome_retry_s=0.02) as host:

            async def asked_again() -> bool:
                return len(asked) > 2

            await until("the destination is asked a third time", asked_again)
            assert await host.state_of("g1") == "in-doubt"
            assert (await host.operations.wait(migration_id))["outcome"] == "in-doubt"
            await host.let_go()
    async with TinyHost(short_directory) as later:  # it is still open, for the next daemon too
        assert await later.state_of("g1") == "in-doubt"


async def test_a_guest_whose_process_is_gone_is_told_in_the_record(short_directory: Path) -> None:
    os.kill(await paused_guest(short_directory), signal.SIGKILL)
    migration_id = leave_attempt(short_directory, "g1", "source")
    async with TinyHost(short_directory) as host:
        await closed(host, migration_id, "source")
        record = await host.operations.wait(migration_id)
        assert record["outcome"] == "aborted"
        assert "the guest's process is gone too" in record["reason"]


# Section: incoming attempts


async def incoming_guest(directory: Path) -> int:
    """Leave an incoming guest. Returns its process id."""
    async with TinyHost(directory) as host:
        await host.add_guest("model", paused=True)
        model = await host.guest("model").vmm.describe()
        await host.operations.guest_destroy("model")
        incoming = await host.operations._env.guests.create_incoming(model.model_copy(update={"name": "g1"}))
        pid = incoming.vmm.pid
        await host.let_go()
    return pid


@pytest.mark.parametrize("decisions", [[], [DISCARD], [READY, DISCARD]])
async def test_before_commit_an_incoming_guest_is_discarded(short_directory: Path, decisions: list[Decision]) -> None:
    pid = await incoming_guest(short_directory)
    migration_id = leave_attempt(short_directory, "g1", "destination", *decisions)
    async with TinyHost(short_directory) as host:
        attempt = await closed(host, migration_id, "destination")
        assert attempt.decisions[-1] is DISCARD
        assert host.operations.guest_names() == []
        assert not is_alive(pid)


async def test_two_who_end_one_guest_at_once_both_see_it_gone(short_directory: Path) -> None:
    """A restarted daemon discards a guest because its attempt says so, and because it is of no use."""
    async with TinyHost(short_directory) as host:
        pid = await host.add_guest("g1")
        guests, guest = host.operations._env.guests, host.guest("g1")
        await asyncio.gather(guests.destroy(guest), guests.destroy(guest))
        assert not is_alive(pid)
        await host.add_guest("g1")  # the name is free


async def test_after_ready_a_source_that_says_nothing_ends_the_wait(short_directory: Path) -> None:
    pid = await incoming_guest(short_directory)
    migration_id = leave_attempt(short_directory, "g1", "destination", READY)
    async with TinyHost(short_directory, ready_timeout_s=0.05) as host:
        attempt = await closed(host, migration_id, "destination")
        assert attempt.decisions == [READY, DISCARD]
        assert not is_alive(pid)


@pytest.mark.parametrize(
    ("decision", "answer", "decisions", "state"),
    [
        ("commit", messages.Running, [READY, COMMIT, RUNNING], "running"),
        ("abort", messages.Discarded, [READY, DISCARD], None),
    ],
)
async def test_after_ready_the_source_decides_over_a_fresh_connection(
    short_directory: Path, decision: str, answer: type[Message], decisions: list[Decision], state: str | None
) -> None:
    pid = await incoming_guest(short_directory)
    migration_id = leave_attempt(short_directory, "g1", "destination", READY)
    async with TinyHost(short_directory, ready_timeout_s=600.0) as host:
        assert await host.state_of("g1") == "incoming"
        ask = messages.OutcomeAsk.model_validate({"migration_id": migration_id, "epoch": 1, "decision": decision})
        connection = await connect(parse_uri(host.uri), 30.0, 30.0, SECURITY)
        assert isinstance(await ask_first(connection, ask, 30.0), answer)
        connection.wire.close()
        assert (await closed(host, migration_id, "destination")).decisions == decisions
        assert is_alive(pid) is (state is not None)
        if state is not None:
            assert await host.state_of("g1") == state
            assert host.operations._env.run_marks.ran("g1", 1)


async def test_after_commit_the_guest_is_run(short_directory: Path) -> None:
    """Killed between the journal and the resume."""
    pid = await incoming_guest(short_directory)
    migration_id = leave_attempt(short_directory, "g1", "destination", READY, COMMIT)
    async with TinyHost(short_directory) as host:
        attempt = await closed(host, migration_id, "destination")
        assert attempt.decisions == [READY, COMMIT, RUNNING]
        assert (await host.state_of("g1"), host.guest("g1").vmm.pid) == ("running", pid)
        assert host.guest("g1").migration_id is None


async def test_a_guest_that_arrives_paused_stays_so(short_directory: Path) -> None:
    await incoming_guest(short_directory)
    migration_id = leave_attempt(short_directory, "g1", "destination", READY, COMMIT, paused=True)
    async with TinyHost(short_directory) as host:
        await closed(host, migration_id, "destination")
        assert await host.state_of("g1") == "paused"


async def test_after_commit_a_guest_that_is_gone_and_never_ran_is_given_back(short_directory: Path) -> None:
    os.kill(await incoming_guest(short_directory), signal.SIGKILL)
    migration_id = leave_attempt(short_directory, "g1", "destination", READY, COMMIT)
    async with TinyHost(short_directory) as host:
        assert (await closed(host, migration_id, "destination")).decisions == [READY, COMMIT, DISCARD]


async def test_after_commit_a_guest_that_is_gone_and_may_have_run_is_not_given_back(short_directory: Path) -> None:
    os.kill(await incoming_guest(short_directory), signal.SIGKILL)
    async with TinyHost(short_directory) as host:
        host.operations._env.run_marks.write("g1", 1)
        await host.let_go()
    migration_id = leave_attempt(short_directory, "g1", "destination", READY, COMMIT)
    async with TinyHost(short_directory) as host:
        assert (await closed(host, migration_id, "destination")).decisions == [READY, COMMIT, RUNNING]


async def test_a_journal_of_an_older_version_names_no_driver(short_directory: Path) -> None:
    """The guest that is there tells its driver itself."""
    pid = await incoming_guest(short_directory)
    migration_id = leave_attempt(short_directory, "g1", "destination", READY, COMMIT, driver=None)
    async with TinyHost(short_directory) as host:
        assert (await closed(host, migration_id, "destination")).decisions == [READY, COMMIT, RUNNING]
        assert (await host.state_of("g1"), host.guest("g1").vmm.pid) == ("running", pid)


@pytest.mark.parametrize(("ran", "end"), [("by the mark", RUNNING), ("by a VMM's log", RUNNING), ("never", DISCARD)])
async def test_without_driver_and_guest_the_mark_and_every_run_log_are_asked(
    short_directory: Path, ran: str, end: Decision
) -> None:
    os.kill(await incoming_guest(short_directory), signal.SIGKILL)
    async with TinyHost(short_directory) as host:
        if ran == "by the mark":
            host.operations._env.run_marks.write("g1", 1)
        await host.let_go()
    if ran == "by a VMM's log":
        (short_directory / "guests" / "g1.runlog").write_text('{"event": "run", "epoch": 1}\n', encoding="utf-8")
    migration_id = leave_attempt(short_directory, "g1", "destination", READY, COMMIT, driver=None)
    async with TinyHost(short_directory) as host:
        assert (await closed(host, migration_id, "destination")).decisions == [READY, COMMIT, end]


# Section: which attempts are taken up


async def test_an_incoming_guest_that_no_attempt_knows_is_discarded(short_directory: Path) -> None:
    pid = await incoming_guest(short_directory)
    async with TinyHost(short_directory) as host:
        assert host.operations.guest_names() == []
        assert not is_alive(pid)


async def test_an_attempt_that_a_later_one_overtook_does_not_touch_the_guest(short_directory: Path) -> None:
    """The guest came back in epoch 2: what is left of epoch 1 must not retire it."""
    pid = await paused_guest(short_directory)
    older = leave_attempt(short_directory, "g1", "source", COMMIT, RETIRED, epoch=1)
    newer = leave_attempt(short_directory, "g1", "source", epoch=2)
    async with TinyHost(short_directory) as host:
        assert (await closed(host, older, "source")).decisions == [COMMIT, RETIRED]
        await closed(host, newer, "source")
        assert (await host.state_of("g1"), host.guest("g1").vmm.pid) == ("running", pid)


@pytest.mark.usefixtures("little_patience")
@pytest.mark.parametrize(
    ("role", "leave", "decided"), [("source", paused_guest, []), ("destination", incoming_guest, [DISCARD])]
)
async def test_nothing_is_decided_before_a_silent_guest_answers(
    short_directory: Path, role: Role, leave: Callable[[Path], Awaitable[int]], decided: list[Decision]
) -> None:
    pid = await leave(short_directory)
    migration_id = leave_attempt(short_directory, "g1", role)
    async with AsyncExitStack() as stack:
        with standing_still(pid):
            host = await stack.enter_async_context(TinyHost(short_directory))
            attempt = host.operations._env.journal.attempt(migration_id, role)
            assert attempt is not None
            assert (attempt.decisions, attempt.closed) == ([], False)
            (shown,) = await host.operations.guest_list()
            assert (shown["state"], shown["migration_id"]) == ("unresponsive", migration_id)
        assert (await closed(host, migration_id, role)).decisions == decided


# Section: saves


async def test_a_save_that_the_end_of_the_daemon_meets_while_it_gets_its_name_is_kept(
    short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has its name, so the guest does not run on; the next daemon ends it. This one waits no longer for it."""
    monkeypatch.setattr("migrated.host.migration_host._STOP_S", 0.01)
    begun, may_go_on = threading.Event(), threading.Event()
    publish = SaveWriter.publish

    def held(writer: SaveWriter, closing: Callable[[int, int], Closing], *, force: bool) -> None:
        begun.set()
        assert may_go_on.wait(60)
        publish(writer, closing, force=force)

    monkeypatch.setattr(SaveWriter, "publish", held)
    target = short_directory / "g1.saved"
    async with TinyHost(short_directory) as host:
        pid = await host.add_guest("g1")
        await host.operations.save("g1", str(target), ends_guest=True, force=False, overrides={})
        assert await asyncio.to_thread(begun.wait, 60)
        ending = asyncio.create_task(host.let_go())
        asyncio.get_running_loop().call_later(0.2, may_go_on.set)
        await ending
    assert is_alive(pid)
    async with TinyHost(short_directory) as later:
        assert later.operations.guest_names() == []
        assert not is_alive(pid)
        _, name = await later.operations.restore(str(target), None, {})
        assert name == "g1"

        async def runs() -> bool:
            return later.operations.guest_names() == ["g1"] and await later.state_of("g1") == "running"

        await until("the guest is restored", runs)


async def test_a_guest_that_runs_is_not_ended_for_a_note_of_an_earlier_save(short_directory: Path) -> None:
    """It was restored since, by the file that its note names."""
    target = short_directory / "g1.saved"
    async with TinyHost(short_directory) as host:
        await host.add_guest("g1")
        record = await host.operations.wait(
            await host.operations.save("g1", str(target), ends_guest=False, force=False, overrides={})
        )
        assert record["outcome"] == "completed"
        pid = host.guest("g1").vmm.pid
        await host.let_go()
    note = SaveNote(record["migration_id"], "g1", f"{target}.part", str(target), ends_guest=True, was_running=True)
    SaveNotes(short_directory / "state").write(note)
    async with TinyHost(short_directory) as later:
        assert later.guest("g1").vmm.pid == pid
        assert await later.state_of("g1") == "running"
    assert not list((short_directory / "state" / "saves").iterdir())


async def test_of_two_restores_of_one_name_at_once_the_second_is_refused_before_anything_is_claimed(
    short_directory: Path,
) -> None:
    """It would own the guest in a fleet as well, and let go of it for both when it fails."""
    target = short_directory / "g1.saved"
    async with TinyHost(short_directory) as host:
        await host.add_guest("g1")
        save = await host.operations.save("g1", str(target), ends_guest=True, force=False, overrides={})
        assert (await host.operations.wait(save))["outcome"] == "completed"
        restores = [host.operations.restore(str(target), None, {}) for _ in range(2)]
        first, second = await asyncio.gather(*restores, return_exceptions=True)
        assert "is being restored on this host" in str(second if isinstance(first, tuple) else first)
        begun = first if isinstance(first, tuple) else second
        assert isinstance(begun, tuple)
        assert (await host.operations.wait(begun[0]))["outcome"] == "completed"
        await host.operations.guest_destroy("g1")
        assert (await host.operations.restore(str(target), None, {}))[1] == "g1", "the name is free again"
