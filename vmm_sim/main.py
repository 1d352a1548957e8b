"""Command line of one simulated VMM: one process is one guest. It outlives whoever started it and ends on ``destroy``
or SIGTERM."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import uuid
from pathlib import Path
from typing import Any

import click

GIL_SWITCH_S = 0.0002


@click.command(context_settings={"auto_envvar_prefix": "VMM_SIM"})
@click.option("--api-socket", required=True, type=click.Path(path_type=Path), help="Unix socket to serve the API at.")
@click.option("--name", help="Name of the guest (default: guest).")
@click.option("--memory", help="Guest memory, such as 256MiB.")
@click.option("--workload", help="What the vCPUs do: idle, sequential, random, hot-cold, phased, fill, delta, stride.")
@click.option("--dirty-rate", help="How fast they write, such as 50MiB/s (fill: unpaced by default).")
@click.option("--profile", type=click.Path(path_type=Path), help="TOML profile of the guest; options override it.")
@click.option("--seed", type=int, help="Seed of memory content, write order and costs.")
@click.option("--uuid", "guest_uuid", help="UUID of the guest (default: a fresh one).")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other key of a profile's [guest].")
@click.option("--paused", is_flag=True, help="Boot, but do not run.")
@click.option(
    "--incoming-description",
    type=click.Path(path_type=Path),
    help="Build an empty equal guest from this description (msgpack) and wait for its state.",
)
@click.option("--memory-fd", type=int, help="Memory that an incoming guest's other VMM hands over: a descriptor.")
@click.option("--dirty-tracking", type=click.Choice(["auto", "pagemap-scan", "logged"]), default="auto")
@click.option("--host-freq", type=int, help="TSC frequency of this host in Hz (default: the guest's).")
@click.option("--host-cannot-scale-tsc", is_flag=True, help="This host has no TSC scaling.")
@click.option("--hrtime-offset-ns", type=int, default=0, help="Shift of this host's monotonic clock.")
@click.option("--wall-offset-ns", type=int, default=0, help="Shift of this host's wall clock.")
@click.option("--clock-drift-ppm", type=int, default=0, help="How much too fast this host's monotonic clock runs.")
@click.option(
    "--lock-directory", type=click.Path(path_type=Path), help="Where the guest's ownership lock lies (default: none)."
)
@click.option("--cost-seed", type=int, help="Seed of jitter and outliers, if not the guest's.")
def main(
    api_socket: Path,
    name: str | None,
    memory: str | None,
    workload: str | None,
    dirty_rate: str | None,
    profile: Path | None,
    seed: int | None,
    guest_uuid: str | None,
    settings: tuple[str, ...],
    paused: bool,
    incoming_description: Path | None,
    memory_fd: int | None,
    dirty_tracking: Any,
    host_freq: int | None,
    host_cannot_scale_tsc: bool,
    hrtime_offset_ns: int,
    wall_offset_ns: int,
    clock_drift_ppm: int,
    lock_directory: Path | None,
    cost_seed: int | None,
) -> None:
    """Run one simulated VMM."""
    # Imported late: --help and usage errors need none of it.
    from vmm_sim.clock import HostTsc
    from vmm_sim.config import ConfigError, build_config, read_profile
    from vmm_sim.description import read_description
    from vmm_sim.errors import VmmError
    from vmm_sim.host_clock import HostClock
    from vmm_sim.runlog import AlreadyRunningError, RunLog
    from vmm_sim.server import ApiServer, SocketInUseError
    from vmm_sim.vmm import Vmm

    sys.setswitchinterval(GIL_SWITCH_S)
    given: dict[str, Any] = {
        "name": name,
        "memory": memory,
        "workload": workload,
        "dirty_rate": dirty_rate,
        "seed": seed,
        "uuid": guest_uuid,
        **_settings(settings),
    }
    given = {key: value for key, value in given.items() if value is not None}
    if memory_fd is not None and incoming_description is None:
        _refuse("--memory-fd is for an incoming guest: give --incoming-description too.")
    try:
        if incoming_description is not None:
            config, description_cost_seed = read_description(incoming_description)
            if given.pop("name", config.name) != config.name or given or profile is not None:
                raise ConfigError(
                    f"The description is of guest {config.name} and settles everything else: leave out other options"
                    " of the guest."
                )
            cost_seed = description_cost_seed if cost_seed is None else cost_seed
        else:
            options: dict[str, Any] = {"name": "guest", "uuid": str(uuid.uuid4())}
            options |= read_profile(profile) if profile is not None else {}
            config = build_config(options | given)
        run_log = RunLog(RunLog.path_for(api_socket))
        vmm = Vmm(
            config,
            host=HostClock(hrtime_offset_ns, wall_offset_ns, clock_drift_ppm),
            host_tsc=HostTsc(host_freq or config.guest_freq, not host_cannot_scale_tsc),
            run_log=run_log,
            incoming=incoming_description is not None,
            cost_seed=cost_seed,
            tracking=dirty_tracking,
            lock_directory=lock_directory,
            memory_fd=memory_fd,
        )
        vmm.describe()  # a configuration that cannot travel is refused now, not at the first migration
        server = ApiServer(vmm, api_socket)
    except AlreadyRunningError:
        _refuse(f"A live VMM uses {api_socket}: choose another API socket path, or destroy that guest.")
    except (ConfigError, VmmError, SocketInUseError) as error:
        _refuse(error.message if isinstance(error, VmmError) else str(error))
    except OSError as error:
        _refuse(f"The guest cannot be set up at {api_socket}: {error}.")
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: server.stop())
    # A full collection would stop the vCPU for milliseconds; what is here stays anyway.
    gc.freeze()
    vmm.start(paused=paused)
    server.serve()
    vmm.shut_down()
    server.close()
    run_log.close()
    # Threads may still sit in a device's cost: nothing is left that they could do.
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(0)


def _refuse(sentence: str) -> Any:
    click.echo(sentence, err=True)
    raise SystemExit(2)


def _settings(settings: tuple[str, ...]) -> dict[str, Any]:
    """``--set`` values: TOML values where they parse as such, else texts."""
    import tomllib

    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            _refuse(f"--set {setting} has no value: write KEY=VALUE.")
        try:
            values[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[key] = text
    return values


if __name__ == "__main__":
    main()
