"""Three hosts and etcd on this machine; one host is emptied with one command while you watch.

    etcd <- host a [web0 web1 .. db0 ..] ==TCP==> host b, host c       each guest within its own limit, and verified

Every process that was started is ended, whatever happens. The last line on standard output is one JSON object. Exit
status 0 only if every guest left the host and is intact; 3 if a package is missing, which it names.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Final

from rich.text import Text

from migrated.cli.fleet_views import hosts_view, job_view, plan_view, step_lines
from migrated.cli.style import duration
from migrated.report.evacuation import write_evacuation
from protocol.units import parse_duration_ns, parse_rate, parse_size
from scripts.demo import DemoError, option, out, perform, say
from scripts.fleet.etcd_cluster import ETCD_PACKAGE, why_no_etcd
from scripts.fleet.rig import Fleet
from scripts.rig.waiting import until

EXIT_MISSING: Final = 3
JOB_S: Final = 100.0
POLL_S: Final = 0.2


async def make_guests(fleet: Fleet, options: argparse.Namespace) -> list[str]:
    """Busy guests on host a: some write hot pages again and again, some write everywhere."""
    names = []
    for number in range(options.guests):
        name, workload = (f"web{number}", "hot-cold") if number % 2 == 0 else (f"db{number}", "random")
        await fleet["a"].create_guest(
            name,
            options.memory >> 20,
            workload=workload,
            dirty_rate_bytes_per_s=options.dirty_rate // (1 + number % 3),
        )
        names.append(name)
    return names


async def planned(fleet: Fleet, names: list[str]) -> dict[str, Any]:
    """The plan for host a, once all its guests are described."""

    async def whole() -> dict[str, Any] | None:
        plan = await fleet["b"].command("x-migrated-fleet-evacuate", {"host": "a", "dry-run": True})
        return dict(plan) if {move["guest"] for move in plan["moves"]} == set(names) else None

    return await until("a plan with all guests", whole)


async def follow(fleet: Fleet, job: str) -> dict[str, Any]:
    """Tell what becomes of a job until it is over; returns it."""
    told: dict[str, str] = {}
    deadline = time.monotonic() + JOB_S
    while True:
        found = await fleet.job("c", job)
        for line in step_lines(found, told):
            out.print(Text(line))
        if found["ended_utc_ns"] is not None:
            return found
        if time.monotonic() > deadline:
            raise DemoError(f"host a was not empty after {JOB_S:g} s")
        await asyncio.sleep(POLL_S)


async def check(fleet: Fleet, names: list[str]) -> None:
    """Have every byte of every guest verified where it runs now, and nothing left on host a."""
    where = await fleet.where()
    for name in names:
        hosts = where.get(name, [])
        if len(hosts) != 1 or hosts == ["a"]:
            raise DemoError(f"guest {name} is on {' and '.join(hosts) or 'no host'}")
        verdict = await fleet[hosts[0]].verify(name)
        if not verdict["ok"]:
            raise DemoError(f"guest {name} is damaged on host {hosts[0]}: {verdict['message']}")
        if ran_twice := fleet.double_runs(name):
            raise DemoError(f"guest {name} ran twice: {ran_twice[0]}")
    out.print(Text(f"All {len(names)} guests are intact, and none ever ran twice.", style="green"))


async def demo(options: argparse.Namespace, _directory: Path) -> dict[str, Any]:
    """The whole story; returns the document of the last line."""
    begin = time.monotonic()
    limit = {"downtime_limit_ms": options.downtime_limit / 1e6}
    with Fleet("abc", migration=limit, log={"level": "info"}) as fleet:
        try:
            say("Three hosts", "Three daemons on this machine share an etcd; there is no other coordinator.")
            await fleet.joined()

            say("Guests on host a")
            names = await make_guests(fleet, options)
            plan = await planned(fleet, names)
            out.print(hosts_view(await fleet["b"].command("x-migrated-fleet-hosts")))

            say("The plan", "migratectl evacuate a --dry-run")
            out.print(plan_view(plan))

            say("Host a is emptied", "migratectl evacuate a")
            job = await follow(fleet, await fleet.evacuate("a", "c"))
            out.print(job_view(job))
            if job["phase"] != "done":
                raise DemoError(f"the evacuation ended as {job['phase']}: {job['reason']}")
            await check(fleet, names)
            out.print(hosts_view(await fleet["b"].command("x-migrated-fleet-hosts")))
        finally:
            for host in fleet.hosts.values():
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(host.log_path, options.output / f"host-{host.name}.log")
    say(f"Left for you in {options.output}")
    write_evacuation(job, options.output / "evacuation.html")
    (options.output / "evacuation.json").write_text(json.dumps(job, indent=2) + "\n")
    out.print("evacuation.html   all guests on one time axis, to open in a browser;   evacuation.json   the job")
    total_s = round(time.monotonic() - begin, 1)
    out.print(f"Host a was empty after {duration(job['total_ns'])}.")
    return {"demo": "ok", "guests": len(names), "late": job["late"], "total_s": total_s}


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guests", type=int, default=6, metavar="N", help="how many guests leave host a [6]")
    option(parser, "memory", "SIZE", parse_size, "64MiB", "memory of each guest")
    option(parser, "dirty-rate", "RATE", parse_rate, "20MiB/s", "how fast the busiest ones write")
    option(parser, "downtime-limit", "DURATION", parse_duration_ns, "300ms", "of each guest, from stop to run")
    option(parser, "output", "DIRECTORY", Path, "run/demo-fleet", "where the report and logs are left")
    return parser.parse_args()


def main() -> int:
    """Run the demo, if this machine has what it needs."""
    options = parse_options()
    if (reason := why_no_etcd()) is not None:
        print(f"The demo needs etcd: {reason}. On Debian and Ubuntu: apt-get install {ETCD_PACKAGE}", file=sys.stderr)
        print(json.dumps({"demo": "missing", "packages": [ETCD_PACKAGE]}))
        return EXIT_MISSING
    return perform(functools.partial(demo, options), options.output, "host a is empty, every guest intact")


if __name__ == "__main__":
    sys.exit(main())
