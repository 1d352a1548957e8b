"""A record as the report reads it: every leaf has a path, and every shown figure carries its path and exact value.

``<data data-field="downtime.measured_ns" value="605780316">605.780316</data>`` lets a script or a test compare the page
with the record, and ``rest`` lists the members that no section has shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from migrated.record.model import Record
from migrated.report.markup import Markup, Node, el, text
from protocol.units import format_rate, format_size

THIN: Final = "\u202f"
"""Groups the digits of a number; does not break a line."""
UNBROKEN: Final = "\u00a0"
"""Between a number and its unit."""
NOTHING: Final = "–"


def grouped(value: int) -> str:
    """A whole number, its digits in groups of three."""
    return f"{value:,}".replace(",", THIN)


def exact_ms(ns: int) -> Markup:
    """Nanoseconds as milliseconds, all six decimals, the last three subdued."""
    sign = "-" if ns < 0 else ""
    whole, rest = divmod(abs(ns), 1_000_000)
    return Markup(f"{sign}{grouped(whole)}.{rest // 1000:03}<small>{rest % 1000:03}</small>")


def short(ns: int) -> str:
    """A duration for a sentence: ``605.8 ms``, ``2.41 s``."""
    for factor, unit in ((1_000_000_000, "s"), (1_000_000, "ms"), (1_000, "µs")):
        if abs(ns) >= factor:
            value = ns / factor
            digits = 0 if ns % factor == 0 or abs(value) >= 1000 else 1 if abs(value) >= 100 else 2
            return f"{value:.{digits}f}{UNBROKEN}{unit}"
    return f"{ns}{UNBROKEN}ns"


def percent(value: float) -> str:
    """A share for a sentence, with as many digits as it deserves."""
    return f"{value * 100:.{0 if abs(value) >= 0.1 else 1}f}{UNBROKEN}%"


class Fields:
    """The leaves of one record document.

    The sections compute with ``record``, and show figures by their paths.

    Args:
        record: the record.
        prefix: tells the records of a comparison apart ("a.", "b.").
        original: the document as it was given, perhaps of another version.
    """

    def __init__(self, record: Record, prefix: str, original: Mapping[str, Any]) -> None:
        self.record = record
        self.original = original
        self._document = record.document()
        self._prefix = prefix
        self._leaves = dict(_leaves(self._document, ""))
        self._shown: set[str] = set()

    def __getitem__(self, path: str) -> Any:
        """The value at a path such as ``downtime.parts.0.ns``."""
        if path in self._leaves:
            return self._leaves[path]
        value: Any = self._document
        for step in path.split("."):
            value = value[int(step)] if isinstance(value, list) else value[step]
        return value

    def rows(self, path: str) -> list[str]:
        """The paths of a list's members."""
        return [f"{path}.{index}" for index in range(len(self[path]))]

    def members(self, path: str) -> list[str]:
        """The paths of an object's members."""
        return [f"{path}.{name}" for name in self[path]]

    def rest(self) -> list[str]:
        """The paths of leaves that hold something and that nothing has shown."""
        return [path for path, value in self._leaves.items() if value is not None and path not in self._shown]

    def show(self, path: str, shown: Node = None, *, title: str | None = None) -> Markup:
        """The value at ``path``, as ``shown`` or as it is."""
        value = self[path]
        self._shown.add(path)
        if shown is None:
            shown = _plain(value)
        return el("data", shown, data_field=self._prefix + path, value=json.dumps(value), title=title)

    def _number(self, path: str, form: Callable[[Any], Node], unit: str) -> Markup:
        value = self[path]
        if value is None:
            return self.show(path)
        number = grouped(value) if isinstance(value, int) else str(value)
        return self.show(path, form(value), title=f"{number} {unit}".strip())

    def ms(self, path: str) -> Markup:
        """Nanoseconds as exact milliseconds, without the unit."""
        return self._number(path, exact_ms, "ns")

    def short(self, path: str) -> Markup:
        """Nanoseconds, rounded, with a unit."""
        return self._number(path, short, "ns")

    def size(self, path: str) -> Markup:
        """Bytes, rounded, with a unit."""
        return self._number(path, size, "bytes")

    def rate(self, path: str) -> Markup:
        """Bytes per second, rounded, with a unit."""
        return self._number(path, rate, "bytes/s")

    def count(self, path: str, unit: str = "") -> Markup:
        """A number; a whole one in full, a float rounded to a whole one."""
        return self._number(path, lambda value: grouped(round(value)), unit)

    def by_name(self, path: str) -> Markup:
        """A value in the form that the unit at the end of its name asks for."""
        forms = {
            "_bytes_per_s": self.rate,
            "_bytes": self.size,
            "_ns": self.ms,
            "_pages": self.count,
            "_second": self.count,
        }
        value = self[path]
        if isinstance(value, int | float) and not isinstance(value, bool):
            for suffix, form in forms.items():
                if path.endswith(suffix):
                    return join_unit(form(path), "ms" if suffix == "_ns" else "")
        return self.show(path)


def join_unit(shown: Markup, unit: str) -> Markup:
    """A number and its unit, on one line."""
    return Markup(f"{shown}{UNBROKEN}{text(unit)}") if unit else shown


def size(value: float) -> str:
    """Bytes for people."""
    return _spaced(format_size(round(value)))


def rate(value: float) -> str:
    """Bytes per second for people."""
    return _spaced(format_rate(round(value)))


def _spaced(formatted: str) -> str:
    """The number and its unit apart: ``1.33 GiB``."""
    digits = formatted.rstrip("/sBKMGTi")
    return f"{digits}{UNBROKEN}{formatted[len(digits) :]}"


def _plain(value: object) -> str:
    if value is None or value == "":
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return grouped(value)
    if isinstance(value, float):
        return grouped(int(value)) if value.is_integer() else f"{value:g}"
    return str(value)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping | list):
        members = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, member in members:
            yield from _leaves(member, f"{path}.{name}" if path else str(name))
    else:
        yield path, value
