"""A document that a peer sent, as a model. Its size, its depth and its numbers are bounded before anything is built of
it: a few megabytes of brackets take gigabytes once they are objects."""

from __future__ import annotations

import re
from typing import Final, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from migrated.base.errors import DocumentError

MAX_BYTES: Final = 2 << 20
MAX_DEPTH: Final = 16
MAX_VALUES: Final = 100_000
MAX_DIGITS: Final = 24
_TEXT: Final = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_LONG_NUMBER: Final = re.compile(rb"[0-9]{%d}" % (MAX_DIGITS + 1))

Model = TypeVar("Model", bound=BaseModel)


def read_received(model: type[Model], payload: bytes, what: str) -> Model:
    """Read a JSON document. It takes tens of milliseconds at most; call it in a thread all the same.

    Args:
        what: what the document should be, for the sentence.

    Raises:
        DocumentError: it is larger than any such document, or none.
    """
    if (reason := _why_not(payload)) is not None:
        raise DocumentError(f"the peer's {what} cannot be read: {reason}")
    try:
        return model.model_validate_json(payload)
    except ValidationError as error:
        # One error for each value may be there: only how many is cheap to tell.
        raise DocumentError(f"the peer's {what} cannot be read: it has {error.error_count()} faults") from None


def _why_not(payload: bytes) -> str | None:
    if len(payload) > MAX_BYTES:
        return f"it has {len(payload)} bytes, at most {MAX_BYTES} are taken"
    bare = _TEXT.sub(b"", payload)
    if _LONG_NUMBER.search(bare) is not None:
        return f"a number has more than {MAX_DIGITS} digits"
    signs = np.frombuffer(bare, np.uint8)
    opens = (signs == ord("{")) | (signs == ord("["))
    closes = (signs == ord("}")) | (signs == ord("]"))
    depth = np.cumsum(opens.astype(np.int32) - closes).max(initial=0)
    if depth > MAX_DEPTH:
        return f"it is nested {depth} deep, at most {MAX_DEPTH} are taken"
    values = int(np.count_nonzero(signs == ord(","))) + int(np.count_nonzero(opens))
    if values > MAX_VALUES:
        return f"it has about {values} values, at most {MAX_VALUES} are taken"
    return None
