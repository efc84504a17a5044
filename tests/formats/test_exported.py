"""torch.export archives, against torch.export.load of files that this test wrote itself."""

import base64
import collections
import functools
import io
import json
import pickle
import struct
import subprocess
import sys
import time
import zipfile

import hostile_makers as make
import pytest
import sympy
import torch
from conformance import FULL, SECONDS, FormatTests, state
from strategies import same
from torch._export.serde.serialize import serialize
from torch.export.pt2_archive._package import load_pt2, package_pt2
from torch.utils._sympy import functions
from torch.utils._sympy.printers import PythonPrinter

import workbench as wb
from workbench.errors import CorruptFileError, UnsupportedError
from workbench.formats import exported_file, exported_graph
from workbench.formats.torch_objects import watched_runs

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")]


class Small(torch.nn.Module):
    """The tensors of `conformance.state`, views of one storage, and a tie."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Module()
        for name, tensor in state().items():
            holder, _, last = name.replace("half", "halves").rpartition(".")  # every module has a method called half
            owner = self.layer if holder else self
            if last in ("weight", "bias"):
                owner.register_parameter(last, torch.nn.Parameter(tensor))
            else:
                owner.register_buffer(last, tensor)
        base = torch.arange(12.0).view(3, 4)
        for name, view in {"transposed": base.t(), "stepped": base[:, ::2], "expanded": base[:1].expand(2, 4), "tail": base[2]}.items():
            self.register_buffer(name, view)
        self.layer.tied = self.layer.weight
        self.register_buffer("wave", torch.tensor([1 + 2j]))
        self.register_buffer("eighth", torch.ones(3).to(torch.float8_e4m3fn))

    def forward(self, x):
        return x + 1


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.arange(2.0))

    def forward(self, x):
        return x + 1


class Rich(torch.nn.Module):
    """Constants of the code, a buffer that the state dict leaves out, keyword inputs and a free dimension."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 4)
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("fleeting", torch.ones(4), persistent=False)
        self.plain = torch.full((4,), 9.0)

    def forward(self, x, *, z):
        self.count.add_(1)
        return {"out": self.fc(x) + self.plain + self.fleeting + torch.tensor([1.0, 2.0, 3.0, 4.0]) + z}


@functools.cache
def exported(kind):
    if kind != "rich":
        return torch.export.export(Small() if kind == "small" else Tiny(), (torch.ones(1),))
    sizes = {"x": {0: torch.export.Dim("batch")}, "z": None}
    return torch.export.export(Rich(), (torch.full((2, 3), 7.0),), {"z": torch.full((1,), 8.0)}, dynamic_shapes=sizes)


def without_source_lines(path):
    """The file with the graph's metadata dropped: it is half of the bytes, and every byte is cut and flipped here."""
    records = records_of(path)
    for name, data in records.items():
        if name.endswith("models/model.json"):
            model = json.loads(data)
            for node in model["graph_module"]["graph"]["nodes"]:
                node["metadata"] = {}
            records[name] = json.dumps(model).encode()
    return rewritten(path, records)


def records_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(path, records):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return path


def prefixed(tensors, under=""):
    return {f"{under}.{name}".lstrip("."): tensor for name, tensor in tensors.items()}


class TestExported(FormatTests):
    magic = 4

    def build(self, folder, kind="small"):
        torch.export.save(exported(kind), folder / "model.pt2")
        return without_source_lines(folder / "model.pt2"), [folder / "model.pt2"]

    def test_a_file_cut_at_any_byte_is_refused_or_whole(self, tmp_path):
        super().test_a_file_cut_at_any_byte_is_refused_or_whole(self.build(tmp_path, "tiny"))

    def test_a_flipped_byte_never_gives_a_foreign_exception_or_a_hang(self, tmp_path):
        super().test_a_flipped_byte_never_gives_a_foreign_exception_or_a_hang(self.build(tmp_path, "tiny"))

    def official(self, path):
        loaded = torch.export.load(path)
        return prefixed(loaded.state_dict) | {"sample_inputs.0.0": loaded.example_inputs[0][0]}


@functools.cache
def older(kind):
    parts = serialize(exported(kind))
    names = ("exported_program.json", "state_dict.pt", "constants.pt", "example_inputs.pt")
    contents = (parts.exported_program, parts.state_dict, parts.constants, parts.example_inputs)
    return {
        **{f"serialized_{name}": data for name, data in zip(names, contents, strict=True)},
        "version": b"8.20",
        "extra_files/note.txt": b"hi",
    }


class TestOlderExported(TestExported):
    """The layout of torch 2.1 to 2.7, which torch.export.load still reads: a zip with whole torch.save files in it."""

    def build(self, folder, kind="small"):
        return rewritten(folder / "model.pt2", older(kind)), [folder / "model.pt2"]

    if not FULL:
        test_a_flipped_byte_never_gives_a_foreign_exception_or_a_hang = None


def saved(path, kind="rich", **extra):
    torch.export.save(exported(kind), path, **extra)
    return path


def changed(path, change):
    """The archive with records replaced by the end of their name; `change` maps it to new bytes or a function of the old."""
    records = records_of(path)
    for end, new in change.items():
        name = next(name for name in records if name.endswith(end))
        records[name] = new(records[name]) if callable(new) else new
    return rewritten(path, records)


def test_constants_stand_apart_from_the_state_dict(tmp_path):
    path = saved(tmp_path / "m.pt2")
    ckpt, loaded = wb.open(path), torch.export.load(path)
    assert ckpt.format == "torch-export"
    assert list(ckpt.weights) == list(loaded.state_dict)
    official = prefixed(loaded.constants, "constants")
    assert {name: t for name, t in ckpt.items() if name.startswith("constants.")}.keys() == official.keys()
    assert all(same(ckpt[name].load(), tensor) for name, tensor in official.items())


def test_ties_and_gradients_are_kept(tmp_path):
    ckpt, loaded = wb.open(saved(tmp_path / "m.pt2", "small")).weights, torch.export.load(tmp_path / "m.pt2")
    assert ckpt.aliases == {"layer.tied": "layer.weight"}
    assert {name: t.requires_grad for name, t in ckpt.items()} == {name: t.requires_grad for name, t in loaded.state_dict.items()}


def test_the_signature_says_what_goes_in_and_out(tmp_path):
    program = exported("rich").run_decompositions({})  # which spells out that a buffer changes
    torch.export.save(program, tmp_path / "m.pt2", extra_files={"note.txt": "hi"})
    ckpt = wb.open(tmp_path / "m.pt2")
    told = {name.removeprefix("program."): value for name, value in ckpt.extras.items()}
    signature = program.graph_signature
    assert {told[f"parameter.{arg}"] for arg in signature.inputs_to_parameters} == {"fc.weight", "fc.bias"}
    assert {told[f"buffer.{arg}"] for arg in signature.inputs_to_buffers} == {"count", "fleeting"}
    assert [name for name in told if name.startswith("user_input.")] == ["user_input.x", "user_input.z"]
    assert told["user_input.x"].startswith("float32 [s")
    assert told["user_input.z"] == "float32 [1]"
    assert [told[name].partition(" ")[0] for name in told if name.startswith("user_output.")] == ["float32"]
    assert told["buffer_mutation." + next(iter(signature.buffers_to_mutate))] == "count"
    assert told["torch_version"] == torch.__version__
    assert told["opset_version.aten"] > 0
    assert ckpt.extras["extra.note.txt"] == 2


def test_several_models_in_one_archive_are_listed_under_their_names(tmp_path):
    package_pt2(tmp_path / "m.pt2", exported_programs={"a": exported("rich"), "b.c": exported("small")})
    ckpt = wb.open(tmp_path / "m.pt2")
    assert {name for name in ckpt if "fc.weight" in name} == {"a.fc.weight"}
    expected = load_pt2(tmp_path / "m.pt2").exported_programs["b.c"].state_dict
    assert [name for name in ckpt.section(("b.c",)) if not name.startswith("sample_inputs.")] == list(expected)
    for name, tensor in expected.items():
        assert same(ckpt[f"b.c.{name}"].load(), tensor)


def test_the_layout_of_torch_2_8_opens(tmp_path):
    """Weights and constants are torch.save files of their own: torch 2.13 calls this legacy and reads it."""
    path = saved(tmp_path / "m.pt2")
    expected = torch.export.load(path)
    records = {name: data for name, data in records_of(path).items() if "/data/weights/" not in name and "/data/constants/" not in name}
    for kind, tensors in (("weights", expected.state_dict), ("constants", expected.constants)):
        torch.save(tensors, buffer := io.BytesIO())
        records[f"m/data/{kind}/model.pt"] = buffer.getvalue()
    ckpt = wb.open(rewritten(path, records))
    assert all(same(ckpt.weights[name].load(), tensor) for name, tensor in expected.state_dict.items())
    assert all(same(ckpt[name].load(), tensor) for name, tensor in prefixed(expected.constants, "constants").items())
    assert not ckpt.dangers


@pytest.mark.parametrize("extension", ["pt", "safetensors"])
def test_weights_are_rescued_from_the_program(extension, tmp_path):
    path = saved(tmp_path / "m.pt2")
    wb.save(wb.open(path).weights, tmp_path / f"w.{extension}")
    found, expected = wb.open(tmp_path / f"w.{extension}"), torch.export.load(path).state_dict
    assert set(found) == set(expected)
    assert all(same(found[name].load(), tensor) for name, tensor in expected.items())


def test_deflated_weights_are_read(tmp_path):
    path = saved(tmp_path / "m.pt2")
    expected = torch.export.load(path).state_dict
    records = records_of(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if "weight" in name else zipfile.ZIP_STORED)
    assert all(same(wb.open(path).weights[name].load(), tensor) for name, tensor in expected.items())


def test_a_good_file_is_a_program_with_sample_inputs_and_no_danger(tmp_path):
    for path in (saved(tmp_path / "m.pt2"), rewritten(tmp_path / "o.pt2", older("rich"))):
        ckpt = wb.open(path)
        assert {f.kind: f.severity for f in ckpt.findings} == {"program": "info", "sample inputs": "warning"}
        assert "torch.export.load" in {f.kind: f.hint for f in ckpt.findings}["program"]
        assert ckpt["sample_inputs.0.0"].load().tolist() == [[7] * 3] * 2
        assert ckpt["sample_inputs.1.z"].load().tolist() == [8]


def test_a_program_without_sample_inputs_says_nothing_of_them(tmp_path):
    path = changed(saved(tmp_path / "m.pt2"), {"sample_inputs/model.pt": b""})
    assert {f.kind for f in wb.open(path).findings} == {"program"}


def test_listing_needs_no_torch(tmp_path):
    code = "import sys, workbench as wb; c = wb.open(sys.argv[1]); str(c), c.weights['fc.weight'].peek(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, saved(tmp_path / "m.pt2")], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


# hostile files, from the layout above and from what torch.export.load runs


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.mark}",)


def torch_file(value):
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


def config_of(path, kind="weights"):
    return next(json.loads(data) for name, data in records_of(path).items() if name.endswith(f"model_{kind}_config.json"))


def with_entry(path, name, **meta):
    """The archive with parts of one weight's entry replaced: of its tensor_meta, or `entry_x` of the entry itself."""
    config = config_of(path)
    for key, value in meta.items():
        (config["config"][name] if key.startswith("entry_") else config["config"][name]["tensor_meta"])[key.removeprefix("entry_")] = value
    return changed(path, {"model_weights_config.json": json.dumps(config).encode()})


PICKLES = {
    "torch zip": lambda evil: torch_file((evil,)),
    "protocol 0": lambda evil: pickle.dumps(evil, 0),
    "protocol 4": lambda evil: pickle.dumps(evil, 4),
    "second pickle": lambda evil: pickle.dumps(1, 2) + pickle.dumps(evil, 2),
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("layout", ["new", "older"])
def test_a_pickle_in_the_sample_inputs_is_a_danger_and_is_not_run(kind, layout, tmp_path):
    mark, record = tmp_path / "mark", PICKLES[kind](Evil(tmp_path / "mark"))
    path = saved(tmp_path / "m.pt2") if layout == "new" else rewritten(tmp_path / "m.pt2", older("rich"))
    changed(path, {"sample_inputs/model.pt" if layout == "new" else "serialized_example_inputs.pt": record})
    ckpt = wb.open(path)
    assert [name.rpartition(".")[2] for name in ckpt.dangers] == ["system"]
    assert ckpt.weights["fc.weight"].load().shape == (4, 3)
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["torch zip", "protocol 0", "protocol 4"])
def test_a_weight_said_to_be_a_pickle_is_a_danger_and_is_not_run(kind, tmp_path):
    """Flipping `use_pickle` is enough to have torch.export.load run a weight's bytes."""
    path, mark = saved(tmp_path / "m.pt2"), tmp_path / "mark"
    payload = config_of(path)["config"]["fc.bias"]["path_name"]
    changed(with_entry(path, "fc.bias", entry_use_pickle=True), {f"data/weights/{payload}": PICKLES[kind](Evil(mark))})
    ckpt = wb.open(path)
    assert [name.rpartition(".")[2] for name in ckpt.dangers] == ["system"]
    assert any("system" in found.message for found in wb.scan(path).dangers)
    assert "fc.weight" in ckpt
    assert not mark.exists()


@pytest.mark.parametrize("file", ["custom_obj_0", "x/data/constants/custom_obj_0"])
def test_a_weight_called_as_a_constant_is_a_pickle_all_the_same(file, tmp_path):
    path = saved(tmp_path / "m.pt2")
    config = config_of(path)
    config["config"]["fc.bias"] |= {"path_name": file, "use_pickle": True}
    rewritten(path, records_of(path) | {f"m/data/weights/{file}": pickle.dumps(Evil("x"), 0)})
    ckpt = wb.open(changed(path, {"model_weights_config.json": json.dumps(config).encode()}))
    assert [name.rpartition(".")[2] for name in ckpt.dangers] == ["system"]


@pytest.mark.parametrize("use_pickle", [True, False])
def test_an_opaque_object_is_a_pickle_whatever_its_entry_says(use_pickle, tmp_path):
    path = saved(tmp_path / "m.pt2")
    config, weight = config_of(path, "constants"), config_of(path)["config"]["fc.bias"]
    config["config"]["thing"] = weight | {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": use_pickle}
    records = records_of(path) | {"m/data/constants/opaque_obj_0": pickle.dumps(Evil(tmp_path / "mark"), 0).ljust(256, b".")}
    changed(rewritten(path, records), {"model_constants_config.json": json.dumps(config).encode()})
    code = f"import torch; torch.export.load({str(path)!r})"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, check=False, timeout=120)
    assert (tmp_path / "mark").exists()
    assert [name.rpartition(".")[2] for name in wb.open(path).dangers] == ["system"]
    assert any("opaque_obj_0" in found.message for found in wb.scan(path).dangers)


def test_a_pickled_weight_that_is_plain_is_listed(tmp_path):
    path = saved(tmp_path / "m.pt2")
    payload = config_of(path)["config"]["fc.bias"]["path_name"]
    changed(
        with_entry(path, "fc.bias", entry_use_pickle=True),
        {f"data/weights/{payload}": torch_file(torch.nn.Parameter(torch.full((4,), 3.0)))},
    )
    ckpt = wb.open(path)
    assert ckpt["fc.bias"].load().tolist() == torch.export.load(path).state_dict["fc.bias"].tolist() == [3] * 4
    assert not ckpt.dangers


@pytest.mark.parametrize("name", ["opaque_obj_0", "custom_obj_0"])
def test_objects_among_the_constants_are_told(name, tmp_path):
    path = saved(tmp_path / "m.pt2")
    config = config_of(path, "constants")
    config["config"]["thing"] = {"path_name": name, "is_param": False, "use_pickle": True, "tensor_meta": None}
    records = records_of(path) | {f"m/data/constants/{name}": pickle.dumps(Evil("x"))}
    changed(rewritten(path, records), {"model_constants_config.json": json.dumps(config).encode()})
    ckpt = wb.open(path)
    assert bool(ckpt.dangers) == (name == "opaque_obj_0")
    assert ("object not read" in {f.kind for f in ckpt.findings}) == (name == "custom_obj_0")


@pytest.mark.parametrize("record", [b"\x80\x02cos\nsystem\n\xff", b"PK\x03\x04", b"garbage"])
def test_sample_inputs_that_cannot_be_read_are_a_danger(record, tmp_path):
    ckpt = wb.open(changed(saved(tmp_path / "m.pt2"), {"sample_inputs/model.pt": record}))
    assert "unreadable pickle" in {f.kind for f in ckpt.findings if f.severity == "danger"}
    assert ckpt.weights["fc.weight"].load().shape == (4, 3)


def ints(*values):
    return [{"as_int": value} for value in values]


BAD_META = [
    {"dtype": 0}, {"dtype": 99}, {"dtype": "7"}, {"dtype": [7]}, {"dtype": True}, {"dtype": None},
    {"sizes": ints(-1, 3)}, {"sizes": ints(4)}, {"sizes": [4, 3]}, {"sizes": 12}, {"sizes": ints(4.0, 3)}, {"sizes": ints(True, 3)},
    {"sizes": [{"as_expr": {"expr_str": "s0"}}] * 2}, {"sizes": ints(1 << 40, 1 << 40)}, {"sizes": ints(*[1] * 70), "strides": ints(*[1] * 70)},
    {"strides": ints(3, -1)}, {"strides": None}, {"storage_offset": {"as_int": -1}}, {"storage_offset": 0}, {"layout": 1}, {"entry_tensor_meta": None},
]  # fmt: skip


@pytest.mark.parametrize("meta", BAD_META, ids=str)
def test_metadata_that_is_no_tensor_is_refused_with_its_name(meta, tmp_path):
    with pytest.raises(CorruptFileError) as caught:
        wb.open(with_entry(saved(tmp_path / "m.pt2"), "fc.weight", **meta))
    assert caught.value.where["tensor"] == "fc.weight"
    assert caught.value.where["record"].endswith("model_weights_config.json")


IN_DOUBT = [
    {"sizes": ints(5, 3)}, {"strides": ints(4, 1)}, {"storage_offset": {"as_int": 1}}, {"storage_offset": {"as_int": 1 << 62}}, {"dtype": 8},
    {"strides": ints(1 << 62, 1)}, {"entry_path_name": "weight_99"}, {"entry_path_name": "../../../etc/passwd"}, {"entry_path_name": 7},
]  # fmt: skip


@pytest.mark.parametrize("meta", IN_DOUBT, ids=str)
def test_a_tensor_that_does_not_lie_in_its_record_is_locked_and_the_others_are_not(meta, tmp_path):
    ckpt = wb.open(with_entry(saved(tmp_path / "m.pt2"), "fc.weight", **meta))
    with pytest.raises(CorruptFileError, match="locked"):
        ckpt["fc.weight"].load()
    assert ckpt["fc.bias"].load().shape == (4,)
    assert "values locked" in {f.kind for f in ckpt.findings if f.severity == "danger"}


def test_a_weight_saved_without_values_is_locked(tmp_path):
    """torch.export.load gives zeros here, and says nothing."""
    path = saved(tmp_path / "m.pt2")
    changed(path, {f"data/weights/{config_of(path)['config']['fc.bias']['path_name']}": b""})
    assert torch.export.load(path).state_dict["fc.bias"].tolist() == [0] * 4
    with pytest.raises(CorruptFileError, match="locked"):
        wb.open(path)["fc.bias"].load()


ODD_JSON = {
    "deep": b'{"config":' * 200_000,
    "deep list": b"[" * 200_000 + b"]" * 200_000,
    "twice": b'{"config": {}, "config": {}}',
    "twice inside": b'{"config": {"a": {}, "a": {}}}',
    "huge number": b'{"config": {"a": ' + b"9" * 5000 + b"}}",
    "list": b"[]",
    "no config": b"{}",
    "config is a list": b'{"config": []}',
    "entry is a number": b'{"config": {"a": 1}}',
    "not UTF-8": b'{"config": {"\xff": {}}}',
    "cut": b'{"config": {',
    "empty": b"",
    "NUL": b"\0" * 100,
}


@pytest.mark.parametrize("what", ODD_JSON)
def test_an_odd_config_is_refused_with_its_record(what, tmp_path):
    path, start = changed(saved(tmp_path / "m.pt2"), {"model_weights_config.json": ODD_JSON[what]}), time.process_time()
    with pytest.raises(CorruptFileError) as caught:
        wb.open(path)
    assert time.process_time() - start < SECONDS
    assert caught.value.where["record"].endswith("model_weights_config.json")


def test_a_config_of_too_many_values_is_refused_before_it_is_parsed(tmp_path):
    text = b'{"config": {' + b",".join(b'"%d":[]' % n for n in range(1_500_000)) + b"}}"
    path, start = changed(saved(tmp_path / "m.pt2"), {"model_weights_config.json": text}), time.process_time()
    with pytest.raises(UnsupportedError, match="values"):
        wb.open(path)
    assert time.process_time() - start < SECONDS


GRAPHS = {
    "no graph": {"graph_module": None},
    "lists for objects": {"graph_module": {"graph": [], "signature": []}},
    "specs of numbers": {"graph_module": {"graph": {"tensor_values": []}, "signature": {"input_specs": [1, {"a": 1}, {"b": None}, {"c": []}], "output_specs": {}}}},
    "names of lists": {"graph_module": {"signature": {"input_specs": [{"user_input": {"arg": {"as_tensor": {"name": ["x"]}}}}, {"parameter": {"arg": {"name": {}}, "parameter_name": [1]}}]}}},
    "odd tensors": {
        "graph_module": {
            "graph": {"tensor_values": {"x": {"dtype": [1], "sizes": 3}, "y": {"dtype": 7, "sizes": [1, None, {"as_expr": 3}]}}},
            "signature": {"input_specs": [{"user_input": {"arg": {"as_tensor": {"name": n}}}} for n in "xy"]},
        }
    },
    "a signature without end": {"graph_module": {"signature": {"input_specs": [{"user_input": {"arg": {"as_int": n}}} for n in range(50_000)]}}},
    "arguments called as versions": {"torch_version": "2", "schema_version": {"major": 8}, "graph_module": {"signature": {"input_specs": [{"torch_version": {"arg": {"name": "x"}}}], "output_specs": [{"schema_version": {"arg": {"name": "major"}}}]}}},
    "odd versions": {"schema_version": [1], "opset_version": "x", "torch_version": {"a": []}},
}  # fmt: skip


@pytest.mark.parametrize("what", GRAPHS)
def test_an_odd_graph_costs_the_signature_and_nothing_else(what, tmp_path):
    ckpt = wb.open(changed(saved(tmp_path / "m.pt2"), {"models/model.json": json.dumps(GRAPHS[what]).encode()}))
    str(ckpt)
    assert ckpt.weights["fc.weight"].load().shape == (4, 3)
    assert len(ckpt.extras) < 3000


def test_a_graph_too_large_to_list_leaves_the_weights(tmp_path):
    model = b'{"nodes": [' + b",".join([b"1"] * 2_100_000) + b"]}"
    ckpt = wb.open(changed(saved(tmp_path / "m.pt2"), {"models/model.json": model}))
    assert "graph not read" in {f.kind for f in ckpt.findings if f.severity == "danger"}
    assert ckpt.weights["fc.weight"].load().shape == (4, 3)


class Sized(torch.nn.Module):
    """Sizes in arithmetic, conditions on them, a branch, and containers going in and out."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)

    def forward(self, x, held, *, mode="a 'b' \"c\" \\"):
        rows = x.shape[0]
        y = torch.cond(x.sum() > 0, lambda x: self.fc(x), lambda x: x - 1, (x,)).view(rows // 2, -1) * max(rows, 3) / (rows**2 + 0.5)
        whole = torch.nn.functional.interpolate(held["k e y"][None], scale_factor=1.5)
        return y, collections.defaultdict(list, {"y": whole & 3 if mode == "a" else whole}), [x.nonzero(), x[: x.max().long().item()]]


def test_what_torch_export_writes_is_no_danger(tmp_path):
    sizes = {
        "x": {0: 2 * torch.export.Dim("half", min=3, max=500)},
        "held": {"k e y": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}},
    }
    held = collections.defaultdict(list, {"k e y": torch.ones(3, 5, 2)})
    torch.export.save(torch.export.export(Sized(), (torch.rand(12, 4), held), dynamic_shapes=sizes, strict=False), tmp_path / "m.pt2")
    model = json.loads(next(data for name, data in records_of(tmp_path / "m.pt2").items() if name.endswith("models/model.json")))
    assert len(model["guards_code"]) > 2
    assert "torch.ops.higher_order.cond" in {node["target"] for node in model["graph_module"]["graph"]["nodes"]}
    assert wb.scan(tmp_path / "m.pt2").ok


def replaced(value, key, new):
    """A tree of JSON with every value under a key replaced."""
    if isinstance(value, dict):
        return {k: new if k == key and v is not None else replaced(v, key, new) for k, v in value.items()}
    return [replaced(v, key, new) for v in value] if isinstance(value, list) else value


def edited(data, key, new):
    """The model's JSON with such values replaced; of the names, that of the input called x, wherever it is named."""
    if key == "name":
        return json.dumps(json.loads(data)).replace('"x"', json.dumps(new)).encode()
    return json.dumps(replaced(json.loads(data), key, new)).encode()


def enum_of(module):
    spec = {"type": "builtins.tuple", "context": json.dumps({"__enum__": True, "fqn": f"{module}:Kind", "name": "A"}), "children_spec": []}
    return json.dumps([1, spec])


class Idle(torch.nn.Module):
    def forward(self, y, x):
        return y + 1


RUN = "__import__('pathlib').Path({mark!r}).touch()"
TEXTS = {"expr_str": RUN, "guards_code": [RUN + " is None"], "name": "x=" + RUN, "out_spec": enum_of("stranger")}
VICTIM = """
import pathlib, sys, torch
for path in sys.argv[1:]:
    for given in (torch.ones(1), "abc"):
        try:
            torch.export.load(path).module()(torch.ones(4), given)
        except BaseException:
            pass
"""


def test_texts_of_the_graph_that_torch_runs_are_dangers_and_are_not_run(tmp_path):
    (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'out_spec')!r}, 'w')")
    files = []
    for key, text in TEXTS.items():
        new = json.loads(json.dumps(text).replace("{mark!r}", repr(str(tmp_path / key))))
        files.append(tmp_path / f"{key}.pt2")
        torch.export.save(
            torch.export.export(Idle(), (torch.ones(4), torch.ones(1)), dynamic_shapes=({0: torch.export.Dim("n")}, None)), files[-1]
        )
        changed(files[-1], {"models/model.json": lambda data, key=key, new=new: edited(data, key, new)})
        assert key in {f.where["key"] for f in wb.scan(files[-1]).dangers if f.kind == "code in the graph"}
        assert not (tmp_path / key).exists()
    subprocess.run([sys.executable, "-W", "ignore", "-c", VICTIM, *files], capture_output=True, check=True, timeout=120, cwd=tmp_path)
    assert [key for key in TEXTS if (tmp_path / key).exists()] == [*TEXTS]


def letter(code):
    """A text of one letter as sympy makes it of a polynomial's degree, with nothing but classes that are called and functions that are not."""
    return f"RootSum(Symbol('x')**{code}+1,Function('F',has=Lambda(Symbol('x'),0),__rmul__=chr))"


def spelled(text):
    return "+".join(f"'{sign}'" if sign.isalnum() or sign == "_" else letter(ord(sign)) for sign in text)


def cpp_object(run):
    """A C++ object that unpickles its state, as an archive that does not begin where its record does."""
    state = base64.b64encode(pickle.dumps(Run(run), 2))
    out = io.BytesIO(bytes(64))
    with zipfile.ZipFile(out, "a") as archive:
        for name, data in {
            "data.pkl": b"\x80\x02c__torch__.torch.classes.aten\nOpaqueObject\n)\x81X" + struct.pack("<I", len(state)) + state + b"b.",
            "version": b"3\n",
            "byteorder": b"little",
        }.items():
            archive.writestr(f"archive/{name}", data)
    return out.getvalue()


class Run:
    def __init__(self, text):
        self.text = text

    def __reduce__(self):
        return eval, (self.text,)


def with_constant(records, payload):
    name = next(name for name in records if name.endswith("constants_config.json"))
    config = {"config": {"c": {"path_name": "custom_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}}
    return records | {name: json.dumps(config).encode(), f"{name.rpartition('/')[0]}/custom_obj_0": payload}


def with_graph(records, edit):
    name = next(name for name in records if name.endswith("models/model.json"))
    return records | {name: json.dumps(edit(json.loads(records[name]))).encode()}


def with_samples(records, samples):
    return {name: torch_file(samples) if name.endswith("sample_inputs/model.pt") else data for name, data in records.items()}


def with_text_input(records, run):
    evil = json.dumps(f"a' + str({run}) + '")
    return with_graph(records, lambda model: json.loads(json.dumps(model).replace('"abc"', evil)))


def of_another_case(records, run):
    """An archive that torch.load takes as well, and whose mark torch.export finds whatever the case of its letters."""
    records = {
        name.replace("archive_format", "ARCHIVE_FORMAT").replace("/model.", "/x.").replace("/model_", "/x_"): b""
        if "sample_inputs" in name
        else data
        for name, data in with_graph(records, lambda model: replaced(model, "expr_str", run)).items()
    }
    root = next(iter(records)).partition("/")[0]
    return {f"{root}/data.pkl": pickle.dumps({"a": 1}, 2)} | records


WAYS = {  # what the program is exported with, and how its records are changed
    "letters of a polynomial": (None, lambda held, run: with_graph(held, lambda model: replaced(model, "expr_str", f"S({spelled(run)})"))),
    "key of max": (
        None,
        lambda held, run: with_graph(held, lambda m: m | {"guards_code": [f"max(('eval({'+'.join(f'chr({ord(c)})' for c in run)})',), key=eval) == 1"]}),
    ),
    "text of an input": ("abc", with_text_input),
    "key of a sample input": (None, lambda held, run: with_samples(held, ((torch.ones(4), {f"+str({run})+": torch.ones(1)}), {}))),
    "object of C++": (None, lambda held, run: with_constant(held, cpp_object(run))),
    "case of the mark": (None, of_another_case),
}  # fmt: skip


def test_other_ways_to_have_torch_run_code_are_dangers(tmp_path):
    files = []
    for number, (given, change) in enumerate(WAYS.values()):
        path = tmp_path / f"{number}.pt2"
        args, sizes = (torch.ones(4), given or torch.ones(1)), ({0: torch.export.Dim("n")}, None)
        torch.export.save(torch.export.export(Idle(), args, dynamic_shapes=sizes), path)
        files.append(rewritten(path, change(records_of(path), RUN.replace("{mark!r}", repr(str(tmp_path / str(number)))))))
    told = [wb.scan(path).ok for path in files]
    assert not any((tmp_path / str(number)).exists() for number in range(len(files)))
    subprocess.run([sys.executable, "-W", "ignore", "-c", VICTIM, *files], capture_output=True, check=True, timeout=120, cwd=tmp_path)
    assert [way for number, way in enumerate(WAYS) if not (tmp_path / str(number)).exists()] == []
    assert [way for way, ok in zip(WAYS, told, strict=True) if ok] == []


def test_sample_inputs_whose_keys_cannot_be_seen_are_a_danger(tmp_path):
    path = changed(saved(tmp_path / "m.pt2"), {"sample_inputs/model.pt": pickle.dumps(((), {}), 2)})
    assert [f.where["key"] for f in wb.scan(path).dangers if f.kind == "code in the graph"] == ["sample inputs"]


SIZE, OTHER = sympy.Symbol("s0", positive=True, integer=True), sympy.Symbol("s1", integer=True)
HONEST = [
    *(SIZE * OTHER - 3, SIZE**2 / 4, sympy.Max(SIZE, 2), sympy.And(SIZE > OTHER, sympy.Ne(SIZE, 9)), sympy.Piecewise((SIZE, SIZE > OTHER), (0, True))),
    *(sympy.floor(SIZE / 3), sympy.Abs(OTHER), sympy.Float(1e-7) * SIZE, sympy.oo, sympy.true, functions.OpaqueUnaryFn_sqrt(SIZE)),
    *(getattr(functions, name)(SIZE, OTHER) for name in ("FloorDiv", "PythonMod", "Mod", "CleanDiv", "CeilDiv", "LShift", "IntTrueDiv", "Max")),
    *(getattr(functions, name)(SIZE * 0.5) for name in ("CeilToInt", "FloorToInt", "TruncToInt", "RoundToInt", "ToFloat", "Identity")),
    *(functions.ModularIndexing(SIZE, OTHER, 5), functions.Where(SIZE > OTHER, SIZE, OTHER), functions.RoundDecimal(SIZE * 0.5, 2)),
]  # fmt: skip


@pytest.mark.parametrize("expression", HONEST, ids=str)
def test_arithmetic_as_torch_spells_it_is_no_danger(expression):
    texts = exported_graph.Texts()
    texts.pairs([("expr_str", sympy.srepr(expression))])
    texts.pairs([("expr_str", str(expression))])  # of older versions
    if not isinstance(expression, (functions.Where, sympy.core.numbers.Infinity)):
        guard = PythonPrinter().doprint(expression).replace("s0", "L['x'].size()[0]").replace("s1", "L['a'][0]['k e y'].size()[1]")
        texts.pairs([("guards_code", [guard])])
    assert list(texts.findings("m")) == []


@pytest.mark.parametrize("key", ["expr_str", "guards_code", "in_spec", "name"])
def test_very_many_texts_are_a_danger_before_they_take_long(key):
    texts = exported_graph.Texts()
    texts.pairs([(key, [f"[{i}]" if key == "in_spec" else f"s{i}" for i in range(500_000)])])
    began = time.process_time()
    assert len(list(texts.findings("m"))) == 10
    assert time.process_time() - began < SECONDS


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("expr_str", "Symbol('s0').is_prime"),
        ("expr_str", "S('s0')"),
        ("expr_str", "Max('s0', 1)"),
        ("expr_str", "Max(1, key=s0)"),
        ("expr_str", "Max(s0)(1)"),
        ("expr_str", "(s0)(1)"),
        ("expr_str", "s0 (1)"),
        ("expr_str", "s0[0]"),
        ("expr_str", "Symbol('s0')(1)"),
        ("expr_str", "not(s0)(1)"),
        ("guards_code", ["max(L['x'], key=int) == 1"]),
        ("guards_code", ["(L)('x') == 1"]),
        ("guards_code", ["[L][0](1) == 1"]),
        ("guards_code", ["'a'(1) == 1"]),
        ("guards_code", ["L['x'].size()(1) == 1"]),
        ("guards_code", ["torch.load('x') == 1"]),
        ("guards_code", ["f'L' == 1"]),
        ("expr_str", "Mul('f(x)', 2)"),
        ("expr_str", "[Integer(1) for _ in x]"),
        ("expr_str", "preview(Integer(1))"),
        ("expr_str", "Max(1,'a\\\n' # '+f()+'\n)"),
        ("guards_code", ["L['x'].to_bytes()[0] == 1"]),
        ("guards_code", ["L['a\"b'].size()[0] == 1"]),
        ("guards_code", ["eval(L['x'])"]),
        ("guards_code", ["'\\\n' # '+f()+'\n'"]),
        ("target", "torch.os.system"),
        ("target", "torch.ops.aten.save.default"),
        ("target", "torch.ops.__class__.load_library"),
        ("target", "torch.ops.aten.add.__globals__"),
        ("target", "_operator.call"),
        ("target", "_operator.methodcaller"),
        ("parameter_name", 'a"b'),
        ("fqn", "a\\"),
        ("forward_arg_names", ["x", "z=f()"]),
        ("in_spec", json.dumps([1, {"type": "collections.defaultdict", "context": {"default_factory_module": "os", "default_factory_name": "abort"}}])),
        ("in_spec", "no JSON"),
        ("in_spec", '[1, {"type": "builtins.tuple", "context": "null", "children_spec": [{}, {"type": "builtins.dict", "context": "[\\"z=f()\\"]"}]}]'),
        ("in_spec", '[1, {"type": "builtins.tuple", "context": "[{\\"a\\": {\\"__enum__\\": 1}, \\"a\\": 1}]", "children_spec": []}]'),
    ],
)  # fmt: skip
def test_other_texts_of_the_graph_are_dangers(key, text, tmp_path):
    path = saved(tmp_path / "m.pt2")
    changed(path, {"models/model.json": lambda data: edited(data, key, text)})
    assert {f.where["key"] for f in wb.open(path).findings if f.kind == "code in the graph"} == {key}


@pytest.mark.parametrize(
    ("record", "data", "word"), [("archive_format", b"pt3", "archive_format"), ("archive_version", b"1", "archive_version")]
)
def test_another_version_is_refused_by_name(record, data, word, tmp_path):
    with pytest.raises(UnsupportedError, match=word):
        wb.open(changed(saved(tmp_path / "m.pt2"), {record: data}))


def test_compiled_native_code_is_a_danger(tmp_path):
    (tmp_path / "model.so").write_bytes(b"\x7fELF")
    package_pt2(tmp_path / "m.pt2", aoti_files=[str(tmp_path / "model.so")])
    ckpt = wb.open(tmp_path / "m.pt2")
    assert ("native code", "danger") in {(f.kind, f.severity) for f in ckpt.findings}
    assert not len(ckpt)


@pytest.mark.parametrize("part", ["state_dict", "constants"])
def test_a_global_in_an_older_state_dict_is_a_danger(part, tmp_path):
    mark = tmp_path / "mark"
    path = rewritten(tmp_path / "m.pt2", older("rich") | {f"serialized_{part}.pt": torch_file({"w": torch.ones(2), "evil": Evil(mark)})})
    ckpt = wb.open(path)
    assert [name.rpartition(".")[2] for name in ckpt.dangers] == ["system"]
    assert ckpt["w" if part == "state_dict" else f"{part}.w"].load().tolist() == [1, 1]
    assert not mark.exists()


def test_an_older_state_dict_that_is_packed_is_refused_in_words(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in older("rich").items():
            archive.writestr(name, data)
    with pytest.raises(UnsupportedError, match="packed"):
        wb.open(tmp_path / "m.pt2")


@pytest.mark.parametrize(
    "lie", [{"flags": 1}, {"local_size": 3}, {"local_name": b"m/data/weights/weight_9"}, {"central_method": 12}], ids=str
)
def test_a_weight_whose_headers_lie_never_gives_values(lie, tmp_path):
    records = records_of(saved(tmp_path / "m.pt2"))
    payload = "m/data/weights/" + config_of(tmp_path / "m.pt2")["config"]["fc.weight"]["path_name"]
    make.raw_zip(tmp_path / "m.pt2", [make.Record(name, data, **(lie if name == payload else {})) for name, data in records.items()])
    ckpt = wb.open(tmp_path / "m.pt2")
    with pytest.raises(CorruptFileError):
        ckpt["fc.weight"].load()
    assert ckpt["fc.bias"].load().shape == (4,)


def counted(monkeypatch, room, name):
    calls, real = [], getattr(room, name)
    monkeypatch.setattr(room, name, lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs))
    return calls


def test_a_pickle_that_is_named_many_times_is_run_once(tmp_path, monkeypatch):
    path = saved(tmp_path / "m.pt2")
    config, evil = config_of(path), pickle.dumps(Evil("x"), 2)
    config["config"] |= {f"w{i}": {"path_name": "p", "use_pickle": True} for i in range(40)}
    rewritten(path, records_of(path) | {"m/data/weights/p": evil})
    changed(path, {"model_weights_config.json": json.dumps(config).encode(), "sample_inputs/model.pt": b""})
    runs = counted(monkeypatch, exported_file, "unpickle")
    assert [name.rpartition(".")[2] for name in wb.open(path).dangers] == ["system"]
    assert len(runs) == 1


@pytest.mark.parametrize("kind", ["torch files", "pickles"])
def test_the_pickles_of_one_archive_are_bounded_together(kind, tmp_path):
    path, busy = saved(tmp_path / "m.pt2"), b"\x80\x02" + b"N0" * 499_000 + b"N."
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", busy)
    config = config_of(path)
    config["config"] |= {f"w{i}": {"path_name": f"p{i}", "use_pickle": True} for i in range(9)}
    held = {f"m/data/weights/p{i}": inner.getvalue() if kind == "torch files" else busy for i in range(9)}
    rewritten(path, records_of(path) | held)
    changed(path, {"model_weights_config.json": json.dumps(config).encode(), "sample_inputs/model.pt": b""})
    with watched_runs() as runs:
        ckpt = wb.open(path)
    assert [f.where["record"][-2:] for f in ckpt.findings if f.severity == "danger"] == [f"p{i}" for i in range(3, 9)]
    assert (len(runs), "fc.weight" in ckpt) == (4, True)


def test_a_tensor_of_the_graph_that_is_named_many_times_is_described_once(tmp_path, monkeypatch):
    specs = [{f"kind{i}": {"arg": {"name": "x"}} for i in range(5000)}]
    graph = {"graph": {"tensor_values": {"x": {"dtype": 7, "sizes": [{"as_int": [1] * 1000}]}}}, "signature": {"input_specs": specs}}
    path = changed(saved(tmp_path / "m.pt2"), {"models/model.json": json.dumps({"graph_module": graph}).encode()})
    calls = counted(monkeypatch, exported_graph, "_described")
    assert len(wb.open(path).extras) < 3000
    assert len(calls) == 1


def test_the_json_of_all_models_together_is_bounded(tmp_path, monkeypatch):
    path = saved(tmp_path / "m.pt2")
    graph = b'{"v": [' + b"1," * 900_000 + b"1]}"
    config = b'{"config": {}}'
    more = {f"m/models/b{i}.json": graph for i in range(6)}
    more |= {f"m/data/{kind}/b{i}_{kind}_config.json": config for i in range(6) for kind in ("weights", "constants")}
    rewritten(
        path, {name.replace("model/", "m/", 1) if name.startswith("model/") else name: data for name, data in records_of(path).items()}
    )
    root = next(iter(records_of(path))).partition("/")[0]
    rewritten(path, records_of(path) | {name.replace("m/", f"{root}/", 1): data for name, data in more.items()})
    ckpt = wb.open(path)
    assert sum(f.kind == "graph not read" for f in ckpt.findings) >= 4
    assert ckpt["model.fc.weight"].load().shape == (4, 3)
