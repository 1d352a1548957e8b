"""The documents that are made from the code say what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.documents import configuration, handover, protocol
from scripts.documents.blocks import Blocks, refreshed


@pytest.mark.parametrize(
    ("name", "document", "blocks"),
    [
        ("protocol", protocol.DOCUMENT, protocol.BLOCKS),
        ("handover", handover.DOCUMENT, handover.BLOCKS),
        ("configuration", configuration.DOCUMENT, configuration.BLOCKS),
    ],
)
def test_the_document_is_current(name: str, document: Path, blocks: Blocks) -> None:
    text = document.read_text(encoding="utf-8")
    assert text == refreshed(text, blocks), f"run python -m scripts.documents.{name} --write"


def test_a_block_is_made_anew_between_its_marks_and_the_rest_stays() -> None:
    text = "before <!-- x begin -->\nold\n<!-- x end --> after"
    assert refreshed(text, {"x": lambda: "new"}) == "before <!-- x begin -->\n\nnew\n\n<!-- x end --> after"


@pytest.mark.parametrize("text", ["nothing", "<!-- x begin -->\n", "<!-- x begin -->\n<!-- x end --><!-- x end -->"])
def test_a_document_without_marks_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must have <!-- x begin --> and <!-- x end --> once each"):
        refreshed(text, {"x": str})
