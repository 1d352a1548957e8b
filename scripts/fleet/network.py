"""Hosts on one switch: network namespaces whose links to it the kernel shapes, and that can be pulled. Needs root and
iproute2.

    with Switch("abc", "400mbit") as switch:
        switch.pull("b")        # b is cut off from the others and from etcd, but goes on
        switch.plug("b")
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

_NET: Final = "10.84.0"


class Switch:
    """A bridge on this machine with a namespace for each host.

    Args:
        names: of the hosts.
        rate: of each host's link in each direction, as ``tc`` spells it.
    """

    def __init__(self, names: Sequence[str], rate: str) -> None:
        self._rate = rate
        self._bridge = f"mf{os.getpid()}"
        self._names = list(names)

    def namespace(self, name: str) -> str:
        """The namespace of a host."""
        return f"{self._bridge}-{name}"

    def address(self, name: str) -> str:
        """The address of a host."""
        return f"{_NET}.{self._names.index(name) + 1}"

    def enter(self, name: str) -> list[str]:
        """The words that run a command in a host's namespace."""
        return ["ip", "netns", "exec", self.namespace(name)]

    def pull(self, name: str) -> None:
        """Cut a host off."""
        _run("ip", "link", "set", self._port(name), "down")

    def plug(self, name: str) -> None:
        """Connect it again."""
        _run("ip", "link", "set", self._port(name), "up")

    def _port(self, name: str) -> str:
        return f"{self._bridge}{name}"

    def __enter__(self) -> Self:
        try:
            _run("ip", "link", "add", self._bridge, "type", "bridge")
            _run("ip", "address", "add", f"{_NET}.254/24", "dev", self._bridge)
            _run("ip", "link", "set", self._bridge, "up")
            for name in self._names:
                self._add(name)
        except BaseException:
            self._remove()
            raise
        return self

    def _add(self, name: str) -> None:
        namespace, port = self.namespace(name), self._port(name)
        inside = ("ip", "-n", namespace)
        _run("ip", "netns", "add", namespace)
        _run("ip", "link", "add", port, "type", "veth", "peer", "name", "link0", "netns", namespace)
        _run("ip", "link", "set", port, "master", self._bridge, "up")
        _run(*inside, "address", "add", f"{self.address(name)}/24", "dev", "link0")
        _run(*inside, "link", "set", "lo", "up")
        _run(*inside, "link", "set", "link0", "up")
        shape = ("root", "tbf", "rate", self._rate, "burst", "1mb", "latency", "20ms")
        _run("ip", "netns", "exec", namespace, "tc", "qdisc", "add", "dev", "link0", *shape)
        _run("tc", "qdisc", "add", "dev", port, *shape)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", self.namespace(name)], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", self._bridge], check=False, capture_output=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
