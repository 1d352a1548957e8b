"""Two whole endpoints on a virtual network in virtual time: one seed is one story with its faults, checked throughout.

    seed -> hosts, clocks, link, guest, budget, faults -> attempts until one completes -> everything healed and settled

What is checked is what an observer sees who looks at both hosts at once: the rules of the explorer on real bytes, and
what needs a clock: budget, deadlines, the destination's count, the downtime interval, the elapsed time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocol.handover import DestinationEvent, SourceEvent, SourceState
from protocol.messages import FrameType, Limits
from scripts.proof.destination_endpoint import DestinationDaemon
from scripts.proof.guest import Estate, Vmm
from scripts.proof.kernel import MS, SECOND, BrokenRuleError, Call, Host, World
from scripts.proof.model import Model
from scripts.proof.network import Link
from scripts.proof.source_endpoint import SourceDaemon, Wish

FAULTY_NS: Final = 40 * SECOND
"""No fault begins or lasts beyond this."""
END_NS: Final = 400 * SECOND
US: Final = 1_000
HANDOVER_FRAMES: Final = (
    ("source", FrameType.STATE_END),
    ("source", FrameType.COMMIT),
    ("source", FrameType.COMMIT),
    ("source", FrameType.ABORT),
    ("source", FrameType.OUTCOME_ASK),
    ("destination", FrameType.READY),
    ("destination", FrameType.READY),
    ("destination", FrameType.NO),
    ("destination", FrameType.RUNNING),
    ("destination", FrameType.RUNNING),
    ("destination", FrameType.DISCARDED),
)
OTHER_FRAMES: Final = (
    ("source", FrameType.HELLO),
    ("source", FrameType.JOIN),
    ("source", FrameType.ROUND_END),
    ("source", FrameType.DOWNTIME),
    ("source", FrameType.TIME_DATA),
    ("source", FrameType.DEVICE_STATE),
    ("destination", FrameType.WELCOME),
    ("destination", FrameType.ROUND_DONE),
    ("destination", FrameType.TIME_ASK),
)


@dataclass(frozen=True)
class Outcome:
    """How a seed ended. ``broken`` is the rule that does not hold, empty if all do."""

    seed: int
    broken: str
    completed: bool
    attempts: int
    faults: int
    in_doubt: bool
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"seed {self.seed}: {self.broken or 'every rule holds'}", *self.lines])


class Simulation:
    """One seed.

    Args:
        seed: decides everything.
        model: the rules; a mutant may take their place.
    """

    def __init__(self, seed: int, model: Model) -> None:
        self.seed = seed
        self.world = world = World(seed)
        rng = world.random
        self._faults = 0
        self._vmm_died = False
        latency_ns = world.between(50 * US, 20 * MS)
        self.link = Link(world, latency_ns, latency_ns // 4 + 1, world.between(20 << 20, 2 << 30))
        hosts = [
            Host(world, name, rng.randrange(10**12, 10**15), rng.randrange(-100_000, 100_000))
            for name in ("source", "destination")
        ]
        self.estate = Estate(world)
        pages = rng.randrange(8, 33)
        devices = {
            f"device{number}": (world.between(10 * US, 50 * MS), world.between(10 * US, 80 * MS))
            for number in range(rng.randrange(4))
        }
        costs = (world.between(100 * US, 10 * MS), world.between(100 * US, 20 * MS))
        writes_per_s = world.between(10, 5_000)

        def build(host: Host) -> Vmm:
            return Vmm(host, self.estate, pages, devices, costs, writes_per_s)

        vmm = build(hosts[0])
        vmm.boot_hrtime = hosts[0].clock_ns() - 5 * SECOND
        for page in range(0, pages, 2):
            vmm.memory[page] = rng.getrandbits(64)
        vmm.states = {name: rng.randbytes(64) for name in devices}
        self.destination = DestinationDaemon(
            hosts[1],
            lambda: build(hosts[1]),
            lambda: self.estate.runs,
            lambda: self.source.exported_true_ns,
            model,
        )
        self.source = SourceDaemon(hosts[0], self.link, vmm, self.destination.listener, model)
        vmm.begin(0)
        self.source.boot()
        self.destination.boot()

    def run(self) -> Outcome:
        """Play it to the end."""
        broken, completed = "", False
        try:
            self._plan_faults()
            completed = self._play()
            self._check_end(completed)
        except BrokenRuleError as error:
            broken = str(error)
        except Exception as error:
            error.add_note(f"in seed {self.seed} after {self.world.now_ns} ns")
            raise
        in_doubt = any(line.endswith("in doubt") for line in self.world.lines)
        return Outcome(
            self.seed,
            broken,
            completed,
            len(self.source.journal),
            self._faults,
            in_doubt,
            tuple(self.world.lines),
        )

    # Section: the story

    def _play(self) -> bool:
        """Migrate until it worked, the guest is gone, or nothing more may go wrong. Returns whether it worked."""
        world, rng = self.world, self.world.random
        while world.now_ns < END_NS:
            calm = world.now_ns >= FAULTY_NS
            if self.source.vmm.state == "dead":
                world.run(world.now_ns + 60 * SECOND)
                return "destination" in self.estate.running
            self._begin(calm)
            world.run(END_NS, self._source_settled)
            world.require(self._source_settled(), "L1: the source did not come to an end")
            if self._source_state() is SourceState.RETIRED:
                world.run(world.now_ns + SECOND)
                return True
            if calm and self._refused() is False and self._vmm_died is False:
                world.require(False, "L1: an attempt without any fault did not complete")
            world.run(world.now_ns + world.between(10 * MS, 15 * SECOND if rng.random() < 0.5 else 100 * MS))
        world.require(False, "L1: the guest could not be migrated in all the time")
        return False

    def _begin(self, calm: bool) -> None:
        """Begin an attempt once the source's daemon lives."""
        world, rng = self.world, self.world.random
        world.run(END_NS, lambda: self.source.process is not None and self.source.process.alive)
        budget_ns = 10 * SECOND if calm else world.between(5 * MS, 500 * MS)
        tolerance_ns = rng.choice((0, 0, world.between(1 * MS, 50 * MS)))
        enforced = rng.random() < 0.9
        limits = Limits(downtime_limit_ns=budget_ns, switchover_limit_ns=tolerance_ns, switchover_abort=enforced)
        # Halved or doubled, and now and then enforced otherwise; not drawn, so that older seeds keep their course.
        offered = Limits(
            downtime_limit_ns=budget_ns // 2 if budget_ns % 2 else budget_ns * 2,
            switchover_limit_ns=tolerance_ns,
            switchover_abort=enforced if budget_ns % 3 else not enforced,
        )
        hold_ns = 0 if calm or budget_ns % 7 else 2 * budget_ns
        channels, rounds = rng.randrange(1, 4), rng.randrange(1, 5)
        self.source.migrate(Wish(limits, offered, channels, rounds, hold_ns))

    def _source_state(self) -> SourceState:
        current = self.source.current
        return current.state if current is not None else SourceState.ABORTED

    def _source_settled(self) -> bool:
        current, process = self.source.current, self.source.process
        if process is None or not process.alive or self.world.now_ns < process.frozen_until_ns:
            return False
        return current is None or (current.idle and current.state in (SourceState.ABORTED, SourceState.RETIRED))

    def _refused(self) -> bool:
        """Whether the last attempt was refused because the destination still held the one before."""
        return any("with this name is here" in line for line in self.world.lines[-3:])

    def _check_end(self, completed: bool) -> None:
        """Nothing is left over: exactly one guest, and both sides know it."""
        world = self.world
        world.run(max(world.now_ns, FAULTY_NS) + 60 * SECOND)
        runs = self.estate.running
        if self._vmm_died:
            world.require(len(runs) <= 1, "I1: both sides run the guest")
            return
        world.require(runs == ({"destination"} if completed else {"source"}), f"L1: the guest runs on {sorted(runs)}")
        for incoming in self.destination.known.values():
            world.require(incoming.final and incoming.idle, f"L1: the destination ends as {incoming.state}")
        hosts_that_ran = [host for host, _ in self.estate.runs]
        if completed:
            world.require(hosts_that_ran.count("destination") == 1, "the destination ran the guest more than once")
            world.require(hosts_that_ran[-1] == "destination", "I3: the source ran an older copy of the guest")

    # Section: faults

    def _plan_faults(self) -> None:
        """Most faults wait for a frame of the hand-over: that is where timing matters."""
        rng = self.world.random
        for _ in range(rng.choice((0, 1, 1, 2, 2, 3))):
            fault = self._any_fault()
            if rng.random() < 0.15:
                self.world.after(self.world.between(MS, 2 * SECOND), fault)
                continue
            frame = rng.choice(HANDOVER_FRAMES if rng.random() < 0.8 else OTHER_FRAMES)
            self.link.on_frame.setdefault(frame, []).append(fault if rng.random() < 0.4 else self._behind(fault))

    def _behind(self, fault: Call) -> Call:
        """A moment later: while the frame is on its way, or what it causes is under way."""
        delay_ns = self.world.between(1 * US, 30 * MS)
        return lambda: self.world.after(delay_ns, fault)

    def _any_fault(self) -> Call:
        """A fault, and often another one behind it."""
        world, rng = self.world, self.world.random
        last_ns = world.between(1 * MS, FAULTY_NS // 2)
        host = rng.choice(("source", "destination"))
        kinds: list[tuple[int, str, Call]] = [
            (4, f"the {host} cannot be heard for {last_ns / MS:.1f} ms", lambda: self.link.cut(host, last_ns)),
            (4, f"the link is cut for {last_ns / MS:.1f} ms", lambda: self._cut(last_ns)),
            (4, "every connection is reset", self.link.reset),
            (2, f"what the {host} sends next is damaged", lambda: self.link.damage.add(host)),
            (8, f"the {host}'s daemon is killed for {last_ns / MS:.1f} ms", lambda: self._kill(host, last_ns)),
            (3, f"the {host}'s daemon is frozen for {last_ns / MS:.1f} ms", lambda: self._freeze(host, last_ns)),
            (3, f"the {host}'s disk is full for {last_ns / MS:.1f} ms", lambda: self._fill(host, last_ns)),
            (3, f"the {host} is cancelled", lambda: self._tell(SourceEvent.CANCEL, DestinationEvent.CANCEL, host)),
            (3, f"the {host} has a fault", lambda: self._tell(SourceEvent.FAULT, DestinationEvent.FAULT, host)),
            (1, f"the {host}'s VMM dies", lambda: self._kill_vmm(host)),
            (2, "the destination's VMM cannot resume", self._refuse_resume),
        ]
        (kind,) = rng.choices(kinds, weights=[weight for weight, _, _ in kinds])
        another = self._any_fault() if rng.random() < 0.4 else None
        pause_ns = world.between(10 * US, 15 * SECOND)

        def strike() -> None:
            if world.now_ns >= FAULTY_NS // 2:
                return
            self._faults += 1
            world.say("fault", kind[1])
            kind[2]()
            if another is not None:
                world.after(pause_ns, another)

        return strike

    def _tell(self, source_event: SourceEvent, destination_event: DestinationEvent, host: str) -> None:
        """An event that comes from outside the protocol."""
        if host == "source":
            current = self.source.current
            if current is not None:
                current.process.wake(lambda: current.take(source_event, current.control))
            return
        for incoming in self.destination.known.values():
            incoming.process.wake(lambda incoming=incoming: incoming.take(destination_event, incoming.control))  # type: ignore[misc]  # bound per attempt

    def _cut(self, last_ns: int) -> None:
        self.link.cut("source", last_ns)
        self.link.cut("destination", last_ns)

    def _daemon(self, host: str) -> SourceDaemon | DestinationDaemon:
        return self.source if host == "source" else self.destination

    def _kill(self, host: str, last_ns: int) -> None:
        daemon = self._daemon(host)
        process = daemon.process
        if process is None or not process.alive:
            return
        process.alive = False
        for end in self.link.connections:
            if end.process is process:
                end.close()

        def boot() -> None:
            self.world.say(host, "the daemon is back")
            daemon.boot()

        self.world.after(last_ns, boot)

    def _freeze(self, host: str, last_ns: int) -> None:
        process = self._daemon(host).process
        if process is not None:
            process.freeze(last_ns)

    def _fill(self, host: str, last_ns: int) -> None:
        self._daemon(host).host.disk_full = True
        self.world.after(last_ns, lambda: setattr(self._daemon(host).host, "disk_full", False))

    def _kill_vmm(self, host: str) -> None:
        vmm = self._daemon(host).vmm
        if vmm is not None:
            self._vmm_died = True
            vmm.die(host)

    def _refuse_resume(self) -> None:
        if self.destination.vmm is not None:
            self.destination.vmm.resume_fails = True


def simulate(seed: int, model: Model | None = None) -> Outcome:
    """Play one seed, by the real rules if no others are given."""
    return Simulation(seed, model or Model()).run()
