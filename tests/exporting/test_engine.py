"""The inference engine, against ONNX Runtime's own session and the model."""

import io

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import workbench as wb
from workbench.errors import MissingFileError, SelectionError, UnsupportedError, UntrustedError

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, shift):
        return self.layer(x) + shift, x.sum(1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    torch.manual_seed(0)
    folder, model, x = (
        tmp_path_factory.mktemp("engine"),
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval(),
        torch.randn(2, 4),
    )
    wb.export_model(model, x, to=("onnx", "torchscript", "pt2"), folder=folder, input_names=["x"], dynamic_axes={"x": {0: "batch"}}).check()
    return model, folder


@pytest.mark.parametrize("name", ["sequential.onnx", "sequential.torchscript.pt", "sequential.pt2"])
def test_called_like_the_model(files, name):
    model, folder = files
    engine, x = wb.InferenceEngine(folder / name), torch.randn(5, 4)
    assert torch.allclose(engine(x), model(x), atol=1e-6)
    assert isinstance(engine(x.numpy()), np.ndarray)
    assert np.allclose(engine.predict(x.numpy()), model(x).detach(), atol=1e-6)
    with pytest.raises(SelectionError):
        engine(x, x)
    with pytest.raises(SelectionError):
        engine(x[:, :3])


@pytest.mark.parametrize("name", ["sequential.onnx", "sequential.pt2"])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 70])
def test_batches_answer_every_item_in_order(files, name, count):
    model, folder = files
    items = torch.randn(count, 4)
    answers = wb.InferenceEngine(folder / name).predict_batch((item for item in items), batch_size=32)
    assert len(answers) == count
    assert all(torch.allclose(answer, expected, atol=1e-5) for answer, expected in zip(answers, model(items), strict=True))


def test_a_graph_with_a_fixed_batch_still_takes_any_number_of_items(tmp_path):
    model = Two().eval()
    wb.export_model(model, (torch.randn(4, 4), torch.randn(4, 3)), path=tmp_path / "two.onnx").check()
    engine = wb.InferenceEngine(tmp_path / "two.onnx")
    items = [(torch.randn(4), torch.randn(3)) for _ in range(6)]
    answers = engine.predict_batch(items)
    for (x, shift), (y, total) in zip(items, answers, strict=True):
        assert torch.allclose(y, model(x[None], shift[None])[0][0], atol=1e-5)
        assert torch.allclose(total, x.sum(), atol=1e-5)
    with pytest.raises(SelectionError) as refused:
        engine(torch.ones(2, 4), torch.ones(2, 3))
    assert "dynamic_axes={'x': {0: 'n'}}" in refused.value.hint
    named = engine(shift=torch.ones(4, 3), x=torch.ones(4, 4))
    assert torch.allclose(named[0], model(torch.ones(4, 4), torch.ones(4, 3))[0], atol=1e-5)


def test_it_says_what_it_takes_and_what_runs_it(files):
    _, folder = files
    engine = wb.InferenceEngine(folder / "sequential.onnx")
    session = onnxruntime.InferenceSession(str(folder / "sequential.onnx"), providers=["CPUExecutionProvider"])
    assert [(p.name, p.shape) for p in engine.inputs] == [(i.name, tuple(i.shape)) for i in session.get_inputs()]
    assert engine.provider in onnxruntime.get_available_providers()
    assert "x: float32 [batch, 4]" in repr(engine)
    absent = wb.InferenceEngine(folder / "sequential.onnx", ["TensorrtExecutionProvider", "CPUExecutionProvider"])
    assert absent.provider == "CPUExecutionProvider"
    assert "not installed here" in repr(absent)
    with pytest.raises(SelectionError, match="none of"):
        wb.InferenceEngine(folder / "sequential.onnx", ["TensorrtExecutionProvider"])
    with pytest.raises(SelectionError, match="ONNX Runtime"):
        wb.InferenceEngine(folder / "sequential.pt2", ["CPUExecutionProvider"])


def test_inputs_that_do_not_fit_are_told_before_anything_runs(files):
    _, folder = files
    engine = wb.InferenceEngine(folder / "sequential.onnx")
    for wrong, word in (
        (np.zeros((2, 4)), "astype"), (np.zeros(4, "float32"), "batch axis"), (np.zeros((2, 5), "float32"), r"\[2, 5\]"), (torch.zeros(2, 4, dtype=torch.int64), "int64"),
    ):  # fmt: skip
        with pytest.raises(SelectionError, match=word):
            engine(wrong)
    with pytest.raises(SelectionError, match="do not stack"):
        engine.predict_batch([torch.zeros(4), torch.zeros(5)])
    with pytest.raises(SelectionError, match="batch_size is 0"):
        engine.predict_batch([torch.zeros(4)], batch_size=0)


def test_from_bytes_with_threads_and_latency(files):
    model, folder = files
    engine = wb.InferenceEngine((folder / "sequential.onnx").read_bytes(), threads=1)
    x = torch.randn(2, 4)
    assert torch.allclose(engine.warm_up(x)(x), model(x), atol=1e-6)
    report = engine.latency(x, rounds=11)
    assert 0 < report.seconds_median <= report.seconds_p90 <= report.seconds_p99
    assert "at the median" in report.headline
    with pytest.raises(SelectionError, match="rounds is 3"):
        engine.latency(x, rounds=3)


def test_what_is_no_artefact_is_refused(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "weights.pt")
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "other.pt2")
    for name, error in (("none.onnx", MissingFileError), ("weights.pt", UnsupportedError), ("other.pt2", UntrustedError)):
        with pytest.raises(error):
            wb.InferenceEngine(tmp_path / name)
    assert wb.InferenceEngine(tmp_path / "other.pt2", trust=True)(torch.ones(1, 2)).shape == (1, 2)


class Plain(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def plain_graph(function, x, *, free):
    """ONNX bytes by torch's own exporter."""
    buffer, axes = io.BytesIO(), {"x": {0: "batch"}} if free else None
    torch.onnx.export(Plain(function).eval(), (x,), buffer, dynamo=False, input_names=["x"], output_names=["y", "z"], dynamic_axes=axes)
    return buffer.getvalue()


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize(
    "second",
    [lambda x: torch.arange(5).float(), lambda x: (x * 2).T, lambda x: x.sum(), lambda x: x @ x.T, lambda x: x.repeat(2, 1)],
    ids=["constant", "transposed", "number", "square", "longer"],
)
def test_an_output_without_the_items_axis_is_refused_by_name(second, free):
    for size in (4, 5):
        x = torch.randn(size, 5)  # five items of five: the shape alone does not tell
        graph = plain_graph(lambda x: (x * 2, second(x)), x, free=free)
        assert len(onnxruntime.InferenceSession(graph).run(None, {"x": x.numpy()})) == 2
        with pytest.raises(SelectionError, match="first axis of output 'z'"):
            wb.InferenceEngine(graph).predict_batch(x)


@pytest.mark.parametrize("free", [True, False])
def test_outputs_that_go_with_the_items_are_sliced(free):
    x = torch.randn(4, 5)
    graph = plain_graph(lambda x: (x.argmax(1), x.sum(1).masked_fill(x[:, 0] > 0, -1e9)), x, free=free)
    session = onnxruntime.InferenceSession(graph)
    answers = wb.InferenceEngine(graph).predict_batch(x.repeat(2, 1)[:7])
    wanted = [torch.from_numpy(value) for value in session.run(None, {"x": x.numpy()})]
    for number, (first, second) in enumerate(answers):
        assert first == wanted[0][number % 4]
        assert torch.allclose(second, wanted[1][number % 4])


def test_an_exported_program_slices_no_constant(tmp_path):
    model = Plain(lambda x: {"y": x * 2, "fixed": torch.arange(5).float()})
    free = {"x": {0: torch.export.Dim("batch")}}
    torch.export.save(torch.export.export(model, (torch.randn(4, 5),), dynamic_shapes=free), tmp_path / "m.pt2")
    with pytest.raises(SelectionError, match="'fixed'"):
        wb.InferenceEngine(tmp_path / "m.pt2", trust=True).predict_batch(torch.randn(5, 5))


def test_what_is_no_tensor_is_a_constant_of_the_graph(files):
    model, folder = files
    engine, x = wb.InferenceEngine(folder / "sequential.onnx"), torch.randn(2, 4)
    for args, kwargs in (((x, 0.7), {}), ((x,), {"k": 0.7}), ((x, "hello"), {}), ((x, [1]), {}), ((x, False), {})):
        with pytest.raises(SelectionError, match="constant of the graph"):
            engine(*args, **kwargs)
    assert torch.allclose(engine(x, None), model(x), atol=1e-6)


def test_providers_as_onnxruntime_spells_them(files):
    path, cpu = str(files[1] / "sequential.onnx"), "CPUExecutionProvider"
    for providers in ([cpu], (cpu,), [(cpu, {"arena_extend_strategy": "kSameAsRequested"})]):
        session = onnxruntime.InferenceSession(path, providers=providers)
        assert wb.InferenceEngine(path, providers).provider == session.get_providers()[0]
    assert wb.InferenceEngine(path, cpu).provider == cpu
    assert wb.InferenceEngine(bytearray((files[1] / "sequential.onnx").read_bytes())).provider == cpu
    for wrong in (3, [3], [(cpu, 3)], (cpu, {})):
        with pytest.raises(SelectionError, match="is neither"):
            wb.InferenceEngine(path, wrong)


def test_arguments_of_another_type_are_told(files):
    path = files[1] / "sequential.onnx"
    engine, x = wb.InferenceEngine(path), torch.randn(2, 4)
    for wrong, word in (
        (lambda: wb.InferenceEngine(path, threads="2"), "threads is '2'"), (lambda: wb.InferenceEngine(None), "NoneType is no artefact"),
        (lambda: engine.predict_batch(None), "without items"), (lambda: engine.predict_batch(torch.tensor(1.0)), "without items"),
        (lambda: engine.predict_batch(x, batch_size=2.5), "batch_size is 2.5"), (lambda: engine.predict_batch(x, batch_size=None), "batch_size is None"),
        (lambda: engine.predict_batch([{"x": x[0]}, {"z": x[0]}]), "unlike parts"), (lambda: engine.predict_batch([(x[0],), (x[0], x[0])]), "unlike parts"),
        (lambda: engine.latency(x, rounds=20.0), "rounds is 20.0"), (lambda: engine.latency("x"), "argument 0 is 'x'"),
        (engine, "given 0 tensors"), (lambda: engine(np.array(["a"])), "element type <U1"),
    ):  # fmt: skip
        with pytest.raises(SelectionError, match=word):
            wrong()
    assert engine(x[:0]).shape == (0, 3)
