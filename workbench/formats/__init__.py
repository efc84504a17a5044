"""Formats: each is one file that parses an index into name -> (spec, Stored), and one line in the table below.

    ckpt = formats.open_path("model.pt")
    formats.save(ckpt, "model.safetensors")
    formats.FORMATS                       # what is read, in the order in which it is tried

Files are recognised by their content, never by their extension.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from workbench.checkpoint import Checkpoint
from workbench.errors import MissingFileError, SelectionError, UnknownFormatError, located, visible
from workbench.files import FileRef, Span, file_ref
from workbench.formats import safetensors_file, sharded, torch_zip

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from workbench.formats.writing import SaveReport
    from workbench.stream import ProgressFunction

_HEAD = 4096


class Format(NamedTuple):
    name: str
    sniff: Callable[[bytes], bool]
    open_file: Callable[[FileRef], Checkpoint]


FORMATS = (
    Format("torch-zip", torch_zip.sniff, torch_zip.open_file),
    Format("sharded-safetensors", sharded.sniff, sharded.open_file),
    Format("safetensors", safetensors_file.sniff, safetensors_file.open_file),
)

# what a stranger's file most often is instead: (first bytes, what to call it)
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "a legacy torch checkpoint (before torch 1.6)"),
    (b"\x80", "a Python pickle"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras .h5)"),
    (b"\x93NUMPY", "a NumPy .npy array"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"version https://git-lfs", "a Git LFS pointer: the real file was never downloaded"),
    (b"<!DOCTYPE", "a web page, perhaps an error page saved in place of the download"),
    (b"<html", "a web page, perhaps an error page saved in place of the download"),
)


def open_path(path: str | os.PathLike[str]) -> Checkpoint:
    """List the checkpoint at `path`: a file, or a folder that holds exactly one.

    Raises:
        MissingFileError, UnknownFormatError, CorruptFileError, UnsupportedError, MissingShardError.
    """
    path = os.fsdecode(path)
    if not path:
        raise MissingFileError("the path is empty")
    with located(path=os.path.abspath(path)):
        if os.path.isdir(path):
            path = _candidate(path)
        file = file_ref(path)
        head = Span(file, 0, file.size).read(0, _HEAD)
        for form in FORMATS:
            if form.sniff(head):
                return form.open_file(file)
        raise UnknownFormatError(
            f"this is {_what(head)}, which is not read", hint="torch zip files and safetensors (single or sharded) are"
        )


def _what(head: bytes) -> str:
    if not head:
        return "an empty file"
    for magic, what in _OTHERS:
        if head.startswith(magic):
            return what
    if re.match(rb"\x08[\x01-\x1f][\x12\x1a\x22\x2a\x32\x3a]", head):  # protobuf: ir_version, then a producer or the graph
        return "an ONNX model"
    if head[257:262] == b"ustar":
        return "a tar archive"
    try:
        head[:512].decode("utf-8")
    except UnicodeDecodeError:
        return f"no format this library knows (it starts with {head[:8].hex(' ')})"
    return "a text file"


_NAMES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin")


def _candidate(folder: str) -> str:
    """The one checkpoint in a folder, by the names that are customary, else the only readable file."""
    names = sorted(os.listdir(folder))
    for name in _NAMES:
        if name in names:
            return os.path.join(folder, name)
    readable = [name for name in names if _is_readable(os.path.join(folder, name))]
    indexed = [name for name in readable if name.endswith(".index.json")]
    chosen = indexed if len(indexed) == 1 else readable
    if len(chosen) == 1:
        return os.path.join(folder, chosen[0])
    if not readable:
        raise UnknownFormatError(
            "nothing in this folder is a checkpoint this library reads",
            hint=f"{len(names)} entries: " + ", ".join(map(visible, names[:5])) if names else "the folder is empty",
        )
    raise UnknownFormatError(
        f"this folder holds {len(readable)} checkpoints, and which one is meant is ambiguous",
        hint="open one of: " + ", ".join(map(visible, readable[:10])),
    )


def _is_readable(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    file = file_ref(path)
    head = Span(file, 0, file.size).read(0, _HEAD)
    return any(form.sniff(head) for form in FORMATS)


_EXTENSIONS = {
    "pt": "torch-zip", "pth": "torch-zip", "bin": "torch-zip", "ckpt": "torch-zip", "tar": "torch-zip",
    "safetensors": "safetensors",
}  # fmt: skip


def save(
    ckpt: Any,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    unsafe: Literal["refuse", "drop"] = "refuse",
    max_ram_mb: int = 256,
    threads: int = 1,
    executor: Executor | None = None,
    progress: ProgressFunction | None = None,
    cancel: threading.Event | None = None,
) -> SaveReport:
    """Write a checkpoint as a whole or not at all, and read it back before the old file goes.

    Args:
        ckpt: a Checkpoint, or anything `wb.open` takes.
        path: the extension chooses the format (.pt .pth .bin .ckpt or .safetensors) unless `format` names it.
        unsafe: "refuse" objects that are not plain data, or "drop" them and list them in the report.
        max_ram_mb: memory budget in MB for what is held at once.
        threads, executor: where the work runs; see `workbench.stream.stream`.
    Returns:
        SaveReport: bytes, time, what was left behind.
    Raises:
        SelectionError: the format would lose something. UntrustedError: unsafe objects. WriteError: the disk refused.
    Cost: one read and one write of each tensor, and one read of the result.
    """
    from workbench.formats import safetensors_writer, torch_writer
    from workbench.formats.memory import open_object
    from workbench.formats.writing import Job

    if not isinstance(ckpt, Checkpoint):
        ckpt = open_path(ckpt) if isinstance(ckpt, (str, os.PathLike)) else open_object(ckpt)
    target = os.path.abspath(os.fspath(path))
    chosen = format or _EXTENSIONS.get(target.rpartition(".")[2].lower())
    job = Job(max_ram_mb, threads, executor, progress, cancel)
    if unsafe not in ("refuse", "drop"):
        raise SelectionError(f'unsafe={unsafe!r}: it can be "refuse" or "drop"')
    if chosen == "torch-zip":
        return torch_writer.write(ckpt, target, job, unsafe=unsafe)
    if chosen == "safetensors":
        return safetensors_writer.write(ckpt, target, job)
    raise SelectionError(
        f"the format to write is not clear from {os.path.basename(target)!r}",
        hint="use .pt or .safetensors, or say format='torch-zip' or 'safetensors'",
    )
