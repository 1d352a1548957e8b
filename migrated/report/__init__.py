"""The report on an attempt, or on two side by side: one HTML file that needs nothing but itself.

    record -> Fields (paths) -> sections (markup, charts) -> page.html -> FILE

Nothing is fetched, and the page's own policy forbids it; without its script everything can be read all the same.
"""

from __future__ import annotations

import base64
import copy
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Final

from pydantic import ValidationError

from migrated.record.model import Record
from migrated.report import attempt, comparison
from migrated.report.fields import Fields
from migrated.report.markup import Markup, text

_PAGE: Final = files(__name__).joinpath("page.html").read_text(encoding="utf-8")
_SCRIPT: Final = _PAGE.partition("<script>")[2].partition("</script>")[0]
_SCRIPT_HASH: Final = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
_POLICY: Final = (
    f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_SCRIPT_HASH}'; base-uri 'none'; "
    "form-action 'none'"
)


class ReportError(Exception):
    """A document that is no record of this version."""


def write_report(record: dict[str, Any], path: Path) -> None:
    """Write the report on one attempt.

    Args:
        record: a record document (``migratectl --json show``).
        path: the HTML file, replaced when it exists.

    Raises:
        ReportError: the document is no record that this version knows.
        OSError: the file cannot be written.
    """
    fields = _fields(record, "")
    body = attempt.body(fields)
    path.write_text(_page(f"{fields['guest']}: migration {fields['migration_id']}", body), encoding="utf-8")


def write_comparison(a: dict[str, Any], b: dict[str, Any], path: Path) -> None:
    """Write two attempts side by side.

    Args:
        a: a record document, what is compared with.
        b: a record document, what is compared.
        path: the HTML file, replaced when it exists.

    Raises:
        ReportError: one of them is no record that this version knows.
        OSError: the file cannot be written.
    """
    first, second = _fields(a, "a."), _fields(b, "b.")
    title = f"{first['guest']} and {second['guest']}: two migrations compared"
    path.write_text(_page(title, comparison.body(first, second)), encoding="utf-8")


def _fields(record: dict[str, Any], prefix: str) -> Fields:
    """The record in the form of this version: a member that it lacks has its default, one that is unknown is left to
    the record's JSON. So records of other versions can be shown, as far as they are alike."""
    known = copy.deepcopy(record)
    try:
        try:
            model = Record.model_validate(known)
        except ValidationError as error:
            for problem in error.errors():
                if problem["type"] == "extra_forbidden":
                    _remove(known, problem["loc"])
            model = Record.model_validate(known)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise ReportError(
            f"The document is no record that this version of migrated can show ({where}: {first['msg']}): use the "
            "version that wrote it."
        ) from error
    return Fields(model.document(), prefix, record)


def _remove(document: Any, path: Sequence[int | str]) -> None:
    for step in path[:-1]:
        document = document[step]
    del document[path[-1]]


def _page(title: str, body: Markup) -> str:
    return Template(_PAGE).substitute(title=text(title), policy=_POLICY, body=body)
