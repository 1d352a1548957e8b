"""The arguments of each command, as declared data. A request is checked against them before anything happens, and the
same declarations answer ``x-migrated-schema``. Migration parameters get their QMP names and units here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args, get_origin

from annotated_types import Ge, Le
from pydantic import ValidationError

from migrated.control.operations import OperationError
from migrated.settings.parameters import MigrationParameters
from protocol.wrong_values import fault

JsonType = Literal["string", "integer", "number", "boolean", "object", "array"]

_PYTHON_TYPES: Final[dict[JsonType, type | tuple[type, ...]]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "object": dict,
    "array": list,
}
_JSON_TYPES: Final[dict[type, JsonType]] = {bool: "boolean", int: "integer", float: "number"}
_ARTICLES: Final = {"integer": "an integer", "number": "a number"}
_MAX_INTEGER: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a command. ``values`` are the only ones accepted, when given."""

    name: str
    type: JsonType
    doc: str
    required: bool = False
    values: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """For ``x-migrated-schema``."""
        values = {"values": list(self.values)} if self.values else {}
        return {"name": self.name, "type": self.type, "required": self.required, "doc": self.doc, **values}


def check_arguments(arguments: Mapping[str, object], declared: Sequence[Argument]) -> None:
    """Check names and types of a command's arguments.

    Raises:
        OperationError: with QEMU's sentence for the first fault.
    """
    known = {argument.name: argument for argument in declared}
    for name in arguments:
        if name not in known:
            raise OperationError(f"Parameter '{name}' is unexpected")
    for argument in declared:
        if argument.name not in arguments:
            if argument.required:
                raise OperationError(f"Parameter '{argument.name}' is missing")
            continue
        value = arguments[argument.name]
        fits = isinstance(value, _PYTHON_TYPES[argument.type])
        # Python's bool is an int; JSON's is not. And no integer of QMP is wider than 64 bits.
        if isinstance(value, int):
            fits &= isinstance(value, bool) == (argument.type == "boolean") and abs(value) <= _MAX_INTEGER
        if not fits:
            raise OperationError(f"Invalid parameter type for '{argument.name}', expected: {argument.type}")
        if not _holds_text(value):
            raise OperationError(f"Parameter '{argument.name}' holds a character that no text has")
        if argument.values and value not in argument.values:
            accepted = ", ".join(argument.values)
            raise OperationError(f"Parameter '{argument.name}' does not accept value '{value}'; it accepts {accepted}")


def _holds_text(value: object) -> bool:
    """Whether all strings in a JSON value are text."""
    match value:
        case str():
            return _is_text(value)
        case list():
            return all(map(_holds_text, value))
        case dict():
            return all(_holds_text(key) and _holds_text(item) for key, item in value.items())
    return True


def _is_text(value: str) -> bool:
    """Whether a string is text: no half of a surrogate pair, which JSON can write, and no zero byte."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


QEMU_NAMES: Final[dict[str, str]] = {
    "downtime_limit_ms": "downtime-limit",
    "switchover_limit_ms": "switchover-limit",
    "max_bandwidth_bytes_per_s": "max-bandwidth",
    "max_time_jump_ms": "max-time-jump",
    "max_time_error_ms": "max-time-error",
    "channels": "multifd-channels",
    "compression": "multifd-compression",
    "compression_level": "multifd-zstd-level",
}
"""Where QEMU has the same parameter, its name stands (units are the same), and what belongs beside it is named alike;
every other one is the field's own name."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One field of MigrationParameters as QMP sees it; ``minimum`` and ``maximum`` are in the unit of the name."""

    field: str
    argument: Argument
    default: object
    minimum: float | None
    maximum: float | None

    def document(self) -> dict[str, Any]:
        """For ``x-migrated-schema``."""
        bounds = {"minimum": self.minimum, "maximum": self.maximum}
        return {
            **self.argument.document(),
            "default": self.default,
            **{name: value for name, value in bounds.items() if value is not None},
        }


def _parameter(name: str) -> Parameter:
    field = MigrationParameters.model_fields[name]
    annotation: Any = field.annotation
    values = get_args(annotation) if get_origin(annotation) is Literal else ()
    json_type: JsonType = "string" if values else _JSON_TYPES[annotation]
    bounds: dict[type, Any] = {type(item): item for item in field.metadata}
    return Parameter(
        name,
        Argument(QEMU_NAMES.get(name, name.replace("_", "-")), json_type, field.description or name, values=values),
        field.default,
        bounds[Ge].ge if Ge in bounds else None,
        bounds[Le].le if Le in bounds else None,
    )


PARAMETERS: Final[dict[str, Parameter]] = {
    parameter.argument.name: parameter for parameter in map(_parameter, MigrationParameters.model_fields)
}
"""Every migration parameter, by its QMP name."""
PARAMETER_ARGUMENTS: Final = tuple(parameter.argument for parameter in PARAMETERS.values())


def parameter_values(arguments: Mapping[str, Any], current: MigrationParameters) -> dict[str, object]:
    """The migration parameters among ``arguments`` (QMP names), as fields of MigrationParameters.

    The set is checked whole, on top of ``current``, before the caller applies any of it.

    Raises:
        OperationError: a value is out of range, or the values do not go together.
    """
    values = {PARAMETERS[name].field: value for name, value in arguments.items() if name in PARAMETERS}
    try:
        checked = MigrationParameters.model_validate({**current.model_dump(), **values})
    except ValidationError as error:
        raise OperationError(_sentence(error)) from None
    return {field: getattr(checked, field) for field in values}


def parameter_document(parameters: MigrationParameters) -> dict[str, Any]:
    """All parameters by their QMP names; whole numbers as JSON integers, as QEMU's clients expect."""
    fields = parameters.model_dump()
    return {name: _integral(fields[parameter.field]) for name, parameter in PARAMETERS.items()}


def _integral(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _sentence(error: ValidationError) -> str:
    details = error.errors(include_url=False)[0]
    parameter = next((p for p in PARAMETERS.values() if details["loc"][:1] == (p.field,)), None)
    if parameter is None:
        return fault(details)
    if parameter.minimum is None or parameter.maximum is None:
        return f"Parameter '{parameter.argument.name}' {fault(details)}"
    return (
        f"Parameter '{parameter.argument.name}' expects {_ARTICLES[parameter.argument.type]} in the range of "
        f"{_integral(parameter.minimum)} to {_integral(parameter.maximum)}, not {details['input']}"
    )
