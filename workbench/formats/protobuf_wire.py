"""Protobuf's wire format, walked in place: what lies where, without reading what is only skipped.

    message   a row of fields, without end mark
    field     key: varint of number << 3 | type, then the payload
    type 0    varint: 7 bits a byte, lowest first, the top bit says that another byte follows; 10 bytes at most
    type 1 5  8 bytes, 4 bytes
    type 2    varint length, then that many bytes: text, a message, or packed numbers
    type 3 4  groups; no file read here has them, and they are refused

A singular field that stands twice is refused, where other readers keep the last or merge both.

Source: protobuf.dev, "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from workbench.errors import CorruptFileError, UnsupportedError
from workbench.formats.window import Window

VARINT, BYTES = 0, 2
_KINDS = {"v": VARINT, "d": 1, "b": BYTES, "f": 5}
_WIDTH = {1: 8, 5: 4}
_MAX_FIELDS = 2_000_000  # and messages
_PIECE = 512
_MAX_TEXT = 1 << 16

Place = tuple[int, int]  # where a message, a text or a run of numbers starts and stops
Schema = dict[int, tuple[str, int, bool]]


def schema(spelling: str) -> Schema:
    """``"name=8b dims=1v*"``: name, number, type (v d b f as above), ``*`` for a repeated field."""
    entries = (entry.partition("=") for entry in spelling.split())
    return {int(rest.rstrip("*")[:-1]): (name, _KINDS[rest.rstrip("*")[-1]], rest.endswith("*")) for name, _, rest in entries}


class Wire:
    """The messages in a window. A walk over more than two million fields and messages is given up."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.left = _MAX_FIELDS

    def fields(self, at: int, end: int, cut: bool = False) -> Iterator[tuple[int, int, int, int, int]]:
        """(number, type, start and stop of the payload, value of a varint) of each field from `at` to `end`; past it too where `cut`."""
        data, base, safe = b"", at, -1  # `data` lies at `base`; up to `safe`, a key and a length are whole in it
        while at < end:
            if (low := at - base) > safe:
                data, base, low = self.window.take(at, min(_PIECE, end - at)), at, 0
                safe = len(data) - (20 if at + len(data) < end else 2)  # ten bytes each at most
            if low <= safe and 7 < (key := data[low]) < 0x80 and not key & 5 and (value := data[low + 1]) < 0x80:
                number, kind = key >> 3, key & 7  # a byte each, as most are
                start, stop = (at + 2, at + 2 + value) if kind else (at + 1, at + 2)
            else:
                key, low = _varint(data, low, at)
                number, kind, value = key >> 3, key & 7, _WIDTH.get(key & 7, 0)
                start = base + low
                if not number or key >> 32 or kind not in (VARINT, BYTES, *_WIDTH):
                    raise CorruptFileError(f"a field of number {number} and type {kind} is not allowed here", offset=at)
                if kind in (VARINT, BYTES):
                    value, low = _varint(data, low, at)
                    start = start if kind == VARINT else base + low
                stop = base + low if kind == VARINT else start + value
            self.left -= 1
            if self.left < 0:
                raise UnsupportedError(f"more than {_MAX_FIELDS} fields are not walked", offset=at)
            if stop > end and not cut:
                raise CorruptFileError(f"field {number} has {stop - start} bytes and {end - start} are left: the file is cut", offset=at)
            yield number, kind, start, stop, value
            at = stop

    def message(self, place: Place, known: Schema) -> dict[str, Any]:
        """The known fields of the message at `place`: numbers, places of anything else, lists of these where repeated."""
        out: dict[str, Any] = {}
        self.left -= 1
        for number, kind, start, stop, value in self.fields(*place):
            if number not in known:
                continue
            name, wanted, repeated = known[number]
            item = value if kind == VARINT else (start, stop)
            if kind != wanted and not (repeated and kind == BYTES):
                raise CorruptFileError(f"the field {name} is of type {kind}; {wanted} is expected", offset=start)
            if repeated:
                out.setdefault(name, []).append(item)
            elif name in out:
                raise CorruptFileError(f"the field {name} stands twice: which of the two counts is ambiguous", offset=start)
            else:
                out[name] = item
        return out

    def numbers(self, items: list[Any], limit: int) -> list[int]:
        """The numbers of a repeated varint field, packed or not; at most `limit` of them."""
        out: list[int] = []
        for item in items:
            start, stop = (0, 0) if isinstance(item, int) else item
            if len(out) >= limit or stop - start > 10 * limit:
                raise UnsupportedError(f"a list of more than {limit} numbers", offset=start)
            if not stop:
                out.append(item)
                continue
            data, at = self.window.take(start, stop - start), 0
            while at < len(data):
                value, at = _varint(data, at, start)
                out.append(value)
        return [value - (value >> 63 << 64) for value in out]

    def text(self, place: Place | None) -> str:
        if place is None:
            return ""
        start, stop = place
        if stop - start > _MAX_TEXT:
            raise UnsupportedError(f"a text of {stop - start} bytes; at most {_MAX_TEXT} are read", offset=start)
        return self.window.take(start, stop - start).decode("utf-8")


def _varint(data: bytes, low: int, start: int) -> tuple[int, int]:
    """(value, where it ends) of the number at `low`; `start` is where `data` lies in the file."""
    value = 0
    for at in range(low, min(low + 10, len(data))):
        value |= (data[at] & 0x7F) << 7 * (at - low)
        if data[at] < 0x80 and not value >> 64:
            return value, at + 1
    raise CorruptFileError("a number does not end where its message, or its ten bytes, end", offset=start + low)
