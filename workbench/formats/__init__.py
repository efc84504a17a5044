"""Formats: each is one file that parses an index into name -> (spec, Stored), and one line in the tables below.

    ckpt = formats.open_path("model.pt")
    formats.save(ckpt, "model.safetensors")
    formats.FILES, formats.ARCHIVES, formats.FOLDERS      # what is read, in the order in which it is tried

Files are recognised by their content, never by their extension; zip archives by the names of their records, folders by
the files in them. A module of the tables is imported when its format is met.
"""

from __future__ import annotations

import importlib
import os
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from workbench.checkpoint import Checkpoint
from workbench.errors import CorruptFileError, SelectionError, UnknownFormatError, WriteError, located
from workbench.files import FileRef, Folder, Span, place
from workbench.render.outline import collector_paused as collector_paused
from workbench.tree import NOTHING, Aside, is_mapping, items_of, without_asides

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from workbench.formats.writing import SaveReport
    from workbench.stream import ProgressFunction

_HEAD = 4096


class Format(NamedTuple):
    """A row of the tables: what it is called, the module that opens it, and how it is recognised."""

    name: str
    title: str
    module: str
    claims: Callable[[Any], bool]

    @property
    def reader(self) -> Any:
        return importlib.import_module(f"workbench.formats.{self.module}")


def _starts(magic: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(magic)


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 8 and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000 and head[8:].lstrip(b" ")[:1] in (b"{", b"")


def _is_shard_index(head: bytes) -> bool:
    return head.lstrip()[:1] == b"{" and b'"weight_map"' in head


# how a tar header's numbers may begin: octal as Python's int() reads it, base-256, or nothing
_TAR_NUMBERS = re.compile(rb".{100}(?:N.{7}){3}(?:N.{11}){2}N".replace(b"N", rb"[\0\x80\xff\s\x1c-\x1f+0-7-]"), re.DOTALL)


def is_tar(head: bytes) -> bool:
    """Whether a file with these first bytes is a tar archive to Python's tarfile, which torch.load asks before it looks for a pickle."""
    return _TAR_NUMBERS.match(head) is not None and bool(importlib.import_module("workbench.formats.torch_tar").is_tar(head))


def _holds(*names: str) -> Callable[[Collection[str]], bool]:
    return lambda records: any(record.lower().endswith(names) for record in records)  # torch finds them whatever the case


def _roots(records: Collection[str]) -> list[str]:
    return importlib.import_module("workbench.formats.torch_archive").pickle_roots(records)  # type: ignore[no-any-return]


def dcp_indexes(names: Collection[str]) -> list[str]:
    """The files that torch.distributed.checkpoint may take for its index: the one of all ranks first, and those of each."""
    return sorted(name for name in names if name.endswith(".metadata") and re.fullmatch(r"(__\d+)?\.metadata", name))


# by the first bytes of the file; a tar comes first, for torch.load takes it for one whatever else it is
FILES = (
    Format("torch-tar", "old PyTorch tar", "torch_tar", is_tar),
    Format("safetensors", "safetensors", "safetensors_file", _is_safetensors),
    Format("sharded-safetensors", "sharded", "sharded", _is_shard_index),
    Format("gguf", "GGUF", "gguf_file", _starts(b"GGUF")),
    Format("npy", "NumPy", "numpy_file", _starts(b"\x93NUMPY")),
    Format("pickle", "legacy PyTorch", "torch_legacy", _starts(b"\x80")),
)
# what needs a closer look than a magic number, tried when nothing else claims the file; `claims` gets the FileRef
CLOSER = (
    Format("sharded-safetensors", "sharded", "sharded", lambda file: _reader_claims("sharded", file)),
    Format("onnx", "ONNX", "onnx_file", lambda file: _reader_claims("onnx_file", file)),
    Format("pickle", "plain pickle", "torch_legacy", lambda file: _reader_claims("torch_legacy", file)),
)
# zip archives, by the names of their records
ARCHIVES = (
    Format(
        "torch-export", "torch.export", "exported_file", _holds("archive_format", "models/model.json", "serialized_exported_program.json")
    ),
    Format(
        "torchscript", "TorchScript", "torchscript_file", lambda records: any(f"{root}constants.pkl" in records for root in _roots(records))
    ),
    Format("torch-zip", "PyTorch zip", "torch_zip", lambda records: bool(_roots(records))),
    Format("npz", "NumPy", "numpy_file", lambda records: bool(records) and all(name.endswith(".npy") for name in records)),
)
# folders, by the names in them; any other folder must hold one checkpoint file
FOLDERS = (
    Format(
        "dcp",
        "torch.distributed.checkpoint folder",
        "dcp_folder",
        lambda names: ".metadata" in names or dcp_indexes(names) == ["__0.metadata"],
    ),
)


def _reader_claims(module: str, file: FileRef) -> bool:
    return bool(importlib.import_module(f"workbench.formats.{module}").claims(file))


def open_path(address: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> Checkpoint:
    """List the checkpoint at a path or address: a file, or a folder that holds exactly one.

    Raises:
        MissingFileError, UnknownFormatError, CorruptFileError, UnsupportedError, MissingShardError.
    """
    found = place(address, storage_options)
    with located(path=found.url), _cured(), collector_paused():
        return open_folder(found) if isinstance(found, Folder) else open_file(found)


@contextmanager
def _cured() -> Iterator[None]:
    """What to do with a file that contradicts itself, where the reader did not say."""
    try:
        yield
    except CorruptFileError as error:
        listed = "; what could be listed is in the error's .partial" if error.partial is not None and len(error.partial) else ""
        error.hint = error.hint or f"download or copy it again, and compare its size and checksum with the original's{listed}"
        raise


def open_file(file: FileRef) -> Checkpoint:
    """List the checkpoint in one file."""
    form, opened = recognise(file)
    if form is None:
        from workbench.formats.strangers import what_archive, what_file

        what, hint = what_file(file) if opened is file else what_archive(opened)
        raise UnknownFormatError(f"this is {what}", path=file.url, hint=hint or "README lists the formats that are read")
    reader = form.reader
    return reader.open_file(opened) if opened is file else reader.open_archive(opened)  # type: ignore[no-any-return]


def recognise(file: FileRef) -> tuple[Format | None, Any]:
    """The row that claims the file, or None; and what it opens: the file, or the index of a zip archive."""
    head = Span(file, 0, file.size).read(0, _HEAD)
    if head.startswith(b"PK\x03\x04"):
        from workbench.formats.zip_index import read_zip_index

        index = read_zip_index(file)
        told = [name for name in index.records if not name[-1:].isdigit()] or index.records  # not the storages, which are many
        return next((form for form in ARCHIVES if form.claims(told)), None), index
    form = next((form for form in FILES if form.claims(head)), None)
    return form or next((form for form in CLOSER if form.claims(file)), None), file


def open_folder(folder: Folder) -> Checkpoint:
    """List the checkpoint that a folder is or holds."""
    names = folder.names()
    for form in FOLDERS:
        if form.claims(names):
            return form.reader.open_folder(folder)  # type: ignore[no-any-return]
    from workbench.formats.folders import open_candidate

    return open_candidate(folder, names)


_EXTENSIONS = {
    "pt": "torch-zip", "pth": "torch-zip", "bin": "torch-zip", "ckpt": "torch-zip", "tar": "torch-zip",
    "safetensors": "safetensors", "gguf": "gguf",
}  # fmt: skip


def save(
    ckpt: Any,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    unsafe: Literal["refuse", "drop"] = "refuse",
    types: str | Mapping[str, str] | None = None,
    dry_run: bool = False,
    max_ram_mb: int = 256,
    threads: int = 1,
    executor: Executor | None = None,
    progress: ProgressFunction | None = None,
    cancel: threading.Event | None = None,
) -> SaveReport:
    """Write a checkpoint as a whole or not at all, and read it back before the old file goes.

    Args:
        ckpt: a Checkpoint, or anything `wb.open` takes.
        path: the extension chooses the format (.pt .pth .bin .ckpt, .safetensors or .gguf) unless `format` names it.
        unsafe: "refuse" objects that are not plain data, or "drop" them and list them in the report.
        types: what GGUF stores floating matrices as: a ggml type (F32 F16 BF16 Q8_0 Q4_0 …), or {glob: type}, of which a later one counts;
            the report lists what became of each kind. Without it every tensor keeps its type, and the very bytes of blocks of a GGUF.
        dry_run: lay the file out and write nothing; the report's bytes are those that would be written.
        max_ram_mb: memory budget in MB for what is held at once.
        threads, executor: where the work runs; see `workbench.stream.stream`.
    Returns:
        SaveReport: bytes, time, what was left behind.
    Raises:
        SelectionError: the format would lose something. UntrustedError: unsafe objects. WriteError: the disk refused.
    Cost: one read and one write of each tensor, and one read of the result.
    """
    from workbench.formats import gguf_writer, safetensors_writer, torch_writer
    from workbench.formats.memory import open_object
    from workbench.formats.torch_pickle import drop_unsafe
    from workbench.formats.writing import Job

    if not isinstance(ckpt, Checkpoint):
        ckpt = open_path(ckpt) if isinstance(ckpt, (str, os.PathLike)) else open_object(ckpt)
    if "://" in os.fspath(path):
        where = f"{os.fspath(path).partition('://')[0]}://…"
        raise WriteError("only local files are written", path=where, hint="save it here, and copy it there")
    target = os.path.abspath(os.fspath(path))
    chosen = format or _EXTENSIONS.get(target.rpartition(".")[2].lower())
    job = Job(max_ram_mb, threads, executor, progress, cancel, dry_run)
    if unsafe not in ("refuse", "drop"):
        raise SelectionError(f'unsafe={unsafe!r}: it can be "refuse" or "drop"')
    if types is not None and chosen != "gguf":
        raise SelectionError("types= chooses how GGUF packs values", hint="name a .gguf file, or quantize the checkpoint before: wb.ops")
    writers: dict[str | None, Callable[[Checkpoint, str, Job], SaveReport]] = {
        "torch-zip": torch_writer.write,
        "safetensors": safetensors_writer.write,
        "gguf": partial(gguf_writer.write, types=types),
    }
    if chosen in writers:
        asides = [name for name, node in items_of(ckpt.tree).items() if isinstance(node, Aside)] if is_mapping(ckpt.tree) else []
        kept = replace(ckpt, tree=without_asides(ckpt.tree)) if asides else ckpt
        tree, left = drop_unsafe(kept.tree) if unsafe == "drop" else (kept.tree, [])
        if left:
            kept = Checkpoint({} if tree is NOTHING else tree, name=kept.name)
        return replace(writers[chosen](kept, target, job), left_behind=(*left, *asides))
    raise SelectionError(
        f"the format to write is not clear from {os.path.basename(target)!r}",
        hint="use .pt, .safetensors or .gguf, or say format='torch-zip', 'safetensors' or 'gguf'",
    )
