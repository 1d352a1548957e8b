"""Shell completion as somebody sees it who presses Tab: in a real bash, zsh and fish, against a real daemon."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.rig.pair import Pair
from scripts.rig.terminal import Terminal

BIN = Path(sys.executable).parent
INTERACTIVE = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], ""),
    "zsh": (["zsh", "-f", "-i"], "autoload -Uz compinit && compinit -u -D; "),
}
"""Shells that complete at a terminal only: their command, and what completion needs first."""


@pytest.fixture
async def expected(pair: Pair) -> dict[str, str]:
    """What is typed behind ``migratectl``, and what Tab makes of its last word."""
    await pair.a.create_guest("frontend", 16)
    record = await pair.a.migrate("frontend", "tcp:127.0.0.1:1")
    migration_id = record["migration_id"]
    return {
        "gue": "guest",
        "guest cre": "create",
        "cont": "continue",
        "migrate fron": "frontend",
        f"--socket {pair.a.socket} guest show fr": "frontend",
        "migrate frontend tcp:127.0.0.1:1 --downtime-li": "--downtime-limit",
        "migrate frontend tcp:127.0.0.1:1 --on-timeout fo": "force",
        "history --outcome can": "cancelled",
        f"show {migration_id[:8]}": migration_id,
    }


def environment(pair: Pair) -> dict[str, str]:
    """What a shell needs to find our commands and the daemon."""
    return {"PATH": f"{BIN}:{os.environ['PATH']}", "MIGRATED_SOCKET": str(pair.a.socket), "PS1": "ready> "}


def in_a_terminal(shell: str, environment: dict[str, str], expected: dict[str, str]) -> None:
    """Type each line, press Tab, and read what the shell makes of it."""
    command, before = INTERACTIVE[shell]
    with Terminal(command, environment) as terminal:
        terminal.read_until("ready> ")
        terminal.press(f'{before}eval "$(migratectl completion {shell})" && echo the completion is "loaded"\n')
        terminal.read_until("the completion is loaded\n.*ready> ")
        for typed, completed in expected.items():
            terminal.press(f"migratectl {typed}\t")
            shown = terminal.read_until(re.escape(completed) + " ")
            assert "\n" not in shown, f"there is one completion of {typed!r}"
            terminal.press("\x15")  # deletes the line


def in_fish(environment: dict[str, str], expected: dict[str, str]) -> None:
    """Let fish say what Tab would offer."""
    lines = ["migratectl completion fish | source", *(f'complete -C "migratectl {typed}"' for typed in expected)]
    done = subprocess.run(
        ["fish", "--no-config", "-c", "; echo; ".join(lines)],
        capture_output=True, text=True, timeout=120, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.stderr == ""
    offered = [line.partition("\t")[0] for line in done.stdout.splitlines() if line]
    assert offered == list(expected.values())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
async def test_tab_completes(shell: str, pair: Pair, expected: dict[str, str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    if shell == "fish":
        await asyncio.to_thread(in_fish, environment(pair), expected)
    else:
        await asyncio.to_thread(in_a_terminal, shell, environment(pair), expected)
