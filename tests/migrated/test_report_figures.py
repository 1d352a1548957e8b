"""Words, figures, axes and colours of the report, each by itself."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.record.reading import read_record
from migrated.report.charts import Axis, Scale
from migrated.report.fields import exact_ms, grouped, percent, rate, short, size
from migrated.report.summary import sentence
from tests.migrated.report_pages import load, page_of


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("completed", "vf moved from host-a to host-b in"),
        ("late", "more than the limit of 100\u00a0ms."),
        ("aborted", "The switchover was given up: slow runs on where it was, on host-a, after a pause of"),
        ("refused", "The migration was refused before the guest was stopped: tmo ran on, on host-a."),
        ("failed", "before the guest was stopped: cx ran on"),
    ],
)
def test_the_outcome_in_a_sentence(name: str, says: str) -> None:
    assert says in sentence(read_record(load(name)))


def test_hosts_of_one_name_are_told_apart_by_their_sockets() -> None:
    record = load("completed")
    record["source_host"], record["destination_host"] = "vm (run/a.sock)", "vm (run/b.sock)"
    assert "between two daemons on vm in" in sentence(read_record(record))
    record["outcome"] = "in-doubt"
    assert "handed over to vm (run/b.sock)" in sentence(read_record(record))
    record["outcome"] = "completed"
    record["destination_host"] = "vm2 (run/b.sock)"
    assert "from vm to vm2 in" in sentence(read_record(record))


def test_what_the_operator_held_does_not_count_against_the_limit(tmp_path: Path) -> None:
    record = load("late")
    record["downtime"] |= {"measured_ns": 1_090_000_000, "hold_ns": 1_000_000_000, "limit_violated": False}
    assert "1.09\u00a0s (1\u00a0s of it held by the operator), 90\u00a0% of the 100\u00a0ms" in sentence(
        read_record(record)
    )
    assert "kept, 90\u00a0% of it used" in page_of(record, tmp_path / "report.html").texts["header"]


def test_in_doubt_shows_a_guest_that_is_kept_stopped(tmp_path: Path) -> None:
    record = load("completed") | {"outcome": "in-doubt", "downtime": None, "time": None}
    page = page_of(record, tmp_path / "report.html")
    assert "kept stopped on host-a until" in page.texts["header"]
    looks = [attributes.get("class") for tag, attributes in page.tags if tag == "i"]
    assert "bar stopped" in looks
    assert "bar runs-destination" not in looks


@pytest.mark.parametrize(
    ("form", "value", "expected"),
    [
        (short, 605_780_316, "605.8 ms"),
        (short, 2_406_842_204, "2.41 s"),
        (short, -13_930, "-13.93 µs"),
        (short, 999, "999 ns"),
        (short, 300_000_000, "300 ms"),
        (size, 1536, "1.5 KiB"),
        (size, 0, "0 B"),
        (rate, 173805937.0, "165.75 MiB/s"),
        (percent, 0.304, "30 %"),
        (percent, 0.0049, "0.5 %"),
        (grouped, -1234567, "-1 234 567"),
    ],
)
def test_figures_for_people(form: Any, value: Any, expected: str) -> None:
    assert form(value).replace("\u202f", " ").replace("\u00a0", " ") == expected


@given(st.integers(-(1 << 63), 1 << 63))
def test_exact_milliseconds_lose_nothing(ns: int) -> None:
    shown = re.sub("<[^>]*>|\u202f", "", exact_ms(ns))
    assert Decimal(shown).scaleb(6) == ns


@given(st.integers(-(1 << 40), 1 << 50), st.integers(1, 1 << 50))
def test_an_axis_has_few_round_ticks(from_ns: int, span_ns: int) -> None:
    step_ns, ticks = Axis(from_ns, span_ns).ticks()
    assert 1 <= len(ticks) <= 7 or span_ns < 5
    assert all(from_ns <= ns <= from_ns + span_ns and ns % step_ns == 0 for ns, _ in ticks)
    assert len({label for _, label in ticks}) == len(ticks)


@given(st.lists(st.floats(0, 1e15), min_size=1), st.sampled_from([10, 16]))
def test_a_scale_holds_its_values_in_order(values: list[float], base: int) -> None:
    scale = Scale.over(values, base)
    heights = [scale.at(value) for value in sorted(values)]
    assert all(-1e-6 <= height <= 100 + 1e-6 for height in heights)
    assert heights == sorted(heights, reverse=True)
    assert 2 <= len(scale.ticks) <= 8


def luminance(color: str) -> float:
    """Relative luminance of ``#rrggbb`` (WCAG 2)."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_stand_out(scheme: str, tmp_path: Path) -> None:
    page = page_of(load("refused"), tmp_path / "report.html")
    blocks = re.findall(r":root \{(.*?)\}", page.texts["style"], re.DOTALL)
    colors = dict(re.findall(r"--(\w+): (#\w{6});", blocks[scheme == "dark"]))
    for ground in ("page", "surface"):
        for name in ("ink", "muted", "source", "link", "destination", "rest", "good", "warn", "bad"):
            first, second = luminance(colors[name]), luminance(colors[ground])
            contrast = (max(first, second) + 0.05) / (min(first, second) + 0.05)
            assert contrast >= 4.5, f"{name} on {ground}: {contrast:.2f}"
