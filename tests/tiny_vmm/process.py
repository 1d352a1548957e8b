"""A very small VMM: one process, private memory, a workload, and one block of state that only it understands.

It answers one request for each connection to its socket, a line of JSON each way. Step s of the guest writes s into
word s mod 512 of page s * 7919 mod pages, so what memory must hold follows from the number of steps.
"""

from __future__ import annotations

import argparse
import base64
import json
import mmap
import os
import socketserver
import struct
import threading
import time
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from migrated.kernel import pagemap, userfault

WORDS: Final = 512
_STRIDE: Final = 7919
_STEPS_AT_ONCE: Final = 16
_PAUSE_S: Final = 0.002
_STATE: Final = struct.Struct("<4sQ")
_MAGIC: Final = b"tiny"


class Guest:
    """Memory, one vCPU thread, and the number of steps that it has done."""

    def __init__(self, pages: int, state: str) -> None:
        self.pages = pages
        self.state = state
        self.epoch = 0
        self.steps = 0
        self._mapping = mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._words: npt.NDArray[np.uint64] = np.frombuffer(self._mapping, np.uint64).reshape(pages, WORDS)
        self._life = threading.Lock()
        """Held by whoever runs the guest for some steps, or changes its state."""
        self._uffd = -1
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._life:
                if self.state == "running":
                    for _ in range(_STEPS_AT_ONCE):
                        self.steps += 1
                        self._words[self.steps * _STRIDE % self.pages, self.steps % WORDS] = self.steps
            time.sleep(_PAUSE_S)

    def status(self) -> dict[str, Any]:
        return {"state": self.state, "pid": os.getpid(), "epoch": self.epoch, "steps": self.steps}

    def memory(self) -> dict[str, Any]:
        return {"address": self._words.ctypes.data, "pages": self.pages}

    def track(self) -> dict[str, Any]:
        """Let the kernel note writes from here on."""
        self._uffd = userfault.open_userfaultfd()
        userfault.enable_write_tracking(self._uffd)
        begin, size = self._words.ctypes.data, self._words.nbytes
        userfault.register(self._uffd, begin, size)
        fd = os.open("/proc/self/pagemap", os.O_RDONLY)
        try:
            pagemap.protect(fd, begin, begin + size)
        finally:
            os.close(fd)
        return self.memory()

    def untrack(self) -> dict[str, Any]:
        if self._uffd >= 0:
            os.close(self._uffd)
            self._uffd = -1
        return {}

    def pause(self) -> dict[str, Any]:
        with self._life:
            self.state = "paused"
        return {}

    def resume(self, epoch: int) -> dict[str, Any]:
        with self._life:
            self.state, self.epoch = "running", epoch
            return {"running_at_ns": time.monotonic_ns()}

    def save(self) -> dict[str, Any]:
        return {"state": base64.b64encode(_STATE.pack(_MAGIC, self.steps)).decode()}

    def load(self, state: str) -> dict[str, Any]:
        magic, self.steps = _STATE.unpack(base64.b64decode(state))
        if magic != _MAGIC:
            raise ValueError("this is no state of a tiny guest")
        return {}

    def verify(self) -> dict[str, Any]:
        """Compare memory with what so many steps make of it."""
        with self._life:
            steps = np.arange(1, self.steps + 1)
            expected = np.zeros((self.pages, WORDS), np.uint64)
            expected[steps * _STRIDE % self.pages, steps % WORDS] = steps  # later steps overwrite earlier ones
            wrong = np.flatnonzero((expected != self._words).any(axis=1))
        found = f"pages {wrong.tolist()} are not" if len(wrong) else f"all {self.pages} pages are"
        message = f"{found} as step {self.steps} leaves them"
        return {"ok": not len(wrong), "message": message, "wrong_pages": wrong.tolist(), "steps": self.steps}


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        request = json.loads(self.rfile.readline())
        operation = request.pop("op")
        server: Any = self.server
        if operation == "destroy":
            os._exit(0)
        try:
            answer = {"ok": getattr(server.guest, operation)(**request)}
        except Exception as error:  # whatever went wrong, whoever asked is told
            answer = {"error": f"{type(error).__name__}: {error}"}
        self.wfile.write(json.dumps(answer).encode() + b"\n")


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    guest: Guest


def main() -> None:
    """Serve one guest until it is destroyed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--pages", type=int, required=True)
    parser.add_argument("--state", choices=["running", "paused", "incoming"], required=True)
    arguments = parser.parse_args()
    with _Server(arguments.socket, _Handler) as server:
        server.guest = Guest(arguments.pages, arguments.state)
        server.serve_forever()


if __name__ == "__main__":
    main()
