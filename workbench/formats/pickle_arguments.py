"""What pickle opcodes make of their arguments: numbers and texts spelled in lines, as C reads them; the entries of dicts and sets.

Each raises ValueError where the C unpickler would, and UnsupportedError where only this reader goes no further.

Source: CPython 3.11 Modules/_pickle.c (load_int, load_long, load_float, load_string).
"""

from __future__ import annotations

import codecs
import math
import re
from typing import Any

from workbench.errors import UnsupportedError
from workbench.tensors import LazyTensor

_LONG_KEY = 1 << 14
_STRTOL = re.compile(rb"[ \t\n\v\f\r]*[+-]?(?:0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)\Z")


def c_string(data: bytes) -> bytes:
    """Text as C reads it: up to the first NUL."""
    return data.partition(b"\0")[0]


def int_line(line: bytes) -> int:
    """The number of INT, or the bool that 00 and 01 stand for."""
    text = c_string(line)
    plain = _STRTOL.match(text) or (line and not text)  # C reads nothing, before a NUL, as 0
    value = 0 if line and not text else _strtol(text) if plain else int(text, 0)
    return bool(value) if plain and len(line) == 2 and value in (0, 1) else value


def _strtol(line: bytes) -> int:
    text = line.strip(b" \t\n\v\f\r")
    digits = text.lstrip(b"+-")
    value = int(digits, 16) if digits[:2] in (b"0x", b"0X") else int(digits, 8 if digits[:1] == b"0" else 10)
    value = -value if text[:1] == b"-" else value
    return value if -(1 << 63) <= value < 1 << 63 else int(line, 0)


def float_line(line: bytes) -> float:
    line = c_string(line)
    if not line or line != line.strip() or b"_" in line:
        raise ValueError("not a float")
    value = float(line)
    if math.isinf(value) and b"inf" not in line.lower():
        raise ValueError("a float out of range")
    return value


def string_line(line: bytes) -> str | bytes:
    if len(line) < 2 or line[0] != line[-1] or line[:1] not in (b"'", b'"'):
        raise ValueError("the STRING argument must be quoted")
    return text_of(codecs.escape_decode(line[1:-1])[0])


def text_of(data: bytes) -> str | bytes:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def pairs_of(items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise ValueError("odd number of items for a dict")
    if len(items) == 2:
        return {checked_key(items[0]): items[1]}
    keys = items[::2]
    plain = set(map(type, keys)) == {str} and max(map(len, keys)) <= _LONG_KEY
    return dict(zip(keys if plain else map(checked_key, keys), items[1::2], strict=True))


def checked_key(value: Any) -> Any:
    """A dict key or set member, refused where hashing or comparing it takes long (shared tuples, very long ones) or overruns C's stack."""
    if isinstance(value, LazyTensor):
        raise UnsupportedError("a tensor stands as a key, where no name tells it")
    if (isinstance(value, (str, bytes)) and len(value) > _LONG_KEY) or (isinstance(value, int) and value.bit_length() > 8 * _LONG_KEY):
        raise UnsupportedError(f"a key of more than {_LONG_KEY:,} characters or bytes")
    if type(value) in (tuple, frozenset):
        level, parts = [value], 0
        for _ in range(16):
            parts += sum(map(len, level))
            level = [item for held in level for item in held if type(item) in (tuple, frozenset)]
            if not level:
                return value
            if parts > 10_000:
                break
        raise UnsupportedError("a key of too many parts")
    return value
