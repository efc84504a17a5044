"""Files that torch, numpy or a second reader takes for something else than their first look says. Each is refused, or told as a danger."""

import contextlib
import io
import os
import pickle
import struct
import time
import zipfile

import hostile_makers as make
import numpy as np
import onnx
import pytest
import torch
from conformance import SECONDS
from strategies import same

import workbench as wb
from workbench.errors import CorruptFileError, WorkbenchError


@pytest.mark.parametrize("twin", ["archive/DATA/0", "archive/Data.pkl", "archive/BYTEORDER"])
def test_two_records_that_differ_by_case_are_refused(twin, tmp_path):
    """torch finds records whatever the case of their letters, and takes the first."""
    path = make.torch_zip(tmp_path / "m.pt", make.pickled(make.REAL))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(twin, bytes(12))
    with pytest.raises(CorruptFileError, match="case"):
        wb.open(path)
    assert not wb.scan(path)


def test_a_byte_order_counts_however_its_record_is_spelled(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("archive/data.pkl", make.pickled([("w", make.tensor())]))
        archive.writestr("archive/ByteOrder", "big")
        archive.writestr("archive/data/0", struct.pack(">3f", 1, 2, 3))
        archive.writestr("archive/version", "3\n")
    expected = torch.load(tmp_path / "m.pt", weights_only=True)["w"]
    assert same(wb.open(tmp_path / "m.pt")["w"].load(), expected)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float8_e5m2, torch.float32, torch.int64])
def test_a_big_endian_file_reads_as_torch_reads_it(dtype, tmp_path):
    """Storages without a type are not swapped by torch, those with one are."""
    torch.save({"w": torch.tensor([1, 2, 3]).to(dtype)}, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as old, zipfile.ZipFile(tmp_path / "big.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("byteorder") else old.read(name))
    expected = torch.load(tmp_path / "big.pt", weights_only=True)["w"]
    assert same(wb.open(tmp_path / "big.pt")["w"].load(), expected)


def glob(module, name):
    return f"c{module}\n{name}\n".encode()


CALLS = {
    "a dtype that is a class": make.PROTO + glob("numpy", "dtype") + glob("builtins", "object") + b"\x85R.",
    "a dtype in words": make.PROTO + glob("numpy", "dtype") + make.text("object") + b"\x85R.",
    "an array over bytes": make.PROTO + glob("numpy", "ndarray") + b"K\x01\x85" + make.text("O") + b"C\x08abcdefgh\x87R.",
    "a callback of numpy's": make.PROTO
    + glob("numpy.random._pickle", "__generator_ctor")
    + make.text("x")
    + glob("torch.storage", "_load_from_bytes")
    + b"\x86R.",
    "a callback of torch's": make.PROTO
    + glob("torch._tensor", "_rebuild_from_type_v2")
    + b"("
    + glob("torch.storage", "_load_from_bytes")
    + glob("torch", "Tensor")
    + make.text("x")
    + b"\x85}tR.",
    "a loader put where pickle calls it": make.PROTO
    + glob("types", "SimpleNamespace")
    + b")R}"
    + make.text("append")
    + glob("torch.storage", "_load_from_bytes")
    + b"sbC\x01xa.",
    "a loader put where BUILD calls it": make.PROTO
    + glob("argparse", "Namespace")
    + b")\x81}"
    + make.text("__setstate__")
    + glob("torch.storage", "_load_from_bytes")
    + b"sbC\x01xb.",
    "a harmless name with arguments, called by torch's wrapper": make.PROTO
    + glob("torch._tensor", "_rebuild_from_type_v2")
    + b"("
    + glob("collections", "defaultdict")
    + glob("torch", "Tensor")
    + glob("torch.nn.modules.linear", "Linear")
    + b"\x85}tR.",
}


@pytest.mark.parametrize("program", CALLS.values(), ids=CALLS.keys())
def test_a_harmless_name_used_harmfully_is_a_danger(program, tmp_path):
    (tmp_path / "m.pkl").write_bytes(program)
    assert not wb.scan(tmp_path / "m.pkl")
    path = make.torch_zip(tmp_path / "m.pt", program)
    assert not wb.scan(path)
    with contextlib.suppress(WorkbenchError):
        assert wb.open(path).dangers


def strings_in_strings(levels, times=1500):
    """A byte string that refers to one byte string many times, and so on inside."""
    data = b"\x80\x03K\1."
    for _ in range(levels):
        data = b"\x80\x03]q\0(B" + struct.pack("<I", len(data)) + data + b"q\1" + b"h\1" * (times - 1) + b"e."
    return data


def archives_in_archives(levels, times=12):
    data = b"\x80\x02K\1."
    for _ in range(levels):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for index in range(times):
                archive.writestr(f"r{index}.x", data)
        data = buffer.getvalue()
    return data


@pytest.mark.parametrize("data", [strings_in_strings(4), archives_in_archives(6)], ids=["byte strings", "archives"])
def test_files_inside_files_end_soon(data, tmp_path):
    (tmp_path / "m.bin").write_bytes(data)
    started = time.process_time()
    report = wb.scan(tmp_path / "m.bin")
    assert time.process_time() - started < 3 * SECONDS
    assert report.pickles or not report


@pytest.mark.parametrize("odd", ["a folder", "a pipe", "a broken link", "a link that leads away"])
def test_what_is_no_file_beside_a_checkpoint_does_not_hide_it(odd, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"w": torch.ones(2)}, folder / "model.pt")
    config = folder / "config.json"
    (tmp_path / "away.json").write_text("{}")
    {"a folder": config.mkdir, "a pipe": lambda: os.mkfifo(config), "a broken link": lambda: config.symlink_to("none.json"),
     "a link that leads away": lambda: config.symlink_to(tmp_path / "away.json")}[odd]()  # fmt: skip
    ckpt = wb.open(folder)
    assert ckpt["w"].load().tolist() == [1, 1]
    assert "config.json" not in ckpt.metadata
    assert [finding.kind for finding in ckpt.findings] == ["other files"]


@pytest.mark.parametrize(
    "data",
    [
        make.PROTO + b"}(" + b"K\x01" + b"".join(b"q\0(h\0h\0\x86h\0\x91" for _ in range(45)) + b"Nu.",
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + b"\x80\x02" + b"K\x01" + b"".join(b"q\0h\0\x86" for _ in range(45)) + b".",
        make.PROTO + glob("numpy", "dtype") + b"K\x01" + b"".join(b"q\0h\0\x86" for _ in range(45)) + b"\x85R.",
    ],
    ids=["a key of frozensets", "a version of tuples", "a dtype of tuples"],
)  # fmt: skip
def test_what_repeats_itself_is_never_spelled_out(data, tmp_path):
    (tmp_path / "m.pt").write_bytes(data)
    started = time.process_time()
    assert not wb.scan(tmp_path / "m.pt")
    with contextlib.suppress(WorkbenchError):
        str(wb.open(tmp_path / "m.pt"))
    assert time.process_time() - started < 2 * SECONDS


# what torch runs where nobody looked: each is proved by torch itself, which leaves the mark


def behind(front, archive):
    """A zip archive whose places count from the start of what stands before it, as `zip -A` leaves one."""
    data, shift = bytearray(front + archive), len(front)
    with zipfile.ZipFile(io.BytesIO(archive)) as held:
        at, count = held.start_dir + shift, len(held.infolist())
    end = data.rindex(b"PK\5\6")
    wide = end - 76
    assert data[wide : wide + 4] == b"PK\6\6"
    for place, form in ((end + 16, "<I"), (end - 12, "<Q"), (wide + 48, "<Q")):
        struct.pack_into(form, data, place, struct.unpack_from(form, data, place)[0] + shift)
    for _ in range(count):
        name, extra, comment = struct.unpack_from("<HHH", data, at + 28)
        struct.pack_into("<I", data, at + 42, struct.unpack_from("<I", data, at + 42)[0] + shift)
        at += 46 + name + extra + comment
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["safetensors", "npy"])
def test_a_program_behind_another_format_is_a_danger(kind, tmp_path):
    out, path = io.BytesIO(), tmp_path / f"m.{kind}"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 1)), out)
    program = out.getvalue()
    if kind == "safetensors":
        make.safetensors(path, {"a": make.entry(0, len(program), (len(program),), "U8")})
        front = path.read_bytes()
    else:
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({len(program)},), }}".ljust(117).encode() + b"\n"
        front = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
    path.write_bytes(behind(front, program))
    assert torch.jit.load(path)(torch.ones(1, 2)).shape == (1, 1)  # torch reads the program
    assert wb.open(path).format == kind
    assert {found.kind for found in wb.scan(path).dangers} == {"polyglot"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stated", [0, 9])
def test_a_program_whose_end_only_zip64_tells_is_a_danger(stated, tmp_path):
    """torch asks the ZIP64 record where the directory lies, and never how long the comment is."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 1)), out := io.BytesIO())
    program, path = out.getvalue(), tmp_path / "m.safetensors"
    make.safetensors(path, {"a": make.entry(0, len(program), (len(program),), "U8")})
    data = bytearray(behind(path.read_bytes(), program))
    struct.pack_into("<IIH", data, data.rindex(b"PK\5\6") + 12, 0xFFFFFFFF, 0xFFFFFFFF, stated)
    path.write_bytes(data)
    assert torch.jit.load(path)(torch.ones(1, 2)).shape == (1, 1)  # torch reads the program
    assert wb.open(path).format == "safetensors"
    assert "polyglot" in {found.kind for found in wb.scan(path).dangers}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["inside the values of a tensor", "in a folder below", "and beyond its file's end"])
@pytest.mark.parametrize("length", [200, 5 << 20])
def test_objects_of_a_dcp_folder_are_looked_at_wherever_they_lie(place, length, tmp_path):
    import torch.distributed.checkpoint as dcp

    folder, mark = tmp_path / "d", tmp_path / "mark"
    evil = make.touch(mark) + b"."
    values = torch.zeros(length + 200, dtype=torch.uint8)
    values[100 : 100 + len(evil)] = torch.frombuffer(bytearray(evil), dtype=torch.uint8)
    dcp.save({"w": values, "o": "hello"}, checkpoint_id=folder, no_dist=True)
    (part,) = folder.glob("*.distcp")
    name, at = part.name, part.read_bytes().index(evil)
    if place == "in a folder below":
        (folder / "below").mkdir()
        (folder / "below" / "x").write_bytes(evil.ljust(length, b"\0"))
        name, at = "below/x", 0
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)  # torch's own, written above
    (entry,) = (told for index, told in metadata.storage_data.items() if index.fqn == "o")
    entry.relative_path, entry.offset, entry.length = name, at, length + (1 << 30) * (place == "and beyond its file's end")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "os.system" in {found.where.get("global") for found in wb.scan(folder).dangers}
    assert not mark.exists()
    with pytest.raises(dcp.CheckpointException):  # after torch ran it
        dcp.load({"w": values, "o": None}, checkpoint_id=folder, no_dist=True)
    assert mark.exists()


@pytest.mark.parametrize("stated", [9, 0])
def test_a_second_end_record_that_other_readers_take_is_refused(stated, tmp_path):
    """torch and Python take the last mark of an archive's end, whatever length of comment it states."""
    inner, path = make.torch_zip(tmp_path / "a.pt", make.pickled(make.REAL)).read_bytes(), tmp_path / "m.pt"
    at = inner.rindex(b"PK\5\6")
    other = inner[:at] + inner[at : at + 20] + struct.pack("<H", stated) + b"x" * (4 * (stated == 0))
    torch.save({"w": torch.ones(1)}, path)
    outer = path.read_bytes()
    assert outer[-2:] == b"\0\0"
    path.write_bytes(outer[:-2] + struct.pack("<H", len(other)) + other)
    with pytest.raises(CorruptFileError, match="two end records"):
        wb.open(path)
    assert not wb.scan(path)


@pytest.mark.filterwarnings("ignore")
def test_a_program_inside_a_pickle_whose_values_are_none_is_a_danger(tmp_path):
    """torch.load hands every archive with constants.pkl to torch.jit.load, which reads that first."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 1)), tmp_path / "p.pt")
    with zipfile.ZipFile(tmp_path / "p.pt") as archive, zipfile.ZipFile(tmp_path / "q.pt", "w") as changed:
        for name in archive.namelist():
            changed.writestr(name, pickle.dumps("hello", 2) if name.endswith("/data.pkl") else archive.read(name))
    held = (tmp_path / "q.pt").read_bytes()
    (tmp_path / "m.pkl").write_bytes(b"\x80\3ctorch.storage\n_load_from_bytes\n" + make.nested(held) + b"\x85R.")
    assert "unreadable" in {found.kind for found in wb.scan(tmp_path / "m.pkl").dangers}


@pytest.mark.filterwarnings("ignore")
def test_a_transform_that_is_not_told_plainly_is_a_danger(tmp_path):
    """An empty torch.Size is true to whoever sees a call, and false to torch, which then reads the bytes as they are."""
    import torch.distributed.checkpoint as dcp

    dcp.save({"o": "hello"}, checkpoint_id=tmp_path / "d", no_dist=True)
    with (tmp_path / "d" / ".metadata").open("rb") as file:
        metadata = pickle.load(file)  # torch's own, written above
    for entry in metadata.storage_data.values():
        entry.transform_descriptors = torch.Size([])
    (tmp_path / "d" / ".metadata").write_bytes(pickle.dumps(metadata))
    assert wb.scan(tmp_path / "d").dangers


@pytest.mark.filterwarnings("ignore")
def test_thousands_of_objects_of_a_dcp_folder_are_no_alarm(tmp_path):
    import torch.distributed.checkpoint as dcp

    dcp.save({f"p{i}.lr": i / 7 for i in range(2200)} | {"w": torch.ones(3)}, checkpoint_id=tmp_path / "d", no_dist=True)
    report = wb.scan(tmp_path / "d")
    assert not report.dangers, report


def test_every_record_that_torch_takes_for_a_model_is_looked_at_as_one(tmp_path):
    path = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(2, 1), (torch.ones(1, 2),)), path)
    assert wb.scan(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.namelist()[0].partition("/")[0] + "/models/other.text", b"{}")
    assert "model in doubt" in {found.kind for found in wb.scan(path).dangers}


def test_a_call_of_a_name_that_a_call_makes_is_told_wherever_it_stands(tmp_path):
    """The opcode at which this machine breaks off is itself the one that names."""
    mark, path = tmp_path / "mark", tmp_path / "m.pt"
    name = b"cbuiltins\nstr\n%bU\5ascii\x86R"
    evil = b"\x80\2" + name % b"C\2os" + name % b"C\6system" + b"\x93U" + bytes([6 + len(str(mark))]) + f"touch {mark}".encode() + b"\x85R."
    torch.save({"a": torch.ones(1)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.namelist()[0].partition("/")[0] + "/extra/notes", evil)
    assert not wb.scan(path)
    assert not mark.exists()
    pickle.loads(evil)
    assert mark.exists()


def test_a_pickle_that_only_our_limits_stop_is_told(tmp_path):
    """C goes on behind a key of tuples in tuples; what follows would run."""
    mark = tmp_path / "mark"
    evil = b"})" + b"\x85" * 17 + b"Ns0" + make.touch(mark) + b"."
    (tmp_path / "vocab.dat").write_bytes(evil)
    torch.save({"a": torch.ones(1)}, tmp_path / "m.pt")
    assert not wb.scan(tmp_path)
    assert not mark.exists()
    pickle.loads(evil)
    assert mark.exists()


def test_packed_zeros_and_arrays_of_numbers_are_no_alarm(tmp_path):
    """Bytes that push values on and on, as the zero points of packed 4-bit weights do, and fields that are called as objects are."""
    torch.export.save(torch.export.export(Zeros(), (torch.ones(1),)), tmp_path / "m.pt2")
    np.save(tmp_path / "a.npy", np.zeros(3, dtype=[("O", "<i4"), ("object", "<f4")]))
    for path in tmp_path.iterdir():
        report = wb.scan(path)
        assert not report.dangers, report


class Zeros(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("qzeros", torch.full((1_200_000,), 0x88, dtype=torch.uint8))

    def forward(self, x):
        return x + self.qzeros[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_flatbuffer_behind_another_format_is_a_danger(tmp_path):
    """An ONNX model whose first eight bytes also are a flatbuffer's: where its root lies, and its mark."""
    torch.jit.save_jit_module_to_flatbuffer(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "m.ff"))
    program = (tmp_path / "m.ff").read_bytes()
    start = int.from_bytes(b"\x08\x08\x12\x04", "little") - int.from_bytes(program[:4], "little")

    def model(skipped):
        tensor = onnx.TensorProto(
            name="w", data_type=onnx.TensorProto.INT8, dims=[skipped + len(program)], raw_data=bytes(skipped) + program
        )
        graph = onnx.GraphProto(name="g", initializer=[tensor])
        return onnx.ModelProto(ir_version=8, producer_name="PTMF", graph=graph, opset_import=[onnx.OperatorSetIdProto(version=17)])

    data = model(start - (model(start).SerializeToString().index(program) - start)).SerializeToString()
    (tmp_path / "m.onnx").write_bytes(data)
    assert data.startswith(b"\x08\x08\x12\x04PTMF")
    assert wb.open(tmp_path / "m.onnx")["w"].dtype.name == "int8"
    assert torch.jit.load(tmp_path / "m.onnx")(torch.ones(1, 2)).shape == (1, 2)
    assert "polyglot" in {f.kind for f in wb.scan(tmp_path / "m.onnx").dangers}
