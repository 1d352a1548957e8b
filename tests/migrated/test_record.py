"""The record's closed sets: parts, components, groups, checkpoints, outcomes; and that parts sum to the whole."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from migrated.base.errors import DocumentError
from migrated.observe.progress import Progress, read_progress
from migrated.record.model import (
    Checkpoint,
    DeviceRow,
    Digest,
    Downtime,
    DowntimePart,
    LogLine,
    PhaseRow,
    Ram,
    Record,
    RoundRow,
    TimeSummary,
    downtime_of,
)
from migrated.record.parts import CUT_FINER, Component, LogGroup, Part, PredictedPart, find_part, predicted_names
from migrated.record.reading import read_record
from migrated.record.terms import FINISHED, OUTCOMES, SIDES, STATUS_OF, Phase, QemuCheckpoint, Side, Status

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "record.md").read_text(encoding="utf-8")

# What each part meant before there was a table of them: records in a history must go on meaning the same.
COMPONENT_AND_GROUP = {
    "stop": ("stop", "stop"),
    "stop-drain": ("stop", "stop"),
    "hold": (None, "stop"),
    "downtime-message": ("legs", "completing"),
    "fence": ("dirty-log", "final_memory_delta"),
    "final-dirty-log-read": ("dirty-log", "final_memory_delta"),
    "final-pages": ("state", "final_memory_delta"),
    "device-saves": ("state", "snapshot"),
    "dirty-log-read-after-saves": ("dirty-log", "final_memory_delta"),
    "pages-after-saves": ("state", "final_memory_delta"),
    "state-end": ("legs", "completing"),
    "last-pages-leg": ("state", "completing"),
    "device-loads": ("device-loads", "completing"),
    "digest-check": ("legs", "completing"),
    "completing": ("legs", "completing"),
    "state-end-and-ready-legs": ("legs", "sending_snapshot"),
    "decision": ("legs", "completing"),
    "journal": ("legs", "completing"),
    "lock-release": ("legs", "completing"),
    "commit-leg": ("legs", "completing"),
    "commit-journal": ("legs", "completing"),
    "resume": ("resume", "completing"),
    "until-abort": ("legs", "completing"),
}

durations = st.integers(min_value=0, max_value=10**10)
parts_with_lengths = st.dictionaries(st.sampled_from(Part), durations, max_size=len(Part))


def table_under(heading: str) -> list[list[str]]:
    """The cells of a table of the document: the one that begins with this row of heads."""
    lines = DOCUMENT.partition(heading)[2].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_component_and_group_of_every_part() -> None:
    assert {part.label: (part.component, part.group) for part in Part} == COMPONENT_AND_GROUP


def test_the_document_names_every_part_with_its_side_and_no_other() -> None:
    rows = table_under("| part | side | from, to |")
    documented = {(name, side) for names, side, _ in rows for name in re.findall(r"`([a-z-]+)`", names)}
    assert documented == {(part.label, part.side) for part in Part}


def test_every_part_that_the_document_advises_on_is_in_the_table() -> None:
    advised = re.findall(r"`([a-z-]+)`", " ".join(row[0] for row in table_under("| it is mostly | then look at |")))
    assert len(advised) > 5
    assert set(advised) <= {part.label for part in Part}


def test_the_document_names_every_checkpoint_phase_outcome_and_piece_of_a_prediction() -> None:
    named = set(re.findall(r"`([A-Za-z-]+)`", DOCUMENT))
    assert {point.label for point in QemuCheckpoint} <= named
    assert set(OUTCOMES) <= named
    assert {piece.label for piece in PredictedPart} <= named
    # A hold is a phase of the progress only, and so is the end; in a record the hold is a part.
    assert {phase.value for phase in Phase} - {Phase.HOLD, Phase.FINISH} <= named


def test_no_part_checkpoint_or_phase_is_spelled_outside_the_tables() -> None:
    """Of words that mean nothing else: one that a status or a component has too may be spelled."""
    others = {*get_args(Status), *Component, *(piece.label for piece in PredictedPart)}
    names = {part.label for part in Part if "-" in part.label} | {point.label for point in QemuCheckpoint}
    names |= {phase.value for phase in Phase if phase.value.startswith("Ram")}
    assert len(names - others) > 20
    spelled = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}"
        for path in (ROOT / "migrated").rglob("*.py")
        if path.parent.name != "record"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names - others
    ]
    assert spelled == []


def test_a_part_is_found_by_its_name_and_side_and_an_unknown_one_is_not() -> None:
    for part in Part:
        assert find_part(part.label, part.side) is part
    assert find_part("resume", "link") is None
    later = DowntimePart(name="wake-up-of-2031", side="link", ns=1)
    assert (later.known, later.component, later.group) == (None, Component.LEGS, LogGroup.COMPLETING)


def test_every_component_is_predicted_by_name_and_reached_by_a_part() -> None:
    assert [name for component in Component for name in predicted_names(component)] == [p.label for p in PredictedPart]
    assert {part.component for part in Part} == {*Component, None}
    assert {part.group for part in Part} == {*LogGroup}


def test_what_is_cut_finer_comes_before_its_part() -> None:
    order = list(Part)
    for whole, pieces in CUT_FINER.items():
        assert all(order.index(piece) < order.index(whole) for piece in pieces)


def test_sides_are_the_same_set_in_an_order() -> None:
    assert set(SIDES) == set(get_args(Side))


def test_every_outcome_leaves_a_status_and_only_doubt_leaves_the_attempt_open() -> None:
    assert set(STATUS_OF) == set(OUTCOMES)
    assert {outcome for outcome, status in STATUS_OF.items() if status not in FINISHED} == {"in-doubt"}
    assert set(get_args(Status)) > FINISHED


@given(parts_with_lengths, durations, durations)
def test_parts_and_the_rest_sum_to_the_whole_by_part_by_component_and_by_group(
    lengths: dict[Part, int], rest_ns: int, limit_ns: int
) -> None:
    hold_ns = lengths.get(Part.HOLD, 0)
    downtime = downtime_of(
        lower_ns=0, upper_ns=0, measured_ns=sum(lengths.values()) + rest_ns, limit_ns=limit_ns,
        parts=(DowntimePart.of(part, ns) for part, ns in lengths.items()), predicted_ns=None, predicted_upper_ns=None,
        source_reported_ns=None, destination_measured_ns=None, hold_ns=hold_ns,
    )  # fmt: skip
    assert downtime.unattributed_ns == rest_ns
    assert sum(part.ns for part in downtime.parts) + downtime.unattributed_ns == downtime.measured_ns
    assert sum(downtime.by_component().values()) == downtime.counted_ns == downtime.measured_ns - hold_ns
    assert sum(downtime.by_group().values()) + rest_ns == downtime.measured_ns
    assert downtime.limit_violated == (downtime.counted_ns > limit_ns)


# --- documents of other versions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests" / "data" / "records").glob("*.json")), ids=lambda path: path.stem
)
def test_a_record_of_an_older_version_is_read_with_what_it_lacks_at_its_default(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    assert not any("fence_ns" in row or "predicted_upper_ns" in row for row in document["rounds"])
    record = read_record(document)
    assert all(row.fence_ns == 0 and row.predicted_upper_ns is None for row in record.rounds)
    assert all(part.known is not None for part in (record.downtime.parts if record.downtime else ()))


def test_what_a_newer_version_added_is_left_out_wherever_it_stands(record_of: Callable[..., Record]) -> None:
    record = record_of()
    newer = json.loads(json.dumps(record.document()))
    newer["carbon_g"] = 7
    newer["rounds"][1]["weather"] = "fine"
    newer["downtime"]["parts"][0]["mood"] = None
    newer["parameters"]["teleport"] = True
    assert read_record(newer) == record
    assert newer["carbon_g"] == 7, "the document itself stays as it was told"


def test_a_record_with_a_part_of_a_newer_version_is_read_and_sums_up(record_of: Callable[..., Record]) -> None:
    newer = record_of().document()
    newer["downtime"]["parts"].append({"name": "wake-up-of-2031", "side": "link", "ns": 250_000})
    newer["downtime"]["unattributed_ns"] -= 250_000
    downtime = read_record(newer).downtime
    assert downtime is not None
    assert sum(downtime.by_component().values()) == downtime.measured_ns


def test_what_cannot_be_read_is_told_in_a_sentence(
    record_of: Callable[..., Record], progress_of: Callable[..., Progress]
) -> None:
    told = "The document is no record that this version of migrated can read (outcome: "
    with pytest.raises(DocumentError, match=re.escape(told) + ".*use the version that wrote it"):
        read_record(record_of().document() | {"outcome": "teleported"})
    newer = progress_of().model_dump(mode="json")
    assert read_progress(newer | {"mood": "fine"}) == progress_of()
    with pytest.raises(DocumentError, match=r"no snapshot of a migration that this version .*status"):
        read_progress(newer | {"status": "dreaming"})


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
    table = DOCUMENT.partition(f"\n## {heading}\n")[2].partition("|---|---|\n")[2].partition("\n\n")[0]
    named = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(kind.model_fields)
