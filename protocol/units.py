"""Sizes, rates and durations as people write them (``256MiB``, ``50MiB/s``, ``300ms``), and back.

Values are exact integers: bytes, bytes per second, nanoseconds. A fraction is accepted when it comes out whole.
"""

from __future__ import annotations

import re
from typing import Final

SIZE_UNITS: Final[dict[str, int]] = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
DURATION_UNITS: Final[dict[str, int]] = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}
MAX_VALUE: Final = (1 << 63) - 1

_NUMBER = re.compile(r"(\d{1,20})(?:\.(\d{1,9}))?([A-Za-z]*)", re.ASCII)


class UnitError(ValueError):
    """A text that is no size, rate or duration; the message names the text and the accepted forms."""


def _parse(text: str, units: dict[str, int], bare_unit: int | None, forms: str) -> int:
    match = _NUMBER.fullmatch(text.strip())
    factor = None
    if match is not None:
        unit = match[3]
        # A bare 0 needs no unit, whatever the quantity.
        bare = bare_unit if bare_unit is not None or int(match[1] + (match[2] or "")) else 1
        factor = units.get(unit) if unit else bare
    if match is None or factor is None:
        raise UnitError(f"{text!r} is not {forms}.")
    digits = match[2] or ""
    scale: int = 10 ** len(digits)
    value, rest = divmod(int(match[1] + digits) * factor, scale)
    if rest or value > MAX_VALUE:
        raise UnitError(f"{text!r} is too fine or too large: use {forms} that is a whole number below 2^63.")
    return value


def parse_size(text: str) -> int:
    """Bytes of ``"256MiB"``, ``"4KiB"``, ``"1.5GiB"`` or a plain number of bytes. Raises UnitError."""
    return _parse(text, SIZE_UNITS, 1, "a size: a number of bytes, or a number with B, KiB, MiB, GiB or TiB")


def parse_rate(text: str) -> int:
    """Bytes per second of ``"50MiB/s"`` or a plain number of bytes per second. Raises UnitError."""
    forms = "a rate: a number of bytes per second, or a number with B/s, KiB/s, MiB/s, GiB/s or TiB/s"
    stripped = text.strip()
    body = stripped.removesuffix("/s")
    if body == stripped and not body.replace(".", "", 1).isdigit():
        raise UnitError(f"{text!r} is not {forms}.")
    try:
        return _parse(body, SIZE_UNITS, 1, forms)
    except UnitError:
        raise UnitError(f"{text!r} is not {forms}.") from None


def parse_duration_ns(text: str) -> int:
    """Nanoseconds of ``"300ms"``, ``"1.5s"``, ``"40us"``, ``"7ns"`` or ``"0"``. Raises UnitError."""
    return _parse(text, DURATION_UNITS, None, "a duration: a number with ns, us, ms or s")


def _format(value: int, units: dict[str, int]) -> str:
    sign, value = ("-", -value) if value < 0 else ("", value)
    name, factor = next(((n, f) for n, f in reversed(units.items()) if value >= f), next(iter(units.items())))
    if value % factor == 0:
        return f"{sign}{value // factor}{name}"
    return f"{sign}{value / factor:.2f}".rstrip("0").rstrip(".") + name


def format_size(size_bytes: int) -> str:
    """For people: the largest unit that fits, at most two decimals (``"256MiB"``, ``"1.33GiB"``)."""
    return _format(size_bytes, SIZE_UNITS)


def format_rate(bytes_per_s: int) -> str:
    """For people: as :func:`format_size`, per second."""
    return format_size(bytes_per_s) + "/s"


def format_duration_ns(duration_ns: int) -> str:
    """For people: the largest unit that fits, at most two decimals (``"300ms"``, ``"1.25s"``)."""
    return _format(duration_ns, DURATION_UNITS)
