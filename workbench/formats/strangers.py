"""What a file, an archive or a folder is that no reader claims, in words, and what to do with it: told by content, never by extension.

Each function gives the words that complete "this is …" and a hint, or None. A new stranger is one row of the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from workbench.files import FileRef, Span
from workbench.formats.zip_index import ZipIndex

Told = tuple[str, str | None]

_HEAD = 4096
_UNPACK = "unpack it first, and open what was in it"
_SOURCE = "open the model that it was made from"
_DECRYPT = "decrypt it first"
_AGAIN = "download or copy it again"
_KERAS = "load it with Keras and save the weights as .npz: np.savez(path, **{w.path: w.numpy() for w in model.weights})"
_HDF5 = r"\x89HDF\r\n\x1a\n"

# by what is looked at: (regular expression, what it is, hint); bytes are looked at as Latin-1
_TABLE: dict[str, tuple[tuple[str, str, str | None], ...]] = {
    "first bytes": (
        (_HDF5, "an HDF5 file, as Keras writes (.h5)", _KERAS),
        (r"....TFL3", "a TensorFlow Lite model", _SOURCE),
        (r"....PTMF", "a TorchScript mobile module in flatbuffer form", "save it again with _use_flatbuffer=False"),
        (r"....ORTM", "an ONNX Runtime model in flatbuffer form (.ort)", _SOURCE),
        (r"....ET12", "an ExecuTorch program (.pte)", _SOURCE),
        (r"[fp]trt", "a TensorRT engine", _SOURCE),
        (r"(lmgg|[ft]jgg|fmgg)", "a GGML model, older than GGUF", "convert it to GGUF with llama.cpp's scripts"),
        (r".{12}V 1", "a Lua Torch7 file", "load it with the torchfile package"),
        (r"\x12\x01\0{6}", "an MXNet parameter file", "load it with MXNet and save the arrays as .npz"),
        (r"\0{16}[\1-\x40]\0{3}\x08", "a PaddlePaddle parameter file", "load it with Paddle and save the arrays as .npz"),
        (r"PK\x05\x06", "an empty zip archive", None),
        (r"\x1f\x8b", "a gzip file", _UNPACK),
        (r"BZh", "a bzip2 file", _UNPACK),
        (r"\xfd7zXZ\0", "an xz file", _UNPACK),
        (r"\x28\xb5\x2f\xfd", "a Zstandard file", _UNPACK),
        (r"\x04\x22\x4d\x18", "an LZ4 file", _UNPACK),
        (r"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
        (r"Rar!\x1a\x07", "a RAR archive", _UNPACK),
        (r"Salted__", "a file that OpenSSL encrypted", _DECRYPT),
        (r"-----BEGIN PGP MESSAGE", "a file that PGP encrypted", _DECRYPT),
        (r"age-encryption\.org/", "a file that age encrypted", _DECRYPT),
        (r"MATLAB 5\.0 MAT-file", "a MATLAB file", "load it with scipy.io and save the arrays as .npz"),
        (r"PAR1", "a Parquet table", None),
        (r"ARROW1", "an Arrow table", None),
        (r"SQLite format 3\0", "an SQLite database", None),
        (r"\x7fELF", "a program or library for Linux", None),
        (r"MZ.{58}", "a program or library for Windows", None),
        (r"%PDF-", "a PDF document", None),
        (r"\x89PNG|GIF8|\xff\xd8\xff", "a picture (PNG, GIF or JPEG)", None),
    ),
    "last bytes": ((r"\x57\xfb\x80\x8b\x24\x75\x47\xdb\Z", "the index of a TensorFlow checkpoint", "load it with TensorFlow"),),
    "text": (
        (r"\Aversion https://git-lfs", "a Git LFS pointer: the real file was never downloaded", "run git lfs pull, or download the file itself"),
        (r"(?i)\A(<!doctype html|<html|<head)", "an HTML page, such as an error or a sign-in page", _AGAIN),
        (r"\A(<\?xml[^>]*>)?\s*<Error>", "an error message of a storage server", _AGAIN),
        (r"\A(<\?xml[^>]*>)?\s*<net\b", "an OpenVINO model description (.xml)", _SOURCE),
        (r"\A<", "an XML document", None),
        (r"\A[\[{]", "JSON", None),
        (r"\A#!", "a script", None),
        (r"(?m)^(import \w|from [\w.]+ import|(async )?def \w+\(|class \w+[(:])", "Python source code", None),
        (r"\A((%YAML|---)\s|([\w.-]+:([ \t].*)?\n)+)", "YAML", None),
        (r"\A([^,\n]+(,[^,\n]*)+\n){2}", "a table in text (CSV)", None),
        (r"", "plain text", None),
    ),
    "weaker signs": (
        (r"\x08\x01\x12", "a TensorFlow SavedModel (.pb), or the like", "load it with TensorFlow"),
        (r"\x08[\x01-\x0c]\x12", "a Core ML model (.mlmodel), or another protobuf message", _SOURCE),
        (r"\n[\x01-\xff]{1,3}\n[\x01-\x7f][ -~]", "a TensorFlow graph, or another protobuf message", "load it with TensorFlow"),
        (r"[\x81-\x8f\xde\xdf]\0?[\x01-\xff]?[\xa1-\xbf\xd9][ -~]", "a MessagePack file, as Flax writes", "load it with Flax and save the arrays as .npz"),
        (r"\x78[\x01\x5e\x9c\xda]", "zlib-compressed data, as joblib writes", _UNPACK),
    ),
    "records": (
        (r"\A\Z", "an empty zip archive", None),
        (r"\.weights\.h5$", "a Keras archive (.keras)", _KERAS),
        (r"\.data/extern_modules$", "a torch.package: code together with pickles", "it is a program, and is not run here"),
        (r"^MAR-INF/", "a TorchServe archive (.mar)", _UNPACK),
        (r"Data/.*\.mlmodel$", "a Core ML package", _SOURCE),
        (r"\.dist-info/WHEEL$", "a Python wheel", None),
        (r"^(word|xl|ppt)/", "an Office document", None),
        (r"^(META-INF/MANIFEST\.MF|AndroidManifest\.xml)$", "a Java archive or an Android app", None),
        (r"\.(pt|pth|bin|ckpt|safetensors|gguf|onnx|h5|npz|pkl)$", "a zip archive with model files in it", _UNPACK),
        (r"", "a zip archive without a checkpoint in it", _UNPACK),
    ),
    "names": (
        (r"^saved_model\.pb$", "a TensorFlow SavedModel", "load it with TensorFlow"),
        (r"\.data-\d{5}-of-\d{5}$", "a folder of TensorFlow checkpoints", "load it with TensorFlow"),
        (r"^Data\n(.*\n)*Manifest\.json$", "a Core ML package (.mlpackage)", _SOURCE),
        (r"^(_CHECKPOINT_METADATA|manifest\.ocdbt)$", "an Orbax checkpoint of JAX", "load it with Orbax and save the arrays as .npz"),
        (r"\.weights\.h5$", "an unpacked Keras archive", _KERAS),
        (r"^zero_(to_fp32\.py|pp_rank_.*)$", "a DeepSpeed checkpoint, its weights partitioned", "its zero_to_fp32.py puts them together"),
        (r"^__\d+\.metadata$", "a distributed checkpoint that each rank wrote for itself", "save it with use_collectives=True"),
        (r"^shard-\d{5}-model-.*\.safetensors$", "a distributed checkpoint in safetensors shards",
         "consolidate_safetensors_files of torch.distributed.checkpoint puts them together"),
    ),
}  # fmt: skip


def what_file(file: FileRef) -> Told:
    """What a file is that is no zip archive with records in it."""
    whole = Span(file, 0, file.size)
    head, tail = whole.read(0, _HEAD), whole.read(max(0, file.size - _HEAD))
    text = _text(head)
    if not head:
        return "an empty file", _AGAIN
    if not (head + tail).strip(b"\0"):
        return "a file of zeros, as a download leaves that was begun and not finished", _AGAIN
    found = _known("first bytes", head) or _known("last bytes", tail) or (_known("text", text) if text is not None else None)
    at = 512  # HDF5 may begin behind a block of the user's own
    while found is None and at < file.size:
        found = _known("first bytes", whole.read(at, at + 8)) if whole.read(at, at + 4) == b"\x89HDF" else None
        at *= 2
    return found or _known("weaker signs", head) or (f"no format this library knows (it starts with {head[:8].hex(' ')})", None)


def what_archive(index: ZipIndex) -> Told:
    """What a zip archive is."""
    return _known("records", "\n".join(index.records)) or ("a zip archive", None)


def what_folder(names: Iterable[str]) -> Told | None:
    """What a folder is, if it is known for something that is not read."""
    return _known("names", "\n".join(names))


def _known(what: str, subject: str | bytes) -> Told | None:
    find, flags = (re.match, re.DOTALL) if isinstance(subject, bytes) and what != "last bytes" else (re.search, re.MULTILINE)
    text = subject.decode("latin-1") if isinstance(subject, bytes) else subject
    return next(((told, hint) for pattern, told, hint in _TABLE[what] if find(pattern, text, flags)), None)


def _text(head: bytes) -> str | None:
    """The beginning of a text file, or None where the bytes are no text."""
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = head.decode(encoding, "replace")
    last = len(text) - 4 if len(head) == _HEAD else len(text)  # a character may be cut where the head ends
    strange = [c for c in text[:last] if c == "\ufffd" or not (c.isprintable() or c in "\t\n\r\f\x1b\u2028\ufeff")]
    return None if strange else text.lstrip()
