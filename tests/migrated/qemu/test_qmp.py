"""The monitor of a real QEMU: bounded calls, errors as sentences, one client at a time."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from migrated.base.errors import VmmError, VmmGoneError, VmmSilentError
from migrated.vmm.qemu.qmp import Qmp, QmpCommandError, stamp_ns
from tests.migrated.qemu.conftest import BareQemu


async def test_it_knows_its_process_and_version(bare_qemu: BareQemu) -> None:
    qmp = await bare_qemu()
    assert Path(f"/proc/{qmp.pid}/comm").read_text().startswith("qemu-system")
    assert qmp.version >= (7, 2, 0)
    assert (await qmp.call("query-status"))["status"] == "running"


async def test_a_refused_command_carries_qemus_words(bare_qemu: BareQemu) -> None:
    qmp = await bare_qemu()
    with pytest.raises(QmpCommandError, match=r"refused no-such: .*no-such") as caught:
        await qmp.call("no-such")
    assert caught.value.kind == "CommandNotFound"


async def test_a_second_client_is_told_that_the_monitor_is_taken(bare_qemu: BareQemu) -> None:
    qmp = await bare_qemu()
    with pytest.raises(VmmSilentError, match="A monitor takes one client at a time") as caught:
        await Qmp.connect(qmp.path, 0.3)
    assert caught.value.pid == qmp.pid
    assert (await qmp.call("query-status"))["status"] == "running"


async def test_it_is_found_again_after_the_connection_was_dropped(bare_qemu: BareQemu) -> None:
    qmp = await bare_qemu()
    await qmp.close()
    again = await Qmp.connect(qmp.path)
    assert again.pid == qmp.pid
    await again.close()


async def test_a_qemu_that_stands_still_is_silent_and_one_that_ended_is_gone(bare_qemu: BareQemu) -> None:
    qmp = await bare_qemu()
    os.kill(qmp.pid, signal.SIGSTOP)
    with pytest.raises(VmmSilentError, match=r"did not answer query-status within 0\.2 s"):
        await qmp.call("query-status", 0.2)
    os.kill(qmp.pid, signal.SIGKILL)
    with pytest.raises(VmmGoneError, match=r"the connection to QEMU .* is lost"):
        await qmp.call("query-status")


async def test_nobody_and_a_stranger_at_the_socket(place: Path) -> None:
    with pytest.raises(VmmGoneError, match="no QEMU listens on"):
        await Qmp.connect(place / "nothing")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "stranger"))
        listener.listen()
        with pytest.raises(VmmSilentError, match="sends no greeting"):
            await Qmp.connect(place / "stranger", 0.2)
    (place / "file").touch()
    with pytest.raises(VmmError):
        await Qmp.connect(place / "file")
    (place / "link").symlink_to(place / "nothing")
    with pytest.raises(VmmGoneError, match=r"listens on .*/nothing$"):  # what the operator named
        await Qmp.connect(place / "link")


async def test_events_are_heard(bare_qemu: BareQemu) -> None:
    qmp = await bare_qemu()
    async with qmp.listen("STOP") as next_event:
        await qmp.call("stop")
        assert (await next_event())["event"] == "STOP"


async def test_descriptors_reach_qemu(bare_qemu: BareQemu) -> None:
    qmp = await bare_qemu()
    fd = os.memfd_create("for-qemu")
    await qmp.pass_descriptor("one", fd)
    assert (await qmp.add_descriptor(fd)).startswith("/dev/fdset/")
    os.close(fd)
    links = [os.readlink(f"/proc/{qmp.pid}/fd/{name}") for name in os.listdir(f"/proc/{qmp.pid}/fd")]
    assert sum("for-qemu" in link for link in links) == 2
    await qmp.call("closefd", fdname="one")


async def test_a_call_does_not_add_milliseconds(bare_qemu: BareQemu) -> None:
    """The best of many: what the machine does beside it is not what is meant."""
    qmp = await bare_qemu("-S")
    best_ns = 10**12
    for _ in range(100):
        begin_ns = time.monotonic_ns()
        await qmp.call("query-status")
        best_ns = min(best_ns, time.monotonic_ns() - begin_ns)
    assert best_ns < 3_000_000


async def test_an_event_that_is_heard_late_tells_when_it_was_sent(bare_qemu: BareQemu) -> None:
    """By QEMU's own stamp, in microseconds of the wall clock."""
    qmp = await bare_qemu()
    async with qmp.listen("STOP") as next_event:
        begin_ns = time.monotonic_ns()
        await qmp.call("stop")
        end_ns = time.monotonic_ns()
        time.sleep(0.1)  # noqa: ASYNC251 - this process is held up
        assert begin_ns - 1_000_000 <= stamp_ns(await next_event()) <= end_ns + 1_000_000
