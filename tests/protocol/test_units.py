"""Sizes, rates and durations as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.units import (
    DURATION_UNITS,
    MAX_VALUE,
    SIZE_UNITS,
    UnitError,
    format_duration_ns,
    format_rate,
    format_size,
    parse_duration_ns,
    parse_rate,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("7B", 7),
        ("4KiB", 4096),
        ("256MiB", 256 << 20),
        (" 1.5GiB ", 3 << 29),
        ("2TiB", 2 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "rate"), [("0", 0), ("100", 100), ("50MiB/s", 50 << 20), ("0.5KiB/s", 512), ("9B/s", 9)]
)
def test_rates(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("0", 0),
        ("0ms", 0),
        ("300ms", 300_000_000),
        ("1.5s", 1_500_000_000),
        ("40us", 40_000),
        ("7ns", 7),
        ("0.5us", 500),
    ],
)
def test_durations(text: str, duration: int) -> None:
    assert parse_duration_ns(text) == duration


@pytest.mark.parametrize(
    "text", ["", "MiB", "1 MiB", "1MB", "1mib", "-1", "1e3", "0x10", "1.B", "0.3B", "inf", "nan", "٣", "9999999TiB"]
)
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(UnitError) as raised:
        parse_size(text)
    assert repr(text) in str(raised.value)
    assert "MiB" in str(raised.value)


@pytest.mark.parametrize("text", ["", "5", "5m", "5 ms", "1h", "-1ms", "0.1ns", "9999999999999s"])
def test_what_is_no_duration_is_refused_by_name(text: str) -> None:
    with pytest.raises(UnitError) as raised:
        parse_duration_ns(text)
    assert repr(text) in str(raised.value)
    assert "ms" in str(raised.value)


@pytest.mark.parametrize("text", ["", "/s", "5MiB", "5MB/s", "5MiB/min", "5MiB/s/s"])
def test_what_is_no_rate_is_refused_by_name(text: str) -> None:
    with pytest.raises(UnitError) as raised:
        parse_rate(text)
    assert repr(text) in str(raised.value)
    assert "MiB/s" in str(raised.value)


@given(st.text(max_size=20))
def test_no_text_raises_anything_else(text: str) -> None:
    for parse in (parse_size, parse_rate, parse_duration_ns):
        try:
            assert 0 <= parse(text) <= MAX_VALUE
        except UnitError:
            continue


@given(st.integers(0, MAX_VALUE))
def test_formats_are_right_to_half_their_last_digit(value: int) -> None:
    assert format_rate(value) == format_size(value) + "/s"
    for written, units in ((format_size(value), SIZE_UNITS), (format_duration_ns(value), DURATION_UNITS)):
        match = re.fullmatch(r"([0-9.]+)([A-Za-z]+)", written)
        assert match is not None
        factor = units[match[2]]
        assert abs(Fraction(match[1]) * factor - value) <= Fraction(factor, 199)
        assert value < factor * 1024 or factor == max(units.values())


@pytest.mark.parametrize(
    ("value", "size", "duration"),
    [
        (0, "0B", "0ns"),
        (1, "1B", "1ns"),
        (1536, "1.5KiB", "1.54us"),
        (256 << 20, "256MiB", "268.44ms"),
        (300_000_000, "286.1MiB", "300ms"),
        (90_000_000_000, "83.82GiB", "90s"),
        (-1536, "-1.5KiB", "-1.54us"),
    ],
)
def test_formats(value: int, size: str, duration: str) -> None:
    assert format_size(value) == size
    assert format_duration_ns(value) == duration
