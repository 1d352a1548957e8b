"""Everything that parses bytes of others, as functions that take one input each: they return, or raise a named error.

Most parse and nothing more. ``live_targets`` adds those that need a peer: TLS handshakes, a QEMU monitor, a VMM.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from migrated.base.errors import DocumentError, VmmError
from migrated.control.framing import JsonSplitter, Malformed, RequestTooLargeError, parse
from migrated.destination.decoding import allowed_encodings, check_encoding, decode
from migrated.link.tls import Credentials, TlsError, TlsSession
from migrated.record.model import Record
from migrated.record.received import read_received
from migrated.settings.config import Config
from migrated.vmm.drivers import load_drivers
from migrated.vmm.qemu.qmp import Qmp
from migrated.vmm.seam import Driver
from protocol import messages
from protocol.errors import RemoteProtocolError
from protocol.frames import HEADER_BYTES, MAX_PAYLOAD_BYTES, FrameParser, check_meta, unpack_header
from protocol.guest import PAGE_SIZE
from protocol.pages import count_pages, unpack_runs
from protocol.versions import CAPABILITIES, MAJOR
from scripts.authority import Authority
from vmm_sim.wire import HEADER, FrameError, check_header, decode_meta

Target = Callable[[bytes], None]
_MOST_PAGES: Final = 1024
_ANSWER_S: Final = 5.0
_QUESTION_BYTES: Final = 4096
PIECE: Final = b"\n\0\n"
"""Between two answers in an input of ``AnswerTarget``."""


def take_frames(data: bytes) -> None:
    """A stream of the control channel."""
    for frame in FrameParser(MAJOR, MAX_PAYLOAD_BYTES).receive(data):
        messages.decode(frame.type, frame.meta)


def take_message(data: bytes) -> None:
    """A message without its checksums, so that mutations reach the models: type, then meta."""
    messages.decode(data[0] if data else 0, data[1:])


def take_batch(data: bytes) -> None:
    """A frame of a data channel with its payload."""
    header = unpack_header(data[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0"), MAJOR, MAX_PAYLOAD_BYTES)
    meta = data[HEADER_BYTES : HEADER_BYTES + header.meta_bytes]
    check_meta(meta, header)
    take_pages(meta, data[HEADER_BYTES + header.meta_bytes :])


def take_pages(meta: bytes, payload: bytes) -> None:
    """Parse the meta and the payload of a PAGES frame."""
    message = messages.decode(messages.FrameType.PAGES, meta)
    if not isinstance(message, messages.Pages):
        raise TypeError(f"PAGES decodes as {message!r}")
    count = count_pages(unpack_runs(message.runs, 1 << 22))
    check_encoding(message.encoding, allowed_encodings(CAPABILITIES), len(payload), count)
    if count <= _MOST_PAGES and message.encoding != "plain":
        decode(message.encoding, memoryview(payload), np.zeros((count, PAGE_SIZE // 8), np.uint64))


def take_unsigned_batch(data: bytes) -> None:
    """A batch without its checksums: length of the meta, meta, payload."""
    size = int.from_bytes(data[:2], "big")
    take_pages(data[2 : 2 + size], data[2 + size :])


def take_qmp(data: bytes) -> None:
    """Parse the bytes that a client writes to the control socket."""
    splitter = JsonSplitter()
    for value in [*splitter.feed(data), *splitter.end()]:
        if not isinstance(value, Malformed):
            parse(value)


def take_vmm(data: bytes) -> None:
    """A frame of a VMM's API socket."""
    meta_bytes, _ = check_header(data[: HEADER.size].ljust(HEADER.size, b"\0"))
    decode_meta(data[HEADER.size : HEADER.size + meta_bytes])


def take_record(data: bytes) -> None:
    """A peer's record."""
    read_received(Record, data, "record")


PARSERS: Final[dict[str, Target]] = {
    "frames": take_frames,
    "message": take_message,
    "batch": take_batch,
    "pages": take_unsigned_batch,
    "qmp": take_qmp,
    "vmm": take_vmm,
    "record": take_record,
}
LIVE: Final = ("tls", "qemu", "guest")
"""Targets of ``live_targets``: an input costs a millisecond."""
NAMED: Final = (RemoteProtocolError, FrameError, DocumentError, RequestTooLargeError, TlsError, VmmError, ValueError)
"""``ValueError`` is what ``framing.parse`` says of text that is no JSON."""


class TlsTarget:
    """A handshake of two ends, of which one flight is damaged: the input's first byte says which, the next two how much
    of it stays, and the rest takes the place of what follows. With the first byte's highest bit it ends there.

        client --- 0: hello ---> server --- 1: its flight ---> client --- 2: its flight, 3: data ---> server
    """

    def __init__(self, directory: Path) -> None:
        files = Authority(directory).host("fuzz.example", "127.0.0.1")
        self._credentials = Credentials(files.certificate, files.key, files.authority)

    def __call__(self, data: bytes) -> None:
        """Take an input."""
        client = TlsSession(self._credentials.client, "the server", "127.0.0.1")
        server = TlsSession(self._credentials.server, "the client")
        flight = data[0] & 3 if data else 0

        def sent(number: int, genuine: bytes) -> bytes:
            if number != flight:
                return genuine
            kept = genuine[: int.from_bytes(data[1:3], "big")]
            end = len(genuine) if data[:1] >= b"\x80" else len(kept) + len(data[3:])
            return kept + data[3:] + genuine[end:]

        client.handshake(b"")
        server.handshake(sent(0, client.to_send()))
        client.handshake(sent(1, server.to_send()))
        if server.handshake(sent(2, client.to_send())):
            server.peer_names()
            server.decrypt(sent(3, client.encrypt(bytes(64))))


class AnswerTarget:
    """A client of ours whose questions are answered with the pieces of the input: the first when it connects, one for
    each of its questions, and then the peer closes its side. PIECE stands between them.

    Args:
        socket: where the peer listens.
        ask: connects to that socket, and asks.
        patience_s: how long the peer waits for questions in all before it gives its next answers all the same.
    """

    def __init__(
        self,
        runner: asyncio.Runner,
        socket: Path,
        ask: Callable[[Path], Coroutine[Any, Any, None]],
        patience_s: float,
    ) -> None:
        self._runner = runner
        self._socket = socket
        self._ask = ask
        self._patience_s = patience_s
        self._answer = b""
        self._unexpected: BaseException | None = None
        runner.run(self._listen())

    def __call__(self, data: bytes) -> None:
        """Take an input. What goes wrong in a callback of the event loop counts as the client's own error."""
        self._answer = data
        self._unexpected = None
        try:
            self._runner.run(self._once())
        except ValueError as error:
            raise RuntimeError("an error without a name of ours") from error
        if self._unexpected is not None:
            raise RuntimeError("an error in a callback of the event loop") from self._unexpected

    def close(self) -> None:
        """Listen no more."""
        self._server.close()

    async def _listen(self) -> None:
        asyncio.get_running_loop().set_exception_handler(self._failed)
        self._server = await asyncio.start_unix_server(self._serve, self._socket)

    def _failed(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._unexpected = context.get("exception") or RuntimeError(context["message"])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked_until = asyncio.get_running_loop().time() + self._patience_s
        with contextlib.suppress(ConnectionError):
            for number, piece in enumerate(self._answer.split(PIECE)):
                if number:
                    with contextlib.suppress(TimeoutError):  # the client waits for more
                        async with asyncio.timeout_at(asked_until):
                            if not await reader.read(_QUESTION_BYTES):
                                break  # it has hung up
                writer.write(piece)
            writer.write_eof()
            await reader.read()
        writer.close()

    async def _once(self) -> None:
        async with asyncio.timeout(_ANSWER_S):
            await self._ask(self._socket)


async def ask_monitor(socket: Path) -> None:
    """Connect to a QEMU monitor as the daemon does, and ask for its status."""
    monitor = await Qmp.connect(socket, _ANSWER_S)
    try:
        await monitor.call("query-status")
    finally:
        await monitor.close()


async def ask_guest(driver: Driver, socket: Path) -> None:
    """Connect to a simulated VMM as the daemon does, and let it describe its guest."""
    guest = await driver.attach(socket, _ANSWER_S)
    try:
        await guest.describe()
        await guest.status()
    finally:
        await guest.close()


@contextlib.contextmanager
def live_targets(patience_s: float = 2.0) -> Iterator[dict[str, Target]]:
    """The targets that need a peer, by name, for as long as the block runs; see ``AnswerTarget``."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place, asyncio.Runner() as runner:
        directory = Path(place)
        monitor = AnswerTarget(runner, directory / "qemu", ask_monitor, patience_s)
        driver = load_drivers(Config())["sim"]
        guest = AnswerTarget(runner, directory / "guest", partial(ask_guest, driver), patience_s)
        with contextlib.closing(monitor), contextlib.closing(guest):
            yield {"tls": TlsTarget(directory), "qemu": monitor, "guest": guest}
