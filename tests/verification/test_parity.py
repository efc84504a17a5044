"""Parity: what agrees, what must not, and that a model is given back as it came."""

import copy
import math
import warnings

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from workbench.errors import MissingFileError, ReportFailedError, SelectionError, UnsupportedError, UntrustedError
from workbench.verification.comparison import parity
from workbench.verification.reordering import reversed_sums
from workbench.verification.tolerance import noise_floor


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 5))


@pytest.fixture
def batch():
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(4))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        y = self.fc(x)
        return {"logits": y, "aux": (y.argmax(-1), [y.sum(), y > 0])}


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.last = None

    def forward(self, x):
        self.seen += 1
        out = x + self.seen
        if self.last is not None:
            out = out + self.last
        self.last = x.mean()
        return out


def linear_onnx(path, weight, opset=18):
    """A one-node ONNX file written by the onnx library, not by any exporter."""
    n_in, n_out = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", n_in])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", n_out])],
        [helper.make_tensor("w", TensorProto.FLOAT, weight.shape, weight.flatten().tolist())],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), str(path))
    return path


def test_a_copy_agrees_and_an_other_order_of_summation_too(batch):
    model = mlp()
    assert parity(model, copy.deepcopy(model), batch)
    twin = copy.deepcopy(model).eval()

    def reordered(x):
        y = (twin[0].weight.flip(1) * x.flip(1)[:, None]).sum(-1) + twin[0].bias
        for layer in list(twin)[1:]:
            y = layer(y)
        return y

    report = parity(model, reordered, batch)
    assert report
    assert report.max_abs > 0
    assert "8 ×" in report.outputs[0].reason or "4 eps" in report.outputs[0].reason


@pytest.mark.parametrize("shift", [1e-2, 1e-4, 1e-5])
def test_a_shifted_bias_is_found_and_placed(batch, shift):
    model = mlp()
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong[4].bias[2] += shift
    report = parity(model, wrong, batch)
    assert not report
    assert report.max_abs == pytest.approx(shift, rel=0.1)
    assert ", 2]: " in report.outputs[0].figures.worst
    with pytest.raises(ReportFailedError, match="differ"):
        report.check()


def test_both_verdicts_are_shown_and_the_given_one_decides(batch):
    model = mlp()
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong[4].bias += 1e-4
    loose, tight = parity(model, wrong, batch, atol=1e-3), parity(model, wrong, batch, rtol=1e-5, atol=1e-6)
    assert loose
    assert not tight
    assert not loose.outputs[0].within_noise
    assert loose.outputs[0].within_given
    assert "within rtol 0, atol 0.001" in loose.headline


def test_nested_outputs_by_path_and_whole_numbers_exactly(batch):
    model = Nested()
    report = parity(model, copy.deepcopy(model), batch)
    assert report
    assert [o.name for o in report.outputs] == ["logits", "aux.0", "aux.1.0", "aux.1.1"]
    assert [o.dtype for o in report.outputs] == ["float32", "int64", "float32", "bool"]
    one_off = parity(lambda x: x.long(), lambda x: x.long() + (x == x.max()).long(), batch)
    assert not one_off
    assert one_off.outputs[0].figures.unequal == 2  # one value, two calls
    assert "differs in 2 of" in one_off.headline


def test_state_is_found_on_the_second_call_only(batch):
    model = Stateful()
    stateless = lambda x: x + 1  # noqa: E731
    assert parity(model, stateless, batch, calls=1)
    report = parity(model, stateless, batch)
    assert not report
    assert "keeps state" in report.problems[0]
    assert parity(model, copy.deepcopy(model), batch, calls=3)  # the same state on both sides is no difference


def test_a_drift_within_tolerance_is_still_a_drift(batch):
    class Drifting(Stateful):
        def forward(self, x):
            self.seen += 1
            return x + 1e-3 * self.seen

    report = parity(lambda x: x, Drifting(), batch, atol=1.0)
    assert all(o.ok for o in report.outputs)
    assert not report
    assert "keeps state" in report.headline


def test_the_model_is_given_back_as_it_came(batch):
    model = mlp().train()
    model[1].eval()
    flags = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    parity(model, copy.deepcopy(model), batch)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    stateful = Stateful()
    parity(stateful, copy.deepcopy(stateful), batch)
    assert stateful.seen == 0
    assert stateful.last is None


def test_a_failing_model_is_given_back_too(batch):
    model = mlp().train()
    with pytest.raises(SelectionError, match="does not run on batch 1, call 1: RuntimeError"):
        parity(model, model, batch[:, :3])
    assert model.training
    assert model[1].training


def test_what_a_model_caches_can_still_be_trained_on(batch):
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 5)
            self.tables: list = []

        def forward(self, x):
            if not self.tables:
                self.tables.append(torch.ones(5))
            return self.fc(x) * self.tables[0]

    model = Cached()
    parity(model, copy.deepcopy(model), batch)
    model(batch).sum().backward()  # an inference tensor in the list would raise here


def test_a_model_that_writes_into_its_input_harms_nobody(batch):
    before = batch.clone()
    assert parity(lambda x: x.mul_(2), lambda x: x.mul_(2), batch)
    assert torch.equal(batch, before)


def test_the_random_state_is_left_alone(batch):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    assert not parity(nn.Sequential(nn.Identity()), lambda x: x + torch.rand_like(x), batch)
    assert torch.rand(1) == expected


def test_shape_dtype_and_missing_outputs_are_failing_rows(batch):
    shapes = parity(lambda x: x, lambda x: x[:, :4], batch)
    assert "shape [8, 16] in <lambda> (reference) and [8, 4] in <lambda> (candidate)" in shapes.headline
    dtypes = parity(lambda x: x, lambda x: x.double(), batch)
    assert not dtypes
    assert "float32" in dtypes.headline
    assert dtypes.outputs[0].figures.max_abs == 0
    missing = parity(lambda x: {"a": x, "b": x}, lambda x: {"a": x, "c": x}, batch)
    assert [(o.name, o.ok) for o in missing.outputs] == [("a", True), ("b", False), ("c", False)]


def test_a_candidate_that_raises_is_a_finding(batch):
    def refuses(x):
        raise ValueError("no such batch")

    report = parity(lambda x: x, refuses, batch)
    assert not report
    assert "ValueError: no such batch" in report.headline
    assert report.tables()


def test_nan_is_told(batch):
    def nan_at(*places):
        def answer(x):
            y = x.clone()
            for place in places:
                y[0, place] = math.nan
            return y

        return answer

    same = parity(nan_at(1), nan_at(1), batch)
    assert same
    assert "NaN on both sides at 1 of 128 places" in same.outputs[0].note
    assert not parity(nan_at(1), nan_at(2), batch)
    one_sided = parity(nan_at(1), nan_at(1, 2), batch, rtol=1.0, atol=1e9)
    assert not one_sided
    assert "on one side only" in one_sided.headline
    assert not one_sided.outputs[0].within_noise
    assert not one_sided.outputs[0].within_given
    assert "proves nothing" in parity(lambda x: x * math.nan, lambda x: x * math.nan, batch).headline


def test_tiny_zero_and_empty_outputs_are_flagged(batch):
    tiny = parity(lambda x: x * 1e-12, lambda x: x * 1e-12, batch)
    assert tiny
    assert "tiny" in tiny.outputs[0].note
    assert not parity(lambda x: x * 1e-12, lambda x: x * 2e-12, batch)
    assert "zero everywhere" in parity(lambda x: x * 0, lambda x: x * 0, batch).outputs[0].note
    empty = parity(lambda x: x[:0], lambda x: x[:0], batch)
    assert not empty
    assert "no output holds values" in empty.headline


def test_no_input_and_no_output_are_errors(batch):
    for nothing in ([], (), {}, torch.zeros(0, 16)):
        with pytest.raises(SelectionError):
            parity(mlp(), mlp(), nothing)
    with pytest.raises(SelectionError, match="no output"):
        parity(lambda x: None, lambda x: None, batch)
    with pytest.raises(SelectionError, match="at least one run"):
        parity(mlp(), mlp(), batch, calls=0)


def test_the_tolerance_says_where_it_comes_from(batch):
    model = mlp()
    measured = parity(model, copy.deepcopy(model), batch).outputs[0]
    assert "8 × the" in measured.reason
    assert "moves the reference" in measured.reason
    exact = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        floor = float((exact(batch.double()) - model.eval()(batch).double()).abs().max())
    assert measured.limit >= 8 * floor > 0  # nearby inputs may raise it, never lower it
    double = parity(model.double(), copy.deepcopy(model), batch.double()).outputs[0]
    assert "float64 already" in double.reason
    assert 0 < double.limit < 1e-12
    by_callable = parity(lambda x: x, lambda x: x, batch).outputs[0]
    assert "by formula" in by_callable.reason
    assert "only a module" in by_callable.reason


def test_a_model_that_cannot_run_in_float64_falls_back_and_says_so(batch):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 5)

        def forward(self, x):
            return self.fc(x) @ torch.ones(5, 2)

    model = Fixed()
    output = parity(model, copy.deepcopy(model), batch).outputs[0]
    assert "by formula" in output.reason
    assert "float64" in output.reason
    assert "layers: 1 with weights" in output.reason
    assert 0 < output.limit < 1e-3


def test_a_model_that_takes_only_the_given_values_is_still_compared():
    class Strict(nn.Module):
        def forward(self, x):
            if not bool((x == x.round()).all()):
                raise ValueError("whole values only")
            return x / 3

    report = parity(Strict(), Strict(), torch.arange(6.0))
    assert report
    assert "moves the reference" in report.outputs[0].reason or "4 eps" in report.outputs[0].reason


def test_a_large_model_is_not_copied(monkeypatch):
    monkeypatch.setattr("workbench.verification.tolerance._MAX_DOUBLE", 100)
    with noise_floor(mlp()) as floor:
        assert "float64 copy would take" in floor.refusal


def test_a_model_that_amplifies_rounding_is_held_and_told(batch):
    class Chaotic(nn.Module):
        def forward(self, x):
            for _ in range(60):
                x = 3.9 * x * (1 - x)
            return x

    report = parity(Chaotic(), Chaotic(), batch.sigmoid())
    assert "amplifies rounding" in report.outputs[0].reason
    assert report.outputs[0].limit <= 1e-3


def test_onnx_files_pair_by_position_and_need_their_inputs(tmp_path):
    model = nn.Linear(4, 3, bias=False)
    path = linear_onnx(tmp_path / "m.onnx", model.weight.detach().T)
    x = torch.randn(2, 4)
    report = parity(model, path, [x, torch.randn(5, 4), {"input": x}])
    assert report
    assert report.outputs[0].name == "output"
    assert report.candidate == "m.onnx"
    assert not parity(model, linear_onnx(tmp_path / "n.onnx", model.weight.detach().T + 1e-3), x)
    fixed = parity(lambda x: x[:, :3], path, torch.randn(2, 5))
    assert "fixes input 'x' at ['n', 4] and was given [2, 5]" in fixed.headline
    two = parity(lambda a, b: a @ model.weight.T, path, (x, x))
    assert not two
    assert "the graph takes 1 tensors (x) and was given 2" in two.headline


def test_what_cannot_be_run_is_said(tmp_path, batch):
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    torch.save(mlp().state_dict(), tmp_path / "weights.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(mlp().eval(), (batch,)), tmp_path / "program.pt2")
    for thing, error in (
        (tmp_path / "none.onnx", MissingFileError),
        (tmp_path / "bad.onnx", UnsupportedError),
        (tmp_path / "none.pt", MissingFileError),
        (tmp_path / "weights.pt", UnsupportedError),
        (tmp_path / "program.pt2", UntrustedError),
        (3, SelectionError),
    ):
        with pytest.raises(error):
            parity(mlp(), thing, batch)


def test_stored_programs_run_when_they_are_trusted(tmp_path, batch):
    model = mlp().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(model, (batch,)), tmp_path / "program.pt2")
        torch.jit.save(torch.jit.script(model), tmp_path / "program.pt")
    for name in ("program.pt2", "program.pt"):
        assert parity(model, tmp_path / name, batch, trust=True)


def test_live_programs_run(batch):
    model = Nested().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (batch,))
    assert parity(model, program, batch)


def test_report_shows_itself(batch):
    model = mlp()
    hostile = parity(lambda x: {"<script>\x1b[31m": x}, lambda x: {"<script>\x1b[31m": x + 1}, batch)
    assert "\x1b" not in str(hostile)
    assert "\x1b" not in hostile.headline
    assert "<script>" not in hostile._repr_html_()
    figure = parity(model, copy.deepcopy(model), batch).plot()
    assert figure.axes
    assert parity(model, copy.deepcopy(model), batch).to_dict()["outputs"][0]["name"] == "output"
    with pytest.raises(SelectionError, match="nothing to draw"):
        parity(lambda x: x * math.nan, lambda x: x * math.nan, batch).plot()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("frozen", [False, True])
def test_a_scripted_model_is_given_back_with_what_it_rebinds(frozen):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))
            self.hidden = torch.zeros(2)
            self.calls: int = 0

        def forward(self, x):
            self.seen = self.seen + 1
            self.hidden += 1
            self.calls += 1
            return x + self.seen + self.hidden[0]

    model = torch.jit.script(Counts().train(not frozen))
    model = torch.jit.freeze(model, preserved_attrs=["seen", "hidden", "calls"]) if frozen else model
    report = parity(model, lambda x: x, torch.randn(2, 3))
    assert any("answers the same input differently on the next call" in problem for problem in report.problems)
    assert (float(model.seen), float(model.hidden.sum()), model.calls) == (0.0, 0.0, 0)
    assert frozen or model.training


def test_a_model_with_a_torch_cond_is_compared_with_its_branches_turned_round_and_runs_as_before():
    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return torch.cond(x.mean() > 0.5, lambda a: self.up(a), lambda a: self.down(a).sin(), (x,))

    model, x = Chooses().eval(), torch.rand(5, 16)
    with torch.no_grad():
        first = [model(x - 1), model(x + 1)]
        with reversed_sums():
            turned = [model(x - 1), model(x + 1)]
        report = parity(model, copy.deepcopy(model), [x - 1, x + 1])
        assert report, report.headline
        assert all(0 < (a - b).abs().max() < 1e-5 for a, b in zip(first, turned, strict=True))
        other = copy.deepcopy(model)
        other.up = other.down
        assert not parity(model, other, [x + 1])
        assert torch.equal(model(x + 1), first[1])
    model(x[:3]).sum().backward()


def test_a_compiled_model_stays_compiled():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = torch.compile(mlp().eval(), backend=backend)
    x = torch.randn(4, 16)
    assert parity(model, model, x)
    compiled.clear()
    model(torch.randn(7, 16))
    assert compiled
