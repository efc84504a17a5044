"""The README keeps its word: its code runs, its two commands agree with CI and with the pins, and what it names exists."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def _commands() -> list[str]:
    return [line for block in _blocks("bash") for line in block.splitlines() if line.startswith("python3 -m venv ")]


def test_the_code_runs_as_it_stands(tmp_path: Path) -> None:
    code = "\n".join(_blocks("python"))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for word in (
        "module.features.0.weight",
        "6 tensors, all finite",
        "18 equal",
        'strip "module."',
        "read back equal",
        "agree within rounding",
        "attn.qkv put together",
        "torch.cat([source[",
        "8 of 10 tensors hold the file's values",
    ):
        assert word in done.stdout


def test_there_are_exactly_two_commands_and_both_install_by_the_pins() -> None:
    opens, tests = _commands()
    install = 'python3 -m venv .venv && .venv/bin/pip install -c binder/constraints.txt -e ".[{}]" && .venv/bin/python -m '
    assert opens.startswith(install.format("lab") + "jupyterlab ")
    assert tests.startswith(install.format("test") + "pytest")
    assert (ROOT / opens.split()[-1]).is_file()


def test_ci_takes_the_test_command_from_here() -> None:
    extract = re.search(r"^test_command=\$\((.*)\)$", CI, re.MULTILINE)
    assert extract is not None
    found = subprocess.run(["bash", "-c", extract[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == [_commands()[1]]


def test_every_file_it_points_to_exists() -> None:
    targets = re.findall(r"\]\(([^)#][^)]*)\)", README)
    assert "notebooks/workbench.png" in targets
    assert [t for t in targets if "://" not in t and not (ROOT / t).is_file()] == []


@pytest.mark.parametrize("name", re.findall(r"^\| ((?:`\w+` ?)+)\|", README, re.MULTILINE))
def test_every_room_it_names_exists(name: str) -> None:
    for room in re.findall(r"`(\w+)`", name):
        assert (ROOT / "workbench" / room).is_dir() or (ROOT / "workbench" / f"{room}.py").is_file(), room


def test_the_format_table_says_what_is_read() -> None:
    from workbench.formats import ARCHIVES, CLOSER, FILES, FOLDERS

    section = README.partition("## Formats")[2].partition("## The command line")[0]
    rows = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| ")]
    for form in (*FILES, *CLOSER, *ARCHIVES, *FOLDERS):
        assert any(row.startswith(form.title) or form.title in row for row in rows), form.title


def test_words_are_calm() -> None:
    prose = re.sub(r"```.*?```|!\[", "", README, flags=re.DOTALL)
    assert "!" not in prose
    assert all(ord(c) < 0x1F000 for c in README)


def test_the_command_line_does_what_is_said(tmp_path: Path) -> None:
    import torch

    torch.save({"epoch": 12, "model": {"weight": torch.ones(2, 3)}}, tmp_path / "model.pt")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)}
    commands = [line.partition("#")[0].split() for block in _blocks("bash") for line in block.splitlines() if line.startswith("workbench ")]
    assert commands == [
        ["workbench", *words] for words in (["inspect", "model.pt"], ["inspect", "model.pt", "--json"], ["scan", "model.pt"])
    ]
    shown, listed, scanned = (
        subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
        for command in commands
    )
    assert "[2, 3]" in shown
    assert "✓ safe" in scanned
    assert json.loads(listed) == {
        "tensors": [{"name": "model.weight", "shape": [2, 3], "dtype": "float32"}],
        "aliases": {},
        "dangers": [],
        "error": None,
    }
