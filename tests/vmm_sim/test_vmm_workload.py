"""The workload: memory content is a pure function of config, seed and step count."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm_sim.config import ConfigError, GuestConfig, WorkloadName, build_config
from vmm_sim.content import PAGE_SIZE, WORDS, Content, fill, fill_bytes
from vmm_sim.memory import GuestMemory
from vmm_sim.workload import Permutation, Workload

WRITING = [name for name in get_args(WorkloadName) if name != "idle"]


def guest(workload: str, **options: Any) -> GuestConfig:
    uuid = "11111111-2222-3333-4444-555555555555"
    return build_config({"name": "g", "uuid": uuid, "memory": "4MiB", "workload": workload, **options})


@given(st.integers(1, 5000), st.integers(0, 1 << 64))
def test_seeded_permutation_is_a_bijection_with_its_inverse(size: int, seed: int) -> None:
    permutation = Permutation.seeded(size, seed)
    values = np.arange(size, dtype=np.int64)
    images = permutation.forward(values)
    assert sorted(images) == list(range(size))
    assert (permutation.inverse(images) == values).all()


@given(st.sampled_from(WRITING), st.integers(0, 1 << 50), st.integers(0, 5000))
def test_every_step_is_one_write_of_one_stream(workload: str, step: int, steps: int) -> None:
    load = Workload(guest(workload))
    before, after = load.counts(step), load.counts(step + steps)
    assert sum(before) == step
    assert sum(after) == step + steps
    assert all(b <= a for b, a in zip(before, after, strict=True))


@pytest.mark.parametrize("workload", WRITING)
def test_generations_agree_with_counting_every_single_write(workload: str) -> None:
    load = Workload(guest(workload, phase_steps=100))
    step = 3000
    truth = np.zeros(load.touched_pages, dtype=np.int64)
    for stream, count in zip(load.streams, load.counts(step), strict=True):
        for number in range(count):
            pages, generations = stream.writes(number, number + 1)
            truth[pages[0]] += 1
            assert generations[0] == truth[pages[0]]
    expected = load.expected(step, 0, 1, load.touched_pages)
    assert (expected.generations == truth[1:]).all()
    assert truth.sum() == step


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(WRITING),
    st.integers(0, (1 << 64) - 1),
    st.lists(st.integers(1, 256), min_size=1, max_size=30),
    st.integers(1, 500),
)
def test_memory_is_the_same_however_the_steps_are_cut(workload: str, seed: int, cuts: list[int], middle: int) -> None:
    load = Workload(guest(workload, seed=seed, phase_steps=70))
    memory = GuestMemory(4 << 20)
    load.populate(memory, 1, load.touched_pages)
    step = 0
    for cut in cuts:
        part = min(cut, load.quantum_steps)
        load.execute(memory, step, part)
        step += part
    for first, last in ((1, middle + 1), (middle + 1, load.touched_pages)):
        wanted = np.empty((max(last - first, 0), WORDS), dtype=np.uint64)
        if last > first:
            load.expected(step, 0, first, last).render(wanted)
            assert (memory.words[first:last] == wanted).all()


def test_boot_content_of_a_zero_guest_is_zero_and_its_writes_are_not() -> None:
    load = Workload(guest("sequential", content="zero"))
    memory = GuestMemory(4 << 20)
    load.populate(memory, 1, load.touched_pages)
    assert not memory.words.any()
    load.execute(memory, 0, 64)
    written = np.flatnonzero(memory.words.any(axis=1))
    # Some later generations are zero pages, by design.
    assert 50 <= len(written) <= 64


def test_about_one_in_64_later_pages_is_zero_and_the_rest_does_not_compress() -> None:
    content = Content(7, zero_boot=False)
    pages = np.arange(1, 20_001, dtype=np.int64)
    keys = content.keys(pages, np.ones_like(pages))
    assert 200 < (keys == 0).sum() < 440
    assert (content.keys(pages, np.zeros_like(pages)) != 0).all()
    rows = np.empty((64, WORDS), dtype=np.uint64)
    fill(keys[keys != 0][:64], rows)
    assert len(zlib.compress(rows.tobytes(), 1)) > 0.98 * rows.nbytes
    assert len(np.unique(rows)) == rows.size


def test_delta_writes_change_one_cache_line_of_a_page() -> None:
    load = Workload(guest("delta"))
    memory = GuestMemory(4 << 20)
    load.populate(memory, 1, load.touched_pages)
    before = memory.words.copy()
    load.execute(memory, 0, 64)
    changed = memory.words != before
    assert set(changed.sum(axis=1)) <= {0, 8}
    assert changed.any(axis=1).sum() == min(64, load.streams[0].order.size)


def test_stride_touches_every_eighth_page_only() -> None:
    load = Workload(guest("stride"))
    pages, _ = load.streams[0].writes(0, 10)
    assert set(np.diff(pages)) == {8}


def test_random_has_the_unique_pages_curve_of_uniform_random_writes() -> None:
    """Unique pages after x writes per page: 1 - exp(-x), within the coarseness of the strata."""
    load = Workload(guest("random", memory="64MiB", touched="100%"))
    size = sum(stream.order.size for stream in load.streams)
    for share in (0.05, 0.25, 0.5, 1.0, 2.0, 3.0):
        counts = load.counts(round(share * size))
        unique = sum(min(count, stream.order.size) for count, stream in zip(counts, load.streams, strict=True))
        assert unique / size == pytest.approx(1 - math.exp(-share), abs=0.05)


def test_streams_do_not_overlap_and_stay_inside_touched_memory(config: Callable[..., GuestConfig]) -> None:
    device = {"name": "d", "kind": "non-iterable", "writes_pages": 7}
    for workload in WRITING:
        load = Workload(config(workload=workload, devices=[device]))
        seen = np.zeros(load.touched_pages, dtype=np.int64)
        for stream in (load.device_stream, *load.streams):
            assert stream is not None
            pages, _ = stream.writes(0, stream.order.size)
            seen[pages] += 1
        assert seen.max() == 1
        assert seen[0] == 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"workload": "dance"}, "workload"),
        ({"memory": "5000"}, "multiple of 4096"),
        ({"memory": "many"}, "not a size"),
        ({"touched": "200%"}, "touched pages"),
        ({"dirty_rate": 0, "workload": "random"}, "dirty_rate above 0"),
        ({"working_set_pages": 10, "workload": "random"}, "at least 64"),
        ({"colour": "red"}, "colour"),
        ({"devices": [{"name": "d", "kind": "odd"}]}, "kind"),
        ({"devices": [{"name": "d", "kind": "iterable"}] * 2}, "listed twice"),
    ],
)
def test_unusable_configs_are_refused_with_the_reason(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        guest(**{"workload": "hot-cold", **options})


def test_device_content_does_not_depend_on_how_it_is_chunked() -> None:
    whole, parts = bytearray(5 * PAGE_SIZE + 24), bytearray(5 * PAGE_SIZE + 24)
    fill_bytes(99, memoryview(whole), 0)
    fill_bytes(99, memoryview(parts)[: 2 * PAGE_SIZE], 0)
    fill_bytes(99, memoryview(parts)[2 * PAGE_SIZE :], 2)
    assert whole == parts
