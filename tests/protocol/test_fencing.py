"""The fencing token in the file of a lock: it only grows, and an older one is refused."""

from __future__ import annotations

import pytest

from protocol.fencing import FILE_BYTES, StaleTokenError, advance


def test_a_token_is_written_once_and_grows() -> None:
    first = advance(b"", 7)
    assert first == b"00000000000000000007\n"
    assert len(first) == FILE_BYTES
    assert advance(first, 7) is None
    second = advance(first, (1 << 63) - 1)
    assert second is not None
    assert int(second) == (1 << 63) - 1
    assert len(second) == FILE_BYTES
    assert advance(b"", 0) is None


def test_an_older_one_is_refused() -> None:
    with pytest.raises(StaleTokenError, match=r"token 9,.*comes with 8"):
        advance(b"%020d\n" % 9, 8)


@pytest.mark.parametrize("content", [b"7\n", b"x" * FILE_BYTES, b"%020d\n" % 7 + b"8", b"-%019d\n" % 7])
def test_what_is_no_token_is_refused(content: bytes) -> None:
    with pytest.raises(StaleTokenError, match="no fencing token"):
        advance(content, 9)
