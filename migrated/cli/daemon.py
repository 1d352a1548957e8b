"""``migrated``: starts a daemon in one of its roles, or checks a configuration."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final, Literal

import click

EXIT_BAD_CONFIG: Final = 2

CONFIG_OPTION = click.option(
    "--config",
    "path",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Configuration file (TOML). MIGRATED_SECTION__KEY in the environment overrides it.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="migrated", prog_name="migrated")
def main() -> None:
    """Live migration of running VMs, with a downtime budget that is enforced.

    A daemon runs on each host; migratectl talks to it over its control socket.
    """


@main.command()
@CONFIG_OPTION
def source(path: Path) -> None:
    """Run a daemon that sends guests away."""
    _run(path, "source")


@main.command()
@CONFIG_OPTION
def destination(path: Path) -> None:
    """Run a daemon that takes guests in."""
    _run(path, "destination")


@main.command()
@CONFIG_OPTION
def host(path: Path) -> None:
    """Run a daemon that does both."""
    _run(path, "host")


@main.command("check-config")
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE")
def check_config(path: Path) -> None:
    """Check a configuration file: every problem with its file, key and reason."""
    from migrated.settings.config import ConfigError, load_config

    try:
        load_config(path)
    except ConfigError as error:
        click.echo(str(error), err=True)
        sys.exit(EXIT_BAD_CONFIG)
    click.echo(f"{path}: no problems found.")


def _run(path: Path, role: Literal["source", "destination", "host"]) -> None:
    from migrated.settings.config import ConfigError, load_config

    try:
        config = load_config(path)
    except ConfigError as error:
        click.echo(str(error), err=True)
        sys.exit(EXIT_BAD_CONFIG)
    from migrated.service.daemon import run_daemon

    sys.exit(run_daemon(config, role, lambda: load_config(path)))
