"""etcd as it should be run: TLS with certificates on both sides, and a user who may touch the fleet's keys alone."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrated.fleet.etcd import EtcdStore, Login
from migrated.fleet.store import NoAnswerError, StoreError, put, read_all
from scripts.authority import Authority
from scripts.fleet.etcd_cluster import EtcdCluster, why_no_etcd

LOGIN = Login("fleet", "of hosts")
TIMEOUT_S = 10.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def etcd(authority: Authority) -> Iterator[EtcdCluster]:
    if (reason := why_no_etcd()) is not None:
        pytest.skip(reason)
    with EtcdCluster(1, authority=authority, login=LOGIN, prefix="/migrated/") as cluster:
        yield cluster


def trust(authority: Authority, *, certificate: bool = True, common_name: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.path))
    if certificate:
        files = authority.host("a", common_name=common_name)
        context.load_cert_chain(str(files.certificate), str(files.key))
    return context


async def test_the_user_reads_writes_leases_and_watches(etcd: EtcdCluster, authority: Authority) -> None:
    store = EtcdStore(etcd.endpoints, TIMEOUT_S, tls=trust(authority), login=LOGIN)
    try:
        lease = await store.grant(30)
        revision = await put(store, "/migrated/k", b"v", lease)
        assert [entry.value for entry in (await read_all(store, "/migrated/"))[0]] == [b"v"]
        watch = store.watch("/migrated/", revision)
        async with asyncio.timeout(TIMEOUT_S):
            changes = await anext(watch)
        assert [change.key for change in changes] == ["/migrated/k"]
        await watch.aclose()
        await store.keep_alive(lease)
        await store.revoke(lease)
        assert await store.get("/migrated/k") is None
        with pytest.raises(StoreError, match="permission denied"):
            await put(store, "/elsewhere/k", b"v")
    finally:
        await store.close()


async def test_a_token_that_etcd_forgot_is_asked_for_anew(etcd: EtcdCluster, authority: Authority) -> None:
    """Tokens end after a while, and with the member that gave them."""
    store = EtcdStore(etcd.endpoints, TIMEOUT_S, tls=trust(authority), login=LOGIN)
    try:
        await put(store, "/migrated/k", b"1")
        member = etcd.members[0]
        member.kill()
        await asyncio.to_thread(etcd.start_member, member)
        async with asyncio.timeout(60):
            while True:
                try:
                    await put(store, "/migrated/k", b"2")
                    break
                except NoAnswerError:
                    await asyncio.sleep(0.1)
        entry = await store.get("/migrated/k")
        assert entry is not None
        assert entry.value == b"2"
    finally:
        await store.close()


@pytest.mark.parametrize(
    ("lacking", "told"),
    [
        ("certificate", "certificate"),
        ("authority", "certificate verify failed"),
        ("user", "user name is empty"),
        ("password", "invalid user ID or password"),
        ("a certificate without a common name", "CommonName of client"),
    ],
)
async def test_who_lacks_something_is_told_so(
    etcd: EtcdCluster, authority: Authority, tmp_path: Path, lacking: str, told: str
) -> None:
    tls = trust(authority, certificate=lacking != "certificate", common_name="common name" in lacking)
    if lacking == "authority":
        tls = trust(Authority(tmp_path / "other"))
    login = {"user": None, "password": Login(LOGIN.user, "wrong")}.get(lacking, LOGIN)
    store = EtcdStore(etcd.endpoints, TIMEOUT_S, tls=tls, login=login)
    try:
        with pytest.raises(StoreError, match=told):
            await store.get("/migrated/k")
    finally:
        await store.close()
