"""Quantization of a model, part by part. Oracles: the formulas of the engines, the engines themselves unrepaired, numpy and ONNX Runtime."""

import copy
import json
import logging
import subprocess
import sys
import threading

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic as engine_dynamic
from torch import nn

import workbench as wb
from workbench.errors import CancelledError, MissingDependencyError, ReportFailedError, SelectionError, UnsupportedError
from workbench.exporting import export_model
from workbench.models import quantize

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.out(self.b(torch.relu(self.a(x))))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 16))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    for name, model in (("mlp", mlp()), ("tied", Tied())):
        assert export_model(
            model, torch.randn(4, 64), path=folder / f"{name}.onnx", dynamic_axes={"x" if name == "tied" else "input": {0: "n"}}
        )
    return folder


def run(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def weights(path):
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}


def relative(found, expected):
    return float(np.linalg.norm(np.float64(found) - expected) / np.linalg.norm(np.float64(expected)))


# values


def test_codes_of_dynamic_are_those_of_the_formula():
    model = mlp()
    made = quantize(model).model[0].weight()
    weight = model[0].weight.detach()
    scale = weight.abs().max() / 127.5
    assert made.q_scale() == pytest.approx(float(scale), rel=1e-6)
    assert made.q_zero_point() == 0
    assert torch.equal(made.int_repr().int(), (weight / scale).round().clamp(-128, 127).int())


def test_codes_of_onnx_dynamic_are_those_of_the_formula(graphs, tmp_path):
    report = quantize(graphs / "mlp.onnx", "onnx_dynamic", path=tmp_path / "q.onnx")
    found, weight = weights(report.path), weights(graphs / "mlp.onnx")["0.weight"].T  # [in, out], a scale for each output
    low, high = np.minimum(weight.min(0), 0), np.maximum(weight.max(0), 0)
    scale = (high.astype(np.float64) - low) / 255
    zero = np.round(-low / scale)
    codes, scales, zeros = (
        next(v for n, v in found.items() if n.startswith("0.weight.T") and n.endswith(end))
        for end in ("_quantized", "_scale", "_zero_point")
    )
    assert codes.dtype == np.uint8  # products of signed codes overflow on processors without VNNI
    assert np.allclose(scales, scale, rtol=1e-6)
    assert np.array_equal(zeros, zero.astype(np.uint8))
    expected = np.clip(np.round(weight / scale + zero), 0, 255)
    assert np.abs(codes.astype(int) - expected).max() <= 1  # half a code either way, where float32 and float64 round unlike
    assert (codes == expected).mean() > 0.999


def test_codes_of_a_recurrent_layer_in_a_graph_keep_seven_bits(tmp_path):
    lstm, x = nn.LSTM(16, 16, batch_first=True), torch.randn(2, 3, 16)
    report = quantize(lstm, "onnx_dynamic", example=x, path=tmp_path / "q.onnx")
    assert [p.kind for p in report.quantized] == ["LSTM"]
    codes = [v for v in weights(report.path).values() if v.dtype == np.int8 and v.ndim == 3]
    assert len(codes) == 2
    assert max(int(np.abs(v.astype(int)).max()) for v in codes) <= 64


def test_the_error_told_is_the_error(graphs, tmp_path):
    x = torch.randn(32, 64)
    model = mlp().eval()
    report = quantize(model, example=x)
    with torch.no_grad():
        before, after = model(x).double(), report.model(x).double()
    assert report.max_abs == pytest.approx(float((after - before).abs().max()))
    assert report.relative == pytest.approx(float((after - before).norm() / before.norm()))
    assert report.snr_db == pytest.approx(-20 * np.log10(report.relative))
    many = quantize(model, example=[x, torch.randn(8, 64)])
    assert next(iter(many.outputs.values())).count == 40 * 16


# failures of the engines


def test_a_weight_that_gemm_nodes_share_is_not_corrupted(graphs, tmp_path):
    x = torch.randn(8, 64)
    expected = run(graphs / "tied.onnx", x)
    engine_dynamic(str(graphs / "tied.onnx"), str(tmp_path / "raw.onnx"))
    assert relative(run(tmp_path / "raw.onnx", x), expected) > 0.3  # the engine by itself
    for method in ("onnx_dynamic", "onnx_static", "onnx_4bit"):
        report = quantize(graphs / "tied.onnx", method, example=x, data=x, path=tmp_path / "q.onnx")
        assert relative(run(report.path, x), expected) < (0.2 if method == "onnx_4bit" else 0.03)
        assert len(report.quantized) == 3
        packed = [v for v in weights(report.path).values() if v.size in (64 * 64, 64 * 64 // 2) and v.dtype != np.float32]
        assert len(packed) == 1  # and stays one
        assert (method == "onnx_static") != any("shared by several Gemm" in text for text in report.repairs)


def test_told_shapes_of_weights_no_longer_stop_the_engine(graphs, tmp_path):
    model = onnx.load(str(graphs / "mlp.onnx"))
    model.graph.value_info.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer)
    onnx.save(model, str(tmp_path / "told.onnx"))
    with pytest.raises(Exception, match="differ in dimension"):
        engine_dynamic(str(tmp_path / "told.onnx"), str(tmp_path / "raw.onnx"))
    report = quantize(tmp_path / "told.onnx", "onnx_dynamic", example=torch.randn(4, 64), path=tmp_path / "q.onnx")
    assert report
    assert any("shapes of 4 weights" in text for text in report.repairs)


def test_four_bits_reach_gemm(graphs, tmp_path):
    report = quantize(graphs / "mlp.onnx", "onnx_4bit", example=torch.randn(4, 64), path=tmp_path / "q.onnx")
    assert {n.op_type for n in onnx.load(str(report.path)).graph.node} >= {"MatMulNBits", "Add"}
    assert report.nbytes_after < 0.25 * report.nbytes_before
    assert any("2 Gemm nodes" in text for text in report.repairs)


def test_weights_in_constant_nodes_and_nodes_without_names(tmp_path):
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(w))
    nodes = [constant, helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("MatMul", ["y", "w"], ["z"])]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 64]) for n in ("x", "z")]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(tmp_path / "c.onnx"))
    x = torch.randn(4, 64)
    for method in ("onnx_dynamic", "onnx_static", "onnx_4bit"):
        report = quantize(tmp_path / "c.onnx", method, example=x, data=x, path=tmp_path / "q.onnx")
        assert len(report.quantized) == 2
        assert report.relative < 0.2
        assert any("Constant nodes" in text for text in report.repairs)


def test_attention_products_stay_in_floats_when_calibrated(tmp_path):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    report = quantize(layer, "onnx_static", example=x, data=[x], path=tmp_path / "q.onnx")
    graph = onnx.load(str(report.path)).graph
    made_by = {name: n.op_type for n in graph.node for name in n.output}
    bare = [n for n in graph.node if n.op_type == "MatMul" and not any(made_by.get(i) == "DequantizeLinear" for i in n.input)]
    assert len(bare) == 2
    assert report.relative < 0.02


def test_the_encoders_fast_path_is_kept_off_quantized_layers():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 5, 16), torch.arange(5)[None] >= torch.tensor([[5], [3]])
    report = quantize(model, example={"src": x, "src_key_padding_mask": padding})
    assert any("fast path" in text for text in report.repairs)
    assert len(report.quantized) == 4
    kept = ~padding
    with torch.no_grad():
        before, after = model(x, src_key_padding_mask=padding)[kept], report.model(x, src_key_padding_mask=padding)[kept]
    assert relative(after.numpy(), before.numpy()) < 0.02
    assert model.layers[0].activation_relu_or_gelu


def test_a_row_of_zeros_is_no_nan_in_float8():
    pytest.importorskip("torchao")
    model = mlp()
    model[0].weight.data[3] = 0
    report = quantize(model, "weight_only", dtype="float8_e4m3fn", example=torch.randn(2, 64))
    assert report
    assert [p.name for p in report.quantized] == ["2"]
    assert "row of zeros" in next(p.told for p in report.left if p.name == "0")


@pytest.mark.parametrize("method", ["dynamic", "onnx_dynamic"])
def test_a_weight_that_is_not_finite_is_refused(method, tmp_path):
    model = mlp()
    model[2].weight.data[0, 0] = torch.nan
    with pytest.raises(SelectionError, match=r"2\.weight.* holds NaN or infinity"):
        quantize(model, method, example=torch.zeros(1, 64), path=tmp_path / "q.onnx")
    assert quantize(model, "dynamic", exclude="2").quantized


# what is chosen, and what is told of the rest


def test_modules_are_chosen_by_type_and_glob():
    model = nn.Sequential(
        mlp(), nn.GRU(16, 8), nn.LSTM(8, 8, proj_size=4), nn.Embedding(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    )
    report = quantize(model)
    told = {p.name: p.told for p in report.left}
    assert [p.name for p in report.quantized] == ["0.0", "0.2", "1"]
    assert "proj_size" in told["2"]
    assert "takes Linear" in told["3"]
    assert "computed anew" in told["4"]
    assert [p.name for p in quantize(model, modules=nn.Linear).quantized] == ["0.0", "0.2"]
    assert [p.name for p in quantize(model, modules=["0.0", nn.GRU]).quantized] == ["0.0", "1"]
    report = quantize(model, modules="0.*", exclude="0.2")
    assert [p.name for p in report.quantized] == ["0.0"]
    assert {p.name: p.told for p in report.left}["0.2"] == "left out by exclude"
    for wrong in ({"modules": "nothing"}, {"exclude": "nothing"}):
        with pytest.raises(SelectionError, match="no module or node with weights matches 'nothing'"):
            quantize(model, **wrong)


def test_nodes_are_chosen_by_type_and_glob(graphs, tmp_path):
    for method in ("onnx_dynamic", "onnx_static", "onnx_4bit"):
        one = quantize(graphs / "mlp.onnx", method, modules="2", data=torch.randn(4, 64), path=tmp_path / "q.onnx")
        assert ([p.name for p in one.quantized], [p.name for p in one.left]) == (["2"], ["0"])
        assert run(one.path, torch.randn(3, 64)).shape == (3, 16)
        assert not quantize(graphs / "mlp.onnx", method, modules=nn.Conv2d, data=torch.randn(4, 64), path=tmp_path / "p.onnx")


def test_nothing_quantized_is_said_aloud(tmp_path):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8)
    report = quantize(model, example=x, path=tmp_path / "q.pt")
    assert report.headline.startswith("0 modules were quantized, fp32 ")
    assert "the ONNX methods take it" in report.headline
    with pytest.raises(ReportFailedError, match="0 modules were quantized"):
        report.check()
    assert not (tmp_path / "q.pt").exists()
    with torch.no_grad():
        assert torch.equal(report.model(x), model(x))


def test_answers_that_are_lost_make_the_report_false():
    model = nn.Sequential(nn.Linear(64, 8, bias=False))
    model[0].weight.data[0, 0] = 1e6  # one scale for all: every other weight becomes 0
    x = torch.randn(4, 64)
    x[:, 0] = 0
    report = quantize(model, example=x)
    assert not report
    assert "as large as the answers" in report.headline


def test_one_tensor_of_two_names_is_told():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(40, 32), nn.Linear(32, 40, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    report = quantize(Language(), example=torch.arange(5))
    assert report
    assert report.nbytes_after > report.nbytes_before
    assert ", +" in report.headline
    assert any("head.weight was one tensor with embed.weight" in note for note in report.notes)


def test_the_first_line_and_the_tables(graphs, tmp_path):
    report = quantize(graphs / "mlp.onnx", "onnx_dynamic", example=torch.randn(4, 64), path=tmp_path / "q.onnx")
    change = 100 * (1 - (tmp_path / "q.onnx").stat().st_size / (graphs / "mlp.onnx").stat().st_size)
    assert str(report).splitlines()[0].removeprefix("✓ ") == report.headline
    assert f"−{change:.1f} %; 2 of 2 nodes quantized" in report.headline
    assert [t.title for t in report.tables()] == ["on disk", "parts", "answers against the original's", "remarks", "load it again"]
    assert json.loads(json.dumps(report.to_dict()))["nbytes_after"] == (tmp_path / "q.onnx").stat().st_size
    assert "was not measured" in quantize(mlp()).headline


# the model, the file and the process


def test_the_model_is_left_as_it_was():
    model = mlp().train()
    before, state = copy.deepcopy(model), dict(model.named_modules())
    report = quantize(model, example=torch.randn(2, 64))
    assert model.training
    assert not report.model.training
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in state.items()}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_compare_takes_what_was_made(tmp_path):
    pytest.importorskip("sklearn")
    from workbench.teaching.samples import DigitsNet, accuracy, digits, train_epoch

    torch.manual_seed(0)
    model, data = DigitsNet(), digits()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for epoch in range(3):
        train_epoch(model, data, optimizer, seed=epoch)
    images, axes = data.test_images, {"image": {0: "n"}}
    calibration = list(data.train_images[:320].split(32))
    made = {
        "torch": quantize(model, example=images).model,
        "graph": quantize(model, "onnx_dynamic", example=images[:2], dynamic_axes=axes, path=tmp_path / "d.onnx").path,
        "static": quantize(model, "onnx_static", example=images[:2], data=calibration, dynamic_axes=axes, path=tmp_path / "s.onnx").path,
    }
    report = wb.compare({"fp32": model, **made}, (images, data.test_labels))
    assert report, report.headline
    first, *others = report.variants
    assert first.accuracy == pytest.approx(accuracy(model, data))
    assert first.accuracy > 0.9
    for variant in others:
        assert variant.accuracy > first.accuracy - 0.02
        assert variant.disk_nbytes < 0.4 * first.disk_nbytes


def test_calibration_tells_how_far_it_is_and_stops_when_cancelled(graphs, tmp_path, capsys):
    seen, stop = [], threading.Event()
    data = [torch.randn(4, 64) for _ in range(5)]
    options = {"data": data, "path": tmp_path / "q.onnx"}
    quantize(graphs / "mlp.onnx", "onnx_static", progress=lambda p: (seen.append((p.label, p.done, p.total)), print("heard")), **options)
    assert seen[-1] == ("calibrating", 5, 5)
    assert "heard" in capsys.readouterr().out
    written = (tmp_path / "q.onnx").read_bytes()
    stop.set()
    with pytest.raises(CancelledError):
        quantize(graphs / "mlp.onnx", "onnx_static", cancel=stop, **options)
    assert (tmp_path / "q.onnx").read_bytes() == written
    assert [file.name for file in tmp_path.iterdir()] == ["q.onnx"]


QUIET = """
import logging, sys, torch, workbench as wb
torch.set_num_threads(1)
model, x = torch.nn.Sequential(torch.nn.Linear(64, 32)), torch.randn(2, 64)
before = logging.root.handlers[:], logging.root.level
for method in sys.argv[2:]:
    assert wb.models.quantize(model, method, example=x, data=x, path=sys.argv[1] + ("/q.onnx" if "onnx" in method else "/q.pt"))
assert (logging.root.handlers, logging.root.level) == before
logging.warning("told")
"""


def test_the_engines_say_nothing_and_leave_logging_alone(tmp_path):
    pytest.importorskip("torchao")
    methods = ("weight_only", "dynamic", "onnx_dynamic", "onnx_static", "onnx_4bit")
    done = subprocess.run([sys.executable, "-c", QUIET, str(tmp_path), *methods], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "WARNING:root:told\n")


def test_what_cannot_be_done_is_said_in_words(graphs, tmp_path, monkeypatch):
    model, x = mlp(), torch.randn(2, 64)
    for wrong, told in (
        ({"method": "int8"}, "no quantization method"),
        ({"dtype": "int4"}, "dynamic makes no int4"),
        ({"method": "onnx_dynamic"}, "writes a file"),
        ({"method": "onnx_dynamic", "path": "q.onnx"}, "exported with an example"),
        ({"method": "onnx_static", "path": "q.onnx"}, "calibrated on data"),
        ({"group_size": 32}, "has no groups"),
        ({"example": torch.randn(2, 65)}, "does not run on the example"),
    ):
        with pytest.raises(SelectionError, match=told):
            quantize(model, **wrong)
    with pytest.raises(SelectionError, match="takes a module"):
        quantize(graphs / "mlp.onnx", "dynamic")
    nn.utils.prune.l1_unstructured(model[0], "weight", amount=0.5)
    with torch.enable_grad():
        model(x)
    with pytest.raises(UnsupportedError, match="cannot be copied"):
        quantize(model)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(MissingDependencyError, match=r"checkpoint-workbench\[compress\]"):
        quantize(mlp(), "weight_only")


@pytest.mark.parametrize("method", ["weight_only", "dynamic_activation"])
def test_groups_of_int4_that_do_not_divide_are_left(method):
    pytest.importorskip("torchao")
    report = quantize(nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 8)), method, dtype="int4", group_size=32, example=torch.randn(2, 64))
    assert [p.name for p in report.quantized] == ["0"]
    assert "do not divide into groups of 32" in report.left[0].told
    assert any("in 8 bits each" in note for note in report.notes)
    assert logging.root.level == logging.WARNING
