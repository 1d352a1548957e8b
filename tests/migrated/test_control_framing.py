"""Cutting a byte stream into JSON values."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migrated.control.framing import (
    MAX_REQUEST_BYTES,
    JsonSplitter,
    Malformed,
    RequestTooLargeError,
    encode,
    parse,
)

bounded = settings(
    deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow], database=None
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=4,
)
OBJECTS = st.dictionaries(st.text(), JSON, max_size=4)


@bounded
@given(
    st.lists(OBJECTS, max_size=3),
    st.sampled_from([b"", b"\n", b" \r\n\t"]),
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
)
def test_any_chunking_gives_the_same_values(values: list[object], separator: bytes, steps: list[int]) -> None:
    stream = separator.join(json.dumps(value, ensure_ascii=False).encode() for value in values)
    splitter, found, at = JsonSplitter(), [], 0
    for step in itertools.cycle(steps):
        found += splitter.feed(stream[at : at + step])
        at += step
        if at >= len(stream):
            break
    assert splitter.end() == []
    assert [json.loads(text) for text in found if isinstance(text, bytes)] == values
    assert not [text for text in found if isinstance(text, Malformed)]


def test_two_values_in_one_piece_and_one_value_in_two() -> None:
    splitter = JsonSplitter()
    assert splitter.feed(b'{"a": "}"}{"b"') == [b'{"a": "}"}']
    assert splitter.feed(b": [1]}") == [b'{"b": [1]}']


def test_escaped_quotes_do_not_end_a_string() -> None:
    splitter = JsonSplitter()
    assert splitter.feed(b'{"a": "x\\') == []
    assert splitter.feed(b'"}"}') == [b'{"a": "x\\"}"}']


@pytest.mark.parametrize("reset", [b"\x1b", b"\x00", b"\xff"])
def test_a_control_character_resynchronises(reset: bytes) -> None:
    splitter = JsonSplitter()
    found = splitter.feed(b'{"half": [' + reset + b'{"whole": 1}')
    assert isinstance(found[0], Malformed)
    assert found[1:] == [b'{"whole": 1}']


def test_an_unterminated_string_ends_with_its_line() -> None:
    found = JsonSplitter().feed(b'{"execute: 1}\n{"b": 2}')
    assert isinstance(found[0], Malformed)
    assert found[1:] == [b'{"b": 2}']


def test_scalars_and_stray_brackets_come_out_as_they_are() -> None:
    splitter = JsonSplitter()
    assert splitter.feed(b'42 "x"}foo\n') == [b"42", b'"x"', b"}", b"foo"]
    assert splitter.feed(b"17") == []
    assert splitter.end() == [b"17"]


def test_the_end_of_the_stream_inside_a_value_is_an_error() -> None:
    splitter = JsonSplitter()
    splitter.feed(b'{"a": ')
    assert splitter.end() == [Malformed("premature end of input")]
    assert splitter.end() == []


def test_a_request_beyond_the_cap_is_refused_before_it_is_complete() -> None:
    splitter = JsonSplitter()
    splitter.feed(b'{"a": "' + b"x" * (MAX_REQUEST_BYTES - 100))
    with pytest.raises(RequestTooLargeError, match=str(MAX_REQUEST_BYTES)):
        splitter.feed(b"x" * 200)


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1, "a": 1}',
        b"{]",
        b'"\xfe"',
        b"nul",
        b"",
        b"9" * 5000,
        b"[" * 100_000,
    ],
)
def test_what_is_not_json_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse(text)


@bounded
@given(OBJECTS)
def test_encode_is_ascii_on_one_line_and_parses_back(value: dict[str, object]) -> None:
    line = encode(value)
    assert line.endswith(b"\r\n")
    assert b"\n" not in line[:-2]
    assert line.isascii()
    assert parse(line) == value
