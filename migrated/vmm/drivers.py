"""The drivers of this host: those that come with the program, and those that the configuration names.

They are loaded by name, so that no module above knows one of them, and a VMM's own libraries are loaded only where a
guest may need them.
"""

from __future__ import annotations

import importlib
from typing import Final

from migrated.config import Config, ConfigError, Problem
from migrated.vmm.seam import Driver

_BUILT_IN: Final = {"sim": "migrated.vmm.sim.driver:SimDriver"}


def load_drivers(config: Config) -> dict[str, Driver]:
    """All drivers by name.

    Raises:
        ConfigError: one cannot be loaded, has another name than it is configured by, or ``[vmm] driver`` names none.
    """
    drivers: dict[str, Driver] = {}
    for name, place in {**_BUILT_IN, **config.vmm.drivers}.items():
        module, _, attribute = place.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise _problem(f"drivers.{name}", f"{place!r} cannot be loaded: {error}") from error
        if not (isinstance(found, type) and issubclass(found, Driver)) or found.name != name:
            raise _problem(f"drivers.{name}", f"{place!r} is not a driver named {name!r}")
        drivers[name] = found(config)
    if config.vmm.driver not in drivers:
        known = ", ".join(sorted(drivers))
        raise _problem("driver", f"there is no driver {config.vmm.driver!r}; drivers here: {known}")
    return drivers


def _problem(key: str, reason: str) -> ConfigError:
    return ConfigError([Problem("", f"vmm.{key}", reason)])
