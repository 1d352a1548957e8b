"""Two attempts side by side: the changes from A to B, in total, part by part, device by device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from migrated.record.model import RoundRow
from migrated.report.charts import Axis, Bar, Series, Track, magnified, plot, tracks
from migrated.report.downtime import part_bars
from migrated.report.fields import Fields, exact_ms, grouped, join_unit, percent, rate, short, size
from migrated.report.markup import Markup, Node, breakable, el, join
from migrated.report.pieces import Section, contents, legend, note, section, table
from migrated.report.summary import badge, began, sentence

FIGURES: Final = (
    "downtime.measured_ns",
    "downtime.lower_ns",
    "downtime.upper_ns",
    "downtime.limit_ns",
    "downtime.predicted_ns",
    "downtime.predicted_upper_ns",
    "downtime.unattributed_ns",
    "downtime.hold_ns",
    "total_ns",
    "setup_ns",
    "ram.total_bytes",
    "ram.transferred_bytes",
    "ram.precopy_bytes",
    "ram.downtime_bytes",
    "ram.downtime_pages",
    "ram.zero_pages",
    "ram.sparse_pages",
    "ram.dirty_sync_count",
    "ram.channels",
    "time.elapsed_ns",
    "time.round_trip_ns",
    "time.tsc_delta",
)
HEADS: Final = ("A ms", "B ms", "change ms")


def body(a: Fields, b: Fields) -> Markup:
    """The whole page on two attempts."""
    made = (_figures(a, b), _parts(a, b), _checkpoints(a, b), _rounds(a, b), _devices(a, b), _parameters(a, b))
    sections = [one for one in made if one is not None]
    return join([_header(a, b), contents(sections), *(one.render() for one in sections)])


def _header(a: Fields, b: Fields) -> Markup:
    pair = [
        el(
            "section",
            el("h2", f"{letter}: ", fields.show("guest"), " ", badge(fields)),
            el("p", sentence(fields.record)),
            el("p", el("b", "Reason: "), fields.show("reason"), class_="reason") if fields.record.reason else None,
            el(
                "p",
                el("span", "migration ", fields.show("migration_id")),
                el("span", "began ", began(fields), " UTC"),
                el("span", fields.show("source_host"), " → ", fields.show("destination_host")),
                class_="identity",
            ),
        )
        for letter, fields in (("A", a), ("B", b))
    ]
    return el(
        "header",
        el("p", "migrated · two migrations compared", class_="kicker"),
        el("h1", _verdict(a, b)),
        el("div", *pair, class_="pair"),
    )


def _verdict(a: Fields, b: Fields) -> str:
    there, here = a.record.downtime, b.record.downtime
    if there is None or here is None:
        return "Only one of them stopped its guest" if there or here else "Neither stopped its guest"
    first, second = there.measured_ns, here.measured_ns
    if first == second:
        return "The guests stood still for the same time"
    relation = "longer" if second > first else "shorter"
    share = f" ({percent(abs(second - first) / first)})" if first else ""
    return f"In B the guest stood still {short(abs(second - first))} {relation}{share}"


def _figures(a: Fields, b: Fields) -> Section:
    rows: list[tuple[Node, ...]] = []
    for path in FIGURES:
        first, second = _found(a, path), _found(b, path)
        if first is not None or second is not None:
            shown = (_cell(a, path, first), _cell(b, path, second))
            rows.append((_title(path), *shown, *_change(path, first, second)))
    counts = [len(fields.record.rounds) for fields in (a, b)]
    rows.append(("rounds", *map(str, counts), *_change("rounds", *counts)))
    return section("figures", "Figures", table("Figures of both", ("", "A", "B", "change", ""), rows))


def _title(path: str) -> str:
    return path.removesuffix("_ns").replace("ram.", "memory.").replace("_", " ").replace(".", ": ")


def _found(fields: Fields, path: str) -> Any:
    head = path.partition(".")[0]
    return None if fields[head] is None else fields[path]


def _cell(fields: Fields, path: str, value: Any) -> Node:
    return "" if value is None else fields.by_name(path)


def _change(path: str, first: Any, second: Any) -> tuple[Node, Node]:
    """The difference, and its share of the first."""
    if first is None or second is None:
        return "", ""
    change = second - first
    share = f"{change / first * 100:+.1f} %" if first and change else ""
    return _signed(path, change), share


def _signed(path: str, change: int) -> Node:
    sign = "+" if change > 0 else "-" if change < 0 else ""
    if path.endswith("_ns"):
        return join_unit(join([sign, exact_ms(abs(change))]), "ms")
    return sign + (size(abs(change)) if path.endswith("_bytes") else grouped(abs(change)))


def _parts(a: Fields, b: Fields) -> Section | None:
    first, second = a.record.downtime, b.record.downtime
    if first is None or second is None:
        return None
    longest = max(first.measured_ns, second.measured_ns)
    bars = []
    for letter, downtime in (("A", first), ("B", second)):
        measured = downtime.measured_ns
        bars.append(el("p", f"{letter}: {short(measured)}", class_="by-side"))
        bars.append(magnified(f"The downtime of {letter}, {short(measured)}", part_bars(downtime), longest))
    rows = list(_aligned(a, b, "downtime.parts", ("name", "side"), "ns"))
    for name in ("unattributed_ns", "measured_ns"):
        path = f"downtime.{name}"
        what = {"unattributed_ns": "unattributed", "measured_ns": "downtime"}[name]
        rows.append(_row(what, (a, path, a[path]), (b, path, b[path]), "sum-row" if name == "measured_ns" else ""))
    return section(
        "downtime",
        "The downtime, part by part",
        *bars,
        legend(),
        tracks("Parts of both downtimes", ("part", *HEADS), rows, Axis(0, max(1, round(longest * 1.01)))),
        _key(),
    )


def _key() -> Markup:
    return note("Upper bars are A, lower bars are B.")


def _checkpoints(a: Fields, b: Fields) -> Section | None:
    rows = list(_aligned(a, b, "checkpoints", ("name",), "ns"))
    if not rows:
        return None
    end_ns = max(point.ns for fields in (a, b) for point in fields.record.checkpoints)
    axis = Axis(0, max(1, round(end_ns * 1.01)))
    return section(
        "checkpoints",
        "QEMU’s checkpoints",
        tracks("Checkpoints of both", ("checkpoint", *HEADS), rows, axis),
        _key(),
    )


def _devices(a: Fields, b: Fields) -> Section | None:
    found = [device for fields in (a, b) for device in fields.record.devices]
    pieces: list[Markup] = []
    for member, title in (("save_ns", "SAVE on the source"), ("load_ns", "LOAD on the destination")):
        rows = list(_aligned(a, b, "devices", ("name", "kind"), member))
        end_ns = max([1, *(getattr(device, member) or 0 for device in found)])
        if rows:
            pieces.append(el("p", el("b", title)))
            pieces.append(tracks(title, ("device", *HEADS), rows, Axis(0, round(end_ns * 1.01) + 1)))
    return section("devices", "Devices", *pieces, _key()) if pieces else None


def _aligned(a: Fields, b: Fields, path: str, keys: tuple[str, ...], member: str) -> Iterator[Track]:
    """Return the members of two lists that have the same keys, side by side: in A's order, then those that only B
    has."""
    sides: list[dict[tuple[str, ...], str]] = []
    for fields in (a, b):
        found: dict[tuple[str, ...], str] = {}
        for row in fields.rows(path):
            # A device or a part that is there twice is told apart by counting.
            key = tuple(str(fields[f"{row}.{name}"]) for name in keys)
            found[(*key, str(sum(known[:-1] == key for known in found)))] = row
        sides.append(found)
    for key in dict.fromkeys([*sides[0], *sides[1]]):
        ends = [
            (
                fields,
                f"{found[key]}.{member}" if key in found else "",
                fields[f"{found[key]}.{member}"] if key in found else None,
            )
            for fields, found in zip((a, b), sides, strict=True)
        ]
        yield _row(join([breakable(key[0]), el("small", *key[1:-1], class_="meaning")]), ends[0], ends[1])


def _row(name: Node, first: tuple[Fields, str, Any], second: tuple[Fields, str, Any], look: str = "") -> Track:
    cells: list[Node] = [fields.ms(path) if path else "" for fields, path, _ in (first, second)]
    known = first[2] is not None and second[2] is not None
    change = second[2] - first[2] if known else 0
    cells.append(join(["+" if change > 0 else None, exact_ms(change)]) if known else "")
    bars = [
        Bar(0, ns, which, f"{which[0].upper()}: {short(ns)}")
        for (_, _, ns), which in ((first, "a upper"), (second, "b lower"))
        if ns and ns > 0
    ]
    return Track(name, tuple(cells), tuple(bars), look)


def _rounds(a: Fields, b: Fields) -> Section | None:
    longest = max(len(a.record.rounds), len(b.record.rounds))
    if longest < 2:
        return None

    def lines(value: Callable[[RoundRow, int], float | None]) -> list[Series]:
        found = []
        for name, look, fields in (("A", "a", a), ("B", "b", b)):
            values = [value(row, fields.record.ram.page_size) for row in fields.record.rounds]
            found.append(Series(name, look, (*values, *[None] * (longest - len(values)))))
        return found

    numbers = range(1, longest + 1)
    plots = [
        plot("Left dirty", lines(lambda row, page: row.dirty_pages * page), numbers, size, base=16),
        plot("Bandwidth", lines(lambda row, _: row.bandwidth_bytes_per_s), numbers, rate, base=16),
        plot("Predicted downtime", lines(lambda row, _: row.predicted_downtime_ns), numbers, _time, base=10),
    ]
    return section("rounds", "Memory rounds", el("div", *plots, class_="plots"))


def _time(ns: float) -> str:
    return short(round(ns)) if ns else "0"


def _parameters(a: Fields, b: Fields) -> Section:
    rows = [
        (path.removeprefix("parameters."), a.by_name(path), b.by_name(path))
        for path in a.members("parameters")
        if a[path] != b[path]
    ]
    told = table("Parameters that differ", ("", "A", "B"), rows) if rows else note("Both had the same parameters.")
    return section("parameters", "Parameters that differ", told)
