"""Requirements that a migration's parameters put on a guest and that not every VMM meets."""

from __future__ import annotations

from migrated.settings.parameters import MigrationParameters
from migrated.vmm.seam import VmmGuest
from protocol.guest import GuestDescription

_DEFAULTS = MigrationParameters()


def unmet(guest: VmmGuest, description: GuestDescription, parameters: MigrationParameters) -> str | None:
    """Return a sentence that names the parameter, the guest and the remedy; None when the guest meets all
    requirements."""
    who = f"guest {guest.name!r} (driver {guest.driver!r})"
    tracking = parameters.dirty_tracking
    if tracking != "auto" and tracking not in guest.dirty_tracking:
        ways = ", ".join(sorted({"auto", *guest.dirty_tracking}))
        return f"dirty_tracking={tracking} cannot be had for {who}: set it to one of {ways}"
    if parameters.auto_converge and guest.throttle is None:
        return f"auto_converge cannot be had for {who}, whose vCPUs cannot be throttled: set auto_converge to false"
    if guest.time is None and parameters.time_policy != _DEFAULTS.time_policy:
        return (
            f"time_policy={parameters.time_policy} cannot be had for {who}, whose time does not travel apart from its "
            f"devices: set time_policy back to {_DEFAULTS.time_policy}"
        )
    iterable = [device.name for device in description.devices if device.kind == "iterable"]
    if iterable and guest.iterations is None:
        return (
            f"{who} has devices that send state while it runs ({', '.join(iterable)}), and its driver cannot pass that "
            "on: detach them before the migration"
        )
    return None
