"""NumPy's .npy and .npz against numpy itself, and files that its specification forbids."""

import io
import os
import struct
import time
import zipfile

import numpy as np
import pytest
import torch
from conformance import FormatTests, state
from hypothesis import given
from hypothesis import strategies as st
from strategies import bits, same

import workbench as wb
from workbench.errors import CorruptFileError, UnsupportedError
from workbench.formats.torch_objects import watched_runs


def arrays():
    tensors = {name: tensor for name, tensor in state().items() if tensor.dtype != torch.bfloat16}
    return {name: tensor.numpy() for name, tensor in tensors.items()} | {"columns": np.asfortranarray(np.arange(12.0).reshape(3, 4))}


class TestNpy(FormatTests):
    magic = 6

    def build(self, folder):
        np.save(folder / "a.npy", np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)))
        return folder / "a.npy", [folder / "a.npy"]

    def official(self, path):
        return {"tensor": torch.from_numpy(np.load(path, allow_pickle=False))}


class TestNpz(FormatTests):
    magic = 4

    def build(self, folder):
        np.savez(folder / "a.npz", **arrays())
        return folder / "a.npz", [folder / "a.npz"]

    def official(self, path):
        with np.load(path, allow_pickle=False) as held:
            return {name: torch.from_numpy(held[name]) for name in held.files}


class TestCompressedNpz(TestNpz):
    def build(self, folder):
        np.savez_compressed(folder / "a.npz", **arrays())
        return folder / "a.npz", [folder / "a.npz"]

    def test_offset_is_where_the_bytes_lie(self, built):
        """Packed bytes lie nowhere as they are."""
        assert {tensor.offset for tensor in wb.open(built[0]).values()} == {None}


def npy(header, data=b"", version=b"\x01\x00"):
    """A file as the specification lays it out, with any header."""
    text = (header if isinstance(header, bytes) else header.encode("latin-1")) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", len(text)) + text + data


def header(descr="'<f4'", shape="(2,)", fortran="False"):
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"


def opened(tmp_path, content):
    (tmp_path / "x.npy").write_bytes(content)
    return wb.open(tmp_path / "x.npy")


ORDERED = ["f2", "f4", "f8", "c8", "c16", "i2", "i4", "i8", "u2", "u4", "u8"]


@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("descr", [f"{order}{kind}" for order in "<>" for kind in ORDERED] + ["|b1", "|i1", "|u1"])
def test_each_element_type_in_both_byte_orders(descr, fortran, tmp_path):
    array = np.arange(24).reshape(2, 3, 4).astype(descr)
    np.save(tmp_path / "x.npy", np.asfortranarray(array) if fortran else array)
    found = wb.open(tmp_path / "x.npy")["tensor"]
    native = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    assert same(found.load(), native)
    assert found.peek(3) == native.reshape(-1)[:3].tolist() or fortran
    assert b"".join(bits(chunk) for _, chunk in found.chunks(7)) == bits(native)
    wb.save(wb.open(tmp_path / "x.npy"), tmp_path / "x.pt")
    assert same(torch.load(tmp_path / "x.pt"), native)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 5)])
def test_each_version_and_odd_shapes(version, shape, tmp_path):
    buffer = io.BytesIO()
    array = np.ones(shape, dtype=np.int32)
    np.lib.format.write_array(buffer, array, version=version)
    found = opened(tmp_path, buffer.getvalue())["tensor"]
    assert (found.shape, found.dtype.name) == (shape, "int32")
    assert same(found.load(), torch.from_numpy(array))


@given(
    array=st.sampled_from([np.float32, np.int16, np.bool_, np.complex64]).flatmap(
        lambda dtype: st.lists(st.integers(0, 4), max_size=4).map(lambda shape: np.arange(np.prod(shape)).astype(dtype).reshape(shape))
    ),
    compressed=st.booleans(),
    names=st.lists(
        st.text(st.characters(codec="ascii", exclude_characters="/\0"), min_size=1, max_size=8), min_size=1, max_size=3, unique=True
    ),
)
def test_any_archive_numpy_writes_is_listed_and_loaded(array, compressed, names, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name in names:
            with archive.open(f"{name}.npy", "w") as record:
                np.lib.format.write_array(record, array)
    (tmp_path / "x.npz").write_bytes(buffer.getvalue())
    ckpt = wb.open(tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as official:
        assert set(ckpt) == set(official.files)
        assert all(same(ckpt[name].load(), torch.from_numpy(official[name])) for name in official.files)


def test_a_header_of_any_length_is_read_where_numpy_reads_it(tmp_path):
    """Writers other than numpy need not align the data."""
    content = npy(header() + " ", struct.pack("<2f", 1, 2))
    assert len(npy(header() + " ")) % 4
    assert opened(tmp_path, content)["tensor"].peek() == [1.0, 2.0]
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", content)
    assert wb.open(tmp_path / "x.npz")["w"].load().tolist() == [1.0, 2.0]


def test_the_long_counts_of_python_2_are_read(tmp_path):
    assert opened(tmp_path, npy(header(shape="(2L,)"), bytes(8)))["tensor"].shape == (2,)


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.array(["a", "bc"]), "<U2"),
        (np.array([b"a", b"bc"]), "|S2"),
        (np.array(["2026-11-22"], dtype="M8[D]"), "<M8[D]"),
        (np.zeros(2, dtype=[("x", "<f4"), ("y", [("z", "<i2", (2, 3))])]), '["x", "<f4"]'),
        (np.zeros(3, dtype="V2"), "V2"),
        (np.zeros(3, dtype=np.longdouble), "<f16"),
    ],
)
def test_what_torch_has_no_type_for_is_told_and_the_rest_is_listed(array, told, tmp_path):
    np.savez(tmp_path / "x.npz", odd=array, w=np.ones(2))
    ckpt = wb.open(tmp_path / "x.npz")
    assert list(ckpt) == ["w"]
    assert told in ckpt.extras["odd"]
    (finding,) = ckpt.findings
    assert (finding.kind, finding.severity, finding.where) == ("not a tensor", "warning", {"record": "odd.npy"})
    assert told in finding.message
    np.save(tmp_path / "x.npy", array)
    content = (tmp_path / "x.npy").read_bytes()
    for cut in (len(content) - 1, len(content) - array.nbytes):
        with pytest.raises(CorruptFileError):
            opened(tmp_path, content[:cut])


class Evil:
    def __reduce__(self):
        return os.system, ("echo executed > /tmp/never",)


def test_an_array_of_objects_is_never_unpickled_and_its_dangers_are_named(tmp_path):
    np.savez(tmp_path / "x.npz", good=np.array([{"a": 1}, None], dtype=object), w=np.ones(2))
    ckpt = wb.open(tmp_path / "x.npz")
    assert (list(ckpt), ckpt.dangers, [f.severity for f in ckpt.findings]) == (["w"], (), ["warning", "info"])
    np.savez(tmp_path / "x.npz", evil=np.array([Evil()], dtype=object), w=np.ones(2))
    ckpt = wb.open(tmp_path / "x.npz")
    assert (list(ckpt), ckpt.dangers) == (["w"], ("posix.system",))
    assert "would call" in ckpt.findings[0].message
    np.save(tmp_path / "x.npy", np.array([Evil()], dtype=object))
    assert wb.open(tmp_path / "x.npy").dangers == ("posix.system",)


BUSY = b"\x80\x02" + b"N0" * 800_000 + b"N."  # opcodes of more than half of what is done for one file


def test_the_pickles_of_one_archive_are_bounded_together_and_that_is_told(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in "abcd":
            archive.writestr(f"{name}.npy", npy(header("'|O'", "()"), BUSY))
    with watched_runs() as runs:
        ckpt = wb.open(tmp_path / "x.npz")
    assert [f.where["record"] for f in ckpt.findings if f.kind == "unreadable pickle"] == ["b.npy", "c.npy", "d.npy"]
    assert len(runs) == 2
    assert not wb.scan(tmp_path / "x.npz").ok


def test_many_small_arrays_of_objects_are_all_looked_at(tmp_path):
    many = {f"a{i}": np.array([None, {"i": i}], dtype=object) for i in range(2000)}
    np.savez(tmp_path / "x.npz", **many, evil=np.array([Evil()], dtype=object), w=np.ones(2))
    ckpt = wb.open(tmp_path / "x.npz")
    assert (list(ckpt), ckpt.dangers) == (["w"], ("posix.system",))
    assert not [f for f in ckpt.findings if f.kind == "unreadable pickle"]


@pytest.mark.parametrize("names", [("a.npy", "a.npy.npy"), ("a.npy.npy", "a.npy")])
def test_a_name_with_and_without_its_ending_is_told_and_read_as_numpy_does(names, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for value, name in enumerate(names):
            archive.writestr(name, npy(header("'<f8'", "()"), struct.pack("<d", value)))
    official, ckpt = np.load(tmp_path / "x.npz"), wb.open(tmp_path / "x.npz")
    assert {name: ckpt[name].load().item() for name in ckpt} == {name: float(official[name]) for name in ckpt}
    assert sorted(tensor.load().item() for tensor in ckpt.values()) == [0, 1]
    assert [(f.kind, f.severity) for f in ckpt.findings] == [("ambiguous", "warning")]


@pytest.mark.parametrize("data", [b"", b"\x80\x02", b"\x80\x04I0x10\n", b"garbage", b"\x80\x02(X\xff\xff\xff\xff"])
def test_a_pickle_that_is_no_pickle_is_a_danger(data, tmp_path):
    (finding,) = opened(tmp_path, npy(header("'|O'", "()"), data)).findings
    assert (finding.kind, finding.severity) == ("unreadable pickle", "danger")


def test_bytes_after_the_pickle_are_told(tmp_path):
    assert "bytes after the pickle" in [f.kind for f in opened(tmp_path, npy(header("'|O'", "()"), b"\x80\x02N.more")).findings]


FORBIDDEN = {
    "nested parentheses": npy("(" * 60_000),
    "nested lists": npy(header("[" * 30_000 + "]" * 30_000)),
    "nested records": npy(header("[('a', " * 900 + "'<f4'" + ")]" * 900)),
    "signs": npy("-" * 60_000 + "1"),
    "a call": npy(header(shape="(__import__('os').system('true'),)")),
    "arithmetic": npy(header(shape="(1+1,)"), bytes(8)),
    "a power": npy(header(shape="(9**9**9,)")),
    "a negative count": npy(header(shape="(-1,)")),
    "a boolean count": npy(header(shape="(True, True)"), bytes(4)),
    "a huge count": npy(header(shape="(4611686018427387904, 4)")),
    "a count of many digits": npy(header(shape=f"({'9' * 10_000},)")),
    "65 dimensions": npy(header(shape=f"({'1, ' * 65})"), bytes(4)),
    "no shape": npy("{'descr': '<f4', 'fortran_order': False}", bytes(4)),
    "a stranger's key": npy(header()[:-1] + "'more': 1}", bytes(8)),
    "the type twice": npy(header()[:-1] + "'descr': '<i4'}", bytes(8)),
    "order that is no boolean": npy(header(fortran="0"), bytes(8)),
    "no dictionary": npy("[1, 2]"),
    "an empty header": npy(""),
    "a type that is a number": npy(header("4"), bytes(8)),
    "a type with no such spelling": npy(header("'<f4<f4'"), bytes(8)),
    "an unclosed text": npy("{'descr': '<f4"),
    "too little data": npy(header(), bytes(7)),
    "too much data": npy(header(), bytes(9)),
    "two arrays": npy(header(), bytes(8)) * 2,
    "a header longer than the file": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b" " * 100,
    "no header": b"\x93NUMPY\x01\x00",
    "header that is no UTF-8": npy(b"{'descr': '\xff\xfe'}", version=b"\x03\x00"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_the_specification_forbids_is_refused_at_once(what, tmp_path):
    start = time.process_time()
    with pytest.raises(CorruptFileError):
        opened(tmp_path, FORBIDDEN[what])
    assert time.process_time() - start < 2
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("bad.npy", FORBIDDEN[what])
    with pytest.raises(CorruptFileError, match=r"bad\.npy"):
        wb.open(tmp_path / "x.npz")


@pytest.mark.parametrize(
    "content",
    [npy(header(), bytes(8), b"\x04\x00"), npy(header("'<x4'"), bytes(8)), npy(" " * (1 << 21) + header(), bytes(8), b"\x02\x00")],
)
def test_what_is_valid_and_not_read_is_refused_as_that(content, tmp_path):
    with pytest.raises(UnsupportedError):
        opened(tmp_path, content)


def test_a_record_that_states_more_than_its_bytes_can_hold_is_refused(tmp_path):
    """A zip bomb by statement: a hundred packed bytes that are said to be a gigabyte."""
    head = npy(header("'|u1'", f"({1 << 30},)"))
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", head)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    for field in (data.find(b"PK\x03\x04") + 22, data.find(b"PK\x01\x02") + 24):
        data[field : field + 4] = struct.pack("<I", len(head) + (1 << 30))
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(CorruptFileError, match="packed bytes cannot hold"):
        wb.open(tmp_path / "x.npz")


def test_a_megabyte_of_zeros_packed_a_thousandfold_is_read_in_blocks(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", w=np.zeros(1 << 24, dtype=np.uint8))
    assert (tmp_path / "x.npz").stat().st_size < 1 << 15
    assert sum(int(chunk.sum()) + chunk.numel() for _, chunk in wb.open(tmp_path / "x.npz")["w"].chunks()) == 1 << 24
