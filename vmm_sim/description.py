"""The guest's description: the source's VMM writes it, and the destination's VMM builds an equal guest from it. A peer
may have written what is read here."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Final

import msgpack
from pydantic import ValidationError

from protocol.guest import MAX_VMM_CONFIG_BYTES, PAGE_SIZE, DeviceDescription, GuestDescription
from protocol.wrong_values import first_fault
from vmm_sim.config import ConfigError, GuestConfig
from vmm_sim.devices import Device
from vmm_sim.memory import memory_regions

DRIVER: Final = "sim"
"""The name of the daemons' driver for this VMM."""
MACHINE: Final = "vmm-sim-1"
_VERSION: Final = 1


def build_description(config: GuestConfig, devices: Collection[Device], cost_seed: int) -> GuestDescription:
    """Description of a guest with these devices; ``cost_seed`` starts the cost draws of the VMM that is built from it.

    Raises ConfigError when the configuration is too large to travel.
    """
    packed: bytes = msgpack.packb([_VERSION, config.model_dump(), cost_seed])
    if len(packed) > MAX_VMM_CONFIG_BYTES:
        raise ConfigError(
            f"The configuration of guest {config.name} takes {len(packed)} bytes and a description carries at most"
            f" {MAX_VMM_CONFIG_BYTES}: use fewer devices."
        )
    return GuestDescription(
        name=config.name,
        uuid=config.uuid,
        vmm=DRIVER,
        machine=MACHINE,
        page_size=PAGE_SIZE,
        memory=memory_regions(config.memory_bytes),
        devices=tuple(DeviceDescription(**device.describe()) for device in devices),
        vcpus=config.vcpus,
        guest_freq=config.guest_freq,
        guest_time=True,
        expected_stop_ns=1000 * (config.stop_us + sum(device.config.stop_us for device in devices)),
        expected_resume_ns=1000 * (config.resume_us + sum(device.config.resume_us for device in devices)),
        vmm_config=packed,
    )


def read_description(path: Path) -> tuple[GuestConfig, int]:
    """Config and cost seed of the guest that the file (msgpack) describes. Raises ConfigError."""
    try:
        description = GuestDescription.model_validate(msgpack.unpackb(path.read_bytes(), use_list=False))
        version, fields, cost_seed = msgpack.unpackb(description.vmm_config, use_list=False, strict_map_key=True)
        if version != _VERSION or not isinstance(cost_seed, int):
            raise ConfigError(f"The description {path} is from another version of the VMM.")
        # The name is the host's affair: a guest may be restored under another one.
        config = GuestConfig.model_validate({**fields, "name": description.name})
    except ValidationError as error:
        raise ConfigError(f"The description {path} is not usable: {first_fault(error)}.") from error
    except (OSError, ValueError, TypeError, msgpack.exceptions.StackError) as error:
        raise ConfigError(f"The description {path} cannot be read: {error}.") from error
    described = (description.uuid, description.vcpus, description.guest_freq, description.machine)
    configured = (config.uuid, config.vcpus, config.guest_freq, MACHINE)
    if described != configured or description.memory != memory_regions(config.memory_bytes):
        raise ConfigError(f"The description {path} contradicts the configuration that it carries.")
    return config, cost_seed
