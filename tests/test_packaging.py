"""What is shipped: a wheel with exactly the three packages, complete and importable, three commands that start, and
their manual pages."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PACKAGES = {"migrated", "protocol", "vmm_sim"}

IMPORT_ALL = """
import importlib, pkgutil, sys
for name in sys.argv[2:]:
    package = importlib.import_module(name)
    assert package.__file__.startswith(sys.argv[1]), package.__file__
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from the checkout as it is."""
    directory = tmp_path_factory.mktemp("wheel")
    build = f"import hatchling.build; print(hatchling.build.build_wheel({str(directory)!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=REPOSITORY, check=True, capture_output=True)
    (path,) = directory.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_exactly_the_three_packages(wheel: zipfile.ZipFile) -> None:
    release = f"{PROJECT['name']}-{PROJECT['version']}"
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == PACKAGES | {f"{release}.dist-info", f"{release}.data"}


def test_the_wheel_installs_every_manual_page(wheel: zipfile.ZipFile) -> None:
    share = f"{PROJECT['name']}-{PROJECT['version']}.data/data/share/"
    shipped = {name.removeprefix(share): wheel.read(name) for name in wheel.namelist() if ".data/" in name}
    pages = {path.name: path.read_bytes() for path in (REPOSITORY / "docs" / "man").iterdir()}
    assert shipped == {f"man/man{name[-1]}/{name}": text for name, text in pages.items()}
    assert len(pages) == 3


def test_the_wheel_is_complete(wheel: zipfile.ZipFile) -> None:
    files = {
        path.relative_to(REPOSITORY).as_posix()
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    shipped = {name for name in wheel.namelist() if name.split("/")[0] in PACKAGES}
    assert shipped == files
    assert {f"{package}/py.typed" for package in PACKAGES} <= shipped


def test_every_module_of_the_wheel_can_be_imported(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    command = [sys.executable, "-W", "error", "-c", IMPORT_ALL, str(tmp_path), *sorted(PACKAGES)]
    # Away from the checkout, so that nothing is found there by accident.
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_wheel_brings_its_commands(wheel: zipfile.ZipFile) -> None:
    parser = ConfigParser()
    parser.read_string(wheel.read(f"{PROJECT['name']}-{PROJECT['version']}.dist-info/entry_points.txt").decode())
    assert dict(parser["console_scripts"]) == PROJECT["scripts"]


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_a_command_starts(command: str) -> None:
    program = Path(sysconfig.get_path("scripts")) / command
    done = subprocess.run([program, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: {command} ")


@pytest.mark.parametrize("command", ["migrated", "migratectl"])
def test_a_command_knows_its_version(command: str) -> None:
    program = Path(sysconfig.get_path("scripts")) / command
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{command}, version {PROJECT['version']}\n"


def test_the_package_can_be_run_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "migrated", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "check-config" in done.stdout
