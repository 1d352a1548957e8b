"""The control socket's server: QMP over a unix socket, for several clients at once.

                    in-band, in order, at most 8
    bytes -> splitter ---------------> executor --+--> replies --+
                 \\--- exec-oob, at once ---------/               +--> writer -> bytes
                                        event bus --> events ----+      (bounded: drops the oldest events)

A client that does not read stops being read, so it never holds up the daemon or another client. The module is longer
than others because the tasks of one client share its queues and the order of its replies.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import stat
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import structlog

from migrated.control.access import Access, Peer, Right, peer_of
from migrated.control.command import Command
from migrated.control.commands import COMMANDS, version_document
from migrated.control.framing import JsonSplitter, Malformed, RequestTooLargeError, encode, parse
from migrated.control.operations import ErrorKind, OperationError, Operations
from migrated.control.schema import check_arguments
from migrated.state.history import HistoryError, RecordNotFoundError

MAX_CLIENTS: Final = 128
MAX_READERS: Final = 96
"""Of those, clients that may only look: they cannot take the last places from the operators."""
MAX_IN_FLIGHT: Final = 8
"""In-band commands of one client that are read and whose reply is not written; and out-of-band ones likewise
(qmp-spec.rst)."""
READ_BYTES: Final = 8 << 10
"""Little at once: cutting it into values keeps the event loop, and a client may send without end."""
FLUSH_TIMEOUT_S: Final = 2.0
"""How long a closing server waits for commands to finish and clients to take their last replies."""
OOB: Final = "oob"
SOCKET_UMASK: Final = 0o117
OPEN_UMASK: Final = 0o111
"""With groups configured anyone may connect, and each client is looked at."""

log = structlog.get_logger()


_Band = Literal["in-band", "out-of-band"] | None


class ControlSocketError(Exception):
    """The control socket cannot be set up."""


@dataclass(frozen=True, slots=True)
class _Request:
    name: str
    arguments: Any
    envelope: dict[str, Any]
    """``{"id": ...}`` if the client gave one; goes back with the reply."""
    oob: bool = False


class ControlServer:
    """Serves one control socket. ``start`` it, ``close`` it; use it once."""

    def __init__(self, operations: Operations, path: Path, access: Access | None = None) -> None:
        self._operations = operations
        self._path = path
        self._access = access or Access()
        self._lock_fd = -1
        self._inode: tuple[int, int] | None = None
        self._server: asyncio.Server | None = None
        self._clients: dict[_Client, asyncio.Task[None]] = {}
        self._commands: set[asyncio.Task[bytes]] = set()
        """Commands that are being carried out; they run on when their client hangs up."""

    async def start(self) -> None:
        """Take the path and listen on it.

        Raises:
            ControlSocketError: a live daemon has it, or it cannot be created.
        """
        try:
            restricted = self._access.restricted
            self._path.parent.mkdir(mode=0o755 if restricted else 0o750, parents=True, exist_ok=True)
            self._lock_fd = _lock(self._path)
            listener = _bind(self._path, OPEN_UMASK if restricted else SOCKET_UMASK)
        except OSError as error:
            self._release()
            raise ControlSocketError(
                f"The control socket {self._path} cannot be created: {error.strerror or error}; "
                "check the directory and its permissions, or configure another [control] socket."
            ) from error
        except ControlSocketError:
            self._release()
            raise
        status = self._path.stat()
        self._inode = (status.st_dev, status.st_ino)
        self._server = await asyncio.start_unix_server(self._accept, sock=listener)

    async def close(self) -> None:
        """Stop listening, end waiting commands, let the others finish and the clients take their replies."""
        if self._server is not None:
            self._server.close()
        for client in self._clients:
            client.finish()
        for tasks in (set(self._clients.values()), self._commands):
            if tasks:
                _, late = await asyncio.wait(tasks, timeout=FLUSH_TIMEOUT_S)
                for task in late:
                    task.cancel()
                await asyncio.gather(*late, return_exceptions=True)
        if self._inode is not None:
            with contextlib.suppress(FileNotFoundError):
                status = self._path.stat()
                if (status.st_dev, status.st_ino) == self._inode:
                    self._path.unlink()
        self._release()

    def _release(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._clients) >= MAX_CLIENTS:
            writer.write(encode(_error("GenericError", f"This daemon serves {MAX_CLIENTS} clients already")))
            writer.close()
            return
        peer = peer_of(writer.get_extra_info("socket"))
        right = self._access.right_of(peer)
        if right == "nothing":
            who = f"user {peer.uid}" if peer else "this client"
            log.warning("a client of the control socket was refused", uid=peer.uid if peer else None)
            sentence = f"Access denied: {who} is in no group that [control] operators or readers names"
            writer.write(encode(_error("GenericError", sentence)))
            writer.close()
            return
        if right == "looking" and sum(client.right == "looking" for client in self._clients) >= MAX_READERS:
            sentence = f"This daemon serves {MAX_READERS} clients that may only look already"
            writer.write(encode(_error("GenericError", sentence)))
            writer.close()
            return
        client = _Client(self._operations, self._commands, reader, writer, peer, right)
        self._clients[client] = asyncio.create_task(self._serve(client, writer))

    async def _serve(self, client: _Client, writer: asyncio.StreamWriter) -> None:
        try:
            await client.run()
        finally:
            del self._clients[client]
            writer.transport.abort()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


class _Client:
    """One connection. Three tasks: read requests, execute in order, write."""

    def __init__(
        self,
        operations: Operations,
        commands: set[asyncio.Task[bytes]],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        peer: Peer | None,
        right: Right,
    ) -> None:
        self._operations = operations
        self._commands = commands
        self._reader = reader
        self._writer = writer
        # No buffering beyond the kernel's: drain() then means that the client's end of the socket has the reply.
        writer.transport.set_write_buffer_limits(high=0)
        self._peer = peer
        self.right: Final = right
        self._negotiated = False
        self._oob_enabled = False
        self._in_band: asyncio.Queue[_Request | dict[str, Any] | None] = asyncio.Queue()
        self._slots = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._oob_tasks: set[asyncio.Task[None]] = set()
        self._waiting: set[asyncio.Task[bytes]] = set()
        self._oob_open = 0
        """Out-of-band commands that are read and whose reply is not written."""
        self._replies: deque[tuple[bytes, _Band]] = deque()
        """Encoded replies, and what each gives back once it is written."""
        self._events = operations.events.subscribe()
        self._wake = self._events.arrived
        self._ended = False
        self._reading: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve until the client leaves, or ``finish`` was called and everything is answered."""
        version = version_document(self._operations)
        greeting = {"version": {"qemu": version["qemu"], "package": version["package"]}, "capabilities": [OOB]}
        self._push(encode({"QMP": greeting}), None)
        self._reading = asyncio.create_task(self._read())
        writing = asyncio.create_task(self._write())
        executing = asyncio.create_task(self._execute())
        try:
            ended, _ = await asyncio.wait({writing, executing}, return_when=asyncio.FIRST_EXCEPTION)
            for finished in ended:
                finished.result()
        except ConnectionError:
            pass  # the client went away; commands that change something still run to their end
        finally:
            self._events.close()
            for task in (self._reading, writing, executing, *self._oob_tasks, *self._waiting):
                task.cancel()
            await asyncio.gather(
                self._reading, writing, executing, *self._oob_tasks, *self._waiting, return_exceptions=True
            )

    def finish(self) -> None:
        """Read no more, end what only waits, answer the rest, then hang up."""
        if self._reading is not None:
            self._reading.cancel()
        for task in self._waiting:
            task.cancel()

    async def _read(self) -> None:
        splitter = JsonSplitter()
        try:
            while data := await self._reader.read(READ_BYTES):
                for count, value in enumerate(splitter.feed(data), 1):
                    await self._dispatch(value)
                    if count % MAX_IN_FLIGHT == 0:
                        await asyncio.sleep(0)
                await asyncio.sleep(0)
            for value in splitter.end():
                await self._dispatch(value)
        except RequestTooLargeError as error:
            await self._enqueue(_error("GenericError", str(error)))
        except ConnectionError:
            pass
        finally:
            # Whatever was read is still answered: "echo ... | socat" hangs up its sending half at once.
            self._in_band.put_nowait(None)

    async def _dispatch(self, value: bytes | Malformed) -> None:
        request = _request(value, oob_allowed=self._oob_enabled)
        if isinstance(request, _Request) and request.oob and self._oob_open < MAX_IN_FLIGHT:
            self._oob_open += 1
            task = asyncio.create_task(self._execute_oob(request))
            self._oob_tasks.add(task)
            task.add_done_callback(self._oob_tasks.discard)
            return
        if isinstance(request, _Request) and request.oob:
            request = _error("GenericError", "Too many out-of-band commands are in flight") | request.envelope
        await self._enqueue(request)

    async def _enqueue(self, item: _Request | dict[str, Any]) -> None:
        await self._slots.acquire()
        self._in_band.put_nowait(item)
        if not self._negotiated:
            await self._in_band.join()  # what may follow depends on how the negotiation ends

    async def _execute(self) -> None:
        while (item := await self._in_band.get()) is not None:
            self._push(await self._respond(item) if isinstance(item, _Request) else encode(item), "in-band")
            self._in_band.task_done()
        if self._oob_tasks:
            await asyncio.wait(self._oob_tasks)
        self._ended = True
        self._wake.set()

    async def _execute_oob(self, request: _Request) -> None:
        self._push(await self._respond(request), "out-of-band")

    async def _respond(self, request: _Request) -> bytes:
        """Carry a request out and encode its reply. A command once begun is finished even if its client goes away."""
        if not self._negotiated or request.name == "qmp_capabilities":
            return encode(self._negotiate(request) | request.envelope)
        command = COMMANDS.get(request.name)
        if command is None:
            fault = _error("CommandNotFound", f"The command {request.name} has not been found")
            return encode(fault | request.envelope)
        if command.changes and self.right != "everything":
            fault = _error(
                "GenericError",
                f"Access denied: {request.name} is for operators, and this client may only look; join the group of "
                "[control] operators",
            )
            return encode(fault | request.envelope)
        if request.oob and not command.oob:
            fault = _error("GenericError", f"The command {request.name} does not support OOB")
            return encode(fault | request.envelope)
        task = asyncio.create_task(_carry_out(self._operations, command, request, self._peer))
        running = self._waiting if command.waits else self._commands
        running.add(task)
        task.add_done_callback(running.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            own = asyncio.current_task()
            if not task.cancelled() or (own and own.cancelling()):
                raise
            fault = _error("GenericError", "The daemon is stopping; ask again when it runs.")
            return encode(fault | request.envelope)

    def _negotiate(self, request: _Request) -> dict[str, Any]:
        if request.name != "qmp_capabilities":
            return _error("CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'")
        if self._negotiated:
            return _error("CommandNotFound", "Capabilities negotiation is already complete, command ignored")
        for name in request.arguments:
            if name != "enable":
                return _error("GenericError", f"Parameter '{name}' is unexpected")
        enable = request.arguments.get("enable", [])
        if not isinstance(enable, list):
            return _error("GenericError", "Invalid parameter type for 'enable', expected: array")
        for name in enable:
            if name != OOB:
                return _error("GenericError", f"Capability {name} not available")
        self._negotiated = True
        self._oob_enabled = OOB in enable
        self._events.pending()  # what happened before the negotiation is not this client's
        return {"return": {}}

    def _push(self, reply: bytes, band: _Band) -> None:
        self._replies.append((reply, band))
        self._wake.set()

    async def _write(self) -> None:
        while not (self._ended and not self._replies):
            await self._wake.wait()
            self._wake.clear()
            events = [encode(event.document()) for event in self._events.pending()] if self._negotiated else []
            replies = list(self._replies)
            self._replies.clear()
            if self._writer.transport.is_closing():
                raise ConnectionResetError  # writing to it would be a RuntimeError under uvloop
            self._writer.write(b"".join([*events, *(reply for reply, _ in replies)]))
            await self._writer.drain()
            for _, band in replies:
                if band == "in-band":
                    self._slots.release()
                elif band == "out-of-band":
                    self._oob_open -= 1


def _request(value: bytes | Malformed, *, oob_allowed: bool) -> _Request | dict[str, Any]:
    """The request in one JSON value, or the error reply to it."""
    try:
        if isinstance(value, Malformed):
            raise ValueError(value.reason)
        message = parse(value)
    except ValueError as error:
        return _error("GenericError", f"JSON parse error, {error}")
    if not isinstance(message, dict):
        return _error("GenericError", "QMP input must be a JSON object")
    envelope = {"id": message["id"]} if "id" in message else {}
    verbs = {"execute", "exec-oob"} if oob_allowed else {"execute"}
    fault = None
    for member in message:
        if member not in {*verbs, "arguments", "id"}:
            fault = f"QMP input member '{member}' is unexpected"
    verb = next((verb for verb in message if verb in verbs), None)
    if fault is None and verb is None:
        fault = "QMP input lacks member 'execute'"
    elif fault is None and verbs <= message.keys() and oob_allowed:
        fault = "QMP input member 'exec-oob' clashes with 'execute'"
    elif fault is None and not isinstance(message[verb], str):
        fault = f"QMP input member '{verb}' must be a string"
    elif fault is None and not isinstance(message.get("arguments", {}), dict):
        fault = "QMP input member 'arguments' must be an object"
    if fault is not None:
        return _error("GenericError", fault) | envelope
    return _Request(str(message[verb]), message.get("arguments", {}), envelope, oob=verb == "exec-oob")


async def _carry_out(operations: Operations, command: Command, request: _Request, peer: Peer | None) -> bytes:
    """Check and run a command; its encoded reply."""
    try:
        check_arguments(request.arguments, command.arguments)
        if command.changes:
            named = {"guest": request.arguments["guest"]} if "guest" in request.arguments else {}
            caller = {"uid": peer.uid, "pid": peer.pid} if peer else {}
            log.info(f"Control command {command.name}", **named, **caller)
        reply = {"return": await command.run(operations, request.arguments)} | request.envelope
        return await asyncio.to_thread(encode, reply) if command.large else encode(reply)
    except OperationError as error:
        fault = _error(error.kind, str(error))
    except RecordNotFoundError as error:
        fault = _error("DeviceNotFound", str(error))
    except HistoryError as error:
        fault = _error("GenericError", str(error))
    except OSError as error:
        log.error(f"Control command {command.name} failed", reason=str(error))
        where = f" at {error.filename}" if error.filename else ""
        fault = _error(
            "GenericError",
            f"The daemon could not carry out {command.name}: {error.strerror or error}{where}; look at disk space, "
            "permissions and open files of the daemon.",
        )
    except Exception as error:
        log.exception(f"Control command {command.name} failed unexpectedly")
        fault = _error(
            "GenericError",
            f"The daemon failed at {command.name} ({type(error).__name__}: {error}); its log says where.",
        )
    return encode(fault | request.envelope)


def _error(kind: ErrorKind, description: str) -> dict[str, Any]:
    return {"error": {"class": kind, "desc": description}}


def _lock(path: Path) -> int:
    """Lock ``<path>.lock`` for the life of the daemon. asyncio would bind over a live socket without asking."""
    lock_path = path.with_name(path.name + ".lock")
    fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        os.close(fd)
        raise ControlSocketError(
            f"The control socket {path} belongs to a daemon that runs already (pid {holder or 'unknown'}); "
            "stop that one, or configure another [control] socket."
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _bind(path: Path, umask: int) -> socket.socket:
    """A listening socket at ``path``, in place of a stale one; the caller holds the lock."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ControlSocketError(
                f"{path} exists and is not a socket; move it away, or configure another [control] socket."
            )
        path.unlink()
    except FileNotFoundError:
        pass
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    # The mode comes from the umask, as a chmod after bind leaves a moment in which anyone may connect.
    before = os.umask(umask)
    try:
        listener.bind(str(path))
        listener.listen(64)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener
