"""The tour runs from top to bottom in a kernel of its own, says nothing on stderr, and its headline numbers are what they should be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
_FACTS = """
    "accuracy": [accuracy, samples.accuracy(fresh, data)],
    "matched": [len(keymap.pairs), len(keymap.unmatched), len(keymap.ambiguous), len(keymap.unused)],
    "certificate": [bool(certificate), certificate.coverage],
    "extras": [dict(ckpt.extras) == dict(wb.open(work / "digits_repaired.pt").extras), "epoch" in ckpt.extras],
    "export": [bool(export), bool(export["onnx"].checked)],
    "parity": [bool(parity), parity.max_abs],
    "variants": {v.name: [v.disk_nbytes, v.accuracy, v.seconds_one, v.problem] for v in comparison.variants},
"""


@pytest.fixture(scope="module")
def tour(run_notebook: Any) -> Any:
    return run_notebook("00_tour.ipynb", _FACTS)


def test_nothing_fails_and_nothing_is_said_on_stderr(tour: Any) -> None:
    assert tour.complaints() == []


def test_the_network_learned_and_loading_changed_nothing(tour: Any) -> None:
    trained, loaded = tour.facts["accuracy"]
    assert trained > 0.95
    assert loaded == trained


def test_every_key_was_matched_and_the_certificate_is_clean(tour: Any) -> None:
    assert tour.facts["matched"] == [18, 0, 0, 0]
    assert tour.facts["certificate"] == [True, 1.0]


def test_the_repaired_file_keeps_all_that_is_no_weight(tour: Any) -> None:
    assert tour.facts["extras"] == [True, True]


def test_the_export_is_proved_on_every_test_image(tour: Any) -> None:
    assert tour.facts["export"] == [True, True]
    agrees, largest = tour.facts["parity"]
    assert agrees
    assert 0 <= largest < 1e-4


def test_int8_is_a_quarter_of_the_bytes_and_keeps_the_accuracy(tour: Any) -> None:
    variants = tour.facts["variants"]
    assert all(problem == "" and seconds > 0 for _, _, seconds, problem in variants.values())
    assert variants["int8"][0] < 0.3 * variants["float32"][0]
    assert variants["int8"][1] > variants["float32"][1] - 0.02
    assert variants["half pruned"][1] > 0.9
    assert variants["ONNX"][1] == variants["float32"][1]


@pytest.mark.parametrize("cell", ["ckpt = wb.open", "wb.diff(parallel, ckpt)", "int8 = wb.ops.quantize(weights)"])
def test_checkpoints_and_differences_are_live_views_with_a_static_form(tour: Any, cell: str) -> None:
    (output,) = tour.outputs(cell)
    assert {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"} <= set(output.data)


@pytest.mark.parametrize("cell", ["parity.plot()", "comparison.plot()"])
def test_the_tour_ends_with_two_figures(tour: Any, cell: str) -> None:
    (output,) = tour.outputs(cell)
    assert "image/png" in output.data


def test_it_fits_on_a_small_machine(tour: Any) -> None:
    assert tour.peak_mb < 1200


def test_it_writes_into_its_own_folder_only(tour: Any) -> None:
    made = {p.name for p in tour.folder.iterdir()} - {"ipython", "jupyter"}
    assert made == {"00_tour.ipynb", "work"}


@pytest.mark.browser
def test_the_picture_in_the_readme_can_be_taken_anew(tmp_path: Path) -> None:
    """The tour in a real JupyterLab: a click in its explorer reaches the kernel, whose histogram comes back."""
    picture = tmp_path / "workbench.png"
    done = subprocess.run(
        [sys.executable, str(ROOT / "notebooks" / "screenshot.py"), str(picture)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    heads = [path.read_bytes()[:24] for path in (picture, ROOT / "notebooks" / "workbench.png")]
    assert heads[0] == heads[1]  # a PNG of the same width and height
