"""How fast a daemon answers while it works: a thread that asks it for its version again and again."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Final

PING_S: Final = 0.001


class Pinger(threading.Thread):
    """Asks a daemon for its version, once a millisecond or more seldom, until it is stopped.

    Args:
        path: its control socket.
        every_s: from an answer to the next question.
    """

    def __init__(self, path: Path, every_s: float = PING_S) -> None:
        super().__init__(daemon=True)
        self._every_s = every_s
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(path))
        self._replies = self._connection.makefile("rb")
        self._replies.readline()  # the greeting
        self._ask("qmp_capabilities")
        self._ending = False
        self.answers_ms: list[float] = []
        self.wakes_ms: list[float] = []
        """How much longer than asked for it slept between its questions."""

    def _ask(self, command: str) -> None:
        self._connection.sendall(json.dumps({"execute": command}).encode() + b"\n")
        while b'"event"' in self._replies.readline():
            pass

    def run(self) -> None:
        while not self._ending:
            begin = time.perf_counter()
            self._ask("query-version")
            answered = time.perf_counter()
            self.answers_ms.append((answered - begin) * 1e3)
            time.sleep(self._every_s)
            self.wakes_ms.append((time.perf_counter() - answered - self._every_s) * 1e3)

    def stop(self) -> None:
        """End it."""
        self._ending = True
        self.join()
        self._connection.close()
