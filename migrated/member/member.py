"""This host in its fleet: everything that needs the store, put together.

etcd -> follower (mirror) -> membership   what this host says of itself
                          -> owners       who may run a guest: the hand-over asks
                          -> steps        migrations of jobs from this host
                          -> workers      jobs that this daemon carries on
                          -> operator     what people ask for and see
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import Any, Final

import structlog

from migrated.base.tasks import TaskSet
from migrated.environment import Environment, fleet_name
from migrated.fleet.etcd import EtcdStore, Login
from migrated.fleet.keys import Keys, last_part
from migrated.fleet.store import StoreError
from migrated.member.follower import Follower
from migrated.member.identity import Identity, boot_id
from migrated.member.local import LocalHost
from migrated.member.membership import Membership
from migrated.member.operator import FleetOperator
from migrated.member.owners import Owners
from migrated.member.steps import StepRunner
from migrated.member.views import figures
from migrated.member.workers import Workers
from migrated.settings.config import Address, ConfigError, FleetConfig, Problem

log = structlog.get_logger()

_LEAVE_S: Final = 1.0
_TRACK_S: Final = 1.0


class FleetMember:
    """This daemon as a member of its fleet. Make it inside the event loop.

    Args:
        env: the daemon.
        local: this host.
        count: takes the figures of the fleet for the metrics, again and again.

    Attributes:
        owners: who owns the guests of this host.
        operator: what people ask for.

    Raises:
        ConfigError: a file of ``[fleet]`` cannot be used.
        OSError: the state directory cannot.
    """

    def __init__(self, env: Environment, local: LocalHost, count: Callable[[dict[str, int]], None]) -> None:
        fleet, name = env.config.fleet, fleet_name(env.config)
        self._env = env
        self._count = count
        self._store = EtcdStore(
            fleet.endpoints,
            fleet.timeout_s,
            tls=_tls(fleet),
            login=_login(fleet),
            wall_ns=lambda: env.clock.wall()[0] * 1_000_000_000,
        )
        keys = Keys(f"{fleet.prefix.rstrip('/')}/")
        self._cordon_key = keys.cordon(name)
        self._follower = Follower(self._store, keys)
        self._follower.on_change = self._changed
        identity = Identity(name, env.config.state.directory, boot_id())
        self.owners = Owners(self._follower, name, identity, env.guests.holds)
        self._membership = Membership(
            env, local, self._store, self._follower, self.owners, identity, lambda: self._store.clock_offset_ns
        )
        self._steps = StepRunner(local, self._follower, name, identity, self._membership.look_again)
        self._workers = Workers(self._follower, name, lambda: self._membership.lease)
        self.operator = FleetOperator(self._follower, self._workers, name, identity)
        self._told: dict[str, str] = {}
        self._tasks = TaskSet()

    def start(self) -> None:
        """Begin; nothing here waits for the store."""
        for run in (self._follower.run, self._membership.run, self._steps.run, self._workers.run, self._track):
            self._tasks.start(run())

    async def stop(self) -> None:
        """Leave the fleet: the keys of this host that hang on its lease are deleted, if the store answers soon."""
        await self._steps.close()
        await self._workers.close()
        await self._tasks.stop()
        await self.owners.close()
        with contextlib.suppress(StoreError, TimeoutError):
            async with asyncio.timeout(_LEAVE_S):
                await self._membership.leave()
        await self._store.close()

    def listening(self, address: Address | None) -> None:
        """Others can connect to this host now."""
        self._membership.listening(address)

    def look_again(self) -> None:
        """Something of this host has changed."""
        self._membership.look_again()
        self._steps.look_again()

    async def _track(self) -> None:
        """Keep the metrics up to date."""
        while True:
            reached = int(self._follower.ready.is_set() and self._follower.failure is None)
            self._count({"reached": reached, **figures(self._follower.mirror)})
            await asyncio.sleep(_TRACK_S)

    def _changed(self, key: str) -> None:
        """A key has changed: see to it if it is about this host, and publish a job's or a step's new state."""
        mirror, told = self._follower.mirror, self._told
        if key == self._cordon_key:
            self._membership.look_again()  # whoever empties this host waits for its word that it has seen that
        kind, _, rest = key.removeprefix(mirror.keys.prefix).partition("/")
        if kind != "jobs":
            return
        job, _, part = rest.partition("/")
        if part == "state":
            state = mirror.states.get(job)
            now, name = str(state.phase) if state is not None else "", "X_MIGRATED_FLEET_JOB"
            data: dict[str, Any] = {"job": job, "phase": now, "reason": state.reason if state is not None else ""}
        elif part.startswith("steps/"):
            step = mirror.steps[job].get(last_part(key))
            now, name = str(step.state) if step is not None else "", "X_MIGRATED_FLEET_STEP"
            data = {"job": job, "guest": last_part(key), "state": now}
            if step is not None:
                data |= {"source": step.source, "destination": step.destination, "reason": step.reason}
        else:
            return
        if not now:
            told.pop(key, None)
        elif told.get(key) != now:
            told[key] = now
            self._env.publish(name, data)


def _tls(fleet: FleetConfig) -> ssl.SSLContext | None:
    """The trust and the certificate for https; None where every endpoint is http."""
    if not any(endpoint.startswith("https:") for endpoint in fleet.endpoints):
        return None
    try:
        context = ssl.create_default_context(cafile=str(fleet.authority) if fleet.authority is not None else None)
        if fleet.certificate is not None and fleet.key is not None:
            context.load_cert_chain(str(fleet.certificate), str(fleet.key))
    except OSError as error:
        reason = f"certificate, key or authority cannot be used: {error}"
        raise ConfigError([Problem("[fleet]", "", reason)]) from error
    return context


def _login(fleet: FleetConfig) -> Login | None:
    if fleet.user is None or fleet.password_file is None:
        return None
    try:
        lines = fleet.password_file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        reason = f"{fleet.password_file} cannot be read: {error.strerror}"
        raise ConfigError([Problem("[fleet]", "password_file", reason)]) from error
    return Login(fleet.user, lines[0] if lines else "")
