"""The client, on both event loops: large payloads, descriptors, broken connections, and nothing left over."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from vmm_sim.client import VmmClient, VmmError, VmmGone
from vmm_sim.wire import HEADER, check_header, decode_meta, encode_head

LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]
Scenario = Callable[[VmmClient, socket.socket], Coroutine[Any, Any, None]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Callable[[], asyncio.AbstractEventLoop], Scenario], None]:
    """Runs a scenario between a client and a bare socket that plays the VMM; checks that no descriptor is left."""

    def execute(loop_factory: Callable[[], asyncio.AbstractEventLoop], scenario: Scenario) -> None:
        path = tmp_path / "s.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()

            async def main() -> None:
                client = await VmmClient.connect(path)
                connection, _ = listener.accept()
                connection.settimeout(30)
                with connection:
                    await scenario(client, connection)
                    await client.close()
                    await client.close()

            with asyncio.Runner(loop_factory=loop_factory) as runner:
                runner.run(asyncio.sleep(0))
                before = set(os.listdir("/proc/self/fd"))
                runner.run(main())
                after = set(os.listdir("/proc/self/fd"))
                # asyncio keeps its own descriptors for the life of the loop.
                assert len(after) <= len(before) + 1
        path.unlink()

    return execute


def read_request(connection: socket.socket) -> tuple[dict[str, Any], bytes]:
    def exactly(count: int) -> bytes:
        data = bytearray(count)
        view = memoryview(data)
        while len(view):
            received = connection.recv_into(view)
            assert received
            view = view[received:]
        return bytes(data)

    meta_len, payload_len = check_header(exactly(HEADER.size))
    return decode_meta(exactly(meta_len)), exactly(payload_len)


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """As asyncio.to_thread, without a pool that outlives the test."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def work() -> None:
        result = function(*args)
        loop.call_soon_threadsafe(future.set_result, result)

    threading.Thread(target=work, daemon=True).start()
    return await future


def reply(request: dict[str, Any], payload: bytes = b"", **meta: Any) -> bytes:
    return encode_head({"id": request["id"], "ok": True, **meta}, len(payload)) + payload


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_replies_find_their_calls_in_any_order(run: Any, loop_factory: Any) -> None:
    async def scenario(client: VmmClient, vmm: socket.socket) -> None:
        calls = [asyncio.create_task(client.call("echo", number=i)) for i in range(10)]
        await asyncio.sleep(0)
        requests = [(await in_thread(read_request, vmm))[0] for _ in calls]
        for request in reversed(requests):
            vmm.sendall(reply(request, answer=request["number"] * 2))
        assert [(await call).meta["answer"] for call in calls] == [i * 2 for i in range(10)]

    run(loop_factory, scenario)


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_large_payloads_travel_both_ways_while_the_loop_lives(run: Any, loop_factory: Any) -> None:
    payload = os.urandom(1 << 20) * 48

    async def scenario(client: VmmClient, vmm: socket.socket) -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        ticker = asyncio.create_task(tick())

        def serve() -> bytes:
            request, body = read_request(vmm)
            vmm.sendall(reply(request, body))
            return body

        serving = asyncio.create_task(in_thread(serve))
        answer = await client.call("echo", payload)
        assert await serving == payload
        assert answer.payload == payload
        assert ticks > 20
        ticker.cancel()

    run(loop_factory, scenario)


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_descriptors_belong_to_their_reply(run: Any, loop_factory: Any) -> None:
    async def scenario(client: VmmClient, vmm: socket.socket) -> None:
        calls = [asyncio.create_task(client.call("fd", number=i)) for i in range(3)]
        await asyncio.sleep(0)
        requests = [(await in_thread(read_request, vmm))[0] for _ in calls]
        receivers = []
        for request in requests:
            fds = []
            if request["number"] != 1:
                receiver, sender = os.pipe()
                os.write(sender, str(request["number"]).encode())
                os.close(sender)
                fds = [receiver]
                receivers.append(receiver)
            data = reply(request)
            sent = socket.send_fds(vmm, [data[:5]], fds) if fds else vmm.send(data[:5])
            vmm.sendall(data[sent:])
        for call, expected in zip(calls, (b"0", None, b"2"), strict=True):
            answer = await call
            assert len(answer.fds) == (expected is not None)
            for fd in answer.fds:
                assert os.read(fd, 10) == expected
                os.close(fd)
        for receiver in receivers:
            os.close(receiver)

    run(loop_factory, scenario)


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_a_late_reply_is_dropped_with_its_descriptor(run: Any, loop_factory: Any) -> None:
    async def scenario(client: VmmClient, vmm: socket.socket) -> None:
        with pytest.raises(TimeoutError):
            await client.call("slow", timeout=0.01)
        request, _ = await in_thread(read_request, vmm)
        receiver, sender = os.pipe()
        socket.send_fds(vmm, [reply(request)], [sender])
        os.close(sender)
        call = asyncio.create_task(client.call("next"))
        await asyncio.sleep(0)
        vmm.sendall(reply((await in_thread(read_request, vmm))[0], which="next"))
        assert (await call).meta["which"] == "next"
        # The only writer left was the descriptor in the dropped reply: end of file means it is closed.
        assert os.read(receiver, 1) == b""
        os.close(receiver)

    run(loop_factory, scenario)


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_errors_and_broken_connections_are_told_apart(run: Any, loop_factory: Any) -> None:
    async def scenario(client: VmmClient, vmm: socket.socket) -> None:
        calls = [asyncio.create_task(client.call("x")) for _ in range(3)]
        await asyncio.sleep(0)
        request, _ = await in_thread(read_request, vmm)
        vmm.sendall(encode_head({"id": request["id"], "ok": False, "error": "Odd", "message": "It is odd."}, 0))
        with pytest.raises(VmmError, match="Odd: It is odd"):
            await calls[0]
        vmm.shutdown(socket.SHUT_RDWR)
        for call in calls[1:]:
            with pytest.raises(VmmGone):
                await call
        with pytest.raises(VmmGone):
            await client.call("x")

    run(loop_factory, scenario)


@pytest.mark.parametrize("data", [b"\xff" * 8, HEADER.pack(1, 0) + b"\xc1", HEADER.pack(1, 0) + b"\x05"])
def test_a_vmm_that_talks_nonsense_is_gone(run: Any, data: bytes) -> None:
    async def scenario(client: VmmClient, vmm: socket.socket) -> None:
        call = asyncio.create_task(client.call("x"))
        await asyncio.sleep(0)
        vmm.sendall(data)
        with pytest.raises(VmmGone, match="bad frame"):
            await call

    run(asyncio.new_event_loop, scenario)


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_nobody_there_is_vmm_gone(tmp_path: Path, loop_factory: Any) -> None:
    stale = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(stale))
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        for path in (tmp_path / "none.sock", stale):
            with pytest.raises(VmmGone, match="No VMM answers"):
                runner.run(VmmClient.connect(path))
