"""Every message survives the wire, and every damage to one is a named error."""

from __future__ import annotations

import tracemalloc
from typing import Annotated, Any, Literal, get_args, get_origin

import msgpack
import pytest
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.frames import HEADER_BYTES, MAX_META_BYTES, check_meta, unpack_header
from protocol.guest import DeviceDescription, GuestDescription, MemoryRegion
from protocol.messages import (
    CATALOGUE,
    MESSAGES,
    Abort,
    Barrier,
    Commit,
    Error,
    FrameType,
    Hello,
    Message,
    Pages,
    Record,
    decode,
    encode,
    frame_head,
)

MAX_ITEMS = 3


def values(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    """Values that a field accepts, read off its declaration."""
    if get_origin(annotation) is Annotated:
        annotation, *inner = get_args(annotation)
        expanded = [item for extra in inner for item in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return values(annotation, [*expanded, *metadata])
    limits: dict[str, Any] = {}
    pattern = None
    for item in metadata:
        match item:
            case Ge(int(ge)):
                limits["min_value"] = ge
            case Gt(int(gt)):
                limits["min_value"] = gt + 1
            case Le(int(le)):
                limits["max_value"] = le
            case Lt(int(lt)):
                limits["max_value"] = lt - 1
            case MinLen(length):
                limits["min_size"] = length
            case MaxLen(length):
                limits["max_size"] = length
            case _:
                pattern = getattr(item, "pattern", None) or pattern
    if annotation is GuestDescription:
        return guests()
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if get_origin(annotation) is tuple:
        limits["max_size"] = MAX_ITEMS
        return st.lists(values(get_args(annotation)[0], []), **limits).map(tuple)
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.integers(**limits)
    if annotation is bytes:
        return st.binary(**{**limits, "max_size": min(limits["max_size"], 200)})
    if annotation is str:
        text = st.from_regex(pattern, fullmatch=True) if pattern else st.text(max_size=40)
        least, most = limits.get("min_size", 0), limits.get("max_size", 1 << 62)
        return text.filter(lambda value: least <= len(value) <= most)
    assert issubclass(annotation, BaseModel), annotation
    return models(annotation)


def models(model: type[BaseModel]) -> st.SearchStrategy[Any]:
    return st.builds(
        model, **{name: values(field.annotation, field.metadata) for name, field in model.model_fields.items()}
    )


@st.composite
def guests(draw: st.DrawFn) -> GuestDescription:
    regions, page = [], 0
    for at, pages in enumerate(draw(st.lists(st.integers(1, 1 << 20), min_size=1, max_size=3))):
        regions.append(
            MemoryRegion(name=f"ram{at}", guest_address=page << 12, size_bytes=pages << 12, offset_pages=page)
        )
        page += pages
    devices = draw(st.lists(models(DeviceDescription), max_size=3, unique_by=lambda device: (device.name, device.kind)))
    fields = {
        name: values(field.annotation, field.metadata)
        for name, field in GuestDescription.model_fields.items()
        if name not in ("memory", "devices", "page_size", "guest_time", "guest_freq")
    }
    guest_time = draw(st.booleans())
    return draw(
        st.builds(
            GuestDescription,
            memory=st.just(tuple(regions)),
            devices=st.just(tuple(devices)),
            page_size=st.just(4096),
            guest_time=st.just(guest_time),
            guest_freq=st.integers(int(guest_time), (1 << 64) - 1),
            **fields,
        )
    )


messages = st.sampled_from(MESSAGES).flatmap(models)


def refusal(frame_type: int, meta: bytes) -> RemoteProtocolError:
    with pytest.raises(RemoteProtocolError) as caught:
        decode(frame_type, meta)
    return caught.value


def test_the_catalogue_is_whole_and_its_numbers_are_unique() -> None:
    assert sorted(CATALOGUE) == sorted(FrameType)
    assert len(CATALOGUE) == len(MESSAGES)
    assert 0 not in CATALOGUE


@pytest.mark.parametrize("model", MESSAGES, ids=lambda model: model.TYPE.name)
def test_round_trip(model: type[Message]) -> None:
    @given(models(model))
    def check(message: Message) -> None:
        meta = encode(message)
        assert len(meta) <= MAX_META_BYTES
        back = decode(message.TYPE, meta)
        assert back == message
        assert type(back) is model
        assert encode(back) == meta, "the encoding is not canonical"

    check()


@given(messages, st.integers(0, 10_000), st.integers(1, 255))
def test_a_flipped_byte_is_a_valid_message_or_a_remote_error(message: Message, place: int, flip: int) -> None:
    meta = bytearray(encode(message))
    meta[place % len(meta)] ^= flip
    try:
        back = decode(message.TYPE, bytes(meta))
    except RemoteProtocolError:
        return
    assert decode(message.TYPE, encode(back)) == back


@given(messages, st.integers(0, 10_000))
def test_a_cut_message_is_refused(message: Message, cut: int) -> None:
    meta = encode(message)
    refusal(message.TYPE, meta[: cut % len(meta)])


@given(messages, st.binary(min_size=1, max_size=4))
def test_trailing_bytes_are_refused(message: Message, tail: bytes) -> None:
    assert "not valid msgpack" in str(refusal(message.TYPE, encode(message) + tail))


@given(st.sampled_from(sorted(CATALOGUE)), st.binary(max_size=120))
def test_garbage_raises_only_remote_protocol_errors(frame_type: int, meta: bytes) -> None:
    try:
        message = decode(frame_type, meta)
    except RemoteProtocolError:
        return
    assert message == CATALOGUE[frame_type].model_validate(msgpack.unpackb(meta, use_list=False))


@given(st.integers(0, 255).filter(lambda number: number not in CATALOGUE))
def test_an_unknown_type_is_unexpected(number: int) -> None:
    error = refusal(number, b"\x80")
    assert error.code is ErrorCode.UNEXPECTED
    assert str(error) == f"frame type {number} is unknown"


@given(messages.filter(lambda message: bool(type(message).model_fields)), st.data())
def test_a_missing_or_an_unknown_key_is_named(message: Message, data: st.DataObject) -> None:
    whole = msgpack.unpackb(encode(message), use_list=False)
    gone = data.draw(st.sampled_from(sorted(whole)))
    assert gone in str(refusal(message.TYPE, msgpack.packb({k: v for k, v in whole.items() if k != gone})))
    assert "surplus" in str(refusal(message.TYPE, msgpack.packb({**whole, "surplus": 1})))


@pytest.mark.parametrize(
    ("meta", "sentence"),
    [
        (b"\x81\xa5epoch\xcb\x3f\xf0\x00\x00\x00\x00\x00\x00", "epoch"),  # 1.0
        (b"\x81\xa5epoch\xc3", "epoch"),  # true
        (b"\x81\xa5epoch\xa11", "epoch"),  # "1"
        (b"\x81\xa5epoch\xc0", "epoch"),  # nil
        (b"\x81\xa5epoch\x00", "epoch"),  # below the first epoch
        (b"\x81\xa5epoch\xff", "epoch"),  # -1
        (b"\x81\xa5epoch\xcf\x80\x00\x00\x00\x00\x00\x00\x00", "epoch"),  # 2^63
        (b"\x82\xa5epoch\x01\xa5epoch\x01", "the same key twice"),
        (b"\x82\xa5epoch\x01\xc4\x05epoch\x01", "Keys should be strings"),
        (b"\x82\xa5epoch\x01\x01\x01", "int is not allowed for map key"),
        (b"\x81\xa5epoch\xc7\x01\x05\x00", "extension type 5"),
        (b"\x81\xa5epoch\xd6\xff\x00\x00\x00\x01", "epoch"),  # msgpack's own timestamp type
        (b"\x81\xa5\xffpoch\x01", "not valid msgpack"),  # a key that is not UTF-8
        (b"\x91\x01", "valid dictionary"),
        (b"\xc0", "valid dictionary"),
        (b"\xc1", "not valid msgpack"),  # never used by msgpack
        (b"\x91" * 5000 + b"\x01", "not valid msgpack"),  # nested too deep
        (b"", "not valid msgpack"),
    ],
    ids=range(18),
)
def test_a_wrong_value_is_named(meta: bytes, sentence: str) -> None:
    error = refusal(FrameType.COMMIT, meta)
    assert "message COMMIT" in str(error)
    assert sentence in str(error)
    assert error.code is ErrorCode.MALFORMED


@pytest.mark.parametrize(
    "meta",
    [
        b"\xdf\xff\xff\xff\xff",  # a map of 2^32 - 1 pairs
        b"\xde\xff\xff",
        b"\xdd\xff\xff\xff\xff",  # an array
        b"\xc6\xff\xff\xff\xff",  # bytes
        b"\xdb\xff\xff\xff\xff",  # text
        b"\xc9\xff\xff\xff\xff\x01",  # an extension
    ],
)
def test_a_claimed_count_is_refused_before_it_is_allocated(meta: bytes) -> None:
    tracemalloc.start()
    try:
        refusal(FrameType.COMMIT, meta)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_messages_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Commit(epoch=1).epoch = 2  # type: ignore[misc]  # frozen


def test_this_side_cannot_build_what_the_peer_would_refuse() -> None:
    with pytest.raises(ValidationError):
        Abort(epoch=0, reason="")
    with pytest.raises(ValidationError):
        Abort(epoch=1, reason="x" * 2049)
    with pytest.raises(ValidationError):
        Barrier(round=1 << 32)
    with pytest.raises(ValidationError):
        Pages(encoding="plain", runs=b"", digest=0)


def test_the_head_of_a_frame_is_its_header_and_its_meta() -> None:
    message = Barrier(round=4)
    head = frame_head(1, message, sequence=9, payload_bytes=70, round_number=4)
    header, meta = unpack_header(head, 1, 70), head[HEADER_BYTES:]
    check_meta(meta, header)
    assert (header.sequence, header.payload_bytes, header.round) == (9, 70, 4)
    assert decode(header.type, meta) == message


def test_an_error_of_the_peer_is_told_with_its_code_and_as_much_of_its_sentence_as_fits() -> None:
    error = RemoteProtocolError("no" * 5000, ErrorCode.TIME)
    told = decode(FrameType.ERROR, encode(Error.about(error)))
    assert isinstance(told, Error)
    assert told.code == ErrorCode.TIME
    assert told.text == "no" * 1000


def test_a_message_without_fields_is_one_empty_map() -> None:
    assert encode(Record()) == b"\x80"


def guest(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "g1",
        "uuid": "00000000-0000-0000-0000-000000000001",
        "vmm": "sim",
        "guest_time": True,
        "machine": "sim",
        "page_size": 4096,
        "memory": (
            {"name": "low", "guest_address": 0, "size_bytes": 8192, "offset_pages": 0},
            {"name": "high", "guest_address": 1 << 32, "size_bytes": 4096, "offset_pages": 2},
        ),
        "devices": (
            {"name": "disk", "kind": "iterable", "state_bytes": 1},
            {"name": "disk", "kind": "non-iterable", "state_bytes": 1},
        ),
        "vcpus": 1,
        "guest_freq": 10**9,
    }
    return {**base, **changes}


def hello(described: object) -> dict[str, Any]:
    return {
        "migration_id": "0" * 32,
        "epoch": 1,
        "guest": described,
        "guest_paused": False,
        "capabilities": (),
        "required": (),
        "limits": {"downtime_limit_ns": 0, "switchover_limit_ns": 0, "switchover_abort": True},
        "time_rules": {"policy": "midpoint", "max_time_jump_ns": 0, "max_time_error_ns": 0},
        "channels": 1,
        "host": "a",
    }


def region(size_bytes: int, offset_pages: int) -> dict[str, Any]:
    return {"name": "ram", "guest_address": 0, "size_bytes": size_bytes, "offset_pages": offset_pages}


def test_a_guest_knows_its_pages() -> None:
    assert GuestDescription.model_validate(guest()).pages == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"page_size": 16384}, "page size 16384 is not supported"),
        ({"memory": (region(4097, 0),)}, "not a whole number of pages"),
        ({"memory": (region(4096, 1),)}, "starts at page 1, expected 0"),
        ({"memory": (region(8192, 0), region(4096, 1))}, "starts at page 1, expected 2"),
        ({"memory": ()}, "at least 1 item"),
        ({"memory": (region(1 << 44, 0), region(4096, 1 << 32))}, "memory.1.offset_pages"),
        ({"devices": ({"name": "d", "kind": "iterable", "state_bytes": 0},) * 2}, "listed twice"),
        ({"name": "../etc"}, "name"),
        ({"guest_freq": 0}, "guest_freq"),
        ({"vcpus": 0}, "vcpus"),
    ],
)
def test_a_guest_that_cannot_be_is_refused_in_hello(changes: dict[str, Any], sentence: str) -> None:
    assert sentence in str(refusal(FrameType.HELLO, msgpack.packb(hello(guest(**changes)))))


def test_what_differs_between_two_guests_is_named() -> None:
    mine = GuestDescription.model_validate(guest())
    assert mine.differences(mine) == []
    other = GuestDescription.model_validate(guest(vcpus=2, devices=(), memory=(region(4096, 0),)))
    assert mine.differences(other) == [
        "vcpus is 1 here and 2 there",
        "the memory map has 2 regions with 12288 bytes here and 1 regions with 4096 bytes there",
        "device disk (iterable) exists only here",
        "device disk (non-iterable) exists only here",
    ]
    assert "device disk (iterable) exists only there" in other.differences(mine)


def test_hello_of_the_largest_guest_fits_a_frame() -> None:
    """64 regions and 400 devices with names of ordinary length leave room in one meta."""
    regions = [
        {"name": f"memory-region-{at}", "guest_address": at << 24, "size_bytes": 4096, "offset_pages": at}
        for at in range(64)
    ]
    devices = [{"name": f"virtio-net-pci-{at:04}", "kind": "iterable", "state_bytes": 1 << 20} for at in range(400)]
    described = GuestDescription.model_validate(guest(memory=tuple(regions), devices=tuple(devices)))
    assert len(encode(Hello.model_validate(hello(described)))) <= MAX_META_BYTES
