"""Sequences of frames that are almost right, against a real daemon with TLS: see ``scripts/hostile/machine``.

    python -m scripts.almost_right --sequences 500 --steps 30 --seed 1

A sequence that breaks something is made as short as it can be and told on stderr; the last line on stdout is one JSON
object: ``{"sequences", "seconds", "held"}``. Exit code 1 when something broke.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from scripts.basics import say
from scripts.hostile.beside import create_honest, migrate_honest
from scripts.hostile.ground import prepared
from scripts.hostile.machine import AlmostRight, Arena


@contextlib.contextmanager
def arena() -> Iterator[Arena]:
    """A daemon to talk to, for as long as the block runs."""
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        ground = runner.run(stack.enter_async_context(prepared(patient=True)))
        try:
            runner.run(create_honest(ground))
            runner.run(migrate_honest(ground))
            yield Arena(runner, ground, ground.pair.b.anonymous_bytes())
        finally:
            runner.run(stack.aclose())


def play(found: Arena, sequences: int, steps: int, seed: int) -> None:
    """Play sequences against a daemon.

    Args:
        found: where.
        sequences: how many.
        steps: of each, at most.
        seed: decides them.
    """
    chosen = settings(
        max_examples=sequences, stateful_step_count=steps, deadline=None, database=None, print_blob=False,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    AlmostRight.arena = found
    run_state_machine_as_test(hypothesis.seed(seed)(AlmostRight), settings=chosen)


def main() -> int:
    """Play as many as were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=200, help="how many (default %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="of each, at most (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="decides them (default %(default)s)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # daemons and guests must not outlive a run that is ended
    begin_s, held = time.monotonic(), True
    with arena() as found:
        try:
            play(found, options.sequences, options.steps, options.seed)
        except Exception as error:
            held = False
            say(f"{error!r}\n{found.ground.pair.log_tail()}")
    print(json.dumps({"sequences": options.sequences, "seconds": round(time.monotonic() - begin_s, 1), "held": held}))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
