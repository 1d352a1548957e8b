"""Tells the service manager how the daemon is (sd_notify); does nothing where no service manager asks."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Mapping
from typing import Final, Self

WATCHDOG_SHARE: Final = 0.5
"""Feed the watchdog after this share of its interval (sd_watchdog_enabled(3))."""


class Notifier:
    """The notification socket of the service manager. Sending never blocks and never fails the daemon."""

    def __init__(self, address: str | None, watchdog_s: float | None = None) -> None:
        self._address = "\0" + address[1:] if address and address.startswith("@") else address
        self._watchdog_s = watchdog_s

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Build the notifier that ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID`` ask for."""
        environment = os.environ if environment is None else environment
        interval_us = environment.get("WATCHDOG_USEC", "")
        asked = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        watchdog_s = int(interval_us) / 1e6 if interval_us.isdecimal() and asked else None
        return cls(environment.get("NOTIFY_SOCKET") or None, watchdog_s)

    def ready(self, status: str) -> None:
        """The daemon serves."""
        self._send(f"READY=1\nSTATUS={_line(status)}")

    def reloading(self) -> None:
        """The daemon reads its configuration again; ``ready`` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def status(self, status: str) -> None:
        """One line for ``systemctl status``."""
        self._send(f"STATUS={_line(status)}")

    def stopping(self, status: str) -> None:
        """The daemon begins its orderly stop."""
        self._send(f"STOPPING=1\nSTATUS={_line(status)}")

    async def feed_watchdog(self) -> None:
        """Feed the watchdog from the event loop for ever, so that a stuck loop gets the daemon restarted; returns at
        once where none is asked for."""
        if self._watchdog_s is None or self._address is None:
            return
        while True:
            self._send("WATCHDOG=1")
            await asyncio.sleep(self._watchdog_s * WATCHDOG_SHARE)

    def _send(self, message: str) -> None:
        if self._address is None:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            try:
                sock.sendto(message.encode(), self._address)
            except OSError:
                return  # a manager that is gone or does not read must not take the daemon with it


def _line(text: str) -> str:
    return text.replace("\n", " ")
