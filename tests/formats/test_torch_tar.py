"""torch's oldest container, against torch.load(weights_only=False) on archives written here as torch 0.1 wrote them."""

import io
import itertools
import pickle
import struct
import tarfile
import time

import numpy as np
import pytest
import torch
from conformance import FormatTests
from hostile_makers import text
from strategies import bits, same

import workbench as wb
from workbench.analyses import scan_pickles
from workbench.errors import CorruptFileError, FormatError, UnknownFormatError
from workbench.formats import torch_tar
from workbench.formats.pickle_vm import Machine

SYSTEM = {"protocol_version": 1000, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
TYPES = {
    torch.float32: "Float",
    torch.float64: "Double",
    torch.float16: "Half",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.int16: "Short",
    torch.uint8: "Byte",
}


class _Ids(pickle.Pickler):
    """Tensors by the text of their object ids."""

    def __init__(self, file, protocol, ids):
        super().__init__(file, protocol)
        self.ids = ids

    def persistent_id(self, value):
        if isinstance(value, torch.Tensor):
            return str(self.ids.setdefault(id(value), (1000 + len(self.ids), value))[0])
        return None


def tar_members(tree, protocol=2, views=()):
    """The four members, as torch 0.1's _save made them: storages once each, tensors as views of them."""
    ids, out = {}, io.BytesIO()
    _Ids(out, protocol, ids).dump(tree)
    storages, tensors = {}, pickle.dumps(len(ids), protocol)
    for key, tensor in ids.values():
        storage = tensor.untyped_storage()
        number = 5000 + list(storages).index(storage._cdata) if storage._cdata in storages else 5000 + len(storages)
        storages[storage._cdata] = (number, tensor, storage)
        tensors += pickle.dumps((key, number, getattr(torch, f"{TYPES[tensor.dtype]}Tensor")), protocol)
        n = tensor.ndim
        tensors += struct.pack(f"<ii{2 * n + 1}q", n, 0, *tensor.shape, *tensor.stride(), tensor.storage_offset())
    data = pickle.dumps(len(storages), protocol)
    for number, tensor, storage in storages.values():
        data += pickle.dumps((number, "cpu", getattr(torch, f"{TYPES[tensor.dtype]}Storage")), protocol)
        data += struct.pack("<q", storage.nbytes() // tensor.element_size()) + bytes(storage)
    data += pickle.dumps(list(views), protocol)
    return {"sys_info": pickle.dumps(SYSTEM, protocol), "pickle": out.getvalue(), "tensors": tensors, "storages": data}


def tarred(members, path, change=None):
    """The archive as Python's own tarfile writes it: with extended headers, for the dates have fractions."""
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1480000000.5
            if change is not None:
                change(info)
            archive.addfile(info, io.BytesIO(data) if info.size else None)
    return path


def tensors():
    w = torch.arange(12.0).view(3, 4)
    return {"w": w, "t": w.t(), "tail": w[2], "half": torch.randn(3).half(), "n": torch.tensor([1, 2]), "tied": w}


class TestTorchTar(FormatTests):
    magic = 512

    def build(self, folder):
        members = tar_members({"w": torch.arange(6.0).view(2, 3), "n": torch.tensor([7, 8])})
        path = tarred(members, folder / "model.pt", lambda info: setattr(info, "mtime", 1480000000))
        data = path.read_bytes().rstrip(b"\0")  # tarfile pads to 10,240 bytes
        path.write_bytes(data + bytes(-len(data) % 512 + 1024))
        return path, [path]

    def official(self, path):
        return torch.load(path, weights_only=False)


@pytest.mark.parametrize("protocol", [1, 2, 4])
def test_views_and_ties_are_those_that_torch_restores(protocol, tmp_path):
    path = tarred(tar_members({"model": tensors(), "epoch": 3}, protocol), tmp_path / "m.pt")
    ckpt, official = wb.open(path), torch.load(path, weights_only=False)
    assert (ckpt.format, ckpt.findings, ckpt.extras) == ("torch-tar", (), {"epoch": 3})
    assert list(ckpt) == [f"model.{name}" for name in official["model"]]
    for name, tensor in official["model"].items():
        assert same(ckpt[f"model.{name}"].load(), tensor), name
        assert b"".join(bits(chunk) for _, chunk in ckpt[f"model.{name}"].chunks(8)) == bits(tensor)
    assert ckpt.aliases == {"model.tied": "model.w"}


def test_parts_of_storages_are_read(tmp_path):
    members = tar_members({"w": torch.arange(6.0)}, views=[(77, 5000, 2, 3)])
    members["tensors"] = (
        pickle.dumps(2) + members["tensors"][5:] + pickle.dumps((1001, 77, torch.FloatTensor)) + struct.pack("<iiqqq", 1, 0, 2, 1, 1)
    )
    members["pickle"] = b"\x80\x02}(" + text("w") + text("1000") + b"Q" + text("part") + text("1001") + b"Qu."
    path = tarred(members, tmp_path / "m.pt")
    assert members["tensors"][:5] == pickle.dumps(2)
    assert torch.load(path, weights_only=False)["part"].tolist() == wb.open(path)["part"].load().tolist() == [3, 4]


def test_classes_with_their_source_stay_inert(tmp_path):
    members = tar_members({"w": torch.arange(3.0)})
    members["pickle"] = b"\x80\x02}(" + text("w") + text("1000") + b"Q" + text("net") + b"(cmine\nNet\nNNtQ)\x81u."
    ckpt = wb.open(tarred(members, tmp_path / "m.pt"))
    assert ckpt["w"].load().tolist() == [0, 1, 2]
    assert ckpt.dangers == ("mine.Net",)


def test_a_tensor_that_was_never_given_room_is_empty(tmp_path):
    members = tar_members({"w": torch.arange(3.0)})
    members["tensors"] = pickle.dumps(1) + pickle.dumps((1000, None, torch.IntTensor), 2) + struct.pack("<iiq", 0, 0, 0)
    members["pickle"] = b"\x80\x02}" + text("w") + text("1000") + b"Qs."
    with pytest.raises(CorruptFileError, match="locked"):  # no dimensions mean one element, and there is none
        wb.open(tarred(members, tmp_path / "m.pt"))["w"].load()


def one(**changes):
    return {**tar_members({"w": torch.arange(3.0)}), **changes}


def counted(count, *rest):
    return pickle.dumps(count, 2) + b"".join(rest)


STORAGE = pickle.dumps((5000, "cpu", torch.FloatStorage), 2)
DATA = struct.pack("<q3f", 3, 0, 1, 2)
NONE = pickle.dumps([], 2)
TENSOR = pickle.dumps((1000, 5000, torch.FloatTensor), 2)
VIEW = struct.pack("<iiqqq", 1, 0, 3, 1, 0)


def test_the_parts_put_together_are_a_file_that_torch_reads(tmp_path):
    path = tarred(one(storages=counted(1, STORAGE, DATA, NONE), tensors=counted(1, TENSOR, VIEW)), tmp_path / "m.pt")
    assert torch.load(path, weights_only=False)["w"].tolist() == wb.open(path)["w"].load().tolist() == [0, 1, 2]


SHARED = b"]q\0" + b"".join(b"0(h%ch%cl" % (n, n) + b"q%c" % (n + 1) for n in range(60))  # written out it has no end
REFUSED = {
    "more storages than told": one(storages=counted(2, STORAGE, DATA, NONE)),
    "fewer than no storages": one(storages=counted(-1, NONE)),
    "storages without end": one(storages=counted(2**62, STORAGE, DATA, NONE)),
    "no count": one(storages=pickle.dumps("1")),
    "a storage of two parts": one(storages=counted(1, pickle.dumps((1, 2)), DATA, NONE)),
    "a storage of no kind": one(storages=counted(1, pickle.dumps((5000, "cpu", 3), 2), DATA, NONE)),
    "a storage of another class": one(storages=counted(1, pickle.dumps((5000, "cpu", dict), 2), DATA, NONE)),
    "a storage whose id is text": one(storages=counted(1, pickle.dumps(("5000", "cpu", torch.FloatStorage), 2), DATA, NONE)),
    "a storage whose id is a list": one(storages=counted(1, pickle.dumps(([], "cpu", torch.FloatStorage), 2), DATA, NONE)),
    "a storage whose id is lists in lists": one(storages=counted(1, b"\x80\x02(" + SHARED + text("cpu") + b"ctorch\nFloatStorage\nt.", DATA, NONE)),
    "a tensor whose id is lists in lists": one(tensors=counted(1, b"\x80\x02(" + SHARED + b"K\1ctorch\nFloatTensor\nt.", VIEW)),
    "a storage whose id has 6,000 digits": one(storages=counted(1, pickle.dumps((1 << 20000, "cpu", torch.FloatStorage), 2), DATA, NONE)),
    "a storage twice": one(storages=counted(2, STORAGE, DATA, STORAGE, DATA, NONE)),
    "more elements than bytes": one(storages=counted(1, STORAGE, struct.pack("<q", 2**61), NONE)),
    "fewer elements than none": one(storages=counted(1, STORAGE, struct.pack("<q", -1), NONE)),
    "a part of nothing": one(storages=counted(1, STORAGE, DATA, pickle.dumps([(7, 8, 0, 1)]))),
    "a part of a list": one(storages=counted(1, STORAGE, DATA, pickle.dumps([(7, [], 0, 1)]))),
    "a part past its storage": one(storages=counted(1, STORAGE, DATA, pickle.dumps([(7, 5000, 2, 2)]))),
    "a part with the id of a storage": one(storages=counted(1, STORAGE, DATA, pickle.dumps([(5000, 5000, 0, 1)]))),
    "a tensor on nothing": one(tensors=counted(1, pickle.dumps((1000, 6000, torch.FloatTensor), 2), VIEW)),
    "a tensor on a list": one(tensors=counted(1, pickle.dumps((1000, [], torch.FloatTensor), 2), VIEW)),
    "a tensor with a storage's id": one(tensors=counted(1, pickle.dumps((5000, 5000, torch.FloatTensor), 2), VIEW)),
    "fewer dimensions than none": one(tensors=counted(1, TENSOR, struct.pack("<iiq", -1, 0, 0))),
    "a billion dimensions": one(tensors=counted(1, TENSOR, struct.pack("<iiq", 2**30, 0, 0))),
    "a negative size": one(tensors=counted(1, TENSOR, struct.pack("<iiqqq", 1, 0, -3, 1, 0))),
    "a negative offset": one(tensors=counted(1, TENSOR, struct.pack("<iiqqq", 1, 0, 3, 1, -1))),
    "dimensions cut": one(tensors=counted(1, TENSOR, VIEW[:-1])),
    "an id of no object": one(pickle=b"\x80\x02}" + text("w") + text("9") + b"Qs."),
    "an id that is no number": one(pickle=b"\x80\x02}" + text("w") + text("x" * 5000) + b"Qs."),
    "an id that is a list": one(pickle=b"\x80\x02}" + text("w") + b"]Qs."),
    "no pickle": {k: v for k, v in one().items() if k != "pickle"},
    "no storages": {k: v for k, v in one().items() if k != "storages"},
    "a pickle that is none": one(pickle=b"x"),
    "two members of one name": [*one().items(), ("storages", one()["storages"])],
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_itself_is_refused(case, tmp_path):
    start = time.process_time()
    with pytest.raises(CorruptFileError) as caught:
        wb.open(tarred(REFUSED[case], tmp_path / "bad.pt"))
    assert "bad.pt" in str(caught.value)
    assert time.process_time() - start < 2


def test_a_tensor_past_its_storage_is_locked(tmp_path):
    ckpt = wb.open(tarred(one(tensors=counted(1, TENSOR, struct.pack("<iiqqq", 1, 0, 4, 1, 0))), tmp_path / "bad.pt"))
    with pytest.raises(CorruptFileError, match="locked"):
        ckpt["w"].load()


EVIL = b"cos\nsystem\n" + text("touch executed") + b"\x85R"


@pytest.mark.parametrize("where", ["pickle", "tensors", "storages"])
def test_a_danger_in_any_member_is_named_and_the_tensors_are_listed(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    members = one()
    members[where] = b"\x80\x02" + EVIL + b"0" + members[where][2:]
    ckpt = wb.open(tarred(members, tmp_path / "evil.pt"))
    assert ckpt.dangers == ("os.system",)
    assert ckpt["w"].load().tolist() == [0, 1, 2]
    assert not (tmp_path / "executed").exists()


def kind(value, **more):
    def change(info):
        if info.name == "storages":
            info.type = value
            for name, told in more.items():
                setattr(info, name, told)

    return change


ARCHIVES = {
    "a symbolic link": kind(tarfile.SYMTYPE, linkname="/etc/passwd", size=0),
    "a hard link": kind(tarfile.LNKTYPE, linkname="pickle", size=0),
    "a device": kind(tarfile.CHRTYPE, size=0),
    "a pipe": kind(tarfile.FIFOTYPE, size=0),
    "a folder": kind(tarfile.DIRTYPE, size=0),
    "another name in the extended header": kind(tarfile.REGTYPE, pax_headers={"path": "pickle"}),
    "another size in the extended header": kind(tarfile.REGTYPE, pax_headers={"size": "3"}),
    "a sparse file": kind(tarfile.REGTYPE, pax_headers={"GNU.sparse.map": "0,0"}),
}  # fmt: skip


@pytest.mark.parametrize("case", ARCHIVES)
def test_what_is_no_plain_member_is_refused(case, tmp_path):
    with pytest.raises(CorruptFileError):
        wb.open(tarred(one(), tmp_path / "bad.pt", ARCHIVES[case]))


@pytest.mark.parametrize("at", [124, 135, 148, 156, 0, 257])
def test_a_header_that_is_changed_is_refused(at, tmp_path):
    path = tarred(one(), tmp_path / "bad.pt")
    data = bytearray(path.read_bytes())
    last = data.rindex(b"storages\0")
    data[last + at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptFileError):
        wb.open(path)


def test_sizes_in_base_256_are_read(tmp_path):
    path = tarred(one(), tmp_path / "m.pt")
    data = bytearray(path.read_bytes())
    for name in (b"storages\0", b"pickle\0"):
        at = data.rindex(name)
        size = int(data[at + 124 : at + 135], 8)
        data[at + 124 : at + 136] = b"\x80" + size.to_bytes(11, "big")
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    path.write_bytes(data)
    assert torch.load(path, weights_only=False)["w"].tolist() == wb.open(path)["w"].load().tolist() == [0, 1, 2]


def number(value, width, spelling="octal"):
    """A number of a tar header: as POSIX writes it, and as Python's int() and GNU's base-256 read it too."""
    if spelling == "base-256":
        return b"\x80" + value.to_bytes(width - 1, "big")
    digits = f"{value:o}"
    told = {"plus": f"+{digits}", "prefix": f"0o{digits}", "underscore": f"{digits[0]}_{digits[1:]}".rstrip("_")}
    return told.get(spelling, digits.zfill(width - 1)).encode().ljust(width)


def in_tar(front, size, spelling="octal", fill=b" "):
    """`front` as a tar header: its first 100 bytes are the name. By itself it has no NULs, and may be text in another format."""
    head = bytearray(front[:100].ljust(100, b"x") + fill * 412)
    head[100:108], head[124:136], head[156:157] = b"0000644 ", number(size, 12, spelling), b"0"
    if spelling == "signed":
        head[300:304] = "éé".encode()
    total = 256 + sum(struct.unpack("148b8x356b" if spelling == "signed" else "148B8x356B", head))
    head[148:156] = number(total, 8, spelling)
    return bytes(head)


def member(name, data, spelling="octal"):
    return in_tar(name.encode().ljust(100, b"\0"), len(data), spelling, b"\0") + data + bytes(-len(data) % 512)


SPELLINGS = ["octal", "plus", "prefix", "underscore", "base-256", "signed"]


def in_legacy_file(spelling, members):
    """A file as torch 1.0 wrote it, with its header in a string of the system's description, and a tar behind it."""
    out = io.BytesIO()
    torch.save({"w": torch.arange(4.0)}, out, _use_new_zipfile_serialization=False)
    out.seek(0)
    front = b"".join(pickle.dumps(pickle.load(out), 2) for _ in range(2)) + b"\x80\x02}X\1\0\0\0aX"
    pickle.load(out)
    tail = b"s." + out.read()
    front += struct.pack("<I", 512 - len(front) - 4)
    return in_tar(front, len(tail), spelling) + tail + bytes(-len(tail) % 512) + members


def in_safetensors(spelling, members):
    """A header with a long text in it, and one tensor that is the rest of the tar."""
    text_ = b'{"__metadata__":{"k":"'
    tail = b'"},"w":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (len(members), len(members))
    tail += b" " * (-len(tail) % 512)
    front = struct.pack("<Q", 512 - 8 + len(tail)) + text_
    return in_tar(front, len(tail), spelling) + tail + members


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("other", [in_legacy_file, in_safetensors])
def test_a_file_that_is_a_tar_and_something_else_is_refused(other, spelling, tmp_path):
    """torch.load asks Python's tarfile before anything but zip."""
    made = {"storages": pickle.dumps(0, 2) + NONE, "tensors": pickle.dumps(0, 2), "pickle": pickle.dumps({"a": 1}, 2)}
    path = tmp_path / "model.pt"
    path.write_bytes(other(spelling, b"".join(member(*item) for item in made.items()) + bytes(1024)))
    assert torch.load(path, weights_only=False) == {"a": 1}
    with pytest.raises(CorruptFileError, match="tar archive"):
        wb.open(path)
    assert {"polyglot", "unreadable"} <= {finding.kind for finding in wb.scan(path).dangers}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_numbers_are_read_as_tarfile_reads_them(spelling, tmp_path):
    path = tmp_path / "m.pt"
    path.write_bytes(b"".join(member(name, data, spelling) for name, data in one().items()) + bytes(1024))
    assert torch.load(path, weights_only=False)["w"].tolist() == wb.open(path)["w"].load().tolist() == [0, 1, 2]


def test_an_array_whose_bytes_are_a_header_by_chance_is_an_array(tmp_path):
    """A blank checksum is 0, and 0 is the signed sum of some arrays."""
    values = np.zeros(1000, "u1")
    np.save(tmp_path / "a.npy", values)
    above = 256 + sum(struct.unpack("128b", (tmp_path / "a.npy").read_bytes()[:128]))
    values[250 : 250 + above // 128], values[380] = 0x80, 256 - above % 128
    np.save(tmp_path / "a.npy", values)
    tarfile.TarInfo.frombuf((tmp_path / "a.npy").read_bytes()[:512], "latin-1", "strict")
    assert wb.open(tmp_path / "a.npy").format == "npy"
    assert wb.scan(tmp_path / "a.npy").ok


@pytest.mark.parametrize("count", [12, 13, 100])
def test_an_archive_of_many_members_is_refused_and_not_read_in_part(count, tmp_path):
    """tarfile takes the last member of a name, and that is the pickle behind all the others."""
    more = [(f"f{i}", b"") for i in range(count)]
    path = tarred([*one().items(), *more, ("pickle", pickle.dumps({"a": 1}, 2))], tmp_path / "m.pt", lambda info: setattr(info, "mtime", 0))
    assert torch.load(path, weights_only=False) == {"a": 1}
    with pytest.raises(FormatError):
        wb.open(path)
    assert not wb.scan(path)


@pytest.mark.parametrize("names", [["a.txt", "b/c.pt"], [f"{i:05}.jpg" for i in range(500)], []])
def test_an_archive_of_something_else_is_named(names, tmp_path):
    with pytest.raises(UnknownFormatError, match="tar archive" if names else "."):
        wb.open(tarred([(name, b"x") for name in names], tmp_path / "x.tar"))


def test_a_listing_reads_little(tmp_path):
    from pathlib import Path

    path = tarred(tar_members({f"w{i}": torch.zeros(30_000) for i in range(100)}), tmp_path / "m.pt")

    def rchar():
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

    before = rchar()
    assert len(wb.open(path)) == 100
    assert rchar() - before < 300_000


def test_no_error_of_another_kind_escapes_from_a_member_that_is_cut(tmp_path):
    members = one()
    for name in ("tensors", "storages"):
        for cut in range(len(members[name])):
            with pytest.raises(FormatError):
                wb.open(tarred({**members, name: members[name][:cut]}, tmp_path / "cut.pt"))


@pytest.mark.parametrize("kind", ["python 3", "python 2", "marked"])
def test_a_description_is_what_the_machine_makes_of_it_however_it_is_damaged(kind):
    def place(name):
        return b"U" + bytes([len(name)]) + name if kind == "python 2" else b"X" + struct.pack("<I", len(name)) + name

    mark, end = (b"(", b"t") if kind == "marked" else (b"", b"\x87")
    keys = (b"J\1\2\3\4", b"I140234567890000\n", b"\x8a\6\0\1\2\3\4\5", b"K\7")
    for first, second in zip(keys, (place(b"cpu"), place(b"cuda:1"), b"M\1\2", b"N"), strict=True):
        good = b"\x80\2" + mark + first + second + b"q\1ctorch\nFloatStorage\nq\2" + end + b"q\3."
        assert torch_tar.description(good + b"tail").nbytes == len(good)
        for at, bit in itertools.product(range(len(good)), range(8)):
            data = good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :] + bytes(8)
            if told := torch_tar.description(data):
                machine = Machine(data, persistent=None, construct=None)
                assert (machine.run(), machine.end, machine.globals) == (told.value, told.nbytes, {told.value[2]: told.offset})


def test_scan_tells_the_same_of_descriptions_as_of_pickles_run_one_by_one(tmp_path, monkeypatch):
    path = tarred(tar_members({f"layer.{i}.weight": torch.ones(i + 1) for i in range(30)}), tmp_path / "m.pt")
    ran = []
    honest = scan_pickles.run_first
    monkeypatch.setattr(scan_pickles, "run_first", lambda *args: ran.append(args) or honest(*args))
    fast = wb.scan(path)
    assert fast.ok
    assert len(fast.pickles) > 60 > len(ran)
    monkeypatch.setattr(scan_pickles, "description", lambda _: None)
    assert vars(wb.scan(path)) == vars(fast)
    assert len(ran) > 60
