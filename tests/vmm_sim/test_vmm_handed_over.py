"""Memory that one VMM hands to another: private to the new one until it is published, shared from then on.

old   writes, is seen | ... is seen | ... both have the same
new   its writes are its own        | published
"""

from __future__ import annotations

import os

import pytest

from vmm_sim.content import PAGE_SIZE
from vmm_sim.errors import VmmError
from vmm_sim.memory import GuestMemory

SIZE = 4 << 20


def test_what_the_new_vmm_writes_is_its_own_until_it_is_published() -> None:
    old = GuestMemory(SIZE)
    old.write_bytes(7 * PAGE_SIZE, b"old")
    new = GuestMemory(SIZE, handed_over=os.dup(old.fd))
    assert new.read_bytes(7 * PAGE_SIZE, 3) == b"old"
    new.write_bytes(7 * PAGE_SIZE, b"new")
    new.write_bytes(9 * PAGE_SIZE, b"hole")
    assert (old.read_bytes(7 * PAGE_SIZE, 3), old.read_bytes(9 * PAGE_SIZE, 4)) == (b"old", bytes(4))
    old.write_bytes(8 * PAGE_SIZE, b"late")
    assert new.read_bytes(8 * PAGE_SIZE, 4) == b"late"
    new.publish()
    assert (old.read_bytes(7 * PAGE_SIZE, 3), old.read_bytes(9 * PAGE_SIZE, 4)) == (b"new", b"hole")
    new.write_bytes(10 * PAGE_SIZE, b"shared")
    assert old.read_bytes(10 * PAGE_SIZE, 6) == b"shared"
    new.publish()  # does no harm
    assert old.read_bytes(10 * PAGE_SIZE, 6) == b"shared"


def test_memory_that_is_too_small_is_another_guests() -> None:
    old = GuestMemory(SIZE)
    with pytest.raises(VmmError, match="it is another's"):
        GuestMemory(2 * SIZE, handed_over=os.dup(old.fd))
