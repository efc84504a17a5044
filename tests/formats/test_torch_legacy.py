"""torch's legacy container, against torch.load(weights_only=True)."""

import io
import pickle
import struct
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conformance import FormatTests, state
from hostile_makers import HOOKS, PROTO, REBUILD, number, numbers, text
from hypothesis import given
from strategies import FLOATS, bits, leaves, same, state_dicts, training_trees

import workbench as wb
from workbench.errors import CorruptFileError, FormatError, UnknownFormatError, UnsupportedError

MAGIC = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def legacy(tree, path, protocol=2):
    torch.save(tree, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    return path


def tensors():
    base = torch.arange(12.0).view(3, 4)
    views = {"transposed": base.t(), "stepped": base[:, ::2], "expanded": base[:1].expand(2, 4), "tail": base[2]}
    return {**state(), **views, "big": torch.tensor([1 + 2j])}


class TestTorchLegacy(FormatTests):
    magic = 2

    def build(self, folder):
        return legacy(tensors(), folder / "model.pt"), [folder / "model.pt"]

    def official(self, path):
        return torch.load(path, weights_only=True)


class TestProtocol4(FormatTests):
    magic = 2

    def build(self, folder):
        return legacy({"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}, folder / "model.pt", 4), [folder / "model.pt"]

    def official(self, path):
        return torch.load(path, weights_only=False)


class TestProtocol1(TestProtocol4):
    magic = 28  # the number itself is all there is to tell the format by

    def build(self, folder):
        return legacy({"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}, folder / "model.pt", 1), [folder / "model.pt"]


@given(made=state_dicts(FLOATS))
def test_any_state_dict_is_listed_and_loaded_as_torch_does(made, tmp_path):
    ckpt = wb.open(legacy(made, tmp_path / "any.pt"))
    official = torch.load(tmp_path / "any.pt", weights_only=True)
    assert len(ckpt) == len(official)
    for lazy, tensor in zip(ckpt.values(), official.values(), strict=True):
        assert same(lazy.load(), tensor)
        assert b"".join(bits(chunk) for _, chunk in lazy.chunks(64)) == bits(tensor)


@given(tree=training_trees())
def test_every_tensor_of_a_training_tree_keeps_its_path_and_values(tree, tmp_path):
    ckpt = wb.open(legacy(tree, tmp_path / "tree.pt"))
    official = dict(leaves(torch.load(tmp_path / "tree.pt", weights_only=True)))
    assert {ckpt.paths[name] for name in ckpt} == set(official)
    for name, lazy in ckpt.items():
        assert same(lazy.load(), official[ckpt.paths[name]]), name


def test_ties_and_views_are_told_as_torch_restores_them(tmp_path):
    w = torch.randn(4, 3)
    ckpt = wb.open(legacy({"embed": w, "head": w, "view": w[1:], "copy": w.clone()}, tmp_path / "tied.pt"))
    assert ckpt.aliases == {"head": "embed"}
    assert ckpt["view"].source.storage == ckpt["embed"].source.storage != ckpt["copy"].source.storage


def test_saving_it_anew_gives_a_zip_that_torch_reads(tmp_path):
    wb.save(wb.open(legacy(tensors(), tmp_path / "old.pt")), tmp_path / "new.pt")
    new = torch.load(tmp_path / "new.pt", weights_only=True)
    assert all(same(new[name], tensor) for name, tensor in tensors().items())


def test_a_whole_model_is_listed_under_its_state_dict_names(tmp_path):
    model = torch.nn.Sequential(OrderedDict(fc=torch.nn.Linear(2, 3), norm=torch.nn.BatchNorm1d(3)))
    ckpt = wb.open(legacy(model, tmp_path / "whole.pt"))
    assert list(ckpt) == list(model.state_dict())
    assert all(same(ckpt[name].load(), tensor) for name, tensor in model.state_dict().items())


# files by hand


def pid(key, numel, cls="FloatStorage", view=b"N"):
    spelled = text(key) if isinstance(key, str) else key
    return b"(" + text("storage") + f"ctorch\n{cls}\n".encode() + spelled + text("cpu") + number(numel) + view + b"tQ"


def tensor(key, numel=3, *, shape=None, offset=0, cls="FloatStorage", view=b"N"):
    shape = (numel,) if shape is None else shape
    return REBUILD + b"(" + pid(key, numel, cls, view) + number(offset) + numbers(shape) + numbers((1,)) + b"\x89" + HOOKS + b"tR"


def three(*values):
    return struct.pack("<q3f", 3, *values)


def by_hand(path, pairs, keys, data, *, system=SYSTEM, version=1001, keys_pickle=None, tail=b""):
    body = PROTO + b"}(" + b"".join(text(name) + value for name, value in pairs) + b"u."
    listed = pickle.dumps(keys, protocol=2) if keys_pickle is None else keys_pickle
    system = system if isinstance(system, bytes) else pickle.dumps(system, protocol=2)
    path.write_bytes(MAGIC + pickle.dumps(version, protocol=2) + system + body + listed + data + tail)
    return path


REAL = [("weight", tensor("a")), ("bias", tensor("b"))]
REAL_DATA = three(1, 2, 3) + three(4, 5, 6)


def test_the_maker_makes_files_that_torch_reads(tmp_path):
    path = by_hand(tmp_path / "a.pt", REAL, ["a", "b"], REAL_DATA)
    assert {n: t.tolist() for n, t in torch.load(path, weights_only=True).items()} == {"weight": [1, 2, 3], "bias": [4, 5, 6]}
    ckpt = wb.open(path)
    assert {n: t.load().tolist() for n, t in ckpt.items()} == {"weight": [1, 2, 3], "bias": [4, 5, 6]}
    assert (ckpt.format, ckpt.findings) == ("torch-legacy", ())


def test_the_order_of_the_keys_is_the_order_of_the_storages(tmp_path):
    path = by_hand(tmp_path / "a.pt", REAL, ["b", "a"], REAL_DATA)
    assert torch.load(path, weights_only=True)["bias"].tolist() == wb.open(path)["bias"].load().tolist() == [1, 2, 3]


def test_big_endian_machines_wrote_the_same_bytes(tmp_path):
    path = by_hand(tmp_path / "a.pt", REAL, ["a", "b"], REAL_DATA, system={**SYSTEM, "little_endian": False})
    assert torch.load(path, weights_only=True)["weight"].tolist() == wb.open(path)["weight"].load().tolist() == [1, 2, 3]
    assert [f.kind for f in wb.open(path).findings] == ["big-endian writer"]


@pytest.mark.parametrize("keys", [(12, 7), (2**40, 7)])
def test_numbers_as_keys_as_python_2_wrote_them(keys, tmp_path):
    pairs = [("weight", tensor(f"I{keys[0]}\n".encode())), ("bias", tensor(f"L{keys[1]}L\n".encode()))]
    path = by_hand(tmp_path / "a.pt", pairs, list(keys), REAL_DATA)
    assert torch.load(path, weights_only=False)["bias"].tolist() == wb.open(path)["bias"].load().tolist() == [4, 5, 6]


def test_parts_of_storages_as_the_first_versions_wrote_them(tmp_path):
    view = text("v") + number(1) + number(2) + b"\x87"
    pairs = [("root", tensor("a")), ("part", tensor("a", view=view, shape=(2,)))]
    path = by_hand(tmp_path / "a.pt", pairs, ["a"], three(1, 2, 3))
    assert torch.load(path, weights_only=True)["part"].tolist() == wb.open(path)["part"].load().tolist() == [2, 3]
    assert wb.open(path)["part"].peek() == [2, 3]


def test_the_source_text_of_classes_is_not_used(tmp_path):
    module = b"(" + text("module") + b"cmine\nNet\n" + text("/home/me/net.py") + text("import os\nos.system('touch x')") + b"tQ"
    ckpt = wb.open(by_hand(tmp_path / "a.pt", [*REAL, ("net", module + b")\x81")], ["a", "b"], REAL_DATA))
    assert ckpt["weight"].load().tolist() == [1, 2, 3]
    assert ckpt.dangers == ("mine.Net",)


LOCKED = {
    "a key that the list omits": ([("weight", tensor("z")), ("bias", tensor("a"))], ["a"], three(1, 2, 3)),
    "one key as two dtypes": ([("other", tensor("a")), ("weight", tensor("a", cls="IntStorage"))], ["a"], three(1, 2, 3)),
    "one key with two lengths": ([("other", tensor("a")), ("weight", tensor("a", 2))], ["a"], three(1, 2, 3)),
    "past the storage": ([("weight", tensor("a", shape=(4,)))], ["a"], three(1, 2, 3)),
    "a tensor past its part": ([("weight", tensor("a", view=text("v") + b"K\x01K\x02\x87"))], ["a"], three(1, 2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("case", LOCKED)
def test_values_in_doubt_are_locked_and_named(case, tmp_path):
    pairs, keys, data = LOCKED[case]
    ckpt = wb.open(by_hand(tmp_path / "bad.pt", pairs, keys, data))
    assert any(f.kind == "values locked" and f.severity == "danger" for f in ckpt.findings)
    with pytest.raises(CorruptFileError, match="locked"):
        ckpt["weight"].load()
    for name in set(ckpt) - {"weight"}:
        assert ckpt[name].load().tolist() == [1, 2, 3]


REFUSED = {
    "a key that no tensor names": {"keys": ["a", "b", "c"], "data": REAL_DATA + three(7, 8, 9)},
    "a key twice": {"keys": ["a", "a"], "data": REAL_DATA},
    "a number and its text": {"pairs": [*REAL, ("n", tensor(b"K\x07")), ("t", tensor("7"))], "keys": ["a", "b", 7, "7"], "data": REAL_DATA * 2},
    "keys that are no list": {"keys": ("a", "b"), "data": REAL_DATA},
    "keys that are lists": {"keys": [["a"], "b"], "data": REAL_DATA},
    "keys that are true": {"keys": [True, "b"], "data": REAL_DATA},
    "keys by a call": {"keys": None, "keys_pickle": b"cbuiltins\nlist\n)R.", "data": REAL_DATA},
    "no keys": {"keys": None, "keys_pickle": b"", "data": b""},
    "another version": {"keys": ["a", "b"], "data": REAL_DATA, "version": 1002},
    "data cut": {"keys": ["a", "b"], "data": REAL_DATA[:-1]},
    "more elements than bytes": {"pairs": [("weight", tensor("a", 2**40))], "keys": ["a"], "data": REAL_DATA},
    "more elements than numbers": {"pairs": [("weight", tensor("a", 2**70))], "keys": ["a"], "data": REAL_DATA},
    "fewer than none": {"pairs": [("weight", tensor("a", -3))], "keys": ["a"], "data": REAL_DATA},
    "storage of no kind": {"pairs": [("weight", tensor("a", cls="Storages"))], "keys": ["a"], "data": REAL_DATA},
    "a part past its storage": {"pairs": [("weight", tensor("a", view=text("v") + b"K\x02K\x02\x87"))], "keys": ["a"], "data": three(1, 2, 3)},
    "a part of no length": {"pairs": [("weight", tensor("a", view=text("v") + b"\x85"))], "keys": ["a"], "data": three(1, 2, 3)},
    "a part told by true": {"pairs": [("weight", tensor("a", view=text("v") + b"\x88K\x01\x87"))], "keys": ["a"], "data": three(1, 2, 3)},
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_itself_is_refused_and_what_was_listed_is_kept(case, tmp_path):
    given = {"pairs": REAL, **REFUSED[case]}
    start = time.process_time()
    with pytest.raises(FormatError) as caught:
        wb.open(by_hand(tmp_path / "bad.pt", **given))
    assert isinstance(caught.value, (CorruptFileError, UnsupportedError))
    assert "bad.pt" in str(caught.value)
    assert caught.value.partial is not None
    if given["pairs"] == REAL and case != "another version":
        assert list(caught.value.partial) == ["weight", "bias"]
    assert time.process_time() - start < 2


def test_of_a_file_that_is_cut_the_storages_before_the_cut_are_read(tmp_path):
    path = by_hand(tmp_path / "cut.pt", REAL, ["a", "b"], REAL_DATA[:-4])
    with pytest.raises(CorruptFileError, match="the file is cut") as caught:
        wb.open(path)
    partial = caught.value.partial
    assert partial["weight"].load().tolist() == [1, 2, 3]
    with pytest.raises(CorruptFileError, match="locked"):
        partial["bias"].load()


def test_a_count_that_differs_is_found_when_the_storage_is_read(tmp_path):
    path = by_hand(tmp_path / "bad.pt", REAL, ["a", "b"], three(1, 2, 3) + struct.pack("<q3f", 4, 4, 5, 6))
    with pytest.raises(RuntimeError, match="wrong byte size"):
        torch.load(path, weights_only=True)
    ckpt = wb.open(path)
    assert ckpt["weight"].load().tolist() == [1, 2, 3]
    for read in (ckpt["bias"].load, ckpt["bias"].peek, ckpt["bias"].raw, lambda: list(ckpt["bias"].chunks())):
        with pytest.raises(CorruptFileError, match="its count of 3 elements"):
            read()


def test_bytes_after_the_last_storage_are_told(tmp_path):
    ckpt = wb.open(by_hand(tmp_path / "a.pt", REAL, ["a", "b"], REAL_DATA, tail=b"cos\nsystem\n."))
    assert ckpt["bias"].load().tolist() == [4, 5, 6]
    assert any(f.kind == "bytes after the pickle" for f in ckpt.findings)


EVIL = b"cos\nsystem\n" + text("touch x") + b"\x85R"
PLACES = {
    "in the object": {"pairs": [*REAL, ("evil", EVIL)]},
    "in the system pickle": {"system": PROTO + EVIL + b"0}."},
    "in the version's pickle": {"version": None},
    "in the list of keys": {"keys_pickle": PROTO + EVIL + b"0](" + text("a") + text("b") + b"e."},
    "as a persistent id": {"pairs": [*REAL, ("evil", b"(" + text("module") + EVIL + b"NNtQ")]},
}  # fmt: skip


@pytest.mark.parametrize("where", PLACES)
def test_a_danger_in_any_of_the_five_pickles_is_named_and_the_tensors_are_listed(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = by_hand(tmp_path / "evil.pt", **{"pairs": REAL, "keys": ["a", "b"], "data": REAL_DATA, **PLACES[where]})
    if where == "in the version's pickle":
        path.write_bytes(path.read_bytes().replace(b"\x80\x02N.", PROTO + EVIL + b"0M\xe9\x03.", 1))
    ckpt = wb.open(path)
    assert "os.system" in ckpt.dangers
    assert ckpt["weight"].load().tolist() == [1, 2, 3]
    assert not (tmp_path / "x").exists()


def test_a_danger_before_the_damage_is_named(tmp_path):
    with pytest.raises(CorruptFileError) as caught:
        wb.open(by_hand(tmp_path / "evil.pt", REAL, ["a", "b"], REAL_DATA, system=PROTO + EVIL + b"\xff"))
    assert "os.system" in caught.value.partial.dangers


def test_a_long_object_is_read_in_steps(tmp_path):
    tree = {"log": "x" * 700_000, "w": torch.ones(3), "words": [f"word {i}" for i in range(20_000)]}
    assert wb.open(legacy(tree, tmp_path / "long.pt"))["w"].load().tolist() == [1, 1, 1]


def test_listing_reads_no_tensor_data(tmp_path):
    def rchar():
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

    path = legacy({f"layer.{i}": torch.zeros(20_000) for i in range(300)}, tmp_path / "m.pt")
    before = rchar()
    assert len(wb.open(path)) == 300
    assert rchar() - before < 200_000


def test_a_buffer_saved_by_torch_opens(tmp_path):
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2)}, buffer, _use_new_zipfile_serialization=False)
    (tmp_path / "x.ckpt").write_bytes(buffer.getvalue())
    assert wb.open(tmp_path / "x.ckpt").format == "torch-legacy"


@pytest.mark.parametrize(
    "content",
    [
        b"# Title\n\nSome text.\n",
        b"config\nvalue\n",
        b"cat\ndog\nfish\n",
        b"certifi\nnumpy\nscipy\n",
        b"class Net:\n    pass\n",
        b"import os\nos.system('x')\n",
        b"N.B. this is a note.\n",
        b"Goodness. It is text.\n",
        b"(lambda x: x)\n",
        b"[1, 2, 3]\n",
        b"]. and ). and }.\n",
        b"I am text\n",
        b"a,b,c\n1,2,3\n",
        b"0.5 0.25\n",
        b"K1. first\n",
        b"X-Header: yes\n",
        b"global_step: 7\n",
        b"",
        b".",
        b"\n",
    ],
    ids=repr,
)
def test_text_is_not_called_a_pickle(content, tmp_path):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(UnknownFormatError):
        wb.open(tmp_path / "text")
