"""Two hosts that migrate to each other on one machine, and the questions that every test asks of them: did two copies
of a guest ever run, was anything left behind, did anything fall over.

    with Pair() as pair:
        await pair.a.create_guest("g1")
        record = await pair.a.migrate("g1", pair.b)
        assert (await pair.b.verify("g1"))["ok"]
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Final

from migrated.control.client import CommandError, DaemonUnreachableError
from scripts.rig.host import Host, close_side_by_side, start_side_by_side
from scripts.rig.network import Network
from scripts.rig.runs import check_runs
from scripts.rig.started import Started
from scripts.rig.waiting import SETTLE_TIMEOUT_S, until

QUICK_LIMITS: Final = {
    "heartbeat_interval_s": 0.25,
    "heartbeat_timeout_s": 1.0,
    "ready_timeout_s": 2.0,
    "outcome_retry_s": 0.2,
    "tcp_user_timeout_s": 2.0,
    "connect_timeout_s": 2.0,
    "handshake_timeout_s": 15.0,
    "round_timeout_s": 5.0,
    "stop_timeout_s": 1.0,
}
"""Bounds of waits for tests that cut and kill."""


class Pair(Started):
    """Two hosts that migrate to each other, in a directory that goes with them.

    Args:
        quick: short bounds of waits, for tests that cut and kill.
        limits: further ``[limits]``.
        network: where the hosts stand; on this machine's loopback without it.
        shared_lock: one directory of ownership locks for both, as on shared storage.
        sections: further configuration of both daemons, section by section.
    """

    host_type: ClassVar[type[Host]] = Host

    def __init__(
        self, *, quick: bool = False, limits: dict[str, Any] | None = None, shared_lock: bool = False,
        network: Network | None = None, **sections: dict[str, Any],
    ) -> None:  # fmt: skip
        self.directory = Path(tempfile.mkdtemp(prefix="mig-"))
        all_limits = {**(QUICK_LIMITS if quick else {}), **(limits or {})}
        common = {"limits": all_limits, **sections}
        if shared_lock:
            common["lock"] = {"directory": str(self.directory / "locks")}
        namespaces = (None, None) if network is None else network.namespaces
        addresses = ("127.0.0.1", "127.0.0.1") if network is None else network.addresses
        self.a, self.b = (
            self.host_type(self.directory / name, name, role="host", namespace=namespace, address=address, **common)
            for name, namespace, address in zip("ab", namespaces, addresses, strict=True)
        )

    @property
    def hosts(self) -> tuple[Host, Host]:
        """Both."""
        return self.a, self.b

    def other(self, host: Host) -> Host:
        """The other one."""
        return self.b if host is self.a else self.a

    def start(self) -> None:
        """Start both daemons."""
        start_side_by_side(self.hosts)
        for host in self.hosts:
            host.take_baseline()

    async def where(self, name: str = "g1") -> dict[str, dict[str, Any]]:
        """The guest as each host that has it lists it, by the host's name."""
        found = {}
        for host in self.hosts:
            guests = await host.guests()
            if name in guests:
                found[host.name] = guests[name]
        return found

    async def settled(self, name: str = "g1", timeout_s: float = SETTLE_TIMEOUT_S) -> Host | None:
        """The one host that has the guest once no migration of it is open on either side, None when it is gone."""

        async def at_rest() -> tuple[Host | None] | None:
            having: list[Host] = []
            try:
                for host in self.hosts:
                    guest, progress = (await host.guests()).get(name), await host.progress(name)
                    if progress is not None and progress["status"] not in ("completed", "failed", "cancelled"):
                        return None
                    if guest is not None:
                        if guest["migration_id"] or guest["state"] not in ("running", "paused"):
                            return None
                        having.append(host)
            except (CommandError, DaemonUnreachableError):
                return None  # a guest's process has just ended, or a daemon is starting
            return (having[0] if having else None,) if len(having) <= 1 else None

        return (await until(f"guest {name} at rest on one host", at_rest, timeout_s))[0]

    async def remove_guests(self) -> None:
        """Destroy every guest, once its migrations have ended."""
        for host in self.hosts:
            for name in await host.guests():
                with contextlib.suppress(CommandError):
                    await host.command("migrate_cancel", {"guest": name})
        for host in self.hosts:

            async def empty(host: Host = host) -> bool:
                for name in await host.guests():
                    with contextlib.suppress(CommandError):
                        await host.command("x-migrated-guest-destroy", {"guest": name})
                return not await host.guests()

            await until(f"host {host.name} without guests", empty)
        self.forget_runs()

    def forget_runs(self) -> None:
        """Remove the run logs: the next guest of a name is another guest."""
        for host in self.hosts:
            for path in (host.directory / "guests").glob("*.runlog"):
                path.unlink()

    def double_runs(self, name: str = "g1") -> list[str]:
        """Every instant at which two processes of the guest ran, and every step that was lost or executed twice, by
        what the guest's own processes wrote. Empty when all is well."""
        deaths = {pid: at for host in self.hosts for pid, at in host.deaths.items()}
        return check_runs({host.name: host.run_log(name) for host in self.hosts}, deaths)

    async def leftovers(self) -> list[str]:
        """Return a sentence for each resource left behind and each bug in the log, on both hosts."""
        found: list[str] = []
        for host in self.hosts:
            found += host.bugs()
            found += await host.leftovers()
        return found

    def log_tail(self, count: int = 40) -> str:
        """The end of both logs, for people."""
        return "\n".join(host.log_tail(count) for host in self.hosts)

    def close(self) -> None:
        """End everything and remove the directory."""
        try:
            close_side_by_side(self.hosts)
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)
