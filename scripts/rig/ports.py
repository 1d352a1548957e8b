"""Ports for servers that are told where to listen before they run, and ports at which nobody listens."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path
from typing import Final

_FIRST_OWN: Final = 10_000
_CONNECTIONS: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""The ports that the kernel gives to connections, and to servers that leave the choice to it."""


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port of an address of this machine that nobody uses. It is none of those that the kernel gives away, so
    whoever is told of it may take its time, and where nobody takes it nobody answers."""
    end = int(_CONNECTIONS.read_text().split()[0])
    while True:
        port = random.randrange(min(_FIRST_OWN, end // 2), end)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((address, port))
            return port
