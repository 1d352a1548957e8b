"""Pairs of real daemons for the tests, and the check after every test that nothing was left behind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from scripts.rig.pair import Pair


@pytest.fixture(scope="module")
def hosts() -> Iterator[Pair]:
    """Two hosts that the tests of a module share."""
    with Pair() as pair:
        yield pair


@pytest.fixture
async def pair(hosts: Pair) -> AsyncIterator[Pair]:
    """The shared hosts, without guests; whatever the test leaves behind in the daemons fails it."""
    yield hosts
    print(hosts.log_tail())  # noqa: T201 - shown when the test failed
    await hosts.remove_guests()
    assert await hosts.leftovers() == []


@pytest.fixture
async def fresh() -> AsyncIterator[Pair]:
    """Two hosts of the test's own, with short time-outs: their daemons may be killed and restarted."""
    with Pair(quick=True) as pair:
        yield pair
        print(pair.log_tail())  # noqa: T201 - shown when the test failed
        await pair.remove_guests()
        assert await pair.leftovers() == []
