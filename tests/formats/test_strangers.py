"""Files that no reader claims are told for what they are, by content alone."""

import bz2
import gzip
import io
import lzma
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

import workbench as wb
from workbench.errors import UnknownFormatError


def archive(*names, content=b"x"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name in names:
            made.writestr(name, content)
    return buffer.getvalue()


HDF5 = b"\x89HDF\r\n\x1a\n" + bytes(100)
STRANGERS = {
    "an HDF5 file": [HDF5, b"user block".ljust(512, b"\1") + HDF5, bytes(range(256)) * 32 + HDF5],
    "a TensorFlow Lite model": [b"\x1c\0\0\0TFL3" + bytes(30)],
    "a TensorFlow SavedModel": [b"\x08\x01\x12\xff\x03\n\x20"],
    "a TensorFlow graph": [b"\n\x20\n\x05input\x12\x0bPlaceholder"],
    "the index of a TensorFlow checkpoint": [b"\0\x01\x02model" + struct.pack("<Q", 0xDB4775248B80FB57)],
    "a Core ML model": [b"\x08\x05\x12\x20\n\x05"],
    "a TensorRT engine": [b"ftrt" + bytes(30), b"ptrt" + bytes(30)],
    "an ONNX Runtime model": [b"\x1c\0\0\0ORTM" + bytes(30)],
    "an ExecuTorch program": [b"\x1c\0\0\0ET12" + bytes(30)],
    "a TorchScript mobile module": [b"\x1c\0\0\0PTMF" + bytes(30)],
    "an OpenVINO model description": [b'<?xml version="1.0"?>\n<net name="model" version="11">'],
    "a PaddlePaddle parameter file": [bytes(16) + struct.pack("<I", 2) + b"\x08\x05"],
    "an MXNet parameter file": [struct.pack("<QQQ", 0x112, 0, 3)],
    "a MessagePack file, as Flax writes": [b"\x81\xa6params\x82\xa4Conv\xc7\x10\x01", b"\xde\0\x20\xa5embed\xc1"],
    "a GGML model": [struct.pack("<I", 0x67676D6C) + bytes(9), struct.pack("<I", 0x67676A74) + bytes(9)],
    "a gzip file": [gzip.compress(b"x")],
    "a bzip2 file": [bz2.compress(b"x")],
    "an xz file": [lzma.compress(b"x")],
    "a Zstandard file": [b"\x28\xb5\x2f\xfd\x24\x01"],
    "a 7-Zip archive": [b"7z\xbc\xaf\x27\x1c\0\4"],
    "a RAR archive": [b"Rar!\x1a\x07\x01\0"],
    "zlib-compressed data": [zlib.compress(bytes(100))],
    "an empty zip archive": [archive()],
    "a Keras archive": [archive("metadata.json", "config.json", "model.weights.h5")],
    "a Python wheel": [archive("pkg/__init__.py", "pkg-1.0.dist-info/WHEEL")],
    "an Office document": [archive("[Content_Types].xml", "word/document.xml"), archive("[Content_Types].xml", "xl/workbook.xml")],
    "a Java archive": [archive("META-INF/MANIFEST.MF")],
    "a Core ML package": [archive("m.mlpackage/Manifest.json", "m.mlpackage/Data/model.mlmodel")],
    "a torch.package": [archive("p/.data/extern_modules", "p/.data/version", "p/model/model.pkl")],
    "a zip archive with model files in it": [archive("a/model.pt"), archive("w.safetensors", "config.json")],
    "a zip archive without a checkpoint in it": [archive("a.txt", "b.txt")],
    "a Git LFS pointer": [b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"],
    "an HTML page": [b"<!DOCTYPE html>\n<html>", b"\n  <HTML><body>404", b"\xef\xbb\xbf<html>"],
    "an error message of a storage server": [b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>'],
    "an XML document": [b"<?xml version='1.0'?><svg/>"],
    "JSON": [b'{"a": 1}', b"[1, 2]"],
    "YAML": [b"model: gpt\nlayers: 3\n", b"---\na: 1\n"],
    "Python source code": [b"import torch\nprint(1)\n", b'"""About."""\n\nfrom torch import nn\n', b"# a comment\n\nclass A:\n"],
    "a script": [b"#!/bin/sh\nrm -rf /\n"],
    "a table in text (CSV)": [b"epoch,loss\n1,2.5\n"],
    "plain text": ["naïve \u2192 text\nmore".encode(), "naïve text".encode("utf-16"), b"x" * 4095 + "\u00fc".encode() + b"x" * 50],
    "a file of zeros": [bytes(1), bytes(10_000)],
    "no format this library knows (it starts with 00 00 00 00 00 00 00 00)": [bytes(5000) + b"\1"],
    "an empty file": [b""],
    "a file that OpenSSL encrypted": [b"Salted__" + bytes(range(100))],
    "a file that PGP encrypted": [b"-----BEGIN PGP MESSAGE-----\n"],
    "a picture": [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\xff\xd8\xff\xe0\0\x10JFIF"],
    "a PDF document": [b"%PDF-1.7\n"],
    "an SQLite database": [b"SQLite format 3\0" + bytes(10)],
    "a Parquet table": [b"PAR1\x15\4"],
    "an Arrow table": [b"ARROW1\0\0"],
    "a program or library for Linux": [Path(sys.executable).read_bytes()[:5000]],
    "no format this library knows (it starts with de ad be ef 00 01 02 03)": [b"\xde\xad\xbe\xef\0\1\2\3\4"],
}


@pytest.mark.parametrize("what", STRANGERS)
def test_a_stranger_is_told_for_what_it_is(what, tmp_path):
    for content in STRANGERS[what]:
        (tmp_path / "model.pt").write_bytes(content)
        with pytest.raises(UnknownFormatError) as caught:
            wb.open(tmp_path / "model.pt")
        assert caught.value.message.startswith(f"this is {what}"), content[:40]
        assert "model.pt" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "advice"),
    [(gzip.compress(b"x"), "unpack it first"), (HDF5, "Keras"), (STRANGERS["a Git LFS pointer"][0], "git lfs pull"), (b"", "download")],
)
def test_a_stranger_comes_with_advice(content, advice, tmp_path):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(UnknownFormatError) as caught:
        wb.open(tmp_path / "model.pt")
    assert advice in caught.value.hint


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_a_torch_package_is_told(tmp_path):
    from torch.package import PackageExporter

    with PackageExporter(tmp_path / "p.pt") as exporter:
        exporter.save_pickle("model", "model.pkl", {"w": torch.ones(2)})
    with pytest.raises(UnknownFormatError, match=r"torch\.package"):
        wb.open(tmp_path / "p.pt")


def test_every_stranger_is_told_when_cut_at_any_byte(tmp_path):
    """What is left of a stranger is a stranger too, or a checkpoint's beginning: never a foreign error."""
    for contents in STRANGERS.values():
        for content in contents:
            for cut in range(0, min(len(content), 600), 7):
                (tmp_path / "cut").write_bytes(content[:cut])
                with pytest.raises(wb.errors.FormatError):
                    wb.open(tmp_path / "cut")
