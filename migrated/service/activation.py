"""Takes over the listening socket that a service manager passes to the daemon (socket activation, sd_listen_fds(3))."""

from __future__ import annotations

import os
import socket
from typing import Final

FIRST_FD: Final = 3
_VARIABLES: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


class ActivationError(Exception):
    """The sockets that the service manager passed cannot be used."""


def inherited_socket() -> socket.socket | None:
    """The socket that was passed to this process, None when none was. Guests, which are children, inherit neither it
    nor the variables that announce it.

    Raises:
        ActivationError: the service manager passed something else than one listening TCP socket.
    """
    announced = {name: os.environ.get(name, "") for name in _VARIABLES}
    if announced["LISTEN_PID"] != str(os.getpid()):
        return None
    for name in _VARIABLES:
        os.environ.pop(name, None)
    count = int(announced["LISTEN_FDS"]) if announced["LISTEN_FDS"].isdecimal() else 0
    if count == 0:
        return None
    try:
        for fd in range(FIRST_FD, FIRST_FD + count):
            os.set_inheritable(fd, False)  # systemd passes it open across an exec
        if count == 1 and _listens(sock := socket.socket(fileno=FIRST_FD)):
            return sock
    except OSError as error:
        raise ActivationError(
            f"LISTEN_FDS announces {count} sockets from the service manager that are not there ({error.strerror}); "
            "start the daemon by its unit"
        ) from error
    raise ActivationError(
        f"the service manager passed {count} sockets and not one listening TCP socket; give the .socket unit one "
        "ListenStream=HOST:PORT and no Accept=yes"
    )


def _listens(sock: socket.socket) -> bool:
    return (
        sock.family in (socket.AF_INET, socket.AF_INET6)
        and sock.type == socket.SOCK_STREAM
        and bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    )
