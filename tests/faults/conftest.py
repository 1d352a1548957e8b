"""Pairs of daemons with fault proxies, and the check after every test that nothing was left behind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from scripts.rig.faulty import FaultyPair


@pytest.fixture(scope="module")
def faulty_hosts() -> Iterator[FaultyPair]:
    """Two hosts behind proxies that the tests of a module share. A killed daemon is started again by its test."""
    with FaultyPair() as pair:
        yield pair


@pytest.fixture
async def faulty(faulty_hosts: FaultyPair) -> AsyncIterator[FaultyPair]:
    """The shared hosts, without guests and faults; whatever the test leaves behind in the daemons fails it."""
    yield faulty_hosts
    print(faulty_hosts.log_tail())  # noqa: T201 - shown when the test failed
    await faulty_hosts.recover()
    await faulty_hosts.remove_guests()
    assert await faulty_hosts.leftovers() == []
