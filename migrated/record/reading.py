"""Reading a document as a model although another version wrote it: a member that it lacks has its default, and one that
this version does not know is left out. What cannot be understood even so is told in a sentence.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from migrated.base.errors import DocumentError
from migrated.record.model import Record

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
        try:
            return model.model_validate(document)
        except ValidationError as error:
            return model.model_validate(_without_unknown(document, error))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise DocumentError(
            f"The document is no {what} that this version of migrated can read ({where}: {first['msg']}): use the "
            "version that wrote it."
        ) from error


def _without_unknown(document: Mapping[str, Any], error: ValidationError) -> Any:
    known = copy.deepcopy(document)
    for problem in error.errors():
        if problem["type"] == "extra_forbidden":
            _remove(known, problem["loc"])
    return known


def _remove(document: Any, path: Sequence[int | str]) -> None:
    for step in path[:-1]:
        document = document[step]
    del document[path[-1]]
