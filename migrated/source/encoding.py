"""How a batch of pages travels: plain, compressed, or as the difference to what was sent before.

An encoding is chosen per batch by what it gains on that batch; a batch that does not gain travels plain.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from protocol.messages import Encoding
from protocol.pages import Indices


@dataclass(slots=True)
class EncodingTotals:
    """What one encoding did: batches, bytes of pages in, bytes of payload out, time spent encoding."""

    batches: int = 0
    page_bytes: int = 0
    wire_bytes: int = 0
    ns: int = 0

    def add(self, other: EncodingTotals) -> None:
        """Sum up."""
        self.batches += other.batches
        self.page_bytes += other.page_bytes
        self.wire_bytes += other.wire_bytes
        self.ns += other.ns


class BatchEncoder:
    """The plain encoder: pages as they are."""

    def encode(self, indices: Indices, pages: npt.NDArray[np.uint64]) -> tuple[Encoding, list[memoryview]]:
        """Encode one batch.

        Args:
            indices: page numbers, shape (n,).
            pages: their contents, shape (n, 512), contiguous; valid until the next call.

        Returns:
            The encoding's name and the payload as byte views.
        """
        return "plain", [pages.data.cast("B")]
