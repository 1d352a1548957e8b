"""Damaged inputs for everything that parses bytes of others: frames, messages, batches of pages, QMP, the VMM's API,
records, TLS handshakes, and the answers of a QEMU monitor and of a VMM. What comes out must be a value or the parser's
own named error, soon.

    python -m scripts.fuzz --inputs 1000000 --seed 1

Inputs are mutations of those in tests/corpus (TARGET.NAME.bin), most of which a real session left. What happened goes
to stderr; the last line on stdout is one JSON object: ``{"inputs", "accepted", "refused", "seconds", "slowest_ms",
"slowest", "peak_mib", "crashes"}``. Exit code 1 when anything else than a named error came out; the input is left in
the current directory.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from scripts.basics import MIB, ROOT, say
from scripts.fuzz_targets import LIVE, NAMED, PARSERS, Target, live_targets

CORPUS: Final = ROOT / "tests" / "corpus"
_PATIENCE_S: Final = 0.02
_CHEAP_PER_LIVE: Final = 100
"""Inputs of each parser's corpus for one of each live target's, which costs so much more."""
_SLOW_MS: Final = 50.0
_AGAIN: Final = 2
"""An input that seems slow is fed again so often, and its shortest time counts: a busy machine may stop any of them."""
_EDGES: Final = (0, 1, 0x7F, 0x80, 0xC1, 0xFF)


def corpus() -> dict[str, list[bytes]]:
    """The inputs of each target."""
    found: dict[str, list[bytes]] = {name: [] for name in (*PARSERS, *LIVE)}
    for path in sorted(CORPUS.glob("*.bin")):
        found[path.name.partition(".")[0]].append(path.read_bytes())
    return found


def mutated(data: bytes, draw: random.Random) -> bytes:
    """The input with one to eight changes: flipped bits, edges, lengths, cuts, repeats, pieces moved."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        at = draw.randrange(len(out) + 1)
        match draw.randrange(7):
            case 0 if at < len(out):
                out[at] ^= 1 << draw.randrange(8)
            case 1 if at < len(out):
                out[at] = draw.choice(_EDGES)
            case 2:
                out[at:at] = draw.randbytes(draw.randint(1, 8))
            case 3:
                del out[at : at + draw.randint(1, 16)]
            case 4:
                size = draw.choice((1, 2, 4, 8))
                value = draw.choice((0, 1, (1 << 8 * size - 1) - 1, 1 << 8 * size - 1, (1 << 8 * size) - 1))
                out[at : at + size] = value.to_bytes(size, "big")
            case 5:
                out[at:at] = out[at : at + draw.randint(1, 32)] * draw.randint(1, 64)
            case _:
                other = draw.randrange(len(out) + 1)
                out[at : at + 8] = out[other : other + 8]
    return bytes(out)


@dataclass(slots=True)
class Fuzzed:
    """Counts and costs of the inputs that one target was given."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest_ms: float = 0.0
    slowest: str = ""
    peak_mib: float = 0.0
    crashes: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """The figures."""
        return {name: getattr(self, name) for name in self.__slots__}


def fuzz(inputs: int, seed: int, left: Path | None = None) -> Fuzzed:
    """Feed mutated inputs to all targets in turn.

    Args:
        left: where an input that crashes is written, None for nowhere.
    """
    draw, found, inputs_of = random.Random(seed), Fuzzed(), corpus()
    cheap = [(name, data) for name in PARSERS for data in inputs_of[name]]
    cases = cheap * _CHEAP_PER_LIVE + [(name, data) for name in LIVE for data in inputs_of[name]]
    with live_targets(_PATIENCE_S) as live:
        _feed({**PARSERS, **live}, cases, inputs, draw, found, left)
    return found


def _feed(
    targets: Mapping[str, Target],
    cases: Sequence[tuple[str, bytes]],
    inputs: int,
    draw: random.Random,
    found: Fuzzed,
    left: Path | None,
) -> None:
    begin = time.monotonic()
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(inputs):
        name, data = cases[number % len(cases)]
        damaged = mutated(data, draw)
        error, took_ms = _take(targets[name], damaged)
        if error is None:
            found.accepted += 1
        elif isinstance(error, NAMED):
            found.refused += 1
        else:
            found.crashes.append(f"{name}, input {number}: {error!r}")
            if left is not None:
                (left / f"crash-{name}-{number}.bin").write_bytes(damaged)
        if took_ms > max(found.slowest_ms, _SLOW_MS):
            took_ms = min(took_ms, *(_take(targets[name], damaged)[1] for _ in range(_AGAIN)))
        if took_ms > found.slowest_ms:
            found.slowest_ms, found.slowest = took_ms, f"{name}, input {number}"
        found.inputs += 1
    found.seconds = round(time.monotonic() - begin, 1)
    found.slowest_ms = round(found.slowest_ms, 1)
    found.peak_mib = round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) * 1024 / MIB, 1)


def _take(target: Target, data: bytes) -> tuple[Exception | None, float]:
    """Feed one input. Returns what came out, None for a value, and how long that took (ms)."""
    raised, began_s = None, time.perf_counter()
    try:
        target(data)
    except Exception as error:
        raised = error
    return raised, (time.perf_counter() - began_s) * 1e3


def main() -> int:
    """Fuzz and sum up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="how many (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="decides the mutations (default %(default)s)")
    options = parser.parse_args()
    found = fuzz(options.inputs, options.seed, Path.cwd())
    for crash in found.crashes:
        say(crash)
    print(json.dumps(found.document()))
    return 1 if found.crashes else 0


if __name__ == "__main__":
    sys.exit(main())
