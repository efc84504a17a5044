"""Hostile safetensors headers, shard indexes, and things that are no file at all."""

import contextlib
import json
import os
import time

import pytest
import torch
from hostile_makers import entry, safetensors
from safetensors.torch import save_file

import workbench as wb
from workbench.errors import (
    CorruptFileError,
    FormatError,
    MissingFileError,
    MissingShardError,
    UnknownFormatError,
    UnsupportedError,
    WorkbenchError,
)
from workbench.files import Folder


def refused(path, kind=FormatError):
    start = time.process_time()
    with pytest.raises(kind) as caught:
        [t.load() for t in wb.open(path).values()]
    assert time.process_time() - start < 2
    return caught.value


HEADERS = {
    "duplicate tensors": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
    "duplicate fields": (b'{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}', 4),
    "duplicate metadata": (b'{"__metadata__":{"x":"1"},"__metadata__":{"x":"2"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
    "a hole": ({"a": entry(), "b": entry(8, 12)}, 12),
    "an overlap": ({"a": entry(), "b": entry(2, 6)}, 6),
    "the same bytes twice": ({"a": entry(), "b": entry()}, 4),
    "a hole in front": ({"a": entry(4, 8)}, 8),
    "trailing bytes": ({"a": entry()}, 5),
    "cut data": ({"a": entry()}, 3),
    "offsets past the end": ({"a": entry(0, 4000, (1000,))}, 4),
    "offsets reversed": ({"a": entry(4, 0)}, 4),
    "negative offsets": ({"a": entry(-4, 0)}, 4),
    "three offsets": ({"a": {**entry(), "data_offsets": [0, 2, 4]}}, 4),
    "huge offsets": ({"a": entry(0, 2**64)}, 4),
    "offsets of text": ({"a": {**entry(), "data_offsets": ["0", "4"]}}, 4),
    "offsets that are true": ({"a": {**entry(0, 1, (1,), "U8"), "data_offsets": [False, True]}}, 1),
    "float offsets": ({"a": {**entry(), "data_offsets": [0.0, 4.0]}}, 4),
    "shape of text": ({"a": {**entry(), "shape": ["1"]}}, 4),
    "shape NaN": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', 4),
    "shape Infinity": (b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}', 4),
    "shape 1e0": (b'{"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}', 4),
    "shape negative": ({"a": entry(shape=(-1,))}, 4),
    "shape too large": ({"a": entry(shape=(2**63, 2**63))}, 4),
    "shape with a zero hides a huge one": ({"a": entry(0, 0, (0, 2**70))}, 0),
    "shape disagrees with the offsets": ({"a": entry(shape=(2,))}, 4),
    "shape of five thousand digits": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', 4),
    "shape null": ({"a": {**entry(), "shape": None}}, 4),
    "unknown dtype": ({"a": entry(dtype="F31")}, 4),
    "dtype is a list": ({"a": entry(dtype=["F32"])}, 4),
    "dtype null": ({"a": entry(dtype=None)}, 4),
    "4-bit with an odd last dimension": ({"a": entry(0, 2, (3,), "F4")}, 2),
    "a field too many": ({"a": {**entry(), "strides": [1]}}, 4),
    "a field too few": ({"a": {"dtype": "F32", "shape": [1]}}, 4),
    "entry is a list": ({"a": [1, 2]}, 4),
    "entry is null": ({"a": None}, 4),
    "metadata of numbers": ({"__metadata__": {"x": 1}, "a": entry()}, 4),
    "metadata nested": ({"__metadata__": {"x": {"y": "z"}}, "a": entry()}, 4),
    "metadata a list": ({"__metadata__": ["x"], "a": entry()}, 4),
    "metadata a number": ({"__metadata__": 1, "a": entry()}, 4),
    "deep JSON": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0),
    "a list for a header": (b"[1, 2, 3]", 0),
    "JSON cut": (b'{"a":{"dtype":"F32"', 4),
    "bytes after the JSON": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}} {}', 4),
    "no UTF-8": (b'{"\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
    "a byte order mark": (b'\xef\xbb\xbf{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
    "UTF-16": ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.encode("utf-16-le"), 4),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_breaks_the_rules_is_refused(case, tmp_path):
    header, nbytes = HEADERS[case]
    error = refused(safetensors(tmp_path / "bad.safetensors", header, bytes(nbytes)))
    assert len(str(error)) < 1000


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001, 500])
def test_a_header_length_that_cannot_be_is_refused(length, tmp_path):
    refused(safetensors(tmp_path / "bad.safetensors", {"a": entry()}, bytes(4), length=length))


@pytest.mark.parametrize(
    ("header", "nbytes", "names"),
    [
        ({}, 0, []),
        ({"__metadata__": {}}, 0, []),
        ({"a": entry(0, 0, (0,)), "b": entry(0, 4), "c": entry(4, 4, (3, 0))}, 4, ["a", "b", "c"]),
        ({"scalar": entry(shape=())}, 4, ["scalar"]),
        ({"b": entry(4, 8), "a": entry(0, 4)}, 8, ["b", "a"]),
        (
            {"<img src=x onerror=alert(1)>": entry(), "\x1b[31m\u202e\x7f": entry(4, 8)},
            8,
            ["<img src=x onerror=alert(1)>", "\x1b[31m\u202e\x7f"],
        ),
    ],
    ids=["empty", "empty metadata", "empty tensors", "scalar", "out of order", "odd names"],
)
def test_an_unusual_header_within_the_rules_is_read(header, nbytes, names, tmp_path):
    path = safetensors(tmp_path / "odd.safetensors", header, bytes(nbytes))
    from safetensors import safe_open

    with safe_open(path, "pt") as official:
        assert set(official.keys()) == set(names)
    ckpt = wb.open(path)
    assert list(ckpt) == names
    assert all(c.isprintable() or c == "\n" for c in str(ckpt))
    assert "<img" not in ckpt._repr_html_()


def sharded(folder, weight_map, shards=None):
    for name, tensors in (
        shards if shards is not None else {"s1.safetensors": {"a": torch.ones(2)}, "s2.safetensors": {"b": torch.zeros(2)}}
    ).items():
        save_file(tensors, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.fixture
def outside(tmp_path):
    """A checkpoint that must not be read, beside the folder that holds the index."""
    save_file({"secret": torch.ones(1)}, tmp_path / "secret.safetensors")
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["../secret.safetensors", "x/../../secret.safetensors", "./../secret.safetensors"])
def test_a_shard_that_climbs_out_is_refused(name, outside):
    assert "outside" in str(refused(sharded(outside, {"secret": name}), UnsupportedError))


def test_long_and_many_paths_cost_few_questions(tmp_path, monkeypatch):
    """Each step of a path is a call to the system; a folder that holds many of the files is looked for once."""
    asked = []
    honest = os.lstat
    monkeypatch.setattr(os, "lstat", lambda path, **options: asked.append(path) or honest(path, **options))
    refused(sharded(tmp_path, {"t": "x/" * 500 + "s.safetensors"}), UnsupportedError)
    few = len(tmp_path.parts) + 20
    assert len(asked) < few
    folder = Folder(str(tmp_path))
    for number in range(200):
        with pytest.raises(MissingFileError):
            folder.file(f"a/b/c/d/{number}")
    assert len(asked) < 2 * few + 200
    with contextlib.suppress(UnsupportedError):
        for number in range(2000):
            with contextlib.suppress(MissingFileError):
                folder.file(f"{number}/f")
    with pytest.raises(UnsupportedError, match="one folder more"):
        folder.file("more/f")


def test_an_absolute_shard_is_refused(outside):
    refused(sharded(outside, {"secret": str(outside.parent / "secret.safetensors")}), UnsupportedError)


@pytest.mark.parametrize("through", ["file", "folder"])
def test_a_link_that_leads_out_is_refused_and_told_where(through, outside):
    if through == "file":
        os.symlink("../secret.safetensors", outside / "link.safetensors")
    else:
        os.symlink("..", outside / "up")
    error = refused(sharded(outside, {"secret": "link.safetensors" if through == "file" else "up/secret.safetensors"}), UnsupportedError)
    assert str(outside.parent / "secret.safetensors") in str(error)


def test_links_within_a_hub_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "0123")
    os.symlink("../../blobs/0123", snapshot / "s1.safetensors")
    assert wb.open(sharded(snapshot, {"a": "s1.safetensors"}, {}))["a"].load().tolist() == [1, 1]


def test_a_link_out_of_a_hub_cache_is_refused(tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    (tmp_path / "models--x" / "blobs").mkdir(parents=True), snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, tmp_path / "elsewhere")
    os.symlink("../../../elsewhere", snapshot / "s1.safetensors")
    refused(sharded(snapshot, {"a": "s1.safetensors"}, {}), UnsupportedError)


def test_a_tensor_that_its_shard_lacks_is_an_error_that_names_both(tmp_path):
    error = refused(sharded(tmp_path, {"a": "s1.safetensors", "ghost": "s2.safetensors"}), CorruptFileError)
    assert "ghost" in str(error)
    assert "s2.safetensors" in str(error)


def test_a_tensor_that_the_index_forgets_is_a_finding(tmp_path):
    ckpt = wb.open(sharded(tmp_path, {"a": "s1.safetensors"}, {"s1.safetensors": {"a": torch.ones(1), "extra": torch.ones(1)}}))
    assert list(ckpt) == ["a"]
    assert any("extra" in f.where.get("tensors", ()) for f in ckpt.findings)


@pytest.mark.parametrize("content", [b"", b"{", b"\x80\x02."])
def test_a_shard_that_is_broken_is_named(content, tmp_path):
    index = sharded(tmp_path, {"a": "s1.safetensors", "b": "s2.safetensors"})
    (tmp_path / "s2.safetensors").write_bytes(content)
    assert "s2.safetensors" in str(refused(index))


@pytest.mark.parametrize(
    "shard", ["x" * 300, "a/b/c.safetensors", "s1.safetensors/x", "nul\0.safetensors", ".", "\ud800", "s3.safetensors", "folder"]
)
def test_a_shard_name_that_leads_nowhere_is_an_error_of_ours(shard, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(WorkbenchError) as caught:
        wb.open(sharded(tmp_path, {"a": "s1.safetensors", "b": shard}))
    if shard == "s3.safetensors":
        assert isinstance(caught.value, MissingShardError)
        assert list(caught.value.partial) == ["a"]


def test_a_shard_that_is_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(sharded(tmp_path, {"a": "pipe.safetensors"}), UnknownFormatError)


@pytest.mark.parametrize(
    "index",
    [
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ""}}',
        '{"metadata": {}}',
        '{"weight_map": ' + "[" * 50_000,
        '{"weight_map": {"a": "s1.safetensors", "a": "s2.safetensors"}}',
    ],
    ids=["empty", "list", "number", "empty name", "no map", "deep", "duplicate names"],
)
def test_an_index_that_is_none_is_refused(index, tmp_path):
    sharded(tmp_path, {"a": "s1.safetensors"})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    if index == '{"weight_map": {}}':
        assert len(wb.open(tmp_path / "model.safetensors.index.json")) == 0
    else:
        refused(tmp_path / "model.safetensors.index.json", UnknownFormatError if "weight_map" not in index else CorruptFileError)


# things that are no file


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    refused(tmp_path / "pipe.pt", UnknownFormatError)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/random", "/proc/self/mem", "/proc/self/status"])
def test_a_device_is_refused_at_once(device):
    refused(device)


def test_an_empty_folder_is_refused(tmp_path):
    assert "empty" in str(refused(tmp_path, UnknownFormatError))


def test_a_folder_of_two_checkpoints_is_ambiguous(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"a": torch.ones(1)}, tmp_path / name)
    assert "a.safetensors" in str(refused(tmp_path, UnknownFormatError))


def test_a_folder_with_a_pipe_and_a_dead_link_in_it_opens_its_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink("nowhere", tmp_path / "dead")
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert list(wb.open(tmp_path)) == ["a"]


@pytest.mark.parametrize("size", [0, 1, 3, 7, 8])
def test_a_few_bytes_are_no_checkpoint(size, tmp_path):
    (tmp_path / "x.pt").write_bytes(b"PK\x03\x04\0\0\0\0"[:size])
    refused(tmp_path / "x.pt")


@pytest.mark.parametrize("path", ["no/such/file.pt", "x\0y.pt", "", "n" * 300, "/dev/null/x", "\ud800.pt"])
def test_a_path_that_leads_nowhere_is_a_missing_file(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((MissingFileError, UnknownFormatError)):
        wb.open(path)


def test_a_circle_of_links_is_a_missing_file(tmp_path):
    os.symlink(tmp_path / "b", tmp_path / "a")
    os.symlink(tmp_path / "a", tmp_path / "b")
    with pytest.raises(MissingFileError):
        wb.open(tmp_path / "a")


def test_a_file_that_may_not_be_read_is_told_so(tmp_path):
    path = safetensors(tmp_path / "a.safetensors", {"a": entry()}, bytes(4))
    real = os.open

    def refuse(name, *args, **kwargs):
        if os.fspath(name) == str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(name, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:  # permission bits do not bind root, which may run these tests
        patch.setattr(os, "open", refuse)
        with pytest.raises(WorkbenchError, match="may not be read"):
            wb.open(path)


OTHERS = {
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(20),
    "gzip": b"\x1f\x8b\x08" + bytes(20),
    "LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "HTML page": b"<!DOCTYPE html><html></html>",
    "tar": b"a" * 257 + b"ustar" + bytes(250),
    "empty": b"",
    "text": b"just some words\n",
}


@pytest.mark.parametrize("word", OTHERS)
def test_what_a_strangers_file_is_instead_is_said(word, tmp_path):
    (tmp_path / "model.pt").write_bytes(OTHERS[word])
    assert word in str(refused(tmp_path / "model.pt", (UnknownFormatError, UnsupportedError)))


def test_only_the_header_of_a_big_file_is_read(tmp_path):
    """A terabyte that is not there: listing a sparse file reads its index alone."""
    n = 2**38
    path = safetensors(tmp_path / "big.safetensors", {"a": entry(0, 4 * n, (n,))})
    os.truncate(path, os.path.getsize(path) + 4 * n)
    start = time.process_time()
    assert wb.open(path)["a"].peek(2) == [0.0, 0.0]
    assert time.process_time() - start < 1
