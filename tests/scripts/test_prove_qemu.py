"""The command line of the proofs over real guests."""

from __future__ import annotations

import pytest

from scripts.prove_qemu import command_line


def test_all_kinds_of_guests_are_meant_unless_some_are_named() -> None:
    assert command_line().parse_args(["kinds"]).kinds == []
    assert command_line().parse_args(["kinds", "numa-file", "two-vcpus"]).kinds == ["numa-file", "two-vcpus"]


def test_an_unknown_kind_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line().parse_args(["kinds", "sparc"])
    assert "sparc is no kind of guest; those are q35-private, " in capsys.readouterr().err
