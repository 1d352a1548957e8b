"""One simulated VMM: guest memory, vCPUs, clock and devices, and the life cycle that ties them together.

    new guest ----> running <---> paused
    incoming: memory (by the daemon), time, devices ----> running or paused

Operations that may take long run in threads of their callers; ``resume`` and ``interrupt`` end them. The module is
longer than others because all operations of the API share one life cycle and its locks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from vmm_sim.clock import GuestClock, HostTsc, parse_time_data
from vmm_sim.config import Costs, DeviceConfig, GuestConfig
from vmm_sim.costs import CostDraws, wait_until
from vmm_sim.description import build_description
from vmm_sim.devices import Device, StateBody, SyntheticBody
from vmm_sim.errors import VmmError
from vmm_sim.heartbeat import Heartbeat
from vmm_sim.host_clock import HostClock
from vmm_sim.memory import GuestMemory
from vmm_sim.operations import Operations
from vmm_sim.ownership import Ownership
from vmm_sim.platform import I64, Platform, State, integers
from vmm_sim.runlog import RunLog
from vmm_sim.tracking import DirtyTracking, Mode
from vmm_sim.vcpu import Vcpu
from vmm_sim.verify import Verifier, find_clock_fault
from vmm_sim.workload import POPULATE_PAGES, Workload

MAX_STEP: Final = 1 << 62
CPU: Final = "cpu"

RunState = Literal["running", "paused", "incoming"]


@dataclass(slots=True)
class DeviceWrites:
    """Pages that devices wrote while they saved and loaded; ``lock`` keeps two saves from writing the same ones.
    ``at_load``: a device that was loaded has written some."""

    count: int = 0
    at_load: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Vmm:
    """The VMM of one guest. ``incoming``: wait for the guest's state instead of booting it. ``memory_fd``: the memory
    that the guest's other VMM hands over, for an incoming one."""

    def __init__(
        self,
        config: GuestConfig,
        *,
        host: HostClock,
        host_tsc: HostTsc,
        run_log: RunLog,
        incoming: bool = False,
        cost_seed: int | None = None,
        tracking: Mode = "auto",
        lock_directory: Path | None = None,
        memory_fd: int | None = None,
    ) -> None:
        self.ownership = Ownership(lock_directory, config.uuid)
        if not incoming:
            self.ownership.take()
        self.config = config
        self.memory = GuestMemory(config.memory_bytes, huge_pages=config.huge_pages, handed_over=memory_fd)
        self.workload = Workload(config)
        self.clock = GuestClock(host, host_tsc, config.guest_freq, config.boot_tsc)
        self.platform = Platform(self.clock, config.vcpus, config.vcpu_tsc_skew)
        self.vcpu = Vcpu(
            self.memory, self.workload, self.clock, self.platform, config.dirty_rate_bytes_per_s, self._crashed
        )
        self.devices = {device.key: device for device in self._build_devices()}
        self.state: RunState = "incoming" if incoming else "paused"
        self.epoch = 0
        self.device_writes = DeviceWrites()
        self._run_log = run_log
        self._tracking = DirtyTracking(self.memory, tracking)
        self._time_imported = False
        self._costs = CostDraws(config.seed if cost_seed is None else cost_seed)
        self._life = threading.Lock()
        self._operations = Operations()
        self._verification = threading.Event()  # set when a running verification must give way
        self._booted = threading.Event()
        self._exiting = threading.Event()
        if incoming:
            self._booted.set()

    def _build_devices(self) -> Iterator[Device]:
        """Configured devices, then the platform's, the vCPU last. A configured device named like a built-in one gives
        that its costs."""
        built_in = {device.name for device in self.platform.devices()} | {CPU}
        costs = {device.name: device for device in self.config.devices if device.kind == "non-iterable"}
        for config in self.config.devices:
            if config.name not in built_in or config.kind == "iterable":
                yield Device(config, SyntheticBody(config, self.config.seed))

        def config_of(name: str) -> DeviceConfig:
            return costs.get(name) or DeviceConfig(name=name, kind="non-iterable", state=0)

        for platform_device in self.platform.devices():
            yield Device(config_of(platform_device.name), StateBody.of(platform_device))
        yield Device(config_of(CPU), StateBody(self._save_cpu, self._load_cpu, CPU))

    # Life cycle

    def start(self, *, paused: bool) -> None:
        """Start the vCPU thread; a new guest boots in the background and then runs, unless ``paused``."""
        self.vcpu.start()
        if self.state != "incoming":
            # Booting counts as running for clients; operations that need stopped vCPUs wait for its end.
            self.state = "paused" if paused else "running"
            threading.Thread(target=self._boot, args=(paused,), name="boot", daemon=True).start()

    def _boot(self, paused: bool) -> None:
        for first in range(1, self.workload.touched_pages, POPULATE_PAGES):
            if self._exiting.is_set():
                return
            self.workload.populate(self.memory, first, min(first + POPULATE_PAGES, self.workload.touched_pages))
        self.platform.tsc.arm_first(self.clock.read().guest_tsc)
        with self._life:
            if not paused and not self._exiting.is_set():
                self._run_log.write("run", self.vcpu.step, self.epoch)
                self.vcpu.start_running()
        self._booted.set()

    def _crashed(self) -> None:
        self._run_log.write("exit", self.vcpu.step, self.epoch)

    def shut_down(self) -> None:
        """Stop everything, for good; the process exits next."""
        self._exiting.set()
        self.interrupt()
        with self._life:
            self.vcpu.stop_running()
            self._run_log.write("exit", self.vcpu.step, self.epoch)

    def pause(self) -> dict[str, Any]:
        """Stop the vCPUs at a step boundary, then pay the stop costs. Idempotent (``was_paused``); a complete incoming
        guest becomes a paused one. ``time`` is the guest's time data at the end of that."""
        self._booted.wait()
        self._verification.set()
        with self._life:
            begun = time.monotonic_ns()
            if self.state == "incoming":
                self._require_complete("pause")
                self.memory.publish()
                self.state = "paused"
            if self.state == "paused":
                return {"step": self.vcpu.step, "ns": 0, "was_paused": True, "time": self.export_time()}
            self.vcpu.stop_running()
            self._run_log.write("stop", self.vcpu.step, self.epoch)
            self.state = "paused"
            wait_until(begun + self._costs.transition_ns("stop", self._parts()), self._exiting)
            return {"step": self.vcpu.step, "ns": time.monotonic_ns() - begun, "time": self.export_time()}

    def resume(self, epoch: int | None = None) -> dict[str, Any]:
        """End running saves, pay the resume costs, run. Idempotent (``was_running``)."""
        self._booted.wait()
        self._verification.set()
        with self._life:
            begun = time.monotonic_ns()
            if self.state == "running":
                return {"step": self.vcpu.step, "ns": 0, "was_running": True, "running_at_ns": begun}
            if not self.ownership.held:
                raise VmmError("NotOwner", "This VMM let go of the guest's lock: take it again before it may run.")
            with self._operations.none():
                if self.state == "incoming":
                    self._require_complete("resume")
                wait_until(begun + self._costs.transition_ns("resume", self._parts()), self._exiting)
                if epoch is not None:
                    self.epoch = epoch
                step = self.vcpu.step
                # From this line on the guest counts as run here, so what devices wrote may reach memory that was
                # handed over.
                self._run_log.write("run", step, self.epoch)
                self.memory.publish()
                self.state = "running"
                self.vcpu.start_running()
                running_at = time.monotonic_ns()
            return {"step": step, "ns": running_at - begun, "running_at_ns": running_at}

    def take_lock(self, token: int | None = None) -> dict[str, Any]:
        """Take the guest's ownership lock, with a fencing token if one is given. Idempotent."""
        with self._life:
            self.ownership.take(token)
            return {}

    def fence(self, token: int) -> dict[str, Any]:
        """Let the guest's ownership lock carry a newer fencing token, if it is held."""
        with self._life:
            self.ownership.carry(token)
            return {}

    def release_lock(self) -> dict[str, Any]:
        """Let go of the guest's ownership lock; refused while the vCPUs run."""
        with self._life:
            if self.state == "running":
                raise VmmError("NotPaused", "A running guest keeps its lock: pause it first.")
            self.ownership.release()
            return {}

    def _require_complete(self, verb: str) -> None:
        missing = [f"{name} ({kind})" for (name, kind), device in self.devices.items() if not device.loaded]
        if not self._time_imported:
            missing.insert(0, "time data")
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise VmmError(
                "GuestIncomplete", f"The incoming guest cannot {verb}: not loaded yet: {shown}. Load them first."
            )

    def _parts(self) -> list[Costs]:
        """The guest and its devices: all that takes time at a stop and a resume."""
        return [self.config, *(device.config for device in self.devices.values())]

    def interrupt(self) -> dict[str, Any]:
        """End running saves and loads with the error Interrupted, and a verification too."""
        self._verification.set()
        return {"interrupted": self._operations.interrupt()}

    # Dirty tracking

    def start_dirty_log(self, mode: Mode = "auto", *, present_only: bool = False) -> tuple[dict[str, Any], int]:
        """Start (or restart) tracking, from clean; a new attempt for iterable devices too. Returns the reply's map and
        the descriptor that goes with it.

        ``present_only``: the caller can scan for present or swapped pages only; the reply says whether it must.
        Raises VmmError DirtyTrackingUnavailable.
        """
        with self._life:
            for device in self.devices.values():
                device.begin_attempt()
            tracking = self._tracking.start(mode, present_only=present_only)
            meta = {
                "mode": tracking.mode,
                "address": self.memory.address,
                "bytes": self.memory.bytes,
                "present_only": tracking.present_only,
            }
            return meta, tracking.fd

    def stop_dirty_log(self) -> dict[str, Any]:
        """Stop tracking; nothing happens when it is off."""
        with self._life:
            self._tracking.stop()
        return {}

    # Time

    def export_time(self) -> dict[str, Any]:
        """The guest's time data now. Raises VmmError NotPaused."""
        self._require_state("paused", "NotPaused", "pause it before its time is exported")
        return self.clock.read().model_dump()

    def import_time(self, time_data: object, error_ns: int) -> dict[str, Any]:
        """Take over adjusted time data; ``error_ns`` is how far it may be off (for the VMClock page).

        Raises VmmError: NotIncoming, TimeAfterDevices, InvalidTimeData, FrequencyMismatch, and those of the clock.
        """
        self._require_state("incoming", "NotIncoming", "time can only be imported into an incoming guest")
        with self._life:
            loaded = [device.config.name for device in self.devices.values() if device.loaded]
            if loaded:
                raise VmmError(
                    "TimeAfterDevices",
                    f"Device {loaded[0]} is loaded and refers to the time data before: import time first.",
                )
            parsed = parse_time_data(time_data)
            if parsed.guest_freq not in (0, self.config.guest_freq):
                raise VmmError(
                    "FrequencyMismatch",
                    f"The time data has a guest TSC of {parsed.guest_freq} Hz and the guest's description one of"
                    f" {self.config.guest_freq} Hz: a migration never changes it.",
                )
            result = self.clock.import_time(parsed)
            self.platform.vmclock.imported_error_ns = error_ns
            self._time_imported = True
            return {"vmm_ns": result.vmm_ns, "vmm_ticks": result.vmm_ticks}

    def _require_state(self, state: RunState, error: str, sentence: str) -> None:
        if self.state != state:
            raise VmmError(error, f"Guest {self.config.name} is {self.state}: {sentence}.")

    # Devices

    def _device(self, name: str, kind: str) -> Device:
        device = self.devices.get((name, kind))
        if device is None:
            raise VmmError("UnknownDevice", f"Guest {self.config.name} has no device {name} ({kind}).")
        return device

    def save_device(self, name: str, kind: str, round_number: int | None) -> tuple[dict[str, Any], bytearray]:
        """One piece of a device's state: of a pre-copy round, or the final one (``None``). Takes the drawn cost, or
        the actual work if that is longer.

        Raises VmmError: UnknownDevice, NotPaused, NotIterable, RoundOutOfOrder, Interrupted.
        """
        device = self._device(name, kind)
        begun = time.monotonic_ns()
        self._booted.wait()
        with self._operations.one() as interrupt:
            if self.state == "incoming":
                raise VmmError("NotPaused", f"Guest {self.config.name} is incoming: it has no state to save yet.")
            cost_ns = 0
            written = False
            if round_number is not None:
                if kind != "iterable":
                    raise VmmError("NotIterable", f"Device {name} is not iterable: save it once, while paused.")
            else:
                self._require_state("paused", "NotPaused", f"the final state of device {name} needs a paused guest")
                cost_ns = self._costs.device_ns(device.config, "save")
                written = self._write_for(device)
            piece = device.save(round_number, interrupt)
            wait_until(begun + cost_ns, interrupt)
        return {"ns": time.monotonic_ns() - begun, "bytes": len(piece), "memory_written": written}, piece

    def save_devices(self, keys: list[tuple[str, str]]) -> tuple[dict[str, Any], bytearray]:
        """The final states of several devices, one after the other, as one payload. Raises as ``save_device``."""
        saved, payload = [], bytearray()
        for name, kind in keys:
            meta, piece = self.save_device(name, kind, None)
            saved.append(meta)
            payload += piece
        return {"saved": saved}, payload

    def load_devices(self, states: list[tuple[str, str, int]], payload: memoryview) -> dict[str, Any]:
        """Load the final states of several devices (name, kind, bytes), in order. Raises as ``load_device``, and
        InvalidArgument when the payload is not as long as they say."""
        if sum(size for _, _, size in states) != len(payload):
            raise VmmError("InvalidArgument", "The payload of devices-load is not as long as its states.")
        loaded, offset = [], 0
        for name, kind, size in states:
            loaded.append(self.load_device(name, kind, True, payload[offset : offset + size]))
            offset += size
        return {"loaded": loaded}

    def _write_for(self, device: Device) -> bool:
        pages = device.config.writes_pages
        if pages:
            with self.device_writes.lock:
                self.workload.execute_device_writes(self.memory, self.device_writes.count, pages)
                self.device_writes.count += pages
        return pages > 0

    def _write_at_load(self, device: Device) -> None:
        """Let a device write guest memory because it was loaded. What it leaves is right only once the vCPU, the last
        one, is loaded: then it is known which writes these are."""
        writes, pages = self.device_writes, device.config.load_writes_pages
        with writes.lock:
            if pages:
                writes.at_load = True
                self.workload.scribble(self.memory, pages)
            if device.config.name == CPU and writes.at_load:
                every_page = self.config.device_write_pages
                self.workload.execute_device_writes(self.memory, writes.count, every_page)
                writes.count, writes.at_load = writes.count + every_page, False

    def load_device(self, name: str, kind: str, final: bool, piece: memoryview) -> dict[str, Any]:
        """Take over one piece of a device's state; final pieces cost elapsed time and need the time data before.

        Raises VmmError: UnknownDevice, NotIncoming, TimeNotImported, DeviceState..., Interrupted.
        """
        device = self._device(name, kind)
        begun = time.monotonic_ns()
        with self._operations.one() as interrupt:
            self._require_state("incoming", "NotIncoming", "device state can only be loaded into an incoming guest")
            if final and not self._time_imported:
                raise VmmError(
                    "TimeNotImported",
                    f"Device {name} cannot be loaded before the time data: its timers would refer to the wrong boot"
                    " time. Import time first.",
                )
            body = device.check(piece, final)
            # The state takes effect after the wait: a load that is interrupted has loaded nothing.
            wait_until(begun + (self._costs.device_ns(device.config, "load") if final else 0), interrupt)
            device.load(body, final)
            if final:
                self._write_at_load(device)
        return {"ns": time.monotonic_ns() - begun}

    def dry_run(self, side: Literal["save", "load"]) -> dict[str, Any]:
        """Return possible costs of a switchover here: draws from the same distributions, with nothing saved or
        loaded."""
        devices = [
            {
                "name": device.config.name,
                "kind": device.config.kind,
                "ns": self._costs.device_ns(device.config, side, rehearsal=True),
            }
            for device in self.devices.values()
        ]
        return {
            "devices": devices,
            "pause_ns": self._costs.transition_ns("stop", self._parts(), rehearsal=True),
            "resume_ns": self._costs.transition_ns("resume", self._parts(), rehearsal=True),
        }

    # The vCPU's state

    def _save_cpu(self) -> State:
        vcpu = self.vcpu
        return {
            "step": vcpu.step,
            "device_writes": self.device_writes.count,
            "hops": self.clock.hops,
            "ran_unscaled": int(self.clock.ran_unscaled),
            "beat_monotonic_ns": vcpu.last_beat_monotonic_ns,
            "heartbeat": vcpu.heartbeat.state(),
            "registers": self.platform.tsc.save(),
        }

    def _load_cpu(self, state: State) -> None:
        state = dict(state)
        heartbeat, registers = state.pop("heartbeat", None), state.pop("registers", None)
        step, device_writes, hops, unscaled, beat = integers(
            CPU,
            state,
            step=(0, MAX_STEP),
            device_writes=(0, MAX_STEP),
            hops=(0, 1 << 32),
            ran_unscaled=(0, 1),
            beat_monotonic_ns=I64,
        )
        try:
            loaded = Heartbeat.from_state(heartbeat if isinstance(heartbeat, dict) else {})
        except ValueError as error:
            raise VmmError("DeviceStateInvalid", f"The state of device cpu is not usable: {error}.") from error
        self.platform.tsc.load(registers)
        self.vcpu.step, self.device_writes.count, self.clock.hops = step, device_writes, hops + 1
        self.clock.ran_unscaled_before = bool(unscaled)
        self.vcpu.last_beat_monotonic_ns = beat
        self.vcpu.heartbeat = loaded

    # Reports and settings

    def describe(self) -> dict[str, Any]:
        """The guest's description, as :class:`protocol.guest.GuestDescription` dumps it, and beside it the size that no
        piece of state exceeds, for each of its devices."""
        # The other host's costs are its own, and no two attempts should draw alike: a fresh seed every time.
        description = build_description(self.config, self.devices.values(), self._costs.fresh_seed())
        largest_bytes = [device.largest_bytes for device in self.devices.values()]
        return {"description": description.model_dump(), "largest_bytes": largest_bytes}

    def status(self) -> dict[str, Any]:
        """Return all figures that a poller may want; never waits."""
        vcpu, config, heartbeat, gap = self.vcpu, self.config, self.vcpu.heartbeat, self.vcpu.stop_gap
        reading = self.clock.read()
        return {
            "state": self.state,
            "booting": not self._booted.is_set(),
            "name": config.name,
            "uuid": config.uuid,
            "step": vcpu.step,
            "memory_bytes": config.memory_bytes,
            "epoch": self.epoch,
            "lock_held": self.ownership.held,
            "heartbeat": {
                "beats": heartbeat.beats,
                "last_gap_ns": heartbeat.last_gap_ns,
                "max_gap_ns": heartbeat.max_gap_ns,
                "backwards": heartbeat.backwards,
                "gaps": heartbeat.gaps(),
            },
            "stop_gap": None if gap is None else {"guest_ns": gap.guest_ns, "host_ns": gap.host_ns},
            "timers": {"fired": self.platform.hpet.fired, "pending": self.platform.hpet.pending_uptimes()},
            "clock": reading.model_dump(),
            "guest_uptime_ns": self.clock.uptime_at(reading.hrtime),
            "platform": self.platform.report(),
            "throttle": vcpu.throttle_percent,
            "workload": config.workload,
            "dirty_rate_bytes_per_s": vcpu.rate_bytes_per_s,
            "dirty_tracking": self._tracking.mode,
        }

    def throttle(self, percent: int) -> dict[str, Any]:
        """Let the vCPUs execute ``percent`` less."""
        self.vcpu.throttle_percent = percent
        return {}

    def set_rate(self, dirty_rate: int) -> dict[str, Any]:
        """Change the workload's rate in bytes per second. Raises VmmError InvalidArgument."""
        if not dirty_rate and self.config.workload not in ("fill", "idle"):
            raise VmmError("InvalidArgument", f"Workload {self.config.workload} needs a dirty_rate above 0.")
        self.vcpu.rate_bytes_per_s = dirty_rate
        return {}

    def arm_timer(self, in_ns: int) -> dict[str, Any]:
        """Arm a one-shot timer, due in ``in_ns`` of guest time. Raises VmmError TooManyTimers, GuestIncomplete."""
        if self.state == "incoming":
            raise VmmError("GuestIncomplete", "The incoming guest has no timers yet: load its state first.")
        return {"due_uptime_ns": self.platform.hpet.arm(in_ns)}

    def verify(self) -> dict[str, Any]:
        """Compare every byte of memory, and the clock, with what state and seed say; vCPUs stop meanwhile.

        Raises VmmError: GuestIncomplete, Interrupted (by pause, resume, interrupt or destroy).
        """
        self._booted.wait()
        with self._life:
            if self.state == "incoming":
                self._require_complete("be verified")
            self._verification = threading.Event()
            was_running = self.vcpu.running
            self.vcpu.stop_running()
            try:
                verdict = Verifier(
                    self.memory, self.workload, self.vcpu.step, self.device_writes.count, self.vcpu.heartbeat
                ).run(self._verification)
                clock_fault = find_clock_fault(
                    self.clock, self.vcpu.heartbeat, self.config.boot_tsc, ran_unscaled=self.clock.ran_unscaled
                )
            finally:
                if was_running and not self._exiting.is_set():
                    self.vcpu.start_running(counts_as_stop=False)
        message = f"All {self.memory.pages} pages and the clock are as they must be at step {self.vcpu.step}."
        if verdict.bad_pages:
            message = f"{verdict.bad_pages} of {self.memory.pages} pages are wrong: {verdict.diagnosis}."
        elif clock_fault:
            message = clock_fault
        return {
            "ok": not verdict.bad_pages and not clock_fault,
            "pages": self.memory.pages,
            "bad_pages": verdict.bad_pages,
            "first_bad": verdict.first_bad,
            "clock_ok": not clock_fault,
            "message": message,
        }
