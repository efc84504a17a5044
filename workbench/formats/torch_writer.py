"""Writes torch.save's zip container: sharing, strides, everything that is no tensor and `_metadata` are kept.

The layout is fixed before the first byte: local headers carry sizes, payloads start at multiples of 64, and the CRCs are
patched in at the end. Offsets of each header are in zip_index.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from workbench.checkpoint import Checkpoint
from workbench.errors import UnsupportedError
from workbench.formats import torch_zip
from workbench.formats.torch_pickle import PickleWriter, StorageSlot
from workbench.formats.writing import Job, Layout, SaveReport, require_unlocked, struct_pack, write_layout
from workbench.stream import Target, Written
from workbench.strided import row_major
from workbench.tensors import Derived, LazyTensor, Live, Stored, TensorSpec

_ALIGNMENT = 64
_MAX32 = 0xFFFFFFFF


def write(ckpt: Checkpoint, path: str, job: Job) -> SaveReport:
    """Write `ckpt` as a .pt file that `torch.load(weights_only=True)` reads.

    Raises:
        UntrustedError: the tree holds an object that is not plain data.
    Cost: one read of each storage; a derived tensor is computed once.
    """
    require_unlocked(ckpt)
    storages = _Storages({id(tensor): name for name, tensor in ckpt.items()})
    try:
        pickle = PickleWriter(storages.place).dump(ckpt.tree)
    except RecursionError as error:
        raise UnsupportedError("the checkpoint nests too deeply to be written", path=path) from error
    root = _root(path)
    small = [("data.pkl", pickle), (".format_version", b"1"), (".storage_alignment", b"64"), ("byteorder", b"little")]
    records: list[tuple[str, Any, str]] = [(f"{root}/{name}", data, "") for name, data in small]
    records += [(f"{root}/data/{key}", source, tensor_name) for key, source, tensor_name in storages.sources()]
    records.append((f"{root}/version", b"3\n", ""))
    layout = _layout(records)
    seconds, verify_seconds = write_layout(path, layout, {n: t.spec for n, t in ckpt.items()}, torch_zip.open_file, job)
    return SaveReport(path, "torch-zip", len(ckpt), layout.nbytes, seconds, verify_seconds, layout=layout if job.dry_run else None)


def _root(path: str) -> str:
    stem = os.path.basename(path).rpartition(".")[0] or os.path.basename(path)
    return "".join(c if c.isprintable() and c not in "/\\" else "_" for c in stem)[:100] or "archive"


class _Storages:
    """The storages of one file: views of one storage share it, tied results of an op share theirs."""

    def __init__(self, names: dict[int, str]) -> None:
        self._names = names
        self._slots: dict[Any, tuple[str, Any, str]] = {}

    def sources(self) -> list[tuple[str, Any, str]]:
        """(storage key, where its bytes come from, name of the first tensor on it)."""
        return list(self._slots.values())

    def _key(self, identity: Any, source: Any, tensor: LazyTensor) -> str:
        return self._slots.setdefault(identity, (str(len(self._slots)), source, self._names.get(id(tensor), "")))[0]

    def place(self, tensor: LazyTensor) -> StorageSlot:
        source, dtype = tensor.source, tensor.dtype
        if tensor.spec.layout != "strided":
            raise UnsupportedError(f"a {tensor.spec.layout} tensor made by an op cannot be written as .pt")
        if isinstance(source, Stored) and (source.byteorder == "little" or dtype.unit == 1) and source.storage.nbytes % dtype.itemsize == 0:
            key = self._key((source.storage, dtype), source.storage, tensor)
            return StorageSlot(key, source.offset, source.strides, source.storage.nbytes // dtype.itemsize, dtype)
        if isinstance(source, Live) and not tensor.spec.quantizer:
            whole = _live_storage(source)
            if whole.nbytes % dtype.itemsize == 0:
                key = self._key((source.storage_key, dtype), whole, tensor)
                return StorageSlot(key, int(source.tensor.storage_offset()), source.tensor.stride(), whole.nbytes // dtype.itemsize, dtype)
        if isinstance(source, Live) and tensor.spec.quantizer:
            raise UnsupportedError("a live torch-quantized tensor is not written; save it with torch.save")
        key = self._key((source.block, source.slot) if isinstance(source, Derived) else (source, tensor.spec), tensor, tensor)
        return StorageSlot(key, 0, row_major(tensor.shape), tensor.numel, dtype)


def _live_storage(source: Live) -> LazyTensor:
    import torch

    from workbench.dtypes import DTYPES

    storage = source.tensor.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8, device=source.tensor.device).set_(storage)
    return LazyTensor(TensorSpec(DTYPES["uint8"], (storage.nbytes(),)), Live(flat))


def _layout(records: Sequence[tuple[str, Any, str]]) -> Layout:
    """Headers and payloads of (record, bytes or tensor, tensor's name) one after another; the directory's CRCs are filled in by `finish`."""
    fixed: list[tuple[int, bytes]] = []
    targets: list[Target] = []
    entries: list[tuple[bytes, int, int, bytes | None]] = []  # name, header offset, size, small payload
    at = 0
    for name, source, tensor_name in records:
        raw = name.encode("utf-8")
        size = len(source) if isinstance(source, bytes) else source.nbytes
        head = _local_header(raw, size, at)
        if isinstance(source, bytes):
            fixed.append((at + len(head), source))
        else:
            targets.append(Target(tensor_name or name, source, at + len(head)))
        fixed.append((at, head))
        entries.append((raw, at, size, source if isinstance(source, bytes) else None))
        at += len(head) + size
    directory = at

    def finish(written: Sequence[Written]) -> list[tuple[int, bytes]]:
        import zlib

        streamed = iter(written)
        crcs = [zlib.crc32(small) if small is not None else next(streamed).crc for _, _, _, small in entries]
        patches = [(header + 14, struct_pack("I", crc)) for (_, header, _, _), crc in zip(entries, crcs, strict=True)]
        return [*patches, (directory, _directory(entries, crcs, directory))]

    total = directory + len(_directory(entries, [0] * len(entries), directory))
    return Layout(total, fixed, targets, finish)


def _flags(raw: bytes) -> int:
    return 0 if raw.isascii() else 0x800


def _local_header(raw: bytes, size: int, at: int) -> bytes:
    """30 bytes, the name, then extra fields that pad the payload to its alignment (id 'FB', as torch's own)."""
    zip64 = struct_pack("HHQQ", 1, 16, size, size) if size >= _MAX32 else b""
    unpadded = at + 30 + len(raw) + len(zip64) + 4
    padding = -unpadded % _ALIGNMENT
    extra = zip64 + struct_pack("2sH", b"FB", padding) + b"Z" * padding
    shown = min(size, _MAX32)
    return (
        struct_pack("4sHHHHHIIIHH", b"PK\x03\x04", 45 if zip64 else 20, _flags(raw), 0, 0, 33, 0, shown, shown, len(raw), len(extra))
        + raw
        + extra
    )


def _directory(entries: Sequence[tuple[bytes, int, int, bytes | None]], crcs: Sequence[int], start: int) -> bytes:
    out = bytearray()
    for (raw, header, size, _), crc in zip(entries, crcs, strict=True):
        wide = [value for value in (size, size, header) if value >= _MAX32]
        extra = struct_pack(f"HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        shown = min(size, _MAX32)
        out += struct_pack(
            "4sHHHHHHIIIHHHHHII",
            b"PK\x01\x02",
            45,
            45 if wide else 20,
            _flags(raw),
            0,
            0,
            33,
            crc,
            shown,
            shown,
            len(raw),
            len(extra),
            0,
            0,
            0,
            0,
            min(header, _MAX32),
        )
        out += raw + extra
    size, count = len(out), len(entries)
    if start >= _MAX32 or size >= _MAX32 or count >= 0xFFFF:
        end64 = start + size
        out += struct_pack("4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
        out += struct_pack("4sIQI", b"PK\x06\x07", 0, end64, 1)
    shown_count = min(count, 0xFFFF)
    out += struct_pack("4sHHHHIIH", b"PK\x05\x06", 0, 0, shown_count, shown_count, min(size, _MAX32), min(start, _MAX32), 0)
    return bytes(out)
