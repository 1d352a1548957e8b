"""A peer's record or report: read when it is one, refused quickly and without memory when it is a bomb."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from migrated.base.errors import DocumentError
from migrated.destination.half import check_record
from migrated.record.model import DestinationHalf, Record
from migrated.record.received import MAX_BYTES, MAX_DEPTH, read_received
from protocol import messages
from protocol.guest import PAGE_SIZE, GuestDescription, MemoryRegion
from protocol.messages import Limits, TimeRules

RECORDS = sorted((Path(__file__).parents[1] / "data" / "records").glob("*.json"))
HALF = DestinationHalf(host="b", load_ns={'disk "0" [{/non-iterable': 5}, digest="00")

BOMBS = {
    "nested lists": (b"[" * (2 << 20), f"nested more than {MAX_DEPTH} deep"),
    "nested maps": (b'{"a":' * (1 << 16), f"nested more than {MAX_DEPTH} deep"),
    "many small values": (b"[" + b"1," * 900_000 + b"1]", "values, at most"),
    "many empty maps": (b"[" + b"{}," * 600_000 + b"{}]", "values, at most"),
    "an endless number": (b'{"host":"b","reserve_ns":' + b"9" * 4000 + b"}", "more than 24 digits"),
    "more than any record": (b'"' + b"x" * MAX_BYTES + b'"', "bytes, at most"),
    "a list of faults": (b'{"host":"b","events":[' + b"1," * 90_000 + b"1]}", "cannot be read"),
    "a list of objects that lack everything": (b'{"events":[' + b"{}," * 49_000 + b"{}]}", "faults"),
    "unknown members": (b"{" + b",".join(b'"k%d":1' % n for n in range(50_000)) + b"}", "has 50000 members, at most"),
    "lists that close before they open": (b"]" * (1 << 20) + b"[" * 1000, "no JSON"),
    "no JSON": (b"\xff\x00", "no JSON"),
    "nothing": (b"", "no JSON"),
    "quotes that do not end": (b'"' * ((1 << 20) + 1), "about 524288 texts"),
    "infinity": (b'{"host":"b","reserve_ns":1e999}', "faults"),
}


def test_a_report_is_read() -> None:
    assert read_received(DestinationHalf, HALF.model_dump_json().encode(), "half of the record") == HALF


class Peak:
    """The most memory that this process took in a block, beyond what it had: also that of libraries that are not
    Python's."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        self._before_kib = self._kib("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = (self._kib("VmHWM") - self._before_kib) << 10

    def _kib(self, name: str) -> int:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition(f"{name}:")[2].split()[0])


@pytest.mark.parametrize("model", [DestinationHalf, Record])
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_in_little_time_and_memory(name: str, model: type[DestinationHalf | Record]) -> None:
    payload, words = BOMBS[name]
    begin = time.process_time()
    with Peak() as peak, pytest.raises(DocumentError, match=words):
        read_received(model, payload, "document")
    assert time.process_time() - begin < 0.3, "one such took 25 s, another 0.6 s"
    assert peak.bytes < 24 << 20, "one such took 3.9 GiB, another 329 MiB"


def hello(**changes: Any) -> messages.Hello:
    values: dict[str, Any] = {
        "migration_id": "0123456789abcdef" * 2,
        "epoch": 3,
        "guest": GuestDescription(
            name="g1", uuid="00000000-0000-0000-0000-0000000000a1", vmm="sim", guest_time=False, machine="sim",
            page_size=PAGE_SIZE, devices=(), vcpus=1, guest_freq=0,
            memory=(MemoryRegion(name="ram", guest_address=0, size_bytes=PAGE_SIZE, offset_pages=0),),
        ),
        "guest_paused": False,
        "capabilities": (),
        "required": (),
        "limits": Limits(downtime_limit_ns=1, switchover_limit_ns=0, switchover_abort=True),
        "time_rules": TimeRules(policy="midpoint", max_time_jump_ns=0, max_time_error_ns=0),
        "channels": 1,
        "host": "a",
    }  # fmt: skip
    return messages.Hello(**{**values, **changes})


NOW = datetime.now(UTC)


def record(**changes: Any) -> Record:
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in RECORDS]
    completed = next(one for one in documents if one["outcome"] == "completed")
    offer = hello()
    own = {"migration_id": offer.migration_id, "guest": "g1", "epoch": 3, "started_at": NOW.isoformat()}
    return Record.model_validate({**completed, **own, **changes})


def test_the_record_of_this_attempt_is_taken() -> None:
    check_record(record(), hello(), NOW.isoformat(), runs_here=True)
    check_record(record(outcome="aborted"), hello(), NOW.isoformat(), runs_here=False)


@pytest.mark.parametrize(
    ("changes", "runs_here", "words"),
    [
        ({"migration_id": "f" * 32}, True, "not of this attempt"),
        ({"guest": "another"}, True, "not of this attempt"),
        ({"epoch": 4}, True, "not of this attempt"),
        ({"outcome": "completed"}, False, "does not run here"),
        ({"outcome": "aborted"}, True, "the guest runs here"),
        ({"started_at": "2099-01-01T00:00:00+00:00"}, True, "days from when it was offered"),
        ({"started_at": (NOW - timedelta(days=2)).isoformat()}, True, "days from when it was offered"),
        ({"started_at": "2026-01-01T00:00:00"}, True, "no date with a time zone"),
        ({"started_at": "soon"}, True, "no date with a time zone"),
        ({"started_at": "9" * 4000}, True, "no date with a time zone"),
    ],
)
def test_what_is_not_of_this_attempt_is_not_taken(changes: dict[str, Any], runs_here: bool, words: str) -> None:
    with pytest.raises(DocumentError, match=words):
        check_record(record(**changes), hello(), NOW.isoformat(), runs_here)
