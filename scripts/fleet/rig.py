"""A fleet on one machine: real daemons, real guests, a real etcd.

with Fleet("abc") as fleet:
    await fleet.a.create_guest("g1")
    job = await fleet.evacuate("a")
    assert await fleet.wait("b", job) ...
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from migrated.control.client import CommandError, DaemonUnreachableError
from migrated.fleet.etcd import Login
from scripts.authority import Authority
from scripts.fleet.etcd_cluster import EtcdCluster
from scripts.fleet.network import Switch
from scripts.rig.host import Host, close_side_by_side, start_side_by_side
from scripts.rig.pair import QUICK_LIMITS
from scripts.rig.runs import check_runs
from scripts.rig.started import Started
from scripts.rig.waiting import until

LEASE_S: Final = 2
_LOGIN: Final = Login("fleet", "of hosts")


class Fleet(Started):
    """Hosts that share an etcd, in a directory that goes with them.

    Args:
        names: of the hosts.
        members: of etcd.
        etcd: an etcd that runs already, which the fleet then only uses; None for one of its own.
        prefix: of the fleet's keys.
        fleet: further ``[fleet]`` of all hosts.
        switch: where the hosts stand; on this machine's loopback without it. Members of etcd stand with the first
            hosts then.
        secure: an etcd of its own speaks TLS, and asks hosts for a certificate and a user.
        sections: further configuration of all hosts, section by section.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        members: int = 1,
        etcd: EtcdCluster | None = None,
        prefix: str = "/migrated/",
        fleet: dict[str, Any] | None = None,
        switch: Switch | None = None,
        secure: bool = False,
        **sections: dict[str, Any],
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="fleet-"))
        authority = Authority(self.directory / "pki") if secure else None
        self.etcd = etcd or _etcd(names, members, switch, authority, prefix)
        self._own_etcd = etcd is None
        self._prefix = prefix
        common: dict[str, Any] = {
            "endpoints": self.etcd.endpoints,
            "prefix": prefix,
            "lease_s": LEASE_S,
            "timeout_s": 2.0,
            "memory_bytes": 2 << 30,
            **(fleet or {}),
        }
        limits = {**QUICK_LIMITS, **sections.pop("limits", {})}
        self.hosts = {name: self._host(name, switch) for name in names}
        for name, host in self.hosts.items():
            access = _access(authority, name) if authority is not None else {}
            host.configure(fleet={"name": name, **common, **access}, limits=limits, **sections)

    def _host(self, name: str, switch: Switch | None) -> Host:
        if switch is None:
            return Host(self.directory / name, name, role="host")
        return Host(
            self.directory / name, name, role="host", namespace=switch.namespace(name), address=switch.address(name)
        )

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def start(self) -> None:
        """Start etcd and every daemon."""
        if self._own_etcd:
            self.etcd.start()
        start_side_by_side(self.hosts.values())

    def start_host(self, host: Host) -> None:
        """Start one daemon, for the first time or again. Others reach it at the port that it got the first time."""
        host.start()

    async def joined(self) -> None:
        """Wait until every host that runs sees every other one."""
        running = [host for host in self.hosts.values() if host.running]

        async def seen() -> bool:
            for host in running:
                try:
                    known = await host.command("x-migrated-fleet-hosts")
                except (CommandError, DaemonUnreachableError):
                    return False
                if {one["name"] for one in known if one["lease"]} != {one.name for one in running}:
                    return False
            return True

        await until("all hosts in the fleet", seen)

    async def evacuate(self, host: str, asked: str | None = None, **wishes: Any) -> str:
        """Begin to empty a host, asking its own daemon or another; returns the job once every daemon has seen it."""
        given = {key.replace("_", "-"): value for key, value in wishes.items()}
        answer = await self[asked or host].command("x-migrated-fleet-evacuate", {"host": host, **given})
        job = str(answer["job"])

        async def seen() -> bool:
            for one in self.hosts.values():
                if one.running and job not in [known["job"] for known in await one.command("x-migrated-fleet-jobs")]:
                    return False
            return True

        await until(f"job {job} seen by all", seen)
        return job

    async def job(self, asked: str, job: str) -> dict[str, Any]:
        """A job as one host sees it."""
        return dict((await self[asked].command("x-migrated-fleet-jobs", {"job": job}))[0])

    async def wait(self, asked: str, job: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """A job once it is over, as one host sees it."""

        async def over() -> dict[str, Any] | None:
            try:
                found = await self.job(asked, job)
            except (CommandError, DaemonUnreachableError):
                return None
            return found if found["ended_utc_ns"] is not None else None

        return await until(f"job {job} over", over, timeout_s)

    async def where(self) -> dict[str, list[str]]:
        """The hosts that have each guest in a state of rest."""
        found: dict[str, list[str]] = {}
        for host in self.hosts.values():
            for name, guest in (await host.guests()).items():
                if guest["state"] in ("running", "paused"):
                    found.setdefault(name, []).append(host.name)
        return found

    async def owner(self, guest: str) -> tuple[str, int] | None:
        """The owner of a guest by its key, and the revision of that; None when it has none."""
        found = await asyncio.to_thread(self.etcd.read, f"{self._prefix}owners/{guest}")
        return None if found is None else (str(found[0]["owner"]), found[1])

    def double_runs(self, guest: str) -> list[str]:
        """Every instant at which two processes of a guest ran, by what they wrote themselves."""
        deaths = {pid: at for host in self.hosts.values() for pid, at in host.deaths.items()}
        return check_runs({host.name: host.run_log(guest) for host in self.hosts.values()}, deaths)

    async def remove_guests(self) -> None:
        """Cancel every job, destroy every guest once its migrations have ended, and take every cordon away."""
        first = next(iter(self.hosts.values()))
        for job in await first.command("x-migrated-fleet-jobs"):
            if job["ended_utc_ns"] is None:
                with contextlib.suppress(CommandError):
                    await first.command("x-migrated-fleet-cancel", {"job": job["job"]})
                await self.wait(first.name, job["job"])
        for host in self.hosts.values():

            async def empty(host: Host = host) -> bool:
                for name in await host.guests():
                    with contextlib.suppress(CommandError):
                        await host.command("x-migrated-guest-destroy", {"guest": name})
                return not await host.guests()

            await until(f"host {host.name} without guests", empty)
            for path in (host.directory / "guests").glob("*.runlog"):
                path.unlink()
        for one in await first.command("x-migrated-fleet-hosts"):
            if one["cordoned"]:
                await first.command("x-migrated-fleet-uncordon", {"host": one["name"]})

    def bugs(self) -> list[str]:
        """A sentence for each unexpected exception, of all hosts."""
        return [bug for host in self.hosts.values() for bug in host.bugs()]

    def log_tail(self, count: int = 40) -> str:
        """The end of all logs, for people."""
        return "\n".join(host.log_tail(count) for host in self.hosts.values())

    def close(self) -> None:
        """End everything and remove the directory."""
        try:
            close_side_by_side(self.hosts.values())
        finally:
            if self._own_etcd:
                self.etcd.close()
            shutil.rmtree(self.directory, ignore_errors=True)


def _access(authority: Authority, host: str) -> dict[str, Any]:
    """Return the keys of ``[fleet]`` with which a host proves itself to etcd."""
    password = authority.directory / "password"
    password.write_text(f"{_LOGIN.password}\n", encoding="utf-8")
    return {
        **authority.host(host, common_name=False).section(),
        "user": _LOGIN.user,
        "password_file": str(password),
    }


def _etcd(
    names: Sequence[str], members: int, switch: Switch | None, authority: Authority | None, prefix: str
) -> EtcdCluster:
    login = _LOGIN if authority is not None else None
    if switch is None:
        return EtcdCluster(members, authority=authority, login=login, prefix=prefix)
    places = [names[number % len(names)] for number in range(members)]
    return EtcdCluster(
        members,
        addresses=[switch.address(place) for place in places],
        enter=[switch.enter(place) for place in places],
        authority=authority,
        login=login,
        prefix=prefix,
    )
