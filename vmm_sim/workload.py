"""The work of the vCPUs: every workload is a set of write streams over disjoint page ranges, in a fixed schedule.

One step is one page write. The number of writes of a stream is a function of the step count, and its j-th write goes
to a page that an invertible permutation of j gives; so the generation of every page follows from the step count alone:

    schedule   step --> writes of each stream          hot-cold: 15 x hot, 1 x cold, 15 x hot, ...
    stream     write j --> slot perm(j mod size), generation j // size + 1
    page       base + stride * slot

Layout of guest memory: heartbeat page | device writes | streams | static pages | never-touched pages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Final

import numpy as np

from vmm_sim.config import GuestConfig
from vmm_sim.content import LINE_WORDS, TABLE, WORDS, Content, Pages, Words, fill, splitmix64
from vmm_sim.memory import GuestMemory

HEARTBEAT_PAGE: Final = 0
QUANTUM_STEPS: Final = 64
FILL_QUANTUM_STEPS: Final = 256
POPULATE_PAGES: Final = 1024

# Uniform random writes, cut into strata that get one write in eight each: the share of pages whose (exponentially
# distributed) time between writes lies in one eighth of the distribution. Writing each stratum in a fixed order then
# gives the unique-pages-over-time curve of truly random writes, 1 - exp(-writes / pages), and stays invertible.
RANDOM_STRATA: Final = 8


@dataclass(frozen=True, slots=True)
class Permutation:
    """``x -> (multiplier * x + shift) mod size``: a full cycle, inverted in closed form."""

    size: int
    multiplier: int
    shift: int

    @classmethod
    def identity(cls, size: int) -> Permutation:
        """The order of the pages themselves."""
        return cls(size, 1 % size if size > 1 else 0, 0)

    @classmethod
    def seeded(cls, size: int, seed: int) -> Permutation:
        """One that jumps about: the multiplier lies near the golden section of ``size``."""
        draw = splitmix64(seed)
        multiplier = (int(size * 0.618) + draw % (size // 8 + 1)) % size or 1
        while math.gcd(multiplier, size) != 1:
            multiplier = multiplier % size + 1
        return cls(size, multiplier % size, (draw >> 32) % size)

    def forward(self, values: Pages) -> Pages:
        """Images of ``values`` (each in [0, size))."""
        return (values * self.multiplier + self.shift) % self.size

    def inverse(self, values: Pages) -> Pages:
        """Origins of ``values`` (each in [0, size))."""
        return ((values - self.shift) % self.size) * pow(self.multiplier, -1, self.size) % self.size


@dataclass(frozen=True, slots=True)
class Stream:
    """One stream of writes to the slots [first_slot, first_slot + order.size) of an area of pages."""

    name: str
    base: int
    stride: int
    area_slots: int
    first_slot: int
    order: Permutation
    scatter: Permutation | None = None
    delta: bool = False

    @property
    def end(self) -> int:
        """First page behind the stream's area."""
        return self.base + self.area_slots * self.stride

    def contiguous(self) -> bool:
        """True when consecutive writes go to consecutive pages."""
        return self.order.multiplier == 1 and self.stride == 1 and self.scatter is None and not self.delta

    def writes(self, begin: int, end: int) -> tuple[Pages, Pages]:
        """Distinct pages and their generations after the writes [begin, end) of this stream."""
        numbers = np.arange(max(begin, end - self.order.size), end, dtype=np.int64)
        slots = self.order.forward(numbers % self.order.size) + self.first_slot
        if self.scatter is not None:
            slots = self.scatter.forward(slots)
        return self.base + self.stride * slots, numbers // self.order.size + 1

    def generations(self, count: int, first: int, last: int, out: Pages) -> None:
        """Set ``out`` (page ``first`` at index 0) to the generations of this stream's pages in [first, last) after
        ``count`` writes."""
        first, origin, last = max(first, self.base), first, min(last, self.end)
        if first >= last:
            return
        pages = np.arange(first + (self.base - first) % self.stride, last, self.stride, dtype=np.int64)
        slots = (pages - self.base) // self.stride
        if self.scatter is not None:
            slots = self.scatter.inverse(slots)
        mine = (slots >= self.first_slot) & (slots < self.first_slot + self.order.size)
        turn = self.order.inverse(slots[mine] - self.first_slot)
        out[pages[mine] - origin] = (count - 1 - turn) // self.order.size + 1


class Workload:
    """The streams, schedule and page content of one guest; pure, apart from the memory that is handed in."""

    def __init__(self, config: GuestConfig) -> None:
        self.content = Content(config.seed, zero_boot=config.content == "zero")
        self.touched_pages = config.touched_pages
        self.quantum_steps = FILL_QUANTUM_STEPS if config.workload == "fill" else QUANTUM_STEPS
        self.device_stream: Stream | None = None
        base = 1
        if config.device_write_pages:
            size = config.device_write_pages
            self.device_stream = Stream("device", base, 1, size, 0, Permutation.identity(size))
            base += size
        self.streams, runs = _plan(config, base)
        self._runs: list[tuple[int, int, int]] = []
        self._period = 0
        for stream, length in runs:
            self._runs.append((stream, self._period, length))
            self._period += length
        self._per_period = [sum(n for s, _, n in self._runs if s == i) for i in range(len(self.streams))]
        self._staging: Words = np.empty((self.quantum_steps, WORDS), dtype=np.uint64)

    def counts(self, step: int) -> list[int]:
        """Writes of each stream after ``step`` steps."""
        if not self._period:
            return []
        cycles, rest = divmod(step, self._period)
        counts = [cycles * share for share in self._per_period]
        for stream, start, length in self._runs:
            counts[stream] += min(max(rest - start, 0), length)
        return counts

    def execute(self, memory: GuestMemory, step: int, steps: int) -> None:
        """Make the writes of steps [step, step + steps). The order inside does not matter: streams are disjoint."""
        for stream, begin, end in zip(self.streams, self.counts(step), self.counts(step + steps), strict=True):
            if end > begin:
                self._write(memory, stream, begin, end)

    def execute_device_writes(self, memory: GuestMemory, count: int, writes: int) -> None:
        """Make the device writes [count, count + writes)."""
        if self.device_stream is not None and writes:
            self._write(memory, self.device_stream, count, count + writes)

    def scribble(self, memory: GuestMemory, pages: int) -> None:
        """Write something else to the first pages of those that devices write."""
        if self.device_stream is not None:
            base = self.device_stream.base
            memory.write_run(base, base + pages, _fill_with_ones)

    def _write(self, memory: GuestMemory, stream: Stream, begin: int, end: int) -> None:
        pages, generations = stream.writes(begin, end)
        keys = self.content.keys(pages, generations, zero_pages=not stream.delta)
        if stream.delta:
            offsets = self.content.lines(pages)[:, None] + np.arange(LINE_WORDS)
            memory.write_words(pages, offsets, keys[:, None] * TABLE[:LINE_WORDS])
        elif stream.contiguous():
            done = 0
            while done < len(pages):  # twice when the stream wraps round
                start = int(pages[done])
                run = min(len(pages) - done, stream.end - start)
                part = keys[done : done + run]
                memory.write_run(start, start + run, partial(fill, part))
                done += run
        else:
            rows = self._staging[: len(pages)]
            fill(keys, rows)
            memory.write_pages(pages, rows)

    def populate(self, memory: GuestMemory, first: int, last: int) -> None:
        """Write the boot content of pages [first, last)."""
        pages = np.arange(first, last, dtype=np.int64)
        keys = self.content.keys(pages, np.zeros_like(pages))
        memory.write_run(first, last, partial(fill, keys))

    def expected(self, step: int, device_writes: int, first: int, last: int) -> ExpectedPages:
        """Return the content of the touched pages [first, last) after ``step`` steps; not for the heartbeat page."""
        generations = np.zeros(last - first, dtype=np.int64)
        deltas = np.zeros(last - first, dtype=np.bool_)
        if self.device_stream is not None:
            self.device_stream.generations(device_writes, first, last, generations)
        for stream, count in zip(self.streams, self.counts(step), strict=True):
            stream.generations(count, first, last, generations)
            if stream.delta:
                deltas[max(stream.base - first, 0) : max(stream.end - first, 0)] = True
        return ExpectedPages(self.content, np.arange(first, last, dtype=np.int64), generations, deltas)

    def stream_of(self, page: int) -> str:
        """Name of the stream that writes ``page``, for messages."""
        if page == HEARTBEAT_PAGE:
            return "heartbeat"
        named = [self.device_stream] if self.device_stream is not None else []
        for stream in (*named, *self.streams):
            if stream.base <= page < stream.end:
                return stream.name
        return "static" if page < self.touched_pages else "untouched"


def _fill_with_ones(words: Words) -> None:
    words[:] = np.uint64(2**64 - 1)


@dataclass(frozen=True, slots=True)
class ExpectedPages:
    """Page numbers with the generation that each must have."""

    content: Content
    pages: Pages
    generations: Pages
    deltas: np.typing.NDArray[np.bool_]

    def keys(self) -> Words:
        """Multipliers of the pages' full content (generation 0 where only a line changes)."""
        return self.content.keys(self.pages, np.where(self.deltas, 0, self.generations))

    def render(self, out: Words) -> None:
        """Write the expected content to ``out`` (n, 512)."""
        fill(self.keys(), out)
        changed = np.flatnonzero(self.deltas & (self.generations > 0))
        if len(changed):
            pages = self.pages[changed]
            keys = self.content.keys(pages, self.generations[changed], zero_pages=False)
            offsets = self.content.lines(pages)[:, None] + np.arange(LINE_WORDS)
            out[changed[:, None], offsets] = keys[:, None] * TABLE[:LINE_WORDS]

    def select(self, index: Pages) -> ExpectedPages:
        """The pages at ``index``."""
        return ExpectedPages(self.content, self.pages[index], self.generations[index], self.deltas[index])


def _plan(config: GuestConfig, base: int) -> tuple[tuple[Stream, ...], list[tuple[int, int]]]:
    """Streams and schedule (stream, number of steps in a row) of a workload."""
    working, hot, seed = config.working_set_pages, config.hot_pages, splitmix64(config.seed)

    def area(name: str, start: int, slots: int, *, shuffled: bool, stride: int = 1, delta: bool = False) -> Stream:
        order = Permutation.seeded(slots, seed ^ start) if shuffled else Permutation.identity(slots)
        return Stream(name, start, stride, slots, 0, order, None, delta)

    match config.workload:
        case "idle":
            return (), []
        case "sequential" | "fill":
            return (area(config.workload, base, working, shuffled=False),), [(0, 1)]
        case "random":
            return _random(base, working, seed), [(i, 1) for i in range(RANDOM_STRATA)]
        case "hot-cold":
            streams = (
                area("hot", base, hot, shuffled=True),
                area("cold", base + hot, working - hot, shuffled=True),
            )
            return streams, [(0, 15), (1, 1)]
        case "phased":
            streams = (
                area("buffer", base, hot, shuffled=True),
                area("data", base + hot, working - hot, shuffled=False),
            )
            return streams, [(0, config.phase_steps), (1, config.phase_steps)]
        case "delta":
            return (area("delta", base, hot, shuffled=True, delta=True),), [(0, 1)]
        case "stride":
            slots = max(working // config.stride, 1)
            return (area("stride", base, slots, shuffled=False, stride=config.stride),), [(0, 1)]


def _random(base: int, pages: int, seed: int) -> tuple[Stream, ...]:
    def below(time: float) -> float:
        return 1.0 - (time + 1.0) * math.exp(-time)

    bounds = [-math.log(1 - i / RANDOM_STRATA) for i in range(RANDOM_STRATA)]
    cuts = [0]
    for bound in bounds[1:]:
        # Tiny working sets would round some strata down to nothing: every stratum needs a page.
        cuts.append(max(round(below(bound) * pages), cuts[-1] + 1))
    cuts.append(pages)
    scatter = Permutation.seeded(pages, seed)
    return tuple(
        Stream("random", base, 1, pages, low, Permutation.seeded(high - low, seed + low + 1), scatter)
        for low, high in pairwise(cuts)
    )
