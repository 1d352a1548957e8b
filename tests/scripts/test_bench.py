"""The benchmark runs, says what it left out, and its figures are those of its samples."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from scripts.basics import ROOT
from scripts.bench import rivals
from scripts.bench.__main__ import missing
from scripts.bench.cases import CASES
from scripts.bench.result import quantile

NAMES = {
    "raw", "iperf3", "qemu", "qemu-multifd", "qemu-zero", "random", "zero", "sparse", "touched", "scattered",
    "final-round", "plain-capped", "delta-capped", "downtime-idle", "downtime-busy", "loop-lag",
    "tracking", "rss", "small-move", "link-1gbit", "link-5gbit",
}  # fmt: skip


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scripts.bench"], cwd=ROOT,
        env={**os.environ, "BENCH_HUGE_PAGES": "0", **environment},
        capture_output=True, text=True, check=False, timeout=150,
    )  # fmt: skip


def test_every_case_has_its_name() -> None:
    assert set(CASES) == NAMES


@pytest.mark.slow
def test_a_small_run_gives_one_document_and_a_plot(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = run(
        BENCH_SIZE_MIB="16",
        BENCH_REPEATS="2",
        BENCH_CASES="raw,random,zero,small-move,sparse,touched,tracking",
        BENCH_OUT=str(out),
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert json.loads(out.read_text()) == document
    cases = {case["name"]: case for case in document["cases"]}
    assert document["tracking"]["reported_per_written"] == cases.pop("tracking")["median"] == 1
    assert set(cases) == {"raw", "random", "zero", "small-move", "sparse", "touched"}, document["skipped"]
    assert set(document["cpu"]) == {"raw", "random", "zero"}
    for sides in document["cpu"].values():
        assert set(sides) == {"source_s_per_gib", "destination_s_per_gib"}
        assert all(seconds >= 0 for seconds in sides.values())
    for case in cases.values():
        assert case["unit"] == ("s" if case["name"] in ("small-move", "sparse", "touched") else "GiB/s")
        assert len(case["samples"]) == 2
        assert case["median"] == statistics.median(case["samples"])
        assert min(case["samples"]) > 0
    ratios = document["ratios"]
    assert set(ratios) == {"random/raw", "sparse/touched"}
    assert ratios["random/raw"] == pytest.approx(cases["random"]["median"] / cases["raw"]["median"], abs=1e-3)
    assert document["machine"]["cpus"] == os.cpu_count()
    plot = ET.fromstring(out.with_suffix(".svg").read_text())
    assert "raw" in {text.text for text in plot.iter("{http://www.w3.org/2000/svg}text")}


def test_an_unknown_case_is_refused_with_the_names_there_are() -> None:
    done = run(BENCH_CASES="raw,rwa")
    assert done.returncode == 2
    assert "rwa" in done.stderr
    assert "loop-lag" in done.stderr
    assert done.stdout == ""


def test_a_case_that_cannot_run_here_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "installed", lambda program: False)
    assert missing("qemu-multifd", 1) == "qemu-system-x86_64 is not installed"
    assert missing("iperf3", 1) == "iperf3 is not installed"
    assert missing("random", 1) is None
    assert "MiB of memory are free" in str(missing("random", 1 << 30))


@pytest.mark.parametrize(("q", "expected"), [(0.5, 2.0), (0.99, 4.0), (0.0, 1.0), (0.75, 3.0)])
def test_a_quantile_is_one_of_the_samples(q: float, expected: float) -> None:
    assert quantile([3.0, 1.0, 4.0, 2.0], q) == expected
