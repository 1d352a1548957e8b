"""The documents of a fleet: what is written is read again, what is broken is named, and no key grows with the fleet."""

from __future__ import annotations

import json

import pytest

from migrated.base.errors import DocumentError
from migrated.fleet.keys import Keys, last_part
from migrated.fleet.model import (
    MAX_CURVE_POINTS,
    MAX_DOCUMENT_BYTES,
    MAX_LANDING,
    MAX_NAMES,
    MAX_REASON,
    MAX_SLOTS,
    MAX_TRIED,
    CurvePoint,
    Forecast,
    GuestDocument,
    HostDocument,
    HostSlots,
    JobKind,
    JobSpec,
    JobStep,
    Ownership,
    Reservation,
    StepState,
    parse,
)

HOST = HostDocument(name="a", address="tcp:127.0.0.1:7000", version="0.1.0", memory_bytes=1 << 34)
LONG_NAME = "n" * 64
LONG_FEATURE = "f" * 128


def test_a_document_is_read_as_it_was_written_and_leaves_out_what_is_usual() -> None:
    step = JobStep(guest="g", state=StepState.RESERVED, source="a", destination="b", memory_bytes=1, tried=("c",))
    assert parse(JobStep, "k", step.to_bytes()) == step
    assert "max_inbound" not in json.loads(HOST.to_bytes())


def test_what_a_newer_daemon_adds_is_left_out() -> None:
    assert parse(Ownership, "k", b'{"owner": "a", "epoch": 3, "colour": "red"}') == Ownership(owner="a", epoch=3)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (b'{"owner": "a"}', "The key k holds no Ownership: epoch: Field required"),
        (b'{"owner": "a", "epoch": "3"}', "epoch"),
        (b"\xff", "The key k holds no Ownership"),
        (b" " * (MAX_DOCUMENT_BYTES + 1), "bytes"),
    ],
)
def test_what_is_no_such_document_is_named_with_its_key(value: bytes, says: str) -> None:
    with pytest.raises(DocumentError, match=says):
        parse(Ownership, "k", value)


def test_every_key_is_below_the_prefix_and_ends_with_what_it_is_of() -> None:
    keys = Keys("/migrated/lab/")
    for of_host in (keys.host, keys.cordon, keys.fence, keys.slots_of):
        assert of_host("a").startswith("/migrated/lab/")
        assert last_part(of_host("a")) == "a"
    assert last_part(keys.job_step("j1", "g")) == "g"
    assert keys.job_step("j1", "g").startswith(keys.job_steps("j1"))
    ones = (keys.guest("x"), keys.owner("x"), keys.host("x"), keys.job_spec("x"), keys.job_state("x"))
    assert len({*ones, keys.job_worker("x")}) == 6


def test_the_largest_documents_fit_their_bound() -> None:
    """Bounds of lists and texts hold each key below MAX_DOCUMENT_BYTES, whatever the size of the fleet."""
    features = tuple(f"{number:03}{LONG_FEATURE[3:]}" for number in range(MAX_NAMES))
    reservation = Reservation(guest=LONG_NAME, job="j" * 40, peer=LONG_NAME, memory_bytes=1 << 44, attempt=1 << 62)
    curve = tuple(CurvePoint(ns=1 << 62, pages=1 << 62) for _ in range(MAX_CURVE_POINTS))
    documents = (
        HOST.model_copy(update={"cpu_features": features}),
        HostSlots(inbound=(reservation,) * MAX_LANDING, outbound=(reservation,) * MAX_SLOTS),
        GuestDocument(
            name=LONG_NAME,
            vmm="qemu",
            memory_bytes=1 << 44,
            downtime_limit_ns=1 << 62,
            cpu_features=features,
            forecast=Forecast(data_bytes=1 << 62, dirty=curve),
        ),
        JobSpec(
            job="j" * 40,
            kind=JobKind.EVACUATE,
            host=LONG_NAME,
            guests=(LONG_NAME,) * MAX_NAMES,
            to=(LONG_NAME,) * MAX_NAMES,
            created_utc_ns=1 << 62,
            by=LONG_FEATURE,
        ),
        JobStep(
            guest=LONG_NAME,
            source=LONG_NAME,
            destination=LONG_NAME,
            memory_bytes=1 << 44,
            tried=(LONG_NAME,) * MAX_TRIED,
            reason="\u00e9" * MAX_REASON,
            migration_id=LONG_FEATURE,
        ),
    )
    for document in documents:
        value = document.to_bytes()
        assert len(value) <= MAX_DOCUMENT_BYTES
        assert parse(type(document), "k", value) == document


def test_reserved_memory_is_that_of_what_comes_in() -> None:
    one = Reservation(guest="g", job="j", peer="b", memory_bytes=5, attempt=1)
    assert HostSlots(inbound=(one, one), outbound=(one,)).inbound_bytes == 10
