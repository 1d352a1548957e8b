"""What a host tells its fleet of itself and its guests, and what people see of a fleet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from migrated.fleet.mirror import Mirror
from migrated.fleet.model import Fence, HostDocument, JobState, JobStep, StepState
from migrated.fleet.store import Entry
from migrated.member.facts import forecast, guest_document, link_bytes_per_s, usual_forecast
from migrated.member.identity import Identity
from migrated.member.local import LocalGuest
from migrated.member.views import hosts_view, job_view
from migrated.prediction.knowledge import Knowledge
from migrated.record.model import Record, RoundRow
from migrated.report.evacuation import write_evacuation
from tests.migrated.fleet.fleets import GIB, KEYS, MIB, MS, S, guest, host, mirror_of, spec
from tests.migrated.predictions import PRIOR, predict, record_of


def round_row(rate: float, ns: int = S, pages: int = 100) -> RoundRow:
    return RoundRow(
        round=1, scanned_pages=0, dirty_pages=pages, zero_pages=0, bytes=int(rate), ns=ns, scan_ns=0,
        bandwidth_bytes_per_s=rate, dirty_rate_pages_per_s=0, predicted_downtime_ns=None, decision="",
    )  # fmt: skip


def attempt(rate: float, begin_s: int, *, capped: bool = False) -> Record:
    """A record of an attempt of ten seconds with one round at a rate (bytes per second)."""
    record = record_of(predict(Knowledge(PRIOR)), {})
    parameters = record.parameters.model_copy(update={"max_bandwidth_bytes_per_s": int(rate) if capped else 0})
    return record.model_copy(
        update={
            "started_at": f"2026-01-01T00:{begin_s // 60:02}:{begin_s % 60:02}+00:00",
            "total_ns": 10 * S,
            "rounds": (round_row(rate), round_row(rate / 4, S // 4, 50)),
            "parameters": parameters,
        }
    )


@pytest.mark.parametrize(
    ("oldest_first", "expected"),
    [
        ([], 0),
        ([attempt(100 * MIB, 0)], 100 * MIB),
        ([attempt(100 * MIB, 0), attempt(60 * MIB, 60)], 100 * MIB),
        ([attempt(100 * MIB, 0), *(attempt(60 * MIB, at) for at in (60, 80, 100, 120))], 60 * MIB),
        ([attempt(100 * MIB, 0), attempt(50 * MIB, 60, capped=True)], 100 * MIB),
        ([attempt(40 * MIB, 0), attempt(50 * MIB, 60, capped=True)], 50 * MIB),
        ([attempt(200 * MIB, 0, capped=True)], 200 * MIB),
        ([attempt(40 * MIB, 0, capped=True)], 0),
        ([attempt(40 * MIB, 0), attempt(50 * MIB, 0)], 90 * MIB),
        ([attempt(40 * MIB, 0), attempt(50 * MIB, 2)], 50 * MIB),
    ],
    ids=[
        "nothing",
        "one",
        "a busy host shows less",
        "the newest count",
        "a cap is no limit of the link",
        "a cap shows more",
        "a fast cap alone",
        "a cap alone shows nothing",
        "together",
        "one after the other",
    ],
)
def test_the_speed_of_a_link_is_what_migrations_have_shown(oldest_first: list[Record], expected: int) -> None:
    assert link_bytes_per_s(oldest_first[::-1]) == expected


def test_a_forecast_is_the_last_migration() -> None:
    found = forecast(attempt(100 * MIB, 0))
    assert found is not None
    assert found.data_bytes == 100 * MIB
    assert [(point.ns, point.pages) for point in found.dirty] == [(S // 4, 50)]
    assert forecast(attempt(100 * MIB, 0).model_copy(update={"outcome": "refused"})) is None


def test_figures_that_no_migration_can_have_show_nothing() -> None:
    """A destination keeps what the source's record says, and tells its fleet what it makes of that."""
    strange = attempt(100 * MIB, 60)
    rounds = (round_row(1 << 70, 1), *strange.rounds, round_row(100 * MIB, 10**23, -(1 << 70)))
    record = strange.model_copy(update={"rounds": rounds})
    assert forecast(record) is None
    assert link_bytes_per_s([record, attempt(50 * MIB, 0)]) == 100 * MIB


def test_the_usual_costs_are_those_in_the_middle_of_the_last_migrations() -> None:
    assert usual_forecast([]) is None
    attempts = [attempt(100 * MIB, 0).model_copy(update={"setup_ns": setup_ns}) for setup_ns in (S, 9 * S, 2 * S)]
    usual = usual_forecast([*attempts, attempt(MIB, 0).model_copy(update={"outcome": "refused"})])
    assert usual is not None
    assert (usual.setup_ns, usual.data_bytes, usual.dirty) == (2 * S, 0, ())


def test_a_guest_is_described_with_its_group_and_what_its_vmm_may_use() -> None:
    needs = frozenset({"kvm", "qemu machine q35"})
    qemu = guest_document(LocalGuest("db-1", "qemu", GIB, False), 300 * MS, None, ["web-*", "db-*"], needs, ("avx2",))
    assert (qemu.group, qemu.cpu_features, qemu.forecast) == ("db-*", ("avx2",), None)
    assert set(qemu.devices) == needs
    emulated = guest_document(LocalGuest("x", "qemu", GIB, False), 300 * MS, None, ["db-*"], frozenset(), ("avx2",))
    assert (emulated.group, emulated.cpu_features, emulated.devices) == (None, (), ())


def seen(hosts: list[HostDocument], **extra: Any) -> dict[str, list[str]]:
    mirror = mirror_of(hosts, [guest("g1")], owner="a")
    for number, (key, document) in enumerate(extra.items(), 100):
        mirror.put(Entry(KEYS.fence(key), document.to_bytes(), number))
    return {one["name"]: one["problems"] for one in hosts_view(mirror)}


def test_what_is_wrong_with_a_host_is_said() -> None:
    healthy = [host("a", clock_offset_ns=0), host("b", clock_offset_ns=S)]
    assert seen(healthy) == {"a": [], "b": []}
    (late,) = seen([*healthy, host("c", clock_offset_ns=9 * S)])["c"]
    assert "ahead of" in late
    (old,) = seen([*healthy, host("c", version="0.0.9")])["c"]
    assert "0.0.9" in old
    (lost,) = seen([host("b")])["a"]
    assert "holds no lease" in lost
    assert lost.endswith(": 1.")
    assert any("fenced" in line for line in seen(healthy, b=Fence(by="x", since_utc_ns=0))["b"])


def there(daemon: str) -> Mirror:
    return mirror_of([host("a", daemon=daemon)], [])


def test_a_daemon_knows_the_one_before_it_from_another_one_of_its_name(tmp_path: Path) -> None:
    before, now = Identity("a", tmp_path, "boot-1"), Identity("a", tmp_path, "boot-1")
    assert now.stranger(mirror_of([], [])) is None
    assert now.stranger(there(before.daemon)) is None, "it was killed, and its lease has not ended yet"
    copied = Identity("a", tmp_path, "boot-2")
    assert copied.stranger(there(before.daemon)) is not None, "a machine that was copied with its state directory"
    now.told()
    assert now.stranger(there(now.daemon)) is None
    assert now.stranger(there(before.daemon)) is not None, "it has ended, and cannot have written after this one"
    (tmp_path / "other").mkdir()
    refusal = now.stranger(there(Identity("a", tmp_path / "other", "boot-1").daemon))
    assert refusal is not None
    assert "as 'a', at tcp:a:7000" in refusal


def job_mirror() -> Mirror:
    mirror = mirror_of([host("a"), host("b")], [guest("g1"), guest("g2")])
    steps = [
        JobStep(
            guest="g1", state=StepState.DONE, source="a", destination="b", memory_bytes=GIB, attempt=1,
            began_utc_ns=S, ended_utc_ns=3 * S, downtime_ns=400 * MS, expected_end_ns=2 * S,
        ),
        JobStep(
            guest="g2", state=StepState.FAILED, source="a", memory_bytes=GIB, order=1, attempt=4,
            reason="No host <b>can</b>.",
        ),
    ]  # fmt: skip
    mirror.put(Entry(KEYS.job_spec("j1"), spec().to_bytes(), 50))
    mirror.put(Entry(KEYS.job_state("j1"), JobState().to_bytes(), 51))
    for number, step in enumerate(steps, 60):
        mirror.put(Entry(KEYS.job_step("j1", step.guest), step.to_bytes(), number))
    return mirror


def test_a_job_is_shown_with_its_guests_and_those_that_stood_too_long() -> None:
    view = job_view(job_mirror(), "j1", 5 * S)
    assert (view["done"], view["late"], view["total_ns"]) == (1, 1, 5 * S)
    assert [(one["guest"], one["state"], one["limit_ns"]) for one in view["guests"]] == [
        ("g1", "done", 300 * MS),
        ("g2", "failed", 300 * MS),
    ]


def test_a_report_has_every_guest_of_a_job_and_nothing_unescaped(tmp_path: Path) -> None:
    path = tmp_path / "job.html"
    write_evacuation(job_view(job_mirror(), "j1", 5 * S), path)
    page = path.read_text(encoding="utf-8")
    assert page.count(">g1<") >= 2
    assert page.count(">g2<") >= 2
    assert "No host &lt;b&gt;can&lt;/b&gt;." in page
    assert "400" in page
