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


@pytest.mark.parametrize(("source", "sentence"), [("", "empty"), ("/nowhere/at/all.pt", "no such file")])
def test_what_cannot_be_opened_is_one_sentence_and_exit_code_2(source, sentence):
    done = inspect(source, "--json")
    assert done.returncode == 2
    assert sentence in json.loads(done.stdout)["error"]


# scan


def scanned(*args):
    return subprocess.run([sys.executable, "-m", "workbench", "scan", *map(str, args)], capture_output=True, timeout=60, check=False)


@pytest.fixture
def evil(tmp_path):
    path = tmp_path / "evil.pt"
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "marker").encode() + b"'\ntR.")
    yield path
    assert not (tmp_path / "marker").exists()


def test_scan_tells_by_its_exit_code(file, evil, tmp_path):
    assert scanned(file).returncode == 0
    assert scanned(evil).returncode == 1
    assert scanned(tmp_path / "nothing.pt").returncode == 2
    assert scanned().returncode == 2
    assert scanned(file, evil).returncode == 1
    assert scanned(file, tmp_path / "nothing.pt").returncode == 2
    done = scanned(evil)
    assert b"would call os.system" in done.stdout
    assert not set(done.stdout) & {*range(32)} - {10}


def test_scan_as_json_sarif_and_page(file, evil, tmp_path):
    one, two = json.loads(scanned(evil, "--json").stdout), json.loads(scanned(file, evil, "--json").stdout)
    assert one["ok"] is False
    assert [report["ok"] for report in two] == [True, False]
    log = json.loads(scanned(file, evil, "--sarif").stdout)
    assert [len(run["results"]) > 0 for run in log["runs"]] == [False, True]
    assert scanned(evil, "--html", tmp_path / "out.html").returncode == 1
    assert "os.system" in (tmp_path / "out.html").read_text()
