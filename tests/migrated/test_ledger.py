"""The ongoing record of an outgoing attempt, and the frozen one that it becomes.

stop | final-pages | state-end | completing (destination) | legs | commit-leg | resume (destination)
                                 last-pages-leg, device-loads, digest-check    commit-journal
"""

from __future__ import annotations

from migrated.record.model import DestinationHalf, DowntimePart, Record, RoundRow
from migrated.record.parts import Part
from migrated.record.terms import Phase, QemuCheckpoint
from migrated.settings.parameters import MigrationParameters
from migrated.source.encoding import EncodingTotals
from migrated.source.ledger import DeviceFigures, OutgoingLedger
from protocol.budget import DowntimeInterval
from protocol.guest import PAGE_SIZE, DeviceDescription

MS = 1_000_000


def new_ledger(began_ns: int = 0) -> OutgoingLedger:
    parameters = MigrationParameters(downtime_limit_ms=100, channels=3)
    return OutgoingLedger("0" * 32, "web", 2, "tcp:b:4460", "a", parameters, began_ns=began_ns)


def round_row(number: int) -> RoundRow:
    return RoundRow(
        round=number, scanned_pages=1, dirty_pages=1, zero_pages=0, bytes=4096, ns=MS, scan_ns=0,
        bandwidth_bytes_per_s=1.0, dirty_rate_pages_per_s=1.0, predicted_downtime_ns=None, decision="not yet",
    )  # fmt: skip


def parts_of(record: Record) -> list[tuple[str, str, int]]:
    assert record.downtime is not None
    return [(part.name, part.side, part.ns) for part in record.downtime.parts]


def blackout(*details: DowntimePart) -> OutgoingLedger:
    """A completed switchover of 20 ms, of which the destination's share is 9 ms before its vote and 3 ms to resume."""
    ledger = new_ledger()
    ledger.part(Part.STOP, 0, 2 * MS)
    ledger.part(Part.FINAL_PAGES, 2 * MS, 6 * MS)
    ledger.add_part(Part.COMPLETING, 9 * MS)
    ledger.add_part(Part.COMMIT_LEG, 1 * MS)
    ledger.add_part(Part.RESUME, 3 * MS)
    ledger.blackout.interval = DowntimeInterval(19 * MS, 21 * MS)
    ledger.half = DestinationHalf(host="b", parts=details)
    return ledger


def test_the_destinations_pieces_take_their_place_before_their_part_and_all_sums_to_the_whole() -> None:
    record = blackout(
        DowntimePart.of(Part.LAST_PAGES_LEG, 1 * MS),
        DowntimePart.of(Part.DEVICE_LOADS, 5 * MS),
        DowntimePart.of(Part.DIGEST_CHECK, 2 * MS),
        DowntimePart.of(Part.COMMIT_JOURNAL, 1 * MS),
        DowntimePart.of(Part.RESUME, 2 * MS),
    ).finish("completed", None, [])
    assert parts_of(record) == [
        ("stop", "source", 2 * MS),
        ("final-pages", "source", 4 * MS),
        ("last-pages-leg", "link", 1 * MS),
        ("device-loads", "destination", 5 * MS),
        ("digest-check", "destination", 2 * MS),
        ("completing", "destination", 1 * MS),
        ("commit-leg", "link", 1 * MS),
        ("commit-journal", "destination", 1 * MS),
        ("resume", "destination", 2 * MS),
    ]
    assert record.downtime is not None
    assert record.downtime.unattributed_ns == 20 * MS - sum(ns for _, _, ns in parts_of(record)) == 1 * MS


def test_pieces_that_are_longer_than_their_part_cannot_be_right_and_are_left_out() -> None:
    record = blackout(DowntimePart.of(Part.DEVICE_LOADS, 10 * MS)).finish("completed", None, [])
    assert ("completing", "destination", 9 * MS) in parts_of(record)
    assert "device-loads" not in [name for name, _, _ in parts_of(record)]


def test_the_sources_own_resume_after_an_abort_is_not_cut() -> None:
    ledger = new_ledger()
    ledger.add_part(Part.RESUME_ON_SOURCE, 3 * MS)
    ledger.blackout.interval = DowntimeInterval(3 * MS, 3 * MS)
    ledger.half = DestinationHalf(host="b", parts=(DowntimePart.of(Part.COMMIT_JOURNAL, 1 * MS),))
    assert parts_of(ledger.finish("aborted", "too late", [])) == [("resume", "source", 3 * MS)]


def test_an_attempt_that_never_stopped_its_guest_has_no_downtime() -> None:
    record = new_ledger().finish("refused", "no room", [])
    assert record.downtime is None
    assert (record.outcome, record.reason) == ("refused", "no room")


def test_all_figures_of_both_sides_are_in_the_record() -> None:
    ledger = new_ledger(began_ns=1_000)
    ledger.setup_ns, ledger.ended_ns = 100 * MS, 1_000 + 1_100 * MS
    memory = ledger.memory
    memory.pages, memory.sparse_pages, memory.normal_pages, memory.zero_pages = 100, 20, 90, 5
    memory.precopy_bytes, memory.precopy_pages, memory.downtime_bytes, memory.downtime_pages = 3000, 80, 500, 20
    memory.encodings = {"zstd": EncodingTotals(batches=2, page_bytes=8192, wire_bytes=100, ns=7)}
    nvme = DeviceDescription(
        name="nvme0", kind="non-iterable", state_bytes=10, expected_save_ns=0, expected_load_ns=0
    )  # fmt: skip
    ledger.devices = {("nvme0", "non-iterable"): DeviceFigures(nvme, save_ns=5, final_bytes=10, expected_load_ns=9)}
    ledger.half = DestinationHalf(host="b", load_ns={"nvme0/non-iterable": 8}, digest="ab")
    ledger.blackout.source_digest = 0xAB
    ledger.add_phase(Phase.PAUSE, 1_000 + 5, 1_000 + 9)
    ledger.checkpoint(QemuCheckpoint.VM_STOPPED, 4)
    line = {"at": "2026-01-01T00:00:00Z", "level": "info", "event": "begun"}
    record = ledger.finish("completed", None, [line])
    assert (record.total_ns, record.setup_ns) == (1_100 * MS, 100 * MS)
    ram = record.ram
    assert (ram.total_bytes, ram.sparse_pages, ram.transferred_bytes) == (100 * PAGE_SIZE, 20, 3500)
    assert (ram.channels, ram.pages_per_second) == (3, 100.0)
    assert [(row.encoding, row.wire_bytes) for row in ram.encodings] == [("zstd", 100)]
    (device,) = record.devices
    assert (device.save_ns, device.load_ns, device.expected_load_ns, device.bytes) == (5, 8, 9, 10)
    assert [(phase.name, phase.begin_ns, phase.end_ns) for phase in record.phases] == [("Pause", 5, 9)]
    assert [(point.name, point.side, point.ns) for point in record.checkpoints] == [("src-vm-stopped", "source", 4)]
    assert (record.digest.source, record.digest.destination) == (f"{0xAB:016x}", "ab")
    assert [(one.side, one.event) for one in record.events] == [("source", "begun")]


def test_a_record_of_very_many_rounds_keeps_the_first_and_the_newest() -> None:
    ledger = new_ledger()
    for number in range(1, 5001):
        ledger.rounds.add(round_row(number))
    kept = [row.round for row in ledger.finish("failed", "no end", []).rounds]
    assert ledger.rounds.count == 5000
    assert len(kept) <= 1000
    assert kept[0] == 1
    assert kept[-400:] == list(range(4601, 5001))
    assert kept == sorted(kept)
