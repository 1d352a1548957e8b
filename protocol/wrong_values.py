"""What is wrong with a value, in words for whoever wrote it.

pydantic says what it expected of its input. An operator reads the name of a key or an option, so each problem becomes
the rest of a sentence that begins with that name: ``max_incoming must be 1 or more, not 0``.
"""

from __future__ import annotations

from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from protocol.guest import NAME_PATTERN
from protocol.units import format_rate, format_size

_BOUNDS: Final = {
    "greater_than_equal": ("ge", "{} or more"),
    "greater_than": ("gt", "more than {}"),
    "less_than_equal": ("le", "{} or less"),
    "less_than": ("lt", "less than {}"),
}
"""pydantic's kinds of problems with a bound: where the bound stands, and how it is told."""
_KINDS: Final = {
    "string_type": "a string",
    "path_type": "a path, as a string",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a table of keys",
    "model_type": "a table of keys",
}
"""pydantic's kinds of problems with a type, and what the value must be."""
_LONGEST_SHOWN: Final = 80
"""Characters of a wrong value that are shown."""


def fault(problem: ErrorDetails) -> str:
    """What is wrong with one value, as the rest of a sentence that begins with the value's name."""
    kind, about, given = problem["type"], problem.get("ctx", {}), problem["input"]
    name = str(problem["loc"][-1]) if problem["loc"] else ""
    if kind in _BOUNDS:
        which, words = _BOUNDS[kind]
        return f"must be {words.format(_shown(about[which], name))}{_but_is(given, name)}"
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}{_but_is(given, name)}"
    match kind:
        case "missing":
            return "is missing"
        case "extra_forbidden":
            return "is not known here"
        case "literal_error":
            return f"must be {about['expected']}{_but_is(given, name)}"
        case "string_pattern_mismatch" if about["pattern"] == NAME_PATTERN:
            return (
                "must begin with a letter or a digit and have only letters, digits, '_', '.' and '-'"
                f"{_but_is(given, name)}"
            )
        case "string_pattern_mismatch":
            return f"must match {about['pattern']}{_but_is(given, name)}"
        case "string_too_short" if about["min_length"] == 1:
            return "must not be empty"
        case "too_short" if about["min_length"] == 1:
            return "must not be empty"
        case "string_too_long":
            return f"must have {about['max_length']} characters or less{_but_is(given, name)}"
    said = problem["msg"].removeprefix("Value error, ")
    return said.replace("Input should", "should", 1)


def first_fault(error: ValidationError) -> str:
    """The first problem of an error, with the name of the value: ``max_incoming must be 1 or more, not 0``."""
    problem = error.errors(include_url=False)[0]
    place = ".".join(map(str, problem["loc"]))
    # A validator of ours writes a sentence with a subject of its own.
    between = ": " if problem["type"] == "value_error" else " "
    return f"{place}{between}{fault(problem)}" if place else fault(problem)


def _but_is(given: object, name: str) -> str:
    """The value itself, where it is short enough to be recognized by whoever wrote it."""
    return f", not {_shown(given, name)}" if isinstance(given, str | int | float) else ""


def _shown(value: Any, name: str) -> str:
    """A value in the unit that ends its key's name."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return repr(value if len(value) <= _LONGEST_SHOWN else f"{value[:_LONGEST_SHOWN]}...")
    if not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) and name.endswith("_bytes_per_s"):
        return format_rate(value)
    if isinstance(value, int) and name.endswith("_bytes"):
        return format_size(value)
    number = f"{value:.10g}" if isinstance(value, float) else str(value)
    unit = next((unit for unit in ("ms", "ns", "us", "s") if name.endswith(f"_{unit}")), None)
    return number if unit is None else f"{number} {unit}"
