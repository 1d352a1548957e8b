"""A data channel over real TCP: pieces of any size, many buffers, gaps, ends, and calls that are interrupted."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from migrated.base.errors import LinkLostError
from migrated.link.data import DataChannel
from migrated.link.sockets import Agreed, Connection, Wire
from migrated.link.streams import MAX_VECTORS
from protocol import messages
from protocol.errors import RemoteProtocolError
from protocol.frames import MAX_PAYLOAD_BYTES
from protocol.versions import MAJOR

BARRIER = messages.Barrier(round=3)
PATIENCE_S = 60.0


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of one TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    with one, other:
        yield one, other


def channel(sock: socket.socket) -> DataChannel:
    return DataChannel(Connection(Wire(sock, None), Agreed(MAJOR, MAX_PAYLOAD_BYTES)), 0)


def beside(work: Callable[[], object]) -> threading.Thread:
    """Work in a thread of its own, as a channel's."""
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def frame(sequence: int, payload: bytes = b"") -> bytes:
    return messages.frame_head(MAJOR, BARRIER, sequence, payload_bytes=len(payload)) + payload


def test_a_frame_that_comes_byte_by_byte_is_one_frame(ends: tuple[socket.socket, socket.socket]) -> None:
    raw, receiver = ends[0], channel(ends[1])
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    data = frame(1, b"abcdefgh")

    def trickle() -> None:
        for at in range(len(data)):
            raw.sendall(data[at : at + 1])

    sending = beside(trickle)
    header, message = receiver.read_header()
    parts = [memoryview(bytearray(3)), memoryview(bytearray(5))]
    receiver.read_into(parts)
    sending.join(PATIENCE_S)
    assert message == BARRIER
    assert header.payload_bytes == 8
    assert [bytes(part) for part in parts] == [b"abc", b"defgh"]
    assert receiver.received_bytes == len(data)


def test_more_buffers_than_one_system_call_takes(ends: tuple[socket.socket, socket.socket]) -> None:
    sender, receiver = channel(ends[0]), channel(ends[1])
    pieces = [bytes([number % 251]) * (number % 7 * 100) for number in range(3 * MAX_VECTORS)]
    sending = beside(lambda: sender.send(BARRIER, [memoryview(piece) for piece in pieces]))
    header, _ = receiver.read_header()
    assert header.payload_bytes == sum(map(len, pieces))
    parts = [memoryview(bytearray(len(piece))) for piece in pieces]
    receiver.read_into(parts)
    sending.join(PATIENCE_S)
    assert [bytes(part) for part in parts] == pieces
    assert sender.sent_bytes == receiver.received_bytes


@pytest.mark.parametrize("numbers", [(2,), (1, 3), (1, 1), (0,)])
def test_frames_out_of_sequence_are_refused(
    ends: tuple[socket.socket, socket.socket], numbers: tuple[int, ...]
) -> None:
    raw, receiver = ends[0], channel(ends[1])
    raw.sendall(b"".join(map(frame, numbers)))
    for _ in numbers[:-1]:
        receiver.read_header()
    with pytest.raises(RemoteProtocolError, match="expected"):
        receiver.read_header()


@pytest.mark.parametrize("sent", [0, 5, -1])
def test_a_connection_that_ends_within_a_frame_is_lost(ends: tuple[socket.socket, socket.socket], sent: int) -> None:
    raw, receiver = ends[0], channel(ends[1])
    raw.sendall(frame(1, b"payload")[:sent])
    raw.close()

    def read() -> None:
        receiver.read_header()
        receiver.read_into([memoryview(bytearray(7))])

    with pytest.raises(LinkLostError, match="data channel 0 was closed by the peer"):
        read()


def test_an_interrupt_ends_a_read_and_a_send_that_wait(ends: tuple[socket.socket, socket.socket]) -> None:
    """Nobody sends, and nobody reads."""
    one = channel(ends[0])
    failures: list[LinkLostError] = []
    block = memoryview(bytes(1 << 20))

    def read() -> None:
        try:
            one.read_header()
        except LinkLostError as error:
            failures.append(error)

    def send() -> None:
        try:
            while True:
                one.send(BARRIER, [block])
        except LinkLostError as error:
            failures.append(error)

    threads = [beside(read), beside(send)]
    one.interrupt()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(failures) == 2
