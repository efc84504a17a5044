"""The tour runs from top to bottom in a kernel of its own, says nothing on stderr, and its headline numbers are what they should be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
TOUR = ROOT / "notebooks" / "00_tour.ipynb"
# VmHWM, not ru_maxrss: that one is inherited from the process that started the kernel
_FACTS = """
import json, re
print(json.dumps({
    "accuracy": [accuracy, samples.accuracy(fresh, data)],
    "matched": [len(keymap.pairs), len(keymap.unmatched), len(keymap.ambiguous), len(keymap.unused)],
    "certificate": [bool(certificate), certificate.coverage],
    "extras": [dict(ckpt.extras) == dict(wb.open(work / "digits_repaired.pt").extras), "epoch" in ckpt.extras],
    "export": [bool(export), bool(export["onnx"].checked)],
    "parity": [bool(parity), parity.max_abs],
    "variants": {v.name: [v.disk_nbytes, v.accuracy, v.seconds_one, v.problem] for v in comparison.variants},
    "peak_mb": int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1.024e-3,
}))
"""


@dataclass
class Tour:
    cells: list[Any]
    facts: dict[str, Any]
    folder: Path

    def outputs(self, start: str) -> list[Any]:
        """What the one cell whose source holds `start` put out."""
        (cell,) = [c for c in self.cells if c.cell_type == "code" and start in c.source]
        return list(cell.outputs)


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory, measured: dict[str, str]) -> Tour:
    folder = tmp_path_factory.mktemp("tour")
    shutil.copy(TOUR, folder)
    book = nbformat.read(folder / TOUR.name, as_version=4)
    book.cells.append(nbformat.v4.new_code_cell(_FACTS))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)}
    env |= {"IPYTHONDIR": str(folder / "ipython"), "JUPYTER_CONFIG_DIR": str(folder / "jupyter")}
    started = time.perf_counter()
    client = NotebookClient(book, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute(env=env)
    seconds = time.perf_counter() - started
    *cells, last = book.cells
    facts = json.loads("".join(o.text for o in last.outputs))
    measured[f"notebooks/{TOUR.name}"] = f"{seconds:.0f} s, {facts['peak_mb']:.0f} MB at most"
    return Tour(cells, facts, folder)


def test_nothing_fails_and_nothing_is_said_on_stderr(tour: Tour) -> None:
    said = [
        (o.output_type, o.get("name"), o.get("text") or o.get("evalue")) for c in tour.cells if c.cell_type == "code" for o in c.outputs
    ]
    assert [entry for entry in said if entry[0] == "error" or entry[1] == "stderr"] == []


def test_the_network_learned_and_loading_changed_nothing(tour: Tour) -> None:
    trained, loaded = tour.facts["accuracy"]
    assert trained > 0.95
    assert loaded == trained


def test_every_key_was_matched_and_the_certificate_is_clean(tour: Tour) -> None:
    assert tour.facts["matched"] == [18, 0, 0, 0]
    assert tour.facts["certificate"] == [True, 1.0]


def test_the_repaired_file_keeps_all_that_is_no_weight(tour: Tour) -> None:
    assert tour.facts["extras"] == [True, True]


def test_the_export_is_proved_on_every_test_image(tour: Tour) -> None:
    assert tour.facts["export"] == [True, True]
    agrees, largest = tour.facts["parity"]
    assert agrees
    assert 0 <= largest < 1e-4


def test_int8_is_a_quarter_of_the_bytes_and_keeps_the_accuracy(tour: Tour) -> None:
    variants = tour.facts["variants"]
    assert all(problem == "" and seconds > 0 for _, _, seconds, problem in variants.values())
    assert variants["int8"][0] < 0.3 * variants["float32"][0]
    assert variants["int8"][1] > variants["float32"][1] - 0.02
    assert variants["half pruned"][1] > 0.9
    assert variants["ONNX"][1] == variants["float32"][1]


@pytest.mark.parametrize("cell", ["ckpt = wb.open", "wb.diff(parallel, ckpt)", "int8 = wb.ops.quantize_int8(weights)"])
def test_checkpoints_and_differences_are_live_views_with_a_static_form(tour: Tour, cell: str) -> None:
    (output,) = tour.outputs(cell)
    assert {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"} <= set(output.data)


@pytest.mark.parametrize("cell", ["parity.plot()", "comparison.plot()"])
def test_the_tour_ends_with_two_figures(tour: Tour, cell: str) -> None:
    (output,) = tour.outputs(cell)
    assert "image/png" in output.data


def test_it_fits_on_a_small_machine(tour: Tour) -> None:
    assert tour.facts["peak_mb"] < 1200


def test_it_writes_into_its_own_folder_only(tour: Tour) -> None:
    made = {p.name for p in tour.folder.iterdir()} - {"ipython", "jupyter"}
    assert made == {TOUR.name, "work"}


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
