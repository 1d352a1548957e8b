"""The sections on the transfer: memory rounds, devices, encodings and the digest."""

from __future__ import annotations

from collections.abc import Callable

from migrated.record.model import RoundRow
from migrated.report.charts import Axis, Bar, Series, Track, plot, tracks
from migrated.report.fields import Fields, rate, short, size
from migrated.report.markup import Markup, breakable, el
from migrated.report.pieces import Section, chip, facts_list, note, section, share, table


def rounds(fields: Fields) -> Section | None:
    """The rounds: pages sent and left dirty by each, and why the guest was not stopped then."""
    paths = fields.rows("rounds")
    if not paths:
        return None
    heads = (
        "round",
        "scanned",
        "left dirty",
        "zero",
        "sent",
        "time ms",
        "scan ms",
        "bandwidth",
        "dirtied pages/s",
        "predicted ms",
        "bound ms",
        "throttle %",
        "fence ms",
    )
    rows = [
        (
            fields.show(f"{path}.round"),
            fields.count(f"{path}.scanned_pages", "pages"),
            fields.count(f"{path}.dirty_pages", "pages"),
            fields.count(f"{path}.zero_pages", "pages"),
            fields.size(f"{path}.bytes"),
            fields.ms(f"{path}.ns"),
            fields.ms(f"{path}.scan_ns"),
            fields.rate(f"{path}.bandwidth_bytes_per_s"),
            fields.count(f"{path}.dirty_rate_pages_per_s", "pages/s"),
            fields.ms(f"{path}.predicted_downtime_ns"),
            fields.ms(f"{path}.predicted_upper_ns"),
            fields.show(f"{path}.throttle_percent"),
            fields.ms(f"{path}.fence_ns"),
        )
        for path in paths
    ]
    decisions = [fields.show(f"{path}.decision") for path in paths]
    return section(
        "rounds", "Memory rounds", *round_plots(fields), table("Memory rounds", heads, rows, beneath=decisions)
    )


def round_plots(fields: Fields) -> list[Markup]:
    """Plots over the rounds: pages, bandwidth, predicted downtime. One round needs no plot."""
    rounds, page = fields.record.rounds, fields.record.ram.page_size
    if len(rounds) < 2:
        return []
    numbers = [row.round for row in rounds]
    limit_ns = round(fields.record.parameters.downtime_limit_ms * 1e6)

    def line(name: str, look: str, value: Callable[[RoundRow], float | None]) -> Series:
        return Series(name, look, tuple(map(value, rounds)))

    plots = [
        plot(
            "Sent, and left dirty",
            [
                line("sent", "source", lambda row: row.bytes),
                line("dirty after it", "link", lambda row: row.dirty_pages * page),
            ],
            numbers,
            size,
            base=16,
        ),
        plot(
            "Bandwidth against dirty rate",
            [
                line("bandwidth", "source", lambda row: row.bandwidth_bytes_per_s),
                line("dirtied", "link", lambda row: row.dirty_rate_pages_per_s * page),
            ],
            numbers,
            rate,
            base=16,
        ),
        plot(
            "Predicted downtime",
            [
                line("predicted", "destination", lambda row: row.predicted_downtime_ns),
                line("its bound", "link", lambda row: row.predicted_upper_ns),
            ],
            numbers,
            lambda ns: short(round(ns)) if ns else "0",
            base=10,
            limit=("limit", limit_ns),
        ),
    ]
    return [el("div", *plots, class_="plots")]


def devices(fields: Fields) -> Section | None:
    """The devices: size of their states, time to save and to load them."""
    if not fields.record.devices:
        return None
    rows = []
    longest = 1
    for index, device in enumerate(fields.record.devices):
        path = f"devices.{index}"
        save, load, expected = device.save_ns, device.load_ns, device.expected_load_ns
        longest = max(longest, save or 0, load or 0, expected or 0)
        bars = []
        if save:
            bars.append(Bar(0, save, "source upper", f"save {short(save)}"))
        if load:
            bars.append(Bar(0, load, "destination lower", f"load {short(load)}"))
        if expected:
            bars.append(Bar(expected, 0, "instant expected", f"expected load {short(expected)}"))
        cells = (
            fields.show(f"{path}.kind"),
            fields.size(f"{path}.bytes"),
            fields.size(f"{path}.precopy_bytes"),
            fields.ms(f"{path}.save_ns"),
            fields.ms(f"{path}.load_ns"),
            fields.ms(f"{path}.expected_load_ns"),
        )
        rows.append(Track(fields.show(f"{path}.name", breakable(device.name)), cells, tuple(bars)))
    heads = ("device", "kind", "state", "in pre-copy", "SAVE ms", "LOAD ms", "expected LOAD ms")
    return section(
        "devices",
        "Devices",
        tracks("Devices, what saving and loading them took", heads, rows, Axis(0, round(longest * 1.02) + 1)),
        note(
            chip("source", "SAVE"),
            " on the source and ",
            chip("destination", "LOAD"),
            " on the destination; a line marks the load that the destination had expected. Devices are loaded while "
            "later ones are saved and sent, so the sum of the loads may exceed what they add to the downtime.",
        ),
    )


def memory(fields: Fields) -> Section:
    """Totals of the memory transfer, the gain of its encodings, and the digests."""
    facts = [
        (path.removeprefix("ram."), fields.by_name(path)) for path in fields.members("ram") if path != "ram.encodings"
    ]
    digest = [(path, fields.show(path)) for path in fields.members("digest")]
    heads = ("encoding", "batches", "page bytes", "wire bytes", "on the wire", "time ms")
    rows = []
    for index, encoding in enumerate(fields.record.ram.encodings):
        path = f"ram.encodings.{index}"
        rows.append(
            (
                fields.show(f"{path}.encoding"),
                fields.count(f"{path}.batches"),
                fields.size(f"{path}.page_bytes"),
                fields.size(f"{path}.wire_bytes"),
                share(encoding.wire_bytes, encoding.page_bytes),
                fields.ms(f"{path}.ns"),
            )
        )
    return section(
        "memory",
        "Memory, encodings and digest",
        facts_list([*facts, *digest]),
        table("Encodings", heads, rows) if rows else None,
    )
