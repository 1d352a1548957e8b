"""The keys with which a host tells the fleet of itself and of its guests, under a lease that ends with its daemon.

every third of the lease, and when something here changed:
another daemon has this host's name? -> keep out of the fleet
lease alive? -> no: a new one -> host's key, if it changed -> owner and document of each guest here, if they did
             -> owner keys of guests that are not here (migrated.member.leftovers)
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import structlog

from migrated.control.operations import OperationError
from migrated.environment import Environment, fleet_name
from migrated.fleet.changes import publish
from migrated.fleet.model import MAX_NAMES, Forecast, GuestDocument, HostDocument
from migrated.fleet.store import LeaseEndedError, NameTakenError, Put, Store, StoreError, Transaction
from migrated.member.facts import forecast, guest_document, link_bytes_per_s, usual_forecast
from migrated.member.follower import Follower
from migrated.member.identity import Identity
from migrated.member.leftovers import Leftovers
from migrated.member.local import LocalGuest, LocalHost
from migrated.member.owners import Owners
from migrated.record.model import Record
from migrated.settings.config import Address
from protocol.versions import CAPABILITIES

log = structlog.get_logger()

_SOON_S: Final = 0.05
_VERSION: Final = importlib.metadata.version("migrated")


class Membership:
    """This host's keys.

    Args:
        env: the daemon.
        local: this host.
        store: of the fleet.
        follower: its mirror.
        owners: claims guests that are here.
        identity: whether this host's name is its own.
        clock_offset_ns: how far this host's clock is ahead of the store's, None while that is unknown.

    Attributes:
        lease: the lease of this host's keys, 0 while it has none.
    """

    def __init__(
        self,
        env: Environment,
        local: LocalHost,
        store: Store,
        follower: Follower,
        owners: Owners,
        identity: Identity,
        clock_offset_ns: Callable[[], int | None],
    ) -> None:
        self.lease = 0
        self._env = env
        self._local = local
        self._store = store
        self._follower = follower
        self._owners = owners
        self._identity = identity
        self._clock_offset_ns = clock_offset_ns
        self._name = fleet_name(env.config)
        self._cpu_features = _cpu_features()
        self._devices: tuple[str, ...] = ()
        self._needs: dict[str, frozenset[str]] = {}
        """The needs of each guest here."""
        self._address = env.config.fleet.address or env.config.listen.address
        self._kept_ns = 0
        self._told: HostDocument | None = None
        self._kept_out = ""
        """Why this host is not in its fleet, as it was logged last."""
        self._link = _Link()
        self._leftovers = Leftovers(follower, local, owners, self._name, env.config.state.directory)
        self._new = asyncio.Event()
        self._total_bytes = env.config.fleet.memory_bytes or max(
            1, _total_bytes() - env.config.limits.spare_memory_bytes
        )

    def listening(self, address: Address | None) -> None:
        """Tell the fleet where this host listens, unless it is configured what others shall connect to."""
        self._address = self._env.config.fleet.address or address or self._address
        self.look_again()

    def look_again(self) -> None:
        """Something of this host has changed: a guest came or went, an attempt began or ended."""
        self._new.set()

    async def run(self) -> None:
        """Keep the keys up to date until cancelled."""
        await self._local.load()
        self._devices = tuple(sorted(await self._local.offers()))[:MAX_NAMES]
        await self._follower.ready.wait()
        beat_s = self._env.config.fleet.lease_s / 3
        while True:
            self._new.clear()
            try:
                await self._tell()
            except NameTakenError as error:
                await self._keep_out(error)
            except LeaseEndedError:
                log.warning("the lease of this host has ended: it is told anew", host=self._name)
                self.lease = 0
                continue
            except StoreError as error:
                self._follower.failed(error)
            except Exception:  # without its lease this host would be out of the fleet, and its jobs would stand still
                log.exception("what this host tells its fleet failed unexpectedly; it is tried again")
            try:
                async with asyncio.timeout(beat_s):
                    await self._new.wait()
                    await asyncio.sleep(_SOON_S)  # what changes together is told together
            except TimeoutError:
                continue

    async def leave(self) -> None:
        """End the lease: the daemon is being stopped."""
        if self.lease:
            await self._store.revoke(self.lease)

    async def _keep_out(self, reason: NameTakenError) -> None:
        """Have no part in the fleet, as another daemon has this host's name."""
        if str(reason) != self._kept_out:
            log.error("this host is not in its fleet", reason=str(reason))
            self._kept_out = str(reason)
        lease, self.lease = self.lease, 0
        if lease:
            with contextlib.suppress(StoreError):
                await self._store.revoke(lease)

    async def _tell(self) -> None:
        if (refusal := self._identity.stranger(self._follower.mirror)) is not None:
            raise NameTakenError(refusal)
        await self._keep_lease()
        records = self._local.recent
        guests = self._local.local_guests()
        here = {guest.name for guest in guests if not guest.arriving}
        slots = self._follower.mirror.slots_of(self._name)
        promised = {one.guest for one in slots.inbound}
        gone = [one for one in slots.inbound if one.landed and not self._env.guests.holds(one.guest)]
        used = sum(guest.memory_bytes for guest in guests if not (guest.arriving and guest.name in promised))
        inbound, outbound = self._local.attempts()
        fleet = self._env.config.fleet
        document = HostDocument(
            name=self._name,
            address=f"tcp:{self._address}",
            daemon=self._identity.daemon,
            version=_VERSION,
            capabilities=tuple(sorted(CAPABILITIES)),
            vmms=tuple(sorted(self._env.guests.driver_names())),
            devices=self._devices,
            cpu_features=self._cpu_features,
            memory_bytes=self._total_bytes,
            used_bytes=used,
            guests=len(here),
            inbound=inbound,
            outbound=outbound,
            max_inbound=fleet.max_inbound if self._local.role != "source" else 0,
            max_outbound=fleet.max_outbound if self._local.role != "destination" else 0,
            link_bytes_per_s=fleet.link_bytes_per_s or self._link.speed(records),
            clock_offset_ns=self._clock_offset_ns(),
            cordon_seen=self._name in self._follower.mirror.cordons,
        )
        mirror = self._follower.mirror
        if document != self._told or mirror.hosts.get(self._name) != document or here & promised or gone:
            answer = await self._follower.transact(publish(mirror, document, self.lease, here, gone))
            if not answer.succeeded:  # decided on old news, or another daemon of this name was faster
                self._new.set()
                return
            self._told = document
            self._identity.told()
            self._kept_out = ""
        await self._leftovers.see_to()
        last = {record.guest: known for record in reversed(records) if (known := forecast(record)) is not None}
        usual = usual_forecast(records)
        for guest in guests:
            if guest.arriving or guest.in_doubt:
                continue  # whose guest it is, is settled by the hand-over alone
            if await self._owners.claim_found(guest.name):
                limit_ns = int(self._local.parameters(guest.name).downtime_limit_ms * 1e6)
                needs = await self._needs_of(guest.name)
                if needs is not None:
                    expected = last.get(guest.name) or self._guessed(guest, usual)
                    await self._describe(
                        guest_document(guest, limit_ns, expected, fleet.groups, needs, self._cpu_features)
                    )
                await self._fence(guest.name)
        self._needs = {guest: needs for guest, needs in self._needs.items() if guest in here}
        self._follower.reached()

    def _guessed(self, guest: LocalGuest, usual: Forecast | None) -> Forecast | None:
        """Return the forecast of a guest that has not moved from here: the one that it has, or what is usual. It is
        not told anew with every migration of another guest."""
        known = self._follower.mirror.guests.get(guest.name)
        if known is not None and known.forecast is not None:
            return known.forecast
        return None if usual is None else usual.model_copy(update={"data_bytes": guest.memory_bytes})

    async def _needs_of(self, guest: str) -> frozenset[str] | None:
        """Return a guest's needs of a host, asked once; None while its VMM does not answer."""
        needs = self._needs.get(guest)
        if needs is None:
            needs = await self._local.needs(guest)
            if needs is not None:
                self._needs[guest] = needs
        return needs

    async def _describe(self, wanted: GuestDocument) -> None:
        """Write what is known of a guest, if the store has something else."""
        if self._follower.mirror.guests.get(wanted.name) != wanted:
            key = self._follower.mirror.keys.guest(wanted.name)
            await self._follower.transact(Transaction((), (Put(key, wanted.to_bytes()),)))

    async def _fence(self, guest: str) -> None:
        """Let the lock of a guest that is this host's carry the revision at which that was last written."""
        token = await self._owners.token(guest, arriving=False)
        if token is not None:
            try:
                await self._local.fence(guest, token)
            except OperationError as error:
                log.error("a guest's lock does not carry its fencing token", guest=guest, reason=str(error))

    async def _keep_lease(self) -> None:
        lease_s = self._env.config.fleet.lease_s
        if not self.lease:
            self.lease = await self._store.grant(math.ceil(lease_s))
            self._told, self._kept_ns = None, time.monotonic_ns()
        elif time.monotonic_ns() - self._kept_ns > lease_s * 1e9 / 4:
            await self._store.keep_alive(self.lease)
            self._kept_ns = time.monotonic_ns()


class _Link:
    """The throughput of this host's link, computed anew when another attempt has ended."""

    def __init__(self) -> None:
        self._newest: Record | None = None
        self._bytes_per_s = 0

    def speed(self, newest_first: Sequence[Record]) -> int:
        """As ``link_bytes_per_s``."""
        if newest_first and newest_first[0] is not self._newest:
            self._newest, self._bytes_per_s = newest_first[0], link_bytes_per_s(newest_first)
        return self._bytes_per_s


def _cpu_features() -> tuple[str, ...]:
    """The features of this host's processors, as the kernel names them; empty where it does not."""
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return tuple(sorted(set(value.split())))[:256]
    return ()


def _total_bytes() -> int:
    """The memory of this host (MemTotal)."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) << 10
    return 0
