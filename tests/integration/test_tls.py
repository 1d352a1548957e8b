"""Two real daemons with certificates: guests move, certificates are renewed meanwhile, and a host that is certified but
not the one it should be gets nothing of what belongs to another."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrated.link.security import LinkSecurity
from migrated.settings.config import AuthorisationConfig, TlsConfig
from protocol import messages
from protocol.errors import ErrorCode
from protocol.messages import FrameType
from scripts.authority import Authority
from scripts.basics import ROOT
from scripts.rig.hostile import PLAIN, connect, describe, hello_of, open_session
from scripts.rig.pair import Pair
from scripts.rig.waiting import until


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority of all hosts here."""
    return Authority(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def hosts(pki: Authority) -> Iterator[Pair]:
    """Two hosts that are who their certificates say; b takes guests from a alone."""
    pair = Pair()
    pair.a.configure(tls=pki.host("a.example", "127.0.0.1").section())
    pair.b.configure(
        tls=pki.host("b.example", "127.0.0.1").section(),
        authorisation={"accept_from": ["a.example", "c.example/permitted-*"]},
    )
    with pair:
        yield pair


def security_of(pki: Authority, name: str) -> LinkSecurity:
    return LinkSecurity(TlsConfig(**pki.host(name, "127.0.0.1").section()), AuthorisationConfig())


async def reload(pair: Pair) -> None:
    """Let both daemons read their configuration and certificates again."""
    for host in pair.hosts:
        mark = len(host.log())
        host.signal(signal.SIGHUP)

        async def reloaded(host: Any = host, mark: int = mark) -> bool:
            return any(entry["event"] == "the configuration was reloaded" for entry in host.log()[mark:])

        await until(f"host {host.name} has reloaded", reloaded)


async def test_a_guest_moves_there_and_back_and_certificates_are_renewed_between(pair: Pair, pki: Authority) -> None:
    await pair.a.create_guest("g1", 64, workload="hot-cold", dirty_rate_bytes_per_s=20 << 20)
    record = await pair.a.migrate("g1", pair.b, downtime_limit=20_000, multifd_channels=3)
    assert record["outcome"] == "completed", record["reason"]
    assert (await pair.b.verify())["ok"]
    before = await expiry(pair)
    for name in ("a.example", "b.example"):
        pki.host(name, "127.0.0.1")
    await reload(pair)
    assert await expiry(pair) > before
    record = await pair.b.migrate("g1", pair.a, downtime_limit=20_000)
    assert record["outcome"] == "completed", record["reason"]
    assert (await pair.a.verify())["ok"]


async def expiry(pair: Pair) -> float:
    text = (await pair.b.command("x-migrated-metrics"))["text"]
    found = re.search(r"^migrated_certificate_expiry_timestamp_seconds (\S+)$", text, re.M)
    assert found
    assert float(found[1]) > time.time()
    return float(found[1])


async def test_a_host_that_is_not_named_may_not_send_a_guest(pair: Pair, pki: Authority) -> None:
    description = await describe(pair)
    other = await connect(pair, security_of(pki, "c.example"))
    await other.send(FrameType.HELLO, hello_of(description, "1" * 32))
    answer = await other.receive()
    assert isinstance(answer, messages.Refuse)
    assert answer.code == ErrorCode.AUTH
    assert "may not send guest 'victim' here: no rule of [authorisation] accept_from allows it" in answer.reason
    other.wire.close()
    permitted = await connect(pair, security_of(pki, "c.example"))
    await permitted.send(FrameType.HELLO, hello_of({**description, "name": "permitted-1"}, "2" * 32))
    assert not isinstance(await permitted.receive(), messages.Error)
    permitted.wire.close()


async def test_what_belongs_to_one_host_is_closed_to_another(pair: Pair, pki: Authority) -> None:
    """With the right migration id and token, which a host that was taken over may have seen."""
    a, c = security_of(pki, "a.example"), security_of(pki, "c.example")
    control, data, welcome = await open_session(pair, await describe(pair), a)
    join = {"migration_id": control.migration_id, "token": welcome.token, "channel": 0}
    outcome = {"migration_id": control.migration_id, "epoch": 1}
    for kind, meta, said in (
        (FrameType.JOIN, join, "does not prove to belong to this migration"),
        (FrameType.OUTCOME_ASK, {**outcome, "decision": "commit"}, "is asked for by another host"),
        (FrameType.OUTCOME_ASK, {**outcome, "decision": "abort"}, "is asked for by another host"),
    ):
        thief = await connect(pair, c)
        await thief.send(kind, meta)
        answer = await thief.receive()
        assert isinstance(answer, messages.Error), answer
        assert answer.code == ErrorCode.AUTH
        assert said in answer.text
        thief.wire.close()
    owner = await connect(pair, a)
    await owner.send(FrameType.OUTCOME_ASK, {**outcome, "decision": "abort"})
    assert isinstance(await owner.receive(), messages.Discarded)
    for one in (owner, control, data):
        one.wire.close()


async def test_a_plain_source_is_told_what_to_do(pair: Pair) -> None:
    source = await connect(pair, PLAIN)
    answer = await source.receive()
    source.wire.close()
    assert isinstance(answer, messages.Error)
    assert answer.text.startswith("this destination takes TLS only: set [tls] certificate")

    async def said() -> bool:
        return any(entry.get("kind") == "tls" for entry in pair.b.log())

    await until("host b says why it refused", said)


async def test_guests_do_not_leave_for_another_host_without_tls(fresh: Pair) -> None:
    """The address is one that no packet reaches: nothing is sent to it."""
    await fresh.a.create_guest("g1", 16, workload="idle")
    record = await fresh.a.migrate("g1", "tcp:192.0.2.7:4460")
    assert record["outcome"] == "refused"
    assert "192.0.2.7:4460 is another host and [tls] is not set here" in record["reason"]
    assert (await fresh.a.guest())["state"] == "running"


async def test_a_destination_that_is_open_to_others_does_not_start_without_tls(tmp_path: Path) -> None:
    path = tmp_path / "open.toml"
    path.write_text(
        f'[listen]\naddress = "0.0.0.0:0"\n[control]\nsocket = "{tmp_path}/c"\n[state]\ndirectory = "{tmp_path}/s"\n'
        f'[vmm]\ndirectory = "{tmp_path}/g"\n',
        encoding="utf-8",
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "migrated", "destination", "--config", str(path), cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(60):
        _, said = await process.communicate()
    assert process.returncode == 1
    assert "[listen] address 0.0.0.0 is open to other hosts and [tls] is not set" in said.decode()
