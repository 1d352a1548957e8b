"""Keeps what was learned of migrations on this host in the state directory, so that a restarted daemon need not start
over: what predictions learned, and how long resumes took."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog

from migrated import prediction
from migrated.prediction.knowledge import Knowledge
from migrated.prediction.prior import Prior
from migrated.state.whole_files import replace_file
from migrated.vmm.resume_costs import ResumeCosts

log = structlog.get_logger()

_KNOWLEDGE: Final = "knowledge.json"
_RESUME_COSTS: Final = "resume-costs.json"

_writing = threading.Lock()

Learned = TypeVar("Learned")


def load_prior() -> Prior:
    """The table that ships with the package: what is assumed while nothing was learned."""
    return Prior.from_document(json.loads(resources.files(prediction).joinpath("prior.json").read_bytes()))


def load_knowledge(directory: Path) -> Knowledge:
    """Read what predictions learned; where it cannot be read, learning begins anew."""
    prior = load_prior()
    return _read(directory / _KNOWLEDGE, lambda document: Knowledge.from_document(document, prior), Knowledge(prior))


def keep_knowledge(directory: Path, knowledge: Knowledge) -> None:
    """Write what predictions learned. A full disk costs only what was learned since the last time."""
    _write(directory / _KNOWLEDGE, knowledge.document())


def load_resume_costs(directory: Path, guessed_ns: int) -> ResumeCosts:
    """Read how long resumes took on this host; where it cannot be read, measuring begins anew.

    Args:
        guessed_ns: reserve for a guest whose costs are guessed, until a resume was measured (ns).
    """

    def read(document: Mapping[str, Any]) -> ResumeCosts:
        costs = ResumeCosts(guessed_ns)
        costs.read(document)
        return costs

    return _read(directory / _RESUME_COSTS, read, ResumeCosts(guessed_ns))


def keep_resume_costs(directory: Path, document: Mapping[str, Any]) -> None:
    """Write how long resumes took.

    Args:
        document: of ``ResumeCosts``, taken by the caller: threads may write while more is measured.
    """
    _write(directory / _RESUME_COSTS, document)


def _read(path: Path, parse: Callable[[Mapping[str, Any]], Learned], anew: Learned) -> Learned:
    try:
        return parse(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return anew
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("what was learned cannot be read; it begins anew", file=str(path), reason=str(error))
        return anew


def _write(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document, whole or not at all."""
    try:
        with _writing:  # attempts that end at once are kept by threads of their own
            replace_file(path, json.dumps(document))
    except OSError as error:
        log.error("what was learned cannot be kept", file=str(path), reason=error.strerror)
