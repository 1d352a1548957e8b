"""What a guest is offered as, to another daemon or at the begin of a file, and what stopping it is expected to cost.

    offer_of    the guest and its costs here: nobody else is asked
    hello_of    the offer as it is sent
    bases_of    the bases of the prediction of a stop now

A session makes it to a destination, an estimate for its figures only, a save to the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from migrated.base.errors import RefusedError
from migrated.environment import Environment
from migrated.kernel.processor import ProcessorLoad
from migrated.kernel.scheduling import may_take_precedence
from migrated.prediction.bandwidth import Bandwidth
from migrated.prediction.model import Bases
from migrated.record.parts import Component
from migrated.settings.parameters import MigrationParameters
from migrated.vmm.requirements import unmet
from migrated.vmm.seam import ExpectedCosts, VmmGuest, total_cost
from protocol import messages
from protocol.guest import GuestDescription
from protocol.messages import DeviceCost, Limits, TimeRules
from protocol.versions import CAPABILITIES, REQUIRED_CAPABILITIES, SHARED

_MOST_LOAD = 12.0
_LOADED_ALONE_NS = 300_000
"""A device whose load costs less travels to the VMM in one call with others like it."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A guest's description, and the expected costs of stopping and saving it here."""

    description: GuestDescription
    was_paused: bool
    costs: ExpectedCosts


async def offer_of(vmm: VmmGuest, description: GuestDescription, parameters: MigrationParameters) -> Offer:
    """Describe a guest for an offer, with its expected costs.

    Raises:
        RefusedError: the guest is itself waiting for a migration, or cannot be moved with these parameters.
        VmmError: the guest cannot be asked.
    """
    status = await vmm.status()
    if status.state == "incoming":
        raise RefusedError(f"guest {description.name!r} is itself waiting for an incoming migration")
    reason = unmet(vmm, description, parameters) or await vmm.why_not_migrate()
    if reason is not None:
        raise RefusedError(reason)
    return Offer(description, status.state == "paused", await vmm.expected_costs("save"))


def limits_of(parameters: MigrationParameters, offer: Offer) -> Limits:
    """The budget of an offer. A guest that is paused anyway has none."""
    return Limits(
        downtime_limit_ns=int(parameters.downtime_limit_ms * 1e6),
        switchover_limit_ns=int(parameters.switchover_limit_ms * 1e6),
        switchover_abort=parameters.switchover_abort and not offer.was_paused,
    )


def hello_of(
    env: Environment, offer: Offer, parameters: MigrationParameters, migration_id: str, epoch: int, *, shared: bool
) -> messages.Hello:
    """The offer as it is sent, or stands at the begin of a file.

    Args:
        shared: whether the guest's memory can be handed over.
    """
    required = set(REQUIRED_CAPABILITIES)
    if parameters.switchover_abort:
        required.add("switchover-abort")
    if parameters.digest:
        required.add("digest-xxh3-frames")
    return messages.Hello(
        migration_id=migration_id,
        epoch=epoch,
        guest=offer.description,
        guest_paused=offer.was_paused,
        capabilities=tuple(sorted(CAPABILITIES if shared else CAPABILITIES - {SHARED})),
        required=tuple(sorted(required)),
        limits=limits_of(parameters, offer),
        time_rules=TimeRules(
            policy=parameters.time_policy,
            max_time_jump_ns=int(parameters.max_time_jump_ms * 1e6),
            max_time_error_ns=int(parameters.max_time_error_ms * 1e6),
        ),
        channels=1 if shared else parameters.channels,
        host=env.host,
    )


def bases_of(
    offer: Offer,
    bandwidth: Bandwidth,
    *,
    dirty_pages: int,
    device_bytes: int,
    scan_ns: int,
    resume_ns: int,
    load: ProcessorLoad,
    load_costs: Sequence[DeviceCost] = (),
    legs_ns: int = 0,
) -> Bases:
    """Return the bases of the prediction of a stop now.

    Args:
        offer: the guest, and its costs here.
        bandwidth: at which memory moves.
        dirty_pages, device_bytes: what would move while the guest stands still.
        scan_ns: cost of a dirty-log read, with its fence.
        resume_ns: cost of letting it run, wherever that is.
        load: how long the event loop waits for a processor.
        load_costs: of its devices, where they are loaded before it runs again.
        legs_ns: what messages take, where there are any.
    """
    costs, memory = offer.costs, bandwidth.expect(dirty_pages, device_bytes)
    save_ns, save_spread_ns = total_cost(costs.devices)
    if costs.devices:
        # The other states travel while the next is saved; the last one is on its way when all are saved.
        save_ns += bandwidth.expect(0, max(device.state_bytes for device in offer.description.devices)).ns
    load_ns, load_spread_ns = total_cost(load_costs)
    spreads_ns = {Component.STATE: memory.spread_ns if memory.ns >= save_ns else save_spread_ns}
    if costs.basis != "guessed" or costs.whole_steps:
        spreads_ns[Component.STOP] = costs.pause_spread_ns
    if load_spread_ns:
        spreads_ns[Component.DEVICE_LOADS] = load_spread_ns
    return Bases(
        stop_ns=costs.pause_ns,
        dirty_log_ns=2 * scan_ns,
        memory_ns=memory.ns,
        save_ns=save_ns,
        load_ns=load_ns,
        legs_ns=legs_ns,
        resume_ns=resume_ns,
        devices=sum(cost.ns >= _LOADED_ALONE_NS for cost in load_costs),
        device_bytes=device_bytes,
        bandwidth_bytes_per_s=bandwidth.bytes_per_s,
        load=1.0 if may_take_precedence() else min(load.now(), _MOST_LOAD),
        memory_waited=may_take_precedence() and not bandwidth.rehearsed,
        whole_steps=costs.whole_steps,
        spreads_ns=spreads_ns,
    )
