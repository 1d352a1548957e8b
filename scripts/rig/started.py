"""What rigs that are started and closed have in common: whoever enters one finds it running; it ends with the block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Started(ABC):
    """Runs from ``with`` on until the end of its block; a start that fails leaves nothing running."""

    @abstractmethod
    def start(self) -> None:
        """Start everything and wait until it can be used."""

    @abstractmethod
    def close(self) -> None:
        """End everything that was started, and remove its files."""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
