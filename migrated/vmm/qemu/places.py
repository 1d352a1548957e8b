"""The driver's file on each of its guests, beside the guest's socket, from which a restarted daemon finds the guest and
knows whether it ran.

    NAME.sock     the QMP socket, or a link to the one of a QEMU that somebody else started
    NAME.place    this record
    NAME.agent    the socket of its guest agent's port, where its definition gives it one
    NAME.runlog   QEMU's own log of its run state (-trace vm_state_notify)
    NAME.log      what QEMU says on its error output
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any, Final

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from migrated.base.errors import VmmError

log = structlog.get_logger()

_ROOM_BYTES: Final = 4096
_RUNS: Final = re.compile(rb"\bvm_state_notify running 1\b")


class Place(BaseModel):
    """The record of one guest.

    Attributes:
        name: of the guest.
        started_here: this driver started its QEMU; otherwise somebody else did.
        run_log: QEMU's log of its run state, None where it keeps none.
        agent: the socket of its guest agent, where that shall set the guest's clock after a move; else None.
        incoming: it was started empty and has not been resumed since.
        epoch: that of the last resume that was asked for; 0 before the first.
        run_log_bytes: how long the run log was before that.
        private_view: its memory was handed over by another QEMU and is mapped privately until it is resumed.
        published: what it wrote meanwhile goes into that memory since its last resume was asked for. The daemon that
            began that can put everything back, a later one cannot: for it the guest counts as one that ran.
        state_bytes: what its device state weighed when it was last saved; 0 before.
        disks_released: its QEMU has let go of its disks, or has not opened them yet: it does so when it is resumed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    started_here: bool
    run_log: Path | None = None
    agent: Path | None = None
    incoming: bool = False
    epoch: int = 0
    run_log_bytes: int = 0
    private_view: bool = False
    published: bool = False
    state_bytes: int = 0
    disks_released: bool = False


def place_path(api_socket: Path) -> Path:
    """Return the path of a guest's file."""
    return api_socket.with_suffix(".place")


def agent_path(api_socket: Path) -> Path:
    """The socket at which the port of its guest agent listens, if its definition gives it one."""
    return api_socket.with_suffix(".agent")


def read_place(api_socket: Path) -> Place:
    """The record of the guest behind a socket.

    Raises:
        VmmError: there is none, or it cannot be used.
    """
    path = place_path(api_socket)
    try:
        return Place.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise VmmError(
            f"the record {path} of a QEMU guest cannot be used ({error}); adopt the guest anew: remove {api_socket} "
            "and "
            "'migratectl guest adopt'"
        ) from error


def write_place(api_socket: Path, place: Place) -> None:
    """Replace the record, whole or not at all, whenever this process is killed.

    In place where it fits: a guest stands still while this is written, and a busy file system may take its time for a
    new name. One write of a page is not cut short by a kill; white space fills it up.

    Raises:
        VmmError: it cannot be written.
    """
    path = place_path(api_socket)
    text = place.model_dump_json().encode()
    text += b" " * (-len(text) % _ROOM_BYTES)
    try:
        if len(text) == _ROOM_BYTES and path.exists() and path.stat().st_size == _ROOM_BYTES:
            with path.open("r+b", buffering=0) as file:
                file.write(text)
            return
        fresh = path.with_suffix(".place.new")
        fresh.write_bytes(text)
        os.replace(fresh, path)
    except OSError as error:
        raise VmmError(f"the record {path} of a QEMU guest cannot be written: {error.strerror}") from error


class PlaceFile:
    """The record of one guest that is connected: what is known now, and its file.

    Args:
        api_socket: of the guest.
        place: what the file holds.
    """

    def __init__(self, api_socket: Path, place: Place) -> None:
        self.known = place
        self._api_socket = api_socket

    def change(self, **changes: Any) -> None:
        """Change some of it.

        Raises:
            VmmError: it cannot be written; this daemon goes by it all the same.
        """
        self.known = self.known.model_copy(update=changes)
        write_place(self._api_socket, self.known)

    def change_if_possible(self, **changes: Any) -> None:
        """Change what nobody must wait for, nor a guest be kept from running for want of it."""
        try:
            self.change(**changes)
        except VmmError as error:
            log.warning("the guest goes on all the same", guest=self.known.name, reason=str(error))


def log_size(run_log: Path | None) -> int:
    """Return the present length of a run log (bytes), 0 where there is none."""
    try:
        return run_log.stat().st_size if run_log is not None else 0
    except OSError:
        return 0


def ran_after(run_log: Path | None, offset: int) -> bool | None:
    """Whether vCPUs ran since the run log was ``offset`` bytes long; None where it does not tell: there is none, it
    cannot be read, or what was in it has been taken away."""
    if run_log is None:
        return None
    try:
        with run_log.open("rb") as file:
            if file.seek(0, os.SEEK_END) < offset:
                return None
            file.seek(offset)
            return _RUNS.search(file.read()) is not None
    except OSError:
        return None


def somebody_listens(api_socket: Path) -> bool:
    """Whether a process listens on a guest's socket, whatever else it does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.setblocking(False)
        try:
            stream.connect(str(api_socket))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True  # its queue is full, or it may not be asked
    return True


def forget(api_socket: Path) -> None:
    """Remove what was kept of a guest whose process has ended, but for its logs."""
    api_socket.unlink(missing_ok=True)
    place_path(api_socket).unlink(missing_ok=True)
    agent_path(api_socket).unlink(missing_ok=True)
