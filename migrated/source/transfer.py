"""What rounds and switchover send with: pages of a round, new state of iterable devices, final states."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import xxhash

from migrated.base.errors import VmmError
from migrated.base.threads import in_thread
from migrated.link.reply import Reply
from migrated.source.ledger import OutgoingLedger
from migrated.source.pages import OutgoingState, PageSender, Sent
from migrated.vmm.dirty_log import DirtyLog
from migrated.vmm.memory import GuestMemory
from migrated.vmm.seam import Iterations, StatePart, VmmGuest
from protocol import messages
from protocol.guest import DeviceDescription, GuestDescription
from protocol.pages import NO_RUNS, Runs

_QUICK_SCAN_NS = 1_000_000
BESIDE_BYTES = 12 << 10
"""Final device states that go over the control channel, which wakes no thread: as much as a connection that was quiet
sends without waiting for an acknowledgement (ten segments). What is beyond goes over the data channels."""
BESIDE_LOCAL_BYTES = 1 << 20
"""The same where memory is handed over: a unix socket has no segments, and nothing else is to be sent."""


@dataclass(slots=True)
class Transfer:
    """The objects with which rounds and switchover send, and the counters that both continue.

    ``shared``: the memory is handed over: there are no rounds, and no page is sent.
    """

    vmm: VmmGuest
    guest: GuestDescription
    memory: GuestMemory
    dirty_log: DirtyLog
    sender: PageSender
    control: Reply
    """Is told of each round."""
    ledger: OutgoingLedger
    shared: bool = False
    beside_limit_bytes: int = 0
    """Bytes of final device states that may go over the control channel; 0 where no destination hears it."""
    beside_bytes: int = 0
    """Bytes of device states that went over the control channel."""
    round: int = 0
    state_order: int = 0
    scan_ns: int = 0
    """Duration of the last read of the dirty log."""
    scan_cost_ns: int = 0
    """What that read would have cost in the blackout."""
    fence_ns: int = 0
    """Duration of the fence after the last collect."""
    iterations: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    """Bytes that each iterable device had new in the last two rounds, the older first."""

    @property
    def collect_cost_ns(self) -> int:
        """What a collect would cost in the blackout, with its fence: by the last one."""
        return self.scan_cost_ns + self.fence_ns

    async def collect(self) -> Runs:
        """Read and clear the dirty log, off the event loop, and wait for what writes around it: from then until the
        next collect pages may be read."""
        if self.shared:
            return NO_RUNS
        begin_ns = time.monotonic_ns()
        if 0 < self.scan_cost_ns < _QUICK_SCAN_NS:
            runs, self.scan_cost_ns = self.dirty_log.collect_with_cost()  # shorter than the way to a thread and back
        else:
            runs, self.scan_cost_ns = await in_thread(self.dirty_log.collect_with_cost)
        self.scan_ns = time.monotonic_ns() - begin_ns
        self.ledger.memory.dirty_syncs += 1
        self.fence_ns = await self.vmm.fence()
        return runs

    async def send_round(self, runs: Runs) -> Sent:
        """Send one round with its barriers, and say so on the control channel. Puts the pages back on failure."""
        self.round += 1
        try:
            sent = await self.sender.send_round(self.round, runs)
        except BaseException:
            self.dirty_log.restore(runs)
            raise
        self.control.send(messages.RoundEnd(round=self.round, pages=sent.normal_pages, zero_pages=sent.zero_pages))
        self.ledger.memory.normal_pages += sent.normal_pages
        self.ledger.memory.zero_pages += sent.zero_pages
        self.ledger.memory.postponed_pages += sent.postponed_pages
        return sent

    async def send_iteration(self, iterations: Iterations, device: DeviceDescription, number: int) -> int:
        """Save and send the new state of an iterable device in a round (counted from 0). Returns its bytes."""
        part = await iterations.save_iteration(device.name, number)
        key = (part.name, part.kind)
        self.iterations[key] = (self.iterations.get(key, (0, 0))[1], len(part.data))
        if not len(part.data):
            return 0
        self.ledger.devices[key].precopy_bytes += len(part.data)
        await self.sender.send_devices([self._state(part, final=False)])
        return len(part.data)

    def final_device_bytes(self) -> int:
        """Return the expected size of all device states at a stop (bytes): that of the guest's description, or more
        for a device whose new state grows from round to round; one that shrinks is expected to go on shrinking."""
        total = 0
        for device in self.guest.devices:
            before, last = self.iterations.get((device.name, device.kind), (0, 0))
            expected = last * last // before if last < before else last
            total += max(device.state_bytes, expected)
        return total

    def send_final(self, parts: Sequence[StatePart]) -> asyncio.Future[int]:
        """Begin to send final states.

        Returns:
            A future whose result is their number of bytes, once they were handed to the kernel. The next ones can be
            saved meanwhile.

        Raises:
            VmmError: the guest's description has no such device.
        """
        states = []
        for part in parts:
            figures = self.ledger.devices.get((part.name, part.kind))
            if figures is None:
                raise VmmError(
                    f"guest {self.vmm.name} has state of a device {part.name} ({part.kind}) that it did not describe"
                )
            figures.save_ns, figures.final_bytes = part.save_ns, len(part.data)
            state = self._state(part, final=True)
            if self.beside_bytes + len(part.data) <= self.beside_limit_bytes:
                self.control.send(state.meta, bytes(state.data))
                self.beside_bytes += len(part.data)
                self.ledger.memory.downtime_bytes += len(part.data)
            else:
                states.append(state)
        return asyncio.ensure_future(self._send_states(states))

    async def _send_states(self, states: list[OutgoingState]) -> int:
        if not states:
            return 0
        await self.sender.send_devices(states)
        return sum(len(state.data) for state in states)

    def _state(self, part: StatePart, *, final: bool) -> OutgoingState:
        meta = messages.DeviceState(
            order=self.state_order,
            name=part.name,
            kind=part.kind,
            final=final,
            offset=0,
            total_bytes=len(part.data),
            digest=xxhash.xxh3_64_intdigest(part.data),
            save_ns=part.save_ns,
        )
        self.state_order += 1
        return OutgoingState(meta, part.data)
