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

    def charge(self, fields: int, at: int) -> None:
        """Count what takes as long as that many fields."""
        self.left -= fields
        if self.left < 0:
            raise UnsupportedError(f"more than {_MAX_FIELDS} fields, or what takes as long, are not walked", offset=at)

    def field(self, at: int, end: int, cut: bool = False) -> tuple[int, int, int, int]:
        """(key, start and stop of the payload, value of a varint) of the field at `at`; past `end` too where `cut`."""
        data = self.window.take(at, min(20, end - at))  # ten bytes each at most
        key, low = read_varint(data, 0, at)
        number, kind, value, start = key >> 3, key & 7, _WIDTH.get(key & 7, 0), at + low
        if not number or key >> 32 or kind not in (VARINT, BYTES, *_WIDTH):
            raise CorruptFileError(f"a field of number {number} and type {kind} is not allowed here", offset=at)
        if kind in (VARINT, BYTES):
            value, low = read_varint(data, low, at)
            start = start if kind == VARINT else at + low
        stop = at + low if kind == VARINT else start + value
        if stop > end and not cut:
            raise CorruptFileError(f"field {number} has {stop - start} bytes and {end - start} are left: the file is cut", offset=at)
        return key, start, stop, value

    def message(self, place: Place, known: Schema) -> dict[str, Any]:
        """The known fields of the message at `place`: numbers, places of anything else, lists of these where repeated.

        Most keys and lengths have one byte or two, and are read where they lie; at any other, and at what is wrong, `field` is asked.
        """
        out: dict[str, Any] = {}
        at, end = place
        left = self.left - 1
        while at < end:
            data, low = self.window.view(at, min(end - at, _PIECE))
            base = at - low
            safe = end - base if end - base <= len(data) else len(data) - 20
            while low < safe:
                try:
                    if (key := data[low]) >= 0x80:
                        low += 1
                        key += (data[low] << 7) - 0x80
                    if (value := data[low + 1]) < 0x80:
                        low += 2
                    else:
                        low += 3
                        value += (data[low - 1] << 7) - 0x80
                    plain = 7 < key < 0x4000 and value < 0x4000
                except IndexError:
                    plain = False
                item: Any = value
                start, kind = base + low, key & 7
                if kind == BYTES:
                    low += value
                    item = (start, base + low)
                if not plain or (kind != BYTES and kind != VARINT) or (low > safe and base + low > end):
                    key, start, low, value = self.field(at, end)
                    low, kind = low - base, key & 7
                    item = value if kind == VARINT else (start, base + low)
                left -= 1
                if left < 0:
                    raise UnsupportedError(f"more than {_MAX_FIELDS} fields are not walked", offset=at)
                at = base + low
                if key >> 3 not in known:
                    continue
                name, wanted, repeated = known[key >> 3]
                if kind != wanted and not (repeated and kind == BYTES):
                    raise CorruptFileError(f"the field {name} is of type {kind}; {wanted} is expected", offset=start)
                if not repeated:
                    if name in out:
                        raise CorruptFileError(f"the field {name} stands twice: which of the two counts is ambiguous", offset=start)
                    out[name] = item
                    continue
                items = out.setdefault(name, [])
                items.append(item)
                if key < 0x80:  # then most that follow are of this field and short
                    count = len(items)
                    while kind == VARINT and low + 1 < safe and data[low] == key and data[low + 1] < 0x80:
                        items.append(data[low + 1])
                        low += 2
                    while (
                        kind == BYTES
                        and low + 1 < safe
                        and data[low] == key
                        and (value := data[low + 1]) < 0x80
                        and (stop := low + 2 + value) <= safe
                    ):
                        items.append((base + low + 2, base + stop))
                        low = stop
                    at = base + low
                    left -= len(items) - count
        self.left = left
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
            if data.isascii():  # a byte each
                out += data
            while at < len(data) and not data.isascii():
                value, at = read_varint(data, at, start)
                out.append(value)
        return [value - (value >> 63 << 64) for value in out]

    def text(self, place: Place | None) -> str:
        if place is None:
            return ""
        start, stop = place
        if stop - start > _MAX_TEXT:
            raise UnsupportedError(f"a text of {stop - start} bytes; at most {_MAX_TEXT} are read", offset=start)
        return self.window.take(start, stop - start).decode("utf-8")


def read_varint(data: bytes, low: int, start: int) -> tuple[int, int]:
    """(value, where it ends) of the number at `low`; `start` is where `data` lies in the file."""
    value = 0
    for at in range(low, min(low + 10, len(data))):
        value |= (data[at] & 0x7F) << 7 * (at - low)
        if data[at] < 0x80 and not value >> 64:
            return value, at + 1
    raise CorruptFileError("a number does not end where its message, or its ten bytes, end", offset=start + low)
