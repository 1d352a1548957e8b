"""Giving up privileges: who cannot be become is told before anything changes; what is kept is what was asked for."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable

import pytest

from migrated.kernel.privileges import NUMBERS, keep_only, permitted
from migrated.service.user import UserError, give_up_privileges
from migrated.settings.config import Config, ProcessConfig

USER = pwd.getpwnam("nobody")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def config_of(user: str) -> Config:
    return Config(process=ProcessConfig(user=user))


def in_child(call: Callable[[], str]) -> str:
    """What a call says in a process of its own, which may lose its privileges."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            said = call()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.parametrize(
    ("user", "sentence"),
    [
        ("no-such-user", "[process] user names 'no-such-user', who does not exist"),
        ("4294967294", "[process] user names '4294967294', who does not exist"),
        ("root", "[process] user is root: name a user without privileges"),
        ("0", "[process] user is root: name a user without privileges"),
    ],
)
def test_a_user_that_cannot_be_is_told(user: str, sentence: str) -> None:
    with pytest.raises(UserError) as told:
        give_up_privileges(config_of(user))
    assert str(told.value).startswith(sentence)


@needs_root
def test_who_is_not_root_cannot_become_somebody_else() -> None:
    def become_another() -> str:
        os.setresuid(1, 1, 1)
        give_up_privileges(config_of(USER.pw_name))
        return "it did"

    said = in_child(become_another)
    assert said.startswith("UserError: the daemon runs as user 1 and cannot become nobody ([process] user)")


@needs_root
def test_who_is_the_user_already_stays_it() -> None:
    def stay() -> str:
        os.setresuid(USER.pw_uid, USER.pw_uid, USER.pw_uid)
        give_up_privileges(config_of(str(USER.pw_uid)))
        return f"{os.getresuid()} {permitted()}"

    assert in_child(stay) == f"{(USER.pw_uid,) * 3} 0"


@needs_root
def test_only_the_capabilities_that_were_asked_for_are_kept() -> None:
    def keep() -> str:
        keep_only(["CAP_SYS_PTRACE"])
        keep_only(["CAP_SYS_PTRACE", "CAP_SYS_NICE"])  # what is gone does not come back
        return str(permitted())

    assert in_child(keep) == str(1 << NUMBERS["CAP_SYS_PTRACE"])
