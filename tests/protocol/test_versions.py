"""The preface and what two sides agree on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.frames import MAX_PAYLOAD_BYTES
from protocol.versions import (
    CAPABILITIES,
    MAJOR,
    MIN_PAYLOAD_BYTES,
    MINOR,
    OLDEST_MAJOR,
    PREFACE_BYTES,
    REQUIRED_CAPABILITIES,
    Preface,
    agree_capabilities,
    agree_version,
    pack_preface,
    unpack_preface,
)

names = st.frozensets(st.sampled_from([*sorted(CAPABILITIES), "from-the-future"]))


@given(st.integers(MIN_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES))
def test_preface_round_trip(limit: int) -> None:
    raw = pack_preface(limit)
    assert len(raw) == PREFACE_BYTES == 16
    assert unpack_preface(raw) == Preface(MAJOR, MINOR, limit)


def test_a_future_preface_is_still_understood() -> None:
    raw = b"MGRP" + bytes([9, 4]) + b"\xab\xcd" + MIN_PAYLOAD_BYTES.to_bytes(4, "big") + b"\xff" * 4
    preface = unpack_preface(raw)
    assert preface == Preface(9, 4, MIN_PAYLOAD_BYTES)
    assert agree_version(preface) == MAJOR


@pytest.mark.parametrize("opening", [b"SSH-2.0-OpenSSH_9", b"GET / HTTP/1.1\r\n", bytes(16)])
def test_another_protocol_is_named(opening: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="does not speak the migrated protocol") as caught:
        unpack_preface(opening[:PREFACE_BYTES])
    assert caught.value.code is ErrorCode.VERSION


@pytest.mark.parametrize("limit", [0, MIN_PAYLOAD_BYTES - 1, MAX_PAYLOAD_BYTES + 1, 2**32 - 1])
def test_a_payload_limit_out_of_range_is_refused(limit: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"payload limit {limit} is outside"):
        unpack_preface(pack_preface(limit))


@given(st.integers(0, 255))
def test_the_highest_shared_version_or_an_error_that_names_both(major: int) -> None:
    theirs = Preface(major, 0, MIN_PAYLOAD_BYTES)
    if major < OLDEST_MAJOR:
        with pytest.raises(RemoteProtocolError, match=f"version {major}, this side speaks {OLDEST_MAJOR} to {MAJOR}"):
            agree_version(theirs)
    else:
        agreed = agree_version(theirs)
        assert OLDEST_MAJOR <= agreed <= min(MAJOR, major)


@given(names, names, names)
def test_capabilities_are_the_intersection_or_the_missing_are_named(
    offered: frozenset[str], supported: frozenset[str], required: frozenset[str]
) -> None:
    missing = sorted(name for name in required if name not in offered or name not in supported)
    if missing:
        with pytest.raises(RemoteProtocolError) as caught:
            agree_capabilities(offered, supported, required)
        assert caught.value.code is ErrorCode.CAPABILITY
        assert str(caught.value).endswith(", ".join(missing))
    else:
        assert agree_capabilities(offered, supported, required) == {name for name in offered if name in supported}


def test_what_is_required_is_supported() -> None:
    assert REQUIRED_CAPABILITIES <= CAPABILITIES
