"""The tables of docs/configuration.md, made from the configuration's own models.

python -m scripts.documents.configuration            print the document as it should be
python -m scripts.documents.configuration --write    bring docs/configuration.md up to date
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap
import types
from pathlib import Path
from typing import Any, Final, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from migrated.cli.options import parameter_options
from migrated.settings.config import Address, Config
from protocol.units import format_rate, format_size
from scripts.basics import ROOT
from scripts.documents.blocks import Blocks, main

DOCUMENT: Final = ROOT / "docs" / "configuration.md"

MEANINGS: Final = {
    "control.socket": "Created with mode 0660, or 0666 with groups, whose members are known by their credentials; "
    "`SOCKET.lock` beside it keeps a second daemon away.",
    "state.directory": "Journal, history, and what predictions have learned.",
    "listen.address": "Without `[tls]` only loopback, unless `[tls] insecure` says otherwise.",
    "vmm.start_timeout_s": "How long a VMM may take to answer after its start.",
    "limits.connect_timeout_s": "One TCP connection to the destination.",
    "limits.handshake_timeout_s": "From the connection to the agreement on a migration.",
    "limits.heartbeat_interval_s": "Pause between two signs of life on the control channel.",
    "log.level": "Least severity that is logged.",
    "log.format": "For people, or one JSON object per line.",
    "log.file": "Instead of standard error.",
    "metrics.address": "Prometheus scrapes `http://ADDRESS/metrics`; nothing is served unless it is set.",
    "lock.directory": "Where the lock files lie; no lock is taken unless it is set.",
    "clock.hrtime_offset_ns": "Shift of the monotonic clock.",
    "clock.wall_offset_ns": "Shift of the wall clock.",
    "clock.drift_ppm": "How much too fast the monotonic clock runs.",
}
"""The meaning of a key, where its section does not say it and the model has no text below the field."""

UNITS: Final = {"_bytes_per_s": "rate", "_bytes": "size", "_ms": "duration", "_s": "duration", "_ns": "nanoseconds"}
"""Kinds of value by the end of a key's name; the first that fits counts."""


def field_texts(model: type[BaseModel]) -> dict[str, str]:
    """The string below each field of a model's class body, by the field's name."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                texts[name] = inspect.cleandoc(text).replace("\n", " ")
    return texts


def meaning(section: str, name: str, texts: dict[str, str]) -> str:
    """Return the meaning of a key.

    Raises:
        ValueError: nothing says it, or two texts do.
    """
    found = [text for text in (texts.get(name), MEANINGS.get(f"{section}.{name}")) if text]
    if len(found) != 1:
        raise ValueError(
            f"{section}.{name} must have one meaning, below its field or in MEANINGS, and has {len(found)}."
        )
    return found[0].replace("``", "`")


def kind(name: str, field: FieldInfo) -> str:
    """Return the kind of a key's value, with its range."""
    annotation: Any = field.annotation
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(choice for choice in get_args(annotation) if choice is not type(None))
    annotation = get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation
    if get_origin(annotation) is Literal:
        return ", ".join(f'`"{value}"`' for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        return "list of strings"
    plain = {bool: "`true`, `false`", Address: '`"HOST:PORT"`', Path: "path", str: "string"}
    if annotation in plain:
        return plain[annotation]
    unit = next((unit for suffix, unit in UNITS.items() if name.endswith(suffix)), "number")
    return f"{unit} {_range(name, field)}".strip()


def _range(name: str, field: FieldInfo) -> str:
    bounds: dict[type, Any] = {type(item): item for item in field.metadata}
    low = f"from {number(name, bounds[Ge].ge)}" if Ge in bounds else f"above {bounds[Gt].gt}" if Gt in bounds else ""
    high = f"to {number(name, bounds[Le].le)}" if Le in bounds else ""
    return f"{low} {high}".strip()


def number(name: str, value: float) -> str:
    """A number with the unit that the end of its key's name implies."""
    if name.endswith("_bytes_per_s"):
        return format_rate(int(value)) if value else "0"
    if name.endswith("_bytes"):
        return format_size(int(value))
    text = f"{value:,.0f}" if value == int(value) else f"{value:g}"
    return next((f"{text} {unit}" for unit in ("ms", "s") if name.endswith(f"_{unit}")), text)


def default(name: str, field: FieldInfo) -> str:
    """The default as TOML writes it; "–" where the key is not set."""
    value = field.default
    if value is None:
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, int | float):
        text = number(name, value).replace(",", "").replace(" ", "")
        return f'`"{text}"`' if text[-1].isalpha() else f"`{text}`"
    if isinstance(value, tuple) and not isinstance(value, Address):
        return f"`{json.dumps(value)}`"
    return f'`"{value}"`'


def section_table(section: str, model: type[BaseModel]) -> str:
    """One section: what it is for and all of its keys."""
    texts = field_texts(model)
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        row = (f"`{name}`", kind(name, field), default(name, field), meaning(section, name, texts))
        lines.append(f"| {' | '.join(row)} |")
    about = inspect.cleandoc(model.__doc__ or "").replace("``", "`").partition(": ")[2]
    head = [f"### `[{section}]`", "", f"{about[:1].upper()}{about[1:]}", ""] if about else [f"### `[{section}]`", ""]
    return "\n".join([*head, *lines])


def models() -> dict[str, type[BaseModel]]:
    """The sections and their models."""
    found: dict[str, Any] = {name: field.annotation for name, field in Config.model_fields.items()}
    return found


def sections() -> str:
    """Every section but the parameters of migrations."""
    return "\n\n".join(section_table(name, model) for name, model in models().items() if name != "migration")


def parameters() -> str:
    """The parameters of migrations, with their names elsewhere."""
    model = models()["migration"]
    texts = field_texts(model)
    options = {option.parameter.field: option for option in parameter_options().values()}
    lines = [
        "| key, and option of `migratectl` | value | default | on the control socket | meaning |",
        "|---|---|---|---|---|",
    ]
    for name, field in model.model_fields.items():
        option = options[name]
        names = f"`{name}` `--{option.name}`"
        row = (names, kind(name, field), default(name, field), f"`{option.parameter.argument.name}`")
        lines.append(f"| {' | '.join(row)} | {meaning('migration', name, texts)} |")
    return "\n".join(lines)


BLOCKS: Final[Blocks] = {"sections": sections, "parameters": parameters}


if __name__ == "__main__":
    sys.exit(main(DOCUMENT, BLOCKS))
