"""`python -m workbench inspect`: one JSON object, whatever the file and whatever reads the output."""

import json
import os
import subprocess
import sys

import pytest
import torch


def inspect(*args, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "workbench", "inspect", *map(str, args)], capture_output=True, timeout=60, check=False, **kwargs
    )


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "many.pt"
    torch.save({"model": {f"layer.{i}\x7f\x1b": torch.ones(1) for i in range(3000)}, "tied": torch.ones(2)}, path)
    return path


def test_json_is_one_object_without_raw_control_bytes(file):
    done = inspect(file, "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0
    assert set(told) == {"tensors", "aliases", "dangers", "error"}
    assert told["tensors"][0] == {"name": "model.layer.0\x7f\x1b", "shape": [1], "dtype": "float32"}
    assert not set(done.stdout.rstrip(b"\n")) & {*range(32), 127}


def test_a_reader_that_stops_early_is_no_error(file):
    command = f"{sys.executable} -m workbench inspect {file} --json | head -c 10"
    done = subprocess.run(["bash", "-c", "set -o pipefail; " + command], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_full_output_is_told_and_is_no_finding(file):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "workbench", "inspect", str(file)], stdout=full, stderr=subprocess.PIPE, timeout=60, check=False
        )
    assert done.returncode == 2
    assert b"cannot be written" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_terminal_without_unicode_gets_escapes(file):
    done = inspect(file, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert done.stdout.isascii()


@pytest.mark.parametrize(
    ("source", "sentence"), [("", "empty"), ("/nowhere/at/all.pt", "no such file"), ("https://example.org/x.pt", "not read yet")]
)
def test_what_cannot_be_opened_is_one_sentence_and_exit_code_2(source, sentence):
    done = inspect(source, "--json")
    assert done.returncode == 2
    assert sentence in json.loads(done.stdout)["error"]
