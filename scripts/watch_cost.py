"""What it costs etcd to tell the daemons of a fleet of each change: its processor time, by the number of watchers.

    python -m scripts.watch_cost [--watchers 10,40] [--changes 300]

Every daemon watches all keys of its fleet through the JSON gateway, so a change is told as often as there are hosts.
Progress goes to stderr; the last line on stdout is one JSON object: ``{"watchers": {count: {"us_each",
"per_s_a_core"}}, "change_us"}``: processor time for telling one watcher of one change, how many that makes in a second
of one core, and the time of a change that nobody watches.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Final

from migrated.fleet.etcd import EtcdStore
from migrated.fleet.store import put
from scripts.basics import say
from scripts.fleet.etcd_cluster import EtcdCluster, why_no_etcd

VALUE: Final = b"x" * 400
"""About the largest key of a fleet, a step of a job."""
TIMEOUT_S: Final = 60.0


def processor_us(pid: int) -> int:
    """Return the processor time that a process has used (microseconds)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1_000_000 // os.sysconf("SC_CLK_TCK")


async def cost_us(cluster: EtcdCluster, watchers: int, changes: int) -> float:
    """Return etcd's processor time for each of some changes, with so many watchers (microseconds)."""
    store = EtcdStore(cluster.endpoints, TIMEOUT_S)
    clients = [EtcdStore(cluster.endpoints, TIMEOUT_S) for _ in range(watchers)]
    revision = await put(store, "/t/first", VALUE)

    async def hear(client: EtcdStore) -> None:
        heard = 0
        async for news in client.watch("/t/", revision + 1):
            heard += len(news)
            if heard == changes:
                return

    try:
        hearing = [asyncio.create_task(hear(client)) for client in clients]
        await asyncio.sleep(1.0)  # until all of them watch
        before = processor_us(cluster.members[0].pid)
        for number in range(changes):
            await put(store, f"/t/{number % 50}", VALUE)
        await asyncio.gather(*hearing)
        return (processor_us(cluster.members[0].pid) - before) / changes
    finally:
        for client in (store, *clients):
            await client.close()


async def measure(watchers: list[int], changes: int) -> dict[str, object]:
    """Return the document of the last line."""
    with EtcdCluster(1) as cluster:
        alone_us = await cost_us(cluster, 0, changes)
        found = {}
        for count in watchers:
            each_us = max(0.1, (await cost_us(cluster, count, changes) - alone_us) / count)
            found[str(count)] = {"us_each": round(each_us, 1), "per_s_a_core": round(1e6 / each_us)}
            say(f"{count} watchers: {each_us:.1f} us of etcd's time for each to hear of a change")
    return {"watchers": found, "change_us": round(alone_us)}


def main() -> int:
    """Measure it, if this machine can."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--watchers", default="10,40", help="numbers of watchers (default %(default)s)")
    parser.add_argument("--changes", type=int, default=300, help="changes to tell of (default %(default)s)")
    options = parser.parse_args()
    if (reason := why_no_etcd()) is not None:
        print(f"This cannot be measured here: {reason}.", file=sys.stderr)
        return 3
    document = asyncio.run(measure([int(count) for count in options.watchers.split(",")], options.changes))
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
