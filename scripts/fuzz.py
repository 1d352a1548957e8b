"""Damaged inputs for everything that parses bytes of others: frames, messages, batches of pages, QMP, the VMM's API,
records. What comes out must be a value or the parser's own named error, soon.

    python -m scripts.fuzz --inputs 1000000 --seed 1

Inputs are mutations of those in tests/corpus (TARGET.NAME.bin), most of which a real session left. What happened goes
to stderr; the last line on stdout is one JSON object: ``{"inputs", "accepted", "refused", "seconds", "slowest_ms",
"peak_mib", "crashes"}``. Exit code 1 when anything else than a named error came out; the input is left in the current
directory.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from migrated.base.errors import DocumentError
from migrated.control.framing import JsonSplitter, Malformed, RequestTooLargeError, parse
from migrated.destination.decoding import allowed_encodings, check_encoding, decode
from migrated.record.model import Record
from migrated.record.received import read_received
from protocol import messages
from protocol.errors import RemoteProtocolError
from protocol.frames import HEADER_BYTES, MAX_PAYLOAD_BYTES, FrameParser, check_meta, unpack_header
from protocol.guest import PAGE_SIZE
from protocol.pages import count_pages, unpack_runs
from protocol.versions import CAPABILITIES, MAJOR
from scripts.basics import MIB, ROOT, say
from vmm_sim.wire import HEADER, FrameError, check_header, decode_meta

CORPUS: Final = ROOT / "tests" / "corpus"
_MOST_PAGES: Final = 1024
_EDGES: Final = (0, 1, 0x7F, 0x80, 0xC1, 0xFF)


def take_frames(data: bytes) -> None:
    """A stream of the control channel."""
    for frame in FrameParser(MAJOR, MAX_PAYLOAD_BYTES).receive(data):
        messages.decode(frame.type, frame.meta)


def take_message(data: bytes) -> None:
    """A message without its checksums, so that mutations reach the models: type, then meta."""
    messages.decode(data[0] if data else 0, data[1:])


def take_batch(data: bytes) -> None:
    """A frame of a data channel with its payload."""
    header = unpack_header(data[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0"), MAJOR, MAX_PAYLOAD_BYTES)
    meta = data[HEADER_BYTES : HEADER_BYTES + header.meta_bytes]
    check_meta(meta, header)
    take_pages(meta, data[HEADER_BYTES + header.meta_bytes :])


def take_pages(meta: bytes, payload: bytes) -> None:
    """Parse the meta and the payload of a PAGES frame."""
    message = messages.decode(messages.FrameType.PAGES, meta)
    if not isinstance(message, messages.Pages):
        raise TypeError(f"PAGES decodes as {message!r}")
    count = count_pages(unpack_runs(message.runs, 1 << 22))
    check_encoding(message.encoding, allowed_encodings(CAPABILITIES), len(payload), count)
    if count <= _MOST_PAGES and message.encoding != "plain":
        decode(message.encoding, memoryview(payload), np.zeros((count, PAGE_SIZE // 8), np.uint64))


def take_unsigned_batch(data: bytes) -> None:
    """A batch without its checksums: length of the meta, meta, payload."""
    size = int.from_bytes(data[:2], "big")
    take_pages(data[2 : 2 + size], data[2 + size :])


def take_qmp(data: bytes) -> None:
    """Parse the bytes that a client writes to the control socket."""
    splitter = JsonSplitter()
    for value in [*splitter.feed(data), *splitter.end()]:
        if not isinstance(value, Malformed):
            parse(value)


def take_vmm(data: bytes) -> None:
    """A frame of a VMM's API socket."""
    meta_bytes, _ = check_header(data[: HEADER.size].ljust(HEADER.size, b"\0"))
    decode_meta(data[HEADER.size : HEADER.size + meta_bytes])


def take_record(data: bytes) -> None:
    """A peer's record."""
    read_received(Record, data, "record")


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "frames": take_frames,
    "message": take_message,
    "batch": take_batch,
    "pages": take_unsigned_batch,
    "qmp": take_qmp,
    "vmm": take_vmm,
    "record": take_record,
}
NAMED: Final = (RemoteProtocolError, FrameError, DocumentError, RequestTooLargeError, ValueError)
"""``ValueError`` is what ``framing.parse`` says of text that is no JSON."""


def corpus() -> dict[str, list[bytes]]:
    """The inputs of each target."""
    found: dict[str, list[bytes]] = {name: [] for name in TARGETS}
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
    draw, found, begin = random.Random(seed), Fuzzed(), time.monotonic()
    cases = [(name, data) for name, all_data in corpus().items() for data in all_data]
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(inputs):
        name, data = cases[number % len(cases)]
        damaged = mutated(data, draw)
        began_s = time.perf_counter()
        try:
            TARGETS[name](damaged)
            found.accepted += 1
        except NAMED:
            found.refused += 1
        except Exception as error:
            found.crashes.append(f"{name}, input {number} of seed {seed}: {error!r}")
            if left is not None:
                (left / f"crash-{name}-{seed}-{number}.bin").write_bytes(damaged)
        found.slowest_ms = max(found.slowest_ms, (time.perf_counter() - began_s) * 1e3)
        found.inputs += 1
    found.seconds = round(time.monotonic() - begin, 1)
    found.slowest_ms = round(found.slowest_ms, 1)
    found.peak_mib = round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) * 1024 / MIB, 1)
    return found


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
