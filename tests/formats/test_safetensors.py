"""safetensors files, single and sharded, against the official library."""

import json
import os

import pytest
import torch
from conformance import FormatTests, state
from hypothesis import given
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from strategies import SAFETENSORS_DTYPES, same, state_dicts, tensors

import workbench as wb
from workbench.errors import MissingShardError


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
