"""The cause of a failure is named where an experiment shows it, and not where none does."""

import copy
import warnings

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.nn import functional

from workbench.verification.comparison import parity


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 5))


@pytest.fixture
def batch():
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(4))


def cause(reference, candidate, inputs, **options):
    report = parity(reference, candidate, inputs, **options)
    assert not report
    assert not report.cause or f"Cause: {report.cause}." in report.headline
    assert report.cause in str(report.to_dict())
    return report.cause


def traced(model, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, args, check_trace=False)


def graph_file(path, nodes, weights=(), opset=18, shape=(2, 3, 4)):
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        list(weights),
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10 if opset > 12 else 7), str(path))
    return path


def test_dropout_and_batch_norm_in_train_mode(batch):
    model, left_on = net(), net()
    left_on.eval()[3].train()
    assert cause(model, traced(left_on, batch), batch).startswith("dropout is left on")
    left_on.eval()[1].train()
    assert cause(model, lambda x: left_on(x), batch).startswith("batch norm is in train mode")
    left_on.train()
    assert cause(model, lambda x: left_on(x), batch).startswith("the candidate is in train mode")


def test_dropout_in_a_graph(tmp_path):
    values = [helper.make_tensor("r", TensorProto.FLOAT, [], [0.5]), helper.make_tensor("t", TensorProto.BOOL, [], [True])]
    path = graph_file(tmp_path / "m.onnx", [helper.make_node("Dropout", ["x", "r", "t"], ["y"])], values)
    found = cause(nn.Sequential(nn.Dropout()), path, torch.randn(2, 3, 4))
    assert found.startswith("dropout is left on: the graph holds 1 Dropout node")


def test_random_draws_are_not_called_dropout(batch):
    model = net().eval()
    assert "draws at random" in cause(net(), lambda x: model(x) + torch.rand(5), batch)


def test_state(batch):
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = 0.0

        def forward(self, x):
            self.seen = self.seen + 1.0
            return x + self.seen

    assert cause(nn.Sequential(nn.Identity()), Kept(), batch) == ""  # differs on the first call already
    assert cause(lambda x: x + 1, Kept(), batch).startswith("state: the first call agrees and call 2 does not")


def test_opset_semantics(tmp_path):
    model = nn.Sequential(nn.Softmax(dim=-1))
    softmax = [helper.make_node("Softmax", ["x"], ["y"])]  # before opset 13 over all axes from the second on, since then over the last
    path = graph_file(tmp_path / "m.onnx", softmax, opset=11)
    assert cause(model, path, torch.randn(2, 3, 4)).startswith("opset semantics: the file says opset 11, and read as opset 13")


def test_quantization(batch):
    model = net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
        assert cause(model, small, batch).startswith("quantization: Sequential (candidate) holds 2 quantized parts")
        with torch.no_grad():
            small[1].bias += 100.0
        assert cause(model, small, batch) == ""  # quantized, but that is not why


def test_quantization_in_a_graph(tmp_path):
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["v"], axis=1), helper.make_node("MatMul", ["x", "v"], ["y"])]
    model = nn.Linear(4, 3, bias=False)
    weight = model.weight.detach().T
    scale = weight.abs().amax(0) / 127
    values = [
        helper.make_tensor("w", TensorProto.INT8, [4, 3], (weight / scale).round().char().flatten().tolist()),
        helper.make_tensor("s", TensorProto.FLOAT, [3], scale.tolist()),
    ]
    assert "1 quantized parts" in cause(model, graph_file(tmp_path / "m.onnx", nodes, values), torch.randn(2, 3, 4))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_dtype(batch, half):
    model = net().eval()
    word = str(half).removeprefix("torch.")
    rounded = copy.deepcopy(model).to(half).float()
    assert f"weights rounded to {word}" in cause(model, lambda x: rounded(x), batch)
    halved = copy.deepcopy(model).to(half)
    assert f"computing in {word}" in cause(model, lambda x: halved(x.to(half)), batch)
    assert "only their element type differs" in cause(model, lambda x: copy.deepcopy(model)(x).double(), batch)


def test_weights(batch):
    wrong = net()
    with torch.no_grad():
        wrong[4].bias[2] += 1e-3
    found = cause(net(), wrong, batch)
    assert found.startswith("weights: 1 of 9 tensors differ, `4.bias` by up to 0.001")

    class Skips(nn.Sequential):
        def forward(self, x):
            return self[4](self[2](self[0](x)))

    with torch.no_grad():
        assert cause(net(), Skips(*wrong), batch) == ""  # other weights, but they are not the whole of it


def test_padding():
    class Filled(nn.Module):
        def __init__(self, filler):
            super().__init__()
            self.filler = filler

        def forward(self, x, mask):
            return x.masked_fill(mask == 0, self.filler)

    x, mask = torch.randn(2, 4), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    assert cause(Filled(0.0), Filled(1.0), {"x": x, "mask": mask}).startswith(
        "padding: it differs only where `mask` is 0; pass mask='mask'"
    )
    assert "only where `mask` is 1" in cause(lambda x, mask: x, lambda x, mask: x + mask, {"x": x, "mask": mask})
    assert cause(lambda x, mask: x, lambda x, mask: x + 1, {"x": x, "mask": mask}) == ""


class Branching(nn.Module):
    def forward(self, x):
        return x.tanh() if x.sum() > 0 else x.sigmoid()


def test_a_baked_branch(batch):
    up = batch.abs()
    found = cause(Branching(), traced(Branching(), up), [up, -up])
    assert found.startswith("a branch is baked in: on batch 2 the reference runs other operations than on batch 1")
    assert "negated" in cause(Branching(), lambda x: x.tanh(), -up)  # the values on which it agrees are found, not given


def test_no_branch_is_blamed_where_the_reference_has_none(batch):
    """Dead ReLUs hide a difference from some values; the reference runs the same operations on all."""
    assert cause(lambda x: functional.relu(x), lambda x: functional.leaky_relu(x, 0.1), [batch.abs(), batch]) == ""


def test_an_experiment_that_raises_is_no_cause(batch, monkeypatch):
    def broken(lab):
        raise RuntimeError("no")

    monkeypatch.setattr("workbench.verification.causes._EXPERIMENTS", (broken, lambda lab: "seen"))
    assert cause(net(), lambda x: x[:, :5], batch) == "seen"
