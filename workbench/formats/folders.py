"""Folders that hold a checkpoint among other files: models of the Hugging Face hub and its cache, training runs, a course's own.

The customary names come first, `model.safetensors` before `pytorch_model.bin`; otherwise the folder must hold one file that a
reader claims, or one folder with such a model. Several are listed and none is chosen. What small JSON files beside the
weights say (`config.json`, `metrics.json` …) is text under the file's name in `Checkpoint.metadata`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from workbench.checkpoint import Checkpoint, Finding
from workbench.errors import FormatError, UnknownFormatError, WorkbenchError
from workbench.files import FileRef, Folder, Span, contained
from workbench.formats import open_file, open_folder, recognise, sharded
from workbench.formats.strangers import what_folder
from workbench.tables import format_bytes

_SAME_WEIGHTS = (  # in each row the first that is there is opened
    ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin", "consolidated.safetensors"),
    ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    ("adapter_model.safetensors", "adapter_model.bin"),
)
_MODELS = {".metadata", *(name for row in _SAME_WEIGHTS for name in row)}
_BESIDE = ("config.json", "metrics.json", "adapter_config.json", "generation_config.json", "model_index.json", "trainer_state.json", "params.json", "hyperparameters.json")  # fmt: skip
_MAX_BESIDE = 1 << 20
_MAX_NAMES = 2000
_WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".gguf", ".onnx", ".h5", ".msgpack", ".npz")

Choices = dict[str, tuple[str, Callable[[], Checkpoint]]]  # by name: what it is, and how it is opened


def open_candidate(folder: Folder, names: list[str]) -> Checkpoint:
    """List the one checkpoint in a folder.

    Raises:
        UnknownFormatError: there is none, or there are several; the message lists them.
    """
    if customary := [row[0] for row in ([name for name in same if name in names] for same in _SAME_WEIGHTS) if row]:
        files = {name: folder.file(name) for name in customary}
        choices: Choices = {name: (format_bytes(file.size), partial(open_file, file)) for name, file in files.items()}
    elif {"snapshots", "blobs"} <= set(names):
        choices = _folders(folder, "snapshots/")
    elif told := what_folder(names):
        raise UnknownFormatError(f"this is {told[0]}", path=folder.url, hint=told[1])
    else:
        choices = _files(folder, names) or _folders(folder, "")
    if len(choices) == 1:
        ((name, (_, opened)),) = choices.items()
        return _with_neighbours(opened(), name, folder, names)
    if not choices:
        raise UnknownFormatError("this folder holds no checkpoint", path=folder.url, hint="README lists the formats that are read")
    listed = "; ".join(f"{name} ({what})" for name, (what, _) in list(choices.items())[:8]) + ("; …" if len(choices) > 8 else "")
    message = f"this folder holds {len(choices)} checkpoints, and which is meant is not clear: {listed}"
    hint = f"open one by its own path: wb.open({folder.url + '/' + next(iter(choices))!r})"
    raise UnknownFormatError(message, path=folder.url, hint=hint)


def _files(folder: Folder, names: list[str]) -> Choices:
    """The files that a reader claims, shards of one model together."""
    choices: Choices = {}
    broken: list[FormatError] = []
    for name in names[:_MAX_NAMES]:
        if part := sharded.PART.fullmatch(name):
            choices[f"{part[1]}-…-of-{part[3]}{part[4]}"] = f"{int(part[3])} shards", partial(sharded.open_parts, folder, name)
            continue
        with suppress(WorkbenchError):  # a folder, a pipe, a link that leads nowhere or away
            file = folder.file(name)
            try:
                if form := recognise(file)[0]:
                    choices[name] = f"{form.title}, {format_bytes(file.size)}", partial(open_file, file)
            except FormatError as error:
                broken.append(error)
    if broken and not choices:
        raise broken[0]
    return choices


def _folders(folder: Folder, prefix: str) -> Choices:
    """The folders below that hold a model by its customary name; those of a remote folder are not looked for."""
    choices: Choices = {}
    top = os.path.join(folder.url, prefix)
    for name in sorted(os.listdir(top))[:_MAX_NAMES] if folder.address is None and os.path.isdir(top) else ():
        try:
            below = Folder(contained(os.path.join(top, name), folder.url))
            held = set(below.names()) if os.path.isdir(below.url) else set()
        except FormatError:  # a link that leads away, or what this user may not read
            continue
        if held & _MODELS or any(map(sharded.PART.fullmatch, held)):
            choices[f"{prefix}{name}/"] = "a folder", partial(open_folder, below)
    return choices


def _with_neighbours(ckpt: Checkpoint, chosen: str, folder: Folder, names: list[str]) -> Checkpoint:
    """The checkpoint with what the files beside it say, and which weights beside it were not opened."""
    beside, odd = list[FileRef](), list[str]()
    for name in (name for name in _BESIDE if name in names):
        try:
            beside.append(folder.file(name))
        except WorkbenchError:  # a folder, a FIFO, a link that leads nowhere or away
            odd.append(name)
    told = {file.name: Span(file, 0, file.size).read().decode("utf-8", "replace") for file in beside if file.size <= _MAX_BESIDE}
    others = [name for name in names if name.endswith(_WEIGHTS) and name != chosen and not sharded.PART.fullmatch(name)]
    found = []
    if others:
        text = f"{chosen} was opened; beside it lie {', '.join(others[:6])}"
        found.append(Finding("other files", "info", text, {"names": others[:100]}, "open them by their own paths"))
    if odd:
        found.append(Finding("other files", "warning", f"{', '.join(odd)} beside it is no readable file of this folder", {"names": odd}))
    return replace(ckpt, metadata={**ckpt.metadata, **told}, findings=(*ckpt.findings, *found)) if told or found else ckpt
