"""GGUF written by us against the gguf library: what its reader lists, what its dequantizer makes of it, what its encoder would have stored."""

import multiprocessing
import struct
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from conformance import FormatTests
from gguf_makers import DECODED, TYPES, Hand, by_gguf, packed, u32, u64, write_split
from gguf_makers import write as by_library
from hypothesis import given
from hypothesis import strategies as st
from memory import peak_over_base
from strategies import bits, same

import workbench as wb
from workbench.checkpoint import Checkpoint
from workbench.errors import MissingDependencyError, SelectionError, UnsupportedError, WorkbenchError


def encodes(kind):
    try:
        gguf.quants.quantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][0]), np.float32), kind)
    except NotImplementedError:
        return False
    return gguf.GGML_QUANT_SIZES[kind][0] > 1


ENCODED = [kind for kind in TYPES if encodes(kind)]
VERSION = {"general__quantization_version": gguf.GGML_QUANT_VERSION}  # what a file with blocks is to state
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def values(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def encoded(tensor, kind):
    """The bytes that the library makes of the whole tensor."""
    return gguf.quants.quantize(tensor.float().numpy(), kind).tobytes()


def written(path):
    """name -> (type, shape, bytes), by the official reader."""
    return {
        t.name: (t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), np.array(t.data).tobytes())
        for t in gguf.GGUFReader(path).tensors
    }


def pairs(path):
    """key -> (types, bytes) of every pair, by the official reader."""
    fields = gguf.GGUFReader(path).fields.values()
    return {f.name: (f.types, [part.tobytes() for part in f.parts]) for f in fields if not f.name.startswith("GGUF.")}


class TestGgufOfOurs(FormatTests):
    """Every type that the format has, by our writer, listed and loaded as the library does."""

    magic = 4

    def build(self, folder):
        state = {
            "blk.0.weight": values(3, 64),
            "blk.0.bias": torch.tensor([float("nan"), -0.0, float("inf")]),
            "half": values(5, dtype=torch.float16),
            "brain": values(2, 3, dtype=torch.bfloat16),
            "wide": values(2, 2, dtype=torch.float64),
            "turned": values(4, 3).t(),
            "step": torch.tensor(7),
            "scalar": torch.tensor(1.5, dtype=torch.bfloat16),  # the library reads none of this type: F32
            "counts of ü": torch.arange(7, dtype=torch.int8),
            "short": torch.arange(3, dtype=torch.int16),
            "int": torch.arange(3, dtype=torch.int32),
        }
        wb.save(state, folder / "model.gguf", types={"blk.*": "Q8_0"})
        return folder / "model.gguf", [folder / "model.gguf"]

    def official(self, path):
        return by_gguf(path)

    def test_offset_is_where_the_bytes_lie(self, built):
        data, found = built[0].read_bytes(), wb.open(built[0])
        for tensor in gguf.GGUFReader(built[0]).tensors:
            source = found[tensor.name].source.storage
            start = source.span.start if tensor.name == "blk.0.weight" else found[tensor.name].offset
            assert data[start:][: tensor.n_bytes] == tensor.data.tobytes()
            assert not start % 32


@pytest.mark.parametrize("kind", ENCODED, ids=lambda kind: kind.name)
def test_blocks_are_the_librarys_bit_for_bit(kind, tmp_path):
    """Of a file, of live tensors in any order of memory, of computed ones; many steps of the executor and of the encoder."""
    big = 600 if kind is not TYPES.MXFP4 else 70  # 15 times as slow
    state = {
        "w": values(big, 1024),
        "line": values(1, 512),
        "cube": values(2, 3, 256),
        "turned": values(512, 7).t(),
        "zeros": torch.zeros(2, 256),
    }
    torch.save(state, tmp_path / "source.pt")
    for ckpt in (
        wb.open(tmp_path / "source.pt"),
        wb.open(state),
        wb.ops.cast(wb.open(state), "bfloat16"),
        wb.ops.cast(wb.open(state), "float64"),
    ):
        report = wb.save(ckpt, tmp_path / "q.gguf", types=kind.name.lower())
        expected = {name: (kind.name, tuple(t.shape), encoded(t.load(), kind)) for name, t in ckpt.items()}
        assert written(tmp_path / "q.gguf") == expected
        assert report.notes[0].startswith("5 × ")
        official = by_gguf(tmp_path / "q.gguf")
        assert all(same(tensor.load(), official[name]) for name, tensor in wb.open(tmp_path / "q.gguf").items())


@given(data=st.data())
def test_any_shape_is_written_as_the_library_would(data, tmp_path):
    kind = data.draw(st.sampled_from([TYPES.Q8_0, TYPES.Q4_0, TYPES.Q4_1, TYPES.Q5_0, TYPES.Q5_1, TYPES.TQ2_0]))
    state = {}
    for i in range(data.draw(st.integers(1, 5))):
        shape = [*data.draw(st.lists(st.integers(1, 4), max_size=3)), data.draw(st.sampled_from([1, 31, 32, 64, 96, 256, 512]))]
        tensor = values(*shape, dtype=data.draw(st.sampled_from(FLOATS)), seed=data.draw(st.integers(0, 99)))
        state[f"t{i}"] = tensor.transpose(0, -1).contiguous().transpose(0, -1) if data.draw(st.booleans()) else tensor
    wb.save(state, tmp_path / "q.gguf", types=kind.name)
    found = written(tmp_path / "q.gguf")
    assert list(found) == list(state)
    for name, tensor in state.items():
        taken = tensor.ndim > 1 and not tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]
        if taken:
            expected = kind.name, encoded(tensor, kind)
        elif tensor.ndim == 1 and tensor.dtype.itemsize < 4:
            expected = "F32", bits(tensor.float())
        else:
            expected = (
                {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}[tensor.dtype],
                bits(tensor),
            )
        assert found[name] == (expected[0], tuple(tensor.shape), expected[1]), name


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "F64"])
def test_plain_types_are_torchs_own_casts(kind, tmp_path):
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}[kind]
    state = {f"{i}": values(3, 5, dtype=given_dtype) for i, given_dtype in enumerate([*FLOATS, torch.float8_e4m3fn])}
    wb.save(state, tmp_path / "x.gguf", types=kind)
    assert {name: kind for name, (kind, _, _) in written(tmp_path / "x.gguf").items()} == dict.fromkeys(state, kind)
    assert all(same(wb.open(tmp_path / "x.gguf")[name].load(), tensor.to(dtype)) for name, tensor in state.items())


def test_each_glob_has_its_type_and_the_report_tells_every_kind(tmp_path):
    state = {"a.weight": values(2, 64), "b.weight": values(2, 64), "c.weight": values(2, 33), "norm": values(64), "ids": torch.arange(3)}
    state |= {"half": values(64, dtype=torch.float16), "tail": values(64)}
    report = wb.save(state, tmp_path / "x.gguf", types={"*": "Q8_0", "b.*": "Q4_0", "tail": "Q5_1"})
    kinds = {name: kind for name, (kind, _, _) in written(tmp_path / "x.gguf").items()}
    assert kinds == {"a.weight": "Q8_0", "b.weight": "Q4_0", "c.weight": "F32", "norm": "F32", "ids": "I64", "half": "F32", "tail": "Q5_1"}
    assert set(report.notes[:7]) == {
        "1 × F32 → Q8_0", "1 × F32 → Q4_0", "1 × F32 → Q5_1", "1 × F32, not Q8_0: rows that fill no blocks of 32", "1 × F32, not Q8_0: a vector",
        "1 × F16 → F32, not Q8_0: a vector", "1 × I64, not Q8_0: not floating",
    }  # fmt: skip
    assert set(wb.save({"w": values(2, 4), "v": values(4)}, tmp_path / "x.gguf", types="F32").notes[:1]) == {"2 × F32"}


# nothing is rounded twice


@pytest.mark.parametrize("kind", DECODED, ids=lambda kind: kind.name)
def test_blocks_of_a_gguf_keep_their_bytes(kind, tmp_path):
    """Of types that nothing here can encode, too."""
    tensors = {"q": (kind, packed(kind, 3, 4)), "row": (kind, packed(kind, 1, 5, 1).reshape(-1)), "n": np.ones(3)}
    path = by_library(tmp_path / "q.gguf", tensors, **VERSION)
    wb.save(path, tmp_path / "same.gguf")
    assert (tmp_path / "same.gguf").read_bytes() == path.read_bytes()
    report = wb.save(wb.ops.add_prefix(wb.open(path), "model."), tmp_path / "named.gguf")
    assert written(tmp_path / "named.gguf") == {f"model.{name}": told for name, told in written(path).items()}
    assert report.notes[0] == f"2 × {kind.name}"
    if kind in ENCODED:
        assert wb.save(path, tmp_path / "same.gguf", types=kind.name).notes[0] == f"2 × {kind.name}"
        assert written(tmp_path / "same.gguf") == written(path)


def test_a_part_of_packed_rows_keeps_its_bytes_and_a_part_of_a_block_is_decoded(tmp_path):
    path = by_library(tmp_path / "q.gguf", {"q": (TYPES.Q4_K, packed(TYPES.Q4_K, 6, 2))})
    tensor = wb.open(path)["q"]

    def part(shape, offset):
        source = tensor.source._replace(offset=offset, strides=(shape[1], 1))
        return replace_tensor(tensor, shape, source)

    ckpt = Checkpoint({"rows": part((2, 512), 1024), "odd": part((2, 300), 256), "shifted": part((1, 256), 100)})
    wb.save(ckpt, tmp_path / "parts.gguf")
    whole, found = by_gguf(path)["q"].reshape(-1), written(tmp_path / "parts.gguf")
    assert {name: kind for name, (kind, _, _) in found.items()} == {"rows": "Q4_K", "odd": "F32", "shifted": "F32"}
    assert found["rows"][2] == written(path)["q"][2][4 * 144 : 8 * 144]
    assert (found["odd"][2], found["shifted"][2]) == (bits(whole[256:856]), bits(whole[100:356]))


def replace_tensor(tensor, shape, source):
    return type(tensor)(replace(tensor.spec, shape=shape), source)


def test_another_type_is_made_of_the_decoded_values_and_the_report_says_so(tmp_path):
    path = by_library(tmp_path / "q.gguf", {"q": (TYPES.Q6_K, packed(TYPES.Q6_K, 3, 2))})
    assert wb.save(path, tmp_path / "x.gguf", types="Q8_0").notes[0] == "1 × Q6_K → Q8_0, rounded again"
    assert written(tmp_path / "x.gguf")["q"][2] == encoded(by_gguf(path)["q"], TYPES.Q8_0)
    assert wb.save(path, tmp_path / "x.gguf", types="F32").notes[0] == "1 × Q6_K → F32"
    assert same(wb.open(tmp_path / "x.gguf")["q"].load(), by_gguf(path)["q"])


# metadata


def test_every_pair_of_a_gguf_is_written_back_as_it_stood(tmp_path):
    inner = u32(5) + u64(2) + struct.pack("<2i", 1, 2)
    file = Hand().pair("general.architecture", 8, u64(5) + b"llama").pair("nested", 9, u32(9) + u64(2) + (u32(9) + u64(1) + inner) * 2)
    for kind, code in {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}.items():
        file.pair(f"k{kind}", kind, struct.pack("<" + code, 1))
    file.pair("word", 8, u64(2) + b"\xff!").pair("none", 9, u32(8) + u64(0)).pair("long", 8, u64(100_000) + b"x" * 100_000)
    file.pair("general.alignment", 4, u32(64)).pair("tokens", 9, u32(8) + u64(50_000) + (u64(3) + b"abc") * 50_000)
    path = (
        file.info("a", [2])
        .info("b", [1], 0, 64)
        .write(tmp_path, struct.pack("<2f", 1, 2) + bytes(56) + struct.pack("<f", 3) + bytes(60), alignment=64)
    )
    wb.save(wb.open(path), tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == path.read_bytes()
    wb.save(wb.ops.rename(wb.open(path), {"a": "c"}), tmp_path / "renamed.gguf")
    assert dict(wb.open(tmp_path / "renamed.gguf").metadata) == dict(wb.open(path).metadata)


def test_a_big_endian_file_becomes_a_little_endian_one(tmp_path):
    path = by_library(
        tmp_path / "big.gguf", {"w": values(3, 5).numpy()}, endian=gguf.GGUFEndian.BIG, flag=True, count=7, rate=0.5, list=[1, 2]
    )
    assert wb.save(path, tmp_path / "x.gguf").notes[-1] == "left out of the metadata: list"
    assert dict(wb.open(tmp_path / "x.gguf").metadata) == {"general.architecture": "llama", "flag": "True", "count": "7", "rate": "0.5"}
    little = by_library(tmp_path / "little.gguf", {"w": values(3, 5).numpy()}, flag=True, count=7, rate=0.5)
    assert pairs(tmp_path / "x.gguf") == pairs(little)
    assert written(tmp_path / "x.gguf") == written(little)


def test_metadata_of_other_formats_is_text_and_what_told_of_the_old_file_goes(tmp_path):
    ckpt = replace(wb.open({"w": values(2, 64)}), metadata={"format": "pt", "general.alignment": "64", "split.count": "3"})
    report = wb.save(ckpt, tmp_path / "x.gguf", types="Q8_0")
    assert report.notes[1:] == (
        "left out of the metadata: split.count, general.alignment",
        "general.architecture is 'unknown': the checkpoint's metadata names none",
    )
    found = wb.open(tmp_path / "x.gguf").metadata
    assert dict(found) == {"general.architecture": "unknown", "format": "pt", "general.quantization_version": str(gguf.GGML_QUANT_VERSION)}
    path = by_library(tmp_path / "q.gguf", {"w": values(2, 64).numpy()}, general__file_type=0)
    assert wb.save(path, tmp_path / "y.gguf").notes == ("1 × F32",)
    assert wb.save(path, tmp_path / "y.gguf", types="Q8_0").notes[1:] == ("left out of the metadata: general.file_type",)


def test_the_parts_of_a_split_become_one_file(tmp_path):
    for i in range(2):
        write_split(tmp_path / f"m-{i + 1:05d}-of-00002.gguf", {f"t{i}": values(2, 3).numpy()}, i, 2, 2)
    wb.save(tmp_path / "m-00001-of-00002.gguf", tmp_path / "whole.gguf")
    assert list(written(tmp_path / "whole.gguf")) == ["t0", "t1"]
    assert not wb.open(tmp_path / "whole.gguf").findings
    assert list(pairs(tmp_path / "whole.gguf")) == ["general.architecture"]


# what cannot be held

REFUSED = {
    "bool": ({"w": torch.tensor([True])}, None, UnsupportedError, "no bool tensors.*tensor w"),
    "complex": ({"w": torch.ones(2, dtype=torch.complex64)}, None, UnsupportedError, "no complex64 tensors"),
    "unsigned": ({"w": torch.ones(2, dtype=torch.uint8)}, None, UnsupportedError, "no uint8 tensors"),
    "8-bit float": ({"w": torch.ones(2, 2).to(torch.float8_e5m2)}, None, UnsupportedError, "no float8_e5m2 tensors"),
    "5 dimensions": ({"w": torch.ones(1, 1, 1, 1, 2)}, None, UnsupportedError, r"no \[1, 1, 1, 1, 2\] tensors"),
    "empty": ({"w": torch.ones(2, 0)}, None, UnsupportedError, r"no \[2, 0\] tensors"),
    "sparse": ({"w": torch.eye(3).to_sparse()}, None, UnsupportedError, "no .*tensors"),
    "long name": ({"w" * 64: torch.ones(2)}, None, SelectionError, "63 bytes"),
    "no Unicode": ({"\udc80": torch.ones(2)}, None, SelectionError, "Unicode"),
    "extras": ({"model": {"w": torch.ones(2)}, "epoch": 3}, None, SelectionError, "GGUF holds only tensors"),
    "no such type": ({"w": torch.ones(2, 32)}, "Q9", SelectionError, "'Q9'(.|\n)*Q8_0"),
    "no type": ({"w": torch.ones(2, 32)}, ["Q8_0"], SelectionError, "stored as"),
    "an integer type": ({"w": torch.ones(2, 32)}, "I8", SelectionError, "stored as 'I8'"),
    "a type nothing encodes": ({"w": torch.ones(2, 256)}, "Q4_K", SelectionError, "stored as 'Q4_K'"),
    "no such tensor": ({"layer.weight": torch.ones(2, 32)}, {"layr.*": "Q8_0"}, SelectionError, "did you mean layer.weight"),
    "named and not floating": ({"w": torch.arange(32)}, {"w": "Q8_0"}, SelectionError, "stored as Q8_0: not floating"),
    "named and no whole blocks": ({"w": torch.ones(2, 33)}, {"w": "Q8_0"}, SelectionError, "fill no blocks of 32"),
    "named scalar": ({"w": torch.tensor(1.0)}, {"w": "Q8_0"}, SelectionError, "a vector"),
    "NaN": ({"w": torch.full((2, 32), float("nan"))}, "Q8_0", SelectionError, "no value like nan.*tensor w"),
    "NaN in MXFP4": ({"w": torch.full((2, 32), float("nan"))}, "MXFP4", SelectionError, "no value like nan"),
    "infinity": ({"w": torch.full((2, 32), -float("inf"))}, "Q4_1", SelectionError, "no value like inf"),
    "past the scale": ({"w": torch.full((2, 32), 7e4)}, "Q4_1", SelectionError, "no value like 7e"),
    "past float16": ({"w": torch.full((2, 32), 7e4)}, "F16", SelectionError, "too large for F16"),
    "past float32": ({"w": torch.full((2, 32), 1e39, dtype=torch.float64)}, "Q8_0", SelectionError, "too large for Q8_0"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_gguf_cannot_hold_is_refused_in_words_and_nothing_is_left(what, tmp_path):
    state, types, kind, told = REFUSED[what]
    with pytest.raises(kind, match=told):
        wb.save(state, tmp_path / "x.gguf", types=types)
    assert not list(tmp_path.iterdir())


def test_large_values_are_taken_where_the_scale_holds_them(tmp_path):
    wb.save({"w": torch.full((2, 32), 5e5)}, tmp_path / "x.gguf", types="Q4_0")
    assert wb.open(tmp_path / "x.gguf")["w"].load().unique().tolist() == [499_968]


def test_infinity_stays_infinity_where_the_type_has_one(tmp_path):
    wb.save({"w": torch.tensor([[float("inf"), 1.0]])}, tmp_path / "x.gguf", types="F16")
    assert wb.open(tmp_path / "x.gguf")["w"].load().tolist() == [[float("inf"), 1.0]]


def test_a_view_across_blocks_is_decoded_and_locked_values_are_refused(tmp_path):
    path = by_library(tmp_path / "q.gguf", {"q": (TYPES.Q4_K, packed(TYPES.Q4_K, 2, 1)), "x": (TYPES.Q8_1, packed(TYPES.Q8_1, 1, 1))})
    tensor = wb.open(path)["q"]
    view = replace_tensor(tensor, (2, 256), tensor.source._replace(strides=(1, 2)))
    wb.save(Checkpoint({"q": view}), tmp_path / "view.gguf")
    assert same(wb.open(tmp_path / "view.gguf")["q"].load(), tensor.load().reshape(256, 2).t())
    with pytest.raises(WorkbenchError, match="the values are locked"):
        wb.save(path, tmp_path / "locked.gguf")


def test_types_are_for_gguf_alone(tmp_path):
    with pytest.raises(SelectionError, match="GGUF"):
        wb.save({"w": torch.ones(2)}, tmp_path / "x.pt", types="Q8_0")


def test_without_the_library_plain_types_are_written_and_blocks_name_the_extra(tmp_path, monkeypatch):
    path = by_library(tmp_path / "q.gguf", {"q": (TYPES.Q4_0, packed(TYPES.Q4_0, 2, 1))}, **VERSION)
    monkeypatch.setitem(sys.modules, "gguf", None)
    wb.save(path, tmp_path / "same.gguf")
    wb.save({"w": torch.ones(2, 32)}, tmp_path / "x.gguf", types="F16")
    with pytest.raises(MissingDependencyError, match=r"checkpoint-workbench\[gguf\]"):
        wb.save({"w": torch.ones(2, 32)}, tmp_path / "y.gguf", types="Q8_0")
    monkeypatch.undo()
    assert (tmp_path / "same.gguf").read_bytes() == path.read_bytes()
    assert written(tmp_path / "x.gguf")["w"][:2] == ("F16", (2, 32))


def test_an_older_library_that_lacks_a_type_is_told(tmp_path, monkeypatch):
    monkeypatch.delitem(gguf.quants._type_traits, TYPES.MXFP4)
    with pytest.raises(SelectionError, match="MXFP4") as caught:
        wb.save({"w": torch.ones(2, 32)}, tmp_path / "y.gguf", types="MXFP4")
    assert "MXFP4" not in caught.value.hint


# ties, ops, ways to run


def test_tied_tensors_are_stored_for_each_name_and_computed_once(tmp_path, monkeypatch):
    real, calls = gguf.quants.quantize, []
    monkeypatch.setattr(gguf.quants, "quantize", lambda data, kind: calls.append(data.size) or real(data, kind))
    shared = values(4, 64)
    report = wb.save({"embed": shared, "head": shared}, tmp_path / "x.gguf", types="Q8_0")
    assert calls[-2:].count(256) == 1
    assert report.notes[-1] == "head is stored again, for GGUF has no aliases: it is tied to embed"
    assert set(written(tmp_path / "x.gguf").values()) == {("Q8_0", (4, 64), encoded(shared, TYPES.Q8_0))}


def test_aliases_of_safetensors_become_tensors_and_no_metadata(tmp_path):
    shared = values(4, 64)
    wb.save({"embed": shared, "head": shared}, tmp_path / "x.safetensors")
    wb.save(tmp_path / "x.safetensors", tmp_path / "x.gguf")
    assert list(written(tmp_path / "x.gguf").items()) == [(name, ("F32", (4, 64), bits(shared))) for name in ("embed", "head")]
    assert list(pairs(tmp_path / "x.gguf")) == ["general.architecture"]


def test_results_of_ops_that_work_by_rows_are_encoded(tmp_path):
    """Rows of the op are other than blocks of the encoder, and neither need be a part of the other."""
    state = {"conv": values(6, 3, 5, 32), "w": values(6, 64), "b": values(6)}
    ckpt = wb.ops.adapt_input_channels(wb.open(state), "conv", 1)
    wb.save(ckpt, tmp_path / "x.gguf", types="Q8_0")
    assert written(tmp_path / "x.gguf")["conv"][2] == encoded(ckpt["conv"].load(), TYPES.Q8_0)
    wb.save(Checkpoint({"conv": replace_tensor(ckpt["conv"], (6, 1, 5, 32), ckpt["conv"].source)}), tmp_path / "y.gguf", types="Q4_0")
    assert written(tmp_path / "y.gguf")["conv"][2] == encoded(ckpt["conv"].load(), TYPES.Q4_0)


def test_threads_processes_and_budgets_give_the_same_bytes(tmp_path):
    state = {f"t{i}": values(300, 512, seed=i) for i in range(3)} | {"v": values(9)}
    torch.save(state, tmp_path / "source.pt")
    ckpt = wb.open(tmp_path / "source.pt")
    wb.save(ckpt, tmp_path / "x.gguf", types="Q8_0")
    first = (tmp_path / "x.gguf").read_bytes()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for options in ({"threads": 2}, {"max_ram_mb": 16}, {"executor": pool}):
            wb.save(ckpt, tmp_path / "x.gguf", types="Q8_0", **options)
            assert (tmp_path / "x.gguf").read_bytes() == first


def test_a_dry_run_tells_the_size_and_writes_nothing(tmp_path):
    state = {"w": values(3, 64), "v": values(5), "h": values(3, 3, dtype=torch.float16)}
    told = wb.save(state, tmp_path / "x.gguf", types="Q5_0", dry_run=True)
    assert not list(tmp_path.iterdir())
    assert wb.save(state, tmp_path / "x.gguf", types="Q5_0").notes == told.notes
    assert (tmp_path / "x.gguf").stat().st_size == told.nbytes


def test_saving_over_its_own_source_and_copying_blocks_imports_no_library(tmp_path):
    path = by_library(tmp_path / "q.gguf", {"q": (TYPES.Q4_K, packed(TYPES.Q4_K, 2, 1))}, tokens=["a"] * 1000, **VERSION)
    before = path.read_bytes()
    code = "import sys, workbench as wb; wb.save(wb.open(sys.argv[1]), sys.argv[1]); print([m for m in ('torch', 'numpy', 'gguf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
    assert path.read_bytes() == before


def test_a_pair_of_a_file_that_changed_is_refused(tmp_path):
    path = by_library(tmp_path / "q.gguf", {"q": (TYPES.Q4_0, packed(TYPES.Q4_0, 2, 1))}, tokens=["a"] * 1000)
    ckpt = wb.open(path).drop("q")
    by_library(path, {}, tokens=["b"] * 1000)
    with pytest.raises(WorkbenchError, match="changed"):
        wb.save(ckpt, tmp_path / "x.gguf")


SMALL = 'path, out, kind = sys.argv[1:]; wb.save({"w": torch.ones(64, 64)}, out, types=kind)'


@pytest.mark.slow
def test_a_row_of_1_gib_is_encoded_within_256_mb(tmp_path):
    source = tmp_path / "big.gguf"
    header = Hand().pair("general.architecture", 8, u64(7) + b"unknown").info("w", [2**28, 1]).bytes(bits(torch.arange(32.0)))
    source.write_bytes(header)
    with open(source, "r+b") as file:
        file.truncate(len(header) - 128 + 2**30)  # a hole: the rest is zeros
    peak = peak_over_base(SMALL, "wb.save(wb.open(path), out, types=kind, max_ram_mb=256)", source, tmp_path / "out.gguf", "Q8_0")
    assert peak <= 256
    kind, shape, data = written(tmp_path / "out.gguf")["w"]
    assert (kind, shape, data[:34]) == ("Q8_0", (1, 2**28), encoded(torch.arange(32.0)[None], TYPES.Q8_0))
    assert not np.frombuffer(data[34:], np.uint8).any()
