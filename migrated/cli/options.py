"""Values on the command line: sizes, rates, durations, key=value pairs, and migration parameters as options.

The options for migration parameters come from the model itself, so a parameter that is added there is an option here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import click

from protocol.units import UnitError, parse_duration_ns, parse_rate, parse_size

if TYPE_CHECKING:
    from migrated.control.schema import Parameter

    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # generic only in the newest click


class UnitValue(ParamType):
    """A number with a unit, converted by a parser of protocol.units."""

    def __init__(self, name: str, parse: Callable[[str], float]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The value as a bare number."""
        if not isinstance(value, str):
            raise TypeError(f"{value!r} is no text")
        try:
            return self._parse(value)
        except UnitError as error:
            self.fail(str(error), param, ctx)


class Switch(ParamType):
    """``on`` or ``off``."""

    name = "on|off"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        """The value as a truth value."""
        if value not in ("on", "off"):
            self.fail(f"{value!r} is neither on nor off.", param, ctx)
        return value == "on"


SIZE: Final = UnitValue("size", parse_size)
RATE: Final = UnitValue("rate", parse_rate)
MILLISECONDS: Final = UnitValue("duration", lambda text: parse_duration_ns(text) / 1e6)
SECONDS: Final = UnitValue("duration", lambda text: parse_duration_ns(text) / 1e9)

_SUFFIXES: Final = (("_bytes_per_s", RATE), ("_bytes", SIZE), ("_ms", MILLISECONDS), ("_s", SECONDS))


@dataclass(frozen=True, slots=True)
class ParameterOption:
    """A migration parameter on the command line: its name without unit, as the unit is part of the value."""

    name: str
    type: ParamType
    parameter: Parameter


def parameter_options() -> dict[str, ParameterOption]:
    """All migration parameters, by their name on the command line."""
    from migrated.control.schema import PARAMETERS

    options = (_option(parameter) for parameter in PARAMETERS.values())
    return {option.name: option for option in options}


def _option(parameter: Parameter) -> ParameterOption:
    for suffix, unit in _SUFFIXES:
        if parameter.field.endswith(suffix):
            return ParameterOption(parameter.field.removesuffix(suffix).replace("_", "-"), unit, parameter)
    argument = parameter.argument
    plain: dict[str, ParamType] = {"boolean": Switch(), "integer": click.INT, "number": click.FLOAT}
    kind = click.Choice(argument.values) if argument.values else plain.get(argument.type, click.STRING)
    return ParameterOption(parameter.field.replace("_", "-"), kind, parameter)


class ParameterCommand(click.Command):
    """A command that takes every migration parameter as an option; ``qmp_parameters`` collects the given ones.

    The options are made on first use, because the model behind them takes long to import.
    """

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters, and the migration parameters."""
        extra: list[click.Parameter] = []
        for option in parameter_options().values():
            help_text = option.parameter.argument.doc
            extra.append(click.Option([f"--{option.name}"], type=option.type, help=help_text))
            if option.parameter.argument.type == "boolean":
                off = [f"--no-{option.name}", f"{option.parameter.field}_off"]
                extra.append(click.Option(off, is_flag=True, help=f"The same as --{option.name} off."))
        own = super().get_params(ctx)
        return [*own[:-1], *extra, own[-1]]


def qmp_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """The migration parameters among a command's values, by their QMP names, checked.

    Raises:
        click.UsageError: a value is out of range.
    """
    given: dict[str, Any] = {}
    for option in parameter_options().values():
        value = values.get(option.name.replace("-", "_"))
        if values.get(f"{option.parameter.field}_off"):
            value = False
        if value is not None:
            given[option.parameter.argument.name] = value
    return _checked(given)


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """``key=value`` pairs as migration parameters by their QMP names; keys as the options or as QMP has them.

    Raises:
        click.UsageError: an unknown key, or a value that does not fit it.
    """
    options = parameter_options()
    by_name = {**{option.parameter.argument.name: option for option in options.values()}, **options}
    given: dict[str, Any] = {}
    for key, text in key_values(settings).items():
        option = by_name.get(key)
        if option is None:
            raise click.UsageError(f"There is no parameter {key!r}; there are: {', '.join(options)}.")
        try:
            given[option.parameter.argument.name] = option.type.convert(text, None, None)
        except click.BadParameter as error:
            raise click.UsageError(f"{key}: {error.message}") from None
    return _checked(given)


def key_values(settings: Iterable[str]) -> dict[str, str]:
    """``key=value`` pairs as a mapping.

    Raises:
        click.UsageError: a text without ``=``.
    """
    found: dict[str, str] = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise click.UsageError(f"{setting!r} is not KEY=VALUE.")
        found[key] = value
    return found


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    from migrated.control.operations import OperationError
    from migrated.control.schema import parameter_values
    from migrated.settings.parameters import MigrationParameters

    try:
        parameter_values(given, MigrationParameters())
    except OperationError as error:
        raise click.UsageError(str(error)) from None
    return given
