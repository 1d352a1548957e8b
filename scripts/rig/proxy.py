"""A proxy between two daemons that does harm at a chosen point: at a named frame, a byte offset, or at once. It stands
on TCP, or on unix sockets.

    source --- [connection: preface, then frames] ---> proxy ---> destination
                                       <---

It reads frame headers, so a fault can be placed at "the first COMMIT" and hit exactly that. It runs in a thread with an
event loop of its own: what the test does meanwhile cannot change its timing.

The module is longer than others because every kind of harm acts on the same flows.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from protocol.frames import HEADER, HEADER_BYTES
from protocol.messages import FrameType
from protocol.versions import PREFACE_BYTES
from scripts.rig.faults import (
    BOTH,
    Action,
    AtByte,
    AtFrame,
    AtTime,
    Call,
    Corrupt,
    Cut,
    Delay,
    Duplicate,
    Fault,
    Point,
    Reset,
    Stall,
    Throttle,
    Truncate,
    Way,
)

CHUNK_BYTES: Final = 256 << 10
QUEUED_PIECES: Final = 64
_MOST_DESCRIPTORS: Final = 64
_LOOK_AGAIN_S: Final = 0.05
"""A stall may begin or be lifted while something waits."""


@dataclass(slots=True)
class _Flow:
    """One direction of one connection."""

    way: Way
    connection: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    forwarded: int = 0
    opened: bool = False
    """The preface was forwarded before the streams were made."""
    head: bytes = b""
    """A first header that was read before, too."""
    sock: socket.socket | None = None
    """Where the descriptors go that came with the first header, if any did."""
    descriptors: list[int] = field(default_factory=list)
    pieces: asyncio.Queue[tuple[float, bytes]] = field(default_factory=lambda: asyncio.Queue(QUEUED_PIECES))
    dead: bool = False
    """Bytes were lost: nothing that follows may arrive."""


class _EndedError(Exception):
    """A connection is to end at both ends, after what was sent."""


class Proxy:
    """Listens on a port of its own and forwards to a target. The public methods may be called from any thread.

    Args:
        host, port: where connections go on.
    """

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        self.port = 0
        self.seen: list[tuple[FrameType, Way]] = []
        """Frames that reached the proxy, in order."""
        self._faults: list[Fault] = []
        self._counts: dict[FrameType, int] = {}
        self._cut: set[Way] = set()
        self._stalled_until = dict.fromkeys(BOTH, 0.0)
        self._delay_s = dict.fromkeys(BOTH, 0.0)
        self._rate: dict[Way, float] = dict.fromkeys(BOTH, 0.0)
        self._flows: dict[int, tuple[_Flow, _Flow]] = {}
        self._connections = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = threading.Condition()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    # Section: control, from any thread

    @property
    def uri(self) -> str:
        """Where a source is sent so that it goes through here."""
        return f"tcp:127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()
        if not self._started.wait(10):
            raise RuntimeError("the proxy did not start")

    def stop(self) -> None:
        """Reset every connection and end the thread."""
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    def arm(self, at: Point, action: Action) -> Fault:
        """Place a fault; the counting of frames and connections begins here."""
        if isinstance(action, Corrupt | Truncate | Duplicate) and not isinstance(at, AtFrame):
            raise ValueError(f"{type(action).__name__} acts on a frame: place it with AtFrame")
        fault = Fault(at, action)

        def place() -> None:
            self._counts.clear()
            self._connections = 0
            self.seen.clear()
            self._faults.append(fault)

        self._call(place)
        return fault

    def now(self, action: Cut | Reset | Stall | Delay | Throttle) -> None:
        """Do harm at once."""
        self._call(lambda: self._do(action))

    def heal(self) -> None:
        """The network works again: every fault is lifted, and connections that lost bytes are reset."""
        self._call(self._lift)

    def wait_fired(self, fault: Fault, timeout_s: float) -> bool:
        """Wait until a fault has happened. Returns False when it has not in time."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(fault.fired_at_ns), timeout_s)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _call(self, function: Callable[[], None]) -> None:
        """Run a function in the proxy's loop and wait for it."""
        done = threading.Event()

        def run() -> None:
            try:
                function()
            finally:
                done.set()

        self._loop.call_soon_threadsafe(run)
        if not done.wait(10):
            raise RuntimeError("the proxy does not answer")

    # Section: the loop

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        with self._listen() as listening:
            # By callback, not by a task: a task that is cancelled as it accepts would lose the connection, open.
            self._loop.add_reader(listening, self._accept, listening)
            self._started.set()
            await self._end.wait()
            self._loop.remove_reader(listening)
        self._lift()
        self._reset_all()
        for task in self._tasks:
            task.cancel()
        await self._idle.wait()

    @contextlib.contextmanager
    def _listen(self) -> Iterator[socket.socket]:
        """Listen until the end."""
        with socket.create_server(("127.0.0.1", self.port)) as listening:
            self.port = listening.getsockname()[1]
            yield listening

    def _accept(self, listening: socket.socket) -> None:
        """Take a connection; faults at a time count from the first one."""
        sock, _ = listening.accept()
        sock.setblocking(False)
        number, self._connections = self._connections, self._connections + 1
        if not number:
            for fault in self._faults:
                if isinstance(fault.at, AtTime) and not fault.fired_at_ns:
                    self._loop.call_later(fault.at.seconds, self._strike, fault)
        self._idle.clear()
        task = self._loop.create_task(self._take(number, sock))
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._over, sock))

    def _over(self, sock: socket.socket, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            sock.close()  # a task that had not begun could not do it
        self._tasks.discard(task)
        if not self._tasks:
            self._idle.set()

    async def _take(self, number: int, sock: socket.socket) -> None:
        """Connect to the target and forward until the end."""
        reader, writer = await asyncio.open_connection(sock=sock)
        try:
            onward_reader, onward_writer = await asyncio.open_connection(*self.target)
        except OSError:
            _reset(writer)
            return
        except asyncio.CancelledError:
            _reset(writer)
            raise
        for one in (writer, onward_writer):
            one.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        there = _Flow(Way.TO_DESTINATION, number, reader, onward_writer)
        back = _Flow(Way.TO_SOURCE, number, onward_reader, writer)
        await self._forward(there, back)

    async def _forward(self, there: _Flow, back: _Flow) -> None:
        """Forward both directions of a connection until it ends."""
        key = id(there)
        self._flows[key] = (there, back)
        try:
            async with asyncio.TaskGroup() as group:
                for flow in (there, back):
                    group.create_task(self._read(flow))
                    group.create_task(self._write(flow))
        except* _EndedError:
            pass
        except* (OSError, ValueError):
            for flow in (there, back):
                _reset(flow.writer)
        finally:
            self._flows.pop(key, None)
            for flow in (there, back):
                flow.writer.close()
                while flow.descriptors:
                    os.close(flow.descriptors.pop())

    # Section: one direction

    async def _read(self, flow: _Flow) -> None:
        """Read the preface and frame after frame, and put what is to be forwarded into the queue."""
        try:
            if not flow.opened:
                await self._pass(flow, await flow.reader.readexactly(PREFACE_BYTES))
            if flow.head:
                await self._frame(flow, flow.head)
            while True:
                await self._frame(flow, await flow.reader.readexactly(HEADER_BYTES))
        except asyncio.IncompleteReadError as error:
            await self._pass(flow, error.partial)
        except OSError:
            if flow.way not in self._cut:
                raise  # a reset is passed on, but not through a cut
        await flow.pieces.put((0.0, b""))

    async def _frame(self, flow: _Flow, head: bytes) -> None:
        _, _, number, _, meta_bytes, payload_bytes, *_ = HEADER.unpack(head)
        frame_type = FrameType(number)
        self._counts[frame_type] = self._counts.get(frame_type, 0) + 1
        self.seen.append((frame_type, flow.way))
        at = AtFrame(frame_type, self._counts[frame_type])
        fault = next((f for f in self._faults if not f.fired_at_ns and f.at == at), None)
        body_bytes = meta_bytes + payload_bytes
        if fault is not None and isinstance(fault.action, Corrupt | Truncate | Duplicate):
            whole = head + await flow.reader.readexactly(body_bytes)
            self._fire(fault, time.monotonic_ns())
            await self._damage(flow, fault.action, whole)
            return
        if fault is not None:
            self._strike(fault)
        await self._pass(flow, head)
        while body_bytes:
            piece = await flow.reader.read(min(body_bytes, CHUNK_BYTES))
            if not piece:
                raise asyncio.IncompleteReadError(b"", body_bytes)
            body_bytes -= len(piece)
            await self._pass(flow, piece)

    async def _damage(self, flow: _Flow, action: Corrupt | Truncate | Duplicate, frame: bytes) -> None:
        match action:
            case Duplicate():
                await self._pass(flow, frame + frame)
            case Corrupt(offset=offset):
                damaged = bytearray(frame)
                damaged[offset % len(frame)] ^= 0x55
                await self._pass(flow, bytes(damaged))
            case Truncate(keep_bytes=keep):
                await self._pass(flow, frame[:keep])
                await flow.pieces.join()
                raise _EndedError

    async def _pass(self, flow: _Flow, data: bytes) -> None:
        """Queue bytes for forwarding, up to a fault that sits inside them."""
        while data and (place := self._next_offset(flow)) is not None and place[0] < flow.forwarded + len(data):
            offset, fault = place
            before = offset - flow.forwarded
            await self._queue(flow, data[:before])
            data = data[before:]
            self._strike(fault)
        await self._queue(flow, data)

    async def _queue(self, flow: _Flow, data: bytes) -> None:
        flow.forwarded += len(data)
        if flow.way in self._cut:
            flow.dead = flow.dead or bool(data)
        if data and not flow.dead:
            await flow.pieces.put((time.monotonic() + self._delay_s[flow.way], data))

    async def _write(self, flow: _Flow) -> None:
        """Forward what is in the queue when it is due; the end of a stream arrives like its bytes."""
        while True:
            due, data = await flow.pieces.get()
            await self._until_due(flow.way, due)
            if not data:
                break
            sent = 0
            if flow.sock is not None and flow.descriptors:
                sent = socket.send_fds(flow.sock, [data], flow.descriptors)
                while flow.descriptors:
                    os.close(flow.descriptors.pop())
            flow.writer.write(data[sent:])
            await flow.writer.drain()
            flow.pieces.task_done()
            if rate := self._rate[flow.way]:
                await asyncio.sleep(len(data) / rate)
        if not flow.dead and flow.way not in self._cut:
            with contextlib.suppress(OSError):
                flow.writer.write_eof()

    async def _until_due(self, way: Way, due: float) -> None:
        while True:
            wait_s = max(due, self._stalled_until[way]) - time.monotonic()
            if wait_s <= 0:
                return
            await asyncio.sleep(min(wait_s, _LOOK_AGAIN_S))

    # Section: harm

    def _next_offset(self, flow: _Flow) -> tuple[int, Fault] | None:
        """The next fault at a byte of this flow."""
        waiting = [
            (fault.at.offset, fault)
            for fault in self._faults
            if isinstance(fault.at, AtByte)
            and not fault.fired_at_ns
            and (fault.at.way, fault.at.connection) == (flow.way, flow.connection)
            and fault.at.offset >= flow.forwarded
        ]
        return min(waiting, key=lambda place: place[0], default=None)

    def _strike(self, fault: Fault) -> None:
        at_ns = time.monotonic_ns()
        fault.struck = True
        try:
            self._do(fault.action)
        except Exception as error:
            fault.failed = f"{type(error).__name__}: {error}"
            raise
        self._fire(fault, at_ns)  # whoever waits for the fault finds it done

    def _fire(self, fault: Fault, at_ns: int) -> None:
        with self._changed:
            fault.fired_at_ns = at_ns
            self._changed.notify_all()

    def _do(self, action: Action) -> None:
        match action:
            case Cut(ways=ways):
                self._cut.update(ways)
            case Reset():
                self._reset_all()
            case Stall(seconds=seconds, ways=ways):
                for way in ways:
                    self._stalled_until[way] = time.monotonic() + seconds
            case Delay(seconds=seconds, way=way):
                self._delay_s[way] = seconds
            case Throttle(bytes_per_s=rate, way=way):
                self._rate[way] = rate
            case Call(function=function):
                function()
            case _:
                raise ValueError(f"{type(action).__name__} acts on a frame: place it with AtFrame")

    def _lift(self) -> None:
        if self._cut:
            self._reset_all()
        self._cut.clear()
        self._faults.clear()
        for way in BOTH:
            self._stalled_until[way] = self._delay_s[way] = self._rate[way] = 0.0

    def _reset_all(self) -> None:
        for flows in self._flows.values():
            for flow in flows:
                flow.dead = True
                _reset(flow.writer)


class UnixProxy(Proxy):
    """A proxy on a unix socket: descriptors that come with the first frame of a connection are forwarded with it.

    Args:
        target: the socket where connections go on.
        path: the proxy's own.
    """

    def __init__(self, target: Path, path: Path) -> None:
        super().__init__("", 0)
        self._onward = target
        self._path = path

    @property
    def uri(self) -> str:
        return f"unix:{self._path}"

    @contextlib.contextmanager
    def _listen(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.bind(str(self._path))
            listening.listen()
            yield listening
        self._path.unlink()

    async def _take(self, number: int, sock: socket.socket) -> None:
        """Forward the prefaces and read the first header, which descriptors come with; then go on as on TCP."""
        onward = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with contextlib.ExitStack() as undo:
            undo.callback(sock.close)
            undo.callback(onward.close)
            try:
                await self._loop.sock_connect(onward, str(self._onward))
                for one, other in ((sock, onward), (onward, sock)):
                    await self._loop.sock_sendall(other, await self._exactly(one, PREFACE_BYTES, []))
                descriptors: list[int] = []
                head = await self._exactly(sock, HEADER_BYTES, descriptors)
            except (OSError, EOFError):
                return
            reader, writer = await asyncio.open_unix_connection(sock=sock)
            onward_reader, onward_writer = await asyncio.open_unix_connection(sock=onward)
            undo.pop_all()
            there = _Flow(Way.TO_DESTINATION, number, reader, onward_writer, opened=True, head=head, sock=onward)
            there.descriptors = descriptors
            back = _Flow(Way.TO_SOURCE, number, onward_reader, writer, opened=True)
            await self._forward(there, back)

    async def _exactly(self, sock: socket.socket, count: int, descriptors: list[int]) -> bytes:
        """Read so many bytes, and add the descriptors that come with them to a list."""
        data = b""
        while len(data) < count:
            try:
                piece, came, _, _ = socket.recv_fds(sock, count - len(data), _MOST_DESCRIPTORS)
            except BlockingIOError:
                readable = self._loop.create_future()
                self._loop.add_reader(sock, readable.set_result, None)
                try:
                    await readable
                finally:
                    self._loop.remove_reader(sock)
                continue
            if not piece:
                raise EOFError
            descriptors += came
            data += piece
        return data


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with RST instead of FIN."""
    sock = writer.transport.get_extra_info("socket")
    with contextlib.suppress(OSError, AttributeError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
