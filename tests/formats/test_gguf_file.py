"""GGUF against the gguf library; and files that no library would write, put together by hand from the specification."""

import re
import struct
import subprocess
import sys
import time
from contextlib import nullcontext

import gguf
import numpy as np
import pytest
from conformance import FormatTests
from gguf_makers import DECODED, TYPES, Hand, by_gguf, hand, packed, u32, u64, write, write_split
from strategies import bits, same

import workbench as wb
from workbench.errors import CorruptFileError, MissingDependencyError, UnsupportedError, WorkbenchError
from workbench.formats import gguf_file
from workbench.formats.gguf_file import _OPAQUE, BLOCKS
from workbench.formats.packed import Packed


def plain():
    generator = np.random.default_rng(3)
    return {
        "blk.0.attn.weight": generator.standard_normal((3, 4)).astype(np.float32),
        "blk.0.attn.bias": np.array([np.nan, -0.0, np.inf], np.float32),
        "half": generator.standard_normal(5).astype(np.float16),
        "brain": (TYPES.BF16, generator.integers(0, 255, (2, 6), dtype=np.uint8)),
        "wide": generator.standard_normal((2, 2)),
        "counts of ü": np.arange(7, dtype=np.int8),
        "long": np.array([-(2**62)], np.int64),
    }


class TestGguf(FormatTests):
    magic = 4

    def build(self, folder):
        path = write(folder / "model.gguf", plain(), general__name="tests", flag=True, list=[1, 2, 3])
        return path, [path]

    def official(self, path):
        return by_gguf(path)


class TestGgufBigEndian(TestGguf):
    """The same in the other byte order: loaded values are equal, the bytes as they lie are swapped."""

    def build(self, folder):
        path = write(folder / "model.gguf", {n: t for n, t in plain().items() if n != "brain"}, endian=gguf.GGUFEndian.BIG, flag=True)
        return path, [path]

    def test_raw_gives_the_bytes_as_they_lie(self, built):
        for name, tensor in self.official(built[0]).items():
            swapped = tensor.numpy().byteswap().tobytes()
            assert wb.open(built[0])[name].raw() == swapped, name

    def test_offset_is_where_the_bytes_lie(self, built):
        data = built[0].read_bytes()
        for name, tensor in self.official(built[0]).items():
            lazy = wb.open(built[0])[name]
            assert data[lazy.offset :][: lazy.nbytes] == tensor.numpy().byteswap().tobytes(), name


class TestGgufQuantized(TestGguf):
    """Blocks are float32 values to everybody who reads them; what lies in the file is known to the storage alone."""

    def build(self, folder):
        tensors = {"norm": np.ones(4, np.float32), "experts.weight": (TYPES.Q8_0, packed(TYPES.Q8_0, 6, 2).reshape(2, 3, -1))}
        tensors |= {kind.name: (kind, packed(kind, 2, 1)) for kind in (TYPES.Q4_0, TYPES.Q4_K, TYPES.MXFP4)}
        path = write(folder / "model.gguf", tensors)
        return path, [path]

    def test_offset_is_where_the_bytes_lie(self, built):
        data = built[0].read_bytes()
        for tensor in gguf.GGUFReader(built[0]).tensors:
            lazy = wb.open(built[0])[tensor.name]
            if tensor.tensor_type in DECODED:
                assert lazy.offset is None
                span = lazy.source.storage.span
                assert (lazy.source.storage.packing, span.nbytes) == (tensor.tensor_type.name, tensor.n_bytes)
                assert data[span.start :][: span.nbytes] == tensor.data.tobytes()

    def test_a_flipped_byte_never_gives_a_foreign_exception_or_a_hang(self, tmp_path):
        """The index alone and a little data: what the blocks hold is any bits in any case."""
        path = write(tmp_path / "model.gguf", {"q": (TYPES.Q4_K, packed(TYPES.Q4_K, 1, 1)), "m": (TYPES.MXFP4, packed(TYPES.MXFP4, 1, 1))})
        super().test_a_flipped_byte_never_gives_a_foreign_exception_or_a_hang((path, [path]))


class TestGgufSplit(TestGguf):
    """Three parts, opened by the second; the first holds the metadata alone, as llama.cpp's splitter can leave it."""

    def build(self, folder):
        tensors = list(plain().items())
        files = [folder / f"model-{i + 1:05d}-of-00003.gguf" for i in range(3)]
        for i, (path, part) in enumerate(zip(files, ([], tensors[:3], tensors[3:]), strict=True)):
            writer_tensors = dict(part)
            write_split(path, writer_tensors, i, 3, len(tensors))
        return files[1], files

    def official(self, path):
        parts = sorted(path.parent.glob("*.gguf"))
        return {name: tensor for part in parts for name, tensor in by_gguf(part).items()}

    def test_a_missing_part_is_told_and_the_others_are_listed(self, built):
        built[1][2].unlink()
        ckpt = wb.open(built[0])
        assert list(ckpt) == list(by_gguf(built[0]))
        assert [(f.kind, f.severity) for f in ckpt.findings] == [("missing part", "warning")]
        assert "00003-of-00003" in ckpt.findings[0].message

    def test_a_renamed_part_lists_its_own(self, built):
        other = built[0].rename(built[0].parent / "renamed.gguf")
        ckpt = wb.open(other)
        assert list(ckpt) == list(by_gguf(other))
        assert [f.kind for f in ckpt.findings] == ["split file"]

    def test_a_part_that_belongs_elsewhere_is_refused(self, built):
        write_split(built[1][2], {}, 1, 3, 7)
        with pytest.raises(CorruptFileError, match="part 3 of 3"):
            wb.open(built[0])


@pytest.mark.parametrize("kind", DECODED, ids=lambda kind: kind.name)
def test_each_packing_has_the_values_the_library_gives_it(kind, tmp_path):
    path = write(tmp_path / "q.gguf", {"q": (kind, packed(kind, 3, 4)), "row": (kind, packed(kind, 1, 5, 1).reshape(-1))})
    found, official = wb.open(path), by_gguf(path)
    for name, tensor in official.items():
        lazy = found[name]
        assert lazy.dtype.name == "float32"
        assert same(lazy.load(), tensor), name
        assert bits(lazy.read(33, 71)) == bits(tensor.reshape(-1)[33:71]), name
        assert b"".join(bits(chunk) for _, chunk in lazy.chunks(1000)) == bits(tensor), name


def test_a_tensor_of_many_steps(tmp_path):
    """Values are decoded a megabyte at a time."""
    path = write(tmp_path / "q.gguf", {"q": (TYPES.Q8_0, packed(TYPES.Q8_0, 3, 5000))})
    lazy, values = wb.open(path)["q"], by_gguf(path)["q"]
    assert same(lazy.load(), values)
    assert bits(lazy.read(300_001, 479_999)) == bits(values.reshape(-1)[300_001:479_999])


def test_the_table_of_types_is_the_librarys():
    table = {TYPES(code).name: sizes for code, (_, *sizes) in BLOCKS.items() if code in TYPES.__members__.values()}
    assert table == {t.name: list(gguf.GGML_QUANT_SIZES[t]) for t in TYPES if gguf.GGML_QUANT_SIZES[t][0] > 1}
    assert all(TYPES(code).name == name for code, (name, *_) in BLOCKS.items() if code in TYPES.__members__.values())
    assert {name for name, *_ in BLOCKS.values()} - _OPAQUE == {t.name for t in DECODED}


@pytest.mark.parametrize("kind", [TYPES.Q8_1, TYPES.Q8_K, TYPES.Q1_0], ids=lambda kind: kind.name)
def test_what_the_library_cannot_decode_is_listed_and_locked(kind, tmp_path):
    ckpt = wb.open(write(tmp_path / "q.gguf", {"q": (kind, packed(kind, 2, 1)), "w": np.ones(3, np.float32)}))
    assert ckpt["q"].shape == (2, gguf.GGML_QUANT_SIZES[kind][0])
    assert ckpt["w"].load().tolist() == [1, 1, 1]
    with pytest.raises(CorruptFileError, match=f"little-endian {kind.name} is not decoded"):
        ckpt["q"].load()


def test_without_the_library_tensors_are_listed_and_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "q.gguf", {"q": (TYPES.Q4_0, packed(TYPES.Q4_0, 2, 1)), "w": np.ones(3, np.float32)})
    monkeypatch.setitem(sys.modules, "gguf", None)
    ckpt = wb.open(path)
    assert ckpt["w"].load().tolist() == [1, 1, 1]
    with pytest.raises(MissingDependencyError, match=r"checkpoint-workbench\[gguf\]"):
        ckpt["q"].load()


def test_an_older_library_that_lacks_a_type_is_told(tmp_path, monkeypatch):
    path = write(tmp_path / "q.gguf", {"q": (TYPES.NVFP4, packed(TYPES.NVFP4, 2, 1))})
    monkeypatch.delitem(gguf.quants._type_traits, TYPES.NVFP4)
    with pytest.raises(UnsupportedError, match="does not decode NVFP4"):
        wb.open(path)["q"].load()


@pytest.mark.parametrize("target", ["out.pt", "out.safetensors"])
def test_quantized_tensors_save_as_their_values(target, tmp_path):
    path = write(tmp_path / "q.gguf", {"q": (TYPES.Q6_K, packed(TYPES.Q6_K, 3, 2)), "w": np.ones(3, np.float32)})
    ckpt = wb.open(path)
    assert ckpt.source is not None
    wb.save(ckpt, tmp_path / target)
    assert same(wb.open(tmp_path / target)["q"].load(), by_gguf(path)["q"])
    rows = {(row.what, row.dtype): row.nbytes for row in wb.ledger(ckpt).rows}
    assert rows["weights", "float32"] == 3 * 2 * 210 + 12  # as they lie in the file


def test_a_vocabulary_lists_at_once_and_without_libraries(tmp_path):
    words = [f"token {i}" for i in range(151_936)]
    path = write(tmp_path / "v.gguf", {"w": np.ones(3, np.float32)}, tokens=words, merges=words, types=[1] * len(words), few=["a", "b"])
    code = (
        "import sys, time, workbench as wb; wb.errors; import workbench.formats.gguf_file; start = time.process_time(); c = wb.open(sys.argv[1]);"
        "print(time.process_time() - start, [m for m in ('torch', 'numpy', 'gguf') if m in sys.modules]); print(dict(c.metadata))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=True)
    seconds, rest = done.stdout.split(maxsplit=1)
    assert float(seconds) < 1.5  # 0.1 s alone on a core
    assert rest.startswith("[]")
    assert "'tokens': 'array of 151,936 × text'" in rest
    assert "'types': 'array of 151,936 × i32'" in rest
    assert "'few': '[a, b]'" in rest


def test_templates_and_long_texts_are_kept_as_text_and_bounded(tmp_path):
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}\x1b[2J"
    ckpt = wb.open(write(tmp_path / "t.gguf", {}, tokenizer__chat_template=template, long="x" * 200_000))
    assert ckpt.metadata["tokenizer.chat_template"] == template
    assert ckpt.metadata["long"] == "x" * 65536 + "… (200000 bytes)"


# by hand, from the specification


BROKEN = {
    "a million million tensors": (hand().bytes(tensors=10**12), "1000000000000 entries"),
    "negative number of tensors": (hand().bytes(tensors=2**64 - 1), "entries"),
    "a million million pairs": (hand().bytes(pairs=10**12), "entries"),
    "key longer than the file": (hand().bytes(pairs=1, alignment=1) + u64(1 << 40) + bytes(9), "entries"),
    "unknown value type": (hand().pair("k", 13, bytes(8)).bytes(), "13 is no type"),
    "unknown element type": (hand().pair("k", 9, u32(77) + u64(0)).bytes(), "77 is no type"),
    "text longer than the file": (hand().pair("k", 8, u64(1 << 40)).bytes(), "entries"),
    "array longer than the file": (hand().pair("k", 9, u32(4) + u64(1 << 33)).bytes(), "entries"),
    "array of texts longer than the file": (hand().pair("k", 9, u32(8) + u64(1 << 33)).bytes(), "entries"),
    "array of arrays longer than the file": (hand().pair("k", 9, u32(9) + u64(1 << 33)).bytes(), "entries"),
    "a text in an array past the end": (hand().pair("k", 9, u32(8) + u64(20) + u64(1 << 62) * 20).bytes(), "cut"),
    "a truth value of 2": (hand().pair("k", 7, b"\x02").bytes(), "truth value"),
    "one key twice": (hand().pair("k", 0, b"\0").pair("k", 0, b"\1").bytes(), "twice"),
    "alignment as text": (hand().pair("general.alignment", 8, u64(2) + b"32").bytes(), "u32"),
    "alignment 0": (hand().pair("general.alignment", 4, u32(0)).bytes(), "power of two"),
    "alignment 24": (hand().pair("general.alignment", 4, u32(24)).bytes(), "power of two"),
    "alignment 4": (hand().pair("general.alignment", 4, u32(4)).bytes(), "power of two"),
    "name longer than the file": (hand().bytes(tensors=1) + bytes(24) + u64(1 << 40), "entries|tensor"),
    "name is no text": (hand().info(b"\xff\xfe", [1]).bytes(bytes(4)), "Unicode"),
    "four billion dimensions": (hand().info("w", [1]).bytes(bytes(64)).replace(u32(1) + u64(1), u32(2**32 - 1) + u64(1)), "dimensions"),
    "elements past 63 bits": (hand().info("w", [1 << 32, 1 << 32]).bytes(bytes(64)), "63 bits"),
    "a side past 63 bits": (hand().info("w", [1 << 63]).bytes(bytes(64)), "63 bits"),
    "bytes past the file": (hand().info("w", [1 << 40]).bytes(bytes(64)), "cut"),
    "offset past the file": (hand().info("w", [4], 0, 1 << 40).bytes(bytes(64)), "cut"),
    "offset near the top": (hand().info("w", [4], 0, 2**64 - 32).bytes(bytes(64)), "cut"),
    "offset between": (hand().info("w", [4], 0, 8).bytes(bytes(64)), "multiple"),
    "one name twice": (hand().info("w", [4]).info("w", [4], 0, 32).bytes(bytes(64)), "this name"),
    "one place twice": (hand().info("w", [4]).info("v", [4]).bytes(bytes(64)), "overlap"),
    "overlapping": (hand().info("w", [16]).info("v", [4], 0, 32).bytes(bytes(64)), "overlap"),
    "half a block": (hand().info("w", [48, 2], 2).bytes(bytes(64)), "do not fill"),
    "a block of no row": (hand().info("w", [], 2).bytes(bytes(64)), "do not fill"),
    "data cut": (hand().info("w", [8]).bytes(bytes(31)), "cut"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_contradicts_itself_is_refused_in_words(what, tmp_path):
    data, told = BROKEN[what]
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    with pytest.raises(CorruptFileError) as caught:
        wb.open(path)
    assert re.search(told, str(caught.value)), str(caught.value)


UNSUPPORTED = {
    "version 1": (Hand(version=1).bytes(), "version 1"),
    "version 0": (Hand(version=0).bytes(), "version 0"),
    "version 4": (Hand(version=4).bytes(), "version 4"),
    "Q4_2": (hand().info("w", [32], 4).bytes(bytes(64)), "Q4_2"),
    "a type to come": (hand().info("w", [32], 1000).bytes(bytes(64)), "1000"),
    "too many pairs": (hand().bytes(bytes(13 * 70_000), pairs=70_000), "pairs"),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_is_not_read_is_named(what, tmp_path):
    data, told = UNSUPPORTED[what]
    path = tmp_path / "other.gguf"
    path.write_bytes(data)
    with pytest.raises(UnsupportedError, match=told):
        wb.open(path)


def test_the_tensors_before_a_cut_are_in_partial(tmp_path):
    path = hand().info("a", [8]).info("b", [8], 0, 32).write(tmp_path, struct.pack("<8f", *range(8)) + bytes(31))
    with pytest.raises(CorruptFileError, match="tensor b") as caught:
        wb.open(path)
    assert {name: tensor.load().tolist() for name, tensor in caught.value.partial.items()} == {"a": list(range(8))}


def test_version_2_and_an_alignment_of_its_own(tmp_path):
    file = Hand(version=2).pair("general.alignment", 4, u32(64)).info("a", [2]).info("b", [1], 0, 64)
    path = file.write(tmp_path, struct.pack("<2f", 1, 2) + bytes(56) + struct.pack("<f", 3), alignment=64)
    ckpt = wb.open(path)
    assert {name: tensor.load().tolist() for name, tensor in ckpt.items()} == {"a": [1, 2], "b": [3]}
    assert not ckpt.findings


def test_arrays_nest_and_every_type_of_value_is_told(tmp_path):
    inner = u32(5) + u64(2) + struct.pack("<2i", 1, 2)
    file = hand().pair("nested", 9, u32(9) + u64(3) + (u32(9) + u64(1) + inner) * 3)
    values = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
    for kind, code in values.items():
        file.pair(f"k{kind}", kind, struct.pack("<" + code, 7))
    file.pair("yes", 7, b"\1").pair("word", 8, u64(2) + b"\xff!").pair("none", 9, u32(8) + u64(0)).pair(
        "last", 9, u32(7) + u64(2) + b"\0\1"
    )
    metadata = dict(wb.open(file.write(tmp_path)).metadata)
    expected = {f"k{kind}": "7.0" if code in "fd" else "7" for kind, code in values.items()}
    assert metadata == {"nested": "array of 3 × array", **expected, "yes": "True", "word": "\ufffd!", "none": "[]", "last": "[False, True]"}


def test_a_scalar_has_one_element(tmp_path):
    assert wb.open(hand().info("s", []).write(tmp_path, struct.pack("<f", 5)))["s"].load().item() == 5


def test_bytes_that_no_tensor_claims_are_told(tmp_path):
    data = struct.pack("<4f", 1, 2, 3, 4)
    assert not wb.open(hand().info("w", [4]).write(tmp_path, data)).findings
    assert not wb.open(hand().info("w", [4]).write(tmp_path, data + bytes(16))).findings
    for file, extra in ((hand().info("w", [4]), bytes(16) + b"PK\x03\x04" * 10), (hand().info("w", [4], 0, 64), bytes(16))):
        ckpt = wb.open(file.write(tmp_path, (bytes(64) if file.infos[0].endswith(u64(64)) else b"") + data + extra))
        assert [f.kind for f in ckpt.findings] == ["unclaimed bytes"]


HOSTILE = {
    "empty texts": (hand().pair("k", 9, u32(8) + u64(3_000_000) + bytes(24_000_000)), None),
    "more texts than are walked": (hand().pair("k", 9, u32(8) + u64(5_000_000) + bytes(40_000_000)), "more than 4000000"),
    "empty arrays": (hand().pair("k", 9, u32(9) + u64(100_000) + bytes(1_200_000)), None),
    "more arrays than are walked": (hand().pair("k", 9, u32(9) + u64(500_000) + bytes(6_000_000)), "or 125000 arrays"),
    "arrays in arrays": (hand().pair("k", 9, (u32(9) + u64(1)) * 100_000 + u32(0) + u64(0)), None),
    "long texts": (hand().pair("a", 8, u64(20_000_000) + bytes(20_000_000)), None),
}


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda n: [hand().info("", [], offset=0)] * n, "two tensors have this name"),
        (lambda n: [hand().info(f"{i:060000}", []) for i in range(n)], "of all"),
        (lambda n: [hand().pair(f"{i:060000}", 0, b"\0") for i in range(n)], "of all"),
        (lambda n: [hand().pair(f"k{i}", 9, u32(0) + u64(16) + bytes(16)) for i in range(n)], "arrays and values"),
    ],
)
def test_what_every_entry_says_is_bounded_for_all_and_seen_at_once(build, told, tmp_path, monkeypatch):
    """The walk ends where the bound is met, and not where the entries do."""
    reached = []
    honest = gguf_file.Window.take
    monkeypatch.setattr(gguf_file.Window, "take", lambda self, at, count: reached.append(at) or honest(self, at, count))
    monkeypatch.setattr(gguf_file, "_MAX_NAMES", 1 << 20)
    monkeypatch.setattr(gguf_file, "_MAX_ITEMS", 16 * 32 * 20)
    whole = hand()
    for part in build(40):
        whole.infos += part.infos
        whole.pairs += part.pairs
    path = whole.write(tmp_path)
    with pytest.raises(WorkbenchError, match=told):
        wb.open(path)
    assert max(reached) < path.stat().st_size * 0.6


def test_a_vocabulary_and_its_merges_are_walked_in_the_buffer(tmp_path, monkeypatch):
    asked = []
    honest = gguf_file.Window.view
    monkeypatch.setattr(gguf_file.Window, "view", lambda self, at, count: asked.append(at) or honest(self, at, count))
    texts = b"".join(u64(len(text)) + text for text in (b"token %d" % i for i in range(256_000)))
    file = hand()
    for key in ("tokens", "merges"):
        file.pair(key, 9, u32(8) + u64(256_000) + texts)
    ckpt = wb.open(file.info("w", [1]).write(tmp_path, bytes(4)))
    assert ckpt.metadata["merges"] == "array of 256,000 × text"
    assert list(ckpt) == ["w"]
    assert len(asked) < 10_000  # of 512,000 texts


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_sizes_end_soon(what, tmp_path):
    file, told = HOSTILE[what]
    path = file.write(tmp_path)
    start = time.process_time()
    with pytest.raises(UnsupportedError, match=told) if told else nullcontext():
        str(wb.open(path))
    assert time.process_time() - start < 10  # alone on a core a fifth of this


def test_big_endian_blocks_are_listed_and_locked(tmp_path):
    ckpt = wb.open(Hand(">").info("q", [32], 8).write(tmp_path, bytes(34)))
    assert isinstance(ckpt["q"].source.storage, Packed)
    assert "big-endian" in ckpt["q"].locked


def test_a_view_says_how_the_values_are_stored(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    values = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("w", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ckpt = wb.open(tmp_path / "m.gguf")
    assert ckpt["w"].packing == "Q8_0"
    assert "float32 (Q8_0)" in str(ckpt)
