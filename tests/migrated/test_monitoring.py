"""The alert rules and the dashboard name only metrics that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from migrated.observe.metrics import Metrics

MONITORING = Path(__file__).parents[2] / "configs" / "monitoring"


def exported() -> set[str]:
    """Every sample name that Prometheus would see."""
    names: set[str] = set()
    for family in Metrics().registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}.get(family.type, ("",))
        names |= {family.name + suffix for suffix in suffixes}
    return names


@pytest.mark.parametrize("file", ["alerts.yml", "grafana-dashboard.json"])
def test_every_metric_that_is_asked_for_is_exported(file: str) -> None:
    named = set(re.findall(r"\bmigrated_[a-z_]+", (MONITORING / file).read_text(encoding="utf-8")))
    assert named
    assert named <= exported()


def test_the_dashboard_is_one_json_document_with_distinct_panels() -> None:
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text(encoding="utf-8"))
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids)) >= 8
