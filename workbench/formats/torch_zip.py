"""torch.save's zip container (.pt .pth .bin .ckpt since torch 1.6): listed without torch and without reading tensor data.

    <root>/data.pkl          the object, pickle protocol 2; tensors refer to storages by persistent id
    <root>/data/<key>        one storage each, raw bytes, payload aligned to 64
    <root>/byteorder         'little' or 'big'; little where absent
    <root>/version           '3\\n'

`<root>` is any folder name. Owns reading this container; the pickle's meaning is torch_objects', writing is torch_writer's.

Source: torch 2.13 torch/serialization.py and caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

from collections.abc import Iterable

from workbench.checkpoint import Checkpoint
from workbench.files import FileRef, Storage
from workbench.formats.torch_archive import pickle_root, read_byteorder
from workbench.formats.torch_objects import TorchObjects, trailing_finding, unpickle
from workbench.formats.zip_index import ZipIndex, read_record, read_zip_index

_MAX_PICKLE = 256 << 20


def open_file(file: FileRef) -> Checkpoint:
    """List a torch zip archive; see `open_archive`."""
    return open_archive(read_zip_index(file))


def open_archive(index: ZipIndex) -> Checkpoint:
    """List a torch zip archive.

    Raises:
        CorruptFileError: cut, damaged or contradictory.
    Cost: the archive's end, its directory and data.pkl; no tensor data.
    """
    root = pickle_root(index)
    byteorder, findings = read_byteorder(index, root)

    def locate(key: str) -> Storage:
        return index.storage(f"{root}data/{key}")

    def locate_all(keys: Iterable[str]) -> list[Storage] | None:
        return index.plain_storages([f"{root}data/{key}" for key in keys])

    data = read_record(index, f"{root}data.pkl", _MAX_PICKLE)
    objects = TorchObjects(locate, byteorder, locate_all)
    tree, machine, found = unpickle(data, objects, file=index.file, format="torch-zip", record=f"{root}data.pkl")
    if machine.end != len(data):
        findings.append(trailing_finding(len(data) - machine.end, f"{root}data.pkl"))
    return Checkpoint(tree, name=index.file.name, format="torch-zip", findings=(*findings, *found), source=index.file)
