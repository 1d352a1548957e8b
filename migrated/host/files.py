"""The saves and restores of this host: begun, watched, cancelled; and what a restart finds of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Final, TypeAlias

import structlog
from pydantic import TypeAdapter, ValidationError

from migrated.base.errors import MigrationError, VmmError
from migrated.base.tasks import TaskSet
from migrated.control.operations import OperationError
from migrated.environment import Environment
from migrated.guests.registry import Guest, name_at
from migrated.guests.reservation import Reservation
from migrated.host.commands import asked
from migrated.observe.progress import Progress
from migrated.savefile.desk import SaveOrder
from migrated.savefile.reader import SavedFile
from migrated.savefile.restoring import Restore
from migrated.savefile.saving import Save
from migrated.savefile.writer import check_target
from migrated.settings.parameters import MigrationParameters
from migrated.state.save_notes import SaveNote, SaveNotes
from protocol import messages
from protocol.effects import Result
from protocol.errors import RemoteProtocolError
from protocol.guest import GuestName
from protocol.savefile import PREAMBLE_BYTES, Preamble
from protocol.wrong_values import first_fault

log = structlog.get_logger()

FileAttempt: TypeAlias = Save | Restore

_SHOWN_KEPT: Final = 256
"""Guests whose last attempt is still shown after its end."""
_ASK_OWNERSHIP_S: Final = 2.0
"""Time between two questions to the fleet's store."""
_NAME: Final[TypeAdapter[str]] = TypeAdapter(GuestName)


class FileAttempts:
    """All attempts to save or to restore a guest.

    Args:
        env: the daemon.
        tasks: where they run.
        claim: called before a guest is restored here, in case it has an owner in the fleet; raises OperationError.
        let_go: called when a guest was put away, or could not be restored.
    """

    def __init__(
        self,
        env: Environment,
        tasks: TaskSet,
        claim: Callable[[str], Awaitable[None]],
        let_go: Callable[[str], None],
    ) -> None:
        self._env = env
        self._tasks = tasks
        self._claim = claim
        self._let_go = let_go
        self._notes = SaveNotes(env.config.state.directory)
        self._unsettled: dict[str, SaveNote] = {}
        """Saves of the last daemon whose guest has not answered yet, by the guest's name."""
        self._running: dict[str, FileAttempt] = {}
        """By migration id."""
        self._restoring: set[str] = set()
        """Names of guests that are being restored, from before they are claimed until they are here, or not."""
        self._last: dict[str, Callable[[], Progress]] = {}
        """Snapshots of the last one of each guest since the daemon's start."""

    # Section: attempts

    async def save(self, guest: Guest, order: SaveOrder, parameters: MigrationParameters) -> str:
        """Begin to save an idle guest. Returns the attempt's id."""
        try:
            await asyncio.to_thread(check_target, order.path, force=order.force)
        except MigrationError as error:
            raise OperationError(str(error)) from error
        status = await asked(guest.vmm.status())
        if guest.migration_id is not None:
            raise OperationError(f"guest {guest.name!r} is already being migrated (migration {guest.migration_id})")
        migration_id = secrets.token_hex(16)
        epochs = (status.epoch, self._env.journal.next_epoch(guest.name, status.epoch))
        reservation = Reservation(guest, migration_id)
        save = Save(self._env, self._notes, guest, reservation, order, parameters, migration_id, epochs)
        self._begin(save, self._run_save(save, reservation))
        return migration_id

    async def restore(
        self, path: Path, name: str | None, parameters: Callable[[str], MigrationParameters]
    ) -> tuple[str, str]:
        """Begin to restore a guest. Returns the attempt's id, and the guest's name.

        Args:
            name: that the guest gets; None for its own.
            parameters: called for those of a guest, by its name.
        """
        try:
            file = await asyncio.to_thread(SavedFile, path)
        except MigrationError as error:
            raise OperationError(str(error)) from error
        try:
            hello = file.hello
            if name is not None:
                renamed = hello.guest.model_copy(update={"name": _NAME.validate_python(name)})
                hello = hello.model_copy(update={"guest": renamed})
            restore = await self._prepared(file, hello, parameters(hello.guest.name))
        except ValidationError as error:
            file.close()
            raise OperationError(f"{name!r} is no name that a guest can have: it {first_fault(error)}") from error
        except BaseException:
            file.close()
            raise
        self._begin(restore, self._run_restore(restore))
        return restore.migration_id, restore.guest_name

    async def _prepared(self, file: SavedFile, hello: messages.Hello, parameters: MigrationParameters) -> Restore:
        """A restore whose guest has its name here for itself. A second one of the name would be its owner as well, and
        let go of the owner's key of the first when it fails.

        Raises:
            OperationError: the name is taken here, or in the fleet.
        """
        name = hello.guest.name
        if name in self._restoring:
            raise OperationError(f"a guest named {name!r} is being restored on this host; wait for its end")
        if self._env.guests.holds(name):
            raise OperationError(
                f"a guest named {name!r} is already on this host; give the restored one another name with --name"
            )
        self._restoring.add(name)
        try:
            await self._claim(name)
            return Restore(self._env, file, hello, parameters, secrets.token_hex(16))
        except BaseException:
            self._restoring.discard(name)
            raise

    def _begin(self, attempt: FileAttempt, run: Coroutine[Any, Any, None]) -> None:
        self._running[attempt.migration_id] = attempt
        self._last[attempt.guest_name] = attempt.progress
        self._tasks.start(run)

    async def _run_save(self, save: Save, reservation: Reservation) -> None:
        with reservation:
            await self._run(save)
        if self._env.guests.find(save.guest_name) is None:
            self._let_go(save.guest_name)

    async def _run_restore(self, restore: Restore) -> None:
        try:
            await self._run(restore)
        finally:
            self._restoring.discard(restore.guest_name)
            if self._env.guests.find(restore.guest_name) is None:
                self._let_go(restore.guest_name)

    async def _run(self, attempt: FileAttempt) -> None:
        try:
            await attempt.run()
        finally:
            self._running.pop(attempt.migration_id, None)
            last = attempt.progress()
            if self._last.get(attempt.guest_name) == attempt.progress:
                self._last[attempt.guest_name] = lambda: last
            ended = [name for name in self._last if all(one.guest_name != name for one in self._running.values())]
            for name in ended[: max(0, len(ended) - _SHOWN_KEPT)]:
                del self._last[name]

    async def ended(self, migration_id: str) -> dict[str, Any] | None:
        """Wait for the end of an attempt. Returns its record document, None when no such attempt is under way."""
        attempt = self._running.get(migration_id)
        if attempt is None:
            return None
        await attempt.decided.wait()
        if attempt.record is None:
            raise OperationError(f"migration {migration_id} ended without a record; the daemon's log says why")
        return attempt.record.document()

    def cancel(self, guest: str) -> None:
        """Cancel what is under way for a guest.

        Raises:
            OperationError: it is too late.
        """
        for attempt in list(self._running.values()):
            if attempt.guest_name == guest and not attempt.cancel():
                what = "the file is being completed" if isinstance(attempt, Save) else "the guest is let run"
                raise OperationError(f"this cannot be cancelled any more: {what}")

    async def cancel_all(self, reason: str, timeout_s: float) -> None:
        """Give up what can be given up, and wait for its end, at most so long."""
        under_way = list(self._running.values())
        for attempt in under_way:
            attempt.cancel(MigrationError(reason))
        if under_way:
            await asyncio.wait({asyncio.ensure_future(one.decided.wait()) for one in under_way}, timeout=timeout_s)

    def set_parameters(self, guest: str, parameters: MigrationParameters) -> None:
        """An operator changed parameters of a guest: those that count for a save under way are taken over."""
        for attempt in self._running.values():
            if isinstance(attempt, Save) and attempt.guest_name == guest:
                attempt.set_parameters(parameters)

    def guest_gone(self, guest: Guest) -> None:
        """A guest's process ended by itself."""
        if (attempt := self._running.get(guest.migration_id or "")) is not None:
            attempt.guest_gone()

    def knows(self, guest: str) -> bool:
        """Whether a guest of this name was saved or restored, or was to be, since the daemon's start."""
        return guest in self._last

    def progress(self) -> list[Progress]:
        """A snapshot of the last attempt of every guest."""
        return [progress() for progress in self._last.values()]

    # Section: after a restart

    async def recover(self) -> None:
        """Clean up after saves that the last daemon did not end: their files, and their guests."""
        for note in await asyncio.to_thread(self._notes.read):
            if self._env.guests.find_silent(note.guest) is not None:
                log.error("a save that was cut short waits for its guest to answer", guest=note.guest)
                self._unsettled[note.guest] = note
            elif self._env.keeper is None:
                await self._settle(note)
            else:  # the fleet's store may take its time
                self._tasks.start(self._settle(note))

    def guest_settled(self, place: str) -> None:
        """A guest that was silent when this daemon began has answered, or ended."""
        if (note := self._unsettled.pop(name_at(place), None)) is not None:
            self._tasks.start(self._settle(note))

    async def _settle(self, note: SaveNote) -> None:
        """Remove an unfinished file and let its guest go on; or end a guest that was saved to be ended."""
        complete = await asyncio.to_thread(_settle_files, note)
        guest = self._env.guests.find(note.guest)
        if guest is not None and guest.migration_id is None:
            try:
                with Reservation(guest, note.save_id):
                    await self._settle_guest(guest, note, complete=complete)
            except VmmError as error:
                log.error("a guest cannot go on after its save was cut short", guest=note.guest, reason=str(error))
                return
        await asyncio.to_thread(self._notes.remove, note.save_id)

    async def _settle_guest(self, guest: Guest, note: SaveNote, *, complete: bool) -> None:
        """Do with a guest what its save had left to do. One that runs is not that of the save any more."""
        status = await guest.vmm.status()
        if status.state != "paused":
            return
        if complete and note.ends_guest:
            log.warning("a guest that was saved before the daemon ended is ended", guest=note.guest)
            await self._env.guests.destroy(guest)
            self._let_go(note.guest)
        elif note.was_running and await self._is_ours(note.guest):
            log.warning("a guest whose save was cut short runs again", guest=note.guest)
            await guest.vmm.interrupt()
            await guest.vmm.resume(status.epoch)
            self._env.publish("RESUME", {"guest": note.guest})

    async def _is_ours(self, guest: str) -> bool:
        """Whether the fleet says that a guest that stood still while this daemon was dead is this host's still: asked
        until it does, as somebody may have started the guest elsewhere."""
        while (keeper := self._env.keeper) is not None:
            outcome = await keeper.confirm(guest)
            if outcome.result is Result.REFUSED:
                log.error("a guest whose save was cut short stays stopped", guest=guest, reason=outcome.reason)
                return False
            if outcome.result is not Result.FAILED:
                break
            log.warning("the fleet cannot be asked yet who owns a guest", guest=guest, reason=outcome.reason)
            await asyncio.sleep(_ASK_OWNERSHIP_S)
        return True


def _settle_files(note: SaveNote) -> bool:
    """Remove an unfinished file. Returns whether the save was complete: the file has its name."""
    with contextlib.suppress(OSError):
        Path(note.part).unlink()
        log.warning("the unfinished file of a save that was cut short is removed", file=note.part)
    try:
        fd = os.open(note.target, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return Preamble.unpack(os.read(fd, PREAMBLE_BYTES)).save_id.hex() == note.save_id
    except (OSError, RemoteProtocolError):
        return False
    finally:
        os.close(fd)
