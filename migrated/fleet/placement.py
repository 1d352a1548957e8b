"""The hosts that may take a guest, and why the others may not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Final, NamedTuple, TypeAlias
from zlib import crc32

from migrated.fleet.mirror import Mirror
from migrated.fleet.model import GuestDocument, HostDocument
from protocol.units import format_size

_REASONS_TOLD: Final = 4
_FIRST_LOOKED_AT: Final = 64
"""Hosts among which a source chooses the least used ones first, about, where there are more."""


def why_not(mirror: Mirror, guest: GuestDocument, host: HostDocument) -> str | None:
    """Return why a host cannot take a guest, as what is to be said of such hosts; None when it can. Slots and links,
    which become free again, are not asked for."""
    return _unfit(mirror, guest, host) or _too_full(mirror, guest, host)


def _unfit(mirror: Mirror, guest: GuestDocument, host: HostDocument) -> str | None:
    """Return the reason of ``why_not`` that is the same for all guests with the same needs."""
    if host.name in mirror.fences:
        return "fenced"
    if host.name in mirror.cordons:
        return "cordoned"
    if not host.max_inbound:
        return "set to take none"
    if guest.vmm not in host.vmms:
        return f"without the driver {guest.vmm}"
    if missing := _missing(guest.devices, host.devices):
        return f"without {missing}"
    if missing := _missing(guest.cpu_features, host.cpu_features):
        return f"without the processor feature {missing}"
    return None


def _too_full(mirror: Mirror, guest: GuestDocument, host: HostDocument) -> str | None:
    if mirror.free_bytes(host) < guest.memory_bytes:
        return f"with less than {format_size(guest.memory_bytes)} free"
    return None


def _missing(needed: Collection[str], there: Collection[str]) -> str | None:
    """Return the first thing that is needed and not there."""
    return next((one for one in needed if one not in there), None)


_Needs: TypeAlias = tuple[str, tuple[str, ...], tuple[str, ...]]


class _Fit(NamedTuple):
    """The hosts that fit the needs of guests, each with the memory that it can still promise, and why others do not."""

    hosts: list[tuple[int, HostDocument]]
    reasons: Counter[str]


class PossibleHosts:
    """The hosts that can take guests of one job; guests with the same needs are asked for once.

    Args:
        mirror: as it is now; it must not change meanwhile.
        source: where the guests are.
        to: only these; any when empty.
    """

    def __init__(self, mirror: Mirror, source: str, to: Collection[str] = ()) -> None:
        self._mirror = mirror
        self._source = source
        names = [name for name in to if name in mirror.hosts] if to else list(mirror.hosts)
        self._hosts = [mirror.hosts[name] for name in names if name != source]
        self._unknown = [name for name in to if name not in mirror.hosts]
        self._fits: dict[_Needs, _Fit] = {}

    def of(self, guest: GuestDocument) -> tuple[list[HostDocument], str]:
        """Return the hosts that can take a guest, and a sentence that says why the others cannot, for when there are
        none. The hosts come with the fewest of the guest's group first, then those with a free slot, then the least
        used. In a large fleet each source has some that it looks at before all others: if hosts that are emptied at
        once all chose the least used one, every promise but one would be decided on old news."""
        fit = self._fit(guest)
        found = [host for free, host in fit.hosts if free >= guest.memory_bytes]
        if found:
            if groups := group_at(self._mirror, guest):
                found.sort(key=lambda host: groups.get(host.name, 0))
            return found, ""
        reasons = fit.reasons.copy()
        reasons.update(filter(None, (_too_full(self._mirror, guest, host) for _, host in fit.hosts)))
        return [], self._refusal(guest, reasons)

    def _fit(self, guest: GuestDocument) -> _Fit:
        needs = guest.vmm, guest.devices, guest.cpu_features
        fit = self._fits.get(needs)
        if fit is None:
            fit = self._fits[needs] = _Fit([], Counter())
            for host in self._hosts:
                reason = _unfit(self._mirror, guest, host)
                if reason is None:
                    fit.hosts.append((self._mirror.free_bytes(host), host))
                else:
                    fit.reasons[reason] += 1
            parts = max(1, len(fit.hosts) // _FIRST_LOOKED_AT)
            fit.hosts.sort(key=lambda found: self._rank(found[0], found[1], parts))
        return fit

    def _rank(self, free: int, host: HostDocument, parts: int) -> tuple[bool, bool, float, str]:
        """The place of a host in the order. The hosts are divided into ``parts``, one of which comes first here."""
        busy = len(self._mirror.slots_of(host.name).arriving) >= host.max_inbound
        later = crc32(f"{self._source} {host.name}".encode()) % parts != 0
        return busy, later, -free / max(1, host.memory_bytes), host.name

    def _refusal(self, guest: GuestDocument, reasons: Counter[str]) -> str:
        told = [f"{count} {reason}" for reason, count in reasons.most_common(_REASONS_TOLD)]
        if len(reasons) > _REASONS_TOLD:
            told.append(f"{len(reasons) - _REASONS_TOLD} more reasons")
        if unknown := self._unknown:
            told.append(
                f"{unknown[0]} is not there" if len(unknown) == 1 else f"{len(unknown)} named hosts are not there"
            )
        return f"No other host can take {guest.name}: {'; '.join(told) or 'there is none'}."


def group_at(mirror: Mirror, guest: GuestDocument) -> Mapping[str, int]:
    """Return the guests of the same group that each host owns, or that are promised to it; hosts without are left
    out."""
    members = mirror.by_group.get(guest.group or "", set()) - {guest.name}
    if not members:
        return {}
    owners = {name: mirror.owners[name].owner for name in members if name in mirror.owners}
    counts = Counter(owners.values())
    for host, slots in mirror.slots.items():
        counts[host] += sum(one.guest in members and owners.get(one.guest) != host for one in slots.inbound)
    return +counts
