"""Client of a VMM's API socket, for asyncio and uvloop alike.

A raw non-blocking socket with ``add_reader``, since descriptors cannot come through a transport. Calls are multiplexed
by id; payloads are received straight into their own buffer.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

from vmm_sim.errors import VmmError, VmmGone
from vmm_sim.wire import HEADER, MAX_FDS, FrameError, check_header, decode_meta, encode_head

__all__ = ["Reply", "VmmClient", "VmmError", "VmmGone"]

DEFAULT_TIMEOUT_S: Final = 60.0
READ_BYTES: Final = 1 << 20
READS_PER_TURN: Final = 8
"""So that a large payload does not hold up the loop."""

Buffer = bytes | bytearray | memoryview


@dataclass(slots=True)
class Reply:
    """A successful reply. The caller owns (and closes) the descriptors."""

    meta: dict[str, Any]
    payload: bytearray = field(default_factory=bytearray)
    fds: list[int] = field(default_factory=list)


class VmmClient:
    """One connection to one VMM. Not for use from several loops."""

    def __init__(self, connection: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self._socket = connection
        self._loop = loop
        self._next_id = 0
        self._pending: dict[int, asyncio.Future[Reply]] = {}
        self._outgoing: deque[memoryview] = deque()
        self._closed = False
        # The part being received (header, map or payload), the bytes of it that arrived, and the parts before it.
        self._target = bytearray(HEADER.size)
        self._filled = 0
        self._stage = 0
        self._payload_len = 0
        self._meta: dict[str, Any] = {}
        self._fds: list[int] = []
        loop.add_reader(connection.fileno(), self._readable)

    @classmethod
    async def connect(cls, path: str | os.PathLike[str], timeout: float | None = 5.0) -> VmmClient:
        """Connect to the API socket at ``path``.

        Raises VmmGone when nobody answers there within ``timeout`` s; its cause tells whether nobody listens.
        """
        loop = asyncio.get_running_loop()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            async with asyncio.timeout(timeout):
                await loop.sock_connect(connection, os.fspath(path))
        except (OSError, TimeoutError) as error:
            connection.close()
            raise VmmGone(f"No VMM answers at {os.fspath(path)}: {error or 'timeout'}.") from error
        except BaseException:
            connection.close()
            raise
        return cls(connection, loop)

    @property
    def peer_pid(self) -> int:
        """Process id of the VMM, as the kernel knows it: that of the process which listens."""
        credentials = struct.Struct("3i")
        pid: int = credentials.unpack(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))[
            0
        ]
        return pid

    async def call(
        self, op: str, payload: Buffer = b"", timeout: float | None = DEFAULT_TIMEOUT_S, **args: Any
    ) -> Reply:
        """Call operation ``op``. ``payload`` must not change until the call returns.

        Raises VmmError (the VMM refused), VmmGone (the connection broke), TimeoutError (no reply in ``timeout`` s).
        """
        if self._closed:
            raise VmmGone("The connection to the VMM is closed.")
        self._next_id += 1
        request_id = self._next_id
        head = encode_head({"id": request_id, "op": op, **args}, len(payload))
        future: asyncio.Future[Reply] = self._loop.create_future()
        self._pending[request_id] = future
        self._send(memoryview(head))
        if len(payload):
            self._send(memoryview(payload).cast("B"))
        try:
            async with asyncio.timeout(timeout):
                return await future
        except asyncio.CancelledError:
            # The reply may have come in the very turn in which the wait was cancelled.
            if future.done() and not future.cancelled() and future.exception() is None:
                _close_all(future.result().fds)
            raise
        finally:
            self._pending.pop(request_id, None)

    async def close(self) -> None:
        """Close the connection; pending calls fail with VmmGone. Idempotent."""
        self._shut("The connection to the VMM was closed here.")

    async def __aenter__(self) -> VmmClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # Sending

    def _send(self, data: memoryview) -> None:
        self._outgoing.append(data)
        if len(self._outgoing) == 1:
            self._writable()

    def _writable(self) -> None:
        while self._outgoing:
            data = self._outgoing[0]
            try:
                sent = self._socket.send(data, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                self._loop.add_writer(self._socket.fileno(), self._writable)
                return
            except OSError as error:
                self._shut(f"The connection to the VMM broke: {error.strerror or error}.")
                return
            if sent < len(data):
                self._outgoing[0] = data[sent:]
            else:
                self._outgoing.popleft()
        if not self._closed:
            self._loop.remove_writer(self._socket.fileno())

    # Receiving: exactly the bytes of one stage at a time, so descriptors always come with their own header

    def _readable(self) -> None:
        for _ in range(READS_PER_TURN):
            if self._closed or not self._read_once():
                return

    def _read_once(self) -> bool:
        wanted = len(self._target) - self._filled
        try:
            with memoryview(self._target) as view:
                if self._stage == 0:
                    space = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
                    received, ancillary, _, _ = self._socket.recvmsg_into(
                        [view[self._filled :]], space, socket.MSG_CMSG_CLOEXEC
                    )
                    self._take_fds(ancillary)
                else:
                    received = self._socket.recv_into(view[self._filled :], min(wanted, READ_BYTES))
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self._shut(f"The connection to the VMM broke: {error.strerror or error}.")
            return False
        if not received:
            self._shut("The VMM closed the connection.")
            return False
        self._filled += received
        if self._filled == len(self._target):
            try:
                self._stage_done()
            except FrameError as error:
                self._shut(f"The VMM sent a bad frame: {error}")
                return False
        return True

    def _take_fds(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._fds.extend(fds)

    def _stage_done(self) -> None:
        if self._stage == 0:
            meta_len, self._payload_len = check_header(self._target)
            self._expect(1, meta_len)
            return
        if self._stage == 1:
            self._meta = decode_meta(self._target)
            self._expect(2, self._payload_len)
            if self._payload_len:
                return
        payload, meta, fds = self._target, self._meta, self._fds
        self._meta, self._fds = {}, []
        self._expect(0, HEADER.size)
        self._deliver(meta, payload, fds)

    def _expect(self, stage: int, length: int) -> None:
        self._stage, self._target, self._filled = stage, bytearray(length), 0

    def _deliver(self, meta: dict[str, Any], payload: bytearray, fds: list[int]) -> None:
        future = self._pending.pop(meta.pop("id", None) or 0, None)
        if future is None or future.done():
            # The caller gave up waiting.
            _close_all(fds)
        elif "error" in meta:
            _close_all(fds)
            future.set_exception(VmmError(str(meta["error"]), str(meta.get("message"))))
        else:
            future.set_result(Reply(meta, payload, fds))

    def _shut(self, reason: str) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._outgoing.clear()
        _close_all(self._fds)
        self._fds = []
        pending, self._pending = self._pending, {}
        for future in pending.values():
            if not future.done():
                future.set_exception(VmmGone(reason))


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
