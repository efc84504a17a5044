"""The index of many records, against Python's zipfile, and how little of it is done one by one."""

import struct
import zipfile

import pytest

from workbench.errors import CorruptFileError
from workbench.files import file_ref
from workbench.formats import zip_index


@pytest.fixture
def singly(monkeypatch):
    """The places of the records that were read one by one."""
    asked, honest = [], zip_index._central_record
    monkeypatch.setattr(zip_index, "_central_record", lambda data, at, base: asked.append(at) or honest(data, at, base))
    return asked


def written(path, names, **how):
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name in names:
            archive.writestr(name, name.encode() * 3)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_names_of_changing_length_are_read_at_once(method, singly, tmp_path):
    names = [f"a/data/{'x' * (i % 3)}{i}" for i in range(5000)]
    path = written(tmp_path / "a.zip", names, compression=method)
    index = zip_index.read_zip_index(file_ref(path))
    assert len(singly) < 100
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            record = index.records[info.filename]
            told = (record.packed, record.size, record.crc, record.header, record.method)
            assert told == (info.compress_size, info.file_size, info.CRC, info.header_offset, info.compress_type)
        assert list(index.records) == archive.namelist()


def test_names_that_hold_a_mark_or_other_letters_are_read_as_zipfile_reads_them(tmp_path):
    names = [f"a/PK\1\2{i}" if i % 40 == 20 else f"a/\u00fc{i}" if i % 40 == 30 else f"a/{i}" for i in range(400)]
    path = written(tmp_path / "a.zip", names)
    assert list(zip_index.read_zip_index(file_ref(path)).records) == zipfile.ZipFile(path).namelist() == names


def test_records_of_one_length_are_read_at_once_as_they_are_singly(monkeypatch, tmp_path):
    names = [f"a/data/{i}" for i in range(10, 50)]
    path = written(tmp_path / "a.zip", names)
    honest = path.read_bytes()
    entry = honest.rindex(b"a/data/30") - 46

    def told():
        try:
            index = zip_index.read_zip_index(file_ref(path))
            return [list(column) for column in index.records.columns], index._plain
        except CorruptFileError as error:
            return error.message

    seen = set()
    for at in range(entry, entry + 46 + len(names[20])):
        path.write_bytes(honest[:at] + bytes([honest[at] ^ 0x81]) + honest[at + 1 :])
        with monkeypatch.context() as patch:
            quick = told()
            patch.setattr(zip_index, "_alike_records", lambda data, at, *more: ([], at))
            patch.setattr(zip_index, "_plain_records", lambda data, at, *more: ([], at))
            assert quick == told(), at - entry
        seen.add(str(quick))
    assert len(seen) > 20


def test_stored_records_that_lie_anywhere_are_found_in_one_pass_unless_their_header_contradicts(tmp_path):
    names = [f"a/{i}" for i in range(50)]
    path = written(tmp_path / "a.zip", names)
    data = bytearray(path.read_bytes())
    data[data.index(b"a/7")] ^= 1  # in its local header
    path.write_bytes(data)
    index = zip_index.read_zip_index(file_ref(path))
    assert {*names} - {*index.stored} == {"a/7"}
    assert all(index.stored[name].read() == name.encode() * 3 for name in index.stored)
    with pytest.raises(CorruptFileError, match="different records"):
        index.storage("a/7")


@pytest.mark.parametrize("extra", [b"", b"data of another kind"])
def test_a_zip64_end_record_with_more_in_it_is_refused(extra, tmp_path):
    path = written(tmp_path / "a.zip", ["a/1", "a/2"])
    data = path.read_bytes()
    size, offset = struct.unpack_from("<II", data, len(data) - 10)
    body = struct.pack("<HHIIQQQQ", 45, 45, 0, 0, 2, 2, size, offset) + extra
    record = b"PK\6\6" + struct.pack("<Q", len(body)) + body
    locator = b"PK\6\7" + struct.pack("<IQI", 0, len(data) - 22, 1)
    path.write_bytes(data[:-22] + record + locator + data[-22:])
    if extra:
        with pytest.raises(CorruptFileError, match="ZIP64"):
            zip_index.read_zip_index(file_ref(path))
    else:
        assert list(zip_index.read_zip_index(file_ref(path)).records) == zipfile.ZipFile(path).namelist()
