"""Two hosts with a link of a given rate between them: network namespaces, joined by a pair of virtual interfaces whose
queues the kernel shapes. Needs root and iproute2.

    with Network("1gbit") as network:
        with Pair(network=network) as pair: ...
"""

from __future__ import annotations

import os
import shutil
import subprocess
from types import TracebackType
from typing import Final, Self

_ADDRESSES: Final = ("10.83.0.1", "10.83.0.2")


class Network:
    """Two namespaces, and the address of each host in its own.

    Args:
        rate: of the link in each direction, as ``tc`` spells it (``1gbit``).
    """

    def __init__(self, rate: str) -> None:
        self.rate = rate
        self.namespaces = (f"migrated-{os.getpid()}-a", f"migrated-{os.getpid()}-b")
        self.addresses = _ADDRESSES

    @staticmethod
    def why_not() -> str | None:
        """Why no such network can be made here, None when one can."""
        if os.geteuid() != 0:
            return "network namespaces need root"
        missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
        return f"{' and '.join(missing)} (iproute2) is missing" if missing else None

    def __enter__(self) -> Self:
        one, other = self.namespaces
        try:
            for namespace in self.namespaces:
                _run("ip", "netns", "add", namespace)
            _run("ip", "link", "add", "link0", "netns", one, "type", "veth", "peer", "name", "link0", "netns", other)
            for namespace, address in zip(self.namespaces, self.addresses, strict=True):
                inside = ("ip", "-n", namespace)
                _run(*inside, "address", "add", f"{address}/24", "dev", "link0")
                _run(*inside, "link", "set", "lo", "up")
                _run(*inside, "link", "set", "link0", "up")
                _run(
                    "ip", "netns", "exec", namespace, "tc", "qdisc", "add", "dev", "link0", "root", "tbf",
                    "rate", self.rate, "burst", "1mb", "latency", "20ms",
                )  # fmt: skip
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for namespace in self.namespaces:
            subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
