"""One connection to QEMU's monitor (QMP): every call has a bound in time, and every failure is a sentence.

QEMU's own library speaks the protocol; a call through it costs 0.3 ms here, most of it QEMU's. A monitor takes one
client at a time: a second one is connected by the kernel and hears nothing until the first has gone.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from qemu.qmp import EventListener, ExecInterruptedError, ExecuteError, QMPClient, QMPError, Runstate

from migrated.base.errors import VmmError, VmmGoneError, VmmSilentError

QUICK_S: Final = 5.0
"""Bound of a call that QEMU answers at once."""
Event = Mapping[str, Any]
_ODD: Final = (LookupError, TypeError, ValueError, AttributeError, AssertionError)
"""Errors of reading an answer that has another shape than QEMU's. The library asserts that the session still stands
after the negotiation, which QEMU may answer and end at once."""

# What it says of lost connections reaches our callers as errors.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class QmpCommandError(VmmError):
    """QEMU refused a command. ``kind`` is its error class, ``description`` its own words."""

    def __init__(self, message: str, kind: str, description: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.description = description


class Qmp:
    """A monitor of one QEMU process. Made by ``connect``.

    Attributes:
        pid: the process.
        version: of QEMU, as (major, minor, micro).
    """

    def __init__(self, path: Path, client: QMPClient, stream: socket.socket) -> None:
        self.path = path
        self._client = client
        self._stream = stream
        greeting = client.greeting
        qemu: Any = greeting.QMP.version["qemu"] if greeting is not None else {}
        self.version = (int(qemu.get("major", 0)), int(qemu.get("minor", 0)), int(qemu.get("micro", 0)))
        self.pid = 0
        self._hanging_up = asyncio.Lock()
        self._hung_up = False

    @classmethod
    async def connect(cls, path: Path, timeout_s: float | None = QUICK_S) -> Qmp:
        """Connect to a monitor.

        Args:
            path: its unix socket.
            timeout_s: bound of the wait for QEMU's greeting; None waits for as long as it takes.

        Raises:
            VmmGoneError: nobody listens on the socket.
            VmmSilentError: the greeting does not come.
            VmmError: it is no monitor, or may not be used.
        """
        named = path.resolve()  # of a QEMU that was adopted there is a link here to the socket that somebody named
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        client, listener = QMPClient(), 0
        try:
            stream.setblocking(False)
            stream.connect(str(path))
            listener = _peer(stream)
            async with asyncio.timeout(timeout_s):
                await client.connect(stream)
            made = cls(path, client, stream)
            made.pid = await made._process(listener)
            if not made.pid:
                raise VmmError(f"the process of the QEMU behind {named} cannot be told: it is in another namespace")
        except QmpCommandError as error:
            await _hang_up(client, stream)
            raise VmmError(f"{named} cannot be used as a QEMU monitor: {error.description}") from error
        except (ConnectionRefusedError, FileNotFoundError) as error:
            stream.close()
            raise VmmGoneError(f"no QEMU listens on {named}") from error
        except TimeoutError as error:
            await _hang_up(client, stream)
            raise VmmSilentError(
                f"the monitor {named} (process {listener}) sends no greeting: QEMU hangs, or another client (libvirt, "
                "a script) holds it. A monitor takes one client at a time: give QEMU one more (-qmp "
                "unix:PATH,server=on,wait=off) and name that",
                listener,
            ) from error
        except (QMPError, OSError, EOFError) as error:
            await _hang_up(client, stream)
            raise VmmError(f"{named} cannot be used as a QEMU monitor: {error}") from error
        except _ODD as error:
            await _hang_up(client, stream)
            raise VmmError(f"{named} cannot be used as a QEMU monitor: its answers are not those of QEMU") from error
        except BaseException:
            await _hang_up(client, stream)
            raise
        return made

    async def _process(self, listener: int) -> int:
        """QEMU's process: by a thread of its own, as whoever made the socket may be another."""
        for cpu in await self.call("query-cpus-fast"):
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{cpu['thread-id']}/status").read_text().splitlines():
                    if line.startswith("Tgid:"):
                        return int(line.split()[1])
        return listener

    async def call(self, command: str, timeout_s: float = QUICK_S, **arguments: Any) -> Any:
        """Execute a command; underscores in the names of arguments stand for hyphens. Returns what QEMU returned.

        Raises:
            QmpCommandError: QEMU refused it.
            VmmSilentError: no answer in time.
            VmmGoneError: QEMU ended.
        """
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, given)
        except ExecuteError as error:
            words = str(error)
            sentence = f"QEMU (process {self.pid}) refused {command}: {words}"
            raise QmpCommandError(sentence, error.error_class, words) from error
        except TimeoutError as error:
            raise VmmSilentError(
                f"QEMU (process {self.pid}) did not answer {command} within {timeout_s:g} s", self.pid
            ) from error
        except (ExecInterruptedError, QMPError, OSError, EOFError) as error:
            raise VmmGoneError(f"the connection to QEMU (process {self.pid}) is lost: {error}") from error

    async def human(self, line: str) -> str:
        """Return the answer of the human monitor to a line, for the few facts that QMP does not give."""
        return str(await self.call("human-monitor-command", command_line=line))

    async def pass_descriptor(self, name: str, fd: int) -> None:
        """Give QEMU a copy of a descriptor, under a name (``getfd``); it replaces an earlier one of that name."""
        self._send_descriptor(fd)
        await self.call("getfd", fdname=name)

    async def add_descriptor(self, fd: int) -> str:
        """Give QEMU a copy of a descriptor. Returns the path by which its commands open it (/dev/fdset/...)."""
        self._send_descriptor(fd)
        return f"/dev/fdset/{(await self.call('add-fd'))['fdset-id']}"

    def _send_descriptor(self, fd: int) -> None:
        # White space between two messages carries it: nothing of ours is in the transport's buffer between two calls.
        try:
            self._stream.sendmsg([b" "], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
        except OSError as error:
            raise VmmGoneError(f"QEMU (process {self.pid}) took no descriptor: {error.strerror}") from error

    @asynccontextmanager
    async def listen(self, *names: str) -> AsyncIterator[Callable[[], Any]]:
        """Hear events of these names while the block runs: what is given waits for the next one."""
        listener = EventListener(names)
        self._client.register_listener(listener)
        try:
            yield listener.get
        finally:
            self._client.remove_listener(listener)

    @property
    def connected(self) -> bool:
        """Whether the connection stands."""
        return self._client.runstate is Runstate.RUNNING

    async def close(self) -> None:
        """Hang up; QEMU runs on. Whoever comes while another hangs up waits for that."""
        async with self._hanging_up:
            if not self._hung_up:
                self._hung_up = True
                await _hang_up(self._client, self._stream)


def stamp_ns(event: Event) -> int:
    """When QEMU sent an event (monotonic, ns), however late it was heard: from its own stamp, of the wall clock and in
    microseconds."""
    stamp = event["timestamp"]
    wall_ns = (int(stamp["seconds"]) * 1_000_000 + int(stamp["microseconds"])) * 1000
    return wall_ns - (time.time_ns() - time.monotonic_ns())


def _peer(stream: socket.socket) -> int:
    """The process that made the socket at the other end; 0 where there is none."""
    with contextlib.suppress(OSError):
        return int.from_bytes(stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")
    return 0


async def _hang_up(client: QMPClient, stream: socket.socket) -> None:
    # The library tells once more here what ended the session: bytes that are no UTF-8 are a ValueError.
    with contextlib.suppress(QMPError, OSError, EOFError, ValueError):
        await client.disconnect()
    stream.close()
