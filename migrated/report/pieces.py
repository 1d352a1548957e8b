"""Pieces that the sections of a report share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from migrated.record.terms import SIDES
from migrated.report.fields import NOTHING, grouped
from migrated.report.markup import Markup, Node, el, join

UNATTRIBUTED: Final = "unattributed"
MANY_ROWS: Final = 24
"""A longer table scrolls within a frame of its own."""


@dataclass(frozen=True, slots=True)
class Section:
    """A titled part of the page. ``name`` is its anchor."""

    name: str
    title: str
    body: Markup

    def render(self) -> Markup:
        """The section as HTML."""
        return el("section", el("h2", self.title), self.body, id=self.name)


def section(name: str, title: str, *body: Node) -> Section:
    """A section of these pieces."""
    return Section(name, title, join(body))


def contents(sections: Sequence[Section]) -> Markup:
    """Links to the sections."""
    links = [el("a", section.title, href=f"#{section.name}") for section in sections]
    return el("nav", *links, aria_label="Sections")


def note(*words: Node) -> Markup:
    """A remark beneath a drawing."""
    return el("p", *words, class_="note")


def zoom_hint() -> Markup:
    """A remark on zooming, which only the page's script makes visible."""
    return el("p", "Choose a bar to enlarge its stretch of time.", class_="note scripted", hidden=True)


def chip(side: str, shown: Node) -> Markup:
    """A side, in its colour and in words."""
    return el("span", shown, class_=f"chip {side}")


def legend() -> Markup:
    """The colours of the sides."""
    return el(
        "p", join([chip(side, side) for side in SIDES], " "), " ", chip(UNATTRIBUTED, UNATTRIBUTED), class_="legend"
    )


def facts_list(facts: Sequence[tuple[Node, Node]]) -> Markup:
    """Names and values."""
    return el("dl", *(el("div", el("dt", name), el("dd", value)) for name, value in facts), class_="facts")


def table(label: str, heads: Sequence[str], rows: Sequence[Sequence[Node]], beneath: Sequence[Node] = ()) -> Markup:
    """A table of figures that scrolls by itself where the page is too narrow.

    Args:
        label: the table's text alternative.
        heads: of the columns; the first column names the row.
        rows: the cells.
        beneath: a remark under each row, or nothing.
    """
    top = el("tr", *(el("th", head, scope="col", class_="figure" if i else None) for i, head in enumerate(heads)))
    body = []
    for index, (name, *cells) in enumerate(rows):
        body.append(el("tr", el("th", name, scope="row"), *(el("td", cell, class_="figure") for cell in cells)))
        if beneath:
            body.append(el("tr", el("td", beneath[index], colspan=len(heads)), class_="remark"))
    inner = el("table", el("thead", top), el("tbody", *body))
    return el(
        "div",
        inner,
        class_="scroll tall" if len(rows) > MANY_ROWS else "scroll",
        tabindex=0,
        role="region",
        aria_label=label,
    )


def share(part: int, whole: int) -> str:
    """A part in percent, one decimal."""
    return f"{part / whole * 100:.1f} %" if whole else NOTHING


def signed(value: int) -> str:
    """A change, with its sign."""
    return f"+{grouped(value)}" if value > 0 else grouped(value)
