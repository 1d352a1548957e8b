"""Whether a daemon grows: honest migrations there and back, and offers that are refused, with what both daemons hold.

    python -m scripts.growth --migrations 1000 --warm-up 100 --refused 1000

Memory is the daemon's private one (RssAnon), which guests mapped meanwhile do not count to. What happened goes to
stderr; the last line on stdout is one JSON object with what each host grew by after the warm-up: bytes of memory,
descriptors, threads, bytes of the journal.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import dataclass
from typing import Any, Final

from scripts.basics import MIB, say
from scripts.rig.host import Host
from scripts.rig.pair import Pair
from scripts.rig.processes import footprint
from scripts.rig.waiting import RigError

GUEST: Final = "g1"
PARAMETERS: Final = {"downtime_limit": 20_000, "timeout_s": 0.1, "on_timeout": "force"}
_SAMPLES: Final = 10
_REST_S: Final = 1.5
"""How long a daemon is left alone before it is measured: it lets go of what migrations left behind once none runs."""


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes of one daemon at rest."""

    memory_bytes: int
    descriptors: int
    threads: int
    journal_bytes: int

    @classmethod
    def of(cls, host: Host) -> Size:
        """Measure a host's daemon."""
        held = footprint(host.pid)
        return cls(
            host.anonymous_bytes(),
            held.descriptors.total(),
            held.threads,
            (host.directory / "state" / "journal").stat().st_size,
        )

    def since(self, earlier: Size) -> dict[str, int]:
        """Return the growth since an earlier measurement, by name."""
        return {name: getattr(self, name) - getattr(earlier, name) for name in self.__slots__}


async def there_and_back(pair: Pair, migrations: int, label: str) -> None:
    """Migrate the guest to and fro.

    Raises:
        RigError: a migration did not complete.
    """
    begin = time.monotonic()
    for number in range(1, migrations + 1):
        here = pair.a if GUEST in await pair.a.guests() else pair.b
        record = await here.migrate(GUEST, pair.other(here), **PARAMETERS)
        if record["outcome"] != "completed":
            raise RigError(f"migration {number} is {record['outcome']}: {record['reason']}")
        if number % max(1, migrations // _SAMPLES) == 0:
            sizes = ", ".join(f"{host.name} {host.anonymous_bytes() / MIB:.2f} MiB" for host in pair.hosts)
            say(f"{label} {number:5}: {sizes}; {time.monotonic() - begin:.0f} s")


async def refused(pair: Pair, offers: int) -> None:
    """Offer guests that cannot be taken: a guest of this name is there already."""
    here = pair.a if GUEST in await pair.a.guests() else pair.b
    away = pair.other(here)
    await away.create_guest(GUEST, 16, workload="idle")
    for _ in range(offers):
        record = await here.migrate(GUEST, away, **PARAMETERS)
        if record["outcome"] != "refused":
            raise RigError(f"an offer that cannot be taken is {record['outcome']}")
    await away.command("x-migrated-guest-destroy", {"guest": GUEST})


async def growth(pair: Pair, migrations: int, warm_up: int, offers: int, memory_mib: int) -> dict[str, Any]:
    """Migrate to and fro and measure by how much both daemons grow.

    Args:
        migrations, offers: after the warm-up.
        warm_up: migrations first.
        memory_mib: the guest's memory.
    """
    await pair.a.create_guest(GUEST, memory_mib, workload="idle")
    if offers:
        await refused(pair, min(offers, 20))
    await there_and_back(pair, warm_up, "warm-up")
    await asyncio.sleep(_REST_S)
    before = {host: Size.of(host) for host in pair.hosts}
    await there_and_back(pair, migrations, "migration")
    if offers:
        await refused(pair, offers)
    await asyncio.sleep(_REST_S)
    return {host.name: Size.of(host).since(before[host]) for host in pair.hosts}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--migrations", type=int, default=200, help="after the warm-up (default %(default)s)")
    parser.add_argument("--warm-up", type=int, default=100, help="migrations first (default %(default)s)")
    parser.add_argument("--refused", type=int, default=0, help="offers that are refused (default %(default)s)")
    parser.add_argument("--memory-mib", type=int, default=32, help="of the guest (default %(default)s)")
    options = parser.parse_args()
    with Pair() as pair:
        found = asyncio.run(growth(pair, options.migrations, options.warm_up, options.refused, options.memory_mib))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
