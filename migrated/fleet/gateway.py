"""What etcd's JSON gateway writes and reads: keys and values in base64, 64-bit numbers as text, zeros left out."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from migrated.fleet.store import Change, Compare, Delete, Entry, Exists, Missing, NoAnswerError, Operation, Put


@contextlib.contextmanager
def understood() -> Iterator[None]:
    """A context for reading an answer: one that has not the form of etcd's tells nothing. A proxy or another version
    may answer there, and has said neither what the store holds nor what it did.

    Raises:
        NoAnswerError: it has not.
    """
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise NoAnswerError(f"What answers there does not answer as etcd does ({error!r}).") from error


def coded(key: str) -> str:
    """A key as the gateway writes it."""
    return base64.b64encode(key.encode()).decode()


def coded_end(prefix: str) -> str:
    """The first key that does not begin with a prefix: no key of ours holds a byte 0xff."""
    raw = prefix.encode()
    return base64.b64encode(raw[:-1] + bytes([raw[-1] + 1])).decode()


def compare_document(one: Compare) -> dict[str, Any]:
    """A compare of a transaction."""
    match one:
        case Missing(key=key):
            return {"key": coded(key), "target": "VERSION", "result": "EQUAL", "version": "0"}
        case Exists(key=key):
            return {"key": coded(key), "target": "VERSION", "result": "GREATER", "version": "0"}
        case _:
            return {"key": coded(one.key), "target": "MOD", "result": "EQUAL", "mod_revision": str(one.revision)}


def operation_document(one: Operation) -> dict[str, Any]:
    """An operation of a transaction."""
    match one:
        case Put(key=key, value=value, lease=lease):
            given = {"key": coded(key), "value": base64.b64encode(value).decode(), "lease": str(lease)}
            return {"request_put": given}
        case Delete(key=key):
            return {"request_delete_range": {"key": coded(key)}}
        case _:
            return {"request_range": {"key": coded(one.key)}}


def revision_in(answer: Mapping[str, Any]) -> int:
    """The store's revision in the header of an answer."""
    return int(answer["header"]["revision"])


def entries_in(answer: Mapping[str, Any]) -> list[Entry]:
    """The entries that a range found."""
    return [_entry(one) for one in answer.get("kvs", ())]


def _entry(pair: Mapping[str, Any]) -> Entry:
    return Entry(
        _key(pair),
        base64.b64decode(pair.get("value", "")),
        int(pair["mod_revision"]),
        int(pair.get("lease", 0)),
    )


def _key(pair: Mapping[str, Any]) -> str:
    """A key; one that is no text is somebody else's and only shown."""
    return base64.b64decode(pair["key"]).decode(errors="backslashreplace")


def change_in(event: Mapping[str, Any]) -> Change:
    """The change that an event of a watch tells."""
    pair = event["kv"]
    if event.get("type") == "DELETE":
        return Change(_key(pair), None, int(pair["mod_revision"]))
    entry = _entry(pair)
    return Change(entry.key, entry, entry.revision)


def document_of(body: bytes) -> dict[str, Any]:
    """An answer, or one line of it. Raises ValueError when it is none."""
    try:
        found = json.loads(body)
    except ValueError as error:
        raise ValueError(f"no JSON: {body[:100]!r}") from error  # it may be the sentence of a refusal
    if not isinstance(found, dict):
        raise ValueError(f"no JSON object: {body[:100]!r}")
    return found
