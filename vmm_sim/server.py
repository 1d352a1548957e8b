"""The API socket's server: the thread that reads a request carries it out, and another one of the connection reads on.

So no thread must be woken before an operation begins. A reply may overtake another; requests carry an id.
``interrupt`` and ``status`` are answered while a device is being saved or loaded.

The module is longer than others because every request of the API has its method here.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmm_sim.errors import VmmError
from vmm_sim.tracking import MODES
from vmm_sim.vmm import Vmm
from vmm_sim.wire import HEADER, FrameError, check_header, decode_meta, encode_head

MOST_THREADS: Final = 64
"""Threads of one connection: as many operations of a client are carried out at once, the next one is read later."""
MAX_TIMER_NS: Final = 86_400_000_000_000
MAX_RATE: Final = 1 << 40


class SocketInUseError(Exception):
    """A live VMM answers at the socket path, or the path cannot be bound."""


@dataclass(slots=True)
class Answer:
    """The result of a handler: the reply's map, payload and descriptors."""

    meta: dict[str, Any]
    payload: bytes | bytearray = b""
    fds: tuple[int, ...] = ()


_DEVICES: Final = "a list of [name, kind, bytes]"


class Arguments:
    """The arguments of one request; every one that is not asked for is an error."""

    def __init__(self, op: str, arguments: dict[str, Any], payload: bytearray) -> None:
        self._op = op
        self._arguments = arguments
        self.payload = payload

    def _take(self, name: str, wanted: str, default: Any = ...) -> Any:
        if name not in self._arguments:
            if default is ...:
                raise VmmError("InvalidArgument", f"Operation {self._op} needs the argument {name}: {wanted}.")
            return default
        return self._arguments.pop(name)

    def integer(self, name: str, low: int, high: int, default: Any = ...) -> int:
        """An integer in [low, high]."""
        wanted = f"an integer from {low} to {high}"
        value = self._take(name, wanted, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise VmmError("InvalidArgument", f"The argument {name} of operation {self._op} must be {wanted}.")
        return value

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        """An integer in [low, high], or nothing."""
        if self._arguments.get(name) is None:
            self._arguments.pop(name, None)
            return None
        return self.integer(name, low, high)

    def choice(self, name: str, choices: tuple[str, ...], default: Any = ...) -> Any:
        """One of ``choices``."""
        wanted = "one of " + ", ".join(choices)
        value = self._take(name, wanted, default)
        if value not in choices:
            raise VmmError("InvalidArgument", f"The argument {name} of operation {self._op} must be {wanted}.")
        return value

    def text(self, name: str) -> str:
        """A text."""
        value = self._take(name, "a text")
        if not isinstance(value, str):
            raise VmmError("InvalidArgument", f"The argument {name} of operation {self._op} must be a text.")
        return value

    def flag(self, name: str, default: Any = ...) -> bool:
        """A boolean."""
        value = self._take(name, "true or false", default)
        if not isinstance(value, bool):
            raise VmmError("InvalidArgument", f"The argument {name} of operation {self._op} must be true or false.")
        return value

    def devices(self, name: str) -> list[tuple[str, str, int]]:
        """A list of devices: (name, kind, bytes of state)."""
        value = self._take(name, _DEVICES)
        found: list[tuple[str, str, int]] = []
        if isinstance(value, list | tuple):
            for item in value:
                match item:
                    case (str(device), str(kind), int(size)) if size >= 0:
                        found.append((device, kind, size))
            if len(found) == len(value):
                return found
        raise VmmError("InvalidArgument", f"The argument {name} of operation {self._op} must be {_DEVICES}.")

    def any(self, name: str) -> object:
        """An argument of any type, which the operation itself checks."""
        return self._take(name, "a value")

    def done(self) -> None:
        """Refuse arguments that were not asked for."""
        if self._arguments:
            raise VmmError("InvalidArgument", f"Operation {self._op} has no argument {sorted(self._arguments)[0]}.")


KINDS: Final = ("iterable", "non-iterable")
MAX_DRY_RUN_BYTES: Final = 64 << 20
Handler = Callable[[Arguments], Callable[[], Answer]]


class ApiServer:
    """Serves one Vmm at one socket path until ``destroy`` or :meth:`stop`."""

    def __init__(self, vmm: Vmm, path: Path) -> None:
        self._vmm = vmm
        self._path = path
        self._listener = bind(path)
        self._inode = os.stat(path).st_ino
        self._wake_receive, self._wake_send = socket.socketpair()
        self._handlers: dict[str, Handler] = {
            "describe": self._describe,
            "status": self._status,
            "memory": self._memory,
            "dirty-log-start": self._dirty_log_start,
            "dirty-log-stop": self._dirty_log_stop,
            "pause": self._pause,
            "resume": self._resume,
            "time-export": self._time_export,
            "time-import": self._time_import,
            "device-save": self._device_save,
            "device-load": self._device_load,
            "devices-save": self._devices_save,
            "devices-load": self._devices_load,
            "interrupt": self._interrupt,
            "throttle": self._throttle,
            "timer-arm": self._timer_arm,
            "verify": self._verify,
            "set-rate": self._set_rate,
            "dry-run": self._dry_run,
            "dry-run-states": self._dry_run_states,
            "lock": self._lock,
            "fence": self._fence,
            "unlock": lambda _arguments: lambda: Answer(self._vmm.release_lock()),
            "destroy": self._destroy,
        }

    # Operations: each takes its arguments, then returns what to do

    def _describe(self, arguments: Arguments) -> Callable[[], Answer]:
        return lambda: Answer(self._vmm.describe())

    def _status(self, arguments: Arguments) -> Callable[[], Answer]:
        return lambda: Answer({**self._vmm.status(), "pid": os.getpid()})

    def _memory(self, arguments: Arguments) -> Callable[[], Answer]:
        return lambda: Answer({"bytes": self._vmm.memory.bytes}, fds=(self._vmm.memory.fd,))

    def _dirty_log_start(self, arguments: Arguments) -> Callable[[], Answer]:
        mode, present_only = arguments.choice("mode", MODES, "auto"), arguments.flag("present_only", False)

        def run() -> Answer:
            meta, fd = self._vmm.start_dirty_log(mode, present_only=present_only)
            return Answer(meta, fds=(fd,))

        return run

    def _dirty_log_stop(self, arguments: Arguments) -> Callable[[], Answer]:
        return lambda: Answer(self._vmm.stop_dirty_log())

    def _pause(self, arguments: Arguments) -> Callable[[], Answer]:
        return lambda: Answer(self._vmm.pause())

    def _resume(self, arguments: Arguments) -> Callable[[], Answer]:
        epoch = arguments.optional_integer("epoch", 0, (1 << 63) - 1)
        return lambda: Answer(self._vmm.resume(epoch))

    def _lock(self, arguments: Arguments) -> Callable[[], Answer]:
        token = arguments.optional_integer("token", 0, (1 << 63) - 1)
        return lambda: Answer(self._vmm.take_lock(token))

    def _fence(self, arguments: Arguments) -> Callable[[], Answer]:
        token = arguments.integer("token", 0, (1 << 63) - 1)
        return lambda: Answer(self._vmm.fence(token))

    def _time_export(self, arguments: Arguments) -> Callable[[], Answer]:
        return lambda: Answer({"time": self._vmm.export_time()})

    def _time_import(self, arguments: Arguments) -> Callable[[], Answer]:
        time_data, error_ns = arguments.any("time"), arguments.integer("error_ns", 0, (1 << 63) - 1, 0)
        return lambda: Answer(self._vmm.import_time(time_data, error_ns))

    def _device_save(self, arguments: Arguments) -> Callable[[], Answer]:
        name, kind = arguments.text("name"), arguments.choice("kind", KINDS)
        round_number = arguments.optional_integer("round", 0, (1 << 31) - 1)
        return lambda: Answer(*self._vmm.save_device(name, kind, round_number))

    def _device_load(self, arguments: Arguments) -> Callable[[], Answer]:
        name, kind, final = arguments.text("name"), arguments.choice("kind", KINDS), arguments.flag("final")
        return lambda: Answer(self._vmm.load_device(name, kind, final, memoryview(arguments.payload)))

    def _devices_save(self, arguments: Arguments) -> Callable[[], Answer]:
        keys = [(name, kind) for name, kind, _ in arguments.devices("devices")]
        return lambda: Answer(*self._vmm.save_devices(keys))

    def _devices_load(self, arguments: Arguments) -> Callable[[], Answer]:
        states = arguments.devices("devices")
        return lambda: Answer(self._vmm.load_devices(states, memoryview(arguments.payload)))

    def _interrupt(self, arguments: Arguments) -> Callable[[], Answer]:
        return lambda: Answer(self._vmm.interrupt())

    def _throttle(self, arguments: Arguments) -> Callable[[], Answer]:
        percent = arguments.integer("percent", 0, 99)
        return lambda: Answer(self._vmm.throttle(percent))

    def _timer_arm(self, arguments: Arguments) -> Callable[[], Answer]:
        in_ns = arguments.integer("in_ns", 0, MAX_TIMER_NS)
        return lambda: Answer(self._vmm.arm_timer(in_ns))

    def _verify(self, arguments: Arguments) -> Callable[[], Answer]:
        return lambda: Answer(self._vmm.verify())

    def _set_rate(self, arguments: Arguments) -> Callable[[], Answer]:
        rate = arguments.integer("dirty_rate", 0, MAX_RATE)
        return lambda: Answer(self._vmm.set_rate(rate))

    def _dry_run(self, arguments: Arguments) -> Callable[[], Answer]:
        side = arguments.choice("side", ("save", "load"))
        return lambda: Answer(self._vmm.dry_run(side))

    def _dry_run_states(self, arguments: Arguments) -> Callable[[], Answer]:
        """States that nobody saved: as many bytes as asked for go out, and the payload of the request came in."""
        size = arguments.integer("bytes", 0, MAX_DRY_RUN_BYTES)
        return lambda: Answer({}, bytearray(b"\1") * size)

    def _destroy(self, arguments: Arguments) -> Callable[[], Answer]:
        return lambda: Answer({})

    # Serving

    INLINE: Final = frozenset(
        {"status", "interrupt", "describe", "memory", "throttle", "timer-arm", "set-rate", "destroy"}
    )
    """Answered before the next request is read: they never wait."""
    IN_ORDER: Final = frozenset({"pause", "resume"})
    """Carried out one after the other, in the order in which a client sent them."""

    def serve(self) -> None:
        """Accept connections until stopped. Returns with the socket path removed."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake_receive, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if self._wake_receive in ready:
                    break
                with contextlib.suppress(OSError):
                    connection, _ = self._listener.accept()
                    _Connection(connection, self).start()
        self._listener.close()
        with contextlib.suppress(OSError):
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)

    def stop(self) -> None:
        """Let :meth:`serve` return; safe in a signal handler and from any thread."""
        with contextlib.suppress(OSError):
            self._wake_send.send(b"\0")

    def close(self) -> None:
        """Release what is left after :meth:`serve`."""
        self._wake_receive.close()
        self._wake_send.close()

    def prepare(self, meta: dict[str, Any], payload: bytearray) -> tuple[str, Callable[[], Answer]]:
        """The operation of a request, with its arguments checked. Raises VmmError."""
        arguments = {key: value for key, value in meta.items() if key not in ("id", "op")}
        op = meta.get("op")
        handler = self._handlers.get(op) if isinstance(op, str) else None
        if handler is None or not isinstance(op, str):
            raise VmmError("UnknownOperation", f"There is no operation {op!r}: use one of {', '.join(self._handlers)}.")
        taken = Arguments(op, arguments, payload)
        action = handler(taken)
        taken.done()
        return op, action


@dataclass(frozen=True, slots=True)
class _Request:
    """A request that may take long, its arguments checked. ``turn`` counts the requests of a connection that are
    carried out in the order in which they came; None for others."""

    request_id: object
    action: Callable[[], Answer]
    turn: int | None


class _Connection:
    """One client: its threads take turns at reading requests, and each carries out what it has read."""

    def __init__(self, connection: socket.socket, server: ApiServer) -> None:
        self._socket = connection
        self._socket.setblocking(True)
        self._server = server
        self._send_lock = threading.Lock()
        self._reading = threading.Lock()
        self._counting = threading.Lock()
        self._threads = 0
        self._free = 0
        """Threads that read, or wait for their turn to read."""
        self._turns_given = 0
        self._turns_over = 0
        self._turn_over = threading.Condition()

    def start(self) -> None:
        """Begin to serve, in threads of the connection's own."""
        for _ in range(2):
            self._add_thread()

    def _add_thread(self) -> None:
        with self._counting:
            self._threads += 1
            self._free += 1
        threading.Thread(target=self._take_turns, name="api", daemon=True).start()

    def _take_turns(self) -> None:
        while True:
            with self._reading:
                request = self._next_request()
                if request is None:
                    self._socket.close()
                    return
                with self._counting:
                    self._free -= 1
                    nobody_reads = not self._free and self._threads < MOST_THREADS
            if nobody_reads:
                self._add_thread()
            with self._in_turn(request.turn):
                self._run(request.request_id, request.action)
            with self._counting:
                self._free += 1

    @contextlib.contextmanager
    def _in_turn(self, turn: int | None) -> Iterator[None]:
        """Wait until the requests of earlier turns are carried out: who gives up waiting for a stop and resumes the
        guest must not be overtaken by the stop."""
        if turn is None:
            yield
            return
        with self._turn_over:
            self._turn_over.wait_for(lambda: self._turns_over == turn)
        try:
            yield
        finally:
            with self._turn_over:
                self._turns_over += 1
                self._turn_over.notify_all()

    def _next_request(self) -> _Request | None:
        """Read up to the next request that may take long, and answer the others. Returns None when there are no
        more."""
        with contextlib.suppress(OSError, EOFError):
            while True:
                try:
                    meta, payload = self._receive()
                except FrameError as error:
                    self._fail(None, VmmError("BadFrame", str(error)))
                    return None
                if (request := self._serve(meta, payload)) is not None:
                    return request
        return None

    def _receive(self) -> tuple[dict[str, Any], bytearray]:
        meta_len, payload_len = check_header(self._read(HEADER.size))
        meta = decode_meta(self._read(meta_len))
        return meta, self._read(payload_len)

    def _read(self, length: int) -> bytearray:
        data = bytearray(length)
        with memoryview(data) as view:
            done = 0
            while done < length:
                received = self._socket.recv_into(view[done:])
                if not received:
                    raise EOFError
                done += received
        return data

    def _serve(self, meta: dict[str, Any], payload: bytearray) -> _Request | None:
        """Answer a request, or return it when that may take long."""
        request_id = meta.get("id")
        try:
            op, action = self._server.prepare(meta, payload)
        except VmmError as error:
            self._fail(request_id, error)
            return None
        if op not in ApiServer.INLINE:
            turn = None
            if op in ApiServer.IN_ORDER:
                turn, self._turns_given = self._turns_given, self._turns_given + 1
            return _Request(request_id, action, turn)
        self._run(request_id, action)
        if op == "destroy":
            self._server.stop()
        return None

    def _run(self, request_id: object, action: Callable[[], Answer]) -> None:
        try:
            answer = action()
            self._send({"id": request_id, "ok": True, **answer.meta}, answer.payload, answer.fds)
        except VmmError as error:
            self._fail(request_id, error)
        except OSError as error:
            if self._socket.fileno() >= 0:
                self._fail(request_id, VmmError("HostError", f"The host refused: {error}."))

    def _fail(self, request_id: object, error: VmmError) -> None:
        with contextlib.suppress(OSError):
            self._send({"id": request_id, "ok": False, "error": error.name, "message": error.message})

    def _send(self, meta: dict[str, Any], payload: bytes | bytearray = b"", fds: tuple[int, ...] = ()) -> None:
        head = encode_head(meta, len(payload))
        with self._send_lock:
            sent = socket.send_fds(self._socket, [head], list(fds)) if fds else self._socket.send(head)
            if sent < len(head):
                self._socket.sendall(head[sent:])
            if payload:
                self._socket.sendall(payload)


def bind(path: Path) -> socket.socket:
    """A listening socket at ``path``, mode 0600; a stale socket is replaced. Raises SocketInUseError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() or path.is_symlink():
            _remove_stale(path)
        mask = os.umask(0o177)
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(mask)
        listener.listen(16)
    except OSError as error:
        listener.close()
        raise SocketInUseError(f"The API socket {path} cannot be created: {error.strerror or error}.") from error
    except SocketInUseError:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    if not path.is_socket():
        raise SocketInUseError(f"{path} exists and is not a socket: choose another API socket path.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            path.unlink()
            return
    raise SocketInUseError(f"A live VMM answers at {path}: choose another API socket path, or destroy that guest.")
