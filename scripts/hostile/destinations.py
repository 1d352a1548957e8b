"""Attacks of a certified host that guests are sent to: a destination that is none, and lies about everything it did.

    host a -- HELLO, rounds, DOWNTIME, states, STATE_END, COMMIT --> [a destination with one lie in it]

The guest of the attack goes from host a to it. Whatever it answers, host a keeps the guest running until that host has
said, in its turn, that it has it; and no figure of its counts for what host a decides or keeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Self, TypeAlias

from migrated.base.errors import LinkLostError
from migrated.base.tasks import TaskSet
from migrated.link import sockets
from migrated.link.tls import READ_BYTES
from protocol import messages
from protocol.messages import FrameType, Message
from scripts.basics import MIB
from scripts.hostile.ground import VICTIM, Case, Ground, NotHeldError
from scripts.rig.hostile import Hostile
from scripts.rig.waiting import until

_I64: Final = (1 << 63) - 1
_PARAMETERS: Final = {"timeout_s": 10, "digest": False}
"""Without a digest a liar need not know what it was sent."""
_FLOOD: Final = 20_000

Hook: TypeAlias = Callable[["Liar", Hostile, Any], Awaitable[None]]


class Liar:
    """A destination that answers as an honest one would and keeps nothing, but for what a case has it do otherwise.

    Args:
        ground: its certificate is c.example's.
        hooks: what it does at a message, in place of the honest answer.
    """

    def __init__(self, ground: Ground, hooks: Mapping[FrameType, Hook]) -> None:
        self.ground = ground
        self.hooks: dict[FrameType, Hook] = {**_HONEST, **hooks}
        self._tasks = TaskSet()
        self.epoch = 0
        """Of the last offer."""
        self.uri = ""
        """Where guests are sent to reach it, while it serves."""

    async def __aenter__(self) -> Self:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.setblocking(False)
        self.uri = f"tcp:127.0.0.1:{self._socket.getsockname()[1]}"
        self._tasks.start(self._accept())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._tasks.stop()
        self._socket.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(self._socket)
            sock.setblocking(False)
            self._tasks.start(self._serve(sockets.Wire(sock, self.ground.security.accepting("host a"))))

    async def _serve(self, wire: sockets.Wire) -> None:
        try:
            with contextlib.suppress(OSError, LinkLostError):
                await wire.secure()
                peer = Hostile(sockets.Connection(wire, await sockets.exchange_prefaces(wire)))
                while True:
                    message = await peer.receive()
                    if isinstance(message, messages.Join):
                        await peer.send(FrameType.JOINED, {"channel": message.channel})
                        while await asyncio.get_running_loop().sock_recv(wire.sock, READ_BYTES):
                            pass  # memory and states, for nobody
                        return
                    if isinstance(message, messages.Hello):
                        self.epoch = message.epoch
                    if (hook := self.hooks.get(message.TYPE)) is not None:
                        await hook(self, peer, message)
        finally:
            wire.close()


def tell(kind: FrameType, meta: Mapping[str, Any], payload: bytes = b"", times: int = 1) -> Hook:
    """Answer with a message, so many times; with the epoch of the offer where it has one."""
    has_epoch = "epoch" in messages.CATALOGUE[kind].model_fields

    async def hook(liar: Liar, peer: Hostile, asked: Message) -> None:  # whatever it was asked
        epoch = {"epoch": liar.epoch} if has_epoch else {}
        for _ in range(times):
            await peer.send(kind, {**epoch, **meta}, payload=payload)

    return hook


def in_turn(*hooks: Hook) -> Hook:
    """Do several things, one after the other."""

    async def hook(liar: Liar, peer: Hostile, asked: Any) -> None:
        for one in hooks:
            await one(liar, peer, asked)

    return hook


async def nothing(_: Liar, __: Hostile, ___: Message) -> None:
    """Say nothing."""


async def _too_long(liar: Liar, _: Hostile, __: Message) -> None:
    """Twice as long as the guest may stand still."""
    await asyncio.sleep(2 * liar.ground.limit_ms / 1e3)  # the lateness is the lie


def _welcome(**lies: Any) -> Hook:
    """Take an offer, with everything that it requires."""

    async def hook(_: Liar, peer: Hostile, hello: messages.Hello) -> None:
        honest = {
            "token": secrets.token_bytes(16), "capabilities": hello.required, "load_costs": (), "resume_ns": 10**6,
            "ready_timeout_ns": 10**10, "host": "liar",
        }  # fmt: skip
        await peer.send(FrameType.WELCOME, {**honest, **lies})

    return hook


async def _round_done(_: Liar, peer: Hostile, end: messages.RoundEnd) -> None:
    await peer.send(FrameType.ROUND_DONE, {"round": end.round, "bytes": 0, "digest": 0})


async def _ready(_: Liar, peer: Hostile, end: messages.StateEnd) -> None:
    """A load that took no time at all."""
    ready = {"epoch": end.epoch, "digest": end.digest, "elapsed_ns": 0, "completing_ns": 0}
    await peer.send(FrameType.READY, ready)


_NO_REPORT: Final = tell(FrameType.REPORT, {}, b"{}")
"""The source waits for a report and takes none for an answer."""
_RUNNING: Final = {"resumed_after_ns": 0, "sent_after_ns": 0}
_HONEST: Final[dict[FrameType, Hook]] = {
    FrameType.HELLO: _welcome(),
    FrameType.ROUND_END: _round_done,
    FrameType.STATE_END: _ready,
    FrameType.COMMIT: in_turn(tell(FrameType.RUNNING, _RUNNING), _NO_REPORT),
    FrameType.OUTCOME_ASK: tell(FrameType.OUTCOME_OPEN, {"reason": "who knows"}),
}


def _must(
    outcomes: set[str], hooks: Mapping[FrameType, Hook], *, kept: bool = True
) -> Callable[[Ground], Awaitable[None]]:
    """A migration to a liar.

    Args:
        outcomes: what the attempt may come to.
        hooks: the lie.
        kept: whether the guest runs on host a afterwards; else it is gone, since the liar said in its turn that it
            has it.
    """

    async def attack(ground: Ground) -> None:
        here = ground.pair.a
        async with ground.victim(here), Liar(ground, hooks) as liar:
            record = await here.migrate(VICTIM, liar.uri, downtime_limit=ground.limit_ms, **_PARAMETERS)
            guest = (await here.guests()).get(VICTIM)
        if record["outcome"] not in outcomes:
            raise NotHeldError(f"the attempt is {record['outcome']}: {record['reason']}")
        if kept and (guest is None or guest["state"] != "running"):
            raise NotHeldError(f"the guest does not run on its host: {guest}")
        if not kept and guest is not None:
            raise NotHeldError(f"a guest that is said to run elsewhere is {guest['state']} here")
        _check_downtime(record)

    return attack


def _check_downtime(record: Mapping[str, Any]) -> None:
    """Whatever the liar said, the record's downtime is what passed on host a, and its parts sum to it."""
    downtime = record["downtime"]
    if downtime is None:
        return
    if not 0 <= downtime["lower_ns"] <= downtime["measured_ns"] <= downtime["upper_ns"] <= record["total_ns"]:
        raise NotHeldError(f"the downtime is said to be {downtime['measured_ns'] / 1e6:.1f} ms")
    if sum(part["ns"] for part in downtime["parts"]) + downtime["unattributed_ns"] != downtime["measured_ns"]:
        raise NotHeldError("the parts of the downtime do not sum to it")


_GIVEN_UP: Final = {"aborted", "failed", "refused"}
_READY: Final = {"digest": 0, "elapsed_ns": 0, "completing_ns": 0}
_ABSURD: Final = {
    "host": "liar", "counted_ns": _I64, "parts": [{"name": "resume", "ns": _I64}], "load_ns": {"disk0/iterable": -1},
    "digest": "0" * 16, "events": [], "time": None,
}  # fmt: skip


async def _doubt(ground: Ground) -> None:
    """COMMIT is not answered, and every question for the outcome with nothing; then with the truth."""
    here = ground.pair.a
    async with ground.victim(here), Liar(ground, {FrameType.COMMIT: nothing}) as liar:
        record = await here.migrate(VICTIM, liar.uri, downtime_limit=ground.limit_ms, **_PARAMETERS)
        if record["outcome"] != "in-doubt":
            raise NotHeldError(f"an attempt whose end nobody knows is {record['outcome']}")
        if (state := (await here.guest(VICTIM))["state"]) == "running":
            raise NotHeldError(f"a guest in doubt is {state}")
        liar.hooks[FrameType.OUTCOME_ASK] = tell(FrameType.DISCARDED, {"reason": "it was never taken in"})

        async def runs() -> bool:
            return bool((await here.guest(VICTIM))["state"] == "running")

        await until("the guest runs again", runs)


_DISCARDED: Final = tell(FrameType.DISCARDED, {"reason": "no"})
_BEYOND: Final = tell(FrameType.READY, {"digest": 1, "elapsed_ns": _I64, "completing_ns": _I64})
_AGES: Final = in_turn(tell(FrameType.RUNNING, {"resumed_after_ns": _I64, "sent_after_ns": 0}), _NO_REPORT)
_OTHER_ROUND: Final = tell(FrameType.ROUND_DONE, {"round": 1 << 31, "bytes": 0, "digest": 0})
_SLOW_LOAD: Final = {"name": "disk0", "kind": "non-iterable", "ns": _I64, "spread_ns": _I64}
_STRANGE: Final = ["shared-memory", "no-such-thing", "zero-runs", "switchover-abort"]
_EARLY: Final = in_turn(tell(FrameType.READY, _READY), _round_done)
_RUNS: Final = tell(FrameType.RUNNING, _RUNNING)
_BOMB: Final = in_turn(_RUNS, tell(FrameType.REPORT, {}, b"[" * (4 * MIB)))
_NONSENSE: Final = in_turn(_RUNS, tell(FrameType.REPORT, {}, json.dumps(_ABSURD).encode()))
_TIME_FLOOD: Final = tell(FrameType.TIME_ASK, {"nonce": 1}, times=_FLOOD)
_CLOCK_FLOOD: Final = tell(FrameType.CLOCK_ASK, {"nonce": 1}, times=_FLOOD)


def _case(name: str, at: FrameType, lie: Hook, outcomes: set[str], *, kept: bool = True, brief: bool = True) -> Case:
    """A migration to a destination that lies at one message; see ``_must``."""
    return Case(name, _must(outcomes, {at: lie}, kept=kept), brief)


CASES: Final = (
    _case("READY before the guest has stopped", FrameType.ROUND_END, _EARLY, _GIVEN_UP),
    _case("READY after the limit", FrameType.STATE_END, in_turn(_too_long, _ready), {"aborted"}),
    _case("READY with figures of 292 years", FrameType.STATE_END, _BEYOND, {"completed"}, kept=False),
    _case("READY again and again", FrameType.STATE_END, in_turn(_ready, _ready, _ready), {"completed"}, kept=False),
    _case("no vote", FrameType.STATE_END, nothing, {"aborted"}),
    _case("RUNNING in place of a vote", FrameType.STATE_END, _RUNS, _GIVEN_UP),
    _case("RUNNING before the guest has stopped", FrameType.ROUND_END, _RUNS, _GIVEN_UP),
    _case("DISCARDED in place of a vote", FrameType.STATE_END, _DISCARDED, _GIVEN_UP),
    _case("RUNNING after 292 years", FrameType.COMMIT, _AGES, {"completed"}, kept=False),
    _case("rounds that were never sent are there", FrameType.ROUND_END, _OTHER_ROUND, _GIVEN_UP),
    _case("no round is ever there", FrameType.ROUND_END, nothing, _GIVEN_UP, brief=False),
    _case(
        "loads that take 292 years", FrameType.HELLO, _welcome(load_costs=[_SLOW_LOAD], resume_ns=_I64), _GIVEN_UP,
        brief=False,
    ),
    _case("abilities that were not offered", FrameType.HELLO, _welcome(capabilities=_STRANGE), _GIVEN_UP),
    _case("TIME_ASK without end", FrameType.DOWNTIME, _TIME_FLOOD, _GIVEN_UP),
    _case("CLOCK_ASK without end, to a source", FrameType.ROUND_END, _CLOCK_FLOOD, _GIVEN_UP),
    _case("a bomb as a report", FrameType.COMMIT, _BOMB, {"completed"}, kept=False),
    _case("a report of nonsense", FrameType.COMMIT, _NONSENSE, {"completed"}, kept=False),
    Case("no answer to COMMIT", _doubt, brief=False),
)  # fmt: skip
