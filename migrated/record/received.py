"""A document that a peer sent, as a model. Its size, its depth and its numbers are bounded before anything is built of
it: a few megabytes of brackets take gigabytes once they are objects, and each fault of a hundred thousand a kilobyte.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from migrated.base.errors import DocumentError

MAX_BYTES: Final = 2 << 20
MAX_DEPTH: Final = 16
MAX_VALUES: Final = 100_000
MAX_MEMBERS: Final = 2048
"""Of one object: more than a map of all devices has."""
MAX_DIGITS: Final = 24
_LOOKED_AT_BYTES: Final = 64 << 10
"""How much of a document is looked at together: figures of its bytes take several times as much."""
_TEXT: Final = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_LONG_NUMBER: Final = re.compile(rb"[0-9]{%d}" % (MAX_DIGITS + 1))

Model = TypeVar("Model", bound=BaseModel)


class _TooManyError(Exception):
    """An object has too many members; the sentence says how many."""


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
        # Not by pydantic itself, whose objects take kilobytes each while it parses.
        return model.model_validate(json.loads(payload, object_pairs_hook=_object))
    except _TooManyError as error:
        raise DocumentError(f"the peer's {what} cannot be read: {error}") from None
    except ValidationError as error:
        raise DocumentError(f"the peer's {what} cannot be read: it has {error.error_count()} faults or more") from None
    except ValueError:
        raise DocumentError(f"the peer's {what} cannot be read: it is no JSON") from None


def _why_not(payload: bytes) -> str | None:
    if len(payload) > MAX_BYTES:
        return f"it has {len(payload)} bytes, at most {MAX_BYTES} are taken"
    if (texts := payload.count(b'"') // 2) > MAX_VALUES:
        return f"it has about {texts} texts, at most {MAX_VALUES} are taken"
    bare = _TEXT.sub(b"", payload)
    if _LONG_NUMBER.search(bare) is not None:
        return f"a number has more than {MAX_DIGITS} digits"
    if _is_deep(bare):
        return f"it is nested more than {MAX_DEPTH} deep"
    values = bare.count(b",") + bare.count(b"{") + bare.count(b"[")
    if values > MAX_VALUES:
        return f"it has about {values} values, at most {MAX_VALUES} are taken"
    return None


def _is_deep(bare: bytes) -> bool:
    """Whether a document without its texts is nested too deep."""
    depth = 0
    for begin in range(0, len(bare), _LOOKED_AT_BYTES):
        signs = np.frombuffer(bare[begin : begin + _LOOKED_AT_BYTES], np.uint8)
        opens = (signs == ord("{")) | (signs == ord("["))
        closes = (signs == ord("}")) | (signs == ord("]"))
        depths = depth + np.cumsum(opens.astype(np.int8) - closes)
        if depths.max() > MAX_DEPTH:
            return True
        depth = int(depths[-1])
    return False


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object from its members.

    Raises:
        _TooManyError: there are more than in any object of ours.
    """
    if len(members) > MAX_MEMBERS:
        raise _TooManyError(f"an object has {len(members)} members, at most {MAX_MEMBERS} are taken")
    return dict(members)
