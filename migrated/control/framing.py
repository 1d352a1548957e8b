"""Cuts a QMP byte stream into JSON values: clients need to send neither line ends nor whole values at once.

{"execute": "query-st | atus"}{"execute": "stop"}    ->    {"execute": "query-status"}    {"execute": "stop"}
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, Final

MAX_REQUEST_BYTES: Final = 1 << 20

# Control characters other than tab, CR and LF put the parser back to its start, so that a client can always
# resynchronise (qmp-spec.rst); so does 0xff, which no UTF-8 text holds.
_RESET: Final = rb"\x00-\x08\x0b\x0c\x0e-\x1f\xff"
_IN_STRING: Final = re.compile(rb'["\\\r\n' + _RESET + rb"]")
_NESTED: Final = re.compile(rb'["{}\[\]' + _RESET + rb"]")
_TOP: Final = re.compile(rb'[ \t\r\n"{}\[\]' + _RESET + rb"]")


class RequestTooLargeError(Exception):
    """A request beyond MAX_REQUEST_BYTES: where the next one begins is unknown."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """Input that is not JSON; ``reason`` completes ``JSON parse error, ...``."""

    reason: str


class JsonSplitter:
    """Bytes in, texts of single JSON values out. What comes out is balanced; whether it is valid, ``parse`` tells."""

    def __init__(self) -> None:
        self._value = bytearray()
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, data: bytes) -> list[bytes | Malformed]:
        """The values that ``data`` completes, in order.

        Raises:
            RequestTooLargeError: a value grows beyond the limit.
        """
        out: list[bytes | Malformed] = []
        at = 0
        while at < len(data):
            if self._escaped:
                self._escaped = False
                self._value.append(data[at])
                at += 1
                continue
            stop = _IN_STRING if self._in_string else _NESTED if self._depth else _TOP
            match = stop.search(data, at)
            end = match.start() if match else len(data)
            self._value += data[at:end]
            if len(self._value) > MAX_REQUEST_BYTES:
                raise RequestTooLargeError(f"QMP input is larger than {MAX_REQUEST_BYTES} bytes")
            if match:
                self._structure(match[0], out)
            at = end + 1
        return out

    def end(self) -> list[bytes | Malformed]:
        """Return the last value of an ended stream: nothing, one complete value, or the error of a truncated one."""
        if not self._value:
            return []
        return [self._fail("premature end of input") if self._depth or self._in_string else self._take()]

    def _structure(self, byte: bytes, out: list[bytes | Malformed]) -> None:
        if self._in_string and byte in b'"\\':
            self._value += byte
            self._escaped = byte == b"\\"
            self._in_string = byte != b'"'
            if not self._in_string and not self._depth:
                out.append(self._take())
        elif byte in b" \t\r\n" and not self._in_string:
            if self._value:
                out.append(self._take())
        elif byte in b'"{}[]' and not self._in_string:
            if self._value and not self._depth:
                out.append(self._take())
            self._value += byte
            self._in_string = byte == b'"'
            self._depth += (byte in b"{[") - (byte in b"}]")
            if self._depth <= 0 and not self._in_string:
                out.append(self._take())
        else:
            out.append(self._fail(f"stray {byte.decode('latin-1')!a}"))

    def _take(self) -> bytes:
        value = bytes(self._value)
        self._clear()
        return value

    def _fail(self, reason: str) -> Malformed:
        self._clear()
        return Malformed(reason)

    def _clear(self) -> None:
        self._value.clear()
        self._depth = 0
        self._in_string = self._escaped = False


def parse(text: bytes) -> Any:
    """The value of a JSON text, stricter than the standard library: no NaN, no number beyond what a reply could hold,
    no duplicate keys.

    Raises:
        ValueError: with a phrase that completes ``JSON parse error, ...``.
    """
    try:
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg[:1].lower()}{error.msg[1:]} at character {error.pos}") from None
    except UnicodeDecodeError:
        raise ValueError("invalid UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def encode(message: dict[str, Any]) -> bytes:
    """One server message: ASCII, ended by CRLF."""
    return json.dumps(message, separators=(", ", ": "), allow_nan=False).encode("ascii") + b"\r\n"


def _no_constant(name: str) -> Any:
    raise ValueError(f"invalid keyword {name!r}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:32]} is out of range")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {key!r}")
        found[key] = value
    return found
