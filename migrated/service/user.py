"""The user that the daemon goes on as once it has bound its address: what needs root is done before, the rest is done
without it.

    read the configuration, open the log, bind [listen] address    as whoever started the daemon
    make directories that are missing                              root, for the user
    everything else: certificates, journal, guests                 [process] user, with [process] capabilities
"""

from __future__ import annotations

import contextlib
import os
import pwd
import resource
from collections.abc import Iterator
from pathlib import Path

import structlog

from migrated.kernel.privileges import become, clear_ambient, keep_only
from migrated.settings.config import Config

log = structlog.get_logger()


class UserError(Exception):
    """The daemon cannot go on as the user of the configuration; the sentence says why."""


def give_up_privileges(config: Config) -> None:
    """Go on as ``[process] user`` with the capabilities that are listed there. Without one nothing is given up; guests
    get none of the daemon's ambient capabilities all the same. Call it before threads are started that need any.

    Raises:
        UserError: there is no such user, or this process may not become it.
    """
    name, capabilities = config.process.user, config.process.capabilities
    user = None if name is None else _user(name)
    try:
        if user is None:
            clear_ambient()
        elif os.geteuid() == user.pw_uid:
            keep_only(capabilities)
        else:
            for directory in _directories(config):
                _make_for(directory, user)
            _lift_memory_lock()
            become(user.pw_name, user.pw_uid, user.pw_gid, capabilities)
    except OSError as error:
        raise UserError(f"privileges cannot be given up ([process] user): {error.strerror or error}") from error
    if user is not None:
        log.info("privileges are given up", user=user.pw_name, capabilities=sorted(capabilities))


def _user(name: str) -> pwd.struct_passwd:
    """The user of a name or number, whom this process is or may become.

    Raises:
        UserError: there is none.
    """
    try:
        user = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except KeyError as error:
        raise UserError(f"[process] user names {name!r}, who does not exist; name a user of this host") from error
    if user.pw_uid == 0:
        raise UserError("[process] user is root: name a user without privileges, or take it out")
    if os.geteuid() not in (0, user.pw_uid):
        raise UserError(
            f"the daemon runs as user {os.geteuid()} and cannot become {user.pw_name} ([process] user): start it as "
            f"root, or as {user.pw_name}"
        )
    return user


def _directories(config: Config) -> Iterator[Path]:
    """The directories that a daemon makes when they are missing."""
    yield config.control.socket.parent
    yield config.state.directory
    yield config.vmm.directory
    if config.listen.unix is not None:
        yield config.listen.unix.parent
    if config.lock.directory is not None:
        yield config.lock.directory


def _make_for(directory: Path, user: pwd.struct_passwd) -> None:
    """Make the first part of a path that is missing, for the user, who can make the rest. Below a directory of the
    user's nothing is made: root does not act where others may change what it acts on."""
    missing = None
    while not directory.exists():
        missing, directory = directory, directory.parent
    if missing is not None and directory.stat().st_uid != user.pw_uid:
        missing.mkdir(mode=0o750)
        os.chown(missing, user.pw_uid, user.pw_gid, follow_symlinks=False)


def _lift_memory_lock() -> None:
    """Let the user lock memory as root may: memory that must not wait for the disk while a guest stands still."""
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    with contextlib.suppress(ValueError):  # root of a container that may not
        resource.setrlimit(resource.RLIMIT_MEMLOCK, unlimited)
