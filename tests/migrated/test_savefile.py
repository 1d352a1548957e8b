"""Files of saved guests without a guest: memory goes in through the threads of the sender, and comes out through those
of the receiver, or the damage is named.

memfd -> PageSender -> FileSink x 2 -> file -> FileReader x 3 -> PageReceiver -> memfd

The module is longer than others because what is written is tested by reading it.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from migrated.base.errors import LinkLostError, MigrationError, RefusedError
from migrated.destination.decoding import allowed_encodings
from migrated.destination.pages import PageReceiver, RoundReceived
from migrated.destination.states import ArrivingStates
from migrated.kernel import files
from migrated.savefile import reader as reading
from migrated.savefile import writer as writing
from migrated.savefile.desk import RoundBook
from migrated.savefile.errors import SaveFileError
from migrated.savefile.reader import FileEndedError, FileFrames, SavedFile
from migrated.savefile.writer import FileSink, SaveWriter, check_target
from migrated.source.encoding import BatchEncoder
from migrated.source.pages import PageSender
from migrated.vmm.memory import FileRegion, MappedMemory
from migrated.vmm.seam import StateBounds
from protocol import messages
from protocol.digest import MemoryDigest
from protocol.frames import HEADER_BYTES
from protocol.guest import PAGE_SIZE, DeviceDescription, GuestDescription, MemoryRegion
from protocol.messages import Limits, TimeRules
from protocol.pages import Runs, runs_of
from protocol.savefile import CLOSING_BYTES, PREAMBLE_BYTES, Closing, Preamble
from protocol.versions import CAPABILITIES, MAJOR
from scripts.rig.waiting import until

PAGES = 2048
SAVE_ID = bytes(range(16))
RECORD = json.dumps({"guest": "g1"}).encode()
DISK = bytes(range(256)) * 40


def guest() -> GuestDescription:
    return GuestDescription(
        name="g1",
        uuid="00000000-0000-0000-0000-0000000000a1",
        vmm="sim",
        guest_time=False,
        machine="sim",
        page_size=PAGE_SIZE,
        memory=(MemoryRegion(name="ram", guest_address=0, size_bytes=PAGES * PAGE_SIZE, offset_pages=0),),
        devices=(DeviceDescription(name="disk", kind="non-iterable", state_bytes=len(DISK)),),
        vcpus=1,
        guest_freq=0,
    )


STATES = StateBounds({("disk", "non-iterable"): len(DISK)}, len(DISK))


def hello() -> messages.Hello:
    return messages.Hello(
        migration_id=SAVE_ID.hex(),
        epoch=1,
        guest=guest(),
        guest_paused=False,
        capabilities=tuple(sorted(CAPABILITIES)),
        required=(),
        limits=Limits(downtime_limit_ns=1, switchover_limit_ns=0, switchover_abort=True),
        time_rules=TimeRules(policy="midpoint", max_time_jump_ns=0, max_time_error_ns=0),
        channels=1,
        host="a",
    )


def make_memory() -> MappedMemory:
    fd = os.memfd_create("savefile", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGES * PAGE_SIZE)
    return MappedMemory([FileRegion(fd, PAGES)])


@pytest.fixture
def memory() -> Iterator[MappedMemory]:
    """Random pages, pages that compress, zero pages, and holes, in runs of several lengths."""
    made = make_memory()
    content = np.random.default_rng(5)
    made.words[:700] = content.integers(0, 1 << 63, (700, 512), np.uint64)
    made.words[800:1000] = 7
    made.words[1001:1400:3] = content.integers(0, 9, (133, 512), np.uint64)
    made.words[1500:1520] = 0
    yield made
    made.release()


class Rounds:
    """Writes rounds as a save does."""

    def __init__(self, writer: SaveWriter, memory: MappedMemory, compression: str = "plain") -> None:
        self.writer, self.memory = writer, memory
        self.digest = MemoryDigest(PAGES)
        self.book = RoundBook(writer, self.digest)
        encoder: Callable[[], BatchEncoder] = lambda: BatchEncoder("zstd" if compression == "zstd" else "plain")  # noqa: E731
        self.sender = PageSender(memory, [FileSink(writer, n) for n in range(2)], self.digest, encoder, None)
        self.number = 0

    async def __aenter__(self) -> Rounds:
        self.sender.start()
        self.writer.append(hello())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.sender.stop()

    async def send(self, runs: Runs) -> None:
        self.number += 1
        await self.sender.send_round(self.number, runs)
        self.book.send(messages.RoundEnd(round=self.number, pages=0, zero_pages=0))
        await self.book.acknowledged(self.number)

    async def publish(self, *, force: bool = False) -> None:
        state = messages.DeviceState(
            order=0, name="disk", kind="non-iterable", final=True, offset=0, total_bytes=len(DISK),
            digest=xxhash.xxh3_64_intdigest(DISK), save_ns=0,
        )  # fmt: skip
        end = messages.StateEnd(
            epoch=1, last_round=self.number, devices=1, digest=self.digest.value, source_downtime_ns=0, sent_at_ns=0
        )
        self.writer.append(state, [memoryview(DISK)])
        self.writer.append(end)
        self.writer.append(messages.Record(), [memoryview(RECORD)])

        def closing(frames_end: int, frames: int) -> Closing:
            return Closing(SAVE_ID, frames_end, frames, xxhash.xxh3_64_intdigest(RECORD), bytes(16), 1, 2)

        await asyncio.to_thread(self.writer.publish, closing, force=force)


async def save(path: Path, memory: MappedMemory, compression: str = "plain") -> None:
    writer = SaveWriter(path, SAVE_ID, "x86_64", PAGES)
    async with Rounds(writer, memory, compression) as rounds:
        await rounds.send(memory.data_runs())
        await rounds.publish()


async def read(path: Path, readers: int = 3) -> bytes:
    """All of the memory in a file, every byte of which was checked."""
    file = SavedFile(path)
    memory = make_memory()
    digest, ended = MemoryDigest(PAGES), asyncio.get_running_loop().create_future()
    states: list[bytes] = []

    def on_round(_number: int, received: RoundReceived) -> None:
        digest.add(received.digest_delta)

    def on_failure(number: int, error: Exception) -> None:
        reading.discard(number)
        if not ended.done() and not (isinstance(error, FileEndedError) and reading):
            ended.set_result(frames.readers[number].where(error))

    frames = FileFrames(file, xxhash.xxh3_64_intdigest, readers)
    reading = set(range(readers))
    receiver = PageReceiver(
        memory, ArrivingStates(STATES), digest, readers, allowed_encodings(CAPABILITIES), announced=False,
        on_round=on_round, on_state=lambda state: states.append(bytes(state.data)), on_failure=on_failure,
    )  # fmt: skip
    try:
        for reader in frames.readers:
            receiver.add_channel(reader)
        error = await ended
        if not isinstance(error, FileEndedError):
            raise error
        assert frames.end.state_end is not None
        assert frames.end.state_end.digest == digest.value
        assert (states, frames.end.record) == ([DISK], RECORD)
        return memory.words.tobytes()
    finally:
        await receiver.stop()
        memory.release()
        file.close()


@pytest.mark.parametrize(("compression", "readers"), [("plain", 1), ("plain", 4), ("zstd", 2)])
async def test_memory_comes_back_as_it_was(
    tmp_path: Path, memory: MappedMemory, compression: str, readers: int
) -> None:
    path = tmp_path / "g1.saved"
    await save(path, memory, compression)
    assert await read(path, readers) == memory.words.tobytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_size < 1200 * PAGE_SIZE


async def test_batches_that_come_again_whole_become_gaps(tmp_path: Path, memory: MappedMemory) -> None:
    """round 1: all; round 2: 512 pages again, whole batches; then zeros over others: the last content counts."""
    path = tmp_path / "g1.saved"
    writer = SaveWriter(path, SAVE_ID, "x86_64", PAGES)
    async with Rounds(writer, memory) as rounds:
        await rounds.send(memory.data_runs())
        memory.words[0:700] = 3
        memory.words[800:1000] = 0
        await rounds.send(runs_of(np.concatenate((np.arange(700), np.arange(800, 1000)))))
        memory.words[5] = 4
        await rounds.send(runs_of(np.array([5])))
        freed_bytes = await asyncio.to_thread(writer.give_back)
        await rounds.publish()
    assert freed_bytes > 500 * PAGE_SIZE
    assert path.stat().st_blocks * 512 < path.stat().st_size - freed_bytes // 2
    assert await read(path) == memory.words.tobytes()


async def test_what_the_disk_has_is_let_go_of_piece_by_piece(
    tmp_path: Path, memory: MappedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Piece follows piece, none of them near the end, where threads still write; and nobody waits in a blackout."""
    let_go: list[tuple[int, int]] = []

    def watched(fd: int, offset: int, size: int) -> None:
        let_go.append((offset, size))
        files.let_go(fd, offset, size)

    for name, value in (("let_go", watched), ("_WRITEBACK_BYTES", 1 << 16), ("_BEHIND_BYTES", 1 << 19)):
        monkeypatch.setattr(writing, name, value)
    monkeypatch.setattr(reading, "_BEHIND_BYTES", 1 << 19)
    monkeypatch.setattr(reading, "_LET_GO_BYTES", 1 << 16)
    path = tmp_path / "g1.saved"
    writer = SaveWriter(path, SAVE_ID, "x86_64", PAGES)
    async with Rounds(writer, memory) as rounds:
        await rounds.send(memory.data_runs())
        before = writer.written_bytes
        pieces = sorted(let_go)
        writer.lets_go = False
        await rounds.send(memory.data_runs())
        await rounds.publish()
    assert sorted(let_go) == pieces
    ends = [offset + size for offset, size in pieces]
    assert [offset for offset, _ in pieces] == [0, *ends[:-1]]
    assert (1 << 20) < ends[-1] <= before - (1 << 19)
    assert await read(path) == memory.words.tobytes()


async def test_a_disk_that_fails_while_pieces_are_let_go_of_fails_the_save(
    tmp_path: Path, memory: MappedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells an error of the disk once: a later fsync would find nothing wrong."""

    def failing(_fd: int, _offset: int, _size: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for name, value in (("let_go", failing), ("_WRITEBACK_BYTES", 1 << 16), ("_BEHIND_BYTES", 1 << 16)):
        monkeypatch.setattr(writing, name, value)
    writer = SaveWriter(tmp_path / "g1.saved", SAVE_ID, "x86_64", PAGES)
    async with Rounds(writer, memory) as rounds:
        with pytest.raises(SaveFileError, match="Input/output error"):
            await rounds.send(memory.data_runs())
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


async def test_every_damaged_byte_is_named(tmp_path: Path, memory: MappedMemory) -> None:
    """One byte is changed, anywhere; the sentence names the file, and a place at or before the byte."""
    path = tmp_path / "g1.saved"
    writer = SaveWriter(path, SAVE_ID, "x86_64", PAGES)
    async with Rounds(writer, memory, "zstd") as rounds:
        await rounds.send(memory.data_runs())
        memory.words[:700] = np.arange(700 * 512).reshape(700, 512)
        await rounds.send(runs_of(np.arange(700)))
        await asyncio.to_thread(writer.give_back)
        await rounds.publish()
    whole = path.read_bytes()
    places = random.Random(3)
    chosen = [*range(0, PREAMBLE_BYTES, 5), *(places.randrange(len(whole)) for _ in range(60))]
    chosen += [len(whole) - place for place in range(1, CLOSING_BYTES + HEADER_BYTES, 9)]
    for place in chosen:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << places.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(MigrationError) as caught:
            await read(path)
        sentence = str(caught.value)
        assert str(path) in sentence, (place, sentence)
        named = int(sentence.rpartition("byte ")[2].split(":")[0].strip(")"))
        assert named <= place < named + (3 << 20), (place, sentence)


@pytest.mark.parametrize("cut", [1, CLOSING_BYTES, 5000, -10])
async def test_a_file_that_was_cut_or_added_to_is_refused(tmp_path: Path, memory: MappedMemory, cut: int) -> None:
    path = tmp_path / "g1.saved"
    await save(path, memory)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut] if cut > 0 else whole + bytes(-cut))
    with pytest.raises(SaveFileError, match="cut short or added to"):
        SavedFile(path)


async def test_another_version_another_file_and_no_file_are_refused(tmp_path: Path, memory: MappedMemory) -> None:
    path = tmp_path / "g1.saved"
    await save(path, memory)
    whole = path.read_bytes()
    newer = replace(Preamble(SAVE_ID, "x86_64"), version=MAJOR + 1).pack()
    path.write_bytes(newer + whole[PREAMBLE_BYTES:])
    with pytest.raises(RefusedError, match="restore it with the version that wrote it"):
        SavedFile(path)
    path.write_bytes(b"#!/bin/sh\n" * 100)
    with pytest.raises(RefusedError, match="does not begin as a saved guest does"):
        SavedFile(path)
    for other, reason in (
        (tmp_path, "regular file"),
        (tmp_path / "none", "cannot be opened"),
        (Path("g"), "whole path"),
    ):
        with pytest.raises(RefusedError, match=reason):
            SavedFile(other)


async def test_a_file_is_never_replaced_unasked(tmp_path: Path, memory: MappedMemory) -> None:
    path = tmp_path / "g1.saved"
    check_target(path, force=False)
    writer = SaveWriter(path, SAVE_ID, "x86_64", PAGES)
    path.write_bytes(b"somebody else's")  # it came into being after the check
    async with Rounds(writer, memory) as rounds:
        await rounds.send(memory.data_runs())
        with pytest.raises(SaveFileError, match="left alone"):
            await rounds.publish()
    writer.abandon()
    assert [path.read_bytes(), *tmp_path.iterdir()] == [b"somebody else's", path]
    for force, reason in ((False, "exists already"), (True, "is not a saved guest")):
        with pytest.raises(RefusedError, match=reason):
            check_target(path, force=force)
    path.unlink()
    await save(path, memory)
    check_target(path, force=True)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(RefusedError, match="is not a saved guest"):
        check_target(tmp_path / "link", force=True)
    for wrong, reason in (("g1.saved", "whole path"), ("/nowhere/at/all", "no directory")):
        with pytest.raises(RefusedError, match=reason):
            check_target(Path(wrong), force=True)


async def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, memory: MappedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = SaveWriter(tmp_path / "g1.saved", SAVE_ID, "x86_64", PAGES)
    real, room = os.pwritev, [1 << 20]

    def full(fd: int, views: list[memoryview], offset: int) -> int:
        if offset > room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, views, offset)

    async with Rounds(writer, memory) as rounds:
        monkeypatch.setattr(os, "pwritev", full)
        with pytest.raises(SaveFileError, match="No space left on device"):
            await rounds.send(memory.data_runs())
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


async def test_a_cap_holds_and_an_end_is_not_waited_for(tmp_path: Path, memory: MappedMemory) -> None:
    writer = SaveWriter(tmp_path / "g1.saved", SAVE_ID, "x86_64", PAGES)
    sink = FileSink(writer, 0)
    sink.pace(64 << 20)
    loop = asyncio.get_running_loop()
    begin = loop.time()
    zero = messages.Record()
    await asyncio.to_thread(lambda: [sink.send(zero, [memoryview(bytes(1 << 20))]) for _ in range(8)])
    assert loop.time() - begin > 0.1
    sink.pace(1)
    before = writer.written_bytes
    waiting = asyncio.create_task(asyncio.to_thread(sink.send, zero, [memoryview(bytes(1 << 20))]))

    async def written() -> bool:
        return writer.written_bytes > before

    await until("a write that waits for its turn", written)
    sink.interrupt()
    await waiting
    with pytest.raises(LinkLostError):
        sink.send(zero)
    writer.abandon()


async def test_what_has_the_name_by_the_end_is_looked_at_again(tmp_path: Path) -> None:
    """A save takes its time: what may be replaced at its begin may be another file at its end."""
    target, writer = tmp_path / "g1.saved", SaveWriter(tmp_path / "g1.saved", bytes(16), "x86_64", 1)
    target.write_bytes(b"another file of somebody's")
    with pytest.raises(RefusedError, match="not a saved guest"):
        writer.publish(lambda end, frames: Closing(bytes(16), end, frames, 0, bytes(16), 0, 0), force=True)
    writer.abandon()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"another file of somebody's"]
