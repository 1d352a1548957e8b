"""README and docs/ are true: links lead somewhere, commands exist, and the sentences of failures are the code's."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from migrated.cli.daemon import main as migrated
from migrated.cli.migratectl import main as migratectl

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
COMMANDS: dict[str, click.Command] = {"migrated": migrated, "migratectl": migratectl}
PACKAGES = ("migrated", "protocol", "vmm_sim")


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = document.parent / path if path else document
        headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M) if anchor else []
        if not file.exists() or (anchor and anchor not in map(slug, headings)):
            broken.append(target)
    assert not broken


def written_commands(text: str) -> Iterator[list[str]]:
    """Every command of ours in a code block or between backticks, as words."""
    blocks = re.findall(r"^(?: {4}|```\n)(.+)$", text, re.M) + re.findall(r"`([^`\n]+)`", text)
    for line in blocks:
        bare = re.sub(r"^(\$ )?(\w+=\S+ )*(\.venv/bin/)?", "", line.strip())
        if re.match(rf"({'|'.join(COMMANDS)}) \S", bare):
            yield shlex.split(bare.partition(" #")[0].rstrip("& "))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_their_options_exist(document: Path) -> None:
    for name, *words in written_commands(document.read_text(encoding="utf-8")):
        command = COMMANDS[name]
        context = click.Context(command)
        while isinstance(command, click.Group):
            group_options = {option for parameter in command.params for option in parameter.opts}
            chosen = next((word for word in words if word not in group_options), None)
            assert chosen is not None, f"{document.name}: {name} {' '.join(words)}"
            assert chosen in command.commands, f"{document.name}: {name} {' '.join(words)}"
            words.remove(chosen)
            command = command.commands[chosen]
            context = click.Context(command, parent=context)
        known = {option for parameter in command.get_params(context) for option in parameter.opts}
        given = {word.partition("=")[0] for word in words if word.startswith("-") and len(word) > 1}
        assert given <= known, f"{document.name}: {name} {command.name} has no {', '.join(given - known)}"


def texts_of(node: ast.AST) -> Iterator[str]:
    """Every string below a node; what a format string fills in is a zero byte."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in inner.values)
        elif isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield inner.value


def documented_sentences() -> list[str]:
    """The first column of the tables under "When it fails"."""
    text = (REPOSITORY / "docs" / "operators.md").read_text(encoding="utf-8")
    section = text.partition("\n## When it fails\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?`) \| .+ \|$", section, re.M)
    return [sentence for row in rows for sentence in re.findall(r"`([^`]+)`", row)]


@pytest.fixture(scope="module")
def code_texts() -> set[str]:
    """All strings of the packages."""
    files = [path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")]
    return {text for path in files for text in texts_of(ast.parse(path.read_text(encoding="utf-8")))}


def test_failures_are_documented() -> None:
    assert len(documented_sentences()) > 50


def pattern_of(sentence: str) -> re.Pattern[str]:
    """What the code says where a documented sentence has its fixed parts."""
    pieces = [re.escape(piece.strip(" :;,.()'")) for piece in sentence.split("…")]
    return re.compile(".*".join(piece for piece in pieces if piece), re.DOTALL)


@pytest.mark.parametrize("sentence", documented_sentences())
def test_a_documented_failure_is_what_the_code_says(sentence: str, code_texts: set[str]) -> None:
    pattern = pattern_of(sentence)
    assert any(pattern.search(text) for text in code_texts), f"nothing in the code says {sentence!r}"


FAILURES = {
    "ActivationError", "ControlSocketError", "DaemonUnreachableError", "HistoryError", "JournalError", "LinkLostError",
    "MigrationError", "OperationError", "RecordNotFoundError", "RefusedError", "StartError", "UnknownGuestError",
    "VmmError", "VmmGoneError", "VmmSilentError", "log.error", "log.warning",
}  # fmt: skip
"""What carries a sentence to the operator. A broken protocol (RemoteProtocolError) has one row for all of its."""

ONLY_WHAT_IS_FILLED_IN = {"\0: \0", "\0:\0: \0", "\0", "parameter \0: \0", "Migration \0"}
"""Sentences that another one makes."""


def failures_of_the_code() -> set[str]:
    """The first text of every failure that the daemons raise or log."""
    found = set()
    for path in (REPOSITORY / "migrated").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args and ast.unparse(node.func) in FAILURES:
                found |= {text for text in list(texts_of(node.args[0]))[:1] if text not in ONLY_WHAT_IS_FILLED_IN}
    return found


@pytest.mark.parametrize("text", sorted(failures_of_the_code()))
def test_what_the_code_says_of_a_failure_is_documented(text: str) -> None:
    said = text.replace("\0", "…")
    assert any(pattern_of(sentence).search(text) for sentence in documented_sentences()), f"explain: {said}"
