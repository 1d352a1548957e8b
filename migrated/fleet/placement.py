"""Which hosts may take a guest, and why the others may not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from migrated.fleet.mirror import Mirror
from migrated.fleet.model import GuestDocument, HostDocument
from protocol.units import format_size

_REASONS_TOLD = 4


def why_not(mirror: Mirror, guest: GuestDocument, host: HostDocument) -> str | None:
    """Return the reason why a host cannot take a guest, worded for all such hosts; None when it can. Slots and links,
    which become free again, are not asked for."""
    if host.name in mirror.fences:
        return "fenced"
    if host.name in mirror.cordons:
        return "cordoned"
    if not host.max_inbound:
        return "set to take none"
    if guest.vmm not in host.vmms:
        return f"without the driver {guest.vmm}"
    if missing := _missing(guest.devices, host.devices):
        return f"without the device {missing}"
    if missing := _missing(guest.cpu_features, host.cpu_features):
        return f"without the processor feature {missing}"
    if mirror.free_bytes(host) < guest.memory_bytes:
        return f"with less than {format_size(guest.memory_bytes)} free"
    return None


def _missing(needed: Collection[str], there: Collection[str]) -> str | None:
    """The first thing that is needed and not there."""
    return next((one for one in needed if one not in there), None)


def possible_hosts(
    mirror: Mirror, guest: GuestDocument, source: str, to: Collection[str] = ()
) -> tuple[list[HostDocument], str]:
    """The hosts that can take a guest, and a sentence that says why the others cannot, for when there are none.

    Args:
        source: where it is.
        to: only these; any when empty.
    """
    reasons: Counter[str] = Counter()
    found = []
    for name, host in mirror.hosts.items():
        if name == source or (to and name not in to):
            continue
        reason = why_not(mirror, guest, host)
        if reason is None:
            found.append(host)
        else:
            reasons[reason] += 1
    unknown = [name for name in to if name not in mirror.hosts]
    return found, _refusal(guest, reasons, unknown)


def _refusal(guest: GuestDocument, reasons: Counter[str], unknown: list[str]) -> str:
    told = [f"{count} {reason}" for reason, count in reasons.most_common(_REASONS_TOLD)]
    if len(reasons) > _REASONS_TOLD:
        told.append(f"{len(reasons) - _REASONS_TOLD} more reasons")
    if unknown:
        told.append(f"{unknown[0]} is not there" if len(unknown) == 1 else f"{len(unknown)} named hosts are not there")
    return f"No other host can take {guest.name}: {'; '.join(told) or 'there is none'}."


def group_at(mirror: Mirror, guest: GuestDocument, host: str) -> int:
    """Guests of the same group that a host owns, or that are promised to it."""
    if guest.group is None:
        return 0
    there = {*mirror.by_owner.get(host, ()), *(one.guest for one in mirror.slots_of(host).inbound)} - {guest.name}
    return sum(1 for name in there if name in mirror.guests and mirror.guests[name].group == guest.group)
