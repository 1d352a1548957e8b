"""What saving guests in files and restoring them costs, and what it survives.

    python -m scripts.saved_guests [--directory DIR] [--mib 2048] [--repeats 3] [--damages 100] [--kills 20]

Times are medians beside those of dd with the same flushing: a save beside dd of as many bytes into a file with fsync,
a restore beside dd of that file into memory, both without the page cache. A guest with 8 times the memory of which an
eighth of ``--mib`` is touched stands beside one that has only that much. Then files are damaged at random places, and
daemons killed at random moments of saves and restores. Progress goes to stderr; the last line on stdout is one JSON
object. Exit code 1 when a target is missed or anything was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from migrated.control.client import CommandError, DaemonUnreachableError
from scripts.basics import say
from scripts.bench.cases import create_guest, profiled_pair
from scripts.rig.host import Host
from scripts.rig.pair import Pair
from scripts.rig.waiting import RigError, until

GUEST: Final = "g1"
MOST_TIMES_DD: Final = 1.2
MOST_TIMES_SMALL: Final = 1.5
KILLED_MIB: Final = 64
DAMAGED_MIB: Final = 16
_SHARED_MEMORY: Final = Path("/dev/shm")


async def _done(host: Host, command: str, **arguments: Any) -> dict[str, Any]:
    """The record of a save or a restore, once it has ended."""
    begun = await host.command(command, arguments)
    while True:  # one command waits for a bounded time only
        with contextlib.suppress(RigError):
            return await host.wait(begun["migration-id"])


async def _completed(host: Host, command: str, **arguments: Any) -> float:
    """Do it and return how long it took (s)."""
    record = await _done(host, command, **arguments)
    if record["outcome"] != "completed":
        raise RigError(f"{command} is {record['outcome']}: {record['reason']}")
    return float(record["total_ns"] / 1e9)


def _cold(path: Path) -> None:
    """Take a file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _dd(source: Path, target: Path, *, flush: bool) -> float:
    """How long dd takes (s)."""
    target.unlink(missing_ok=True)
    begin = time.monotonic()
    subprocess.run(
        ["dd", f"if={source}", f"of={target}", "bs=1M", *(["conv=fsync"] if flush else [])],
        check=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return time.monotonic() - begin


async def _guest(pair: Pair, mib: int, **profile: str) -> None:
    """A guest whose memory is filled already."""
    await create_guest(pair, GUEST, mib, **profile)
    if not (verdict := await pair.a.verify(GUEST))["ok"]:  # waits for the end of its boot
        raise RigError(str(verdict["message"]))


async def _times(pair: Pair, file: Path, mib: int, **profile: str) -> tuple[float, float]:
    """How long it takes to save a guest in a new file, and to restore it (s)."""
    await _guest(pair, mib, **profile)
    # To replace a file costs what the disk takes to free its blocks, 0.3 s for 2 GiB: that is not the cost of the save.
    file.unlink(missing_ok=True)
    save_s = await _completed(pair.a, "x-migrated-save", guest=GUEST, file=str(file))
    await asyncio.to_thread(_cold, file)
    restore_s = await _completed(pair.b, "x-migrated-restore", file=str(file))
    if not (verdict := await pair.b.verify(GUEST))["ok"]:
        raise RigError(str(verdict["message"]))
    await pair.remove_guests()
    return save_s, restore_s


async def measure(pair: Pair, directory: Path, mib: int, repeats: int) -> dict[str, Any]:
    """The times, each kind in turns so that a slow moment of the disk meets all of them."""
    file, copy, memory = directory / "g1.saved", directory / "copy", _SHARED_MEMORY / f"saved-{os.getpid()}"
    samples: dict[str, list[float]] = {}

    def note(**found: float) -> None:
        for name, seconds in found.items():
            samples.setdefault(name, []).append(seconds)
            say(f"{name}: {seconds:.2f} s")

    try:
        for _ in range(repeats):
            save_s, restore_s = await _times(pair, file, mib, touched="100%", content="random")
            note(save_s=save_s, restore_s=restore_s)
            await asyncio.to_thread(_dd, file, memory, flush=False)
            note(dd_save_s=await asyncio.to_thread(_dd, memory, copy, flush=True))
            memory.unlink()
            await asyncio.to_thread(_cold, file)
            note(dd_restore_s=await asyncio.to_thread(_dd, file, memory, flush=False))
            memory.unlink()
            save_s, restore_s = await _times(pair, file, 8 * mib, touched=f"{mib // 8}MiB")
            note(sparse_save_s=save_s, sparse_restore_s=restore_s)
            save_s, restore_s = await _times(pair, file, mib // 8, touched="100%")
            note(small_save_s=save_s, small_restore_s=restore_s)
    finally:
        for path in (file, copy, memory):
            path.unlink(missing_ok=True)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {
        **{name: round(value, 3) for name, value in medians.items()},
        "save_over_dd": round(medians["save_s"] / medians["dd_save_s"], 3),
        "restore_over_dd": round(medians["restore_s"] / medians["dd_restore_s"], 3),
        "sparse_save_over_small": round(medians["sparse_save_s"] / medians["small_save_s"], 3),
        "sparse_restore_over_small": round(medians["sparse_restore_s"] / medians["small_restore_s"], 3),
    }


async def damage(pair: Pair, directory: Path, damages: int, chance: random.Random) -> list[str]:
    """Change one byte of a file, anywhere, and restore it; again and again. Returns what was not named."""
    file, found = directory / "g1.saved", []
    await pair.a.create_guest(GUEST, DAMAGED_MIB, workload="hot-cold")
    await _completed(pair.a, "x-migrated-save", guest=GUEST, file=str(file))
    whole = file.read_bytes()
    for number in range(damages):
        place = chance.randrange(len(whole))
        with file.open("r+b") as changed:
            changed.seek(place)
            changed.write(bytes([whole[place] ^ 1 << chance.randrange(8)]))
        try:
            record = await _done(pair.b, "x-migrated-restore", file=str(file))
            outcome, reason = record["outcome"], str(record["reason"])
        except CommandError as error:  # the file says so before anything begins
            outcome, reason = "refused", str(error)
        if outcome == "completed" or "byte" not in reason or await pair.b.guests():
            found.append(f"byte {place}: {outcome}, {reason}")
        with file.open("r+b") as mended:
            mended.seek(place)
            mended.write(whole[place : place + 1])
        if number % 10 == 9:
            say(f"{number + 1} damages")
    await _completed(pair.b, "x-migrated-restore", file=str(file))
    if not (verdict := await pair.b.verify(GUEST))["ok"]:
        found.append(str(verdict["message"]))
    await pair.remove_guests()
    file.unlink()
    return found


async def _kill(host: Host, moment_s: float, command: str, **arguments: Any) -> None:
    """Kill a daemon some time after a command, and start it again."""
    with contextlib.suppress(CommandError, DaemonUnreachableError):
        await host.command(command, arguments)
    await asyncio.sleep(moment_s)
    await asyncio.to_thread(host.kill)
    await asyncio.to_thread(host.restart)


async def kill(pair: Pair, directory: Path, kills: int, chance: random.Random) -> list[str]:
    """Kill daemons at random moments of saves, of both kinds, then of restores. Returns what was lost."""
    file, found = directory / "g1.saved", []

    async def check(host: Host, what: str) -> None:
        async def runs() -> bool:
            return bool((await host.guest(GUEST))["state"] == "running")

        await until(f"the guest running after {what}", runs)
        if not (verdict := await host.verify(GUEST))["ok"]:
            found.append(f"{what}: {verdict['message']}")

    for number in range(kills):
        if not await pair.a.guests():
            await pair.a.create_guest(GUEST, KILLED_MIB, workload="hot-cold")
        mode = ("stop", "running")[number % 2]
        file.unlink(missing_ok=True)
        await _kill(pair.a, chance.uniform(0.0, 1.5), "x-migrated-save", guest=GUEST, file=str(file), mode=mode)
        if stray := [path.name for path in directory.iterdir() if path != file]:
            found.append(f"{mode}: left behind {stray}")
        if await pair.a.guests():
            await check(pair.a, f"a kill during a save ({mode})")
        elif not file.exists():
            found.append(f"{mode}: neither guest nor file is there")
        if file.exists():
            await _completed(pair.b, "x-migrated-restore", file=str(file))
            await check(pair.b, f"a restore after a kill ({mode})")
            await pair.b.command("x-migrated-guest-destroy", {"guest": GUEST})
        say(f"save killed {number + 1} times")
    await pair.remove_guests()
    await pair.a.create_guest(GUEST, KILLED_MIB, workload="hot-cold")
    file.unlink(missing_ok=True)
    await _completed(pair.a, "x-migrated-save", guest=GUEST, file=str(file))
    for number in range(kills):
        await _kill(pair.b, chance.uniform(0.0, 2.0), "x-migrated-restore", file=str(file))
        if await pair.b.guests():  # it was over by then
            await check(pair.b, "a kill after a restore")
            await pair.b.command("x-migrated-guest-destroy", {"guest": GUEST})
        say(f"restore killed {number + 1} times")
    await _completed(pair.b, "x-migrated-restore", file=str(file))
    await check(pair.b, "the last restore")
    await pair.remove_guests()
    return found


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for."""
    chance = random.Random(options.seed)
    figures: dict[str, Any] = {"mib": options.mib}
    with tempfile.TemporaryDirectory(prefix="saved-", dir=options.directory) as path, profiled_pair() as pair:
        directory = Path(path)
        if options.repeats:
            figures |= await measure(pair, directory, options.mib, options.repeats)
        unnamed = await damage(pair, directory, options.damages, chance) if options.damages else []
        lost = await kill(pair, directory, options.kills, chance) if options.kills else []
        lost += await pair.leftovers()
    for sentence in (*unnamed, *lost):
        say(f"VIOLATION: {sentence}")
    return figures | {
        "damages": options.damages, "unnamed": len(unnamed), "kills": 2 * options.kills, "lost": len(lost),
    }  # fmt: skip


def main() -> int:
    """Measure and sum up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where the files lie, on the disk that is to be measured")
    parser.add_argument("--mib", type=int, default=2048, help="memory of the large guest (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of the times; 0 for none (default %(default)s)")
    parser.add_argument("--damages", type=int, default=100, help="(default %(default)s)")
    parser.add_argument("--kills", type=int, default=20, help="of saves, and as many of restores (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of places and moments (default %(default)s)")
    options = parser.parse_args()
    # Daemons and guests must not outlive a run that is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    figures = asyncio.run(run(options))
    print(json.dumps(figures))
    slow = [
        figures.get("save_over_dd", 0) > MOST_TIMES_DD,
        figures.get("restore_over_dd", 0) > MOST_TIMES_DD,
        figures.get("sparse_save_over_small", 0) > MOST_TIMES_SMALL,
        figures.get("sparse_restore_over_small", 0) > MOST_TIMES_SMALL,
    ]
    return 1 if any(slow) or figures["unnamed"] or figures["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
