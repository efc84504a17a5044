"""Plain pickles of arrays and tensors, against pickle.load on files written here."""

import io
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conformance import FormatTests
from hostile_makers import PROTO, text
from strategies import bits, same

import workbench as wb
from workbench.errors import CorruptFileError, FormatError, UnsupportedError
from workbench.formats.torch_objects import watched_runs

ARRAYS = {
    "matrix": np.arange(6, dtype="f4").reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6, dtype="i2").reshape(2, 3)),
    "moved": np.arange(24, dtype="u4").reshape(2, 3, 4).transpose(2, 0, 1),
    "sliced": np.arange(10, dtype="i8")[::3],
    "big-endian": np.array([1.5, -2.0, 3.25], dtype=">f8"),
    "big-endian pairs": np.array([1 + 2j, 3 - 4j], dtype=">c8"),
    "zeros": np.zeros(5, "f2"),
    "text-like": np.frombuffer(b"abcd\xc3\xa9\xc3\xa9", dtype="i4"),
    "flags": np.array([True, False]),
    "scalar": np.array(7, dtype="u1"),
    "empty": np.zeros((0, 4), "c16"),
}  # fmt: skip


def pickled(tree, path, protocol=4):
    path.write_bytes(pickle.dumps(tree, protocol=protocol))
    return path


def native(array):
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


class TestArrays(FormatTests):
    magic = 2
    protocol, names = 4, tuple(ARRAYS)

    def build(self, folder):
        return pickled({name: ARRAYS[name] for name in self.names}, folder / "model.pkl", self.protocol), [folder / "model.pkl"]

    def official(self, path):
        return {name: native(array) for name, array in pickle.loads(path.read_bytes()).items()}

    def test_strides_are_the_official_ones(self, built):
        loaded = pickle.loads(built[0].read_bytes())
        for name, tensor in wb.open(built[0]).items():
            if tensor.numel > 1:
                assert tensor.load().numpy().strides == loaded[name].strides, name

    def test_raw_gives_the_bytes_as_they_lie(self, built):
        for name, lazy in wb.open(built[0]).items():
            if lazy.is_contiguous:
                assert lazy.raw() == ARRAYS[name].tobytes(), name

    def test_offset_is_where_the_bytes_lie(self, built):
        """In the file where a payload lies there as it is; in the payload where it had to be decoded first."""
        data = built[0].read_bytes()
        for name, lazy in wb.open(built[0]).items():
            if lazy.is_contiguous and lazy.numel:
                if lazy.source.storage.file.url == str(built[0]):
                    assert data[lazy.offset : lazy.offset + lazy.nbytes] == ARRAYS[name].tobytes(), name
                else:
                    assert self.protocol != 4
                    assert not os.path.exists(lazy.source.storage.file.url)


class TestArraysOfProtocol2(TestArrays):
    """No bytes in this protocol: they are spelled as text and called into being, and lie nowhere in the file as they are."""

    protocol, names = 2, ("fortran", "big-endian", "zeros", "text-like", "empty")


class TestArraysOfProtocol5(TestArrays):
    """Short byte arrays are copied when they are read; read-only ones are bytes."""

    protocol, names = 5, ("moved", "text-like", "big-endian pairs", "scalar", "empty")


class TestTensors(FormatTests):
    """A state dict by pickle.dump: each storage is a whole torch file in a byte string."""

    magic = 2

    def build(self, folder):
        w = torch.arange(12.0).view(3, 4)
        return pickled({"w": w, "stepped": w.t()[::2], "none": torch.empty(0, 2)}, folder / "model.pkl"), [folder / "model.pkl"]

    def official(self, path):
        return pickle.loads(path.read_bytes())


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_gives_the_same_arrays_and_tensors(protocol, tmp_path):
    tree = {"a": ARRAYS, "t": {"w": torch.randn(3, 5).t(), "n": torch.tensor(3)}}
    ckpt = wb.open(pickled(tree, tmp_path / "x.pkl", protocol))
    assert ckpt.format == "pickle"
    assert not ckpt.dangers
    for name, array in ARRAYS.items():
        assert same(ckpt[f"a.{name}"].load(), native(array)), name
        assert ckpt[f"a.{name}"].peek(100) == array.ravel().tolist(), name
    for name, tensor in tree["t"].items():
        assert same(ckpt[f"t.{name}"].load(), tensor), name


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_large_payloads_are_left_in_the_file_and_read_in_parts(protocol, tmp_path):
    generator = np.random.default_rng(0)
    tree = {
        "a": generator.standard_normal((400, 300)).astype("f4"),
        "f": np.asfortranarray(generator.standard_normal((300, 200))),
        "t": torch.randn(200, 300),
        "z": np.zeros(100_000, "i4"),
    }
    path = pickled(tree, tmp_path / "big.pkl", protocol)
    ckpt = wb.open(path)
    assert list(ckpt) == list(tree)
    for name, value in tree.items():
        expected = value if isinstance(value, torch.Tensor) else native(value)
        assert same(ckpt[name].load(), expected), name
        assert b"".join(bits(chunk) for _, chunk in ckpt[name].chunks(70_000)) == bits(expected)
        assert ckpt[name].read(expected.numel() - 5, expected.numel()).tolist() == expected.reshape(-1)[-5:].tolist()
        assert ckpt[name].read(3, 9).tolist() == expected.reshape(-1)[3:9].tolist()
    wb.save(ckpt, tmp_path / "new.pt")
    assert same(torch.load(tmp_path / "new.pt", weights_only=True)["a"], native(tree["a"]))


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_zip_in_a_byte_string_is_listed(protocol, tmp_path):
    class Nested:
        def __reduce__(self):
            buffer = io.BytesIO()
            torch.save({"w": torch.arange(3.0)}, buffer)
            return torch.storage._load_from_bytes, (buffer.getvalue(),)

    path = pickled({"inner": Nested()}, tmp_path / "x.pkl", protocol)
    assert pickle.loads(path.read_bytes())["inner"]["w"].tolist() == wb.open(path)["inner.w"].load().tolist() == [0, 1, 2]


def test_equal_tensors_are_not_tied_and_one_pickled_twice_is(tmp_path):
    array, tensor = np.ones(3), torch.ones(3)
    tree = {"a": array, "b": np.ones(3), "c": array, "t": tensor, "u": torch.ones(3), "v": tensor}
    for protocol in (2, 4, 5):
        assert wb.open(pickled(tree, tmp_path / "x.pkl", protocol)).aliases == {"c": "a", "v": "t"}


def test_shared_and_circular_containers_hold_the_tensor_that_an_array_becomes(tmp_path):
    array = np.arange(3.0)
    tree = {"pair": (array, [array]), "deep": ((array,),), "state": ("MT19937", np.arange(4, dtype="u4"), 624)}
    tree["self"] = tree
    ckpt = wb.open(pickled(tree, tmp_path / "x.pkl"))
    assert list(ckpt) == ["pair.0", "pair.1.0", "deep.0.0", "state.1"]
    assert ckpt.tree["pair"][0] is ckpt.tree["deep"][0][0]


def test_numbers_become_python_numbers_and_other_arrays_stay_inert(tmp_path):
    tree = {
        "loss": np.float32(0.1), "n": np.int64(-3), "flag": np.bool_(True), "z": np.complex64(1 + 2j), "big": np.array(5, ">i4")[()],
        "names": np.array(["a", "bc"]), "objects": np.array([1, None], dtype=object), "dates": np.array(["2020-01-01"], dtype="M8[D]"),
        "records": np.zeros(2, dtype=[("a", "f4"), ("b", "i4")]), "words": np.array([b"ab"]), "w": np.ones(2),
    }  # fmt: skip
    ckpt = wb.open(pickled(tree, tmp_path / "x.pkl"))
    assert list(ckpt) == ["w"]
    assert [ckpt.extras[name] for name in ("loss", "n", "flag", "z", "big")] == [float(np.float32(0.1)), -3, True, 1 + 2j, 5]


def test_python_2_strings_are_bytes_where_an_array_needs_them(tmp_path):
    """By opcode, as cPickle of Python 2 spells `{'w': array([...], dtype='<f4')}`: payloads are strings."""
    made = {}
    for name, values in {
        "zeros": [0.0] * 70,
        "random": [1.5, -2.25, 1e30],
        "accents": struct.unpack("<2f", b"\xc3\xa9\xc3\xa9" * 2),
    }.items():
        data = struct.pack(f"<{len(values)}f", *values)
        payload = b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<i", len(data)) + data
        made[name] = (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01" + b"K" + bytes([len(values)]) + b"\x85"
            b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + payload + b"tb"
        )  # fmt: skip
    path = tmp_path / "x.pkl"
    path.write_bytes(PROTO + b"}(" + b"".join(b"U" + bytes([len(n)]) + n.encode() + spelled for n, spelled in made.items()) + b"u.")
    official = pickle.loads(path.read_bytes(), encoding="latin1")
    ckpt = wb.open(path)
    assert {n: t.load().tolist() for n, t in ckpt.items()} == {n: a.tolist() for n, a in official.items()}
    assert set(ckpt) == set(made)


def test_further_pickles_and_bytes_are_told_and_their_dangers_named(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"w": np.ones(2)}) * 2 + PROTO + b"cos\nsystem\n" + text("touch x") + b"\x85R." + b"junk")
    ckpt = wb.open(path)
    told = next(f for f in ckpt.findings if f.kind == "bytes after the pickle")
    assert told.message.startswith("2 further pickles and 4 bytes")
    assert ckpt.dangers == ("os.system",)
    assert list(ckpt) == ["w"]


def test_a_data_pkl_taken_out_of_its_archive_lists_its_tensors(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        (tmp_path / "data.pkl").write_bytes(archive.read("x/data.pkl"))
    ckpt = wb.open(tmp_path / "data.pkl")
    assert ckpt["w"].shape == (2,)
    with pytest.raises(CorruptFileError, match="locked"):
        ckpt["w"].load()


EVIL = b"cos\nsystem\n" + text("touch executed") + b"\x85R"


def nested(data):
    return b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(data)) + data + b"\x85R"


REAL = pickle.dumps(np.arange(3.0), protocol=4)[11:-1]  # without PROTO, FRAME and STOP


@pytest.mark.parametrize("at", ["before", "after"])
@pytest.mark.parametrize(
    "evil",
    [EVIL, nested(PROTO + EVIL + b"."), nested(b"junk"), nested(b"PK\x03\x04junk"), b"ctorch.storage\n_load_from_bytes\nK\x01\x85R",
     b"ctorch.storage\n_load_from_bytes\n)R"],
    ids=["call", "nested call", "nested junk", "nested zip of junk", "nested number", "nested nothing"],
)  # fmt: skip
def test_a_danger_is_named_and_the_rest_is_listed(evil, at, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = [(text("evil"), evil), (text("w"), REAL)]
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04}(" + b"".join(k + v for k, v in (pairs if at == "before" else pairs[::-1])) + b"u.")
    ckpt = wb.open(path)
    assert {"os.system", "torch.storage._load_from_bytes"} & set(ckpt.dangers)
    assert ckpt["w"].load().tolist() == [0, 1, 2]
    assert not (tmp_path / "executed").exists()


def test_what_a_nested_file_names_is_named(tmp_path):
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2), "t": subprocess.Popen}, buffer, _use_new_zipfile_serialization=False)
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x03" + nested(buffer.getvalue()) + b".")
    ckpt = wb.open(path)
    assert ckpt.dangers == ("subprocess.Popen",)
    assert ckpt["w"].load().tolist() == [1, 1]


def array(
    state=b"K\x01K\x03\x85",
    dtype=b"U\x02f8\x89\x88\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
    data=b"C\x18" + bytes(24),
):
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R("
        + state
        + b"cnumpy\ndtype\n"
        + dtype
        + b"\x89"
        + data
        + b"tb"
    )


def test_the_maker_makes_an_array_that_numpy_reads():
    assert pickle.loads(b"\x80\x03" + array() + b".").tolist() == [0, 0, 0]


ODD = {
    "too few bytes": array(data=b"C\x17" + bytes(23)),
    "too many bytes": array(data=b"C\x19" + bytes(25)),
    "too few long bytes": array(data=b"B" + struct.pack("<I", 70_000) + bytes(70_000)),
    "more elements than numbers": array(state=b"K\x01\x8a\x09" + bytes(8) + b"\x01\x85"),
    "fewer than none": array(state=b"K\x01J\xff\xff\xff\xff\x85"),
    "a shape that is a number": array(state=b"K\x01K\x03"),
    "a shape of a thousand": array(state=b"K\x01(" + b"K\x01" * 1000 + b"t"),
    "no type": array(dtype=b")R"),
    "a type of another name": array(dtype=b"U\x02f3\x85R"),
    "a type that is a list": array(dtype=b"]\x85R"),
    "a type with a state of another kind": array(dtype=b"U\x02f8\x85RNb"),
    "a type with a short state": array(dtype=b"U\x02f8\x85R(K\x03tb"),
    "data that are a number": array(data=b"K\x03"),
    "data that are a list": array(data=b"]"),
    "a short state": b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01tb",
    "no state": b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R",
    "no arguments": b"cnumpy.core.multiarray\n_reconstruct\n)R",
    "another class": b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nmatrix\nK\x00\x85C\x01b\x87R(K\x01Ntb",
    "a number of no bytes": b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\x02f8\x85RC\x00\x86R",
    "a number of nothing": b"cnumpy.core.multiarray\nscalar\n)R",
    "a buffer of nothing": b"cnumpy.core.numeric\n_frombuffer\n(NNNNtR",
    "a buffer in no order": b"cnumpy.core.numeric\n_frombuffer\n(C\x18" + bytes(24) + b"cnumpy\ndtype\nU\x02f8\x85RK\x03\x85U\x01KK\x05\x85tR",
    "a buffer in an order of lists": b"cnumpy.core.numeric\n_frombuffer\n(C\x18" + bytes(24) + b"cnumpy\ndtype\nU\x02f8\x85RK\x03\x85U\x01K]\x85tR",
    "text of other characters": array(data=b"c_codecs\nencode\n" + text("\u20ac" * 8) + text("latin1") + b"\x86R"),
    "text by another code": array(data=b"c_codecs\nencode\n" + text("a" * 24) + text("rot13") + b"\x86R"),
    "long text of other characters": array(data=b"c_codecs\nencode\n" + text("\u20ac" * 30_000) + text("latin1") + b"\x86R"),
    "state for a tensor again": array() + b"}b",
    "a line without an end": b"S'" + b"a" * 100_000,
    "a number of a megabyte": b"\x8b" + struct.pack("<i", 1 << 20) + bytes(1 << 20),
    "bytes past the end": b"B\xff\xff\xff\x7f",
    "bytes before the start": b"T\xff\xff\xff\xff",
    "a frame past the end": b"\x95" + b"\xff" * 8,
    "an out-of-band buffer": b"\x97",
    "three million values on the stack": b"(" + b"N" * 3_000_000 + b"t",
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_odd_arrays_are_listed_locked_inert_or_refused_in_time(case, tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04}(" + text("w") + REAL + text("odd") + ODD[case] + b"u.")
    start = time.process_time()
    try:
        ckpt = wb.open(path)
    except FormatError as error:
        ckpt = error.partial
    assert ckpt["w"].load().tolist() == [0, 1, 2]
    str(ckpt), ckpt._repr_html_()
    for tensor in ckpt.values():
        try:
            tensor.load()
        except CorruptFileError:
            continue
    assert time.process_time() - start < 2


def test_one_payload_opened_ten_thousand_times_is_read_once(tmp_path):
    buffer = io.BytesIO()
    torch.save([torch.ones(1)] * 2_000, buffer, _use_new_zipfile_serialization=False)
    data = buffer.getvalue()
    path = tmp_path / "x.pkl"
    call = b"h\x01h\x02\x85R"
    head = b"\x80\x03](ctorch.storage\n_load_from_bytes\nq\x01B" + struct.pack("<I", len(data)) + data + b"q\x02"
    path.write_bytes(head + call * 10_000 + b"e.")
    start = time.process_time()
    wb.open(path)
    assert time.process_time() - start < 3


def test_the_files_in_a_pickle_are_bounded_together_with_it(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + b"N0" * 499_000 + b"N.")
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x03(" + nested(buffer.getvalue()) * 30 + b"l.")
    with watched_runs() as runs, pytest.raises(UnsupportedError, match="more than 3,000,000 opcodes") as caught:
        wb.open(path)
    assert len(runs) == 5
    assert [found.kind for found in caught.value.partial.findings].count("nested file") == 1
    assert not wb.scan(path).ok
    path.write_bytes(b"\x80\x03(" + nested(buffer.getvalue()) * 2 + b"l.")
    with watched_runs() as runs:
        assert not wb.open(path).dangers
    own = [run.machine.ran for run in runs]
    assert own[0] == own[1] > 990_000 > own[2]  # so that who asks for a run's counts adds none twice
    assert wb.scan(path).pickles


def test_a_large_file_of_payloads_asks_for_little_memory(tmp_path):
    array = np.zeros(15_000, "f4")  # short enough to be held
    pickled([array + i for i in range(4_000)], tmp_path / "x.pkl")
    code = """
import sys
import workbench as wb
def high(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1000
before = high()
ckpt = wb.open(sys.argv[1])
assert len(ckpt) == 4000 and ckpt["3999"].peek(1) == [3999.0]
print(high() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.pkl")], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 128


def test_a_joblib_file_is_named(tmp_path):
    """By opcode, as joblib spells an array: a wrapper object, then the array's bytes between the opcodes."""
    wrapper = b"\x8c\x14joblib.numpy_pickle\x8c\x11NumpyArrayWrapper\x93)\x81}".replace(b"\x14", b"\x13", 1)
    path = tmp_path / "x.joblib"
    path.write_bytes(b"\x80\x04" + wrapper + b"b" + np.arange(100.0).tobytes())
    with pytest.raises(UnsupportedError, match="joblib"):
        wb.open(path)


def test_an_ordered_dict_of_parameters_opens_as_its_names(tmp_path):
    model = torch.nn.Linear(3, 2)
    ckpt = wb.open(pickled(OrderedDict(model.state_dict()), tmp_path / "x.pkl", 3))
    assert list(ckpt) == ["weight", "bias"]


@pytest.mark.parametrize(
    "content",
    [b"cos\nsystem\n", b"cos\nsystem\n(S'x'\ntR", b"(S'x'\nios\nsystem\n", b"cbuiltins\neval\nnonsense", b"(dp0\nS'a'\np1\nI1\ns", b"cmine\nrun\n)R~"],
    ids=repr,
)  # fmt: skip
def test_a_pickle_without_a_mark_that_breaks_off_is_damaged_and_not_unknown(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CorruptFileError) as caught:
        wb.open(tmp_path / "x")
    assert content.startswith(b"(dp0") or caught.value.partial.dangers
