"""Receiving guest memory: one thread per data channel, straight into its place.

Run tables are checked against the memory map before a byte of payload is read, so nothing can be written outside the
guest. A page that stays zero is never touched; many in a row that become zero again are given back to the host.

    plain, long runs, mapped pages that are here -> received into guest memory
    anything else -> staging -> decode, hash     -> long runs of new pages written as such, the rest scattered
    EXTENTS -> huge pages, populated by a thread of its own, ahead of the stream, in the first round only
    after the first round: what went through the file is mapped, by a thread of its own, until the guest stops

The module is longer than others because all kinds of frames write into one memory, in order.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

from migrated.base.errors import LinkLostError
from migrated.base.threads import in_thread
from migrated.destination.ahead import Mapper, Populator
from migrated.destination.decoding import check_encoding, decode
from migrated.destination.states import ArrivedState, ArrivingStates
from migrated.kernel.scheduling import threads_of
from migrated.link.data import FrameSource
from migrated.vmm.memory import WORDS_PER_PAGE, GuestMemory, Words, drop_views
from protocol import messages
from protocol.digest import MemoryDigest
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.frames import MAX_PAYLOAD_BYTES, Header
from protocol.guest import PAGE_SIZE
from protocol.messages import Encoding
from protocol.pages import Indices, Runs, count_pages, indices_of, runs_of, split_runs, unpack_runs

_DIRECT_RUNS: Final = 16
"""Up to this many runs a batch is received directly into guest memory; beyond, staging and one scatter are cheaper."""
_GIVEN_BACK_PAGES: Final = 16
"""Fewest pages in a row that are given back to the host when they are zero again. Fewer are overwritten, in a tenth of
the time, and a huge page stays whole."""
_ROUNDS_AHEAD: Final = 64
"""Rounds that one channel may be ahead of the others."""
_ZEROED_AT_ONCE: Final = 1 << 18
"""Pages of a table of zero pages that are looked at together: it may name all of a guest in a few bytes."""
_SPARE_ZERO_PAGES: Final = 1 << 16
"""Zero pages that one channel may name in a round, beyond every page of the guest once."""


@dataclass(slots=True)
class RoundReceived:
    """Counts of the pages that arrived in one round over all channels."""

    normal_pages: int = 0
    zero_pages: int = 0
    payload_bytes: int = 0
    digest_delta: int = 0
    barriers: int = 0


class PageReceiver:
    """Takes everything that comes over the data channels of one migration.

    Args:
        memory: the incoming guest's memory.
        states: takes device states in.
        digest: the destination's running digest, None when it is off.
        channels: how many data channels there will be.
        encodings: that batches may come with.
        announced: whether it was agreed that pages are announced ahead (EXTENTS).
        on_round: called on the event loop when a round is complete on all channels.
        on_state: called on the event loop with each whole device state.
        on_failure: called on the event loop with the error that ended a channel, and the channel's number.
    """

    def __init__(
        self,
        memory: GuestMemory,
        states: ArrivingStates,
        digest: MemoryDigest | None,
        channels: int,
        encodings: frozenset[Encoding],
        *,
        announced: bool,
        on_round: Callable[[int, RoundReceived], None],
        on_state: Callable[[ArrivedState], None],
        on_failure: Callable[[int, Exception], None],
    ) -> None:
        self._memory = memory
        self._digest = digest
        self._expected_channels = channels
        self.encodings = encodings
        self.states = states
        self.announced = announced
        self._on_round = on_round
        self._on_state = on_state
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._rounds: dict[int, RoundReceived] = {}
        self._complete_rounds = 0
        self.present: npt.NDArray[np.bool_] = np.zeros(memory.pages, np.bool_)
        """Which pages hold data, shape (pages,)."""
        self.populator = Populator(memory)
        self._mapper = Mapper(memory, self.present)
        self._threads: dict[int, threading.Thread] = {}
        self._channels: dict[int, FrameSource] = {}
        self._stopping = False

    def add_channel(self, channel: FrameSource) -> None:
        """Begin to receive from a joined channel, owned from here on.

        Raises:
            RemoteProtocolError: the channel number is taken or was not announced, or the migration is ending.
        """
        if self._stopping:
            raise RemoteProtocolError(
                f"data channel {channel.number} joins a migration that is ending", ErrorCode.UNEXPECTED
            )
        if channel.number in self._channels or channel.number >= self._expected_channels:
            raise RemoteProtocolError(
                f"data channel {channel.number} joined twice or was not announced", ErrorCode.UNEXPECTED
            )
        self._channels[channel.number] = channel
        thread = threading.Thread(target=self._run, args=(channel,), name=f"data-channel-{channel.number}", daemon=True)
        self._threads[channel.number] = thread
        thread.start()

    async def stop(self) -> None:
        """End the threads and close the channels; idempotent."""
        self._stopping = True
        self.populator.end()
        self._mapper.end()
        for channel in self._channels.values():
            channel.interrupt()
        self.states.end()  # a channel may be waiting there
        try:
            await in_thread(self._join)
        finally:  # the daemon may end meanwhile
            for channel in self._channels.values():
                channel.close()
            self._channels.clear()
            self._threads.clear()

    def _join(self) -> None:
        for thread in self._threads.values():
            thread.join()
        self.populator.join()
        self._mapper.join()

    def _run(self, channel: FrameSource) -> None:
        receiver = _ChannelReceiver(self, channel)
        try:
            receiver.receive()
        except Exception as error:  # whatever ends this thread must end the attempt, which would wait for ever
            drop_views(error)
            if not self._stopping:
                self._loop.call_soon_threadsafe(self._on_failure, channel.number, error)

    def barrier(self, number: int, received: RoundReceived) -> None:
        """A channel closed a round (called in its thread)."""
        self.populator.end()
        with self._lock:
            if number > self._complete_rounds + _ROUNDS_AHEAD:
                raise RemoteProtocolError(
                    f"a channel closes round {number} and another is still in round {self._complete_rounds + 1}",
                    ErrorCode.TOO_LARGE,
                )
            total = self._rounds.setdefault(number, RoundReceived())
            total.normal_pages += received.normal_pages
            total.zero_pages += received.zero_pages
            total.payload_bytes += received.payload_bytes
            total.digest_delta += received.digest_delta
            total.barriers += 1
            complete = total.barriers == self._expected_channels
            if complete:
                del self._rounds[number]
                self._complete_rounds = number
        if complete and number == 1:
            self._mapper.start()
        if complete:
            self._loop.call_soon_threadsafe(self._on_round, number, total)

    @property
    def joined(self) -> bool:
        """Whether every data channel is here."""
        return len(self._channels) == self._expected_channels

    @property
    def received_bytes(self) -> int:
        """Bytes received over the data channels so far, headers included."""
        return sum(channel.received_bytes for channel in self._channels.values())

    def urgent_threads(self) -> list[int]:
        """The threads of this process that a blackout waits for: all but the one that maps ahead."""
        return [thread for thread in threads_of(os.getpid()) if thread != self._mapper.thread_id]

    def guest_stopped(self) -> None:
        """The blackout began: nothing that can wait may take its time."""
        self._mapper.end()

    def state_arrived(self, state: ArrivedState) -> None:
        """A device state is whole (called in a channel's thread)."""
        self._loop.call_soon_threadsafe(self._on_state, state)

    @property
    def memory(self) -> GuestMemory:
        """The incoming guest's memory."""
        return self._memory

    @property
    def digest(self) -> MemoryDigest | None:
        """The running digest."""
        return self._digest


class _ChannelReceiver:
    """One channel's thread and its staging memory."""

    def __init__(self, owner: PageReceiver, channel: FrameSource) -> None:
        self._owner = owner
        self._channel = channel
        self._stage: Words = np.empty((MAX_PAYLOAD_BYTES // PAGE_SIZE, WORDS_PER_PAGE), np.uint64)
        self._packed = np.empty(MAX_PAYLOAD_BYTES, np.uint8).data
        self._round = 1
        self._received = RoundReceived()
        self._announced_pages = 0

    def receive(self) -> None:
        """Take frames until the channel ends."""
        while True:
            header, message = self._channel.read_header()
            match message:
                case messages.Pages():
                    self._check_round(header)
                    self._take_pages(header, message)
                case messages.ZeroPages():
                    self._check_round(header)
                    self._take_zero_pages(header, message)
                case messages.Extents():
                    self._check_round(header)
                    self._take_extents(header, message)
                case messages.Barrier(round=number):
                    self._check_round(header)
                    _check_payload(header, 0)
                    if number != self._round:
                        raise RemoteProtocolError(f"a barrier for round {number} came in round {self._round}")
                    self._owner.barrier(number, self._received)
                    self._received = RoundReceived()
                    self._round += 1
                case messages.DeviceState():
                    state, view = self._owner.states.place(message, header.payload_bytes)
                    if len(view):
                        self._channel.read_into([view])
                    if self._owner.states.piece_done(state, header.payload_bytes):
                        self._owner.state_arrived(state)
                case messages.Error(text=text):
                    raise LinkLostError(f"the source ended the migration: {text}")
                case _:
                    raise RemoteProtocolError(
                        f"message {message.TYPE.name} does not belong on a data channel", ErrorCode.UNEXPECTED
                    )

    def _check_round(self, header: Header) -> None:
        if header.round != self._round:
            raise RemoteProtocolError(
                f"a frame of round {header.round} came in round {self._round}", ErrorCode.UNEXPECTED
            )

    def _take_pages(self, header: Header, message: messages.Pages) -> None:
        owner = self._owner
        runs = unpack_runs(message.runs, owner.memory.pages)
        count = count_pages(runs)
        if count * PAGE_SIZE > MAX_PAYLOAD_BYTES:
            raise RemoteProtocolError(f"a batch of {count} pages is too large", ErrorCode.TOO_LARGE)
        check_encoding(message.encoding, owner.encodings, header.payload_bytes, count)
        indices = indices_of(runs)
        few = len(runs) <= _DIRECT_RUNS
        places: list[memoryview] = []
        if few and message.encoding == "plain" and (owner.present[indices] | owner.populator.mapped[indices]).all():
            places = self._places(runs)
        if places:
            batch_hash = self._receive_in_place(places)
            self._check_hash(batch_hash, message, indices)
        else:
            staged = self._receive_in_staging(header, message, indices)
            batch_hash = xxhash.xxh3_64_intdigest(staged.data) if owner.digest is not None else 0
            self._check_hash(batch_hash, message, indices)
            self._place(runs if few else None, indices, staged)
        if owner.digest is not None:
            self._received.digest_delta += owner.digest.set_pages(indices, batch_hash)
        owner.present[indices] = True
        self._received.normal_pages += count
        self._received.payload_bytes += header.payload_bytes

    def _check_hash(self, batch_hash: int, message: messages.Pages, indices: Indices) -> None:
        if self._owner.digest is not None and batch_hash != message.digest:
            raise RemoteProtocolError(
                f"a batch of {len(indices)} pages from page {int(indices[0])} on arrived damaged: its digest differs",
                ErrorCode.CORRUPT,
            )

    def _places(self, runs: Runs) -> list[memoryview]:
        """The runs in place, as bytes; empty when some of them are not mapped here."""
        places: list[memoryview] = []
        for start, count in runs.tolist():
            words = self._owner.memory.mapped(start, count)
            if words is None:
                return []
            places.append(words.data.cast("B"))
        return places

    def _receive_in_place(self, places: list[memoryview]) -> int:
        self._channel.read_into(places)
        if self._owner.digest is None:
            return 0
        if len(places) == 1:
            return xxhash.xxh3_64_intdigest(places[0])
        hasher = xxhash.xxh3_64()
        for place in places:
            hasher.update(place)
        return hasher.intdigest()

    def _receive_in_staging(self, header: Header, message: messages.Pages, indices: Indices) -> Words:
        """The decoded pages, shape (n, 512)."""
        staged = self._stage[: len(indices)]
        if message.encoding == "plain":
            self._channel.read_into([staged.data.cast("B")])
            return staged
        packed = self._packed[: header.payload_bytes]
        self._channel.read_into([packed])
        if message.encoding == "xor-lz4":
            self._take_current(indices, staged)
        decode(message.encoding, packed, staged)
        return staged

    def _take_current(self, indices: Indices, staged: Words) -> None:
        """Copy pages as they are now. What is not here is zero and is not looked at: that would populate it."""
        memory, here = self._owner.memory, self._owner.present[indices]
        if here.all():
            memory.read(indices, staged)
            return
        current: Words = np.empty((int(here.sum()), WORDS_PER_PAGE), np.uint64)
        memory.read(indices[here], current)
        staged[:] = 0
        staged[here] = current

    def _place(self, runs: Runs | None, indices: Indices, staged: Words) -> None:
        """Put staged pages into guest memory; ``runs`` when they are few."""
        memory = self._owner.memory
        if runs is None or self._owner.present[indices].all():
            memory.write(indices, staged)
            return
        done = 0
        for start, count in runs.tolist():
            memory.write_new(start, staged[done : done + count])
            done += count

    def _take_extents(self, header: Header, message: messages.Extents) -> None:
        owner = self._owner
        _check_payload(header, 0)
        if not owner.announced:
            raise RemoteProtocolError("memory is announced, which was not agreed on", ErrorCode.UNEXPECTED)
        if self._round != 1:
            raise RemoteProtocolError("memory is announced after the first round", ErrorCode.UNEXPECTED)
        runs = unpack_runs(message.runs, owner.memory.pages)
        self._announced_pages += count_pages(runs)
        if self._announced_pages > owner.memory.pages:
            raise RemoteProtocolError(
                f"{self._announced_pages} pages are announced of a guest that has {owner.memory.pages}",
                ErrorCode.TOO_LARGE,
            )
        owner.populator.expect(runs)

    def _take_zero_pages(self, header: Header, message: messages.ZeroPages) -> None:
        owner = self._owner
        _check_payload(header, 0)
        runs = unpack_runs(message.runs, owner.memory.pages)
        self._received.zero_pages += count_pages(runs)
        if self._received.zero_pages > owner.memory.pages + _SPARE_ZERO_PAGES:
            raise RemoteProtocolError(
                f"round {self._round} brings {self._received.zero_pages} zero pages on one channel, and the guest has "
                f"{owner.memory.pages}",
                ErrorCode.TOO_LARGE,
            )
        for some in split_runs(runs, _ZEROED_AT_ONCE):
            self._zero(some)

    def _zero(self, runs: Runs) -> None:
        """Give back those pages of some runs that have memory, or overwrite them where they are few in a row; the
        others are zero, and nothing is known of them."""
        owner = self._owner
        present, backed = owner.present, owner.populator.backed
        if len(runs) == 1:
            start, end = int(runs[0, 0]), int(runs[0].sum())
            held = start + np.flatnonzero(present[start:end] | backed[start:end])
        else:
            indices = indices_of(runs)
            held = indices[present[indices] | backed[indices]]
        if not len(held):
            return
        found = runs_of(held)
        long = found[:, 1] >= _GIVEN_BACK_PAGES
        if not long.all():
            owner.memory.clear(indices_of(found[~long]))
        if long.any():
            owner.memory.punch(found[long])
            given = indices_of(found[long])
            present[given] = backed[given] = owner.populator.mapped[given] = False
        if owner.digest is not None:
            self._received.digest_delta += owner.digest.set_zero(held)


def _check_payload(header: Header, expected_bytes: int) -> None:
    if header.payload_bytes != expected_bytes:
        raise RemoteProtocolError(
            f"a frame of type {header.type} has {header.payload_bytes} payload bytes, expected {expected_bytes}"
        )
