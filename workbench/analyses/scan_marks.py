"""What scan takes from first bytes and names alone: marks of files, values of tensors, names that climb; archives laid out alike.

Source: pytorch caffe2/serialize/inline_container.cc (getPadding, and the descriptors behind the payloads).
"""

from __future__ import annotations

import re
import zlib
from itertools import islice
from typing import NamedTuple

from workbench.files import Span
from workbench.formats.numpy_file import says_numbers
from workbench.formats.zip_index import ZipIndex

_RAW_VALUES = frozenset({"data", "constants", "weights", "tensors"})  # folders of values
_CLIMBS = re.compile(r"^[/\\]|^[A-Za-z]:|(?:^|[/\\])\.\.(?:[/\\]|$)")
NUMBERS = re.compile(  # the header of an array that holds no objects, as NumPy spells every one
    rb"\{'descr': '[<>|=]?[biufcSaUVmM]\d*(?:\[\w+\])?', 'fortran_order': (?:True|False), 'shape': \([\d, ]*\), \} *\n?"
)
_KINDS = {"data.pkl": "pickle", ".data/serialization_id": "number"} | dict.fromkeys(
    (".format_version", ".storage_alignment", "byteorder", "version"), "fixed"
)
_LONGEST_FIXED, _MOST_ALIKE, _SMALL, _FULL = 64, 64, 1 << 16, 0xFFFFFFFF  # bytes of a payload; records; bytes that are read at once
MARKS = (b"\x80", b"P", b"\x93")


class Outline(NamedTuple):
    """How torch.save lays out small archives of the same records: all of one but the payloads that differ, and what follows from their lengths."""

    records: list[tuple[bytes, bytes, bytes | None]]  # local header, central header and payload; no payload where it may be any
    kinds: list[str]  # of the records whose payloads may be any: a pickle, the values of a tensor, a number
    ends: bytes  # what stands behind the directory
    nbytes: int  # of the directory and what stands behind it

    @classmethod
    def of(cls, index: ZipIndex, area: Span) -> Outline | None:
        """That of an archive; None where torch.save does not write it so."""
        records, kinds, entry = [], [], 0
        for name, record in islice(index.records.items(), _MOST_ALIKE):
            kind = "values" if is_raw(name) else _KINDS.get(name.partition("/")[2])
            header = record.header - index.base
            local = area.read(header, header + 30 + len(record.raw_name))
            central = index.records.directory[entry : entry + 46 + len(record.raw_name)]
            start = header + len(local) + int.from_bytes(local[28:30], "little")
            if kind is None or (kind == "fixed" and record.size > _LONGEST_FIXED):
                return None
            kinds += [] if kind == "fixed" else [kind]
            entry += len(central)
            records.append((local, central, area.read(start, start + record.size) if kind == "fixed" else None))
        low = index.directory - index.base
        ends = area.read(low + len(index.records.directory), area.nbytes)
        found = cls(records, kinds, ends, area.nbytes - low)
        return found if kinds.count("pickle") == 1 and len(ends) in (22, 98) and found.payloads(area) is not None else None

    def payloads(self, area: Span) -> list[tuple[int, int]] | None:
        """Where an archive laid out so has the payloads that may differ; None where any other byte is another one."""
        low = area.nbytes - self.nbytes
        if not 0 < low < _FULL:
            return None
        whole = area.read() if area.nbytes <= _SMALL else None
        told = whole[low:] if whole else area.read(low, area.nbytes)
        places, built, directory = list[tuple[int, int]](), list[bytes](), list[bytes]()
        entry = since = at = 0
        for local, central, payload in self.records:
            sums = told[entry + 16 : entry + 28] if payload is None else central[16:28]  # checksum and, twice, the size
            size, pad = int.from_bytes(sums[4:8], "little"), -(at + len(local) + 4) % 64
            directory += (central[:16], sums, central[28:42], at.to_bytes(4, "little"), central[46:])
            streamed = local[6] & 8
            built += (local[:14], bytes(12) if streamed else sums, local[26:28], (4 + pad).to_bytes(2, "little"), local[30:])
            built += (b"FB", pad.to_bytes(2, "little"), b"Z" * pad)
            entry, at = entry + len(central), at + len(local) + 4 + pad
            if payload is None:
                fixed = b"".join(built)
                if sums[4:8] != sums[8:] or fixed != (whole[since:at] if whole else area.read(since, at)):
                    return None
                places.append((at, at + size))
                built, since = [], at + size
            else:
                built.append(payload)
            built += (b"PK\7\x08", sums) if streamed else ()
            at += size + (16 if streamed else 0)
            if at > low:
                return None
        if len(self.ends) == 22:
            directory += (self.ends[:16], low.to_bytes(4, "little"), self.ends[20:])
        else:
            directory += (self.ends[:48], low.to_bytes(8, "little"), self.ends[56:64], (low + entry).to_bytes(8, "little"))
            directory += (self.ends[72:92], low.to_bytes(4, "little"), self.ends[96:])
        alike = at == low and told == b"".join(directory) and b"".join(built) == (whole[since:low] if whole else area.read(since, low))
        return places if alike else None


def alike_one(span: Span, outlines: list[Outline]) -> list[tuple[Span, bool]] | None:
    """Of an archive with one of these outlines, what has to be looked into: its pickle, and values that are marked as a file; which is which."""
    for outline in outlines:
        if (places := outline.payloads(span)) is not None:
            held = [(kind, span.part(start, stop - start)) for kind, (start, stop) in zip(outline.kinds, places, strict=True)]
            if all(part.nbytes <= _LONGEST_FIXED and part.read().isdigit() for kind, part in held if kind == "number"):
                acting = ((kind, part) for kind, part in held if kind == "pickle" or (kind == "values" and is_marked(part.read(0, 8))))
                return [(part, kind == "pickle") for kind, part in acting]
    return None


def is_raw(name: str) -> bool:
    """Whether a record holds the values of a tensor, as its folder and its lack of an ending say."""
    _, _, rest = f"/{name}".rpartition("/")
    return bool(rest) and "." not in rest and f"/{name}"[: -len(rest) - 1].rpartition("/")[2] in _RAW_VALUES


def climbs(name: str) -> bool:
    """Whether a record would be unpacked outside of its archive's folder; names may be long, so the rare signs are looked for first."""
    return (".." in name or ":" in name[:2] or name[:1] in ("/", "\\")) and _CLIMBS.search(name) is not None


def is_marked(head: bytes) -> bool:
    """Whether bytes begin as a pickle of protocol 1 to 5, an archive or an array says: with one of the marks."""
    return (head[:1] == b"\x80" and head[1:2] <= b"\x05") or head.startswith((b"PK\x03\x04", b"\x93NUMPY"))


def is_numbers(head: bytes) -> bool:
    """Whether these bytes hold the whole header of an array, and none of objects."""
    length = 10 + int.from_bytes(head[8:10], "little")
    return (
        head[:7] == b"\x93NUMPY\1"
        and 10 < length <= len(head)
        and (NUMBERS.fullmatch(head, 10, length) is not None or says_numbers(head[10:length]))
    )


def inflated(body: bytes, most: int) -> bytes:
    try:
        return zlib.decompressobj(-15).decompress(body, min(64 * len(body) + (1 << 20), max(1, most)))
    except zlib.error:
        return body
