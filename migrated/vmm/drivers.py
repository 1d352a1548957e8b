"""The drivers of this host: those that come with the program, and those that the configuration names.

They are loaded by name, so that no module above knows one of them, and a VMM's own libraries are loaded only where a
guest may need them.
"""

from __future__ import annotations

import importlib
from typing import Final

from migrated.settings.config import Config, ConfigError, Problem
from migrated.vmm.seam import Driver

_BUILT_IN: Final = ("migrated.vmm.sim.driver:SimDriver", "migrated.vmm.qemu.driver:QemuDriver")


def load_drivers(config: Config) -> dict[str, Driver]:
    """All drivers by name.

    Raises:
        ConfigError: one cannot be loaded, two have the same name, or ``[vmm] driver`` names none.
    """
    drivers: dict[str, Driver] = {}
    for place in (*_BUILT_IN, *config.vmm.drivers):
        module, _, attribute = place.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise _problem("drivers", f"{place!r} cannot be loaded: {error}") from error
        if not (isinstance(found, type) and issubclass(found, Driver)):
            raise _problem("drivers", f"{place!r} is not a driver: it must be a class derived from {Driver.__name__}")
        if found.name in drivers:
            raise _problem("drivers", f"{place!r} is a second driver named {found.name!r}")
        drivers[found.name] = found(config)
    if config.vmm.driver not in drivers:
        known = ", ".join(sorted(drivers))
        raise _problem("driver", f"there is no driver {config.vmm.driver!r}; drivers here: {known}")
    return drivers


def _problem(key: str, reason: str) -> ConfigError:
    return ConfigError([Problem("", f"vmm.{key}", reason)])
