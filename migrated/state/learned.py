"""Keeps what the predictor learned in the state directory, so that a restarted daemon need not start over."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import structlog

from migrated import prediction
from migrated.prediction.knowledge import Knowledge
from migrated.prediction.prior import Prior

log = structlog.get_logger()


def load_prior() -> Prior:
    """The table that ships with the package: what is assumed while nothing was learned."""
    return Prior.from_document(json.loads(resources.files(prediction).joinpath("prior.json").read_bytes()))


def load_knowledge(directory: Path) -> Knowledge:
    """Read the summary; an unreadable one is put aside and learning begins anew."""
    path = directory / "knowledge.json"
    prior = load_prior()
    try:
        return Knowledge.from_document(json.loads(path.read_bytes()), prior)
    except FileNotFoundError:
        return Knowledge(prior)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("what was learned cannot be read; predictions begin anew", file=str(path), reason=str(error))
        return Knowledge(prior)


def keep_knowledge(directory: Path, knowledge: Knowledge) -> None:
    """Write the summary, whole or not at all. A full disk costs only what was learned since the last time."""
    path = directory / "knowledge.json"
    temporary = path.with_suffix(".new")
    try:
        temporary.write_text(json.dumps(knowledge.document()))
        temporary.replace(path)
    except OSError as error:
        log.error("what was learned cannot be kept", file=str(path), reason=error.strerror)
