"""A daemon for years: what it holds does not grow with what it has done. ``python -m scripts.growth`` has the long run.

warm-up   migrations there and back, refused offers      the same again: nothing more is held
"""

from __future__ import annotations

from scripts.basics import MIB
from scripts.growth import growth
from scripts.rig.pair import Pair

MIGRATIONS = 20
MOST_BYTES = 6 * MIB
"""It was 0.4 MiB for each migration, so 8 MiB."""
_NEW_THREADS = 8
"""Executors may still grow to their size."""


async def test_migrations_and_refused_offers_leave_nothing_in_a_daemon() -> None:
    with Pair() as pair:
        found = await growth(pair, MIGRATIONS, warm_up=12, offers=8, memory_mib=32)
    for host, more in found.items():
        assert more["memory_bytes"] < MOST_BYTES, (host, more)
        assert more["descriptors"] <= 2, (host, more)
        assert more["threads"] <= _NEW_THREADS, (host, more)
        assert more["journal_bytes"] < 1000 * (MIGRATIONS + 8), (host, more)
