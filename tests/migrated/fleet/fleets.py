"""Small fleets for tests, as a mirror holds them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from migrated.fleet.keys import Keys
from migrated.fleet.mirror import Mirror
from migrated.fleet.model import (
    CurvePoint,
    Document,
    Forecast,
    GuestDocument,
    HostDocument,
    JobKind,
    JobSpec,
    Ownership,
)
from migrated.fleet.store import Entry
from protocol.guest import PAGE_SIZE

KEYS = Keys("/migrated/test/")
GIB = 1 << 30
MIB = 1 << 20
S = 1_000_000_000
MS = 1_000_000


def host(name: str, **fields: Any) -> HostDocument:
    """A host with 64 GiB, two slots each way and a link of 1 GiB/s."""
    usual = {
        "address": f"tcp:{name}:7000",
        "version": "0.1.0",
        "vmms": ("sim",),
        "memory_bytes": 64 * GIB,
        "link_bytes_per_s": GIB,
    }
    return HostDocument(name=name, **{**usual, **fields})


def guest(name: str, *, dirty_bytes_per_s: int = 0, working_set_bytes: int = 0, **fields: Any) -> GuestDocument:
    """A guest of 4 GiB, all of it data, that dirties its working set at a rate."""
    memory_bytes = fields.get("memory_bytes", 4 * GIB)
    dirty: tuple[CurvePoint, ...] = ()
    if dirty_bytes_per_s:
        full_ns = working_set_bytes * S // dirty_bytes_per_s
        pages = working_set_bytes // PAGE_SIZE
        dirty = (CurvePoint(ns=full_ns, pages=pages), CurvePoint(ns=2 * full_ns, pages=pages))
    forecast = Forecast(data_bytes=memory_bytes, dirty=dirty, fixed_ns=30 * MS, margin_ns=20 * MS, setup_ns=S // 2)
    usual = {"vmm": "sim", "memory_bytes": memory_bytes, "downtime_limit_ns": 300 * MS, "forecast": forecast}
    return GuestDocument(name=name, **{**usual, **fields})


def mirror_of(hosts: Iterable[HostDocument], guests: Iterable[GuestDocument], owner: str = "a") -> Mirror:
    """A mirror of a store that holds these, with all guests on one host."""
    mirror = Mirror(KEYS)
    documents: list[tuple[str, Document]] = [(KEYS.host(one.name), one) for one in hosts]
    for one in guests:
        documents += [
            (KEYS.guest(one.name), one),
            (KEYS.owner(one.name), Ownership(owner=owner, epoch=1)),
        ]
    for number, (key, document) in enumerate(documents, 1):
        mirror.put(Entry(key, document.to_bytes(), number))
    return mirror


def spec(**fields: Any) -> JobSpec:
    """A job that empties host a."""
    usual = {"job": "j1", "kind": JobKind.EVACUATE, "host": "a", "created_utc_ns": 0, "by": "test"}
    return JobSpec(**{**usual, **fields})
