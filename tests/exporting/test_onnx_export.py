"""Export to ONNX, judged by onnx, onnxruntime and torch, never by our own comparison alone."""

import copy
import hashlib
import io
import logging
import os
import threading
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from workbench.errors import SelectionError, UnsupportedError, WriteError
from workbench.exporting import export_model, onnx_export
from workbench.exporting.listening import Heard, listening
from workbench.exporting.onnx_file import check_file
from workbench.verification.comparison import parity


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


def images(n=2):
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def run(path, *arrays):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: np.asarray(a) for i, a in zip(session.get_inputs(), arrays, strict=True)})


def opset_of(path):
    return next(o.version for o in onnx.load(str(path)).opset_import if o.domain == "")


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        y = self.fc(x)
        return y * 2 if y.sum() > 0 else y - 1


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 3)

    def forward(self, x, *, scale=None, mode="plain"):
        y = self.fc(x) if scale is None else self.fc(x) * scale
        return {"logits": y, "aux": (y.argmax(-1), None, (x * 3).long()), mode: y > 0}


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen = self.seen + 1
        return x + self.seen


def test_a_model_in_train_mode_is_exported_as_in_eval_mode(tmp_path, capfd):
    model = cnn().train()
    model[1].eval()
    with torch.no_grad():
        model[1].running_mean += 0.5
    flags = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    path = tmp_path / "m.onnx"
    handlers = logging.getLogger("torch").handlers[:]
    report = export_model(model, images(), path=path, verbose=True)
    assert report
    assert report["onnx"].exporter == "dynamo"
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    x = images(2) * 3
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(x)
    np.testing.assert_allclose(run(path, x)[0], expected, rtol=1e-5, atol=1e-6)
    nodes = {node.op_type for node in onnx.load(str(path)).graph.node}
    assert "Dropout" not in nodes
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("torch").handlers == handlers
    assert "torch.export" in report["onnx"].log


def test_the_report_reads_back_what_is_on_the_disk(tmp_path):
    path = tmp_path / "m.onnx"
    one = export_model(cnn(), images(), path=path)["onnx"]
    data = path.read_bytes()
    assert (one.nbytes, one.sha256, one.files) == (len(data), hashlib.sha256(data).hexdigest(), {"m.onnx": len(data)})
    assert os.listdir(tmp_path) == ["m.onnx"]
    assert one.opset == opset_of(path)
    assert one.inputs == {"input": (2, 3, 12, 12)}
    assert one.outputs == {"output": (2, 5)}
    graph = onnx.load(str(path)).graph
    weights = {t.name for t in graph.initializer}
    assert weights
    assert not weights & {v.name for v in graph.value_info}
    assert one.checked
    assert one.tried == ("example", "negated", "noisy", "exchanged")
    assert one.parity.calls == 2
    assert one.parity.batches == 4


def test_quantizing_the_file_by_onnxruntime_works(tmp_path):
    """The stripped shape entries are what makes onnxruntime's quantizer fail on a transposed weight."""
    from onnxruntime.quantization import quantize_dynamic

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))
    assert export_model(model, torch.randn(2, 64), path=tmp_path / "m.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_dynamic(str(tmp_path / "m.onnx"), str(tmp_path / "q.onnx"))
    assert os.path.getsize(tmp_path / "q.onnx") < 0.5 * os.path.getsize(tmp_path / "m.onnx")


@pytest.mark.parametrize("option", [{"dynamic_axes": {"input": {0: "batch"}}}, {"dynamic_shapes": ({0: "batch"},), "external_data": True}])
def test_dynamic_axes_are_tried_at_another_size(tmp_path, option):
    model, path = cnn().eval(), tmp_path / "m.onnx"
    one = export_model(model, images(), path=path, **option)["onnx"]
    assert one.ok
    assert "resized" in one.tried
    assert one.inputs["input"][0] == "batch"
    x = images(7)
    with torch.no_grad():
        np.testing.assert_allclose(run(path, x)[0], model(x), rtol=1e-5, atol=1e-6)
    assert sorted(one.files) == sorted(os.listdir(tmp_path)) == (["m.onnx", "m.onnx.data"] if "external_data" in option else ["m.onnx"])


def test_an_axis_that_stayed_fixed_fails_the_export(tmp_path):
    class Pinned(nn.Module):
        def forward(self, x):
            return x + torch.ones(2, 4)

    report = export_model(Pinned(), torch.randn(2, 4), path=tmp_path / "m.onnx", dynamic_axes={"x": {0: "n"}})
    assert not report
    assert "does not take another size" in report["onnx"].cause
    unknown = export_model(nn.ReLU(), torch.randn(2, 4), path=tmp_path / "m.onnx", dynamic_axes={"nosuch": {0: "n"}})
    assert not unknown
    assert "nosuch" in unknown["onnx"].cause + unknown["onnx"].error
    assert os.listdir(tmp_path) == []


def test_opset_asked_is_the_opset_written(tmp_path):
    path = tmp_path / "m.onnx"
    axes = {"x": [0]}
    one = export_model(cnn(), images(), path=path, opset_version=11, input_names=["x"], output_names=["y"], dynamic_axes=axes)["onnx"]
    assert one.ok
    assert one.opset == 11 == opset_of(path)
    assert one.exporter == "classic"
    assert "opset 18 where 11 was asked" in one.notes[0]
    assert axes == {"x": [0]}
    assert isinstance(one.inputs["x"][0], str)
    assert list(one.inputs) == ["x"]
    assert list(one.outputs) == ["y"]
    np.testing.assert_allclose(run(path, images(5))[0], cnn().eval()(images(5)).detach(), rtol=1e-5, atol=1e-6)


def test_an_opset_nobody_writes_fails(tmp_path, capfd):
    for options in ({"opset_version": 99}, {"opset_version": 11, "dynamic_shapes": ({0: "n"},)}):
        report = export_model(nn.Linear(4, 2), torch.randn(2, 4), path=tmp_path / "m.onnx", **options)
        assert not report
        assert "was asked" in report["onnx"].cause
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr() == ("", "")


def test_nested_outputs_keywords_and_constants(tmp_path):
    model, path, x = Nested(), tmp_path / "m.onnx", torch.randn(2, 4)
    one = export_model(model, (x,), {"scale": torch.tensor([2.0]), "mode": "sign"}, path=path)["onnx"]
    assert one.ok
    assert list(one.outputs) == ["logits", "aux.0", "aux.2", "sign"]
    with torch.no_grad():
        expected = model(x, scale=torch.tensor([3.0]), mode="sign")
    logits, top, whole, sign = run(path, x, torch.tensor([3.0]))
    np.testing.assert_allclose(logits, expected["logits"], rtol=1e-5, atol=1e-6)
    assert (top.dtype, whole.dtype, sign.dtype) == (np.int64, np.int64, np.bool_)
    np.testing.assert_array_equal(whole, expected["aux"][2])


def test_a_data_dependent_branch_is_refused_not_baked(tmp_path):
    report = export_model(Branch(), torch.randn(2, 4), path=tmp_path / "m.onnx")
    one = report["onnx"]
    assert not report
    assert one.exporter is None
    assert "chooses a branch" in report.headline
    assert "torch.where" in one.cure
    assert "GuardOnDataDependentSymNode" in one.error
    assert "\x1b" not in one.error
    assert os.listdir(tmp_path) == []


def test_a_branch_baked_by_tracing_does_not_pass(tmp_path, monkeypatch):
    """What the classic exporter makes of a branch, were the guard above not there."""
    from workbench.exporting import onnx_export

    def fails(request, made):
        raise RuntimeError("the dynamo exporter is out of order")

    monkeypatch.setattr(onnx_export, "_dynamo", fails)
    report = export_model(Branch(), torch.randn(2, 4), path=tmp_path / "m.onnx")
    assert not report
    assert report["onnx"].exporter == "classic"
    assert "tracing baked a decision that hangs on values" in report["onnx"].cause
    assert os.listdir(tmp_path) == []


class Threshold(nn.Module):
    """A branch that no variation of the example takes."""

    def forward(self, x):
        return x * 2 if x.abs().max() < 1e6 else x - 1


def test_the_exporter_asked_for_is_the_one_used(tmp_path):
    x, path = torch.randn(2, 4), tmp_path / "m.onnx"
    one = export_model(nn.Linear(4, 2), x, path=path, exporter="classic", opset_version=17)["onnx"]
    assert (one.ok, one.exporter, opset_of(path)) == (True, "classic", 17)
    assert not one.notes
    path.unlink()
    one = export_model(nn.Linear(4, 2), x, path=path, exporter="dynamo", opset_version=11)["onnx"]
    assert (one.ok, one.exporter) == (False, "dynamo")
    assert "opset 11 was asked and 18 was written" in one.cause
    one = export_model(Threshold(), x, path=path, exporter="classic")["onnx"]
    assert not one.ok
    assert "decision that hangs on values" in one.cause
    assert "x.abs().max() < 1e6" in one.reasons[0].code
    one = export_model(nn.Linear(4, 2), x, path=path, exporter="classic", dynamic_shapes=({0: "n"},))["onnx"]
    assert "takes no dynamic_shapes" in one.cause
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("exporter", ["dynamo", "classic"])
@pytest.mark.parametrize(("branches", "at"), [(lambda n: n > 8, 9), (lambda n: n % 4 == 0, 4)], ids=["bound", "multiple"])
def test_a_branch_by_size_far_from_the_example_is_not_baked(tmp_path, exporter, branches, at):
    class BySize(nn.Module):
        def forward(self, x):
            return x * 2 if branches(x.shape[0]) else x + 1

    x, path = torch.randn(2, 4), tmp_path / "m.onnx"
    one = export_model(BySize(), x, path=path, exporter=exporter, dynamic_axes={"x": {0: "n"}})["onnx"]
    assert not one.ok
    assert f"with axis 0 of x at {at} the file answers otherwise" in one.cause
    assert export_model(BySize(), x, path=path, exporter=exporter)  # which takes this size alone


class Folding(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(32, 32))

    def forward(self, x):
        return x @ (self.w.t() * self.w)


@pytest.mark.parametrize("exporter", ["dynamo", "classic"])
def test_every_option_stands_in_the_report_as_asked_and_as_honoured(tmp_path, exporter):
    path = tmp_path / "m.onnx"
    options = {
        "input_names": ["a"],
        "output_names": ["b"],
        "dynamic_axes": {"a": {0: "n"}, "b": {0: "n"}},
        "opset_version": 18,
        "external_data": True,
    }
    report = export_model(Folding(), torch.randn(2, 32), path=path, exporter=exporter, do_constant_folding=False, verbose=True, **options)
    assert report
    found = {option.name: option for option in report["onnx"].options}
    assert [*found] == [
        "exporter", "input_names", "output_names", "dynamic_axes", "dynamic_shapes", "opset_version", "export_params", "do_constant_folding",
        "external_data", "verbose",
    ]  # fmt: skip
    graph = onnx.load(str(path), load_external_data=False).graph
    assert (found["input_names"].asked, found["input_names"].honoured) == ("a", graph.input[0].name)
    assert found["dynamic_axes"].honoured == "a {0: 'n'}; b {0: 'n'}"
    assert found["opset_version"].honoured == opset_of(path)
    assert found["do_constant_folding"].honoured.startswith("2 nodes")
    assert {"Transpose", "Mul"} <= {node.op_type for node in graph.node}
    assert [name for name, option in found.items() if not option.kept] == ([] if exporter == "dynamo" else ["external_data"])
    assert "no such option" in found["external_data"].honoured or exporter == "dynamo"
    assert next(t for t in report.tables() if t.title == "onnx options").rows[1][:4] == ("input_names", "a", "✓", "a")
    plain = export_model(Folding(), torch.randn(2, 32), path=path, exporter=exporter)["onnx"]
    assert {o.name: o.honoured for o in plain.options}["do_constant_folding"].startswith("0 nodes")


def test_the_classic_exporter_steps_in_and_is_proved(tmp_path, monkeypatch):
    from workbench.exporting import onnx_export

    def fails(request, made):
        made.write_bytes(b"half a file")
        made.with_name(made.name + ".data").write_bytes(b"half of its weights")
        raise RuntimeError("the dynamo exporter is out of order")

    monkeypatch.setattr(onnx_export, "_dynamo", fails)
    x = torch.randn(2, 4)
    one = export_model(Nested(), (x,), {"scale": torch.tensor([2.0])}, path=tmp_path / "m.onnx")["onnx"]
    assert one.ok
    assert one.exporter == "classic"
    assert "out of order" in one.notes[0]
    assert list(one.inputs) == ["x", "scale"]
    assert os.listdir(tmp_path) == ["m.onnx"]
    constant = export_model(nn.Embedding(9, 4), torch.tensor([[3, 3]]), path=tmp_path / "e.onnx")
    assert not constant
    assert "second, different input" in constant["onnx"].cause


def test_inputs_that_the_model_does_not_take_are_not_held_against_the_file(tmp_path):
    class Log(nn.Module):
        def forward(self, x):
            return torch.log(x)

    one = export_model(Log(), 0.01 + torch.rand(3, 3), path=tmp_path / "m.onnx")["onnx"]
    assert one.ok
    assert one.tried == ("example", "exchanged")
    assert any("NaN or infinity on the negated inputs" in note for note in one.notes)


def test_a_runtime_without_the_kernel_is_said(tmp_path):
    report = export_model(nn.Linear(4, 4).bfloat16(), torch.randn(2, 4).bfloat16(), path=tmp_path / "m.onnx")
    assert not report
    assert "ONNX Runtime cannot load the file" in report["onnx"].cause
    assert "model.float()" in report["onnx"].cure
    assert os.listdir(tmp_path) == []


def test_state_between_calls_fails_the_export(tmp_path):
    model = Counting()
    report = export_model(model, torch.randn(2, 4), path=tmp_path / "m.onnx")
    assert not report
    assert "keeps state" in report["onnx"].cause
    assert "argument and an output" in report["onnx"].cure
    assert model.seen == 0
    assert type(model.seen) is torch.Tensor
    assert os.listdir(tmp_path) == []


def test_an_operator_without_translation_is_named_and_can_be_given_one(tmp_path):
    import onnxscript

    with torch.library._scoped_library("wbtest", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        library.impl("twice", lambda x: torch.empty_like(x), "Meta")

        class Twice(nn.Module):
            def forward(self, x):
                return torch.ops.wbtest.twice(x)

        x = torch.randn(2, 3)
        report = export_model(Twice(), x, path=tmp_path / "m.onnx")
        assert not report
        assert not report["onnx"].notes
        assert "wbtest" in report["onnx"].cause
        assert "custom_translation_table" in report["onnx"].cure
        assert "Traceback" not in report.headline

        op = onnxscript.opset18

        def twice(x):
            return op.Add(x, x)

        table = {torch.ops.wbtest.twice.default: twice}
        assert export_model(Twice(), x, path=tmp_path / "m.onnx", custom_translation_table=table)
        np.testing.assert_allclose(run(tmp_path / "m.onnx", x)[0], 2 * x)

        torch.onnx.register_custom_op_symbolic("wbtest::twice", lambda g, x: g.op("Add", x, x), 18)
        try:
            one = export_model(Twice(), x, path=tmp_path / "m.onnx", opset_version=18)["onnx"]
        finally:
            torch.onnx.unregister_custom_op_symbolic("wbtest::twice", 18)
        assert (one.ok, one.exporter) == (True, "classic")
        np.testing.assert_allclose(run(tmp_path / "m.onnx", x)[0], 2 * x)


def test_an_existing_file_outlives_a_failed_export(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"yesterday's model")
    assert not export_model(Branch(), torch.randn(2, 4), path=path)
    assert path.read_bytes() == b"yesterday's model"
    path.with_name("m.onnx.data").write_bytes(b"yesterday's weights")
    report = export_model(nn.ReLU(), torch.randn(2, 4), path=path)
    assert report
    assert "earlier export" in report["onnx"].notes[-1]
    assert run(path, torch.tensor([[-1.0] * 4, [2.0] * 4], dtype=torch.float32))[0].max() == 2
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]


def test_weights_beside_come_first_so_that_no_graph_names_absent_ones(tmp_path, monkeypatch):
    from workbench.exporting import proving

    path, honest = tmp_path / "m.onnx", proving._copy
    path.write_bytes(b"yesterday's model")

    def full_disk(source, goal):
        if goal.suffix == ".data":
            raise WriteError("the disk is full", path=str(goal))
        return honest(source, goal)

    monkeypatch.setattr(proving, "_copy", full_disk)
    with pytest.raises(WriteError, match="disk is full"):
        export_model(nn.Linear(4, 2), torch.randn(2, 4), path=path, external_data=True)
    assert path.read_bytes() == b"yesterday's model"
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_listening_hears_every_channel_and_gives_them_back(capfd):
    def noisy():
        print("printed \N{WHITE HEAVY CHECK MARK}")
        os.write(1, b"native\n")
        logging.getLogger("torch.onnx").warning("logged")
        warnings.warn("warned", UserWarning, stacklevel=1)
        raise KeyError("ends here")

    heard = Heard()
    with pytest.raises(KeyError), listening(heard):
        noisy()
    for word in ("printed", "native", "warning: logged", "UserWarning: warned"):
        assert word in heard.text
    assert capfd.readouterr() == ("", "")
    print("after")
    assert capfd.readouterr().out == "after\n"


def test_what_another_thread_prints_meanwhile_goes_where_it_went(monkeypatch):
    cell, heard = io.StringIO(), Heard()
    monkeypatch.setattr("sys.stdout", cell)
    with listening(heard):
        print("own")
        other = threading.Thread(target=print, args=("other's",))
        other.start()
        other.join()
    assert cell.getvalue() == "other's\n"
    assert heard.text == "own"


def test_a_file_that_differs_is_not_put_in_place(tmp_path, monkeypatch):
    from workbench.exporting import onnx_export

    honest = onnx_export._dynamo

    def forged(request, made):
        honest(request, made)
        model = onnx.load(str(made))
        bias = next(t for t in model.graph.initializer if t.name == "bias")
        values = onnx.numpy_helper.to_array(bias) + 1e-3
        bias.CopyFrom(onnx.numpy_helper.from_array(values, "bias"))
        onnx.save(model, str(made))

    monkeypatch.setattr(onnx_export, "_dynamo", forged)
    report = export_model(nn.Linear(4, 2), torch.randn(2, 4), path=tmp_path / "m.onnx")
    assert not report
    assert "does not answer as the model does" in report["onnx"].cause
    assert os.listdir(tmp_path) == []
    assert export_model(nn.Linear(4, 2), torch.randn(2, 4), path=tmp_path / "m.onnx", atol=1e-2)


def test_a_folder_that_refuses(tmp_path, monkeypatch):
    model, x = nn.ReLU(), torch.randn(2, 4)
    file = tmp_path / "file"
    file.write_bytes(b"")
    (tmp_path / "folder.onnx").mkdir()
    for path in (tmp_path / "none" / "m.onnx", file / "m.onnx", tmp_path / "folder.onnx"):
        with pytest.raises(WriteError):
            export_model(model, x, path=path)

    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", read_only)
    with pytest.raises(WriteError, match="Read-only file system"):
        export_model(model, x, path=tmp_path / "m.onnx")


def test_hostile_names_stay_inert(tmp_path):
    name = "<script>alert(1)</script>\x1b[31m/../../x"
    report = export_model(nn.Linear(4, 2), torch.randn(2, 4), path=tmp_path / "m.onnx", input_names=[name], output_names=["$o_1$&"])
    assert report
    assert list(report["onnx"].inputs) == [name]
    assert "\x1b" not in str(report)
    assert "<script>" not in report._repr_html_()
    assert os.listdir(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("option", [{"input_names": ["weight"]}, {"output_names": ["bias"]}])
def test_names_that_belong_to_weights_never_pass_wrong(tmp_path, option):
    model, x, path = nn.Linear(4, 4), torch.randn(4, 4), tmp_path / "m.onnx"
    report = export_model(model, x, path=path, **option)
    if report:
        np.testing.assert_allclose(run(path, x * 2)[0], model(x * 2).detach(), rtol=1e-5, atol=1e-6)
    else:
        assert "name of a weight" in report["onnx"].cause
        assert not path.exists()


def test_weights_left_out_become_inputs(tmp_path):
    model, x, path = nn.Linear(4, 2), torch.randn(2, 4), tmp_path / "m.onnx"
    one = export_model(model, x, path=path, export_params=False)["onnx"]
    assert one.ok
    assert not onnx.load(str(path)).graph.initializer
    assert set(one.inputs) == {"input", "weight", "bias"}
    assert check_file(path) == ""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    fed = {"input": x.numpy(), **{k: v.detach().numpy() for k, v in model.state_dict().items()}}
    np.testing.assert_allclose(session.run(None, fed)[0], model(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exporter", ["dynamo", "classic"])
def test_a_constant_stays_in_a_file_without_weights(tmp_path, exporter):
    class Flattens(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x):
            return self.conv(x).reshape(x.shape[0], 2, 36) + torch.tensor([[1.5], [2.5]])

    model, x, path = Flattens(), torch.randn(2, 1, 8, 8), tmp_path / "m.onnx"
    one = export_model(model, x, path=path, export_params=False, exporter=exporter, external_data=exporter == "dynamo")["onnx"]
    assert one.ok, one.cause
    assert [name.removeprefix("model.") for name in one.inputs] == ["x", "conv.weight", "conv.bias"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    weights = {name: model.state_dict()[name.removeprefix("model.")].numpy() for name in list(one.inputs)[1:]}
    np.testing.assert_allclose(session.run(None, {"x": x.numpy(), **weights})[0], model(x).detach(), rtol=1e-5, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_torch_cond_is_exported_with_both_branches_and_the_model_runs_as_before(tmp_path):
    class Inverts(nn.Module):
        def forward(self, x):
            return torch.cond(x.mean() > 0.5, lambda a: 1 - a, lambda a: a.clone(), (x,))

    model, x = Inverts(), torch.rand(3, 4)
    for target in ("onnx", "pt2"):
        report = export_model(model, x, to=target, folder=tmp_path)
        assert report, report.headline
        assert parity(model, report.path, [x / 2, x / 2 + 0.5])
    assert torch.equal(model(x / 2), x / 2)


def test_the_row_shows_how_far_a_wrong_file_lies_and_the_cure_is_no_tolerance(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_dynamo", lambda request, made: _wrong(request, made))
    report = export_model(nn.Linear(4, 2), torch.randn(2, 4), path=tmp_path / "m.onnx")
    row = report.tables()[0].rows[0]
    assert report["onnx"].parity.max_abs == pytest.approx(3, rel=1e-3)
    assert report["onnx"].parity.max_abs in row
    assert "first_divergence" in report["onnx"].cure


def _wrong(request, made):
    moved = copy.deepcopy(request.model)
    with torch.no_grad():
        moved.bias += 3
    torch.onnx.export(moved, request.example.args, str(made), dynamo=True, external_data=False)


def test_unchecked_is_said(tmp_path):
    report = export_model(nn.ReLU(), torch.randn(2, 4), path=tmp_path / "m.onnx", check=False)
    assert report
    assert "was not compared" in report.headline
    assert report["onnx"].checked is None
    assert report["onnx"].parity is None


def test_what_is_asked_wrongly_is_refused_before_any_work(tmp_path):
    model, x = nn.ReLU(), torch.randn(2, 4)
    with pytest.raises(UnsupportedError, match="no export target 'coreml'; there is onnx"):
        export_model(model, x, to="coreml", path=tmp_path / "m")
    for options in (
        {},
        {"path": "a.onnx", "folder": "b"},
        {"path": tmp_path / "m.onnx", "input_names": ["a", "a"]},
        {"path": tmp_path / "m.onnx", "output_names": "ab"},
        {"path": tmp_path / "m.onnx", "dynamic_axes": {}, "dynamic_shapes": {}},
    ):
        with pytest.raises(SelectionError):
            export_model(model, x, **options)
    with pytest.raises(SelectionError, match="does not run on the example inputs: RuntimeError"):
        export_model(nn.Linear(3, 2), x, path=tmp_path / "m.onnx")
    with pytest.raises(SelectionError, match="cannot be exported"):
        export_model({"weight": x}, x, path=tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_folder_names_the_file_after_the_model(tmp_path):
    report = export_model(nn.ReLU(), torch.randn(2, 4), folder=tmp_path, to=("onnx",))
    assert report.path == str(tmp_path / "relu.onnx")
    assert os.path.exists(report.path)
    assert {t.title for t in report.tables()} >= {"targets", "onnx options", "onnx graph", "onnx outputs"}
    assert len(report.figures()) == 2
    assert report.plot().axes
    assert report.to_dict()["exports"][0]["sha256"]
    with pytest.raises(SelectionError):
        report["coreml"]


class Remembers(nn.Module):
    """Keeps a tensor where a number was while it is traced, as vision models with windows do."""

    def __init__(self):
        super().__init__()
        self.limit = 2

    def forward(self, x):
        out = x * 2 if x.shape[1] > self.limit else x
        if torch.jit.is_tracing():
            self.limit = torch.tensor(self.limit)
        return out


def test_what_a_trace_leaves_in_the_model_is_no_decision_on_values(tmp_path):
    model = Remembers().eval()
    report = export_model(model, torch.ones(2, 5), path=tmp_path / "m.onnx", exporter="classic")
    assert report, report["onnx"].cause
    assert model.limit == 2
    assert type(model.limit) is int


class Unused(nn.Module):
    def forward(self, x, m):
        return x * 2


def test_an_input_that_the_graph_makes_no_use_of_is_in_the_file_all_the_same(tmp_path):
    asked = {"dynamic_axes": {"x": {0: "n"}, "m": {0: "n"}}, "exporter": "classic"}
    one = export_model(Unused(), (images(), torch.ones(2, dtype=torch.bool)), folder=tmp_path, **asked)["onnx"]
    assert one.ok, one.cause
    assert list(one.inputs) == ["x", "m"]
    np.testing.assert_array_equal(run(one.path, images(3), np.ones(3, bool))[0], images(3) * 2)


def test_an_input_that_is_returned_keeps_its_name(tmp_path):
    class Returned(nn.Module):
        def forward(self, x):
            return x, x * 2

    one = export_model(Returned(), images(), folder=tmp_path, dynamic_axes={"x": {0: "n"}})["onnx"]
    assert one.ok, one.cause
    assert list(one.inputs) == ["x"]


def test_numbers_among_the_arguments_and_buffers_that_move_are_told(tmp_path):
    class Scaled(Counting):
        def forward(self, x, k):
            self.seen += 1
            return x * k

    one = export_model(Scaled(), (images(), 0.5), folder=tmp_path)["onnx"]
    assert any("a constant of the file: k = 0.5" in note for note in one.notes)
    assert any("changes its buffers seen" in note for note in one.notes)


def test_an_onnx_file_is_known_by_its_suffix(tmp_path):
    for options in ({"path": tmp_path / "m"}, {"path": tmp_path / "m.onnx", "to": "pt2"}):
        with pytest.raises(SelectionError, match=r"is no name for a"):
            export_model(nn.ReLU(), images(), **options)
