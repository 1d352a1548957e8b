"""A simulated guest process: memory, devices and a clock that only move while it runs, and a mark whenever it ran.

It knows nothing of daemons and outlives them. Its requests take time and are carried out even when the daemon that
made them is gone. ``Estate`` is what an observer who sees both hosts at once checks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from scripts.proof.kernel import Call, Host, World

WORDS: Final = 512
GUEST_FREQ: Final = 2_100_000_000


@dataclass
class Estate:
    """The truth about the guest, over both hosts.

    Attributes:
        running: hosts on which the guest runs now.
        locked: hosts whose guest process holds the ownership lock. It fences nothing: that would hide what goes wrong.
        held_ns: how long the switchover that is under way was held.
        stopped_memory, stopped_states: what it was when it was last stopped.
        stopped_true_ns, ran_true_ns: when the last stop was asked for and when it last began to run.
        runs: (host, epoch) of every time it ran, in order.
    """

    world: World
    running: set[str] = field(default_factory=set)
    locked: set[str] = field(default_factory=set)
    held_ns: int = 0
    stopped_memory: npt.NDArray[np.uint64] | None = None
    stopped_states: dict[str, bytes] = field(default_factory=dict)
    stop_asked_ns: int = 0
    ran_true_ns: int = 0
    runs: list[tuple[str, int]] = field(default_factory=list)


class Vmm:
    """One guest process on one host.

    Args:
        host: where it is.
        estate: the truth.
        pages: size of its memory.
        devices: names of its devices, with what saving and loading each costs (ns of true time).
        costs: what stopping and resuming cost (ns of true time).
        writes_per_s: pages that the guest writes while it runs.
    """

    def __init__(
        self,
        host: Host,
        estate: Estate,
        pages: int,
        devices: dict[str, tuple[int, int]],
        costs: tuple[int, int],
        writes_per_s: int,
    ) -> None:
        self.host = host
        self.world = host.world
        self.estate = estate
        self.devices = devices
        self.stop_cost_ns, self.resume_cost_ns = costs
        self.state: Literal["running", "paused", "dead"] = "paused"
        self.memory: npt.NDArray[np.uint64] = np.zeros((pages, WORDS), np.uint64)
        self.states: dict[str, bytes] = {}
        self.dirty: set[int] = set()
        self.boot_hrtime = 0
        self.ran_hrtime = 0
        self.on_death: Call = lambda: None
        self.resume_fails = False
        self._writes_per_s = writes_per_s
        self._advanced_ns = 0
        self._busy_until_ns = {"vcpus": 0, "devices": 0}

    def request(self, lane: Literal["vcpus", "devices"], cost_ns: int, deed: Call, reply: Call) -> None:
        """Carry something out behind what was asked for before on the same lane, and answer. A resume does not wait
        for a device that is being saved. A process that died answers too: its socket breaks."""
        at_ns = self._busy_until_ns[lane] = max(self._busy_until_ns[lane], self.world.now_ns) + cost_ns

        def carry_out() -> None:
            if self.state != "dead":
                deed()
            reply()

        self.world.after(at_ns - self.world.now_ns, carry_out)

    def pause(self, reply: Call) -> None:
        """Stop the vCPUs."""
        self.request("vcpus", self.stop_cost_ns, self._pause, reply)

    def resume(self, epoch: int, reply: Call) -> None:
        """Let the vCPUs run, unless they do."""
        self.request("vcpus", self.resume_cost_ns, lambda: self._resume(epoch), reply)

    def begin(self, epoch: int) -> None:
        """Run at once: the guest's first boot."""
        self.take_lock()
        self._run(epoch)

    def take_lock(self) -> None:
        """Take the ownership lock."""
        self.estate.locked.add(self.host.name)
        self.world.require(len(self.estate.locked) == 1, "I8: both sides need the ownership lock at once")

    def release_lock(self) -> bool:
        """Let go of the ownership lock. Returns False for a guest that runs: it keeps its lock."""
        if self.state == "running":
            return False
        self.estate.locked.discard(self.host.name)
        return True

    def die(self, who: str) -> None:
        """The process is gone."""
        if self.state != "dead":
            self.world.say(who, "the VMM is gone")
            self.estate.running.discard(self.host.name)
            self.estate.locked.discard(self.host.name)
            self.state = "dead"
            self.on_death()

    def collect(self) -> list[int]:
        """Read and clear the dirty log."""
        self._advance()
        pages, self.dirty = sorted(self.dirty), set()
        return pages

    def _pause(self) -> None:
        if self.state == "running":
            self._advance()
            self.state = "paused"
            self.estate.running.discard(self.host.name)
            self.estate.stopped_memory = self.memory.copy()
            self.estate.stopped_states = dict(self.states)
            self.world.say(self.host.name, "the guest is stopped")

    def _resume(self, epoch: int) -> None:
        if not self.resume_fails:
            self._run(epoch)

    def _run(self, epoch: int) -> None:
        if self.state == "running":
            return
        estate, world, name = self.estate, self.world, self.host.name
        estate.runs.append((name, epoch))
        world.require(not estate.running, f"I1: the guest begins to run on the {name} while it runs on the other side")
        world.require(name in estate.locked, f"I8: the guest runs on the {name} without its ownership lock")
        if estate.stopped_memory is not None:
            same = np.array_equal(self.memory, estate.stopped_memory) and self.states == estate.stopped_states
            world.require(same, f"I4: the guest that begins to run on the {name} is not as it was when it stopped")
        estate.running.add(name)
        estate.ran_true_ns = world.now_ns
        self.ran_hrtime = self.host.clock_ns()
        self.state = "running"
        self._advanced_ns = world.now_ns
        world.say(name, "the guest runs")

    def _advance(self) -> None:
        """Make up for the writes since the last look."""
        if self.state != "running":
            return
        elapsed_ns = self.world.now_ns - self._advanced_ns
        writes = min(4 * len(self.memory), elapsed_ns * self._writes_per_s // 1_000_000_000)
        if writes:
            self._advanced_ns = self.world.now_ns
            rng = self.world.random
            for _ in range(writes):
                page = rng.randrange(len(self.memory))
                self.memory[page] = 0 if rng.random() < 0.1 else rng.getrandbits(64)
                self.dirty.add(page)
            for name in self.devices:
                self.states[name] = rng.randbytes(64)
