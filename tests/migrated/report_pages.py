"""Reports as tests read them: real records, and a parsed page with its fields, tags and texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from migrated.record.model import (
    Record,
)
from migrated.report import write_report

RECORDS = Path(__file__).parents[1] / "data" / "records"
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
