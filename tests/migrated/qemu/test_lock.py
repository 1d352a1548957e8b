"""The ownership lock of a QEMU guest: whoever took it for QEMU may die, and it holds until QEMU ends or is told."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from migrated.base.errors import VmmError
from migrated.vmm import spawn
from migrated.vmm.qemu.lock import QemuLock
from migrated.vmm.qemu.qmp import Qmp
from tests.migrated.qemu.conftest import START_S, BareQemu


def is_held(path: Path) -> bool:
    """Whether anybody has the lock, seen as another host that shares the file sees it: by trying."""
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


async def test_it_is_taken_once_and_let_go_as_often_as_asked(bare_qemu: BareQemu, place: Path) -> None:
    path = place / "g.lock"
    lock = QemuLock(await bare_qemu("-S"), path)
    for _ in range(2):
        await lock.take()
        await lock.take()
        assert is_held(path)
        await lock.release()
        await lock.release()
        assert not is_held(path)


async def test_another_qemu_is_refused_until_the_first_lets_go(bare_qemu: BareQemu, place: Path) -> None:
    path = place / "g.lock"
    here, there = QemuLock(await bare_qemu("-S"), path), QemuLock(await bare_qemu("-S"), path)
    await here.take()
    with pytest.raises(VmmError, match="another VMM holds the ownership lock"):
        await there.take()
    await here.release()
    await there.take()
    with pytest.raises(VmmError, match="must let go first"):
        await here.take()


async def test_qemu_holds_it_when_the_daemon_that_took_it_is_gone(bare_qemu: BareQemu, place: Path) -> None:
    """The next daemon finds it held by its own QEMU, which is right, and can let go of it; so does the end of QEMU."""
    path, first = place / "g.lock", await bare_qemu("-S")
    await QemuLock(first, path).take()
    await first.close()
    assert is_held(path)
    second = await Qmp.connect(first.path, START_S)
    lock = QemuLock(second, path)
    await lock.take()
    await lock.release()
    assert not is_held(path)
    await lock.take()
    await second.call("quit")
    await second.close()
    assert await spawn.make_sure_gone(second.pid, START_S)
    assert not is_held(path)


async def test_its_file_carries_the_token_and_refuses_an_older_one(bare_qemu: BareQemu, place: Path) -> None:
    path = place / "g.lock"
    here, there = QemuLock(await bare_qemu("-S"), path), QemuLock(await bare_qemu("-S"), path)
    here.token = 5
    await here.take()
    assert int(path.read_bytes()) == 5
    here.token = 6
    await here.carry()
    assert int(path.read_bytes()) == 6
    await here.release()
    there.token = 5
    await there.carry()  # it does not hold it
    with pytest.raises(VmmError, match="given to another host since"):
        await there.take()
    assert not is_held(path)
    there.token = 7
    await there.take()
    assert is_held(path)
    assert int(path.read_bytes()) == 7
