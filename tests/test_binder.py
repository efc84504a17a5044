"""Binder is checked without Docker: the pins fit the project, the files are what repo2docker reads, and the link lands on the tour."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
BINDER = ROOT / "binder"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _lines(name: str) -> list[str]:
    lines = (BINDER / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _pins() -> dict[str, Version]:
    pins = {}
    for requirement in map(Requirement, _lines("constraints.txt")):
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        pins[requirement.name] = Version(specifier.version)
    return pins


def _asked(*extras: str) -> list[Requirement]:
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in PROJECT["optional-dependencies"][extra])]
    return [r for r in map(Requirement, texts) if r.name != PROJECT["name"]]


def test_every_direct_dependency_is_pinned_within_what_the_project_allows() -> None:
    pins = _pins()
    for requirement in _asked("lab", "test"):
        assert requirement.name in pins, requirement
        assert pins[requirement.name] in requirement.specifier, requirement


def test_the_cap_on_torch_is_the_version_tested() -> None:
    (torch,) = [r for r in _asked() if r.name == "torch"]
    pin = _pins()["torch"]
    assert f"<{pin.major}.{pin.minor + 1}" in str(torch.specifier)


def test_binder_installs_all_the_tour_needs_by_the_same_pins() -> None:
    index, constraints, *names = _lines("requirements.txt")
    assert re.fullmatch(r"--extra-index-url https://download\.pytorch\.org/whl/cpu", index)
    assert constraints == "-c constraints.txt"
    requirements = {r.name: r for r in map(Requirement, names)}
    assert {r.name for r in _asked("lab")} <= requirements.keys()
    pin = _pins()["torch"]
    assert str(requirements.pop("torch").specifier) == f"=={pin}+cpu"
    assert Version(f"{pin}+cpu") in Requirement(f"torch=={pin}").specifier  # so the constraint accepts the CPU build
    assert all(not r.specifier for r in requirements.values())


def test_the_runtime_is_a_python_the_project_supports() -> None:
    (runtime,) = _lines("runtime.txt")
    version = runtime.removeprefix("python-")
    assert version in Requirement(f"python{PROJECT['requires-python']}").specifier


@pytest.mark.parametrize("script", ["binder/postBuild", ".ci/run", ".ci/full"])
def test_scripts_can_be_run_and_parsed(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_the_package_is_installed_last_and_brings_nothing() -> None:
    assert "pip install --no-cache-dir --no-deps ." in _lines("postBuild")


def test_the_link_lands_on_the_tour() -> None:
    (target,) = re.findall(r"mybinder\.org/\S+\?urlpath=lab/tree/(\S+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert (ROOT / target).is_file()


@pytest.mark.network
def test_pip_can_resolve_what_binder_asks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "-r", str(BINDER / "requirements.txt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
