"""Hostile zip archives: headers that disagree, records that overlap or repeat, lies about sizes. One clear error, never a choice."""

import os
import re
import struct
import time
import zipfile

import numpy as np
import pytest
import torch
from hostile_makers import PROTO, REAL, REAL_DATA, Record, good_records, pickled, raw_zip, tensor, torch_zip

import workbench as wb
from workbench.analyses import scanner
from workbench.errors import CorruptFileError, FormatError, UnknownFormatError, UnsupportedError

GOOD = {"weight": [1, 2, 3], "bias": [4, 5, 6]}


def outcome(path):
    """The values, a FormatError, or a locked tensor's CorruptFileError; anything else is a failure. In two seconds."""
    start = time.process_time()
    try:
        found = {name: t.load().tolist() for name, t in wb.open(path).items()}
    except FormatError as error:
        found = error
    assert isinstance(found, dict) or re.search(r"path |record |storage '", str(found)), found
    assert time.process_time() - start < 2
    return found


LIES = {
    "local name": {"local_name": b"archive/data/9"},
    "local name of the same length": {"local_name": b"archive/data/1"},
    "local method": {"local_method": 8},
    "central method": {"central_method": 8},
    "both methods deflate, bytes are not": {"method": 8},
    "local flags": {"local_flags": 1},
    "central flags": {"central_flags": 8},
    "encrypted on both sides": {"flags": 1},
    "strong encryption": {"flags": 0x40},
    "method 99": {"method": 99},
    "LZMA": {"method": 14},
    "local size larger": {"local_size": 100, "local_packed": 100},
    "local size smaller": {"local_size": 4, "local_packed": 4},
    "central size larger": {"central_size": 100, "central_packed": 100},
    "central size smaller": {"central_size": 4, "central_packed": 4},
    "both sizes smaller": {"size": 8, "packed": 8},
    "both sizes huge": {"size": 0x7FFFFFFF, "packed": 0x7FFFFFFF},
    "stored with two sizes": {"packed": 12, "size": 24},
    "checksums differ": {"local_crc": 1},
    "64-bit mark without the field": {"central_size": 0xFFFFFFFF, "central_packed": 0xFFFFFFFF},
    "local header elsewhere": {"central_header": 3},
    "local header past the end": {"central_header": 10**8},
    "local header on its neighbour": {"central_header": 0},
    "payload shifted by the extra field": {"local_extra": b"FB" + struct.pack("<H", 40) + b"Z" * 40, "data_follows": False},
    "extra field runs away": {"local_extra": b"FB" + struct.pack("<H", 60_000)},
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_headers_that_disagree_refuse_the_record_and_name_it(case, tmp_path):
    lies = {key: value for key, value in LIES[case].items() if key != "data_follows"}
    found = outcome(raw_zip(tmp_path / "lies.pt", good_records(**lies)))
    if case in ("payload shifted by the extra field", "extra field runs away"):
        assert found == GOOD  # the extra field is there in truth: the payload lies behind it
        return
    assert isinstance(found, (CorruptFileError, UnsupportedError)), found


def test_a_payload_that_reaches_into_the_next_record_is_refused(tmp_path):
    """The local header states an extra field that is not there, so that the payload would be read out of its neighbour."""
    records = good_records()
    path = raw_zip(tmp_path / "shifted.pt", records)
    data = bytearray(path.read_bytes())
    at = data.index(b"archive/data/0") - 2
    data[at : at + 2] = struct.pack("<H", 44)
    path.write_bytes(bytes(data))
    assert isinstance(outcome(path), CorruptFileError)


@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/data/0", "archive/byteorder"])
def test_two_records_of_one_name_are_refused(name, tmp_path):
    found = outcome(
        raw_zip(tmp_path / "twice.pt", [*good_records(), Record(name, pickled(REAL) if name.endswith("pkl") else REAL_DATA["1"])])
    )
    assert isinstance(found, CorruptFileError)
    assert name in str(found)


@pytest.mark.parametrize("other", ["other/data.pkl", "data.pkl"])
def test_two_data_pickles_are_ambiguous(other, tmp_path):
    assert "ambiguous" in str(outcome(raw_zip(tmp_path / "two.pt", [*good_records(), Record(other, pickled([]))])))


def test_no_data_pickle_is_no_checkpoint(tmp_path):
    assert isinstance(outcome(raw_zip(tmp_path / "none.pt", good_records()[1:])), UnknownFormatError)


def test_overlapping_records_are_refused(tmp_path):
    inner = Record("archive/data/1", REAL_DATA["1"])
    nested = inner.header("local", 0) + inner.data
    outer = Record("archive/data/0", nested)
    start = sum(len(r.header("local", 0) + r.data) for r in good_records()[:2])
    inner.lies["central_header"] = start + len(outer.header("local", 0))
    path = raw_zip(tmp_path / "overlap.pt", [*good_records()[:2], outer, inner, good_records()[-1]])
    assert isinstance(outcome(path), CorruptFileError)


@pytest.mark.parametrize("count", [0, 4, 6, 0xFFFE])
def test_a_wrong_record_count_is_refused(count, tmp_path):
    assert isinstance(outcome(raw_zip(tmp_path / "count.pt", good_records(), count=count)), FormatError)


def test_two_end_records_are_refused_or_the_true_one_is_read(tmp_path):
    path = raw_zip(tmp_path / "a.pt", good_records())
    once = path.read_bytes()
    decoy = b"PK\x05\x06" + bytes(16) + struct.pack("<H", 22)
    path.write_bytes(once[:-22] + decoy + once[-22:])
    assert isinstance(outcome(path), CorruptFileError)


def test_an_archive_comment_is_read_past(tmp_path):
    assert outcome(raw_zip(tmp_path / "c.pt", good_records(), comment=b"saved by hand " * 300)) == GOOD


def test_a_comment_that_holds_an_end_record_is_not_obeyed(tmp_path):
    decoy = b"PK\x05\x06" + bytes(16) + struct.pack("<H", 0)
    found = outcome(raw_zip(tmp_path / "c.pt", good_records(), comment=decoy))
    assert found == GOOD or isinstance(found, CorruptFileError)


@pytest.mark.parametrize("suffix", [b"\0", b"x" * 10, b"PK\x05\x06", b"PK\x05\x06" + bytes(18)])
def test_bytes_after_the_end_are_refused(suffix, tmp_path):
    assert isinstance(outcome(raw_zip(tmp_path / "s.pt", good_records(), suffix=suffix)), FormatError)


@pytest.mark.parametrize("prefix", [b"\x7fELF" + bytes(60), b"#!/bin/sh\n", b"PK\x03\x04" + bytes(60)])
def test_bytes_before_the_archive_are_no_reason_to_guess(prefix, tmp_path):
    found = outcome(raw_zip(tmp_path / "p.pt", good_records(), prefix=prefix))
    assert found == GOOD or isinstance(found, FormatError)


def test_a_polyglot_of_zip_and_safetensors_is_one_thing_only(tmp_path):
    header = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    path = raw_zip(tmp_path / "poly.pt", good_records(), prefix=struct.pack("<Q", len(header)) + header + b"\0")
    assert isinstance(outcome(path), CorruptFileError)


def test_zip64_records_and_end_are_read(tmp_path):
    path = tmp_path / "z64.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for record in good_records():
            with archive.open(zipfile.ZipInfo(record.name.decode()), "w", force_zip64=True) as out:
                out.write(record.data)
    assert outcome(path) == GOOD
    data = path.read_bytes()
    count, size, start = struct.unpack("<HII", data[-12:-2])
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size, 1)
    path.write_bytes(
        data[:-22] + end64 + locator + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    )
    assert outcome(path) == GOOD
    path.write_bytes(data[:-22] + end64 + locator + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, count + 1, count + 1, size, start, 0))
    assert isinstance(outcome(path), CorruptFileError)


def test_zip64_of_a_wrong_place_is_refused(tmp_path):
    path = raw_zip(tmp_path / "z.pt", good_records(), end=struct.pack("<4sIQI", b"PK\x06\x07", 0, 2**60, 1))
    assert isinstance(outcome(path), CorruptFileError)


@pytest.mark.parametrize("stated", [11, 13, 0, 10**6])
def test_a_deflated_record_whose_size_lies_is_locked_or_refused(stated, tmp_path):
    path = torch_zip(tmp_path / "d.pt", pickled(REAL), method=zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    at = data.index(b"PK\x01\x02", data.index(b"archive/version"))
    central = data.index(b"archive/data/0", at) - 46 + 24
    local = data.index(b"archive/data/0") - 30 + 22
    forged = bytearray(data)
    forged[central : central + 4] = forged[local : local + 4] = struct.pack("<I", stated)
    path.write_bytes(bytes(forged))
    assert isinstance(outcome(path), CorruptFileError)


def test_deflated_bytes_that_go_on_past_the_stated_size_are_refused(tmp_path):
    """The tensor and the directory agree on 12 bytes; the packed stream holds more."""
    path = torch_zip(tmp_path / "more.pt", pickled(REAL), {**REAL_DATA, "0": REAL_DATA["0"] + b"tail" * 3}, zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    for mark, field in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = -1
        while (at := data.find(mark, at + 1)) >= 0:
            if data[at + field + 4 + (4 if field == 22 else 18) :][:14] == b"archive/data/0":
                data[at + field : at + field + 4] = struct.pack("<I", 12)
    path.write_bytes(bytes(data))
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/0").file_size == 12
    assert isinstance(outcome(path), CorruptFileError)


def test_a_thousand_stored_records_of_no_use_do_no_harm(tmp_path):
    found = outcome(raw_zip(tmp_path / "many.pt", [*good_records(), *(Record(f"archive/junk/{i}") for i in range(20_000))]))
    assert found == GOOD


def test_names_that_climb_out_are_only_names(tmp_path):
    path = raw_zip(tmp_path / "climb.pt", [*good_records(), Record("../../evil.txt", b"x"), Record("/etc/evil", b"x")])
    before = set(os.listdir(tmp_path))
    assert outcome(path) == GOOD
    assert set(os.listdir(tmp_path)) == before


def test_a_name_that_is_no_utf8_or_holds_a_nul_is_survived(tmp_path):
    record = Record("x", b"")
    record.name = b"archive/\xff\xfe"
    assert outcome(raw_zip(tmp_path / "n.pt", [*good_records(), record])) == GOOD
    record.name = b"archive/data.pkl\0.txt"
    assert isinstance(outcome(raw_zip(tmp_path / "nul.pt", [*good_records(), record])), CorruptFileError)


@pytest.mark.parametrize("order", [b"middle", b"", b"LITTLE", b"little\n", b"x" * 100_000])
def test_an_unknown_byte_order_is_refused(order, tmp_path):
    records = [r if r.name != b"archive/byteorder" else Record("archive/byteorder", order) for r in good_records()]
    assert isinstance(outcome(raw_zip(tmp_path / "o.pt", records)), FormatError)


def test_a_storage_on_top_of_the_pickle_is_not_read_as_values(tmp_path):
    """A storage key that leads to another record is a name like any other: there is no such storage."""
    found = outcome(torch_zip(tmp_path / "k.pt", pickled([("weight", tensor("../data.pkl", numel=10, shape=(10,)))])))
    assert isinstance(found, CorruptFileError)


def test_what_torch_reads_of_these_we_read_alike(tmp_path):
    """Where both read a tricky archive, the values agree."""
    both = 0
    for case, lies in LIES.items():
        path = raw_zip(tmp_path / "both.pt", good_records(**{k: v for k, v in lies.items() if k != "data_follows"}))
        ours = outcome(path)
        try:
            theirs = {n: t.tolist() for n, t in torch.load(path, weights_only=True).items()}
        except Exception:
            continue
        if isinstance(ours, dict):
            both += 1
            assert ours == theirs, case
    assert both


@pytest.mark.parametrize("content", [b"N.", PROTO + b"N.", b"text"])
def test_very_many_records_that_are_no_tensors_are_told_and_not_all_looked_into(content, tmp_path, monkeypatch):
    monkeypatch.setattr(scanner, "_MOST_RECORDS", 50)
    looked = []
    monkeypatch.setattr(scanner._Scan, "record", lambda *given, own=scanner._Scan.record: looked.append(given) or own(*given))
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for count in range(200):
            archive.writestr(f"a/{count}x", content)
    report = wb.scan(tmp_path / "many.zip")
    assert len(looked) == 50
    assert any(finding.kind == "not scanned" for finding in report.dangers)


def test_very_many_arrays_are_all_looked_at_and_their_numbers_are_no_danger(tmp_path, monkeypatch):
    monkeypatch.setattr(scanner, "_MOST_RECORDS", 50)
    np.savez(tmp_path / "many.npz", **{f"a{count}": np.ones(2) for count in range(200)})
    assert wb.scan(tmp_path / "many.npz").ok
    fields = [(name, "<f4", (3,)) for name in "abcdefghij"]
    np.savez(tmp_path / "fields.npz", **{f"a{count}": np.ones(2, fields) for count in range(200)})
    assert wb.scan(tmp_path / "fields.npz").ok
    with_objects = {f"a{count}": np.array([(1, print)], [("n", "<i4"), ("o", "O")]) for count in range(60)}
    np.savez(tmp_path / "objects.npz", **with_objects)
    assert not wb.scan(tmp_path / "objects.npz").ok
    np.savez(tmp_path / "one.npz", **{f"a{count}": np.ones(2) for count in range(200)}, last=np.array([print], object))
    assert "print" in "".join(finding.message for finding in wb.scan(tmp_path / "one.npz").dangers)
