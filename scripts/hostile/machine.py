"""A peer that speaks almost the right protocol to a real daemon: sequences of frames that hypothesis chooses, most of
them right for where the session is, and some with one thing wrong.

    connect -> HELLO -> JOIN -> (PAGES | ZERO_PAGES | BARRIER + ROUND_END)* -> DOWNTIME -> STATE_END ...
               each at any time, on any connection, or with another number, name, token, length, or cut in the middle

After every sequence: the daemon answers, no guest of the peer's ever ran, nothing is left, no exception is in the log,
and an honest guest migrates.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import xxhash
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from migrated.base.errors import LinkLostError
from protocol import messages
from protocol.errors import RemoteProtocolError
from protocol.guest import PAGE_SIZE
from protocol.messages import FrameType
from scripts.basics import MIB
from scripts.hostile.beside import migrate_honest
from scripts.hostile.ground import VICTIM, Ground, never_ran
from scripts.hostile.sources import DOWNTIME, GOOD_TIME, STATE
from scripts.rig.hostile import Hostile, hello_of

_MOST_CONNECTIONS: Final = 6
_READ_S: Final = 0.02
_ANSWER_S: Final = 10.0
_MOST_BYTES: Final = 64 * MIB
"""What a daemon may have more of after a sequence than before the first."""
_LIMIT_MS: Final = 20_000
_NAMES: Final = (VICTIM, "other")
_ODD: Final = (0, 1, 2, 63, 64, 65, 4095, 4096, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, 1 << 63, -1)


@dataclass(slots=True)
class Session:
    """What a peer knows of an offer that it made."""

    control: Hostile
    migration_id: str
    token: bytes = bytes(16)
    round: int = 1
    pages: int = 0
    zero_pages: int = 0
    nonces: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Arena:
    """A real daemon, and the event loop in which peers talk to it."""

    runner: asyncio.Runner
    ground: Ground
    before_bytes: int


@st.composite
def damage(draw: st.DrawFn) -> tuple[str, Any] | None:
    """One thing wrong with a frame, most often nothing: an odd number in one of its fields, a field that is missing,
    or one that nobody knows."""
    kind = draw(st.sampled_from((None, None, None, "number", "missing", "unknown", "cut", "sequence")))
    return None if kind is None else (kind, draw(st.tuples(st.integers(0, 7), st.sampled_from(_ODD))))


class AlmostRight(RuleBasedStateMachine):
    """The sequences. ``arena`` is set by whoever runs it."""

    arena: ClassVar[Arena]

    def __init__(self) -> None:
        super().__init__()
        self.connections: list[Hostile] = []
        self.sessions: list[Session] = []
        self.data: list[tuple[Hostile, Session]] = []

    # Section: how frames are sent

    def _run(self, work: Any) -> Any:
        """Do something in the event loop; that the daemon hangs up is nothing special."""
        with contextlib.suppress(OSError, LinkLostError, TimeoutError):
            return self.arena.runner.run(work)
        return None

    def _send(
        self, peer: Hostile, kind: FrameType, meta: dict[str, Any], wrong: tuple[str, Any] | None, number: int = 0,
        payload: bytes = b"",
    ) -> None:  # fmt: skip
        meta = dict(meta)
        if wrong is None:
            self._run(peer.send(kind, meta, number, payload))
            return
        what, (index, odd) = wrong
        key = list(meta)[index % len(meta)] if meta else "extra"
        match what:
            case "number":
                meta[key] = odd
            case "missing":
                meta.pop(key, None)
            case "unknown":
                meta["extra"] = odd
            case "sequence":
                peer.sequence += 1
        try:
            frame = peer.frame(kind, meta, number, payload)
        except OverflowError:  # no msgpack has this number
            return
        self._run(peer.wire.send(frame[: len(frame) // 2] if what == "cut" else frame))

    def _any(self, draw: int) -> Hostile:
        return self.connections[draw % len(self.connections)]

    def _session(self, draw: int) -> Session:
        return self.sessions[draw % len(self.sessions)]

    # Section: rules

    @precondition(lambda self: len(self.connections) < _MOST_CONNECTIONS)
    @rule()
    def connect(self) -> None:
        """One more connection."""
        if (peer := self._run(self.arena.ground.connect())) is not None:
            self.connections.append(peer)

    @precondition(lambda self: self.connections)
    @rule(
        draw=st.integers(0, 63),
        name=st.sampled_from(_NAMES),
        epoch=st.sampled_from((1, 1, 1, 2, 1 << 30)),
        wrong=damage(),
    )
    def offer(self, draw: int, name: str, epoch: int, wrong: tuple[str, Any] | None) -> None:
        """HELLO, and its answer when there is one."""
        peer, migration_id = self._any(draw), secrets.token_hex(16)
        hello = hello_of({**self.arena.ground.description, "name": name}, migration_id)
        self._send(peer, FrameType.HELLO, {**hello, "epoch": epoch}, wrong)
        self.sessions.append(session := Session(peer, migration_id))
        if wrong is None:
            self._read(session, _ANSWER_S)

    @precondition(lambda self: self.connections and self.sessions)
    @rule(draw=st.integers(0, 63), which=st.integers(0, 63), known=st.booleans(), wrong=damage())
    def join(self, draw: int, which: int, known: bool, wrong: tuple[str, Any] | None) -> None:
        """JOIN, with the token or with another."""
        peer, session = self._any(draw), self._session(which)
        token = session.token if known else secrets.token_bytes(16)
        self._send(peer, FrameType.JOIN, {"migration_id": session.migration_id, "token": token, "channel": 0}, wrong)
        self.data.append((peer, session))

    @precondition(lambda self: self.data)
    @rule(
        draw=st.integers(0, 63), first=st.integers(0, 4200), count=st.integers(1, 3), zero=st.booleans(), wrong=damage()
    )
    def send_pages(self, draw: int, first: int, count: int, zero: bool, wrong: tuple[str, Any] | None) -> None:
        """Pages, most of them of the guest."""
        peer, session = self.data[draw % len(self.data)]
        runs = first.to_bytes(4, "big") + count.to_bytes(4, "big")
        number = session.round + 1
        if zero:
            self._send(peer, FrameType.ZERO_PAGES, {"runs": runs}, wrong, number)
            session.zero_pages += count
        else:
            payload = bytes([draw + 1]) * (count * PAGE_SIZE)
            meta = {"encoding": "plain", "runs": runs, "digest": xxhash.xxh3_64_intdigest(payload)}
            self._send(peer, FrameType.PAGES, meta, wrong, number, payload)
            session.pages += count

    @precondition(lambda self: self.data)
    @rule(draw=st.integers(0, 63), ahead=st.sampled_from((0, 0, 0, 1, 64)), wrong=damage())
    def end_round(self, draw: int, ahead: int, wrong: tuple[str, Any] | None) -> None:
        """A round, on both channels."""
        peer, session = self.data[draw % len(self.data)]
        session.round += 1 + ahead
        self._send(peer, FrameType.BARRIER, {"round": session.round}, None, session.round)
        pages = {"round": session.round, "pages": session.pages, "zero_pages": session.zero_pages}
        self._send(session.control, FrameType.ROUND_END, pages, wrong)
        session.pages = session.zero_pages = 0

    @precondition(lambda self: self.data)
    @rule(
        draw=st.integers(0, 63),
        order=st.integers(0, 3),
        final=st.booleans(),
        size=st.sampled_from((0, 1, 4096)),
        wrong=damage(),
    )
    def send_state(self, draw: int, order: int, final: bool, size: int, wrong: tuple[str, Any] | None) -> None:
        """The state of a device."""
        peer, _ = self.data[draw % len(self.data)]
        devices = self.arena.ground.description["devices"]
        device, payload = devices[draw % len(devices)], bytes(size)
        meta = {
            **STATE, "name": device["name"], "kind": device["kind"], "order": order, "final": final,
            "total_bytes": size, "digest": xxhash.xxh3_64_intdigest(payload),
        }  # fmt: skip
        self._send(peer, FrameType.DEVICE_STATE, meta, wrong, 0, payload)

    @precondition(lambda self: self.sessions)
    @rule(draw=st.integers(0, 63), took_ns=st.sampled_from((0, 10**6, 10**12)), wrong=damage())
    def stop(self, draw: int, took_ns: int, wrong: tuple[str, Any] | None) -> None:
        """DOWNTIME, and the ask for the time when there is one."""
        session = self._session(draw)
        now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        meta = {**DOWNTIME, "source_downtime_ns": took_ns, "sent_at_ns": now_ns}
        self._send(session.control, FrameType.DOWNTIME, meta, wrong)
        self._read(session, _READ_S)

    @precondition(lambda self: self.sessions)
    @rule(draw=st.integers(0, 63), wrong=damage())
    def tell_time(self, draw: int, wrong: tuple[str, Any] | None) -> None:
        """TIME_DATA, to an ask when there was one."""
        session = self._session(draw)
        now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        guest = {**GOOD_TIME, "guest_freq": self.arena.ground.description["guest_freq"], "hrtime": now_ns}
        nonce = session.nonces.pop() if session.nonces else 7
        told = {"nonce": nonce, "time": guest, "t2_ns": now_ns, "t3_ns": now_ns}
        self._send(session.control, FrameType.TIME_DATA, told, wrong)

    @precondition(lambda self: self.sessions)
    @rule(draw=st.integers(0, 63), devices=st.integers(0, 4), wrong=damage())
    def end_state(self, draw: int, devices: int, wrong: tuple[str, Any] | None) -> None:
        """STATE_END."""
        session = self._session(draw)
        meta = {
            "epoch": 1, "last_round": session.round, "devices": devices, "digest": 0, "source_downtime_ns": 0,
            "sent_at_ns": time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW),
        }  # fmt: skip
        self._send(session.control, FrameType.STATE_END, meta, wrong)

    @precondition(lambda self: self.sessions)
    @rule(draw=st.integers(0, 63), commit=st.booleans(), wrong=damage())
    def decide(self, draw: int, commit: bool, wrong: tuple[str, Any] | None) -> None:
        """COMMIT or ABORT."""
        if commit:
            self._send(self._session(draw).control, FrameType.COMMIT, {"epoch": 1}, wrong)
        else:
            self._send(self._session(draw).control, FrameType.ABORT, {"epoch": 1, "reason": "enough"}, wrong)

    @precondition(lambda self: self.connections)
    @rule(draw=st.integers(0, 63), which=st.integers(0, 63), commit=st.booleans(), wrong=damage())
    def ask_outcome(self, draw: int, which: int, commit: bool, wrong: tuple[str, Any] | None) -> None:
        """OUTCOME_ASK, of an attempt of ours when there was one."""
        migration_id = self._session(which).migration_id if self.sessions else secrets.token_hex(16)
        decision = "commit" if commit else "abort"
        meta = {"migration_id": migration_id, "epoch": 1, "decision": decision}
        self._send(self._any(draw), FrameType.OUTCOME_ASK, meta, wrong)

    @precondition(lambda self: self.connections)
    @rule(
        draw=st.integers(0, 63),
        kind=st.sampled_from(FrameType),
        payload=st.sampled_from((b"", b"[" * 1000, bytes(4096))),
    )
    def anything(self, draw: int, kind: FrameType, payload: bytes) -> None:
        """A frame of any type with nothing in it."""
        self._send(self._any(draw), kind, {}, None, 0, payload)

    @precondition(lambda self: self.connections)
    @rule(draw=st.integers(0, 63))
    def hang_up(self, draw: int) -> None:
        """Close a connection."""
        self.connections[draw % len(self.connections)].wire.close()
        del self.connections[draw % len(self.connections)]

    def _read(self, session: Session, for_s: float) -> None:
        """Hear one answer, if one comes."""

        async def hear() -> None:
            async with asyncio.timeout(for_s):
                match await session.control.receive():
                    case messages.Welcome(token=token):
                        session.token = token
                    case messages.TimeAsk(nonce=nonce):
                        session.nonces.append(nonce)

        with contextlib.suppress(RemoteProtocolError):
            self._run(hear())

    # Section: what must hold after a sequence

    def teardown(self) -> None:
        """Everything above the rules of this module."""
        for peer in self.connections:
            peer.wire.close()
        for session in self.sessions:
            session.control.wire.close()
        self.arena.runner.run(self._check())

    async def _check(self) -> None:
        ground = self.arena.ground
        for name in _NAMES:
            await ground.gone(name)
        await never_ran(ground)
        record = await migrate_honest(ground, _LIMIT_MS)
        assert record["outcome"] == "completed", record["reason"]
        assert await ground.pair.leftovers() == []
        assert ground.pair.b.anonymous_bytes() - self.arena.before_bytes < _MOST_BYTES
