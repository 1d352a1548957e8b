"""The report against the record: every number on the page is the record's, also in a comparison of two."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from migrated.base.errors import DocumentError
from migrated.record.model import (
    Record,
)
from migrated.report import write_comparison, write_report
from migrated.report.fields import exact_ms, short
from tests.migrated.report_pages import RECORDS, Page, assert_complete, leaves, load, page_of

REAL = sorted(path.stem for path in RECORDS.glob("*.json"))


@pytest.mark.parametrize("name", REAL)
def test_every_number_on_the_page_equals_the_record(name: str, tmp_path: Path) -> None:
    record = load(name)
    page = page_of(record, tmp_path / "report.html")
    assert_complete(page, Record.model_validate(record).document())
    assert json.loads(page.texts["document"]) == record


@pytest.mark.parametrize("name", REAL)
def test_what_is_written_is_what_is_meant(name: str, tmp_path: Path) -> None:
    """The visible figure, not only the attribute: whole numbers in full, milliseconds to the nanosecond."""
    checked = 0
    for path, value, shown in page_of(load(name), tmp_path / "report.html").fields:
        digits = shown.replace("\u202f", "")
        if type(value) is not int or re.search("[A-Za-zµ]", digits):
            continue  # words, and rounded figures with their unit; their exact value is in the attribute
        checked += 1
        if re.fullmatch(r"-?\d+\.\d{6}", digits):
            assert Decimal(digits) * 1_000_000 == value, path
        else:
            assert int(digits) == value, path
    assert checked > 10


UNITS = {"ns": 1, "µs": 1e3, "ms": 1e6, "s": 1e9, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@pytest.mark.parametrize("name", REAL)
def test_rounded_figures_are_the_records_to_their_last_digit(name: str, tmp_path: Path) -> None:
    """``93.00 ms``, ``1.69 GiB``, ``292.99 MiB/s``: the unit is right, and what is left away is less than a digit."""
    checked = set()
    for path, value, shown in page_of(load(name), tmp_path / "report.html").fields:
        figure = re.fullmatch(r"(-?[\d\u202f]+)(\.\d+)?\u00a0(ns|µs|ms|s|B|KiB|MiB|GiB)(/s)?", shown)
        if not figure or type(value) not in (int, float):
            continue
        factor = UNITS[figure[3]]
        told = float((figure[1] + (figure[2] or "")).replace("\u202f", "")) * factor
        last_digit = factor / 10 ** max(0, len(figure[2] or ".") - 1)
        # Trailing zeros may have been left away: two decimals are the least that a size has.
        assert abs(told - value) <= (last_digit if figure[3] in ("ns", "µs", "ms", "s") else factor / 100), path
        assert path.endswith("_bytes_per_s") == bool(figure[4]), path
        checked.add(path)
    assert {"total_ns", "ram.total_bytes"} <= checked


def test_the_head_says_where_the_downtime_went_and_what_took_longer(tmp_path: Path) -> None:
    record = load("completed")
    parts = sorted(record["downtime"]["parts"], key=lambda part: -part["ns"])
    head = page_of(record, tmp_path / "report.html").texts["header"]
    assert f"Most of it: {parts[0]['name']} {short(parts[0]['ns'])}" in head
    assert "Longer than predicted" not in head
    loads = next(part["ns"] for part in parts if part["name"] == "device-loads")
    record["downtime"]["predicted_parts_ns"]["device-loads"] = loads // 3
    head = page_of(record, tmp_path / "report.html").texts["header"]
    assert f"Longer than predicted: device-loads, by {short(loads - loads // 3)}." in head


def test_what_was_cut_short_is_not_called_a_wrong_prediction(tmp_path: Path) -> None:
    head = page_of(load("aborted"), tmp_path / "report.html").texts["header"]
    assert "for a switchover to its end" in head
    assert "too high" not in head
    assert "until-abort" in head
    longest = max((ns, name) for name, ns in load("aborted")["downtime"]["predicted_parts_ns"].items())
    assert f"Predicted to take longest: {longest[1]}, {short(longest[0])}." in head


@pytest.mark.parametrize("name", ["completed", "aborted", "late"])
def test_the_parts_on_the_page_sum_to_its_downtime(name: str, tmp_path: Path) -> None:
    page = page_of(load(name), tmp_path / "report.html")
    shown = {path: text.replace("\u202f", "") for path, _, text in page.fields if "\u202f" in text or "." in text}
    parts = [Decimal(text) for path, text in shown.items() if re.fullmatch(r"downtime\.parts\.\d+\.ns", path)]
    assert len(parts) == len(load(name)["downtime"]["parts"])
    whole = [value for path, value, _ in page.fields if path == "downtime.measured_ns"][-1]
    assert sum(parts) + Decimal(shown["downtime.unattributed_ns"]) == Decimal(whole) / 1_000_000


def test_bars_stand_where_the_parts_lie(tmp_path: Path) -> None:
    """stop | final-dirty-log-read | ... end to end from 0: --b is where a bar begins, --n how long it is (ns)."""
    record = load("completed")
    write_report(record, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    table = html.partition('aria-label="Parts of the downtime"')[2].partition("</table>")[0]
    begin = 0
    for part in record["downtime"]["parts"]:
        row = table.partition(f">{part['name']}</data>")[2].partition("</tr>")[0]
        assert f"--b:{begin};--n:{part['ns']}" in row
        assert f"bar {part['side']}" in row
        begin += part["ns"]


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    write_report(load("completed"), tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert "src" not in attributes
        assert str(attributes.get("href", "#")).startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import|https?://", html)
    policy = next(str(a["content"]) for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.texts["script"].encode()).digest()).decode()
    assert policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}'" in policy


def test_links_and_names_are_sound(tmp_path: Path) -> None:
    page = page_of(load("completed"), tmp_path / "report.html")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert [f"#{name}" for name in ids if f"#{name}" in links] == links
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert drawings
    assert all(a.get("aria-label") or a.get("aria-hidden") == "true" for a in drawings)


def test_a_record_of_another_version_is_shown_as_far_as_it_is_known(tmp_path: Path) -> None:
    record = load("completed")
    record["invented"] = {"later": 1}
    record["downtime"]["invented"] = 7
    del record["events"], record["ram"]["encodings"], record["downtime"]["hold_ns"]
    page = page_of(record, tmp_path / "report.html")
    assert json.loads(page.texts["document"]) == record
    assert page.values()["downtime.hold_ns"] == 0
    assert "downtime.invented" not in page.values()


@pytest.mark.parametrize(("change", "where"), [({"ram": None}, "ram"), ({"outcome": "odd"}, "outcome")])
def test_what_is_no_record_is_refused(change: dict[str, Any], where: str, tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=rf"no record .* \({where}: .*use the version that wrote it\."):
        write_report(load("completed") | change, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_comparison_shows_both_and_the_difference(tmp_path: Path) -> None:
    a, b = load("completed"), load("late")
    write_comparison(a, b, tmp_path / "both.html")
    html = (tmp_path / "both.html").read_text(encoding="utf-8")
    page = Page(html)
    both = dict(leaves({"a": a, "b": b}))
    shown = page.values()
    assert all(value == both[path] for path, value in shown.items())
    for letter, record in (("a", a), ("b", b)):
        for index in range(len(record["downtime"]["parts"])):
            assert f"{letter}.downtime.parts.{index}.ns" in shown
        for index in range(len(record["devices"])):
            assert f"{letter}.devices.{index}.load_ns" in shown
    change = b["downtime"]["measured_ns"] - a["downtime"]["measured_ns"]
    assert str(exact_ms(change)) in html
    assert f"In B the guest stood still {short(-change)} shorter" in page.texts["header"]
    assert "timeout_s" in page.texts["parameters"]
    assert "channels" not in page.texts["parameters"]


def test_a_comparison_with_an_attempt_that_never_stopped(tmp_path: Path) -> None:
    write_comparison(load("refused"), load("completed"), tmp_path / "both.html")
    page = Page((tmp_path / "both.html").read_text(encoding="utf-8"))
    assert "Only one of them stopped its guest" in page.texts["header"]
    assert "downtime" not in page.texts
