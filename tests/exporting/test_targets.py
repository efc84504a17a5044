"""TorchScript and .pt2, against the model itself run by torch; the C++ lines against the LibTorch in torch's own wheel."""

import collections
import dataclasses
import linecache
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils import cpp_extension

from workbench.errors import SelectionError, UntrustedError
from workbench.exporting import export_model, exported_program, optimize_torchscript
from workbench.exporting.optimizing import OptimizeReport
from workbench.teaching.samples import DigitsNet
from workbench.verification.comparison import parity

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(4 * 36, 10))


class Branch(nn.Module):
    def forward(self, x):
        return x * 2 if bool(x.sum() > 0) else x - 1


class UnscriptableBranch(nn.Module):
    def forward(self, x, **options):
        return x * 2 if x.sum() > 0 else x - 1


class NumberBranch(nn.Module):
    """A branch that no variation of the example takes."""

    def forward(self, x, **options):
        return x * 2 if x.abs().max().item() < 1e6 else x - 1


class Loop(nn.Module):
    def forward(self, x, **options):
        total = torch.zeros(())
        for i in range(x.shape[1]):
            total = total + x[:, i].sum() * i
        return total


class Fixed(nn.Module):
    """Refuses another length once it is traced, and answers rightly at its own."""

    def forward(self, x, **options):
        return x + torch.arange(len(x))[:, None]


class Keywords(nn.Module):
    def forward(self, x, *, scale, **options):
        return {"y": x * scale, "pair": (x, x + 1)}


class AutoEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 4)

    def encode(self, x):
        return self.down(x)

    def decode(self, z):
        return self.up(z)

    def forward(self, x):
        return self.decode(self.encode(x))


class OptionalEncoder(AutoEncoder):
    def forward(self, x, *, again=1):
        return self.decode(self.encode(x))


@pytest.mark.parametrize("target", ["torchscript", "pt2"])
def test_a_model_in_train_mode_is_exported_as_in_eval_mode_and_answers_alike(target, tmp_path):
    model, x = cnn().train(), torch.randn(2, 1, 8, 8)
    one = export_model(model, x, to=target, path=tmp_path / "m")[target]
    assert one.ok
    assert model.training
    loaded = torch.jit.load(tmp_path / "m") if target == "torchscript" else torch.export.load(tmp_path / "m").module()
    assert torch.allclose(loaded(x), model.eval()(x), atol=1e-6)
    assert one.outputs == {"output": (2, 10)}
    assert parity(model, tmp_path / "m", x)  # this process wrote it


def test_a_scripted_model_keeps_its_branch(tmp_path):
    one = export_model(Branch(), torch.ones(2, 4), to="torchscript", path=tmp_path / "m.pt")["torchscript"]
    assert (one.ok, one.exporter) == (True, "script")
    loaded = torch.jit.load(tmp_path / "m.pt")
    assert [float(loaded(sign * torch.ones(1))) for sign in (1, -1)] == [2.0, -2.0]
    assert any("deprecated" in note for note in one.notes)


@pytest.mark.parametrize("model", [UnscriptableBranch(), NumberBranch()], ids=lambda model: type(model).__name__)
def test_a_branch_that_tracing_would_bake_is_refused_even_where_no_input_shows_it(model, tmp_path):
    report = export_model(model, torch.ones(2, 4), to="torchscript", path=tmp_path / "m.pt")
    assert not report
    assert "decision that hangs on values" in report.headline
    assert "_local_scalar_dense at test_targets.py" in report["torchscript"].error
    assert list(tmp_path.iterdir()) == []


def test_a_loop_count_that_tracing_bakes_is_refused(tmp_path):
    report = export_model(Loop(), torch.randn(2, 4), to="torchscript", path=tmp_path / "m.pt")
    assert not report
    assert "baked a size or a loop count" in report.headline
    assert "length + 1" in report.headline


def test_a_branch_by_size_far_from_the_example_is_not_baked(tmp_path):
    class BySize(nn.Module):
        def forward(self, x, **options):
            return x * 2 if x.shape[0] > 8 else x + 1

    report = export_model(BySize(), torch.randn(2, 4), to="torchscript", path=tmp_path / "m.pt")
    assert not report
    assert "with axis 0 of x at 9 the file answers otherwise" in report.headline


def test_a_guard_that_cannot_be_computed_at_a_size_says_nothing_of_it(tmp_path):
    """Pooling halves the sides twice, and a guard divides by what is left: by nothing, at a side of 1."""
    one = export_model(DigitsNet().eval(), torch.rand(4, 1, 8, 8), to="torchscript", exporter="trace", folder=tmp_path)["torchscript"]
    assert one.ok, one.cause


def test_a_size_that_the_program_only_refuses_is_told(tmp_path):
    class Reshaped(nn.Module):
        def forward(self, x, **options):
            return x.reshape(int(x.shape[0]), 2, 2)

    one = export_model(Reshaped(), torch.randn(3, 4), to="torchscript", path=tmp_path / "m.pt")["torchscript"]
    assert one.ok
    assert any("was fixed by the exporter" in note for note in one.notes)


def test_keywords_and_nested_outputs_are_traced_in_order(tmp_path):
    x, scale = torch.randn(2, 4), torch.tensor([3.0])
    one = export_model(Keywords(), (x,), {"scale": scale}, to="torchscript", path=tmp_path / "m.pt")["torchscript"]
    assert (one.ok, list(one.inputs)) == (True, ["x", "scale"])
    y, first, second = torch.jit.load(tmp_path / "m.pt")(x, scale)
    assert torch.equal(y, x * 3)
    assert torch.equal(second, first + 1)
    assert any("takes its tensors in order" in note for note in one.notes)


@pytest.mark.parametrize("model", [AutoEncoder(), OptionalEncoder()], ids=["scripted", "traced"])
def test_methods_go_into_the_same_torchscript_and_into_graphs_of_their_own(model, tmp_path):
    x, z = torch.randn(2, 4), torch.randn(2, 2)
    folder = tmp_path / "out" / "deep"  # which is made
    report = export_model(model, x, to=("torchscript", "pt2"), folder=folder, methods={"encode": x, "decode": z}).check()
    stem = type(model).__name__.lower()
    loaded = torch.jit.load(folder / f"{stem}.torchscript.pt")
    assert torch.allclose(loaded.encode(x), model.encode(x))
    assert torch.allclose(loaded.decode(z), model.decode(z))
    assert [e.target for e in report.exports] == ["torchscript", "pt2", "pt2:encode", "pt2:decode"]
    assert torch.allclose(torch.export.load(folder / f"{stem}.decode.pt2").module()(z), model.decode(z))
    assert not hasattr(type(model).encode, "_torchscript_modifier")
    with pytest.raises(SelectionError, match="no method"):
        export_model(model, x, to="pt2", path=tmp_path / "m", methods={"endcode": x})


def test_a_program_with_a_free_axis_is_tried_at_another_size_and_holds_no_example(tmp_path):
    model, x = cnn(), torch.randn(3, 1, 8, 8)
    one = export_model(model, x, to="pt2", path=tmp_path / "m.pt2", dynamic_axes={"input": {0: "batch"}})["pt2"]
    assert one.ok
    assert "resized" in one.tried
    assert torch.export.load(tmp_path / "m.pt2").module()(torch.randn(7, 1, 8, 8)).shape == (7, 10)
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
        assert [i.file_size for i in archive.infolist() if "sample_inputs" in i.filename] in ([], [0])
    pinned = export_model(model, x, to="pt2", path=tmp_path / "n.pt2", dynamic_axes={"input": {2: "height"}})
    assert not pinned
    assert not (tmp_path / "n.pt2").exists()


def test_what_torch_export_refuses_is_explained(tmp_path):
    one = export_model(Branch(), torch.ones(2, 4), to="pt2", path=tmp_path / "m.pt2")["pt2"]
    assert not one.ok
    assert "chooses a branch" in one.cause
    assert "torch.where" in one.cure
    assert "not strict:" in one.error
    assert "strict:" in one.error
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "bool(x.sum() > 0)" in text)
    (reason,) = one.reasons
    assert (reason.where, reason.code) == (f"test_targets.py:{line} in forward", "return x * 2 if bool(x.sum() > 0) else x - 1")
    assert reason.where in one.cause
    assert "Data dependent error" in one.error  # draft_export's own words


def test_what_stands_against_an_export_is_ranked(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))

    class Both(nn.Module):
        def forward(self, x):
            y = x.reshape(3, 4)
            return y[: int(y.max().item())]

    one = export_model(Both(), torch.ones(3, 4), to="pt2", path=tmp_path / "m.pt2", dynamic_axes={"x": {0: "n"}})["pt2"]
    assert [reason.kind for reason in one.reasons] == ["DATA_DEPENDENT_ERROR", "GUARD_ADDED"]
    assert one.reasons[1].what == "it holds only where 4*x.shape[0] = 12"
    assert one.reasons[1].code == "y = x.reshape(3, 4)"
    assert list((tmp_path / "tmp").iterdir()) == []  # draft_export's own log of the model's lines


def test_a_line_that_one_way_to_export_passes_is_not_blamed(tmp_path):
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(8, 4)

        def forward(self, x):
            state = x.new_zeros((len(x), 4))
            for row in range(x.shape[1]):
                state = self.cell(x[:, row], state)
            return state

    one = export_model(Rows(), torch.ones(3, 6, 8), to="pt2", path=tmp_path / "m.pt2", dynamic_axes={"x": {0: "n", 1: "rows"}})["pt2"]
    assert [(reason.what, reason.code) for reason in one.reasons] == [
        ("it holds only where x.shape[1] = 6", "for row in range(x.shape[1]):")
    ]
    assert "range(x.shape[1])" in one.cause


def test_a_line_of_a_cell_is_told_as_one(tmp_path):
    source = "import torch\nclass Typed(torch.nn.Module):\n    def forward(self, x):\n        if x.mean() > 0.5:\n            x = 1 - x\n        return x\n"
    name, scope = "/tmp/ipykernel_7/2784743435.py", {}
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    try:
        exec(compile(source, name, "exec"), scope)
        one = export_model(scope["Typed"](), torch.rand(3, 4), to="pt2", path=tmp_path / "m.pt2")["pt2"]
    finally:
        del linecache.cache[name]
    assert [(reason.where, reason.code) for reason in one.reasons] == [("this notebook's cell, line 4 in forward", "if x.mean() > 0.5:")]


def test_an_axis_of_one_item_is_told_as_such(tmp_path):
    one = export_model(AutoEncoder(), torch.ones(1, 4), to="pt2", path=tmp_path / "m.pt2", dynamic_axes={"x": {0: "n"}})["pt2"]
    assert not one.ok
    assert "two items or more" in one.cure


@pytest.mark.parametrize("target", ["pt2", "torchscript", "onnx"])
def test_a_methods_own_input_may_be_dynamic(target, tmp_path):
    class Codes(nn.Module):
        def forward(self, image):
            return image * 2

        def decode(self, code: torch.Tensor):
            return code - 1

    axes = {"image": {0: "batch"}, "code": {0: "items"}}
    options = {"dynamic_axes": axes, "methods": {"decode": torch.randn(5, 2)}}
    report = export_model(Codes(), torch.randn(3, 4), to=target, path=tmp_path / f"m.{target}", **options)
    assert report, report.headline
    assert report[target].inputs == {"image": ("batch", 4)}
    assert report[target].outputs == {"output": ("batch", 4)}
    if target != "torchscript":
        assert report[f"{target}:decode"].inputs == {"code": ("items", 2)}
    axes["cod"] = {0: "items"}
    assert (
        "'cod' is neither an input"
        in export_model(Codes(), torch.randn(3, 4), to=target, path=tmp_path / f"m.{target}", **options).headline
    )


def test_headlines_name_files_without_their_folders(tmp_path):
    report = export_model(cnn(), torch.randn(2, 1, 8, 8), to=("torchscript", "pt2"), folder=tmp_path)
    assert "sequential.pt2" in report.headline
    assert str(tmp_path) not in report.headline


@pytest.mark.parametrize(
    ("after", "words"), [(0.98, "is no faster."), (0.5, "is 2 times as fast."), (2.0, "is slower, 2 times as long a run.")]
)
def test_how_much_faster_is_told_where_it_is_more_than_nothing(after, words):
    report = OptimizeReport("a/m.pt", "a/fast.pt", 10, 9, 1.0, after, parity(nn.Linear(2, 2), nn.Identity(), torch.ones(1, 2)))
    assert "m.pt was not optimized" in report.headline
    good = dataclasses.replace(report, parity=parity(nn.Identity(), nn.Identity(), torch.ones(1, 2)))
    assert good.headline == f"fast.pt answers as m.pt does and {words}"


def test_an_axis_asked_of_an_input_that_is_not_there_is_refused(tmp_path):
    class Reshaped(nn.Module):
        def forward(self, x, **options):
            return x.reshape(int(x.shape[0]), 2, 2)

    subjects = (
        (AutoEncoder(), {"nosuch": {0: "n"}}, "'nosuch' is neither an input (x) nor"),
        (AutoEncoder(), {"x": {2: "n"}}, "axis 2 of 'x'"),
        (Reshaped(), {"x": [0]}, "failed on batch 5"),
    )
    for model, axes, words in subjects:
        report = export_model(model, torch.randn(3, 4), to="torchscript", path=tmp_path / "m.pt", dynamic_axes=axes)
        assert not report
        assert words in report.headline
    assert list(tmp_path.iterdir()) == []


def test_a_traced_method_is_asked_for_decisions_and_other_sizes_too(tmp_path):
    class Methods(nn.Module):
        def forward(self, x, **options):
            return x + 1

        def choose(self, x):
            return x * 2 if x.abs().max().item() < 1e6 else x - 1

        def count(self, x):
            total = torch.zeros(())
            for i in range(x.shape[1]):
                total = total + x[:, i].sum() * i
            return total

    x = torch.randn(2, 4)
    for method, word in (("choose", "decision that hangs on values"), ("count", "baked a size or a loop count")):
        report = export_model(Methods(), x, to="torchscript", path=tmp_path / "m.pt", methods={method: x}, exporter="trace")
        assert not report
        assert word in report.headline
    assert list(tmp_path.iterdir()) == []


Pair = collections.namedtuple("Pair", "u v")


class Paired(nn.Module):
    def forward(self, x):
        return Pair(x * 2, x + 1)


def test_one_target_that_fails_takes_no_other_with_it(tmp_path, monkeypatch):
    report = export_model(Paired(), torch.randn(2, 4), to=("onnx", "pt2"), folder=tmp_path)
    assert report["onnx"].ok
    assert "cannot name the class" in report["pt2"].cause
    assert "_register_namedtuple" in report["pt2"].cure
    monkeypatch.setattr(exported_program, "write", lambda *_: 1 / 0)
    report = export_model(AutoEncoder(), torch.randn(2, 4), to=("pt2", "torchscript"), folder=tmp_path)
    assert report["torchscript"].ok
    assert "ZeroDivisionError" in report["pt2"].error


class Doubled(nn.Module):
    def forward(self, x, y):
        return {"sum": x + 1, "both": torch.cat([x, x]), "fixed": y}


def test_asked_axis_names_stand_in_the_outputs_of_torchscript_too(tmp_path):
    asked = {"dynamic_axes": {"x": {0: "batch"}, "y": {0: "length"}}}
    one = export_model(Doubled(), (torch.randn(3, 4), torch.randn(2)), to="torchscript", path=tmp_path / "m.pt", **asked)["torchscript"]
    assert one.outputs == {"sum": ("batch", 4), "both": ("?", 4), "fixed": ("length",)}


def test_asked_axis_names_stand_in_inputs_and_outputs(tmp_path):
    x, y = torch.randn(3, 4), torch.randn(2)
    for options in ({"dynamic_axes": {"x": {0: "batch"}}}, {"dynamic_shapes": {"x": {0: torch.export.Dim("batch")}, "y": None}}):
        one = export_model(Doubled(), (x, y), to="pt2", path=tmp_path / "m.pt2", **options)["pt2"]
        assert one.inputs == {"x": ("batch", 4), "y": (2,)}
        assert one.outputs == {"sum": ("batch", 4), "both": ("2*batch", 4), "fixed": (2,)}


def test_the_headline_counts_sizes_and_a_remark_lists_them(tmp_path):
    report = export_model(AutoEncoder(), torch.randn(3, 4), to="torchscript", path=tmp_path / "m.pt", opset_version=18)
    assert "and at 2 other sizes" in report.headline
    assert "axis 0" not in report.headline
    assert report["torchscript"].sizes == ("axis 0 of x at 4", "axis 0 of x at 2")
    assert [(o.name, o.asked, o.kept) for o in report["torchscript"].options] == [("opset_version", "18", False)]
    assert set(report["torchscript"].latency) == {"model", "file"}


FULL_DISK = """
import os, resource, sys, warnings, torch
warnings.simplefilter("ignore")
import workbench as wb
model, x = torch.nn.Linear(300, 300), torch.ones(1, 300)
for name in ("m.onnx", "m.torchscript", "m.pt2"):
    open(os.path.join(sys.argv[1], name), "w").write("yesterday")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
for target in ("onnx", "torchscript", "pt2"):
    try:
        wb.export_model(model, x, to=target, path=os.path.join(sys.argv[1], "m." + target))
    except wb.errors.WriteError as error:
        print(target, error.message)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files")
def test_a_disk_that_is_full_ends_no_process_and_leaves_what_stood_there(tmp_path):
    """torch's own writer calls std::terminate where it cannot write; a limit on file size stands in for a full disk."""
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told = "the write failed: File too large; nothing was changed"
    assert done.stdout.splitlines() == [f"{target} {told}" for target in ("onnx", "torchscript", "pt2")]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(["m.onnx", "m.torchscript", "m.pt2"], "yesterday")


def test_a_model_that_returns_its_cache_is_exported_without_it(tmp_path):
    class Cache:
        pass

    class Cached(nn.Module):
        def forward(self, x):
            return {"y": x * 2, "cache": Cache()}

    class Switched(nn.Module):
        def forward(self, x, use_cache=True):
            return (x * 2, Cache()) if use_cache else (x * 2,)

    for model, word in ((Cached(), "left out"), (Switched(), "use_cache=False")):
        one = export_model(model, torch.ones(2, 3), to="pt2", path=tmp_path / "m.pt2")["pt2"]
        assert one.ok
        assert word in one.notes[0]


def test_the_exporter_asked_for_is_the_one_used(tmp_path):
    x = torch.ones(2, 4)
    one = export_model(AutoEncoder(), x, to="torchscript", path=tmp_path / "m.pt", exporter="trace")["torchscript"]
    assert (one.ok, one.exporter) == (True, "trace")
    one = export_model(Keywords(), (x,), {"scale": x}, to="torchscript", path=tmp_path / "n.pt", exporter="script")["torchscript"]
    assert not one.ok
    assert "script compiler does not take the model" in one.cause
    for target, exporter in (("onnx", "script"), ("torchscript", "dynamo"), (("torchscript", "pt2"), "script")):
        with pytest.raises(SelectionError, match="is not made by"):
            export_model(AutoEncoder(), x, to=target, folder=tmp_path, exporter=exporter)


def test_a_stored_program_runs_only_under_the_trust_rule(tmp_path):
    program = torch.export.export(AutoEncoder(), (torch.ones(2, 4),))
    torch.export.save(program, tmp_path / "m.pt2")
    x = torch.ones(2, 4)
    with pytest.raises(UntrustedError, match="did not write"):
        parity(program, tmp_path / "m.pt2", x)
    assert parity(program, tmp_path / "m.pt2", x, trust=True)
    with zipfile.ZipFile(tmp_path / "m.pt2") as old, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("weights_config.json"):
                data = data.replace(b'"use_pickle": false', b'"use_pickle": true')
            if name.endswith("weight_0"):
                torch.save(torch.ones(2, 4), tmp_path / "weight")
                data = (tmp_path / "weight").read_bytes()
            new.writestr(name, data)
    with pytest.raises(UntrustedError, match=r"unpickle|danger"):
        parity(program, tmp_path / "evil.pt2", x, trust=True)


def test_a_torchscript_file_is_optimized_and_proved(tmp_path):
    model, x = cnn().eval(), torch.randn(2, 1, 8, 8)
    export_model(model, x, to="torchscript", path=tmp_path / "m.pt").check()
    report = optimize_torchscript(tmp_path / "m.pt", tmp_path / "fast.pt", [x, torch.randn(5, 1, 8, 8)], rounds=11).check()
    assert report.seconds_before > 0 < report.seconds_after
    assert torch.allclose(torch.jit.load(tmp_path / "fast.pt")(x), model(x), atol=1e-5)
    torch.jit.script(cnn().train()).save(str(tmp_path / "train.pt"))
    with pytest.raises(SelectionError, match="train mode"):
        optimize_torchscript(tmp_path / "train.pt", tmp_path / "no.pt", x, trust=True)


def test_the_lines_that_load_it_work(tmp_path):
    model, x = AutoEncoder(), torch.ones(2, 4)
    for target in ("onnx", "torchscript", "pt2"):
        one = export_model(model, x, to=target, path=tmp_path / f"m.{target}")[target]
        scope = {"x": x.numpy() if target == "onnx" else x}
        exec(one.usage, scope)
        outputs = scope["outputs"][0] if target == "onnx" else scope["outputs"]
        assert torch.allclose(torch.as_tensor(outputs), model(x), atol=1e-6)


class Dropping(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x * 2, 0.3)


def test_dropout_that_is_always_on_has_one_cure_for_every_target(tmp_path):
    report = export_model(Dropping().eval(), torch.ones(4, 8), to=("onnx", "pt2", "torchscript"), folder=tmp_path)
    assert not any(one.ok for one in report.exports)
    (cure,) = {one.cure for one in report.exports}
    assert "self.training" in cure


class Lookup(nn.Module):
    """Inputs of several element types."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 2)

    def forward(self, ids, keep, scale):
        return self.table(ids).sum(-1).masked_fill(~keep, 0.0) * scale


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_cpp_program_compiles_against_libtorch_and_answers(tmp_path):
    model, ones = Lookup().eval(), (torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 1))
    one = export_model(model, ones, to="torchscript", path=tmp_path / "m.pt")["torchscript"]
    (tmp_path / "main.cpp").write_text(one.cpp)
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    (folder,) = cpp_extension.library_paths()
    libraries = [f"-L{folder}", f"-Wl,-rpath,{folder}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    subprocess.run(["g++", "-std=c++17", "-O0", abi, *includes, "main.cpp", *libraries, "-o", "main"], cwd=tmp_path, check=True)
    said = subprocess.run(["./main"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    numbers = [float(word) for word in said.split("[")[0].split()]
    assert torch.allclose(torch.tensor(numbers), model(*ones)[0], atol=1e-4)
