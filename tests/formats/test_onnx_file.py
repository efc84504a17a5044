"""ONNX against the onnx library; and files that no library would write, put together by hand from protobuf's encoding."""

import hashlib
import os
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import onnx
import pytest
import torch
from conformance import FormatTests, state
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from strategies import bits, same

import workbench as wb
from workbench.errors import CorruptFileError, FormatError, UnknownFormatError, UnsupportedError
from workbench.formats import onnx_file
from workbench.formats.packed import Packed

WIDENED = {"INT4": np.int8, "INT2": np.int8, "UINT4": np.uint8, "UINT2": np.uint8, "FLOAT4E2M1": np.float32, "FLOAT6E2M3": np.float32, "FLOAT6E3M2": np.float32}  # fmt: skip


def to_torch(array):
    """An array of any of onnx's types as the tensor it should load as."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    name = array.dtype.name
    if widened := {"int4": np.int8, "int2": np.int8, "uint4": np.uint8, "uint2": np.uint8}.get(name):
        return torch.from_numpy(array.astype(widened))
    if name.startswith(("float4_", "float6_")):
        return torch.from_numpy(array.astype(np.float32))
    if name.startswith(("bfloat16", "float8")):
        carrier = np.int16 if name == "bfloat16" else np.uint8
        return torch.from_numpy(array.view(carrier).copy()).view(getattr(torch, name))
    return torch.from_numpy(array.copy())


def from_torch(name, tensor):
    """The initializer that holds a tensor as raw data."""
    code = {torch.float32: 1, torch.bfloat16: 16, torch.int64: 7, torch.bool: 9}[tensor.dtype]
    return helper.make_tensor(name, code, tuple(tensor.shape), bits(tensor), raw=True)


def model_of(initializers=(), nodes=(), **options):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("x", "y")]
    graph = helper.make_graph([*nodes, helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:], list(initializers), **options)
    return helper.make_model(graph, producer_name="tests", opset_imports=[helper.make_opsetid("", 21)])


def by_onnx(path):
    return {t.name: to_torch(numpy_helper.to_array(t)) for t in onnx.load(str(path)).graph.initializer}


def saved(folder, model, name="model.onnx"):
    (folder / name).write_bytes(model.SerializeToString())
    return folder / name


class TestOnnx(FormatTests):
    magic = 12  # 08 0a: ir_version; 12 05 "tests": producer; 3a and two bytes of length: the graph

    def build(self, folder):
        path = saved(folder, model_of([from_torch(name, tensor) for name, tensor in state().items()]))
        return path, [path]

    def official(self, path):
        return by_onnx(path)


class TestOnnxTyped(TestOnnx):
    """Values in fields of numbers: packed floats where they lie, varints decoded."""

    def build(self, folder):
        generator = np.random.default_rng(1)
        kinds = ("FLOAT", "INT8", "BOOL", "FLOAT16", "BFLOAT16", "INT64", "UINT32", "COMPLEX64", "DOUBLE", "INT4", "FLOAT8E5M2")
        tensors = []
        for kind in kinds:
            code = TensorProto.DataType.Value(kind)
            values = generator.integers(0 if kind in ("BOOL", "UINT32") else -2, 2, 5).astype(helper.tensor_dtype_to_np_dtype(code))
            tensors.append(helper.make_tensor(f"typed.{kind}", code, (5, 1), values))
        path = saved(folder, model_of(tensors))
        return path, [path]

    def test_offset_is_where_the_bytes_lie(self, built):
        """Only what is stored as it is read has a place in the file."""
        found = wb.open(built[0])
        official = self.official(built[0])
        data = built[0].read_bytes()
        plain = {name for name, tensor in found.items() if tensor.offset is not None}
        assert plain == {"typed.FLOAT", "typed.COMPLEX64", "typed.DOUBLE"}
        for name in plain:
            assert data[found[name].offset :][: found[name].nbytes] == bits(official[name])


class TestOnnxExternal(TestOnnx):
    """All weights in one file beside the graph."""

    def build(self, folder):
        model = model_of([from_torch(name, tensor) for name, tensor in state().items()])
        path = folder / "model.onnx"
        onnx.save_model(model, str(path), save_as_external_data=True, location="model.onnx.data", size_threshold=0)
        return path, [folder / "model.onnx.data", path]

    def test_a_missing_data_file_locks_its_tensors_and_lists_them(self, built):
        expected = [(name, tensor.shape) for name, tensor in wb.open(built[0]).items()]
        os.remove(built[1][0])
        ckpt = wb.open(built[0])
        assert [(name, tensor.shape) for name, tensor in ckpt.items()] == expected
        assert all(tensor.locked and "model.onnx.data" in tensor.locked for tensor in ckpt.values())
        assert [(f.severity, f.kind) for f in ckpt.findings] == [("warning", "external data")]
        assert not ckpt.aliases
        with pytest.raises(CorruptFileError, match="locked"):
            ckpt["layer.weight"].load()


ALL_TYPES = [name for name in TensorProto.DataType.keys() if name not in ("UNDEFINED", "STRING")]  # noqa: SIM118 (an enum, no dict)


@pytest.mark.parametrize("kind", ALL_TYPES)
@pytest.mark.parametrize("shape", [(3, 5), (0, 2), (), (7,)], ids=str)
def test_each_element_type_has_the_values_onnx_gives_it(kind, shape, tmp_path):
    code = TensorProto.DataType.Value(kind)
    numpy_type = helper.tensor_dtype_to_np_dtype(code)
    generator = np.random.default_rng(2)
    low, high = (0, 2) if kind in ("BOOL", "UINT2") else (0, 7) if "UINT" in kind else (-2, 2)
    array = generator.integers(low, high, shape).astype(numpy_type)
    tensors = [numpy_helper.from_array(array, "raw")]
    if not kind.startswith("FLOAT6"):  # the helper packs these otherwise than to_array reads them
        tensors.append(helper.make_tensor("typed", code, shape, array.reshape(-1)))
    path = saved(tmp_path, model_of(tensors))
    for name, expected in by_onnx(path).items():
        found = wb.open(path)[name]
        assert same(found.load(), expected), name
        assert repr(found.peek(3)) == repr(expected.reshape(-1)[:3].tolist())
        assert isinstance(found.source.storage, Packed) == (kind in WIDENED or (name == "typed" and found.offset is None))


@pytest.mark.parametrize("kind", ["UINT4", "INT4", "UINT2", "INT2", "FLOAT4E2M1", "FLOAT6E2M3", "FLOAT6E3M2"])
def test_every_pattern_of_a_type_below_a_byte(kind, tmp_path):
    code = TensorProto.DataType.Value(kind)
    raw = bytes(range(256)) * 3
    width = {"4": 4, "2": 2, "F": 6}[kind[-1] if "INT" in kind else kind[5] if kind[5] == "4" else "F"]
    path = saved(tmp_path, model_of([helper.make_tensor("w", code, (len(raw) * 8 // width,), raw, raw=True)]))
    assert same(wb.open(path)["w"].load(), by_onnx(path)["w"])


@given(values=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40), packed=st.booleans())
def test_varints_packed_or_not_are_the_numbers_that_onnx_reads(values, packed, tmp_path):
    numbers = [value % 2**64 for value in values]
    data = field(7, b"".join(map(varint, numbers))) if packed else b"".join(key(7, 0) + varint(n) for n in numbers)
    path = write(tmp_path, initializer(number(1, len(values)) + number(2, 7) + field(8, b"w") + data))
    expected = torch.tensor(values, dtype=torch.int64)
    assert same(wb.open(path)["w"].load(), expected)
    assert same(by_onnx(path)["w"], expected)


@given(values=st.lists(st.floats(width=32), min_size=1, max_size=9), cuts=st.sets(st.integers(1, 8)))
def test_floats_in_any_number_of_runs(values, cuts, tmp_path):
    """Packed runs of one repeated field are joined, single ones among them."""
    raw = np.array(values, "<f4").tobytes()
    edges = sorted({0, len(values), *(c for c in cuts if c < len(values))})
    runs = [raw[4 * a : 4 * b] for a, b in pairwise(edges)]
    data = b"".join(
        field(4, run) if i % 2 else b"".join(key(4, 5) + run[at : at + 4] for at in range(0, len(run), 4)) for i, run in enumerate(runs)
    )
    path = write(tmp_path, initializer(number(1, len(values)) + number(2, 1) + field(8, b"w") + data))
    assert same(wb.open(path)["w"].load(), by_onnx(path)["w"])


def test_too_few_numbers_in_as_many_bytes_are_refused_when_they_are_read(tmp_path):
    path = write(tmp_path, initializer(number(1, 2) + number(2, 7) + field(8, b"w") + field(7, b"\xff" * 9 + b"\x01")))
    with pytest.raises(CorruptFileError, match="8 bytes of values; 16 are declared"):
        wb.open(path)["w"].load()


SHAPES = [(), (0,), (66,), (2, 1), (1, 2), (200,)]


@given(kinds=st.lists(st.tuples(st.booleans(), st.sampled_from(SHAPES), st.text("AB", max_size=3)), max_size=12))
def test_tensors_alike_but_for_their_names_and_data_are_each_their_own(kinds, tmp_path):
    """The second of a kind is listed from the first; 66 is a name's key, too."""
    values = [(raw, np.random.default_rng(i).random(shape, np.float32), f"{i}{name}") for i, (raw, shape, name) in enumerate(kinds)]
    tensors = [numpy_helper.from_array(v, n) if raw else helper.make_tensor(n, 1, v.shape, v.reshape(-1)) for raw, v, n in values]
    ckpt = wb.open(saved(tmp_path, model_of(tensors)))
    assert list(ckpt) == [name for _, _, name in values]
    assert all(same(ckpt[name].load(), torch.from_numpy(value.reshape(value.shape))) for _, value, name in values)


def test_a_truth_value_is_one_or_zero_whatever_number_stands_for_it(tmp_path):
    path = write(tmp_path, initializer(number(1, 3) + number(2, 9) + field(8, b"w") + field(5, b"\x02\x00\x01")))
    assert bits(wb.open(path)["w"].load()) == b"\1\0\1"


def test_constants_and_subgraphs_are_listed_under_their_paths(tmp_path):
    def branch(name, value):
        out = helper.make_tensor_value_info("out", 1, [2])
        weight = numpy_helper.from_array(np.full(2, value, np.float32), "w")
        return helper.make_graph([helper.make_node("Identity", ["w"], ["out"])], name, [], [out], [weight])

    inner = helper.make_node("If", ["c"], ["deep"], name="inner", then_branch=branch("a", 5), else_branch=branch("b", 6))
    then = branch("t", 1)
    then.node.insert(0, inner)
    nodes = [
        helper.make_node("Constant", [], ["made"], value=numpy_helper.from_array(np.arange(3.0), "ignored")),
        helper.make_node("Constant", [], ["one"], value_float=1.5),
        helper.make_node("Constant", [], ["few"], value_floats=[1.5, -2.5]),
        helper.make_node("Constant", [], ["minus"], value_int=-7),
        helper.make_node("Constant", [], ["many"], value_ints=[-7, 300, 1 << 40]),
        helper.make_node("Constant", [], ["word"], value_string="text"),
        helper.make_node("ConstantOfShape", ["s"], ["filled"], name="fill", value=numpy_helper.from_array(np.ones(1, np.float32))),
        helper.make_node("If", ["c"], ["z"], then_branch=then, else_branch=branch("e", 2)),
        helper.make_node("Custom", [], ["q"], name="tables", domain="own", parts=[numpy_helper.from_array(np.arange(2)), numpy_helper.from_array(np.arange(4))]),
    ]  # fmt: skip
    model = model_of([numpy_helper.from_array(np.zeros(1, np.float32), "w"), helper.make_tensor("words", 8, (2,), [b"a", b"b"])], nodes)
    function = helper.make_function("own", "f", ["a"], ["b"], [nodes[1]], [helper.make_opsetid("", 21)])
    model.functions.append(function)
    ckpt = wb.open(saved(tmp_path, model))
    found = {name: tensor.load().tolist() for name, tensor in ckpt.items()}
    assert found == {
        "w": [0.0], "made": [0.0, 1.0, 2.0], "one": 1.5, "few": [1.5, -2.5], "minus": -7, "many": [-7, 300, 1 << 40], "fill/value": [1.0],
        "tables/parts[0]": [0, 1], "tables/parts[1]": [0, 1, 2, 3], "own.f/one": 1.5, "z/then_branch/w": [1.0, 1.0], "z/else_branch/w": [2.0, 2.0],
        "z/then_branch/inner/then_branch/w": [5.0, 5.0], "z/then_branch/inner/else_branch/w": [6.0, 6.0],
    }  # fmt: skip
    assert next(iter(ckpt)) == "w"
    assert dict(ckpt.extras) == {"words": "texts [2]", "word": "texts [1]"}
    assert ckpt.metadata["onnx.operators"].startswith("Constant 7, Identity 4, If 2")
    assert "own.Custom 1" in ckpt.metadata["onnx.operators"]


def test_a_sparse_initializer_is_listed_as_its_parts_and_told(tmp_path):
    parts = numpy_helper.from_array(np.array([5, 7], np.float32), "s"), numpy_helper.from_array(np.array([[0, 1], [2, 3]]))
    ckpt = wb.open(saved(tmp_path, model_of(sparse_initializer=[helper.make_sparse_tensor(*parts, [3, 4])])))
    assert {name: tensor.load().tolist() for name, tensor in ckpt.items()} == {"s.values": [5, 7], "s.indices": [[0, 1], [2, 3]]}
    assert [(f.severity, f.message) for f in ckpt.findings] == [("info", "'s' is sparse, of shape [3, 4]; its parts are listed")]


def test_metadata_tells_versions_inputs_and_outputs(tmp_path):
    model = model_of([from_torch("w", torch.ones(2))])
    model.graph.input.append(helper.make_tensor_value_info("w", 1, [2]))  # as files before IR 4 do
    helper.set_model_props(model, {"note": "kept"})
    metadata = wb.open(saved(tmp_path, model)).metadata
    assert metadata["onnx.inputs"] == "x: float32 [batch, 3]"
    assert metadata["onnx.outputs"] == "y: float32 [batch, 3]"
    assert metadata["onnx.opset_import"] == "ai.onnx 21"
    assert metadata["onnx.producer"] == "tests"
    assert metadata["note"] == "kept"


def test_an_exported_model_is_listed_as_onnx_lists_it(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(2)).eval()
    sample = torch.ones(1, 3, 8, 8)
    model(sample)
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(model, (sample,), str(tmp_path / "m.onnx"), dynamo=False)
    ckpt, official = wb.open(tmp_path / "m.onnx"), by_onnx(tmp_path / "m.onnx")
    assert next(iter(official)) in ckpt
    assert all(same(ckpt[name].load(), tensor) for name, tensor in official.items())


def test_listing_reads_no_tensor_and_imports_no_library(tmp_path):
    """A gigabyte of weights, as a hole in the file, lists within the window's pieces."""
    big = 1 << 30
    head = number(1, 8) + key(7, 2)
    tensor = number(1, big // 4) + number(2, 1) + field(8, b"big") + key(9, 2) + varint(big)
    graph = key(5, 2) + varint(len(tensor) + big) + tensor
    after = initializer_field(number(1, 2) + number(2, 1) + field(8, b"small") + field(9, bytes(8)))
    path = tmp_path / "big.onnx"
    with open(path, "wb") as file:
        file.write(head + varint(len(graph) + big + len(after)) + graph)
        file.seek(big, 1)
        file.write(after + field(8, number(2, 17)))
    code = (
        "import sys, resource, workbench as wb; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; c = wb.open(sys.argv[1]);"
        "print([(n, t.shape) for n, t in c.items()], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20000,"
        "[m for m in ('torch', 'numpy', 'onnx', 'google.protobuf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == f"[('big', ({big // 4},)), ('small', (2,))] True []"


# by hand, from protobuf's encoding


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def key(number_, kind):
    return varint(number_ << 3 | kind)


def field(number_, payload):
    return key(number_, 2) + varint(len(payload)) + payload


def number(number_, value):
    return key(number_, 0) + varint(value)


def initializer_field(tensor):
    return field(5, tensor)


def wrapped(graph, opset=True):
    return number(1, 8) + field(7, graph) + (field(8, number(2, 17)) if opset else b"")


def initializer(tensor):
    return wrapped(initializer_field(tensor))


def write(folder, data, name="model.onnx"):
    path = folder / name
    path.write_bytes(data)
    return path


GOOD = number(1, 2) + number(2, 1) + field(8, b"w")  # two floats called w


@pytest.mark.parametrize(
    ("data", "told"),
    {
        "two graphs": (wrapped(b"") + field(7, b""), "twice"),
        "two names": (initializer(GOOD + field(8, b"v") + field(9, bytes(8))), "twice"),
        "two types": (initializer(GOOD + number(2, 10) + field(9, bytes(8))), "twice"),
        "two raw data": (initializer(GOOD + field(9, bytes(8)) + field(9, bytes(8))), "twice"),
        "raw and typed": (initializer(GOOD + field(9, bytes(8)) + field(4, bytes(8))), "raw_data"),
        "raw too short": (initializer(GOOD + field(9, bytes(7))), "needs 8 bytes"),
        "raw too long": (initializer(GOOD + field(9, bytes(9))), "needs 8 bytes"),
        "nothing held": (initializer(GOOD), "does not fit"),
        "floats too few": (initializer(GOOD + field(4, bytes(4))), "does not fit"),
        "floats in the integers' field": (initializer(GOOD + field(5, bytes(2))), "int32_data"),
        "integers too few": (initializer(number(1, 9) + number(2, 7) + field(7, bytes(8))), "does not fit"),
        "huge shape": (initializer(number(1, 1 << 40) + number(1, 1 << 40) + number(2, 1) + field(9, bytes(8))), "63 bits"),
        "empty shape of huge sides": (initializer(number(1, 0) + number(1, 1 << 62) + number(1, 8) + number(2, 1)), "63 bits"),
        "negative size": (initializer(number(1, 2**64 - 2) + number(2, 1) + field(9, bytes(8))), "no shape"),
        "no type": (initializer(number(1, 2) + field(9, bytes(8))), "element type 0"),
        "unknown type": (initializer(number(1, 2) + number(2, 99) + field(9, bytes(8))), "element type 99"),
        "a segment": (initializer(GOOD + field(3, b"") + field(9, bytes(8))), "no tensor"),
        "another location": (initializer(GOOD + number(14, 2) + field(9, bytes(8))), "location 2"),
        "name is no text": (initializer(number(1, 2) + number(2, 1) + field(8, b"\xff\xfe") + field(9, bytes(8))), "Unicode"),
        "length past the message": (wrapped(key(5, 2) + varint(1 << 62)), "cut"),
        "raw data past its tensor": (
            wrapped(key(5, 2) + varint(len(GOOD) + 4) + GOOD + field(9, b"ab" + field(2, b"cdef"))),
            "8 bytes and 2 are left",
        ),
        "varint of eleven bytes": (initializer(number(1, 2) + key(2, 0) + b"\x81" * 10 + b"\x01"), "ten bytes"),
        "varint past 64 bits": (initializer(number(1, 2) + key(2, 0) + b"\xff" * 9 + b"\x7f"), "ten bytes"),
        "a group": (wrapped(key(5, 3) + key(5, 4)), "type 3"),
        "field zero": (wrapped(key(0, 2) + b"\x00"), "number 0"),
        "a node that is a number": (wrapped(field(2, b"g") + number(1, 5)), "node"),
        "name that is a number": (initializer(number(1, 2) + number(2, 1) + number(8, 3) + field(9, bytes(8))), "name"),
        "sparse without indices": (wrapped(field(15, field(1, GOOD + field(9, bytes(8))) + number(3, 4))), "element type 0"),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_contradicts_itself_is_refused_in_words(data, told, tmp_path):
    path = write(tmp_path, data)
    with pytest.raises(CorruptFileError, match=told):
        wb.open(path)


def test_the_tensors_before_a_broken_one_are_in_partial(tmp_path):
    good, bad = (initializer_field(GOOD + field(9, bytes(size))) for size in (8, 7))
    with pytest.raises(CorruptFileError, match="tensor w") as caught:
        wb.open(write(tmp_path, wrapped(good + bad)))
    assert caught.value.partial["w"].load().tolist() == [0, 0]


@pytest.mark.parametrize(
    "data",
    {
        "TensorFlow saved model": number(1, 1) + field(2, field(2, b"graph")),
        "Caffe": field(1, b"net") + field(100, b"layer"),
        "Core ML": number(1, 4) + field(2, b"description") + field(500, b"network"),
        "TensorProto": number(1, 2) + number(2, 1) + field(9, bytes(8)),
        "only a version": number(1, 8),
        "a graph of numbers": number(1, 8) + field(7, number(1, 5)),
        "text": b": this starts as field seven would, and goes on as a sentence",
    }.values(),
)
def test_other_messages_are_not_claimed(data, tmp_path):
    with pytest.raises(UnknownFormatError):
        wb.open(write(tmp_path, data))


def nested(depth, graph=b"", name="n"):
    for _ in range(depth):
        graph = field(1, field(3, name.encode()) + field(5, field(1, b"body") + field(6, graph)))
    return wrapped(graph)


HOSTILE = {
    "a million nodes": (wrapped(b"\x0a\x00" * 400_000), None),
    "a million attributes": (wrapped(field(1, b"\x2a\x00" * 300_000)), None),
    "outer fields": (number(1, 8) + b"\x72\x00" * 400_000 + field(7, b""), "no format"),
    "more fields than are walked": (wrapped(b"\x5a\x00" * 2_100_000), "more than 2000000"),
    "names that grow with their path": (nested(30, initializer_field(number(1, 0) + number(2, 1)) * 30_000, "n" * 60_000), "too long"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_sizes_end_soon(what, tmp_path):
    data, told = HOSTILE[what]
    path = write(tmp_path, data)
    start = time.process_time()
    with pytest.raises(FormatError, match=told) if told else nullcontext():
        str(wb.open(path))
    assert time.process_time() - start < 20  # alone on a core a tenth of this


def test_graphs_nest_as_deep_as_protobuf_reads_and_no_deeper(tmp_path):
    onnx.load(str(write(tmp_path, nested(30))))
    wb.open(write(tmp_path, nested(30)))
    with pytest.raises(UnsupportedError, match="32 deep"):
        wb.open(write(tmp_path, nested(5000)))


def test_two_tensors_of_one_name_are_both_shown_and_told(tmp_path):
    ckpt = wb.open(write(tmp_path, wrapped((initializer_field(GOOD + field(9, bytes(8)))) * 2)))
    assert list(ckpt) == ["w", "w#2"]
    assert [f.kind for f in ckpt.findings] == ["name collision"]


def test_a_model_without_an_operator_set_is_told(tmp_path):
    assert [f.kind for f in wb.open(write(tmp_path, wrapped(b"", opset=False))).findings] == ["cut file"]


# external data


def entries(**pairs):
    return b"".join(field(13, field(1, name.encode()) + field(2, value.encode())) for name, value in pairs.items())


def external(folder, **pairs):
    """A model of two floats in a file beside it."""
    return wb.open(write(folder, initializer(GOOD + number(14, 1) + entries(**pairs))))


def test_external_data_is_read_from_below_the_folder(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w.bin").write_bytes(b"####" + np.array([1, 2], "<f4").tobytes())
    checksum = hashlib.sha1((tmp_path / "weights" / "w.bin").read_bytes()).hexdigest()
    ckpt = external(tmp_path, location="weights/w.bin", offset="4", length="8", checksum=checksum, prepacked_0="x|1")
    assert ckpt["w"].load().tolist() == [1, 2]
    assert not ckpt.findings
    assert external(tmp_path, location="weights/w.bin", offset="4")["w"].load().tolist() == [1, 2]


def outside(folder):
    secret = folder.parent / "secret.bin"
    secret.write_bytes(b"secret12")
    (folder / "link").symlink_to(secret)
    (folder / "linked").symlink_to(folder.parent)
    os.link(secret, folder / "hard")
    return secret


@pytest.mark.parametrize("location", ["../secret.bin", "{folder}/../secret.bin", "/etc/passwd", "sub/../../secret.bin", "link", "linked/secret.bin", "hard", "..\\secret.bin", "C:\\secret.bin", "a\0b", "//etc/passwd"])  # fmt: skip
def test_external_data_outside_the_folder_is_never_read_and_called_a_danger(location, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    outside(folder)
    ckpt = external(folder, location=location.format(folder=folder), length="8")
    assert ckpt["w"].shape == (2,)
    assert [f.severity for f in ckpt.findings] == ["danger"]
    for read in (ckpt["w"].load, ckpt["w"].peek, ckpt["w"].raw):
        with pytest.raises(CorruptFileError, match="locked"):
            read()


@pytest.mark.parametrize(
    ("pairs", "severity", "told"),
    [
        ({"location": "gone.bin"}, "warning", "no such file"),
        ({}, "warning", "regular file"),
        ({"location": "."}, "warning", "regular file"),
        ({"location": "fifo"}, "warning", "regular file"),
        ({"location": "x" * 5000}, "warning", "no such file"),
        ({"location": "w.bin", "length": "4"}, "warning", "8 bytes are needed"),
        ({"location": "w.bin", "length": "12"}, "warning", "8 bytes are needed"),
        ({"location": "w.bin", "offset": "9"}, "warning", "has 16"),
        ({"location": "w.bin", "offset": str(2**63)}, "warning", "has 16"),
        ({"location": "w.bin", "offset": "-8"}, "danger", "no counts"),
        ({"location": "w.bin", "offset": "1e3"}, "danger", "no counts"),
        ({"location": "w.bin", "length": "9" * 5000}, "danger", "no counts"),
        ({"location": "w.bin", "offset": "٣"}, "danger", "no counts"),
    ],
)
def test_external_data_that_is_not_as_declared_locks_its_tensor_alone(pairs, severity, told, tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes(16))
    os.mkfifo(tmp_path / "fifo")
    good = initializer_field(number(1, 1) + number(2, 1) + field(8, b"good") + field(9, bytes(4)))
    ckpt = wb.open(write(tmp_path, wrapped(initializer_field(GOOD + number(14, 1) + entries(**pairs)) + good)))
    assert [f.severity for f in ckpt.findings] == [severity]
    assert told in ckpt["w"].locked
    assert ckpt["good"].load().tolist() == [0]


def test_two_missing_tensors_are_not_taken_for_one(tmp_path):
    missing = [initializer_field(GOOD + number(14, 1) + entries(location="gone.bin")) for _ in range(2)]
    ckpt = wb.open(write(tmp_path, wrapped(b"".join(missing))))
    assert list(ckpt) == ["w", "w#2"]
    assert not ckpt.aliases


def test_a_location_is_looked_for_once_whether_it_is_there_or_not(tmp_path, monkeypatch):
    asked = []
    honest = onnx_file._Model._found
    monkeypatch.setattr(onnx_file._Model, "_found", lambda self, location: asked.append(location) or honest(self, location))
    rest = entries(location="sub/missing") + number(14, 1)
    ckpt = wb.open(write(tmp_path, wrapped(b"".join(initializer_field(number(2, 1) + field(8, b"w%d" % n) + rest) for n in range(50)))))
    assert {tensor.locked for tensor in ckpt.values()} == {"external data 'sub/missing': there is no such file"}
    assert asked == ["sub/missing"]


def test_numbers_of_a_constant_are_counted_and_not_decoded(tmp_path, monkeypatch):
    numbers = [1, 300, -1, 1 << 40] * 500
    constant = helper.make_node("Constant", [], ["c"], value_ints=numbers)
    packed = field(
        1, field(2, b"d") + field(4, b"Constant") + field(5, field(1, b"value_ints") + field(8, b"".join(map(varint, (7, 300, 9)))))
    )
    single = field(1, constant.SerializeToString())
    monkeypatch.setattr(onnx_file, "read_varint", None)
    monkeypatch.setattr(onnx_file.Wire, "numbers", None)
    path = write(tmp_path, wrapped(single + packed))
    ckpt = wb.open(path)
    assert (ckpt["c"].shape, ckpt["d"].shape) == ((2000,), (3,))
    monkeypatch.undo()
    assert (ckpt["c"].load().tolist(), ckpt["d"].load().tolist()) == (numbers, [7, 300, 9])
    monkeypatch.setattr(onnx_file, "_MAX_LISTS", 3)
    with pytest.raises(UnsupportedError, match="bytes of numbers"):
        wb.open(path)


@pytest.mark.parametrize(
    "graph",
    [field(1, b"") * 900_000, field(1, field(4, b"Constant") + field(2, b"c") + field(5, number(3, 1)) * 300_000),
     b"".join(initializer_field(number(2, 1) + field(8, b"w%d" % i) + entries(location="f") + number(14, 1)) for i in range(60_000))],
)  # fmt: skip
def test_what_is_slow_to_look_at_counts_for_more_than_a_field(graph, tmp_path):
    with pytest.raises(UnsupportedError, match="or what takes as long"):
        wb.open(write(tmp_path, wrapped(graph)))


def test_external_data_described_twice_is_a_danger(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(8))
    ckpt = wb.open(write(tmp_path, initializer(GOOD + number(14, 1) + entries(location="b.bin") + entries(location="a.bin"))))
    assert [f.severity for f in ckpt.findings] == ["danger"]
    with pytest.raises(CorruptFileError, match="external_data"):
        wb.open(write(tmp_path, initializer(GOOD + number(14, 1) + entries(location="a.bin") + field(9, bytes(8)))))


def test_decoders_are_named_inside_the_library():
    assert callable(onnx_file.typed_values)
    assert callable(onnx_file.unpacked_bits)
