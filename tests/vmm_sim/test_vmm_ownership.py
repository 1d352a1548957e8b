"""The ownership lock of a simulated guest, with the fencing token that its file carries."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm_sim.errors import VmmError
from vmm_sim.ownership import Ownership


def carried(directory: Path) -> int:
    return int((directory / "u.lock").read_bytes() or b"0")


def test_one_holds_it_until_it_lets_go(tmp_path: Path) -> None:
    here, there = Ownership(tmp_path, "u"), Ownership(tmp_path, "u")
    here.take()
    here.take()
    with pytest.raises(VmmError, match="must let go first"):
        there.take()
    here.release()
    there.take()
    assert there.held
    assert not here.held


def test_who_comes_with_an_older_token_does_not_get_it(tmp_path: Path) -> None:
    old, new = Ownership(tmp_path, "u"), Ownership(tmp_path, "u")
    old.take(5)
    old.release()
    new.take(9)
    new.release()
    with pytest.raises(VmmError, match="given to another host since") as refused:
        old.take(5)
    assert refused.value.name == "LockStale"
    assert not old.held
    assert carried(tmp_path) == 9
    new.take(9)


def test_a_lock_that_is_held_carries_newer_tokens(tmp_path: Path) -> None:
    lock = Ownership(tmp_path, "u")
    lock.carry(3)
    assert not (tmp_path / "u.lock").exists()
    lock.take(5)
    lock.carry(8)
    assert carried(tmp_path) == 8
    lock.take(9)
    assert carried(tmp_path) == 9
    with pytest.raises(VmmError, match="given to another host since"):
        lock.carry(8)
    assert lock.held


def test_without_a_token_it_keeps_the_one_that_it_carries(tmp_path: Path) -> None:
    lock = Ownership(tmp_path, "u")
    lock.take(5)
    lock.release()
    lock.take()
    assert carried(tmp_path) == 5
