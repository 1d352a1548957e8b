"""The one error of the rig."""

from __future__ import annotations


class RigError(Exception):
    """The rig cannot go on; the sentence says what is missing or did not happen."""
