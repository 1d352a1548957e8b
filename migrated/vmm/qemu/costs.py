"""Costs of stops, saves, loads and resumes of QEMU guests on this host, by guest and by class, and what the next will
take. QEMU cannot rehearse any of them without a pause, so they are learned from the moves that were made.

    this guest, if it did it here often enough
    else guests of its class: the same version of QEMU, accelerator, machine, vCPUs and kinds of devices
    else the prior, which was measured on the machine that this was built on

Kept in a file of the daemon's state directory. Without it, or when it cannot be used, everything is learned anew.
"""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from statistics import median
from typing import Annotated, Final, Literal, NamedTuple, TypeAlias, get_args

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from migrated.vmm.qemu.blueprint import Blueprint

Step: TypeAlias = Literal["stop", "save", "load", "resume"]
STEPS: Final[tuple[Step, ...]] = get_args(Step)

_ENOUGH: Final = 3
"""From so many on, what was seen counts and not the prior."""
_KEPT: Final = 32
_KEYS_KEPT: Final = 256
_MIDDLE: Final = 0.68
"""The share of a normal distribution that lies within one standard deviation."""
_MOST_NS: Final = 60_000_000_000


class Cost(NamedTuple):
    """The expected duration of a step, how far single ones usually lie from that (ns), and how many are known: none
    where it is the prior's."""

    ns: int
    spread_ns: int
    tries: int


PRIOR: Final[dict[Step, Cost]] = {
    "stop": Cost(1_000_000, 250_000, 0),
    "save": Cost(2_500_000, 500_000, 0),
    "load": Cost(4_000_000, 450_000, 0),
    "resume": Cost(1_700_000, 400_000, 0),
}
"""Of 60 moves with QEMU 7.2 under TCG on 2 busy cores, with precedence for threads (docs/qemu.md): the middle, and the
distance that two thirds stayed within. A few took more than twice as long; that is what scores tell of."""


class CostKeys(NamedTuple):
    """The keys under which a guest's costs are kept, from the most specific to the most general."""

    guest: str
    kind: str


def keys_of(blueprint: Blueprint) -> CostKeys:
    """The keys of a guest with this machine."""
    kinds = sorted(device.partition(":")[0] for device in blueprint.devices)
    devices = xxhash.xxh3_64_hexdigest("\n".join(kinds).encode())
    machine = f"{blueprint.qemu} {blueprint.accelerator} {blueprint.machine} {blueprint.vcpus} {devices}"
    return CostKeys(f"guest {blueprint.uuid}", f"class {machine}")


class _Kept(BaseModel):
    """The file: durations (ns) by key and step, the newest last, the key used last at the end."""

    model_config = ConfigDict(extra="forbid")

    seen_ns: dict[str, dict[Step, list[Annotated[int, Field(ge=0, le=_MOST_NS)]]]] = Field(default_factory=dict)


class SwitchoverCosts:
    """The costs of one host's guests.

    Args:
        path: of the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept = _Kept()
        self._changed = False
        with contextlib.suppress(OSError, ValidationError):
            self._kept = _Kept.model_validate_json(path.read_bytes())

    def note(self, keys: CostKeys, step: Step, took_ns: int) -> None:
        """A guest's step took so long. Kept in memory only: a guest may stand still meanwhile."""
        for key in keys:
            steps = self._kept.seen_ns.pop(key, {})
            steps[step] = [*steps.get(step, []), min(took_ns, _MOST_NS)][-_KEPT:]
            self._kept.seen_ns[key] = steps
        while len(self._kept.seen_ns) > _KEYS_KEPT:
            del self._kept.seen_ns[next(iter(self._kept.seen_ns))]
        self._changed = True

    def expect(self, keys: CostKeys, step: Step) -> Cost:
        """Return the expected cost of a guest's next step."""
        for key in keys:
            seen = self._kept.seen_ns.get(key, {}).get(step, [])
            if len(seen) >= _ENOUGH:
                middle_ns = int(median(seen))
                distances = sorted(abs(took_ns - middle_ns) for took_ns in seen)
                return Cost(middle_ns, distances[math.ceil(_MIDDLE * len(distances)) - 1], len(seen))
        return PRIOR[step]

    def keep(self) -> None:
        """Write the file, if there is something new. What cannot be written is kept in memory."""
        if not self._changed:
            return
        fresh = self._path.with_name(f"{self._path.name}.new")
        with contextlib.suppress(OSError):
            fresh.write_text(self._kept.model_dump_json())
            os.replace(fresh, self._path)
            self._changed = False
