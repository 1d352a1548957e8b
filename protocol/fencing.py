"""The fencing token that the file of a guest's ownership lock carries.

A lock says who holds it now; the token says since when nobody else may. In a fleet it is the revision at which the
guest's owner was last written, which only grows: whoever comes with an older one was the owner once, and the guest has
been given to another host since.

    file    20 decimal digits and a newline; empty while no token was ever written
"""

from __future__ import annotations

import re
from typing import Final

FILE_BYTES: Final = 21
_FORM: Final = re.compile(rb"\d{20}\n")


class StaleTokenError(Exception):
    """The file carries a newer token, or something that is none; the message is a sentence."""


def advance(content: bytes, token: int) -> bytes | None:
    """Return the content that the file must have once its lock is held with a token; None when it has that already.

    Args:
        content: of the file now, up to one byte more than FILE_BYTES.
        token: at most 20 digits.

    Raises:
        StaleTokenError: the lock must not be held with this token.
    """
    if content and not _FORM.fullmatch(content):
        raise StaleTokenError(
            "Its file holds something that is no fencing token: empty the file if no other host runs the guest."
        )
    carried = int(content) if content else 0
    if carried > token:
        raise StaleTokenError(
            f"It carries the fencing token {carried}, and this host comes with {token}: the guest was given to another "
            "host since."
        )
    return b"%020d\n" % token if carried < token else None
