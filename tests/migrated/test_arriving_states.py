"""What a peer says of device states decides neither how much memory they take nor how many there are.

DEVICE_STATE -> place -> piece_done -> (loaded) -> memory is free again
"""

from __future__ import annotations

from typing import Any

import pytest
import xxhash

from migrated.destination.states import ArrivedState, ArrivingStates
from protocol import messages
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.guest import DeviceDescription
from protocol.messages import MAX_STATES

MIB = 1 << 20
DEVICES = (
    *(DeviceDescription(name=f"d{n}", kind="non-iterable", state_bytes=MIB) for n in range(64)),
    DeviceDescription(name="ram", kind="iterable", state_bytes=0),
)


def piece(order: int = 0, **changes: Any) -> messages.DeviceState:
    values = {
        "order": order, "name": "ram", "kind": "iterable", "final": False, "offset": 0, "total_bytes": 8,
        "digest": xxhash.xxh3_64_intdigest(bytes(8)), "save_ns": 0,
    }  # fmt: skip
    return messages.DeviceState(**{**values, **changes})


def arrive(states: ArrivingStates, meta: messages.DeviceState) -> ArrivedState:
    """A state whole in one piece of zeros."""
    state, view = states.place(meta, meta.total_bytes)
    view[:] = bytes(meta.total_bytes)
    assert states.piece_done(state, meta.total_bytes)
    return state


def test_a_state_is_whole_when_all_its_pieces_are_there() -> None:
    states = ArrivingStates(DEVICES)
    digest = xxhash.xxh3_64_intdigest(b"abcdefgh")
    first, view = states.place(piece(digest=digest), 3)
    view[:] = b"abc"
    assert not states.piece_done(first, 3)
    second, view = states.place(piece(digest=digest, offset=3), 5)
    view[:] = b"defgh"
    assert second is first
    assert states.piece_done(second, 5)
    assert bytes(first.data) == b"abcdefgh"


def test_a_promise_takes_no_memory() -> None:
    states = ArrivingStates(DEVICES)
    before_kib = _resident_kib()
    for order in range(12):
        states.place(piece(order, name=f"d{order}", kind="non-iterable", total_bytes=16 * MIB), 1)
    assert _resident_kib() - before_kib < 8 << 10, "192 MiB were promised"


def _resident_kib() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:"))


def test_what_waits_to_be_loaded_is_bounded_and_becomes_free_by_loading() -> None:
    states = ArrivingStates(DEVICES)
    bound = 2 * 64 * MIB + 64 * MIB
    waiting = [states.place(piece(order, total_bytes=16 * MIB), 1)[0] for order in range(bound // (16 * MIB))]
    one_more = piece(len(waiting), total_bytes=16 * MIB)
    with pytest.raises(RemoteProtocolError, match="wait to be loaded") as refused:
        states.place(one_more, 1)
    assert refused.value.code is ErrorCode.TOO_LARGE
    states.loaded(waiting[0])
    states.place(one_more, 1)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (piece(0), piece(0), "comes twice"),
        (piece(0), piece(MAX_STATES), "beyond the 1024"),
        (piece(0, final=True), piece(1, final=True), "final state of device ram .* comes twice"),
        (piece(0), piece(1, total_bytes=17 * MIB), "at most 16777216 were announced"),
        (piece(0), piece(1, name="d0", kind="iterable"), "which the guest lacks"),
    ],
)
def test_every_state_comes_once_and_of_a_device_that_is_there(
    first: messages.DeviceState, second: messages.DeviceState, words: str
) -> None:
    states = ArrivingStates(DEVICES)
    arrive(states, first)
    with pytest.raises(RemoteProtocolError, match=words):
        states.place(second, 1)


def test_a_state_cannot_be_cut_into_pieces_of_a_byte() -> None:
    states = ArrivingStates(DEVICES)
    most = 16 + MIB // 4096
    for offset in range(most):
        states.place(piece(0, total_bytes=MIB, offset=offset), 1)
    with pytest.raises(RemoteProtocolError, match=f"more than {most} pieces"):
        states.place(piece(0, total_bytes=MIB, offset=most), 1)


def test_pieces_that_overlap_never_make_a_state_whole_twice() -> None:
    states = ArrivingStates(DEVICES)
    state, _ = states.place(piece(0), 5)
    other, _ = states.place(piece(0, offset=3), 5)
    assert not states.piece_done(state, 5)
    assert not states.piece_done(other, 5)


def test_after_the_end_nothing_is_taken() -> None:
    states = ArrivingStates(DEVICES)
    states.end()
    with pytest.raises(RemoteProtocolError, match="is ending"):
        states.place(piece(0), 1)
