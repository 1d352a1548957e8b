"""Values on the command line: sizes, rates, durations, key=value pairs, and migration parameters as options.

The options for migration parameters come from the model itself, so a parameter that is added there is an option here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import click

from protocol.units import (
    UnitError,
    format_duration_ns,
    format_rate,
    format_size,
    parse_duration_ns,
    parse_rate,
    parse_size,
)

if TYPE_CHECKING:
    from migrated.control.schema import Parameter

    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # generic only in the newest click


class UnitValue(ParamType):
    """A number with a unit, as protocol.units reads and writes them.

    Args:
        name: of the quantity, for help.
        parse: returns the bare number of a text.
        show: returns a bare number as a text, for people.
    """

    def __init__(self, name: str, parse: Callable[[str], float], show: Callable[[float], str]) -> None:
        self.name = name
        self._parse = parse
        self.show = show

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


def _duration(unit_ns: int) -> UnitValue:
    """A duration whose bare number counts ``unit_ns``."""
    return UnitValue(
        "duration",
        lambda text: parse_duration_ns(text) / unit_ns,
        lambda value: format_duration_ns(round(value * unit_ns)),
    )


SIZE: Final = UnitValue("size", parse_size, lambda value: format_size(int(value)))
RATE: Final = UnitValue("rate", parse_rate, lambda value: format_rate(int(value)))
NANOSECONDS: Final = UnitValue("duration", parse_duration_ns, lambda value: format_duration_ns(int(value)))
MILLISECONDS: Final = _duration(1_000_000)
SECONDS: Final = _duration(1_000_000_000)

_SUFFIXES: Final = (("_bytes_per_s", RATE), ("_bytes", SIZE), ("_ms", MILLISECONDS), ("_s", SECONDS))


@dataclass(frozen=True, slots=True)
class ParameterOption:
    """A migration parameter on the command line: its name without unit, as the unit is part of the value."""

    name: str
    type: ParamType
    parameter: Parameter

    def check(self, value: float | bool | str, called: str) -> None:
        """See that a value is in the parameter's range.

        Args:
            called: what the operator wrote the parameter as.

        Raises:
            click.UsageError: it is not.
        """
        least, most = self.parameter.minimum, self.parameter.maximum
        if least is None or most is None or isinstance(value, str) or least <= value <= most:
            return
        show = self.type.show if isinstance(self.type, UnitValue) else "{:g}".format
        raise click.UsageError(f"{called} must be from {show(least)} to {show(most)}, not {show(value)}.")


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
            option.check(value, f"--{option.name}")
            given[option.parameter.argument.name] = value
    return given


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
            value = option.type.convert(text, None, None)
        except click.BadParameter as error:
            raise click.UsageError(f"{key}: {error.message}") from None
        option.check(value, key)
        given[option.parameter.argument.name] = value
    return given


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
