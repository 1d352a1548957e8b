"""The side-by-side benchmark: migrated, the bare socket, iperf3 and stock QEMU, interleaved in one run.

    python -m scripts.bench          table on stderr, one JSON object on stdout

Every repetition runs every case once, so that what disturbs the machine disturbs all of them; figures are medians, and
what counts is their ratios. Two real daemons move simulated guests over loopback, driven through the control socket.

    BENCH_SIZE_MIB   guest memory of the bulk cases (1024)
    BENCH_REPEATS    repetitions (5)
    BENCH_SWITCHOVERS of each of the downtime cases, over all repetitions (100)
    BENCH_CASES      comma list of cases (all)
    BENCH_OUT        also write the JSON there, and a plot beside it
    BENCH_HUGE_PAGES 0: leave the host's setting for huge pages of shared memory alone, do not measure with them (1)

On a virtual machine the first touch of memory that the host has not backed yet is ten times slower, and free memory
may be given back to the host within seconds: before every sample as much memory is touched and freed as it uses.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from protocol.guest import PAGE_SIZE
from scripts.basics import MIB, say
from scripts.bench import rivals
from scripts.bench.cases import CASES, RSS_GUESTS, Bench
from scripts.bench.plot import plot
from scripts.bench.result import SHMEM_HUGE, block, machine, table
from scripts.rig.network import Network

ON_HUGE_PAGES: Final = ("raw", "qemu", "qemu-multifd", "random", "zero", "small-move", "scattered", "tracking", "rss")


def missing(name: str, size_mib: int) -> str | None:
    """Return the reason why a case cannot run here, None when it can."""
    if name.startswith("qemu") and not rivals.installed(rivals.QEMU):
        return f"{rivals.QEMU} is not installed"
    if name == "iperf3" and not rivals.installed("iperf3"):
        return "iperf3 is not installed"
    if name.startswith("link") and (reason := Network.why_not()) is not None:
        return reason
    free_mib = os.sysconf("SC_AVPHYS_PAGES") * PAGE_SIZE // MIB
    wanted_mib = 3 * RSS_GUESTS["4GiB"][0] if name == "rss" else 5 * size_mib
    if free_mib < wanted_mib:
        return f"{free_mib} MiB of memory are free, at least {wanted_mib} are needed"
    return None


async def measure(names: list[str], size_mib: int, repeats: int, skipped: dict[str, str]) -> Bench:
    """Run the cases, interleaved. A case that fails is named in ``skipped`` and not tried again."""
    bench = Bench(size_mib, repeats)
    task = asyncio.current_task()
    assert task is not None
    # Told to end, it must not leave daemons and busy guests behind.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        bench.pair.start()
        for repeat in range(repeats):
            for name in names:
                if name in skipped:
                    continue
                begin = time.monotonic()
                try:
                    await CASES[name](bench)
                    await bench.rest()
                except Exception as error:  # one case must not cost the others
                    skipped[name] = f"failed: {error}"
                    bench.cases.pop(name, None)
                shown = f"{bench.cases[name].median:.3g}" if name in bench.cases else skipped.get(name, "done")
                say(f"  {repeat + 1}/{repeats} {name:14} {shown:>10}   {time.monotonic() - begin:.1f} s")
        await bench.drop_all()
    finally:
        bench.close()
    return bench


@contextlib.contextmanager
def huge_pages() -> Iterator[None]:
    """Let shared memory have huge pages when it asks for them; afterwards the host's own setting is back."""
    text = SHMEM_HUGE.read_text()
    before = text[text.index("[") + 1 : text.index("]")]
    SHMEM_HUGE.write_text("advise")
    try:
        yield
    finally:
        SHMEM_HUGE.write_text(before)


def main() -> int:
    """Run it. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()  # all settings come from the environment, so that make passes them on
    size_mib, repeats = int(os.environ.get("BENCH_SIZE_MIB", "1024")), int(os.environ.get("BENCH_REPEATS", "5"))
    names = [name for name in os.environ.get("BENCH_CASES", "").split(",") if name] or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        say(f"BENCH_CASES names unknown cases: {', '.join(unknown)}; there are {', '.join(CASES)}")
        return 2
    result: dict[str, Any] = {"machine": machine(), "size_mib": size_mib, "repeats": repeats}
    skipped = {name: reason for name in names if (reason := missing(name, size_mib)) is not None}
    bench = asyncio.run(measure(names, size_mib, repeats, skipped))
    result |= block(bench.cases, bench.rss_mib) | {"skipped": skipped}
    say("\n" + table(bench.cases, bench.rss_mib))
    if os.environ.get("BENCH_HUGE_PAGES", "1") != "0":
        huge_names: list[str] = [name for name in ON_HUGE_PAGES if name in names and name not in skipped]
        if huge_names and os.access(SHMEM_HUGE, os.W_OK):
            with huge_pages():
                huge = asyncio.run(measure(huge_names, size_mib, repeats, {}))
            result["with_huge_pages"] = block(huge.cases, huge.rss_mib)
            say("\nwith huge pages for shared memory (shmem_enabled = advise):\n" + table(huge.cases, huge.rss_mib))
        elif huge_names:
            skipped["with_huge_pages"] = f"{SHMEM_HUGE} cannot be written; run as root to measure with huge pages too"
    for name, reason in skipped.items():
        say(f"skipped {name}: {reason}")
    text = json.dumps(result)
    if out := os.environ.get("BENCH_OUT"):
        Path(out).write_text(text + "\n")
        Path(out).with_suffix(".svg").write_text(plot(result))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
