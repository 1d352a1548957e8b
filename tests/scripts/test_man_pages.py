"""The manual pages: what the commands and the configuration say, in roff that every reader of manual pages takes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from migrated.cli.daemon import main as migrated
from migrated.cli.migratectl import main as migratectl
from migrated.cli.options import parameter_options
from scripts.documents import man_pages
from scripts.documents.configuration import models
from scripts.documents.roff import roff

PAGES = sorted(man_pages.DIRECTORY.iterdir())

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def shown(page: Path) -> str:
    """A page as roff leaves it when everything but its text is taken away, in one line."""
    text = re.sub(r"\\f[BIR]|\\&|^\.\w+ ?", "", page.read_text(), flags=re.M)
    return " ".join(text.replace("\\-", "-").split())


def test_the_pages_are_current() -> None:
    assert {page.name for page in PAGES} == set(man_pages.PAGES)
    stale = [page.name for page in PAGES if page.read_text() != man_pages.PAGES[page.name]()]
    assert not stale, "run python -m scripts.documents.man_pages --write"


def test_every_command_parameter_and_key_has_its_place() -> None:
    text = {page.name: shown(page) for page in PAGES}
    for name, group in (("migratectl.1", migratectl), ("migrated.8", migrated)):
        for words, command in man_pages.leaves(group):
            assert f"{words} [OPTION...]" in text[name]
            options = [parameter.opts[-1] for parameter in man_pages.parameters_of(command)]
            missing = [option for option in options if option.startswith("--") and option not in text[name]]
            assert not missing, words
    for name in parameter_options():
        assert f"--{name} (" in text["migratectl.1"] or f"--{name}, --no-{name} (" in text["migratectl.1"]
    for section, model in models().items():
        keys = text["migrated.toml.5"].partition(f"[{section}] ")[2]
        for key in model.model_fields:
            assert f"{key} (" in keys


def test_text_becomes_roff() -> None:
    assert roff("a `b-c` \\d\n e") == r"a \fBb\-c\fR \ed e"
    assert roff(".TH is text") == r"\&.TH is text"
    with pytest.raises(ValueError, match="needs a roff escape"):
        roff("snow\N{SNOWMAN}")


@each_page
@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_groff_has_nothing_to_say(page: Path) -> None:
    done = subprocess.run(["groff", "-ww", "-man", "-Tascii", page], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "SEE ALSO" in re.sub(r".\x08|\x1b\[\d+m", "", done.stdout)


@each_page
@pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not installed")
def test_mandoc_has_nothing_to_say(page: Path) -> None:
    told = subprocess.run(["mandoc", "-Tlint", page], capture_output=True, text=True, timeout=60).stdout
    assert [line for line in told.splitlines() if "missing date" not in line] == []
