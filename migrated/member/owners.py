"""The owner keys of this host's guests (``migrated.fleet.ownership``): claimed when a guest begins here, carried over
in a hand-over, settled when it runs at its new host, let go of when it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

import structlog

from migrated.base.errors import DocumentError
from migrated.base.tasks import TaskSet
from migrated.control.operations import OperationError
from migrated.fleet.model import Ownership, parse
from migrated.fleet.ownership import (
    NotTheOwnerError,
    change_owner,
    given_back,
    reclaimed,
    refusal_of,
    settled,
    taken,
    transferred,
)
from migrated.fleet.store import Delete, Exists, NameTakenError, StoreError, Transaction, Unchanged
from migrated.member.follower import Follower
from migrated.member.identity import Identity
from migrated.source.target import HERE
from protocol.effects import DONE, Outcome, Result, failed

log = structlog.get_logger()

_MIGRATIONS_KEPT: Final = 256
_AGAIN_S: Final = 0.5
_TOKEN_S: Final = 0.05
"""Longest wait for the token of a guest that stands still."""


class _OddKeyError(StoreError):
    """What an owner key holds is no owner: nobody can say who has the guest."""


class _Begun(NamedTuple):
    """A hand-over that may come: the owner key as this host wrote it last, and the host that shall be next."""

    destination: str
    known: Ownership
    revision: int


class Owners:
    """Ownership of this host's guests in the fleet (``migrated.fleet.ownership.Keeper``).

    Args:
        follower: the mirror.
        host: this host's name in the fleet.
        identity: whether that is its own.
        holds: whether a guest of a name is here or on its way here.

    Attributes:
        strangers: for each guest that is here and belongs to another host, a sentence.
        started: guests that were claimed because this daemon starts them.
    """

    def __init__(self, follower: Follower, host: str, identity: Identity, holds: Callable[[str], bool]) -> None:
        self.strangers: dict[str, str] = {}
        self.started: set[str] = set()
        self._follower = follower
        self._host: Final = host
        self._identity = identity
        self._holds = holds
        self._begun: dict[str, _Begun] = {}
        """By migration id."""
        self._tokens: dict[str, int] = {}
        """By guest: the last one that this host had, which is too old once another host is the owner."""
        self._releasing: dict[str, asyncio.Task[None]] = {}
        self._tasks = TaskSet()

    async def close(self) -> None:
        """Stop what still waits for the store."""
        await self._tasks.stop()

    # Section: guests that begin and end here

    async def claim_new(self, guest: str) -> None:
        """Become the owner of a guest before it is started here.

        Raises:
            OperationError: it may run elsewhere, or nobody can say.
        """
        self.started.add(guest)
        if (releasing := self._releasing.pop(guest, None)) is not None:
            releasing.cancel()  # what it has sent is void once the claim is there, and no hindrance before
            await asyncio.wait([releasing])
        try:
            await self._check_name()
            refusal = await self._claim(guest, new=True) and await self._claim(guest, new=True)
        except NameTakenError as error:
            raise OperationError(f"Guest {guest!r} is not started here. {error}") from error
        except StoreError as error:
            self.release(guest)  # it may have been carried out
            raise OperationError(
                f"Guest {guest!r} is not started: only the fleet's store can say that no other host has it. {error}"
            ) from error
        if refusal is not None:
            raise OperationError(f"Guest {guest!r} is not started here. {refusal}")

    async def claim_found(self, guest: str) -> bool:
        """Become the owner of a guest that is here and has no owner, or settle that it came here. Returns whether this
        host owns it.

        Raises:
            StoreError: the store did not say.
        """
        known = self._follower.mirror.owners.get(guest)
        if known is not None and known.owner == self._host:
            self.strangers.pop(guest, None)
            if known.previous is not None and known.migration_id is not None:
                await self._write(guest, settled(known, self._host, known.migration_id), by=None)
            return True
        if known is not None and known.previous == self._host:
            return False  # handed over, and not known yet to run there
        refusal = await self._claim(guest)
        if refusal is None:
            self.strangers.pop(guest, None)
        elif guest not in self.strangers:
            log.error("a guest runs here that belongs to another host", guest=guest, reason=refusal)
            self.strangers[guest] = refusal
        return refusal is None

    async def give_back(self, guest: str, migration_id: str) -> None:
        """Make the host that a guest came from its owner again: the migration was discarded here.

        Raises:
            StoreError: the store did not answer.
        """
        known = self._follower.mirror.owners.get(guest)
        if known is not None:
            with contextlib.suppress(NotTheOwnerError):  # its source was faster
                await self._write(guest, given_back(known, self._host, migration_id), by=None)

    def release(self, guest: str) -> None:
        """Forget a guest that was this host's and has ended here, as soon as the store can be told."""
        self.strangers.pop(guest, None)
        self._tokens.pop(guest, None)
        self.started.discard(guest)
        task = self._releasing[guest] = self._tasks.start(self._release(guest))
        task.add_done_callback(partial(self._released, guest))

    def _released(self, guest: str, task: asyncio.Task[None]) -> None:
        if self._releasing.get(guest) is task:
            del self._releasing[guest]

    async def _release(self, guest: str) -> None:
        keys = self._follower.mirror.keys
        while True:
            try:
                known, revision = await self._look(guest)
                if known is None or self._host not in (known.owner, known.previous):
                    return
                if self._holds(guest):
                    return  # another one of the name came while the store was away, and the key is its own
                deletes = (Delete(keys.owner(guest)), Delete(keys.guest(guest)))
                unchanged = Unchanged(keys.owner(guest), revision)
                if (await self._follower.transact(Transaction((unchanged,), deletes))).succeeded:
                    return
            except _OddKeyError as error:
                log.error("the owner of a guest that has ended cannot be deleted", guest=guest, reason=str(error))
                return
            except StoreError as error:
                self._follower.failed(error)
            await self._follower.change(_AGAIN_S)

    async def _claim(self, guest: str, *, new: bool = False) -> str | None:
        """Own a guest that has no owner, or whose hosts are fenced. Returns why that cannot be, None when it is so.

        Args:
            new: it shall be started here, and is not the one that a hand-over brought: whatever the key says, a host
                that still has that one may run it again.
        """
        mirror = self._follower.mirror
        try:
            known, revision = await self._look(guest)
        except _OddKeyError as error:
            return str(error)
        compares: tuple[Exists, ...] = ()
        if known is None:
            wanted = Ownership(owner=self._host, epoch=1)
        elif known.owner == self._host and (known.previous is None or not new):
            wanted = reclaimed(known, self._host)
        else:
            holders = [host for host in (known.owner, known.previous) if host and (host != self._host or not new)]
            try:
                wanted = taken(known, self._host, {*mirror.fences, *({self._host} if new else ())})
            except NotTheOwnerError as error:
                return str(error)
            compares = tuple(Exists(mirror.keys.fence(host)) for host in holders)
        change = change_owner(mirror.keys, guest, revision, wanted, by=self._host)
        answer = await self._follower.transact(
            Transaction((*change.compares, *compares), change.then, change.otherwise)
        )
        return None if answer.succeeded else refusal_of(answer, guest, self._host)

    # Section: hand-overs

    async def begin(self, guest: str, uri: str, migration_id: str) -> str | None:
        """Make ready to hand a guest over. Returns why that cannot be, a sentence; None when it can."""
        hosts = [self._host] if uri == HERE else self._hosts_at(uri)
        if len(hosts) > 1:
            return (
                f"Several hosts say that they take guests at {uri}: {', '.join(hosts)}. Nobody can say which of them "
                "would get the guest; set [fleet] address to where each is reached."
            )
        destination = hosts[0] if hosts and (uri == HERE or hosts[0] != self._host) else None
        if destination in self._follower.mirror.fences:
            return f"The host {destination} is fenced: no guest is handed to it."
        if destination != self._host and destination in self._follower.mirror.cordons:
            return _cordoned(destination)
        if destination is None:
            return f"No host of the fleet takes guests at {uri}; `migratectl hosts` shows where they do."
        try:
            await self._check_name()
            known, revision = await self._look(guest)
            wanted = self._own(known)
            change = change_owner(self._follower.mirror.keys, guest, revision, wanted, by=self._host)
            answer = await self._follower.transact(change)
        except (StoreError, NotTheOwnerError) as error:
            return str(error)
        if not answer.succeeded:
            return refusal_of(answer, guest, self._host)
        self._begun[migration_id] = _Begun(destination, wanted, answer.revision)
        while len(self._begun) > _MIGRATIONS_KEPT:
            del self._begun[next(iter(self._begun))]
        return None

    async def transfer(self, guest: str, migration_id: str, within_ns: int) -> Outcome:
        """As ``Keeper.transfer``."""
        begun = self._begun.pop(migration_id, None)
        if begun is None:
            return failed("this daemon has not begun the migration in the fleet's store")
        if begun.destination == self._host:
            return DONE
        wanted = transferred(begun.known, begun.destination, migration_id)
        change = change_owner(self._follower.mirror.keys, guest, begun.revision, wanted, by=self._host)
        return await self._change(guest, change, within_ns / 1e9)

    async def token(self, guest: str, *, arriving: bool) -> int | None:
        """As ``Keeper.token``."""
        if arriving and not self._is_owner(guest):
            with contextlib.suppress(TimeoutError, StoreError):
                async with asyncio.timeout(_TOKEN_S):
                    now, _ = await self._look(guest)
                if now is not None and now.owner != self._host:
                    raise NotTheOwnerError(f"The guest belongs to {now.owner} now, not to {self._host}.")
        known, revision = self._follower.mirror.owners.get(guest), self._revision(guest)
        if self._is_owner(guest) or (not arriving and known is not None and known.previous == self._host):
            self._tokens[guest] = revision
            return revision
        return None if arriving else self._tokens.get(guest)

    def why_not_here(self, guest: str) -> str | None:
        """As ``Keeper.why_not_here``."""
        mirror = self._follower.mirror
        if self._host not in mirror.cordons or any(one.guest == guest for one in mirror.slots_of(self._host).arriving):
            return None
        return _cordoned(self._host)

    def _is_owner(self, guest: str) -> bool:
        known = self._follower.mirror.owners.get(guest)
        return known is not None and known.owner == self._host

    def _revision(self, guest: str) -> int:
        """The revision of a guest's owner key, as the mirror has it."""
        mirror = self._follower.mirror
        return mirror.unchanged(mirror.keys.owner(guest)).revision

    async def confirm(self, guest: str) -> Outcome:
        """As ``Keeper.confirm``."""
        try:
            await self._check_name()
            known, revision = await self._look(guest)
            wanted = self._own(known)
        except NotTheOwnerError as error:
            return Outcome(Result.REFUSED, str(error))
        except StoreError as error:
            return failed(error)
        return await self._change(
            guest, change_owner(self._follower.mirror.keys, guest, revision, wanted, by=self._host), None
        )

    def reclaim(self, guest: str) -> None:
        """As ``Keeper.reclaim``."""
        self._tasks.start(self._reclaim(guest))

    async def _reclaim(self, guest: str) -> None:
        while True:
            try:
                known, revision = await self._look(guest)
                if known is None:
                    return  # the guest has ended meanwhile
                change = change_owner(self._follower.mirror.keys, guest, revision, self._own(known), by=None)
                if (await self._follower.transact(change)).succeeded:
                    return
            except (NotTheOwnerError, _OddKeyError) as error:
                log.error("the guest was taken back here, and the store gave it away", guest=guest, reason=str(error))
                return
            except StoreError as error:
                self._follower.failed(error)
            await self._follower.change(_AGAIN_S)

    # Section: the store

    async def _check_name(self) -> None:
        """Make sure that what the keys say of this host's name is said of this host.

        Raises:
            NameTakenError: another daemon is in the fleet under that name.
            StoreError: the store does not say.
        """
        await self._follower.look(self._follower.mirror.keys.host(self._host))
        if (refusal := self._identity.stranger(self._follower.mirror)) is not None:
            raise NameTakenError(refusal)

    async def _look(self, guest: str) -> tuple[Ownership | None, int]:
        """The owner of a guest as the store has it now, and the revision of that.

        Raises:
            StoreError: it does not say.
            _OddKeyError: what it holds is no owner.
        """
        key = self._follower.mirror.keys.owner(guest)
        entry = await self._follower.look(key)
        try:
            return (None, 0) if entry is None else (parse(Ownership, key, entry.value), entry.revision)
        except DocumentError as error:
            raise _OddKeyError(str(error)) from error

    async def _write(self, guest: str, wanted: Ownership, *, by: str | None) -> None:
        """Write a change that was decided on what the mirror has; somebody else's change makes it void."""
        change = change_owner(self._follower.mirror.keys, guest, self._revision(guest), wanted, by=by)
        await self._follower.transact(change)

    async def _change(self, guest: str, change: Transaction, within_s: float | None) -> Outcome:
        try:
            async with asyncio.timeout(within_s):
                answer = await self._follower.transact(change)
        except TimeoutError:
            return failed("the fleet's store did not say in time who owns the guest")
        except StoreError as error:
            return failed(error)
        if answer.succeeded:
            return DONE
        return Outcome(Result.REFUSED, refusal_of(answer, guest, self._host))

    def _own(self, known: Ownership | None) -> Ownership:
        """The owner key that says, or says again, that a guest is this host's.

        Raises:
            NotTheOwnerError: it belongs to another host.
        """
        return Ownership(owner=self._host, epoch=1) if known is None else reclaimed(known, self._host)

    def _hosts_at(self, uri: str) -> list[str]:
        """The names of the hosts that say that they take guests at an address."""
        return sorted(host.name for host in self._follower.mirror.hosts.values() if host.address == uri)


def _cordoned(host: str) -> str:
    return f"The host {host} is cordoned: it takes no guests in until `migratectl uncordon`."
