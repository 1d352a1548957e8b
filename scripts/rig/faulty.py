"""Two hosts with a fault proxy in front of each, and the way back from every fault."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from typing import Any, ClassVar

from migrated.control.client import CommandError, DaemonUnreachableError
from scripts.rig.faults import Fault
from scripts.rig.host import Host, start_side_by_side
from scripts.rig.pair import Pair
from scripts.rig.proxy import Proxy, UnixProxy
from scripts.rig.waiting import RigError, until

LAST_FRAMES_S = 0.5


class FaultyPair(Pair):
    """A pair with short time-outs whose hosts reach each other through proxies.

    Args:
        local: over unix sockets, so that memory is handed over and not copied.
        quick, options: as of ``Pair``.

    Attributes:
        fire_timeout_s: how long a migration may take to come to the step that a fault waits for.
        cell_timeout_s: how long a whole cell of the fault matrix may take, with the start of its guest.
    """

    fire_timeout_s: ClassVar[float] = 20.0
    cell_timeout_s: ClassVar[float] = 90.0

    def __init__(self, *, local: bool = False, quick: bool = True, **options: Any) -> None:
        super().__init__(quick=quick, **options)
        self._local = local
        self._proxies: dict[str, Proxy] = {}

    def start(self) -> None:
        super().start()
        for host in self.hosts:
            if self._local:
                proxy: Proxy = UnixProxy(host.unix_socket, self.directory / f"way-to-{host.name}.sock")
            else:
                proxy = Proxy("127.0.0.1", host.port)
            self._proxies[host.name] = proxy
            proxy.start()

    def close(self) -> None:
        for proxy in self._proxies.values():
            proxy.stop()
        super().close()

    def way_to(self, host: Host) -> Proxy:
        """The proxy in front of a host."""
        return self._proxies[host.name]

    async def new_guest(self, host: Host, name: str, seed: int = 0) -> None:
        """Start the guest that faults are tried on. No other of its name has run since ``forget_runs``."""
        # Where memory is handed over, loading must write to it: an abort has to leave it as it was.
        await host.create_guest(name, 16, profile="load-writes" if self._local else "small", seed=seed)

    async def fired(self, fault: Fault, source: Host, migration_id: str) -> bool:
        """Wait until a fault has happened. Returns False when the migration ended without it."""
        ended_at: float | None = None

        async def happened() -> str | None:
            nonlocal ended_at
            if fault.fired_at_ns:
                return "fired"
            if fault.failed is not None:
                raise RigError(f"the fault {fault.action} could not be done: {fault.failed}")
            if fault.struck:
                return None  # it takes a moment until a killed process is gone
            # The daemon may be the one that the fault stops: it answers later, or never.
            with contextlib.suppress(CommandError, DaemonUnreachableError, TimeoutError):
                async with asyncio.timeout(1.0):
                    if ended_at is None and await source.record(migration_id) is not None:
                        ended_at = time.monotonic()
            # What was sent last may still be on its way through the proxy.
            return "ended" if ended_at is not None and time.monotonic() - ended_at > LAST_FRAMES_S else None

        what = f"the fault {fault.action} at {fault.at} of a migration from {source.name}"
        return await until(what, happened, self.fire_timeout_s) == "fired"

    async def recover(self) -> None:
        """Everything works again: the network, daemons that were killed, processes that were stopped."""
        for host in self.hosts:
            self.way_to(host).heal()
        self.let_go_on()
        await asyncio.to_thread(start_side_by_side, [host for host in self.hosts if not host.running])

    def let_go_on(self) -> None:
        """Continue every process that was stopped."""
        for host in self.hosts:
            for pid in [*([host.pid] if host.running else []), *host.vmm_pids()]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    async def start_over(self) -> None:
        """New daemons and no guests, whatever has become of those there are."""
        await self.recover()
        for host in self.hosts:
            host.kill()
            for name in set(host.vmm_pids().values()):
                host.kill_vmm(name)
        for host in self.hosts:
            host.forget_everything()
        await asyncio.to_thread(start_side_by_side, self.hosts)
        for host in self.hosts:
            host.bugs()

    async def check_retry(self, name: str, at: Host) -> list[str]:
        """Return the reasons why another migration of the guest fails, right after a failure or a success of the
        last."""
        to = self.other(at)
        record = await at.migrate(name, self.way_to(to).uri, downtime_limit=20_000, timeout_s=0.1, on_timeout="force")
        if record["outcome"] != "completed":
            return [f"the next migration is {record['outcome']}: {record['reason']}"]
        try:
            await self.settled(name)
        except RigError as error:
            return [f"after the next migration: {error}"]
        return [] if (await to.verify(name))["ok"] else ["the guest does not verify after the next migration"]
