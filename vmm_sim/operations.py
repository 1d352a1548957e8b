"""The saves and loads that are running: each can be interrupted, and a resume waits until none is left."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from vmm_sim.errors import VmmError


class Operations:
    """Running operations, each with the event that interrupts it."""

    def __init__(self) -> None:
        self._running: set[threading.Event] = set()
        self._changed = threading.Condition()
        self._closed = False

    @contextmanager
    def one(self) -> Iterator[threading.Event]:
        """Run one operation; yields its interrupt. Raises VmmError Interrupted while a resume is under way."""
        interrupt = threading.Event()
        with self._changed:
            if self._closed:
                raise VmmError("Interrupted", "The guest is being resumed: nothing can be saved or loaded now.")
            self._running.add(interrupt)
        try:
            yield interrupt
        finally:
            with self._changed:
                self._running.discard(interrupt)
                self._changed.notify_all()

    @contextmanager
    def none(self) -> Iterator[None]:
        """Interrupt what runs, wait until it has ended, and let nothing else start meanwhile."""
        with self._changed:
            self._closed = True
            for interrupt in self._running:
                interrupt.set()
            self._changed.wait_for(lambda: not self._running)
        try:
            yield
        finally:
            with self._changed:
                self._closed = False

    def interrupt(self) -> int:
        """Interrupt what runs; returns how many."""
        with self._changed:
            for interrupt in self._running:
                interrupt.set()
            return len(self._running)
