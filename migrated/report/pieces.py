"""Pieces that the sections of a report share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from migrated.report.fields import NOTHING, grouped
from migrated.report.markup import Markup, Node, el, join

SIDES: Final = ("source", "link", "destination")
UNATTRIBUTED: Final = "unattributed"


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


def table(label: str, heads: Sequence[str], rows: Sequence[Sequence[Node]], words: Sequence[int] = ()) -> Markup:
    """A table that scrolls by itself where the page is too narrow. ``words`` are columns of text besides the first."""
    align = ["" if index == 0 or index in words else "figure" for index in range(len(heads))]
    top = el("tr", *(el("th", head, scope="col", class_=look or None) for head, look in zip(heads, align, strict=True)))
    body = [
        el(
            "tr",
            *(
                el("th", cell, scope="row") if index == 0 else el("td", cell, class_=look or None)
                for index, (cell, look) in enumerate(zip(row, align, strict=True))
            ),
        )
        for row in rows
    ]
    inner = el("table", el("thead", top), el("tbody", *body))
    return el("div", inner, class_="scroll", tabindex=0, role="region", aria_label=label)


def share(part: int, whole: int) -> str:
    """A part in percent, one decimal."""
    return f"{part / whole * 100:.1f} %" if whole else NOTHING


def signed(value: int) -> str:
    """A change, with its sign."""
    return f"+{grouped(value)}" if value > 0 else grouped(value)
