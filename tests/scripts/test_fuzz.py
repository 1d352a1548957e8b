"""A short run of the fuzzer over the corpus of a real session; ``python -m scripts.fuzz`` has the long ones."""

from __future__ import annotations

import pytest

from migrated.base.errors import VmmError
from scripts.fuzz import corpus, fuzz
from scripts.fuzz_targets import LIVE, PARSERS, PIECE, live_targets
from vmm_sim.wire import encode_head


@pytest.mark.parametrize("name", [*PARSERS, *LIVE])
def test_what_a_real_session_left_is_accepted(name: str) -> None:
    inputs = corpus()[name]
    assert inputs
    with live_targets() as live:
        for data in inputs:
            {**PARSERS, **live}[name](data)


GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 2, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}\r\n'
)
DONE = b'{"return": {}}\r\n'
ODD_ANSWERS = {
    "a greeting without QEMU's version": ("qemu", [b'{"QMP": {"version": {}, "capabilities": []}}\r\n', DONE]),
    "a greeting that is no UTF-8": ("qemu", [b"\xff\xfe\r\n"]),
    "an end right after the negotiation": ("qemu", [GREETING + DONE]),
    "a vCPU without a thread": ("qemu", [GREETING, DONE, b'{"id": "__qmp#00000", "return": [{"cpu-index": 0}]}\r\n']),
    "a status without a name": ("guest", [b"", encode_head({"id": 1, "pid": 1}, 0)]),
    "a status without a process": ("guest", [b"", encode_head({"id": 1, "name": "g1"}, 0)]),
    "no description": ("guest", [b"", encode_head({"id": 1, "name": "g1", "pid": 1}, 0), encode_head({"id": 2}, 0)]),
}
"""Answers of a QEMU or a VMM that once came out as errors without a name: the target, and the pieces."""


def test_odd_answers_of_a_vmm_are_errors_of_the_vmm() -> None:
    with live_targets() as live:
        for name, (target, pieces) in ODD_ANSWERS.items():
            with pytest.raises(VmmError) as raised:
                live[target](PIECE.join(pieces))
            assert str(raised.value), name


def test_damaged_inputs_are_values_or_named_errors_soon_and_without_memory() -> None:
    found = fuzz(20_000, seed=20)
    assert found.crashes == []
    assert found.accepted + found.refused == found.inputs == 20_000
    assert found.accepted > 100, "mutations must reach beyond the first check"
    assert found.slowest_ms < 1000
    assert found.peak_mib < 64
