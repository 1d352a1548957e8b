"""Colours, figures with their units, and tables, as every view on a terminal uses them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import cycle
from typing import Final, Protocol, TypeVar

from rich import box
from rich.table import Table

from migrated.record.terms import Outcome, Side
from protocol.units import format_duration_ns, format_rate

SHADES: Final = "█▓▒"
"""Neighbours in a bar differ in shade as well as in colour, for those who see none."""
SIDE_COLORS: Final[dict[Side, tuple[str, ...]]] = {
    "source": ("blue", "dodger_blue2", "deep_sky_blue1"),
    "destination": ("green", "green3", "spring_green3"),
    "link": ("magenta", "orchid"),
}
STATUS_STYLES: Final = {
    "completed": "green",
    "failed": "red",
    "cancelled": "yellow",
    "in-doubt": "bold white on red",
    "unresponsive": "bold red",
}
"""The style of a migration's status, or of a guest's state."""
_OUTCOME_STYLES: Final[dict[Outcome, str]] = {"completed": "bold green", "in-doubt": "bold white on red"}


def outcome_style(outcome: Outcome) -> str:
    """The style of an outcome."""
    return _OUTCOME_STYLES.get(outcome, "bold red")


class Sided(Protocol):
    """An object that belongs to one side."""

    @property
    def side(self) -> Side: ...


SidedT = TypeVar("SidedT", bound=Sided)


def colored(parts: Iterable[SidedT]) -> Iterator[tuple[SidedT, str]]:
    """Pair each part with its colour: that of its side, in a shade that differs from a neighbour's of the same side."""
    colors = {side: cycle(choices) for side, choices in SIDE_COLORS.items()}
    for part in parts:
        yield part, next(colors[part.side])


def clean(text: object) -> str:
    """Return a text without control sequences, which a text of another host or a guest could carry to the terminal."""
    return "".join(character if character.isprintable() else "�" for character in str(text))


def duration(value_ns: int | None) -> str:
    """A duration, or a dash."""
    return "-" if value_ns is None else format_duration_ns(round(value_ns))


def milliseconds(value_ns: int | None) -> str:
    """A duration in ms to the microsecond, so that a column lines up; or a dash."""
    return "-" if value_ns is None else f"{value_ns / 1e6:.3f}"


def rate(bytes_per_s: float) -> str:
    """A rate, to a whole byte."""
    return format_rate(round(bytes_per_s))


def new_table(title: str, *columns: str) -> Table:
    """A table; a ``>`` at the end of a column's name aligns it to the right."""
    made = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right = column.endswith(">")
        made.add_column(column.rstrip(">"), justify="right" if right else "left", no_wrap=right)
    return made


def new_facts(title: str) -> Table:
    """A table of names and values; ``add_fact`` adds a row."""
    made = Table(
        title=title or None, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
    )
    made.add_column(style="dim", no_wrap=True)
    made.add_column()
    return made


def add_fact(into: Table, name: str, value: object) -> None:
    """Add a name and its value; both may come from another host."""
    into.add_row(clean(name), clean(value))
