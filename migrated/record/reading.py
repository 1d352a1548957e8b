"""Reading a document as a model although another version wrote it: a member that it lacks has its default, and one that
this version does not know is left out. What cannot be understood even so is told in a sentence.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from migrated.base.errors import DocumentError
from migrated.record.model import Record

_UNKNOWN: Final = "extra_forbidden"

Model = TypeVar("Model", bound=BaseModel)


def read_record(document: Mapping[str, Any]) -> Record:
    """A record from its document (``migratectl --json show``).

    Raises:
        DocumentError: it is no record that this version can read.
    """
    return read_document(Record, document, "record")


def read_document(model: type[Model], document: Mapping[str, Any], what: str) -> Model:
    """A document as a model, without the members that the model does not know.

    Args:
        what: what the document should be, for the sentence.

    Raises:
        DocumentError: a member is missing or has a value that the model cannot take.
    """
    try:
        while True:
            try:
                return model.model_validate(document)
            except ValidationError as error:
                if not (unknown := [problem["loc"] for problem in error.errors() if problem["type"] == _UNKNOWN]):
                    raise
            document = copy.deepcopy(document)
            for path in unknown:
                _remove(document, path)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise DocumentError(
            f"The document is no {what} that this version of migrated can read ({where}: {first['msg']}): use the "
            "version that wrote it."
        ) from error


def _remove(document: Any, path: Sequence[int | str]) -> None:
    """Remove a member, and that of its name from all other rows of the lists on the way: a model tells of the first row
    only."""
    step, rest = path[0], path[1:]
    if isinstance(step, int):
        for row in document:
            _remove(row, rest)
    elif rest:
        if isinstance(document, dict) and step in document:
            _remove(document[step], rest)
    elif isinstance(document, dict):
        document.pop(step, None)
