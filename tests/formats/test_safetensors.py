"""safetensors files, single and sharded, against the official library."""

import json
import os
import time

import pytest
import torch
from conformance import FormatTests, state
from hypothesis import given
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from strategies import SAFETENSORS_DTYPES, bits, same, state_dicts, tensors

import workbench as wb
from workbench.errors import CorruptFileError, MissingShardError, UnknownFormatError, UnsupportedError


def by_safe_open(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.offset_keys()}


class TestSafetensors(FormatTests):
    magic = 9

    def build(self, folder):
        save_file(state(), folder / "model.safetensors", metadata={"format": "pt"})
        return folder / "model.safetensors", [folder / "model.safetensors"]

    def official(self, path):
        order = list(json.loads(path.read_bytes()[8:].split(b"}}")[0] + b"}}"))
        loaded = by_safe_open(path)
        return {name: loaded[name] for name in order if name in loaded}


class TestShardedSafetensors(FormatTests):
    """Two shards and their index, laid out as `save_pretrained` writes them."""

    magic = 13  # {"weight_map"

    def build(self, folder):
        tensors, shards = state(), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        weight_map = {name: shards[i % 2] for i, name in enumerate(tensors)}
        for shard in shards:
            save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, folder / shard)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map, "metadata": {"total_size": sum(t.nbytes for t in tensors.values())}}))
        return index, [folder / shards[0], folder / shards[1], index]

    def official(self, path):
        weight_map = json.loads(path.read_text())["weight_map"]
        loaded = {name: tensor for shard in set(weight_map.values()) for name, tensor in load_file(path.parent / shard).items()}
        return {name: loaded[name] for name in weight_map}

    def test_a_folder_opens_as_its_index(self, built):
        assert list(wb.open(built[0].parent)) == list(wb.open(built[0]))

    def test_a_missing_shard_is_named_and_the_others_are_listed(self, built):
        os.remove(built[1][1])
        with pytest.raises(MissingShardError, match="00002-of-00002") as caught:
            wb.open(built[0])
        assert set(caught.value.partial) == set(load_file(built[1][0]))

    def test_shards_without_an_index_are_put_together_by_their_names(self, built):
        expected = {name: bits(tensor) for name, tensor in self.official(built[0]).items()}
        os.remove(built[0])
        ckpt = wb.open(built[0].parent)
        assert {name: bits(tensor.load()) for name, tensor in ckpt.items()} == expected
        assert ("no index", "info") in [(f.kind, f.severity) for f in ckpt.findings]
        os.remove(built[1][0])
        with pytest.raises(MissingShardError, match="1 of 2 shards are not there: model-00001-of-00002") as caught:
            wb.open(built[0].parent)
        assert set(caught.value.partial) == set(load_file(built[1][1]))


class TestShardedTorchFiles(FormatTests):
    """`pytorch_model.bin.index.json`: one shard in torch's zip, one in its legacy container."""

    magic = 13

    def build(self, folder):
        shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
        tensors = {name: tensor for name, tensor in state().items() if name in ("layer.weight", "half", "step", "none")}
        weight_map = {name: shards[i % 2] for i, name in enumerate(tensors)}
        for i, shard in enumerate(shards):
            held = {n: t for n, t in tensors.items() if weight_map[n] == shard}
            torch.save(held, folder / shard, _use_new_zipfile_serialization=not i)
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": weight_map, "metadata": {}}))
        return index, [folder / shards[0], folder / shards[1], index]

    def official(self, path):
        weight_map = json.loads(path.read_text())["weight_map"]
        loaded = {name: tensor for shard in set(weight_map.values()) for name, tensor in torch.load(path.parent / shard).items()}
        return {name: loaded[name] for name in weight_map}

    def test_a_shard_that_would_execute_something_is_named(self, built):
        class Evil:
            def __reduce__(self):
                return os.system, ("echo executed > /tmp/never",)

        torch.save({**torch.load(built[1][0]), "evil": Evil()}, built[1][0])
        ckpt = wb.open(built[0])
        assert (list(ckpt), ckpt.dangers) == (list(json.loads(built[0].read_text())["weight_map"]), ("posix.system",))


def indexed(folder, weight_map):
    path = folder / "model.safetensors.index.json"
    path.write_text(weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map}))
    return path


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({"w": "../outside.safetensors"}, UnsupportedError),
        ({"w": "/etc/passwd"}, UnsupportedError),
        ({"w": "link.safetensors"}, UnsupportedError),
        ({"w": "config.txt"}, UnknownFormatError),
        ({"w": "."}, UnknownFormatError),
        ({"w": "a.safetensors\0"}, CorruptFileError),
        ({"missing": "a.safetensors"}, CorruptFileError),
        ({"w": 3}, CorruptFileError),
        ({"w": ""}, CorruptFileError),
        ('{"weight_map": ["a.safetensors"]}', CorruptFileError),
        ('{"weight_map": ' + "[" * 200_000, CorruptFileError),
        ('{"weight_map": {"w": "a.safetensors"}', CorruptFileError),
        ('{"weight_map": {}, "x": "\xff"}', CorruptFileError),
        ({f"w{i}": f"{i}.safetensors" for i in range(10_001)}, UnsupportedError),
    ],
)
def test_an_index_that_lies_is_refused(content, kind, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (folder / "a.safetensors", tmp_path / "outside.safetensors"):
        save_file({"w": torch.ones(2)}, path)
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "config.txt").write_text("no tensors here")
    path = indexed(folder, content)
    if isinstance(content, str):
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(kind):
        wb.open(path)


def test_an_index_that_names_itself_is_told_and_not_followed(tmp_path):
    with pytest.raises(CorruptFileError, match="the index names an index as a shard"):
        wb.open(indexed(tmp_path, {"w": "model.safetensors.index.json"}))


def test_aliases_in_shards_without_an_index_are_restored_over_all_of_them(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "m-00001-of-00002.safetensors", metadata={"tied": "b"})
    save_file({"b": torch.zeros(2)}, tmp_path / "m-00002-of-00002.safetensors", metadata={"format": "pt", "also": "b"})
    ckpt = wb.open(tmp_path)
    assert (set(ckpt), dict(ckpt.restored)) == ({"a", "b", "tied", "also"}, {"tied": "b", "also": "b"})
    assert ckpt["tied"].load().tolist() == [0, 0]


def test_links_inside_a_hub_cache_are_followed(tmp_path):
    root = tmp_path / "models--org--name"
    snapshot = root / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    save_file({"w": torch.ones(2)}, root / "blobs" / "123")
    (snapshot / "model-00001-of-00001.safetensors").symlink_to("../../blobs/123")
    (root / "blobs" / "456").write_text(json.dumps({"weight_map": {"w": "model-00001-of-00001.safetensors"}}))
    (snapshot / "model.safetensors.index.json").symlink_to("../../blobs/456")
    assert [list(wb.open(path)) for path in (snapshot / "model.safetensors.index.json", snapshot, root)] == [["w"]] * 3


@pytest.mark.parametrize(
    ("name", "missing"), [("m-00001-of-99999", "99998 of 99999"), ("m-00003-of-00002", "2 of 2"), ("m-00001-of-00000", None)]
)
def test_shards_that_count_wrongly_are_told_at_once(name, missing, tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    if missing is None:
        assert list(wb.open(tmp_path)) == ["w"]
        return
    start = time.process_time()
    with pytest.raises(MissingShardError, match=f"{missing} shards"):
        wb.open(tmp_path)
    assert time.process_time() - start < 2


def test_two_shards_that_hold_one_name_are_ambiguous_without_an_index(tmp_path):
    for i in (1, 2):
        save_file({"w": torch.ones(i)}, tmp_path / f"model-0000{i}-of-00002.safetensors")
    with pytest.raises(CorruptFileError, match="another shard holds too"):
        wb.open(tmp_path)


def test_a_tensor_that_the_index_forgets_is_told(tmp_path):
    save_file({"w": torch.ones(2), "v": torch.ones(1)}, tmp_path / "a.safetensors")
    ckpt = wb.open(indexed(tmp_path, {"w": "a.safetensors"}))
    assert [(f.kind, f.where["tensors"]) for f in ckpt.findings] == [("unindexed tensors", ["v"])]


@given(
    tensors=state_dicts(
        SAFETENSORS_DTYPES, tensor=tensors(SAFETENSORS_DTYPES).filter(lambda t: t.dtype != torch.float4_e2m1fn_x2 or t.ndim > 0)
    )
)
def test_any_file_the_official_writer_writes_is_listed_and_loaded(tensors, tmp_path):
    plain = {name: tensor.clone() if tensor.dtype != torch.float4_e2m1fn_x2 else tensor for name, tensor in tensors.items()}
    plain = {
        name: tensor for i, (name, tensor) in enumerate(plain.items()) if all(tensor is not other for other in list(plain.values())[:i])
    }
    try:
        save_file(plain, tmp_path / "any.safetensors")
    except (RuntimeError, ValueError):  # shared or strided 4-bit views, which the official writer refuses
        return
    ckpt, official = wb.open(tmp_path / "any.safetensors"), by_safe_open(tmp_path / "any.safetensors")
    assert set(ckpt) == set(official)
    assert all(same(ckpt[name].load(), tensor) for name, tensor in official.items())


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES, ids=str)
def test_each_dtype_keeps_its_bits(dtype, tmp_path):
    width = torch.empty(0, dtype=dtype).element_size()
    data = (
        torch.arange(8 * width, dtype=torch.uint8).view(dtype).reshape(2, 4) if dtype != torch.bool else torch.tensor([[True, False]] * 4)
    )
    save_file({"x": data}, tmp_path / "x.safetensors")
    found = wb.open(tmp_path / "x.safetensors")["x"]
    assert same(found.load(), by_safe_open(tmp_path / "x.safetensors")["x"])
    assert same(found.load(), data)


def test_aliases_that_save_model_recorded_are_restored(tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    save_model(model, str(tmp_path / "tied.safetensors"))
    ckpt = wb.open(tmp_path / "tied.safetensors")
    assert set(ckpt) == set(model.state_dict())
    assert len(ckpt.aliases) == 1
    assert all(same(ckpt[name].load(), tensor) for name, tensor in model.state_dict().items())


def test_metadata_is_text_and_makes_no_tensors(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors", metadata={"format": "pt", "note": "w2"})
    ckpt = wb.open(tmp_path / "m.safetensors")
    assert (list(ckpt), dict(ckpt.metadata)) == (["w"], {"format": "pt", "note": "w2"})


def test_a_tensor_called_as_the_framework_mark_is_not_listed_twice(tmp_path):
    save_file({"pt": torch.ones(2)}, tmp_path / "pt.safetensors", metadata={"format": "pt"})
    assert list(wb.open(tmp_path / "pt.safetensors")) == ["pt"]


def test_leading_spaces_before_the_header_are_accepted_as_the_official_reader_does(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    (tmp_path / "b.safetensors").write_bytes((length + 3).to_bytes(8, "little") + b"   " + data[8:])
    assert list(wb.open(tmp_path / "b.safetensors")) == list(by_safe_open(tmp_path / "b.safetensors"))


def test_an_index_that_names_a_tensor_twice_is_refused(tmp_path):
    for shard in ("a", "b"):
        save_file({"w": torch.ones(2)}, tmp_path / f"{shard}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}')
    with pytest.raises(CorruptFileError, match="twice"):
        wb.open(index)


def headed(path, header, nbytes=0):
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(nbytes))
    return path


def entry(name, *fields, at=0):
    parts = {"dtype": b'"dtype":"U8"', "shape": b'"shape" : [ 1 , 2 ]', "data_offsets": b'"data_offsets":[%d, %d]' % (at, at + 2)}
    return b'"%s":\n{%s}' % (name, b" , ".join(parts[field] for field in fields))


def test_a_table_opens_whatever_the_order_of_its_fields_and_the_space_between(tmp_path):
    rows = [entry(b"a", "dtype", "shape", "data_offsets"), b'"__metadata__" : { "k": "v\\n", "\xc3\xa9":"{" }']
    rows += [entry(b"\\u00e9", "data_offsets", "shape", "dtype", at=2), entry("\u4e2d".encode(), "shape", "dtype", "data_offsets", at=4)]
    path = headed(tmp_path / "m.safetensors", b"{" + b" , ".join(rows) + b"}  ", 6)
    ckpt = wb.open(path)
    assert list(ckpt) == ["a", "\u00e9", "\u4e2d"]
    assert dict(ckpt.metadata) == {"k": "v\n", "\u00e9": "{"}
    assert set(by_safe_open(path)) == set(ckpt)


NO_TABLES = {
    "floats": b'{"a":[' + b"1.5," * 5_000_000 + b"1]}",
    "small integers": b'{"a":[' + b"1," * 9_000_000 + b"1]}",
    "long integers": b'{"a":[' + b",".join([b"9" * 4299] * 5000) + b"]}",
    "lists": b'{"a":[' + b"[]," * 2_000_000 + b"1]}",
    "entries of metadata": b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(1_500_000)) + b"}}",
    "a long name": b'{"' + b"x" * (17 << 20) + b'":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    "escapes": b'{"__metadata__":{"a":"' + b"\\n" * 9_000_000 + b'"}}',
    "wide characters": b'{"__metadata__":{"a":"' + "\U0001f600".encode() + b"x" * (42 << 20) + b'"}}',
}


@pytest.mark.parametrize("what", NO_TABLES)
def test_a_large_header_that_is_no_table_is_refused_before_it_is_read_as_json(what, tmp_path, monkeypatch):
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it was read as JSON"))
    with pytest.raises(UnsupportedError, match="header"):
        wb.open(headed(tmp_path / "m.safetensors", NO_TABLES[what]))


def test_entries_are_listed_in_order_whatever_their_layout_and_none_is_taken_from_behind_something_else(tmp_path):
    rows = [f'"a.{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(5000)]
    rows[2000:4000:7] = [f'"a.{i}": {{ "shape":[1], "data_offsets":[{i},{i + 1}], "dtype":"U8" }}' for i in range(2000, 4000, 7)]
    path = tmp_path / "m.safetensors"

    def write(header: str) -> None:
        path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(range(250)) * 20)

    write("{" + ",".join(rows) + "}")
    ckpt = wb.open(path)
    assert list(ckpt) == [f"a.{i}" for i in range(5000)]
    assert [ckpt[f"a.{i}"].raw()[0] for i in (0, 2000, 2001, 4999)] == [0, 0, 1, 249]
    for wrong in ("7,", '"a.4999":', "},", "\0"):
        write("{" + ",".join(rows[:4990]) + "," + wrong + ",".join(rows[4990:]) + "}")
        with pytest.raises(CorruptFileError):
            wb.open(path)
