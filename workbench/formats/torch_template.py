"""How torch.save spells one tensor, as regular expressions over pickle opcodes: the pickle machine's fast path.

    q name · h rebuild ( ( h 'storage' h class X key q h place K numel t q Q K offset sizes q strides q \\x89 h hooks ) R q t q R q

Memo writes (q, r) and reads (h, j) are of one width; sizes are a tuple of up to three counts, or a marked one of more.
Groups: name's memo write, the references up to the class, length and text of the key with its memo write or a reference to
it, the reference to the place, and then each count and memo write in order.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from functools import cache, lru_cache

_I = rb"(?:K.|M..|J....|\x8a(?:\x05.{5}|\x06.{6}))"  # pickle spells a count by the shortest of these
_G = rb"(?:h.|j....)"


def _tensor_pattern(start: bytes, put: bytes, key: bytes) -> re.Pattern[bytes]:
    """One tensor as torch.save spells it: with memo writes of one width, its storage's `key`, after `start`."""
    sizes = rb"(\)|%b\x85|%b{2}\x86|%b{3}\x87|\(%b{4,}t)(?:(?<!\))%b)?" % (_I, _I, _I, _I, put)
    storage = rb"%b(%b)(%b)t%bQ(%b)" % (key, _G, _I, put, _I)
    hooks = rb"([\x88\x89])(%b)\)R%b" % (_G, put)
    return re.compile(start + rb"(%b\(\(%b%b)" % (_G, _G, _G) + storage + sizes + sizes + hooks + b"t" + put + b"R" + put, re.DOTALL)


_SHORT, _LONG = rb"q(.)", rb"r(....)"
_NEW_KEY, _ANY_KEY = rb"X(....)([0-9]+)%b", rb"(?:X(....)([0-9]+)%b|(%b))"
_NAME = rb"X(....)(.{0,1024}?)"


@cache  # compiled when first met: a process that lists one file needs few of them
def one_tensor(first: int) -> re.Pattern[bytes] | None:
    """A tensor, by its first opcode: the memo write of a name before it, or the reference to the rebuild function itself."""
    put = {ord("q"): _SHORT, ord("r"): _LONG, ord("h"): _LONG, ord("j"): _LONG}.get(first)
    return None if put is None else _tensor_pattern(put if first in b"qr" else b"()", put, _ANY_KEY % (put, _G))


@cache
def named_tensor(first: int) -> re.Pattern[bytes] | None:
    """A name and its tensor on a storage of its own, as they follow each other in a state dict, by the memo write of the name."""
    put = {ord("q"): _SHORT, ord("r"): _LONG}.get(first)
    return None if put is None else _tensor_pattern(_NAME + put, put, _NEW_KEY % put)


REFS = re.compile(_G, re.DOTALL)
_COUNTS = re.compile(_I, re.DOTALL)


@lru_cache(maxsize=4096)
def view(numel: bytes, offset: bytes, shape: bytes, strides: bytes) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """Elements of the storage, offset, shape and strides; a model has few of them and many tensors."""
    return _number(numel), _number(offset), _numbers(shape), _numbers(strides)


def _numbers(spelled: bytes) -> tuple[int, ...]:
    """The counts of a tuple, spelled from its first item to its closing opcode."""
    return tuple(map(_number, _COUNTS.findall(spelled, spelled[:1] == b"(")))


def indices(puts: Sequence[bytes], width: int | None = None) -> Sequence[int]:
    """The numbers of several memo writes of one width, one byte or four."""
    spelled = b"".join(puts)
    return tuple(spelled) if (width or len(puts[0])) == 1 else struct.unpack(f"<{len(spelled) // 4}I", spelled)


def memo_index(spelled: bytes) -> int:
    """The index of a memo opcode, of either width."""
    return spelled[1] if len(spelled) == 2 else int.from_bytes(spelled[1:], "little")


def _number(spelled: bytes) -> int:
    if len(spelled) <= 3 and spelled[0] != 0x8A:
        return int.from_bytes(spelled[1:], "little")
    return int.from_bytes(spelled[1 if spelled[0] == 0x4A else 2 :], "little", signed=True)
