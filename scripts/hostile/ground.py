"""Where a hostile case takes place, what it is, and the questions that most of them ask.

    a.example <-- well-behaved migrations --> b.example <-- the attack -- c.example, certified too, or a stranger

A case attacks, and then says what the daemons must have done. Whether anybody else noticed is for whoever runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from migrated.link.security import LinkSecurity
from migrated.link.tls import TlsError
from migrated.settings.config import AuthorisationConfig, TlsConfig
from protocol import messages
from scripts.authority import Authority
from scripts.rig.host import Host
from scripts.rig.hostile import ADDRESS, Hostile, connect, describe, open_session
from scripts.rig.pair import Pair
from scripts.rig.waiting import RigError, until

VICTIM: Final = "victim"
"""The guest that attacks are about."""
STALL_S: Final = 4.0
HANDSHAKE_S: Final = 6.0
INCOMING_S: Final = 12.0
ROUND_S: Final = 10.0
MAX_GUESTS: Final = 12
"""More than all that a case needs."""
SIDE_BY_SIDE: Final = 8
"""Migrations of a case at once."""
LIMITS: Final = {
    "stall_timeout_s": STALL_S,
    "handshake_timeout_s": HANDSHAKE_S,
    "incoming_timeout_s": INCOMING_S,
    "max_guests": MAX_GUESTS,
    "max_incoming": SIDE_BY_SIDE + 1,  # and the well-behaved one
    "round_timeout_s": ROUND_S,
}
"""The daemons of a case lose patience soon, so that a case is short."""
LIMIT_MS: Final = 300
MOST_MEMORY: Final = 1.3
PATIENT: Final = {"handshake_timeout_s": 30.0, "connect_timeout_s": 30.0, "heartbeat_timeout_s": 20.0, "max_guests": 4}
PATIENT_LIMIT_MS: Final = 1500
"""The same where the machine is busy with other things, and what must be seen is not how soon."""
_ANSWER_S: Final = 20.0
_HONEST_CONNECTIONS: Final = 8
"""What the migrations beside a case have open at most."""
_STATE_BYTES: Final = 16 << 20


class NotHeldError(Exception):
    """A daemon did not do what it must under this attack; the sentence says what it did."""


@dataclass(frozen=True, slots=True)
class Ground:
    """Two hosts that take guests from each other and from c.example, and what an attacker has.

    Attributes:
        pair: the hosts; attacks of sources go to b, lying destinations are asked by a.
        description: a guest of c.example's, as a real VMM describes it.
        authority: the authority of all three.
        security: c.example's certificate and rules.
        limit_ms: of the downtime of guests that are sent to a lying destination.
    """

    pair: Pair
    description: dict[str, Any]
    authority: Authority
    security: LinkSecurity
    limit_ms: int

    async def connect(self, address: str = ADDRESS) -> Hostile:
        """A fresh connection of c.example to host b."""
        return await connect(self.pair, self.security, address)

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[tuple[Hostile, Hostile]]:
        """Control channel and data channel of an accepted offer with an acknowledged empty round. After it nothing is
        left of the guest, or ``RigError`` says so."""
        control, data, _ = await open_session(self.pair, self.description, self.security)
        try:
            yield control, data
        finally:
            control.wire.close()
            data.wire.close()
        await self.gone()

    @contextlib.asynccontextmanager
    async def victim(self, host: Host, memory_mib: int = 16, **workload: Any) -> AsyncIterator[None]:
        """A guest of the attack's, running on a host; at the end it is destroyed wherever it is."""
        await host.create_guest(VICTIM, memory_mib, **{"workload": "idle", **workload})
        try:
            yield
        finally:
            for one in self.pair.hosts:
                if VICTIM in await one.guests():
                    await one.command("x-migrated-guest-destroy", {"guest": VICTIM})

    async def gone(self, name: str = VICTIM) -> None:
        """Wait until nothing of an incoming guest is left on host b."""

        async def gone() -> bool:
            return name not in await self.pair.b.guests()

        await until(f"guest {name} gone", gone)

    async def said(self, words: str, mark: int = 0) -> None:
        """Wait until host b's log has a line with these words.

        Args:
            mark: byte of the log from which on it is looked at.
        """

        async def found() -> bool:
            return any(words in str(entry) for entry in self.pair.b.log(mark))

        await until(f"{words!r} in host b's log", found)


Attack: TypeAlias = Callable[[Ground], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Case:
    """One attack.

    Attributes:
        name: a phrase.
        attack: carries it out and raises ``NotHeldError`` when a daemon did not hold.
        brief: whether it takes a few seconds at most, so that the tests run it.
        alone: whether it breaks a host, so that nothing can complete before it is over.
        most_memory: how much a daemon may take beside it, by what it takes undisturbed.
    """

    name: str
    attack: Attack
    brief: bool = True
    alone: bool = False
    most_memory: float = MOST_MEMORY


def addresses(count: int) -> Sequence[str]:
    """So many addresses of this machine for peers."""
    return [f"127.0.{66 + number // 250}.{1 + number % 250}" for number in range(count)]


async def end_of(control: Hostile) -> str:
    """What a daemon says at last: a reason, or that it hung up.

    Raises:
        TimeoutError: it says nothing of the kind.
    """
    async with asyncio.timeout(_ANSWER_S):
        try:
            while True:
                match await control.receive():
                    case messages.No(reason=reason) | messages.Refuse(reason=reason) | messages.Error(text=reason):
                        return reason
        except (OSError, TlsError) as error:
            return f"hung up: {error}"
        except Exception as error:  # the wire's own, by platform and by where it is cut
            if "closed" not in str(error):
                raise
            return f"hung up: {error}"


async def must_end(control: Hostile, words: str) -> None:
    """The daemon ends it with a sentence.

    Args:
        words: a regular expression that the sentence has.

    Raises:
        NotHeldError: it says something else.
    """
    if not re.search(words, said := await end_of(control)):
        raise NotHeldError(f"it says {said!r}, not {words!r}")


async def never_ran(ground: Ground) -> None:
    """The guest of the attack never ran on host b.

    Raises:
        NotHeldError: it did.
    """
    if [entry for entry in ground.pair.b.run_log(VICTIM) if entry["event"] == "run"]:
        raise NotHeldError("a guest that nobody committed ran")


@contextlib.asynccontextmanager
async def prepared(*, patient: bool = False, disks: bool = False) -> AsyncIterator[Ground]:
    """Two hosts with certificates, started, and a third certificate for attackers.

    Args:
        patient: whether they wait long, for a machine that is busy with other things; cases that are not brief need
            hosts that do not.
        disks: whether the daemons' state is on small file systems of its own, which faults need and only root can have.
    """
    with tempfile.TemporaryDirectory(prefix="pki-") as place:
        authority = Authority(Path(place))
        pair = Pair(limits=PATIENT if patient else LIMITS)
        for host in pair.hosts:
            host.configure(
                tls=authority.host(f"{host.name}.example", host.address).section(),
                authorisation={"accept_from": [f"{pair.other(host).name}.example", "c.example/*"]},
            )
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, pair.directory, ignore_errors=True)
            for host in pair.hosts if disks else ():
                undo.enter_context(_small_disk(host.directory / "state"))
            undo.callback(_end, pair)
            pair.start()
            own = authority.host("c.example", "127.0.0.1")
            security = LinkSecurity(TlsConfig(**own.section()), AuthorisationConfig())
            limit_ms = PATIENT_LIMIT_MS if patient else LIMIT_MS
            yield Ground(pair, await describe(pair), authority, security, limit_ms)


@contextlib.contextmanager
def _small_disk(path: Path) -> Iterator[None]:
    """A file system of its own for a daemon's state, so that it can be full or read-only."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_STATE_BYTES}", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def _end(pair: Pair) -> None:
    """End the daemons and guests, while their directories stay."""
    for host in pair.hosts:
        host.close()


async def connections_gone(ground: Ground, deadline_s: float) -> None:
    """Wait until host b holds no connection of an attack: only what two idle daemons hold is left.

    Raises:
        NotHeldError: it holds some for longer.
    """

    async def idle() -> bool:
        metrics = (await ground.pair.b.command("x-migrated-metrics"))["text"]
        found = re.search(r"^migrated_connections (\S+)$", metrics, re.M)
        return found is not None and float(found[1]) <= _HONEST_CONNECTIONS

    try:
        await until("few connections", idle, deadline_s)
    except RigError as error:
        raise NotHeldError(f"connections of the attack are still held after {deadline_s:g} s") from error
