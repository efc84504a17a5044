"""torch.save's zip container (.pt .pth .bin .ckpt since torch 1.6): listed without torch and without reading tensor data.

    <root>/data.pkl          the object, pickle protocol 2; tensors refer to storages by persistent id
    <root>/data/<key>        one storage each, raw bytes, payload aligned to 64
    <root>/byteorder         'little' or 'big'; little where absent
    <root>/version           '3\\n'

`<root>` is any folder name. Owns reading this container; the pickle's meaning is torch_objects', writing is torch_writer's.

Source: torch 2.13 torch/serialization.py and caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

from typing import Any

from workbench.checkpoint import Checkpoint, Finding
from workbench.errors import CorruptFileError, FormatError, UnknownFormatError, UnsupportedError
from workbench.files import FileRef, Storage
from workbench.formats.pickle_vm import Machine
from workbench.formats.torch_objects import TorchObjects, danger_findings, device_finding
from workbench.formats.zip_index import ZipIndex, read_record, read_zip_index

_MAX_PICKLE = 1 << 30


def sniff(head: bytes) -> bool:
    return head[:4] == b"PK\x03\x04"


def open_file(file: FileRef) -> Checkpoint:
    """List a torch zip archive.

    Raises:
        CorruptFileError: cut, damaged or contradictory. UnsupportedError: an archive of another kind, said which.
    Cost: the archive's end, its directory and data.pkl; no tensor data.
    """
    index = read_zip_index(file)
    root = _root(index)
    data = read_record(index, f"{root}data.pkl", _MAX_PICKLE)
    byteorder, findings = _byteorder(index, root)

    def locate(key: str) -> Storage:
        return index.storage(f"{root}data/{key}")

    objects = TorchObjects(locate, byteorder)
    machine = Machine(data, persistent=objects.persistent, construct=objects.construct, tensor=objects.template_tensor)
    try:
        tree: Any = machine.run()
        if machine.end != len(data):
            findings.append(
                Finding(
                    "bytes after the pickle",
                    "warning",
                    f"{len(data) - machine.end} bytes follow the end of data.pkl's object",
                    {"record": f"{root}data.pkl"},
                )
            )
    except FormatError as error:
        error.where.setdefault("record", f"{root}data.pkl")
        findings += danger_findings(machine) + objects.troubles
        error.partial = Checkpoint(machine.partial(), name=file.name, format="torch-zip", findings=tuple(findings), source=file)
        raise
    findings += danger_findings(machine) + objects.troubles + device_finding(objects.storages.values())
    return Checkpoint(tree, name=file.name, format="torch-zip", findings=tuple(findings), source=file)


def _root(index: ZipIndex) -> str:
    told = [name for name in index.records if name.endswith(("data.pkl", "constants.pkl", "archive_format", "models/model.json"))]
    tops = [name[: -len("data.pkl")] for name in told if name == "data.pkl" or (name.endswith("/data.pkl") and name.count("/") == 1)]
    if any(name.endswith("constants.pkl") for name in told):
        raise UnsupportedError(
            "this is a TorchScript archive, a program and not a checkpoint; it is not read yet",
            path=index.file.url,
            hint="save its state_dict() with torch.save",
        )
    if any(name.endswith(("archive_format", "models/model.json")) for name in told):
        raise UnsupportedError(
            "this is a torch.export archive (.pt2); it is not read yet", path=index.file.url, hint="save its state_dict with torch.save"
        )
    if len(tops) > 1:
        raise CorruptFileError("the archive holds several data.pkl records, and which one counts is ambiguous", path=index.file.url)
    if not tops:
        what = (
            "a NumPy .npz archive"
            if index.records and all(name.endswith(".npy") for name in index.records)
            else "a zip archive without a torch checkpoint in it"
        )
        raise UnknownFormatError(f"this is {what}", path=index.file.url, hint="this version reads torch zip files and safetensors")
    return tops[0]


def _byteorder(index: ZipIndex, root: str) -> tuple[str, list[Finding]]:
    if f"{root}byteorder" not in index.records:
        return "little", []
    order = read_record(index, f"{root}byteorder", 64)
    if order not in (b"little", b"big"):
        raise CorruptFileError(
            f"the byte order is said to be {order!r}; it can be little or big", record=f"{root}byteorder", path=index.file.url
        )
    text = order.decode()
    return text, [] if text == "little" else [Finding("big-endian", "info", "the values are stored big-endian and are swapped when read")]
