"""Access to the control socket: the kernel says who the client is, and the configuration what that user may do."""

from __future__ import annotations

import contextlib
import grp
import os
import socket
import struct
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Right: TypeAlias = Literal["everything", "looking", "nothing"]

_SO_PEERGROUPS: Final = 59
_GROUPS_BYTES: Final = 1024
"""As much as Python takes from getsockopt: 256 groups."""
_CREDENTIALS: Final = struct.Struct("3i")


class AccessError(Exception):
    """A group of ``[control]`` does not exist."""


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end when it connected: its id, its user and all of its groups."""

    pid: int
    uid: int
    groups: frozenset[int]


def peer_of(connection: socket.socket) -> Peer | None:
    """The process at the other end of a unix socket, None when it is gone already. Of a user in more than 256 groups
    only the first one is known."""
    try:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    except OSError:
        return None
    pid, uid, gid = _CREDENTIALS.unpack(credentials)
    listed = b""
    with contextlib.suppress(OSError):
        listed = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
    return Peer(pid, uid, frozenset((gid, *struct.unpack(f"{len(listed) // 4}I", listed))))


class Access:
    """The rights that ``[control] operators`` and ``readers`` give. Without both, whoever can open the socket may do
    everything.

    Args:
        operators, readers: names or numbers of groups.

    Raises:
        AccessError: there is no such group.
    """

    def __init__(self, operators: str | None = None, readers: str | None = None) -> None:
        self.operators = operators
        self.restricted = operators is not None or readers is not None
        """Whether the socket is open to all, and each client is looked at."""
        self._operators = _gid("operators", operators)
        self._readers = _gid("readers", readers)

    def right_of(self, peer: Peer | None) -> Right:
        """Return the right of a client."""
        if not self.restricted:
            return "everything"
        if peer is None:
            return "nothing"
        if peer.uid in (0, os.geteuid()) or self._operators in peer.groups:
            return "everything"
        return "looking" if self._readers in peer.groups else "nothing"


def _gid(key: str, group: str | None) -> int | None:
    if group is None:
        return None
    try:
        return int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise AccessError(
            f"[control] {key} names the group {group!r}, which does not exist; make it, or name another"
        ) from error
