"""No record can break the report: numbers of every size, empty members, hostile texts, members it does not know."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from migrated.record.model import (
    Record,
)
from migrated.report import attempt, write_comparison
from migrated.report.appendix import further
from migrated.report.fields import Fields
from migrated.report.markup import el, join, text
from tests.migrated.report_pages import HOSTILE, Page, assert_complete, leaves, load, page_of


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
