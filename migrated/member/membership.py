"""The keys with which a host tells the fleet of itself and of its guests, under a lease that ends with its daemon.

every third of the lease, and when something here changed:
lease alive? -> no: a new one -> host's key, if it changed -> owner and document of each guest here, if they did
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

from migrated.environment import Environment, fleet_name
from migrated.fleet.changes import publish
from migrated.fleet.model import HostDocument
from migrated.fleet.store import LeaseEndedError, Put, Store, StoreError, Transaction
from migrated.member.facts import forecast, guest_document, link_bytes_per_s
from migrated.member.follower import Follower
from migrated.member.local import LocalHost
from migrated.member.owners import Owners
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
        clock_offset_ns: Callable[[], int | None],
    ) -> None:
        self.lease = 0
        self._env = env
        self._local = local
        self._store = store
        self._follower = follower
        self._owners = owners
        self._clock_offset_ns = clock_offset_ns
        self._name = fleet_name(env.config)
        self._cpu_features = _cpu_features()
        self._address = env.config.fleet.address or env.config.listen.address
        self._kept_ns = 0
        self._told: HostDocument | None = None
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
        await self._follower.ready.wait()
        beat_s = self._env.config.fleet.lease_s / 3
        while True:
            self._new.clear()
            try:
                await self._tell()
            except LeaseEndedError:
                log.warning("the lease of this host has ended: it is told anew", host=self._name)
                self.lease = 0
                continue
            except StoreError as error:
                self._follower.failed(error)
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

    async def _tell(self) -> None:
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
            version=_VERSION,
            capabilities=tuple(sorted(CAPABILITIES)),
            vmms=tuple(sorted(self._env.guests.driver_names())),
            cpu_features=self._cpu_features,
            memory_bytes=self._total_bytes,
            used_bytes=used,
            guests=len(here),
            inbound=inbound,
            outbound=outbound,
            max_inbound=fleet.max_inbound if self._local.role != "source" else 0,
            max_outbound=fleet.max_outbound if self._local.role != "destination" else 0,
            link_bytes_per_s=fleet.link_bytes_per_s or link_bytes_per_s(records),
            clock_offset_ns=self._clock_offset_ns(),
        )
        mirror = self._follower.mirror
        if document != self._told or mirror.hosts.get(self._name) != document or here & promised or gone:
            answer = await self._follower.transact(publish(mirror, document, self.lease, here, gone))
            if answer.succeeded:
                self._told = document
            else:
                self._new.set()
        last = {record.guest: record for record in reversed(records) if forecast(record) is not None}
        for guest in guests:
            if not guest.arriving and await self._owners.claim_found(guest.name):
                limit_ns = int(self._local.parameters(guest.name).downtime_limit_ms * 1e6)
                wanted = guest_document(guest, limit_ns, last.get(guest.name), fleet.groups, self._cpu_features)
                if self._follower.mirror.guests.get(guest.name) != wanted:
                    key = self._follower.mirror.keys.guest(guest.name)
                    await self._follower.transact(Transaction((), (Put(key, wanted.to_bytes()),)))
        self._follower.reached()

    async def _keep_lease(self) -> None:
        lease_s = self._env.config.fleet.lease_s
        if not self.lease:
            self.lease = await self._store.grant(math.ceil(lease_s))
            self._told, self._kept_ns = None, time.monotonic_ns()
        elif time.monotonic_ns() - self._kept_ns > lease_s * 1e9 / 4:
            await self._store.keep_alive(self.lease)
            self._kept_ns = time.monotonic_ns()


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
