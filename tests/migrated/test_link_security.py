"""Certificates and rules: who may talk to whom, files that are renewed, revoked, run out or cannot be used, and where
connections may be plain.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest
import structlog

from migrated.base.errors import LinkLostError, RefusedError
from migrated.link import sockets
from migrated.link.security import THIS_HOST, LinkSecurity, PlainRefusedError, is_loopback
from migrated.link.tls import Credentials, CredentialsError
from migrated.settings.config import AuthorisationConfig, TlsConfig
from protocol import messages
from scripts.authority import Authority
from tests.migrated.certificates import past, security_of
from tests.migrated.listeners import ASK, WAIT_S, listening, refusal


@pytest.mark.parametrize("who", ["client", "server"])
async def test_a_revoked_certificate_is_refused_and_a_list_that_ran_out_lets_nobody_in(
    pki: Authority, tmp_path: Path, who: str
) -> None:
    ends = {"client": pki.host("a.example", "127.0.0.1"), "server": pki.host("b.example", "127.0.0.1")}
    other = "server" if who == "client" else "client"
    names = {"client": "a.example", "server": "b.example"}

    def securities(revoked: Path) -> dict[str, LinkSecurity]:
        """The other end has the list."""
        sections = {end: files.section() for end, files in ends.items()}
        sections[other]["revoked"] = str(revoked)
        return {end: LinkSecurity(TlsConfig(**section), AuthorisationConfig()) for end, section in sections.items()}

    async def said(revoked: Path) -> str:
        security = securities(revoked)
        with structlog.testing.capture_logs() as logs:
            async with listening(security["server"]) as server:
                with pytest.raises(LinkLostError) as told:
                    await server.ask(security["client"])
                await refusal(server)
        return f"{told.value} {logs}"

    both = await said(pki.revoke(names[who]))
    assert "its certificate has been revoked" in both
    assert "it says that our certificate is revoked" in both
    assert "has run out" in await said(pki.revoke(next_update=past(1)))
    security = securities(pki.revoke(names[other]))
    async with listening(security["server"]) as server:
        assert isinstance(await server.ask(security["client"]), messages.Discarded)


def test_a_file_without_a_list_of_revoked_certificates_is_named(pki: Authority, tmp_path: Path) -> None:
    files = pki.host("a.example", "127.0.0.1")
    for path in (files.authority, tmp_path / "missing"):
        with pytest.raises(CredentialsError, match=r"\[tls\] revoked .* cannot be used"):
            Credentials(files.certificate, files.key, files.authority, path)


async def test_no_certificate_makes_a_host_this_one(pki: Authority) -> None:
    """A peer on this host is known by a name that no rule is asked about."""
    async with listening(security_of(pki.host("b.example", "127.0.0.1"), names=("c.example",))) as server:
        with pytest.raises(LinkLostError, match="is a host without a name in its certificate"):
            await server.ask(security_of(pki.host(*THIS_HOST)))
        assert await refusal(server) == "authorisation"


async def test_names_say_who_is_talked_to_at_all(pki: Authority) -> None:
    a, b = pki.host("a.example", "127.0.0.1"), pki.host("b.example", "127.0.0.1")
    async with listening(security_of(b, names=("c*.example",))) as server:
        with pytest.raises(LinkLostError, match=r"127.0.0.1 or a.example, and \[tls\] names lets only c\*.example in"):
            await server.ask(security_of(a))
        assert await refusal(server) == "authorisation"
    async with listening(security_of(b)) as server:
        with pytest.raises(RefusedError, match=r"127.0.0.1 or b.example, and \[tls\] names lets only c.example in"):
            await server.ask(security_of(a, names=("c.example",)))
        assert isinstance(await server.ask(security_of(a, names=("B.example",))), messages.Discarded)


def test_rules_name_hosts_and_guests(pki: Authority) -> None:
    rules = {"accept_from": ("a.example/web-*", "spare.example"), "send_to": ()}
    security = security_of(pki.host("b.example"), **rules)
    security.check_accept(("192.0.2.6", "a.example"), "web-1")
    security.check_accept(("spare.example",), "anything")
    with pytest.raises(
        RefusedError, match=r"a.example may not send guest 'db' here: no rule of .* accept_from allows it"
    ):
        security.check_accept(("a.example",), "db")
    with pytest.raises(RefusedError, match="may not send guest 'web-1' here"):
        security.check_accept((), "web-1")
    with pytest.raises(RefusedError, match=r"spare.example may not get guest 'x' from here: no rule of .* send_to"):
        security.check_send(("spare.example",), "x")


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_loopback_needs_no_certificates(address: str) -> None:
    assert is_loopback(address)
    plain = security_of(None)
    plain.check_listen(address)
    assert plain.connecting("somewhere", address, "peer") is None


@pytest.mark.parametrize("address", ["192.0.2.7", "0.0.0.0", "::", "fe80::1%lo", "::ffff:192.0.2.7"])
def test_plain_connections_to_other_hosts_must_be_written_out(address: str) -> None:
    plain = security_of(None)
    with pytest.raises(PlainRefusedError, match=r"write out \[tls\] insecure = true"):
        plain.check_listen(address)
    with pytest.raises(PlainRefusedError, match=r"write out \[tls\] insecure = true"):
        plain.connecting("somewhere", address, "192.0.2.7:4460")
    open_to_all = LinkSecurity(TlsConfig(insecure=True), AuthorisationConfig())
    for _ in range(2):
        with structlog.testing.capture_logs() as logs:
            open_to_all.check_listen(address)
            assert open_to_all.connecting("somewhere", address, "192.0.2.7:4460") is None
        assert [line["event"].partition(":")[0] for line in logs] == ["INSECURE", "INSECURE"]


async def test_a_renewed_certificate_counts_from_the_next_handshake_on(pki: Authority) -> None:
    a = security_of(pki.host("a.example", "127.0.0.1"))
    files = pki.host("renewed.example", "127.0.0.1")
    section = TlsConfig(**files.section())
    b = LinkSecurity(section, AuthorisationConfig())
    async with listening(b) as server:

        async def names() -> tuple[str, ...]:
            connection = await server.connect(a)
            connection.wire.close()
            return connection.wire.names

        open_since = await server.connect(a)
        pki.host("renewed.example", "127.0.0.1", "127.0.0.9")
        assert await names() == ("127.0.0.1", "renewed.example")
        b.reload(section, AuthorisationConfig())
        assert await names() == ("127.0.0.1", "127.0.0.9", "renewed.example")
        await sockets.send_first(open_since, ASK)  # what was open goes on
        first, accepted = await asyncio.wait_for(server.taken.get(), WAIT_S)
        assert first == ASK
        accepted.wire.close()
        open_since.wire.close()

        files.certificate.write_text("nothing", encoding="ascii")
        with pytest.raises(CredentialsError, match=r"cannot be used: .*; both must be PEM files"):
            b.reload(section, AuthorisationConfig())
        assert await names() == ("127.0.0.1", "127.0.0.9", "renewed.example")
        with pytest.raises(CredentialsError, match="needs a restart"):
            b.reload(TlsConfig(), AuthorisationConfig())


def test_the_end_of_a_certificate_is_known_and_warned_of(tmp_path: Path) -> None:
    pki = Authority(tmp_path)
    for days, said in ((100, None), (3, "in 3.0 days"), (-2, "has expired at")):
        end = past(-days)
        files = pki.host("h.example", not_before=past(50), not_after=end)
        credentials = Credentials(files.certificate, files.key, files.authority)
        assert abs(credentials.expires_at_s - end.timestamp()) <= 1
        warning = credentials.expiry_warning()
        assert (warning is None) if said is None else (warning is not None and said in warning)
    files = pki.host("h.example", not_after=datetime(2061, 2, 3, 4, 5, 6, tzinfo=UTC))
    assert (
        Credentials(files.certificate, files.key, files.authority).expires_at_s
        == datetime(2061, 2, 3, 4, 5, 6, tzinfo=UTC).timestamp()
    )


def test_files_that_cannot_be_used_are_named(pki: Authority, strangers: Authority, tmp_path: Path) -> None:
    files, other = pki.host("a.example"), strangers.host("a.example")
    for certificate, key, authority, said in (
        (tmp_path / "none.pem", files.key, files.authority, "none.pem and key .* cannot be used: No such file"),
        (files.certificate, other.key, files.authority, "cannot be used: key values mismatch"),
        (files.certificate, files.key, tmp_path / "none.pem", r"\[tls\] authority .*none.pem cannot be used"),
        (files.certificate, files.key, files.key, r"\[tls\] authority .* cannot be used"),
    ):
        with pytest.raises(CredentialsError, match=said):
            Credentials(certificate, key, authority)
