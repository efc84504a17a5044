"""What scan takes from first bytes and names alone: marks of files, values of tensors, names that climb; archives alike but for one payload."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from workbench.files import Span
from workbench.formats.zip_index import Outline

_RAW_VALUES = frozenset({"data", "constants", "weights", "tensors"})  # folders of values
_CLIMBS = re.compile(r"^[/\\]|^[A-Za-z]:|(?:^|[/\\])\.\.(?:[/\\]|$)")
NUMBERS = re.compile(  # the header of an array that holds no objects, as NumPy spells every one
    rb"\{'descr': '[<>|=]?[biufcSaUVmM]\d*(?:\[\w+\])?', 'fortran_order': (?:True|False), 'shape': \([\d, ]*\), \} *\n?"
)
MARKS = (b"\x80", b"P", b"\x93")


class Alike(NamedTuple):
    is_pickle: bool
    payload: tuple[int, int]


def alike_one(span: Span, outlines: Mapping[tuple[Outline, bool], set[bytes]]) -> Alike | None:
    """Where an archive differs from one of these in one payload alone: the values of a tensor, which are no file, or its pickle."""
    for (outline, is_pickle), rests in outlines.items():
        found = outline.rest(span)
        if found is not None and found[0] in rests and (is_pickle or found[1] not in MARKS):
            return Alike(is_pickle, outline.payload)
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
    return head[:7] == b"\x93NUMPY\1" and 10 < length <= len(head) and NUMBERS.fullmatch(head, 10, length) is not None


def inflated(body: bytes, most: int) -> bytes:
    try:
        return zlib.decompressobj(-15).decompress(body, min(64 * len(body) + (1 << 20), max(1, most)))
    except zlib.error:
        return body
