"""Folders of torch.distributed.checkpoint of which torch runs what nobody looked at: each is proved by torch itself, which leaves the mark."""

import base64
import collections
import contextlib
import copyreg
import io
import os
import pickle
import struct
import zipfile
from typing import ClassVar

import hostile_makers as make
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conformance import listing, values
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat, _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

import workbench as wb
from workbench.analyses import scanner
from workbench.analyses.scan_marks import Outline, alike_one
from workbench.errors import CorruptFileError, WorkbenchError
from workbench.files import Span
from workbench.files import place as place_of
from workbench.formats.zip_index import read_zip_index

pytestmark = pytest.mark.filterwarnings("ignore")


class Opcodes(tuple):
    """Raw opcodes, and objects between them that are pickled as ever."""


class Spelled(pickle._Pickler):
    def write_opcodes(self, obj):
        for part in obj:
            self.write(part) if isinstance(part, bytes) else self.save(part)

    dispatch: ClassVar = {**pickle._Pickler.dispatch, Opcodes: write_opcodes}


class Called:
    def __init__(self, *made):
        self.made = made

    def __reduce__(self):
        return self.made


def spell(folder, metadata, name=".metadata"):
    with (folder / name).open("wb") as file:
        Spelled(file, 2).dump(metadata)


def held(folder):
    with (folder / ".metadata").open("rb") as file:
        return pickle.load(file)  # torch's own


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "mark"


@pytest.fixture
def place(tmp_path, mark):
    """A folder of torch's, and where a pickle lies in the values of its tensor."""
    evil, folder = make.touch(mark) + b".", tmp_path / "d"
    dcp.save({"w": torch.frombuffer(bytearray(bytes(99) + evil), dtype=torch.uint8), "o": "hello"}, checkpoint_id=folder, no_dist=True)
    (part,) = folder.glob("*.distcp")
    return folder, part.name, part.read_bytes().index(evil), len(evil)


def require_danger(folder, mark, load=None):
    """It is told, by path and by checkpoint, without a trace; and torch runs it."""
    assert wb.scan(folder).dangers
    try:
        ckpt = wb.open(folder)
    except WorkbenchError:
        ckpt = None
    assert ckpt is None or wb.scan(ckpt).dangers
    assert not mark.exists()
    with contextlib.suppress(dcp.CheckpointException, RuntimeError):  # whatever torch makes of the result
        load() if load else dcp.load({"o": None}, checkpoint_id=folder, no_dist=True)
    assert mark.exists()


INDEX, OBJECT = MetadataIndex("o"), {"o": BytesStorageMetadata()}
STATE = {"state_dict_metadata": OBJECT, "planner_data": None}
SPELLINGS = {
    "the whole called with arguments": lambda at: Called(Metadata, (OBJECT, None, {INDEX: at}), STATE),
    "the table a call": lambda at: Metadata(OBJECT, None, Called(copyreg._reconstructor, (dict, dict, {INDEX: at}))),
    "the table a mapping of another kind": lambda at: Metadata(
        OBJECT, None, Called(collections.OrderedDict, (Called(copyreg._reconstructor, (dict, dict, {INDEX: at})),))
    ),
    "a place called with arguments": lambda at: Metadata(OBJECT, None, {INDEX: Called(_StorageInfo, (at.relative_path, at.offset, at.length))}),
    "an index called with arguments": lambda at: Metadata(OBJECT, None, {Called(MetadataIndex, ("o",), {"index": None}): at}),
}  # fmt: skip


@pytest.mark.parametrize("spelled", SPELLINGS)
def test_metadata_that_is_not_spelled_as_torch_does_is_refused(spelled, place, mark):
    folder, name, start, length = place
    spell(folder, SPELLINGS[spelled](_StorageInfo(name, start, length)))
    with pytest.raises(CorruptFileError):
        wb.open(folder)
    require_danger(folder, mark)


def test_a_state_is_what_it_was_when_it_was_given(place, mark):
    """An object takes the entries of its state; what is put into the same dict later is none of its own."""
    folder, name, start, length = place
    metadata = held(folder)
    state = {"relative_path": name, "offset": start, "length": length}
    honest = metadata.storage_data[INDEX]
    metadata.storage_data[INDEX] = Opcodes([_StorageInfo, b")\x81", state, b"b"])
    metadata.later = Opcodes([state, "offset", honest.offset, b"s", "length", honest.length, b"s"])
    spell(folder, metadata)
    require_danger(folder, mark)


@pytest.mark.parametrize("alone", [False, True])
def test_what_each_rank_wrote_for_itself_is_an_index_too(alone, place, mark):
    """torch reads it where it fails to read the one of all ranks, as for a harmless class that is not installed."""
    folder, name, start, length = place
    metadata, first = held(folder), (folder / ".metadata").read_bytes()
    metadata.storage_data[INDEX] = _StorageInfo(name, start, length)
    spell(folder, metadata, "__0.metadata")
    (folder / ".metadata").unlink() if alone else (folder / ".metadata").write_bytes(b"\x80\2comegaconf.nodes\nAnyNode\n0" + first)
    require_danger(folder, mark)


def test_what_one_rank_wrote_for_itself_is_listed(place):
    folder = place[0]
    expected = listing(wb.open(folder)), values(wb.open(folder))
    (folder / ".metadata").rename(folder / "__0.metadata")
    found, official = wb.open(folder), {"o": None, "w": torch.zeros_like(wb.open(folder)["w"].load())}
    dcp.load(official, checkpoint_id=folder, no_dist=True)
    assert (listing(found), values(found), found.extras["o"]) == (*expected, "hello")
    assert torch.equal(found["w"].load(), official["w"])
    assert wb.scan(folder)
    (folder / "__1.metadata").write_bytes((folder / "__0.metadata").read_bytes())
    assert wb.scan(folder)


def moved(front, size):
    """An archive of torch's whose places count from the start of what stands before it."""
    out = io.BytesIO(front)
    torch.save("hello", saved := io.BytesIO())
    with zipfile.ZipFile(saved) as archive, zipfile.ZipFile(out, "a") as changed:
        for name in archive.namelist():
            changed.writestr(name, archive.read(name))
        changed.writestr("archive/data/0", b"\1" * size)
    return out.getvalue()


def program(mark, size):
    """A TorchScript archive that writes a file when it is loaded."""

    class Writes(torch.nn.Module):
        @torch.jit.export
        def __getstate__(self) -> bool:
            return self.training

        @torch.jit.export
        def __setstate__(self, state: bool) -> None:
            self.training = state

        def forward(self, x):
            return x

    torch.jit.save(torch.jit.script(Writes()), saved := io.BytesIO())
    with zipfile.ZipFile(saved) as archive, zipfile.ZipFile(out := io.BytesIO(), "w") as changed:
        for name in archive.namelist():
            line = f'    torch.save(torch.ones([2]), "{mark}")\n    self.training = state'.encode()
            changed.writestr(name, archive.read(name).replace(b"    self.training = state", line))
        changed.writestr(archive.namelist()[0].partition("/")[0] + "/extra/more", bytes(size))
    return out.getvalue()


@pytest.mark.parametrize("kind", ["a pickle before an archive", "a program"])
@pytest.mark.parametrize("size", [10, 5 << 20])
def test_an_object_that_is_no_plain_archive_is_a_danger(kind, size, place, mark):
    """In a file behind another archive, or all of it; and larger than what open looks at."""
    folder, name, _, _ = place
    before = (folder / name).read_bytes() if kind != "a program" else b""
    blob = program(mark, size) if kind == "a program" else moved(make.touch(mark) + b".", size)
    (folder / name).write_bytes(before + blob)
    metadata = held(folder)
    metadata.storage_data = {INDEX: _StorageInfo(name, len(before), len(blob))}
    metadata.state_dict_metadata = OBJECT
    spell(folder, metadata)
    require_danger(folder, mark)


@pytest.mark.parametrize("name", ["model.pt", "common.pt"])
def test_other_files_of_the_folder_are_opened_and_scanned(name, place, mark):
    folder = place[0]
    torch.save({"iteration": 5}, folder / name)
    assert wb.scan(folder)
    if name == "model.pt":
        (folder / name).write_bytes(program(mark, 10))
    else:  # to this machine it breaks off before the call, and to C it does not
        (folder / name).write_bytes(b"\x80\2cos\n__all__\n(e0](K\1K\2ecbuiltins\nslice\nNN\x86R]s0" + make.touch(mark) + b".")
    require_danger(folder, mark, lambda: torch.load(folder / name, weights_only=False))


def test_an_object_whose_bytes_nobody_can_look_at_is_a_danger(place):
    folder = place[0]
    metadata = held(folder)
    del metadata.storage_data[INDEX]
    spell(folder, metadata)
    assert [(f.kind, f.severity) for f in wb.open(folder).findings] == [("unreadable pickle", "danger")]
    assert wb.scan(folder).dangers


def test_a_checkpoint_that_is_a_link_out_of_its_folder_is_a_danger(tmp_path):
    (tmp_path / "d").mkdir()
    torch.save({"w": torch.ones(2)}, tmp_path / "d" / "model.pt")
    (tmp_path / "blob").write_bytes(make.touch(tmp_path / "mark") + b".")
    os.symlink("../blob", tmp_path / "d" / "notes.txt")
    assert wb.scan(tmp_path / "d")
    os.symlink("../blob", tmp_path / "d" / "pytorch_model.bin")
    assert wb.scan(tmp_path / "d").dangers


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("old", [False, True])
def test_an_honest_folder_of_any_writer_is_no_alarm(protocol, old, place):
    """Before torch 2.3 the properties of a tensor were of another class."""
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

    folder = place[0]
    metadata = held(folder)
    if old:
        metadata.state_dict_metadata["w"].properties = TensorProperties(dtype=torch.uint8)
        del metadata.storage_meta, metadata.version
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
    assert (list(wb.open(folder)), wb.open(folder).findings) == (["w"], ())
    assert not [f for f in wb.scan(folder).findings if f.severity != "info"]


def test_an_honest_folder_in_safetensors_is_no_alarm(tmp_path):
    writer = FileSystemWriter(tmp_path / "d", serialization_format=SerializationFormat.SAFETENSORS)
    dcp.save({"w": torch.ones(40), "o": "hello", "n": [1, 2]}, storage_writer=writer, no_dist=True)
    assert not [f for f in wb.scan(tmp_path / "d").findings if f.severity != "info"]
    (part,) = (tmp_path / "d").glob("*.distcp")
    part.write_bytes(part.read_bytes() + moved(b"", 10))
    assert wb.scan(tmp_path / "d").dangers


def test_programs_inside_of_files_are_looked_into_within_one_bound(place, mark, monkeypatch):
    (part,) = place[0].glob("*.distcp")
    part.write_bytes(part.read_bytes() + 3 * program(mark, 10).replace(b"torch.save(", b"torch.sqrt("))
    monkeypatch.setattr(scanner, "_MOST_CODE", 100)
    assert any("programs inside of files" in found.message for found in wb.scan(place[0]).dangers)


def test_a_vocabulary_beside_a_model_is_no_checkpoint(tmp_path):
    """SentencePiece calls its own `tokenizer.model`."""
    torch.save({"w": torch.ones(2)}, tmp_path / "model.pt")
    piece = b"\n\x05<unk>\x15\0\0\0\0\x18\2"
    (tmp_path / "tokenizer.model").write_bytes(b"\n" + bytes([len(piece)]) + piece)
    assert wb.scan(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(make.touch(tmp_path / "mark") + b".")
    assert wb.scan(tmp_path).dangers


MANY = {
    "tensors of their own shapes": lambda i: torch.zeros(i + 1),
    "tensors with numbers": lambda i: (torch.randn(3), i),
    "texts": lambda i: "x" * (7 * i) + str(i),
    "numbers that begin as a pickle does": lambda i: torch.full((i + 1,), 128, dtype=torch.int32),
}


@pytest.mark.parametrize("what", MANY)
def test_many_small_archives_of_torch_are_one_kind_whatever_their_lengths(what, tmp_path, monkeypatch):
    monkeypatch.setattr(scanner, "_MOST_UNLIKE", 8)
    dcp.save({f"k{i}": MANY[what](i) for i in range(60)}, checkpoint_id=tmp_path / "d", no_dist=True)
    report = wb.scan(tmp_path / "d")
    assert report.ok
    assert not [f for f in report.findings if f.kind == "stray record"]


def saved(value):
    torch.save(value, out := io.BytesIO())
    return out.getvalue()


def test_an_archive_is_alike_only_where_nothing_but_its_payloads_is_another(tmp_path):
    one, other = saved((torch.ones(3), "a")), saved((torch.zeros(50), "a longer text" * 9))
    (tmp_path / "f").write_bytes(one + other)
    file = place_of(str(tmp_path / "f"))
    outline = Outline.of(read_zip_index(file, Span(file, 0, len(one))), Span(file, 0, len(one)))
    area = Span(file, len(one), len(other))
    found = alike_one(area, [outline])
    assert [(span.read(), is_pickle) for span, is_pickle in found] == [(zipfile.ZipFile(io.BytesIO(other)).read("archive/data.pkl"), True)]
    free = {at for start, stop in outline.payloads(area) for at in range(start, stop)}
    for at in sorted({*range(len(other))} - free):
        (tmp_path / "g").write_bytes(other[:at] + bytes([other[at] ^ 1]) + other[at + 1 :])
        file = place_of(str(tmp_path / "g"))
        assert alike_one(Span(file, 0, file.size), [outline]) is None, at


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_in_any_one_of_many_archives_is_named(tmp_path, mark):
    dcp.save({f"k{i}": (torch.ones(i + 1), i) for i in range(30)}, checkpoint_id=tmp_path / "d", no_dist=True)
    (part,) = (tmp_path / "d").glob("*.distcp")
    clean = part.read_bytes()
    values = torch.frombuffer(bytearray(6 * b"\x80\2" + make.touch(mark) + b"."), dtype=torch.uint8)
    for evil in (Evil(mark), (values, 1)):
        part.write_bytes(clean + saved(evil))
        found = wb.scan(tmp_path / "d").dangers
        assert any(str(f.where.get("global")).endswith(".system") for f in found)
    part.write_bytes(clean)
    assert wb.scan(tmp_path / "d", crc=True).ok
    part.write_bytes(clean[:-100].replace(struct.pack("<ff", 1, 1), struct.pack("<ff", 1, 2)) + clean[-100:])
    assert "checksum" in {found.kind for found in wb.scan(tmp_path / "d", crc=True).dangers}


OPAQUE = "__torch__.torch.classes.aten.OpaqueObject"


def test_a_class_that_unpickles_its_state_is_named_wherever_its_program_lies(tmp_path, place, mark):
    """Its `__setstate__` hands a text to pickle.loads."""
    name = OPAQUE.rpartition(".")[0].encode() + b"\nOpaqueObject\n"
    text = base64.b64encode(make.touch(mark) + b".")
    records = {
        "data.pkl": b"\x80\x02c__torch__\nM\n)\x81}X\1\0\0\0oc" + name + b")\x81X" + struct.pack("<I", len(text)) + text + b"bsb.",
        "constants.pkl": b"\x80\x02).",
        "code/__torch__.py": b"class M(Module):\n  __parameters__ = []\n  __buffers__ = []\n",
        "version": b"3\n",
    }
    with zipfile.ZipFile(tmp_path / "ts.pt", "w") as archive:
        for record, data in records.items():
            archive.writestr(f"archive/{record}", data)
    program = (tmp_path / "ts.pt").read_bytes()
    (part,) = place[0].glob("*.distcp")
    part.write_bytes(part.read_bytes() + program)
    torch.save({"a": 1}, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt", "a") as archive:
        archive.writestr("m/more", program)
    torch.save({"a": program}, tmp_path / "n.pt")
    for path in (tmp_path / "ts.pt", tmp_path / "m.pt", tmp_path / "n.pt", place[0]):
        report = wb.scan(path)
        assert any(found.where.get("global") == OPAQUE for found in report.dangers)
        assert {use.verdict for use in report.globals if use.name == OPAQUE} <= {"dangerous", "unknown"}


@pytest.mark.parametrize("value", [128, 640])
@pytest.mark.parametrize("ends", [b"", b"\1\2c\3"])
def test_values_that_repeat_the_first_mark_of_a_pickle_are_no_alarm(value, ends, tmp_path):
    tensor = torch.cat([torch.full((400_000,), value, dtype=torch.int16), torch.frombuffer(bytearray(ends or b"\1\1"), dtype=torch.int16)])
    torch.save({"w": tensor}, tmp_path / "m.pt")
    dcp.save({"w": tensor, "v": tensor.flip(0), "o": "text"}, checkpoint_id=tmp_path / "d", no_dist=True)
    assert wb.scan(tmp_path / "m.pt").ok
    assert wb.scan(tmp_path / "d").ok


def test_sources_beside_a_model_and_in_a_byte_string_are_a_warning(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "src.zip", "w") as archive:
        archive.writestr("src/train.py", "import os")
    torch.save({"src": (tmp_path / "src.zip").read_bytes()}, tmp_path / "with.pt")
    for path in (tmp_path, tmp_path / "with.pt"):
        report = wb.scan(path)
        assert report.ok
        assert any("program or script" in found.message for found in report.findings if found.severity == "warning")
    with zipfile.ZipFile(tmp_path / "with.pt", "a") as archive:
        archive.writestr("with/train.py", "import os")
    assert any("program or script" in found.message for found in wb.scan(tmp_path).dangers)
