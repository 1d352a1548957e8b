"""Predictions and records to test with: a guest whose switchover costs what its bases say, or another figure."""

from __future__ import annotations

from migrated.prediction.decision import Observation
from migrated.prediction.knowledge import Knowledge
from migrated.prediction.model import Bases, Prediction
from migrated.record.model import Digest, DowntimePart, Ram, Record, downtime_of
from migrated.record.parts import Component, Part
from migrated.record.terms import Outcome
from migrated.settings.parameters import MigrationParameters
from migrated.state.learned import load_prior

MS = 1_000_000
PRIOR = load_prior()
EMPTY = Knowledge(PRIOR).document()
BASES = Bases(
    stop_ns=1 * MS, dirty_log_ns=1 * MS, memory_ns=40 * MS, save_ns=10 * MS, load_ns=30 * MS, legs_ns=1 * MS,
    resume_ns=2 * MS,
)  # fmt: skip
SMALL = Bases(
    stop_ns=MS // 2, dirty_log_ns=MS // 4, memory_ns=MS, save_ns=MS // 2, load_ns=MS // 2, legs_ns=MS // 4,
    resume_ns=MS // 2,
)  # fmt: skip


def predict(knowledge: Knowledge, guest: str = "g", bases: Bases = BASES, coverage: float = 0.95) -> Prediction:
    return knowledge.predict(guest, "class", bases, coverage=coverage, bandwidth_known=True)


def record_of(
    prediction: Prediction, truth: dict[Part, int], outcome: Outcome = "completed", guest: str = "g"
) -> Record:
    """A record whose parts are ``truth`` (ns by part)."""
    parts = tuple(DowntimePart.of(part, ns) for part, ns in truth.items())
    total = sum(truth.values())
    downtime = downtime_of(
        lower_ns=total, upper_ns=total, measured_ns=total, limit_ns=300 * MS, parts=parts,
        predicted_ns=prediction.total_ns, predicted_upper_ns=prediction.upper_ns, source_reported_ns=None,
        destination_measured_ns=None, predicted_parts_ns=prediction.parts(),
        predicted_bases_ns=prediction.bases_by_name(), predicted_regime=prediction.regime,
        predicted_scale_ns=prediction.scale_ns,
    )  # fmt: skip
    return Record(
        migration_id="0" * 32, guest=guest, epoch=1, peer="tcp:h:1", source_host="a",
        destination_host="b", started_at="2026-01-01T00:00:00+00:00", outcome=outcome, reason=None,
        parameters=MigrationParameters(), total_ns=1, setup_ns=0, downtime=downtime, devices=(), checkpoints=(),
        rounds=(), phases=(), time=None, digest=Digest(algorithm="off", source=None, destination=None),
        ram=Ram(
            total_bytes=0, page_size=4096, transferred_bytes=0, normal_pages=0, zero_pages=0, sparse_pages=0,
            precopy_bytes=0, downtime_bytes=0, precopy_pages=0, downtime_pages=0, dirty_sync_count=0,
            pages_per_second=0.0, dirty_tracking=None, channels=1,
        ),
    )  # fmt: skip


def truth_of(scale: float) -> dict[Part, int]:
    """What a switchover with the bases above costs, every part scaled."""
    parts = {
        Part.STOP: 1, Part.FINAL_DIRTY_LOG_READ: 1, Part.FINAL_PAGES: 40, Part.DEVICE_LOADS: 30, Part.COMMIT_LEG: 1,
        Part.RESUME: 2,
    }  # fmt: skip
    return {part: int(ms * MS * scale) for part, ms in parts.items()}


def seen(pages: int, elapsed_s: float = 1.0) -> Observation:
    return Observation(pages, elapsed_s, 1e9)


def prediction_of(total_ms: float, upper_ms: float, memory_ms: float = 0.0) -> Prediction:
    components = dict.fromkeys(Component, 0)
    components[Component.STATE] = int(memory_ms * MS)
    components[Component.LEGS] = int((total_ms - memory_ms) * MS)
    return Prediction(int(total_ms * MS), int(upper_ms * MS), components, int(memory_ms * MS), "test", True, BASES)
