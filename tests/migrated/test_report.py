"""The report against the record: every number on the page is the record's, and no record can break the page."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import types
from collections.abc import Callable, Iterator
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from migrated.base.errors import DocumentError
from migrated.record.model import (
    Checkpoint,
    DeviceRow,
    Digest,
    Downtime,
    LogLine,
    PhaseRow,
    Ram,
    Record,
    RoundRow,
    TimeSummary,
)
from migrated.record.reading import read_record
from migrated.report import attempt, write_comparison, write_report
from migrated.report.appendix import further
from migrated.report.charts import Axis, Scale
from migrated.report.fields import Fields, exact_ms, grouped, percent, rate, short, size
from migrated.report.markup import el, join, text
from migrated.report.summary import sentence

RECORDS = Path(__file__).parents[1] / "data" / "records"
REAL = sorted(path.stem for path in RECORDS.glob("*.json"))
HOSTILE = "</pre></title><script>alert(1)</script><b onload=\"x\" a='&amp;'>\x00\x1b[31m\u202e$body ${policy}"


def load(name: str) -> dict[str, Any]:
    """A record that two real daemons wrote, as this version reads it: fields that are younger than it are empty."""
    return Record.model_validate_json((RECORDS / f"{name}.json").read_bytes()).document()


class Page(HTMLParser):
    """A parsed page: its fields, its tags, and its texts by the id of the section. Checks that tags are balanced."""

    VOID = frozenset({"meta", "wbr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.fields: list[tuple[str, Any, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._open: list[str] = []
        self._section = ""
        self._data: tuple[str, Any, list[str]] | None = None
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag in self.VOID:
            return
        self._open.append(tag)
        if tag in ("section", "header", "pre", "title", "style", "script"):
            self._section = attributes.get("id") or tag
        if tag == "data":
            assert self._data is None
            value = attributes["value"]
            assert value is not None
            self._data = (str(attributes["data-field"]), json.loads(value), [])

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "script":
            self._section = ""
        if tag == "data":
            assert self._data is not None
            path, value, texts = self._data
            self.fields.append((path, value, "".join(texts)))
            self._data = None

    def handle_data(self, data: str) -> None:
        self.texts[self._section] = self.texts.get(self._section, "") + data
        if self._data is not None:
            self._data[2].append(data)

    def values(self) -> dict[str, Any]:
        """The value of every field; a field that is shown twice must say the same."""
        found: dict[str, Any] = {}
        for path, value, _ in self.fields:
            assert found.setdefault(path, value) == value
        return found


def page_of(record: dict[str, Any], path: Path) -> Page:
    write_report(record, path)
    return Page(path.read_text(encoding="utf-8"))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every path and value of a document, written differently from the report's own walk."""
    if not isinstance(value, dict | list):
        yield path, value
        return
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield from leaves(value[key], f"{path}.{key}".lstrip("."))


def assert_complete(page: Page, record: dict[str, Any]) -> None:
    """Every leaf that holds something is on the page, with its exact value; nothing else is."""
    shown, expected = page.values(), dict(leaves(record))
    for path, value in expected.items():
        if value is not None:
            assert path in shown, f"{path} is not on the page"
            assert shown[path] == value
            assert type(shown[path]) is type(value)
    assert set(shown) <= set(expected)


# --- real records -----------------------------------------------------------------------------------------------------


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


# --- any record -------------------------------------------------------------------------------------------------------


def values_of(annotation: Any, metadata: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    """Values of one field of a record, from its type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = annotation.__metadata__
        return values_of(arguments[0], (*metadata, *(m for i in inner for m in getattr(i, "metadata", [i]))))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return documents(annotation)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, types.UnionType):
        return st.one_of([values_of(argument, metadata) for argument in arguments])
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is ...:
            return st.lists(values_of(arguments[0]), max_size=3)
        return st.tuples(*(values_of(argument) for argument in arguments)).map(list)
    if origin is dict:
        return st.dictionaries(st.sampled_from(["stop", "memory", "device-saves", "legs"]), values_of(arguments[1]))
    if annotation in (int, float):
        low: Any = next((m.ge for m in metadata if isinstance(m, annotated_types.Ge)), -(1 << 62))
        high: Any = next((m.le for m in metadata if isinstance(m, annotated_types.Le)), 1 << 62)
        if annotation is float:
            return st.floats(float(low), float(high), allow_nan=False)
        return st.integers(low, high) | st.integers(max(low, -9), min(high, 2_000_000))
    simple = {str: st.sampled_from(["g1", "Pause", "", HOSTILE, "2026-01-01T00:00:00+00:00"]), bool: st.booleans()}
    return st.none() if annotation is type(None) else simple[annotation]


def documents(model: type[BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
    """Documents of a model, whatever members it has."""
    members = {name: values_of(field.annotation, tuple(field.metadata)) for name, field in model.model_fields.items()}
    return st.fixed_dictionaries(members)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(record=documents(Record), other=documents(Record))
def test_any_record_makes_a_complete_page(
    record: dict[str, Any], other: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Numbers of every size and sign, empty lists, nothing where there may be nothing, and hostile texts."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    page = page_of(record, path)
    assert_complete(page, Record.model_validate(record).document())
    assert [tag for tag, _ in page.tags].count("script") == 1
    write_comparison(record, other, path)
    shown = Page(path.read_text(encoding="utf-8")).values()
    expected = dict(leaves({"a": record, "b": other}))
    assert shown
    assert all(value == expected[name] for name, value in shown.items())


def test_nothing_that_a_peer_wrote_becomes_markup(tmp_path: Path) -> None:
    record = load("aborted")
    record["guest"] = record["reason"] = record["destination_host"] = record["started_at"] = HOSTILE
    for device in record["devices"]:
        device["name"] = HOSTILE
    for line in record["events"]:
        line["event"] = line["level"] = line["at"] = HOSTILE
    page = page_of(record, tmp_path / "report.html")
    assert_complete(page, record)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert [tag for tag, _ in page.tags].count("section") == len(attempt.SECTIONS) - 2  # no guest time, nothing further
    assert json.loads(page.texts["document"]) == record
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not set("\x00\x1b\u202e") & set(html)


def test_markup_escapes_every_text_once() -> None:
    assert text('<a & "b">\ud800\n') == "&lt;a &amp; &quot;b&quot;&gt;\ufffd "
    assert el("p", "<", el("b", "&"), None, class_="x", data_a='"', hidden=True, title=None) == (
        '<p class="x" data-a="&quot;" hidden>&lt;<b>&amp;</b></p>'
    )
    assert join(["<", el("i")], " & ") == "&lt; &amp; <i></i>"


class News(BaseModel):
    """What a record may grow."""

    gap_ns: int = 1_234_567
    lost_bytes: int = 2048
    seen: bool = True
    none: str | None = None


class GrownRecord(Record):
    """A record with a member that no section of the report knows."""

    news: News = News()


def test_a_field_that_no_section_knows_is_shown_all_the_same(record_of: Callable[..., Record]) -> None:
    fields = Fields(GrownRecord.model_validate(record_of().model_dump()), "", {})
    for path in fields.rest():
        if not path.startswith("news."):
            fields.show(path)
    section = further(fields)
    assert section is not None
    page = Page(section.render())
    assert page.fields == [
        ("news.gap_ns", 1_234_567, "1.234567"),
        ("news.lost_bytes", 2048, "2\u00a0KiB"),
        ("news.seen", True, "yes"),
    ]
    assert further(fields) is None


# --- other versions ---------------------------------------------------------------------------------------------------


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


# --- two records ------------------------------------------------------------------------------------------------------


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


# --- words and figures ------------------------------------------------------------------------------------------------


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


# --- colours ----------------------------------------------------------------------------------------------------------


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


# --- the documentation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heading", "kind"),
    [
        ("record", Record),
        ("downtime", Downtime),
        ("devices", DeviceRow),
        ("checkpoints", Checkpoint),
        ("rounds", RoundRow),
        ("ram", Ram),
        ("phases", PhaseRow),
        ("time", TimeSummary),
        ("digest", Digest),
        ("events", LogLine),
    ],
)
def test_every_member_of_a_record_is_documented(heading: str, kind: type[BaseModel]) -> None:
    """The first table under the heading of docs/record.md has exactly the members of the model."""
    document = (Path(__file__).parents[2] / "docs" / "record.md").read_text(encoding="utf-8")
    table = document.partition(f"\n## {heading}\n")[2].partition("|---|---|\n")[2].partition("\n\n")[0]
    named = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(kind.model_fields)
