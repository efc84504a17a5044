"""The archive view against zipfile, torch's own reader and the file's size; big-endian values against torch.load."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.serialization import LoadEndianness
from torch.utils.serialization import config

import workbench as wb
from workbench.errors import CancelledError, CorruptFileError, MissingFileError, SelectionError


def state():
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(6, 4, generator=generator)
    return {
        "w": base,
        "tied": base,
        "row": base[2],
        "half": torch.randn(5, generator=generator).half(),
        "brain": torch.randn(5, generator=generator).bfloat16(),
        "steps": torch.arange(7),
        "complex": torch.randn(3, generator=generator, dtype=torch.complex64),
        "flag": torch.tensor([True, False]),
        "double": torch.randn(2, 2, generator=generator, dtype=torch.float64).t(),
    }


def rows(report):
    return {row.name: row for row in report.rows}


BUILDERS = {
    "zip.pt": lambda path: torch.save({"model": state(), "epoch": 3}, path),
    "legacy.pt": lambda path: torch.save({"model": state(), "epoch": 3}, path, _use_new_zipfile_serialization=False),
    "s.safetensors": lambda path: save_file({"a": torch.ones(5), "b": torch.ones(3, 3).half()}, path, {"format": "pt"}),
    "a.npy": lambda path: np.save(path, np.ones((3, 4))),
    "a.npz": lambda path: np.savez(path, a=np.ones((3, 4)), b=np.zeros(2)),
    "packed.npz": lambda path: np.savez_compressed(path, a=np.ones((300, 4)), b=np.zeros(2)),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_the_rows_add_up_to_the_file(name, tmp_path):
    BUILDERS[name](tmp_path / name)
    report = wb.archive(tmp_path / name)
    assert sum(row.nbytes for row in report.rows) == report.total == os.path.getsize(tmp_path / name)
    assert report
    assert report.headline in str(report)
    json.dumps(report.to_dict())


@pytest.mark.parametrize("name", ["zip.pt", "a.npz", "packed.npz"])
def test_a_zip_archive_is_told_as_zipfile_tells_it(name, tmp_path):
    BUILDERS[name](tmp_path / name)
    found = rows(wb.archive(tmp_path / name, crc=True))
    with zipfile.ZipFile(tmp_path / name) as archive:
        for info in archive.infolist():
            row = found[info.filename]
            assert (row.nbytes, row.size, row.crc) == (info.compress_size, info.file_size, f"{info.CRC:08x}")
            assert row.packing == {0: "stored", 8: "deflated"}[info.compress_type]
            with open(tmp_path / name, "rb") as file:
                file.seek(row.offset)
                data = file.read(row.nbytes)
            if row.packing == "stored":
                assert data == archive.read(info)


def test_offsets_are_those_of_torchs_own_reader(tmp_path):
    BUILDERS["zip.pt"](tmp_path / "z.pt")
    reader = torch._C.PyTorchFileReader(str(tmp_path / "z.pt"))
    found = rows(wb.archive(tmp_path / "z.pt"))
    for name in reader.get_all_records():
        assert found[f"z/{name}"].offset == reader.get_record_offset(name), name


def test_what_a_torch_archive_says_of_itself(tmp_path):
    BUILDERS["zip.pt"](tmp_path / "z.pt")
    report = wb.archive(tmp_path / "z.pt")
    told = dict(report.facts)
    assert (told["root folder"], told["byteorder"], told["version"], told[".format_version"]) == ("z", "little", "3", "1")
    assert told[".storage_alignment"] == told["storages begin at multiples of"] == "64"
    assert len(told[".data/serialization_id"]) == 40
    assert rows(report)["z/data.pkl"].note == "pickle, protocol 2"
    torch.save({"a": torch.ones(2)}, tmp_path / "p.pt", pickle_protocol=4)
    assert rows(wb.archive(tmp_path / "p.pt"))["p/data.pkl"].note == "pickle, protocol 4"


def test_another_alignment_is_seen(tmp_path):
    with config.patch("save.storage_alignment", 4096):
        torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    report = wb.archive(tmp_path / "a.pt")
    assert dict(report.facts)["storages begin at multiples of"] == "4096"
    assert rows(report)["a/data/0"].alignment == 4096


def test_a_file_without_checksums_is_not_called_damaged(tmp_path):
    with config.patch("save.compute_crc32", False):
        torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    report = wb.archive(tmp_path / "a.pt", crc=True)
    assert report
    assert rows(report)["a/data/0"].crc == ""
    assert "none is stated" in dict(report.facts)["CRC-32"]


def test_a_changed_byte_is_found_by_its_checksum_alone(tmp_path):
    path = tmp_path / "z.pt"
    BUILDERS["zip.pt"](path)
    row = rows(wb.archive(path))["z/data/0"]
    data = bytearray(path.read_bytes())
    data[row.offset] ^= 1
    path.write_bytes(data)
    assert wb.archive(path)
    report = wb.archive(path, crc=True)
    assert not report
    assert [r.name for r in report.rows if r.fault] == ["z/data/0"]
    assert "z/data/0" in report.headline


def test_reading_for_checksums_can_be_watched_and_cancelled(tmp_path):
    BUILDERS["zip.pt"](tmp_path / "z.pt")
    seen = []
    wb.archive(tmp_path / "z.pt", crc=True, progress=seen.append)
    assert seen
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(CancelledError):
        wb.archive(tmp_path / "z.pt", crc=True, cancel=cancel)


def test_an_archive_without_a_checkpoint_is_shown_all_the_same(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing")
        archive.writestr("data.pkl", b"not a pickle")
        archive.writestr("x/data.pkl", b"neither")
    assert list(rows(wb.archive(tmp_path / "x.zip")))[:3] == ["readme.txt", "data.pkl", "x/data.pkl"]


def test_a_record_packed_in_a_way_that_is_not_read_is_a_fault(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a/data.pkl", b"x" * 100)
    report = wb.archive(tmp_path / "x.zip")
    assert not report
    assert (rows(report)["a/data.pkl"].packing, rows(report)["a/data.pkl"].offset) == ("method 12", None)
    assert sum(row.nbytes for row in report.rows) == report.total


def test_a_legacy_file_is_five_pickles_and_its_storages(tmp_path):
    path = tmp_path / "l.pt"
    BUILDERS["legacy.pt"](path)
    report = wb.archive(path)
    names = [row.name for row in report.rows[:5]]
    assert names == ["magic number", "version of the protocol", "system", "the object", "keys of the storages"]
    with open(path, "rb") as file:
        for row in report.rows[:3]:
            assert file.tell() == row.offset
            value = pickle.load(file)  # a file this test wrote
            assert file.tell() == row.offset + row.nbytes
        assert value["little_endian"] is True
    storages = [row for row in report.rows[5:] if row.offset is not None]
    assert sum(row.nbytes for row in storages) == 6 * 4 * 4 + 5 * 2 + 5 * 2 + 7 * 8 + 3 * 8 + 2 + 4 * 8
    assert rows(report)["counts, framing and padding between them"].nbytes == 8 * len(storages)
    assert rows(report)["model.w"].note == "on it: 3 tensors"


def test_an_old_tar_is_its_members(tmp_path):
    path = tmp_path / "old.tar"

    def pickles(*values):
        return b"".join(pickle.dumps(value, 2) for value in values)

    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in (
            ("sys_info", pickles({})),
            ("storages", pickles(0) + pickles([])),
            ("tensors", pickles(0)),
            ("pickle", pickles({"a": 1})),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    report = wb.archive(path)
    assert {"sys_info", "storages", "tensors", "pickle"} <= rows(report).keys()
    with tarfile.open(path) as archive:
        for member in archive:
            assert (rows(report)[member.name].offset, rows(report)[member.name].nbytes) == (member.offset_data, member.size)
    assert sum(row.nbytes for row in report.rows) == report.total == os.path.getsize(path)


def test_safetensors_is_a_header_and_its_tensors(tmp_path):
    path = tmp_path / "s.safetensors"
    BUILDERS["s.safetensors"](path)
    report = wb.archive(path)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert (rows(report)["header"].offset, rows(report)["header"].nbytes) == (0, 8 + length)
    assert dict(report.facts)["format"] == "pt"
    assert rows(report)["a"].nbytes == 20


def test_shards_are_files(tmp_path):
    weight_map = {}
    for i in range(2):
        weight_map[f"w{i}"] = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({f"w{i}": torch.ones(4, i + 1)}, tmp_path / weight_map[f"w{i}"])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for source in (tmp_path, tmp_path / "model.safetensors.index.json"):
        report = wb.archive(source)
        assert set(rows(report)) == {*weight_map.values(), "model.safetensors.index.json"}
        assert all(row.nbytes == os.path.getsize(tmp_path / row.name) for row in report.rows)


def test_what_lives_in_memory_has_no_container():
    for source in ({"a": torch.ones(2)}, torch.nn.Linear(2, 2), wb.ops.cast(wb.open({"a": torch.ones(2)}), "float16")):
        with pytest.raises(SelectionError):
            wb.archive(source)


def test_files_that_are_not_there_or_broken_are_refused(tmp_path):
    with pytest.raises(MissingFileError):
        wb.archive(tmp_path / "none.pt")
    BUILDERS["zip.pt"](tmp_path / "z.pt")
    data = (tmp_path / "z.pt").read_bytes()
    (tmp_path / "z.pt").write_bytes(data[:-20])
    with pytest.raises(CorruptFileError):
        wb.archive(tmp_path / "z.pt")


def test_names_in_an_archive_stay_text(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("<b>\x1b[31m/data.pkl", b"x")
    report = wb.archive(tmp_path / "x.zip")
    assert "<b>" not in report._repr_html_()
    assert "\x1b" not in str(report)


def test_listing_reads_no_payload_and_imports_nothing_heavy(tmp_path):
    BUILDERS["zip.pt"](tmp_path / "z.pt")
    code = "import sys, workbench as wb; str(wb.archive(sys.argv[1])); print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "z.pt")], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_gguf_is_its_header_its_tensors_and_padding(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(3)
    writer.add_tensor("a", np.ones((3, 5), dtype=np.float32))
    writer.add_tensor("q", np.zeros((2, 34), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = wb.archive(tmp_path / "m.gguf")
    for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        assert (rows(report)[tensor.name].offset, rows(report)[tensor.name].nbytes) == (tensor.data_offset, tensor.n_bytes)
    assert sum(row.nbytes for row in report.rows) == os.path.getsize(tmp_path / "m.gguf")
    assert dict(report.facts)["llama.block_count"] == "3"


# big-endian files


def swapped(path):
    """The same checkpoint as a big-endian machine would write it: every element's bytes turned round."""
    units = {}
    for tensor in torch.load(path)["model"].values():
        units[tensor.untyped_storage().nbytes()] = tensor.element_size() // (2 if tensor.is_complex() else 1)
    data = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(data, "w") as new:
        for record in old.infolist():
            content = old.read(record)
            if record.filename.endswith("/byteorder"):
                content = b"big"
            elif "/data/" in record.filename:
                unit = units[len(content)]
                content = b"".join(content[i : i + unit][::-1] for i in range(0, len(content), unit))
            new.writestr(record.filename, content)
    path.write_bytes(data.getvalue())


def test_big_endian_values_are_those_that_torch_loads(tmp_path):
    path = tmp_path / "b.pt"
    model = {  # storages of distinct lengths, so that each is known by its own
        "f4": torch.randn(3, 5, generator=torch.Generator().manual_seed(2)),
        "f2": torch.randn(7).half(),
        "bf": torch.randn(9).bfloat16(),
        "f8": torch.randn(2, 2, dtype=torch.float64),
        "i8": torch.arange(5),
        "c8": torch.randn(6, dtype=torch.complex64),
        "u1": torch.arange(11, dtype=torch.uint8),
    }
    torch.save({"model": model}, path)
    swapped(path)
    expected = torch.load(path)["model"]
    assert all(torch.equal(expected[name], tensor) for name, tensor in model.items())
    ckpt = wb.open(path).weights
    for name, tensor in model.items():
        assert torch.equal(ckpt[name].load(), tensor), name
        assert ckpt[name].peek(4) == tensor.reshape(-1)[:4].tolist(), name
        assert torch.equal(torch.cat([chunk for _, chunk in ckpt[name].chunks(8)]), tensor.reshape(-1)), name
    assert dict(wb.archive(path).facts)["byteorder"] == "big"
    wb.save(wb.open(path), tmp_path / "little.pt")
    again = torch.load(tmp_path / "little.pt")["model"]
    assert all(torch.equal(again[name], tensor) for name, tensor in model.items())
    assert dict(wb.archive(tmp_path / "little.pt").facts)["byteorder"] == "little"


def test_a_file_that_does_not_tell_its_order_is_little_endian_as_torch_reads_it_by_default(tmp_path):
    path = tmp_path / "n.pt"
    torch.save({"a": torch.arange(5)}, path)
    data = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(data, "w") as new:
        for record in old.infolist():
            if not record.filename.endswith("byteorder"):
                new.writestr(record.filename, old.read(record))
    path.write_bytes(data.getvalue())
    before = torch.serialization.get_default_load_endianness()
    torch.serialization.set_default_load_endianness(LoadEndianness.LITTLE)
    try:
        expected = torch.load(path)["a"]
    finally:
        torch.serialization.set_default_load_endianness(before)
    assert torch.equal(wb.open(path)["a"].load(), expected)
