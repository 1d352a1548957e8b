"""The report on an attempt, or on two side by side: one HTML file that needs nothing but itself.

    record -> Fields (paths) -> sections (markup, charts) -> page.html -> FILE

Nothing is fetched, and the page's own policy forbids it; without its script everything can be read all the same.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Final

from migrated.record.reading import read_record
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


def write_report(record: dict[str, Any], path: Path) -> None:
    """Write the report on one attempt.

    Args:
        record: a record document (``migratectl --json show``).
        path: the HTML file, replaced when it exists.

    Raises:
        DocumentError: the document is no record that this version can read.
        OSError: the file cannot be written.
    """
    fields = _fields(record, "")
    write_page(f"{fields['guest']}: migration {fields['migration_id']}", attempt.body(fields), path)


def write_comparison(a: dict[str, Any], b: dict[str, Any], path: Path) -> None:
    """Write two attempts side by side.

    Args:
        a: a record document, what is compared with.
        b: a record document, what is compared.
        path: the HTML file, replaced when it exists.

    Raises:
        DocumentError: one of them is no record that this version can read.
        OSError: the file cannot be written.
    """
    first, second = _fields(a, "a."), _fields(b, "b.")
    title = f"{first['guest']} and {second['guest']}: two migrations compared"
    write_page(title, comparison.body(first, second), path)


def _fields(document: dict[str, Any], prefix: str) -> Fields:
    """Return the record in the form of this version. Members that this version does not know appear only in the
    record's JSON."""
    return Fields(read_record(document), prefix, document)


def write_page(title: str, body: Markup, path: Path) -> None:
    """Write a page of sections (``markup``, ``pieces``) in the form of a report.

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text(Template(_PAGE).substitute(title=text(title), policy=_POLICY, body=body), encoding="utf-8")
