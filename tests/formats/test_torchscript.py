"""TorchScript archives, against torch.jit.load of files that this test wrote itself."""

import base64
import enum
import pickletools
import struct
import subprocess
import sys
import time
import zipfile
from typing import NamedTuple

import hostile_makers as make
import pytest
import torch
from conformance import SECONDS, FormatTests, state
from strategies import bits, same

import workbench as wb
from workbench.errors import CorruptFileError, UnsupportedError
from workbench.formats.torchscript_file import code_listing

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")]


class Plain(torch.nn.Module):
    """The tensors of `conformance.state`, as parameters and buffers."""

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

    def forward(self, x):
        return x


class TestTorchScript(FormatTests):
    magic = 4

    def build(self, folder):
        torch.jit.trace(Plain(), torch.ones(1), _store_inputs=False).save(str(folder / "model.pt"))
        return folder / "model.pt", [folder / "model.pt"]

    def official(self, path):
        return dict(torch.jit.load(path).state_dict())


class TestViewsInTorchScript(TestTorchScript):
    """Views of one storage, as attributes that are neither parameters nor buffers, and constants of the code."""

    def build(self, folder):
        torch.jit.script(Views()).save(str(folder / "model.pt"))
        return folder / "model.pt", [folder / "model.pt"]

    def official(self, path):
        loaded = torch.jit.load(path)
        names = ("transposed", "stepped", "expanded", "tail")
        return dict(loaded.state_dict()) | {f"attributes.{name}": getattr(loaded, name) for name in names}

    test_a_file_cut_at_any_byte_is_refused_or_whole = None  # a matter of the container, which the class above goes through
    test_a_flipped_byte_never_gives_a_foreign_exception_or_a_hang = None


class Views(torch.nn.Module):
    def __init__(self):
        super().__init__()
        base = torch.arange(12.0).view(3, 4)
        self.register_buffer("base", base)
        self.transposed, self.stepped, self.expanded, self.tail = base.t(), base[:, ::2], base[:1].expand(2, 4), base[2]

    def forward(self, x):
        return x + self.transposed.sum() + self.stepped.sum() + self.expanded.sum() + self.tail.sum()


class Sub(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(2, 3))
        self.register_buffer("r", torch.arange(3))
        self.register_buffer("fleeting", torch.zeros(2), persistent=False)

    def forward(self, x):
        return x @ self.w.t() + self.fleeting


class Point(NamedTuple):
    at: torch.Tensor
    n: int


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Rich(torch.nn.Module):
    """Ties, lists and dicts of modules, and every kind of attribute that TorchScript stores."""

    optional: torch.Tensor | None
    empty: list[torch.Tensor]
    point: Point

    def __init__(self):
        super().__init__()
        self.sub = Sub()
        self.tied = self.sub
        self.stack = torch.nn.ModuleList([Sub(), torch.nn.Linear(3, 2)])
        self.stack[1].weight = self.sub.w
        self.named = torch.nn.ModuleDict({"a-b": torch.nn.Linear(2, 2, bias=False)})
        self.norm = torch.nn.BatchNorm1d(2)
        self.tensors, self.table, self.pair = [torch.ones(1)], {"k": torch.full((2,), 5.0)}, (3, torch.full((3,), 4.0))
        self.optional, self.empty, self.point = None, [], Point(torch.full((2,), 6.0), 7)
        self.words, self.ints, self.floats, self.flags, self.ages = ["a", "b"], [1, 2], [1.5], [True, False], {1: [2, 3]}
        self.color, self.z, self.device, self.plain = Color.BLUE, 1 + 2j, torch.device("cpu"), torch.full((4,), 9.0)

    def forward(self, x):
        y = self.sub(x)
        for m in self.stack:
            y = y + m(x)
        y = y + self.tensors[0] + self.table["k"] + self.pair[1].sum() + self.plain.sum() + self.ints[0] + self.floats[0] + self.point.at
        y = y + self.ages[1][0] + len(self.words) + len(self.flags) + len(self.empty)
        if self.optional is not None or self.color == Color.RED:
            y = y + 1
        return self.norm(y) + torch.tensor([10.0, 20.0]) + self.named["a-b"](y)


def scripted(path, module=None):
    torch.jit.script(Rich().eval() if module is None else module).save(str(path))
    return path


def traced(path):
    torch.jit.trace(Rich().eval(), torch.ones(1, 3)).save(str(path))
    return path


def mobile(path):
    torch.jit.trace(Rich().eval(), torch.ones(1, 3))._save_for_lite_interpreter(str(path))
    return path


def frozen(path):
    torch.jit.freeze(torch.jit.script(Rich().eval())).save(str(path))
    return path


def quantized(path):
    ao = torch.ao.quantization
    model = torch.nn.Sequential(ao.QuantStub(), torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), ao.DeQuantStub()).eval()
    model.qconfig = ao.get_default_qconfig("fbgemm")
    prepared = ao.prepare(model)
    prepared(torch.ones(1, 1, 5, 5))
    return scripted(path, ao.convert(prepared))


KINDS = {"scripted": scripted, "traced": traced, "mobile": mobile, "frozen": frozen, "quantized": quantized}


@pytest.mark.parametrize("kind", KINDS)
def test_names_order_and_values_are_those_of_the_loaded_module(kind, tmp_path):
    path = KINDS[kind](tmp_path / "m.pt")
    loaded, ckpt = torch.jit.load(path), wb.open(path)
    expected, parameters = loaded.state_dict(), dict(loaded.named_parameters(remove_duplicate=False))
    assert ckpt.format == "torchscript"
    assert [name for name in ckpt if not name.startswith(("attributes.", "CONSTANTS."))] == list(expected)
    for name, tensor in expected.items():
        found = ckpt[name]
        assert same(found.load(), tensor)
        assert found.requires_grad == (name in parameters)
    if expected:
        assert list(ckpt.weights) == list(expected)
    assert not [f for f in ckpt.findings if f.severity == "danger"]
    assert [f.kind for f in ckpt.findings if f.severity == "warning"] == (["code runs at load"] if kind == "quantized" else [])


def test_parameters_require_grad_and_ties_are_kept(tmp_path):
    ckpt = wb.open(scripted(tmp_path / "m.pt")).weights
    assert ckpt["sub.w"].requires_grad
    assert not ckpt["sub.r"].requires_grad
    assert ckpt.aliases == {"stack.1.weight": "sub.w", "tied.w": "sub.w", "tied.r": "sub.r", "tied.fleeting": "sub.fleeting"}


def test_attributes_stand_apart_from_the_state_dict(tmp_path):
    ckpt = wb.open(scripted(tmp_path / "m.pt"))
    values = {name.removeprefix("attributes."): t.load().tolist() for name, t in ckpt.items() if name.startswith("attributes.")}
    assert values == {"tensors.0": [1], "table.k": [5, 5], "pair.1": [4] * 3, "point.0": [6, 6], "plain": [9] * 4}
    told = {name.removeprefix("attributes."): value for name, value in ckpt.extras.items() if name.startswith("attributes.")}
    assert (
        told | {"optional": None, "pair.0": 3, "point.1": 7, "words.0": "a", "ints.1": 2, "floats.0": 1.5, "flags.0": True, "ages.1.1": 3}
        == told
    )


def test_constants_have_the_names_that_the_code_calls_them_by(tmp_path):
    path = traced(tmp_path / "m.pt")
    ckpt = wb.open(path)
    constants = {name: t.load() for name, t in ckpt.items() if name.startswith("CONSTANTS.")}
    official = torch.jit.load(path).code_with_constants[1].const_mapping
    assert constants.keys() == {f"CONSTANTS.{name}" for name in official}
    assert all(same(constants[f"CONSTANTS.{name}"], tensor) for name, tensor in official.items())


def test_the_weights_of_a_frozen_module_are_its_constants(tmp_path):
    ckpt = wb.open(frozen(tmp_path / "m.pt"))
    assert ckpt.weights_section.name == "CONSTANTS"
    assert any(tensor.load().tolist() == [10, 20] for tensor in ckpt.weights.values())


@pytest.mark.parametrize("extension", ["pt", "safetensors"])
def test_weights_are_rescued_from_the_program(extension, tmp_path):
    path = scripted(tmp_path / "m.pt")
    wb.save(wb.open(path).weights, tmp_path / f"w.{extension}")
    saved = wb.open(tmp_path / f"w.{extension}")
    expected = torch.jit.load(path).state_dict()
    assert set(saved) == set(expected)
    assert all(same(saved[name].load(), tensor) for name, tensor in expected.items())
    if extension == "pt":
        assert torch.load(tmp_path / "w.pt", weights_only=True).keys() == expected.keys()


DTYPES = [
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
    "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool", "complex128", "complex64", "complex32",
]  # fmt: skip


@pytest.mark.parametrize("name", DTYPES)
def test_each_dtype_keeps_its_bits(name, tmp_path):
    dtype = getattr(torch, name)
    width = torch.empty(0, dtype=dtype).element_size()
    data = torch.arange(6 * width, dtype=torch.uint8).view(dtype) if name != "bool" else torch.tensor([True, False])
    lazy = wb.open(held(tmp_path / "m.pt", data))
    assert same(lazy["b"].load(), data)
    assert not [f for f in lazy.findings if f.severity == "danger"]


class Held(torch.nn.Module):
    def __init__(self, data):
        super().__init__()
        self.register_buffer("b", data)

    def forward(self, x):
        return x


def held(path, data):
    torch.jit.trace(Held(data), torch.ones(1), _store_inputs=False).save(str(path))
    return path


SPECIAL = {
    "coo": lambda: torch.tensor([[0.0, 2], [3, 0]]).to_sparse(),
    "csr": lambda: torch.tensor([[0.0, 2], [3, 0]]).to_sparse_csr(),
    "conjugate": lambda: torch.tensor([1 + 2j]).conj(),
    "negative": lambda: torch.tensor([1 + 2j]).conj().imag,
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_sparse_and_conjugate_buffers_load_as_torch_loads_them(kind, tmp_path):
    path = held(tmp_path / "m.pt", SPECIAL[kind]())
    found, expected = wb.open(path)["b"].load(), torch.jit.load(path).state_dict()["b"]
    assert found.layout == expected.layout
    assert bits(found.to_dense().resolve_conj().resolve_neg()) == bits(expected.to_dense().resolve_conj().resolve_neg())


@pytest.mark.parametrize("scheme", ["tensor", "channel"])
def test_quantized_buffers_load_as_torch_loads_them(scheme, tmp_path):
    x = torch.randn(3, 4)
    by_tensor = torch.quantize_per_tensor(x, 0.1, 2, torch.qint8)
    by_channel = torch.quantize_per_channel(x, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2]), 0, torch.quint8)
    path = held(tmp_path / "m.pt", by_tensor if scheme == "tensor" else by_channel)
    found, expected = wb.open(path)["b"].load(), torch.jit.load(path).state_dict()["b"]
    assert torch.equal(found.dequantize(), expected.dequantize())


def test_packed_parameters_are_listed_as_attributes(tmp_path):
    linear = torch.nn.Linear(4, 3)
    path = scripted(tmp_path / "m.pt", torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(linear).eval()))
    ckpt = wb.open(path)
    weight, bias = (ckpt[f"attributes.0._packed_params._packed_params.{i}"] for i in (0, 1))
    assert torch.allclose(weight.load().dequantize(), linear.weight, atol=0.01)
    assert same(bias.load(), linear.bias)
    assert not [f for f in ckpt.findings if f.severity != "info"]


def test_code_and_extra_files_are_listed_and_read_on_request(tmp_path):
    path = tmp_path / "m.pt"
    torch.jit.script(Sub()).save(str(path), _extra_files={"config.json": b"{}"})
    ckpt, code = wb.open(path), code_listing(wb.open(path))
    with zipfile.ZipFile(path) as archive:
        records = {name.partition("/code/")[2]: archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")}
    assert code == records
    record, text = own_code(path)
    assert "__parameters__" in text
    assert ckpt.extras[f"program.{record.replace('/', '.', 1)}"] == len(text)
    assert ckpt.extras["program.extra.config.json"] == 2
    assert ckpt.extras["program.class"].endswith("Sub")
    with pytest.raises(UnsupportedError, match="more code"):
        code_listing(ckpt, max_nbytes=10)
    with pytest.raises(UnsupportedError, match="does not come from a file"):
        code_listing(wb.open({"a": torch.ones(1)}))


def test_every_file_is_called_a_program(tmp_path):
    (told,) = (f for f in wb.open(scripted(tmp_path / "m.pt", Sub())).findings if f.kind == "program")
    assert told.severity == "info"
    assert "not run" in told.message
    assert "trust" in told.hint


def test_listing_needs_no_torch(tmp_path):
    path = scripted(tmp_path / "m.pt")
    code = "import sys, workbench as wb; c = wb.open(sys.argv[1]); str(c), c.weights['sub.w'].peek(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


# hostile files, from what the format is and from what torch.jit.load was seen to do


class Restores(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(2))

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return (self.w, self.training)

    @torch.jit.export
    def __setstate__(self, given: tuple[torch.Tensor, bool]):
        self.w = given[0]
        self.training = given[1]

    def forward(self, x):
        return x + self.w


class Top(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.fc = Restores(), torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.fc(self.inner(x))


def changed(path, records):
    """The archive with records replaced; None drops one, new ones are added. Code is stored plain and loses its debug records."""
    new = dict(records)
    with zipfile.ZipFile(path) as old:
        kept = {name: old.read(name) for name in old.namelist() if not name.endswith("debug_pkl")}
    root = next(iter(kept)).partition("/")[0]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in kept.items():
            if (data := new.pop(name.partition("/")[2], data)) is not None:
                archive.writestr(name, data)
        for name, data in new.items():
            archive.writestr(f"{root}/{name}", data)
    return path


def own_code(path):
    """The record with this file's classes, and its text."""
    return next((f"code/{name}", text) for name, text in code_listing(wb.open(path)).items() if name.endswith("test_torchscript.py"))


def test_code_that_runs_at_load_is_told_and_not_run(tmp_path):
    ckpt = wb.open(scripted(tmp_path / "m.pt", Top()))
    (told,) = (f for f in ckpt.findings if f.kind == "code runs at load")
    assert told.severity == "warning"
    assert "Restores" in told.message
    assert list(ckpt.weights) == ["fc.weight", "fc.bias"]
    assert ckpt["attributes.inner.0"].load().tolist() == [1, 1]


REACHING = [
    'self.w = torch.from_file("MARK", True, 2)',
    'self.w = ops.aten.from_file("MARK", True, 2)',
    't = torch\n    self.w = t.from_file("MARK", True, 2)',
    't = torch.from_file\n    self.w = t("MARK", True, 2)',
    'self.w = getattr(torch, "from_file")("MARK", True, 2)',
    'self.w = getattr(torch, "from\\137file")("MARK", True, 2)',
    'self.w = getattr(ops.aten, "from\\137file")("MARK", True, 2)',
    'torch.save(self.w, "MARK")',
    'ops.aten.save(self.w, "MARK")',
    'torch . save(self.w, "MARK")',
    'torch.autograd.save(self.w, "MARK")',
    '(ops.aten.autograd.autograd).save(self.w, "MARK")',
    'torch.\\\nsave(self.w, "MARK")',
    "s = \"'\"\n    torch.save(self.w, 'MARK')",
    's = 0  # don\'t\n    torch.save(self.w, "MARK")',
    'a = """\\""" """\n    torch.save(self.w, "MARK")\n    b = """ """',
    "a = '''\\''' '''\n    torch.save(self.w, 'MARK')\n    b = ''' '''",
    'a = """\n"" \\""" """\n    torch.save(self.w, "MARK")\n    b = """\n"""',
]


@pytest.mark.parametrize("line", REACHING)
def test_code_that_reaches_files_is_a_danger_however_it_is_spelled(line, tmp_path):
    path, mark = scripted(tmp_path / "m.pt", Top()), tmp_path / "mark"
    record, code = own_code(path)
    at = code.index("    self.training = ")
    evil = code[:at] + f"    {line.replace('MARK', str(mark))}\n" + code[at:]
    changed(path, {record: evil})
    ckpt = wb.open(path)
    assert ckpt.dangers
    assert ckpt["fc.weight"].load().shape == (2, 2)
    assert not mark.exists()
    torch.jit.load(path)  # the official loader is taken in: the danger is real
    assert mark.exists()


@pytest.mark.parametrize("line", ["a = 0  # torch.save(self.w)", "a = 'torch.save(self.w)'", 'a = """\n    torch.save(self.w)\n"""'])
def test_what_only_another_reading_takes_for_code_is_in_doubt(line, tmp_path):
    """torch writes no comments, and each text on one line between double quotes."""
    path = scripted(tmp_path / "m.pt", Top())
    record, code = own_code(path)
    at = code.index("    self.training = ")
    changed(path, {record: f"{code[:at]}    {line}\n{code[at:]}"})
    torch.jit.load(path)
    assert [f.kind for f in wb.open(path).findings if f.severity == "danger"] == ["code in doubt"]


def test_a_class_of_torch_that_unpickles_its_own_state_is_a_danger(tmp_path):
    """Against torch: loading the file touches a mark, by a text in it that is a pickle."""
    path, mark = scripted(tmp_path / "m.pt", Sub()), tmp_path / "mark"
    state = base64.b64encode(b"cos\nsystem\n(Vtouch " + str(mark).encode() + b"\ntR.")
    text = b"X" + struct.pack("<I", len(state)) + state
    thing = b"c__torch__.torch.classes.aten\nOpaqueObject\n)\x81" + text + b"b"
    changed(path, {"constants.pkl": b"\x80\2(" + thing + b"t."})
    assert any("OpaqueObject" in found.message for found in wb.scan(path).dangers)
    assert not mark.exists()
    run = "import sys, torch; torch.jit.load(sys.argv[1])"
    subprocess.run([sys.executable, "-W", "ignore", "-c", run, str(path)], capture_output=True, check=False, timeout=120)
    assert mark.exists()


def test_classes_of_torch_that_hold_numbers_are_no_danger(tmp_path):
    quantized = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.Linear(4, 3)).eval())
    path = scripted(tmp_path / "m.pt", quantized)
    assert "torch.classes.quantized" in "".join(code_listing(wb.open(path)).values())
    assert wb.scan(path).ok


class Saves(torch.nn.Module):
    def forward(self, x):
        torch.save(x, "MARK")
        return x + 1


@pytest.mark.parametrize("record", ["bytecode.pkl", "ByteCode.pkl"])
def test_bytecode_that_reaches_files_beside_clean_code_is_a_danger(record, tmp_path):
    path = tmp_path / "m.ptl"
    torch.jit.script(Saves())._save_for_lite_interpreter(str(path))
    with zipfile.ZipFile(path) as archive:
        bytecode = archive.read(next(name for name in archive.namelist() if name.endswith("bytecode.pkl")))
    name, code = own_code(path)
    mark = str(tmp_path / "mark")
    bytecode = bytecode.replace(b"\4\0\0\0MARK", len(mark).to_bytes(4, "little") + mark.encode())
    changed(path, {name: "\n".join(line for line in code.split("\n") if "save" not in line), "bytecode.pkl": None, record: bytecode})
    found = {f.kind: f.severity for f in wb.open(path).findings}
    assert found == {"operator": "danger", "two programs": "warning", "program": "info"}
    run = "import sys, torch; from torch.jit.mobile import _load_for_lite_interpreter as load; load(sys.argv[1])(torch.ones(2))"
    subprocess.run([sys.executable, "-W", "ignore", "-c", run, str(path)], capture_output=True, check=False, timeout=120)
    assert (tmp_path / "mark").exists()  # the danger is real


def test_code_in_a_record_that_torch_finds_by_other_letters_is_in_doubt(tmp_path):
    path = scripted(tmp_path / "m.pt", Sub())
    record, code = own_code(path)
    changed(path, {record: None, record[:-3] + ".PY": code})
    torch.jit.load(path)
    assert ("code in doubt", "danger") in {(f.kind, f.severity) for f in wb.open(path).findings}


def test_the_names_of_classes_are_bounded_together(tmp_path):
    path = archive(tmp_path / "m.pt", module_pickle(make.text("w") + make.tensor("0")))
    with zipfile.ZipFile(path, "a") as out:
        out.writestr(f"m/code/{'x' * 60_000}.py", "".join(f"\nclass a{i}(Module):\n" for i in range(200)))
    assert ("code in doubt", "danger") in {(f.kind, f.severity) for f in wb.open(path).findings}


class Lookalike(torch.nn.Module):
    """Names and texts that look like what is dangerous and are not."""

    def __init__(self):
        super().__init__()
        self.ops, self.save, self.from_file = torch.nn.ModuleList([torch.nn.Linear(2, 2)]), torch.nn.Linear(2, 2), 3

    def load_tensor(self, x):
        return x

    def forward(self, ops, rpc_sync: int = 1):
        assert ops.shape[0] > 0, "torch.save # ops.aten.save"
        y = self.save(ops) + self.from_file
        for layer in self.ops:
            y = layer(y)
        return self.load_tensor(y)


def test_names_that_only_look_like_operators_are_no_danger(tmp_path):
    path = scripted(tmp_path / "m.pt", Lookalike())
    assert not [f for f in wb.open(path).findings if f.severity != "info"]
    assert list(wb.open(path).weights) == list(torch.jit.load(path).state_dict())


@pytest.mark.parametrize("record", ["data.pkl", "constants.pkl", "bytecode.pkl", "traced_inputs.pkl", "mobile_debug_handles.pkl"])
def test_a_global_that_is_no_part_of_torchscript_is_a_danger_in_each_pickle(record, tmp_path):
    path = scripted(tmp_path / "m.pt", Sub())
    with zipfile.ZipFile(path) as archive:
        real = archive.read(next(n for n in archive.namelist() if n.endswith("/data.pkl")))
    evil = make.PROTO + b"cos\nsystem\n" + make.text("touch x") + b"\x85R0"
    changed(path, {record: evil + {"data.pkl": real[2:], "constants.pkl": b")."}.get(record, b"N.")})
    ckpt = wb.open(path)
    assert ckpt.dangers == ("os.system",)
    assert ckpt["w"].load().tolist() == torch.ones(2, 3).tolist()


def test_a_pickle_that_cannot_be_read_is_a_danger(tmp_path):
    path = changed(scripted(tmp_path / "m.pt", Sub()), {"bytecode.pkl": make.PROTO + b"cos\nsystem\n\xff"})
    assert {f.kind for f in wb.open(path).findings if f.severity == "danger"} == {"unreadable pickle", "forbidden global"}


BROKEN = {
    "the root is no object": {"data.pkl": make.PROTO + b"N."},
    "the constants are no tuple": {"constants.pkl": make.PROTO + b"]."},
    "a pickle ends early": {"data.pkl": make.PROTO + b"c__torch__\nM\n)\x81}("},
    "a code record is no deflate stream": None,
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_archive_is_refused_with_its_record(what, tmp_path):
    path = scripted(tmp_path / "m.pt", Sub())
    if BROKEN[what] is not None:
        changed(path, BROKEN[what])
    else:
        with zipfile.ZipFile(path) as archive:
            info = next(i for i in archive.infolist() if i.filename.endswith("test_torchscript.py"))
        data = bytearray(path.read_bytes())
        at = info.header_offset + 30 + int.from_bytes(data[info.header_offset + 26 : info.header_offset + 28], "little")
        at += int.from_bytes(data[info.header_offset + 28 : info.header_offset + 30], "little")
        data[at : at + 4] = b"\xff\xff\xff\xff"
        path.write_bytes(data)
    with pytest.raises(CorruptFileError) as caught:
        wb.open(path)
    assert caught.value.where["record"].endswith((".pkl", ".py"))


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("(" * 2_500_000, "names unknown"),  # torch.jit.load dies of this
        ('s = """\nclass Sub(Module):\n  __parameters__ = ["r", ]\n"""\n', "code in doubt"),
        ("x" * (9 << 20), "code in doubt"),
        ('"' + '\\"' * 1_000_000, "names unknown"),
        ("class Sub(Module)" + " " * 1_000_000, "names unknown"),
        ("class Sub:\n  __parameters__ = [" + '"w", ' * 100_000, "names unknown"),
        ("", "names unknown"),
        (None, "names unknown"),
        (b"\xff\xfe class", "names unknown"),
    ],
    ids=["parentheses", "quoted class", "too much", "quotes", "spaces", "open list", "empty", "missing", "no UTF-8"],
)
def test_odd_code_costs_the_names_and_nothing_else(code, told, tmp_path):
    path = scripted(tmp_path / "m.pt", Sub())
    changed(path, {own_code(path)[0]: code})
    start = time.process_time()
    ckpt = wb.open(path)
    assert time.process_time() - start < SECONDS
    assert told in {f.kind for f in ckpt.findings}
    assert ckpt["attributes.self.w"].load().tolist() == torch.ones(2, 3).tolist()


def test_packed_code_that_grows_too_far_is_not_read(tmp_path):
    path = scripted(tmp_path / "m.pt", Sub())
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist() if not name.endswith("debug_pkl")}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in records.items():
            new.writestr(name, b" " * (7 << 20) if name.endswith("test_torchscript.py") else data)
    assert "code in doubt" in {f.kind for f in wb.open(path).findings}


def module_pickle(body):
    """A pickle of `class M(Module)`; `body` is spelled between the mark of its state and BUILD."""
    return make.PROTO + b"c__torch__\nM\nq\x00)\x81}(" + body + b"ub."


def archive(path, pickle, code='class M(Module):\n  __parameters__ = ["w", ]\n  __buffers__ = []\n'):
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("m/data.pkl", pickle)
        out.writestr("m/constants.pkl", make.PROTO + b").")
        out.writestr("m/code/__torch__.py", code)
        out.writestr("m/version", "3\n")
        for key, data in make.REAL_DATA.items():
            out.writestr(f"m/data/{key}", data)
    return path


def test_an_archive_by_hand_opens(tmp_path):
    ckpt = wb.open(archive(tmp_path / "m.pt", module_pickle(make.text("w") + make.tensor("0") + make.text("x") + make.tensor("1"))))
    assert {name: tensor.load().tolist() for name, tensor in ckpt.items()} == {"w": [1, 2, 3], "attributes.x": [4, 5, 6]}


TWO_CLASSES = """class M(Module):
  __parameters__ = ["w", ]
  __buffers__ = ["b", ]
  inner : __torch__.N
  b : Tensor
  w : Tensor
class N(Module):
  __parameters__ = []
  __buffers__ = ["b", ]
  b : Tensor
"""


def test_parameters_come_before_buffers_and_those_before_modules(tmp_path):
    """As state_dict() has them, in whatever order a writer (one in C++, say) registered them."""
    inner = make.text("inner") + b"c__torch__\nN\n)\x81}(" + make.text("b") + make.tensor("1") + b"ub"
    pickle = module_pickle(inner + make.text("b") + make.tensor("1") + make.text("w") + make.tensor("0"))
    path = archive(tmp_path / "m.pt", pickle.replace(b"\x8a\x01", b"K"), TWO_CLASSES)  # torch reads no short LONG1
    expected = torch.jit.load(path).state_dict()
    assert list(expected) == ["w", "b", "inner.b"]
    assert [(name, t.load().tolist()) for name, t in wb.open(path).weights.items()] == [(name, t.tolist()) for name, t in expected.items()]


@pytest.mark.parametrize("levels", [3, 60])
def test_modules_that_share_modules_are_listed_as_far_as_they_go(levels, tmp_path):
    """Each level holds the one below four times: 4 ** levels names in a few bytes."""
    pickle = make.PROTO + b"c__torch__\nM\nq\x00)\x81}(" + make.text("w") + make.tensor("0") + b"ubq\x01"
    for _ in range(levels):
        pickle += b"0h\x00)\x81}(" + b"".join(make.text(f"m{i}") + b"h\x01" for i in range(4)) + b"ubq\x01"
    start = time.process_time()
    ckpt = wb.open(archive(tmp_path / "m.pt", pickle + b"."))
    assert time.process_time() - start < 4 * SECONDS
    assert (len(ckpt) == 4**levels) == (levels == 3)
    assert ("tree cut" in {f.kind for f in ckpt.findings}) == (levels != 3)


def test_a_module_that_holds_itself_ends(tmp_path):
    pickle = make.PROTO + b"c__torch__\nM\n)\x81q\x00}(" + make.text("w") + make.tensor("0") + make.text("me") + b"h\x00ub."
    assert list(wb.open(archive(tmp_path / "m.pt", pickle))) == ["w"]


def test_modules_nested_without_end_are_cut(tmp_path):
    depth = 20_000
    head = b"c__torch__\nM\nq\x00)\x81}(" + make.text("m") + b"q\x01"
    pickle = make.PROTO + head + b"h\x00)\x81}(h\x01" * depth + b"N" + b"ub" * (depth + 1) + b"."
    start = time.process_time()
    wb.open(archive(tmp_path / "m.pt", pickle))
    assert time.process_time() - start < SECONDS


def test_the_makers_write_pickles(tmp_path):
    assert "BUILD" in {op.name for op, _, _ in pickletools.genops(module_pickle(make.text("w") + make.tensor("0")))}
