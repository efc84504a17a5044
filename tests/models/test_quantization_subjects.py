"""Every method on real shapes: it runs, and loads in another process with the error that it told, or it says why not. Oracle: torch and
ONNX Runtime in a process that calls nothing of this library's quantization.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from quantization_subjects import FAMILIES, TORCH, build, inputs

from workbench.errors import UnsupportedError
from workbench.exporting import export_model
from workbench.models import quantize

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

METHODS = [
    ("dynamic", "int8"), ("weight_only", "int8"), ("weight_only", "int4"), ("weight_only", "float8_e4m3fn"), ("dynamic_activation", "int8"),
    ("dynamic_activation", "int4"), ("onnx_dynamic", "int8"), ("onnx_static", "int8"), ("onnx_4bit", "int4"), ("onnx_4bit", "int8"),
]  # fmt: skip
NOTHING = {  # what a method has no module or node to quantize in
    "root lstm": {"weight_only", "dynamic_activation", "onnx_static", "onnx_4bit"},
    "root gru": {"weight_only", "dynamic_activation", "onnx_dynamic", "onnx_static", "onnx_4bit"},
}
LIMIT = {"int8": 0.04, "float8_e4m3fn": 0.06, "int4": 0.25}  # of the answers' norm; a corrupted weight moves them by more
CANCELLING = {"vit": 6}  # its untrained scores are differences of far larger sums
QUICK = {"dynamic", "onnx_dynamic", "onnx_static", "onnx_4bit"}  # torchao takes seconds to import, in every fork


def cases():
    """Every subject with every method; all but a fixed part takes minutes."""
    for name in (*TORCH, *FAMILIES):
        for method, dtype in METHODS:
            quick = name == "mlp" or (name in ("digits", "root lstm", "encoder", "tied") and method in QUICK)
            marks = () if quick and (method, dtype) != ("onnx_4bit", "int8") else pytest.mark.slow
            yield pytest.param(name, method, dtype, marks=marks, id=f"{name}-{method}-{dtype}")


@pytest.fixture(scope="module")
def elsewhere():
    """Asks another process, which loads in a fork of its own what a report told how to load."""
    program = Path(__file__).with_name("quantization_subjects.py")
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:  # fmt: skip

        def ask(**request):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            told = json.loads(process.stdout.readline())
            assert "far" in told, told
            return told["far"]

        yield ask
        process.stdin.close()


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The subjects' own ONNX files, each made once."""
    folder, made = tmp_path_factory.mktemp("originals"), {}

    def path(name):
        if name not in made:
            made[name] = folder / f"{len(made)}.onnx"
            assert export_model(build(name), (), inputs(name), path=made[name])
        return made[name]

    return path


@pytest.mark.parametrize(("name", "method", "dtype"), [*cases()])
def test_what_was_saved_loads_elsewhere_with_the_error_that_was_told(name, method, dtype, elsewhere, originals, tmp_path):
    if name in FAMILIES:
        pytest.importorskip("transformers")
    if not method.startswith("onnx"):
        pytest.importorskip("torchao")
    graph = method.startswith("onnx")
    model, given = build(name), inputs(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    path = tmp_path / ("q.onnx" if graph else "q.pt")
    report = quantize(
        originals(name) if graph else model, method, dtype=dtype, example=given, data=given if method == "onnx_static" else None, path=path
    )
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    if method in NOTHING.get(name, ()):
        assert not report
        assert report.headline.startswith("0 ")
        assert "stays" in report.headline
        assert report.path is None
        assert not path.exists()
        assert all(part.told for part in report.left)
        return
    assert report, report.headline
    assert report.quantized
    assert report.nbytes_after == path.stat().st_size
    assert report.relative < LIMIT[dtype] * CANCELLING.get(name, 1), report.headline
    uncached = name in ("gpt2", "llama", "t5", "whisper")
    far = elsewhere(subject=name, path=str(path), original=str(originals(name)) if graph else "", reload=report.reload, uncached=uncached)
    assert far == pytest.approx([report.max_abs, report.relative], rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("name", ["digits", pytest.param("t5", marks=pytest.mark.slow)])
def test_a_module_is_exported_on_the_way(name, elsewhere, originals, tmp_path):
    report = quantize(build(name), "onnx_dynamic", example=inputs(name), path=tmp_path / "q.onnx")
    again = quantize(originals(name), "onnx_dynamic", example=inputs(name), path=tmp_path / "p.onnx")
    assert report.relative == pytest.approx(again.relative, rel=1e-2)
    assert [p.kind for p in report.quantized] == [p.kind for p in again.quantized]


def test_a_model_that_onnx_cannot_hold_is_refused_with_the_exporters_reason(tmp_path):
    class Branch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else x - 1

    with pytest.raises(UnsupportedError, match="cannot be exported"):
        quantize(Branch(), "onnx_dynamic", example=torch.ones(1, 4), path=tmp_path / "q.onnx")
    assert not list(tmp_path.iterdir())
