"""A virtual TCP: ordered bytes in both directions, cut at random into pieces; links that are cut, broken or damaged.

While a link is cut nothing arrives and TCP sends again: what was sent arrives after the cut, if the connection still
stands then. A reset breaks every connection and loses what is in flight. Connections do not wait for each other, so
messages of two of them overtake one another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from protocol import messages
from protocol.clock import ClockError, OffsetEstimate
from protocol.errors import RemoteProtocolError
from protocol.frames import MAX_PAYLOAD_BYTES, FrameParser
from protocol.messages import ClockAsk, ClockReply, FrameType, Message
from protocol.peer_clock import PeerClock
from protocol.versions import MAJOR, PREFACE_BYTES, agree_version, pack_preface, unpack_preface
from scripts.proof.kernel import MS, SECOND, Call, Process, World

HEARTBEAT_NS: Final = 500 * MS
SILENCE_NS: Final = 5 * SECOND
CONNECT_NS: Final = 5 * SECOND


@dataclass
class Link:
    """The network between the hosts.

    Attributes:
        latency_ns, jitter_ns: of one direction.
        bytes_per_s: of one connection.
        cut_until_ns: per sending host, until when nothing gets through.
        damage: hosts whose next bytes get a flipped bit.
        on_frame: what happens, once, when a host is about to send a frame of a type.
    """

    world: World
    latency_ns: int
    jitter_ns: int
    bytes_per_s: int

    def __post_init__(self) -> None:
        self.cut_until_ns: dict[str, int] = {}
        self.connections: list[End] = []
        self.damage: set[str] = set()
        self.on_frame: dict[tuple[str, FrameType], list[Call]] = {}

    def cut(self, sender: str, true_ns: int) -> None:
        """Let nothing through from this host for a while."""
        self.cut_until_ns[sender] = max(self.cut_until_ns.get(sender, 0), self.world.now_ns + true_ns)

    def reset(self) -> None:
        """Break every connection; what is in flight is lost."""
        for end in self.connections:
            end.lose("connection reset by peer")
        self.connections.clear()

    def arrival_ns(self, sender: str, size: int, free_ns: int) -> int:
        """When bytes that are sent now have arrived, behind what was sent before."""
        spike = 20 * self.jitter_ns if self.world.random.random() < 0.01 else 0
        leg = self.latency_ns + self.world.random.randrange(self.jitter_ns + 1) + spike
        leave = max(self.world.now_ns, self.cut_until_ns.get(sender, 0))
        return max(leave + leg, free_ns) + size * SECOND // self.bytes_per_s


class End:
    """One end of a connection, owned by a process."""

    def __init__(self, link: Link, process: Process) -> None:
        self.process = process
        self.peer: End | None = None
        self._on_bytes: Callable[[bytes], None] | None = None
        self._on_lost: Callable[[str], None] = lambda _: None
        self._early: list[bytes] = []
        self.link = link
        self._open = True
        self._arrives_ns = 0
        link.connections.append(self)

    def listen(self, on_bytes: Callable[[bytes], None], on_lost: Callable[[str], None]) -> None:
        """Take what has arrived and what will."""
        self._on_bytes, self._on_lost = on_bytes, on_lost
        early, self._early = self._early, []
        for data in early:
            self._arrive(data)

    def send(self, data: bytes) -> None:
        """Hand bytes to the kernel."""
        if not self._open or not self.process.alive:
            return
        peer, world = self.peer, self.link.world
        assert peer is not None
        if self.process.host.name in self.link.damage:
            self.link.damage.discard(self.process.host.name)
            place = world.random.randrange(len(data))
            data = data[:place] + bytes([data[place] ^ 1 << world.random.randrange(8)]) + data[place + 1 :]
            world.say("network", f"a bit from the {self.process.host.name} is flipped")
        cut = world.random.randrange(len(data)) if len(data) > 1 and world.random.random() < 0.3 else 0
        for piece in (data[:cut], data[cut:]):
            if piece:
                self._arrives_ns = self.link.arrival_ns(self.process.host.name, len(piece), self._arrives_ns)
                world.after(self._arrives_ns - world.now_ns, lambda piece=piece: peer._arrive(piece))  # type: ignore[misc]  # bound per piece

    def close(self) -> None:
        """End the connection; the peer learns it behind everything that was sent. Also what a kernel does for a dead
        process."""
        if self._open:
            self._open = False
            peer, world = self.peer, self.link.world
            assert peer is not None
            at_ns = self.link.arrival_ns(self.process.host.name, 1, self._arrives_ns)
            world.after(at_ns - world.now_ns, lambda: peer.lose("the peer closed the connection"))

    def lose(self, reason: str) -> None:
        """The connection is gone."""
        if self._open:
            self._open = False
            self.process.wake(lambda: self._on_lost(reason))

    def _arrive(self, data: bytes) -> None:
        on_bytes = self._on_bytes
        if on_bytes is None:
            self._early.append(data)
        elif self._open:
            self.process.wake(lambda: on_bytes(data))


Listener: TypeAlias = Callable[[End], None]


def connect(
    link: Link,
    process: Process,
    listener: Callable[[], tuple[Process, Listener] | None],
    on_open: Callable[[End], None],
    on_failed: Callable[[str], None],
) -> None:
    """Open a connection from a process to whoever listens when the request arrives."""
    world = link.world
    settled = False

    def give_up() -> None:
        nonlocal settled
        if not settled:
            settled = True
            on_failed("connecting timed out")

    def arrive() -> None:
        nonlocal settled
        if settled or not process.alive:
            return
        there = listener()
        back_ns = link.arrival_ns("destination", 1, 0) - world.now_ns
        if there is None:
            settled = True
            world.after(back_ns, lambda: process.wake(lambda: on_failed("connection refused")))
            return
        settled = True
        peer_process, accept = there
        mine, theirs = End(link, process), End(link, peer_process)
        mine.peer, theirs.peer = theirs, mine
        peer_process.wake(lambda: accept(theirs))
        world.after(back_ns, lambda: process.wake(lambda: on_open(mine)))

    process.after(CONNECT_NS, give_up)
    world.after(link.arrival_ns(process.host.name, 1, 0) - world.now_ns, arrive)


OnMessage: TypeAlias = Callable[[Message, bytes, int], None]
OnLost: TypeAlias = Callable[[str], None]


class Channel:
    """Frames over one end: the preface, then the real codec. ``on_message`` gets the message, its payload and its
    round; what breaks the protocol is answered with ERROR and ends the channel."""

    def __init__(self, end: End, on_message: OnMessage, on_lost: OnLost) -> None:
        self.on_message = on_message
        self.on_lost = on_lost
        self.open = True
        self.process = end.process
        self._end = end
        self._preface = b""
        self._parser: FrameParser | None = None
        self._sequence = 0
        self._version = MAJOR  # both ends are of this version; the preface only confirms it
        end.send(pack_preface(MAX_PAYLOAD_BYTES))

    def start(self) -> None:
        """Take what has arrived and what will."""
        self._end.listen(self._receive, self._lose)

    def send(self, message: Message, payload: bytes = b"", round_number: int = 0) -> None:
        """Send one frame. A frame that is sent into a closed channel is lost."""
        if not self.open:
            return
        for call in self._end.link.on_frame.pop((self.process.host.name, message.TYPE), ()):
            call()
        head = messages.frame_head(
            self._version, message, self._sequence, payload_bytes=len(payload), round_number=round_number
        )
        self._sequence += 1
        self._end.send(head + payload)

    def close(self) -> None:
        """End the channel without an event on this side."""
        self.open = False
        self._end.close()

    def fail(self, error: RemoteProtocolError) -> None:
        """The peer broke the protocol: say so, and lose the channel."""
        self.send(messages.Error.about(error))
        self._end.close()
        self._lose(str(error))

    def heard(self, message: Message) -> bool:
        """Whether the channel deals with a message by itself."""
        if isinstance(message, messages.Error):
            self._end.close()
            self._lose(message.text)
            return True
        return False

    def _receive(self, data: bytes) -> None:
        try:
            if self._parser is None:
                self._preface += data
                if len(self._preface) < PREFACE_BYTES:
                    return
                theirs = unpack_preface(self._preface[:PREFACE_BYTES])
                data = self._preface[PREFACE_BYTES:]
                self._version = agree_version(theirs)
                self._parser = FrameParser(self._version, MAX_PAYLOAD_BYTES)
            for frame in self._parser.receive(data):
                message = messages.decode(frame.type, frame.meta)
                if self.open and not self.heard(message):
                    self.on_message(message, frame.payload, frame.round)
        except RemoteProtocolError as error:
            self.fail(error)

    def _lose(self, reason: str) -> None:
        if self.open:
            self.open = False
            self.on_lost(reason)


class Control(Channel):
    """A control channel: it keeps the heartbeat and measures the peer's clock."""

    def __init__(self, end: End, on_message: OnMessage, on_lost: OnLost) -> None:
        self._peer_clock = PeerClock()
        self._nonce = 0
        self._heard_ns = end.process.host.clock_ns()
        super().__init__(end, on_message, on_lost)

    def begin(self, quick: int = 8) -> None:
        """Ask the peer's clock a few times now, and regularly from now on."""
        for _ in range(quick):
            self._ask()
        self.process.after(HEARTBEAT_NS, self._beat)

    def _beat(self) -> None:
        if not self.open:
            return
        if self.process.host.clock_ns() - self._heard_ns > SILENCE_NS:
            self._end.close()
            self._lose("the peer has been silent for too long")
            return
        self._ask()
        self.process.after(HEARTBEAT_NS, self._beat)

    def _ask(self) -> None:
        self._nonce += 1
        self.send(self._peer_clock.ask(self._nonce, self.process.host.clock_ns()))

    def heard(self, message: Message) -> bool:
        self._heard_ns = now_ns = self.process.host.clock_ns()
        match message:
            case ClockAsk(nonce=nonce):
                self.send(ClockReply(nonce=nonce, t2_ns=now_ns, t3_ns=self.process.host.clock_ns()))
            case ClockReply():
                self._peer_clock.hear(message, now_ns)
            case _:
                return super().heard(message)
        return True

    def round_trip_ns(self) -> int:
        """The longest recent round trip."""
        return self._peer_clock.round_trip_ns()

    def offset(self) -> OffsetEstimate | None:
        """Bounds of the peer's clock; the clocks of this world are honest, so there is no excuse for an error."""
        return self._peer_clock.offset()

    def transit_upper_ns(self, sent_at_ns: int) -> int:
        """Upper bound for the transit of a message that the peer stamped and that was read now."""
        try:
            return self._peer_clock.transit_upper_ns(sent_at_ns, self.process.host.clock_ns())
        except ClockError as error:
            raise AssertionError(f"honest clocks were called false: {error}") from error
