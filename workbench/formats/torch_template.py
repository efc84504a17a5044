"""How torch.save spells one tensor, as regular expressions over pickle opcodes: the pickle machine's fast path.

    q name · h rebuild ( ( h 'storage' h class X key q h place K numel t q Q K offset sizes q strides q \\x89 h hooks ) R q t q R q

(a legacy file has N, no view of another storage, behind numel)

Memo writes (q, r) and reads (h, j) are of one width; sizes are a tuple of up to three counts, or a marked one of more.
Groups: name's memo write, the references up to the class, length and text of the key with its memo write or a reference to
it, the reference to the place, and then each count and memo write in order.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

from workbench.errors import CorruptFileError
from workbench.tree import Global

if TYPE_CHECKING:
    from workbench.formats.pickle_vm import Machine

_REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
_ORDERED_DICT = Global("collections", "OrderedDict")


def carry_out_one(vm: Machine, start: int) -> bool:
    """Carry out the opcodes of one tensor at once, where they are spelled as torch.save spells them.

    They begin at `start` with the memo opcode of the name just pushed, or with the reference to the rebuild function.
    Anything unusual returns False and is run singly. The tuples on the way are not memoised, for torch never refers to
    them again; a pickle that does (or counts the memo) is run again without this path. A pickle that overwrites an older
    memo entry here is unusual.
    """
    data, memo, torch = vm.data, vm.whole_memo(), vm.torch
    pattern = _one_tensor(data[start]) if b"((" in data[start + 2 : start + 12] else None
    found = pattern.match(data, start) if pattern is not None else None
    if found is None or torch is None:
        return False
    name_put, head, length, key, key_put, key_ref, place, numel, pid, offset, shape, shape_put, strides, strides_put, *rest = found.groups()
    grad, hooks, hooks_put, args_put, put = rest
    known = vm.heads.get((head, place, hooks)) or _head(vm, head, place, hooks)
    text = key.decode("ascii") if key else memo.get(_memo_index(key_ref))
    if known is None or type(text) is not str or (key and int.from_bytes(length, "little") != len(key)):
        return False
    written = _indices([p for p in (name_put, key_put, pid, shape_put, strides_put, hooks_put, args_put, put) if p])
    if not memo.keys().isdisjoint(written):
        return False
    vm.highest = max(vm.highest, *written)
    if name_put:
        memo[written[0]] = vm.stack[-1]
    if key_put:
        memo[written[1 if name_put else 0]] = text
    vm.skipped = True
    tensor = torch.template_tensor(*known, text, *_view(numel, offset, shape, strides), grad == b"\x88")
    memo[written[-1]] = tensor
    vm.stack.append(tensor)
    vm.pos = found.end()
    return True


def carry_out_run(vm: Machine, start: int) -> bool:
    """Carry out a run of names and tensors, each on a storage of its own: most of a state dict, in a few passes over it."""
    data, torch = vm.data, vm.torch
    name_end = start + 5 + int.from_bytes(data[start + 1 : start + 5], "little")
    head = data[name_end : name_end + 12]
    if torch is None or start < vm.singly or b"((" not in head[4:]:
        return False
    rows, end = _run_of_tensors(data, start, head[0])
    if len(rows) < 2:
        return False
    vm.singly = end
    columns = list(zip(*rows, strict=True))
    name_lengths, spelled, name_put, heads, key_lengths, keys_spelled, key_put, numels, pids, *rest = columns
    views, shape_put, strides, strides_put, hooks, puts = rest
    hooks_put, args_put, put = zip(*struct.iter_unpack(_TAIL[len(puts[0])], b"".join(puts)), strict=True)
    skipped = _indices([*pids, *filter(None, shape_put), *filter(None, strides_put)])
    names_at, keys_at = _indices(name_put), _indices(key_put)
    written = {*names_at, *keys_at, *skipped, *hooks_put, *args_put, *put}
    apart = len(written) == 5 * len(rows) + len(skipped) and (min(written) > vm.highest or vm.whole_memo().keys().isdisjoint(written))
    lengths_agree = _indices(name_lengths, 4) == tuple(map(len, spelled)) and _indices(key_lengths, 4) == tuple(map(len, keys_spelled))
    if not apart or not lengths_agree:
        return False
    kinds = list(zip(heads, numels, views, strides, hooks, strict=True))
    forms = list(map(vm.forms.get, kinds))
    if None in forms:
        vm.forms.update({kind: _form(vm, *kind) for kind in set(kinds) if kind not in vm.forms})
        forms = list(map(vm.forms.get, kinds))
    try:
        names = [name.decode("utf-8", "surrogatepass") for name in spelled]
    except UnicodeDecodeError:  # told at its own byte, when the opcodes are run singly
        return False
    keys = b"\n".join(keys_spelled).decode("ascii").split("\n")
    tensors = None if None in forms else torch.run(keys, forms)
    if tensors is None:
        return False
    vm.waiting += [(names_at, names), (keys_at, keys), (put, tensors)]
    vm.highest = max(vm.highest, max(written))
    vm.stack.extend(chain.from_iterable(zip(names, tensors, strict=True)))
    vm.skipped = True
    vm.pos = end
    return True


def _form(vm: Machine, head: bytes, numel: bytes, offset_shape: bytes, strides: bytes, hooks: bytes) -> Any:
    """What torch makes of a tensor of this spelling, but for its name and storage; None where it is not plain."""
    place, count, offset, shape = _parted(numel, offset_shape)
    refs = (head, place, hooks[1:-2])
    known = vm.heads.get(refs) or _head(vm, *refs)
    try:
        return None if known is None else vm.torch.form(*known, *_view(count, offset, shape, strides), hooks[:1] == b"\x88")
    except CorruptFileError:
        return None


def _head(vm: Machine, head: bytes, place: bytes, hooks: bytes) -> tuple[Global, str] | None:
    """What the template's memo references stand for, if it is what torch means: (storage class, where it was saved)."""
    memo = vm.memo
    func, word, cls = (memo.get(_memo_index(spelled)) for spelled in _REFS.findall(head))
    where = memo.get(_memo_index(place))
    if (
        func != _REBUILD
        or word != "storage"
        or type(cls) is not Global
        or type(where) is not str
        or memo.get(_memo_index(hooks)) != _ORDERED_DICT
    ):
        return None
    vm.called(_REBUILD.dotted)
    vm.heads[head, place, hooks] = (cls, where)
    return cls, where


_I = rb"(?:K.|M..|J....|\x8a(?:\x05.{5}|\x06.{6}))"  # pickle spells a count by the shortest of these
_G = rb"(?:h.|j....)"


_SIZES = rb"\)|%b\x85|%b{2}\x86|%b{3}\x87|\(%b{4,}t" % ((_I,) * 4)
_SHORT, _LONG = rb"q(.)", rb"r(....)"


@cache  # compiled when first met: a process that lists one file needs few of them
def _one_tensor(first: int) -> re.Pattern[bytes] | None:
    """A tensor, by its first opcode: the memo write of a name before it, or the reference to the rebuild function itself."""
    put = {ord("q"): _SHORT, ord("r"): _LONG, ord("h"): _LONG, ord("j"): _LONG}.get(first)
    if put is None:
        return None
    start = put if first in b"qr" else b"()"
    key = rb"(?:X(....)([0-9]+)%b|(%b))" % (put, _G)
    storage = rb"%b(%b)(%b)N?t%bQ(%b)" % (key, _G, _I, put, _I)
    sizes = rb"(%b)(?:(?<!\))%b)?" % (_SIZES, put)
    hooks = rb"([\x88\x89])(%b)\)R%b" % (_G, put)
    return re.compile(start + rb"(%b\(\(%b%b)" % (_G, _G, _G) + storage + sizes + sizes + hooks + b"t" + put + b"R" + put, re.DOTALL)


@cache
def _named_tensor(first: int) -> re.Pattern[bytes] | None:
    """A name and its tensor on a storage of its own, as they follow each other in a state dict; what is alike in many is one group."""
    put = {ord("q"): _SHORT, ord("r"): _LONG}.get(first)
    if put is None:
        return None
    key = rb"X(....)([0-9]+)%b" % put
    storage = rb"%b(%b%b)N?t%bQ(%b" % (key, _G, _I, put, _I)
    sizes = rb"(?:%b))(?:(?<!\))%b)?(%b)(?:(?<!\))%b)?" % (_SIZES, put, _SIZES, put)
    write = put.translate(None, b"()")
    hooks = rb"([\x88\x89]%b\)R)(%bt%bR%b)" % (_G, write, write, write)
    return re.compile(rb"X(....)(.{0,1024}?)%b(%b\(\(%b%b)" % (put, _G, _G, _G) + storage + sizes + hooks, re.DOTALL)


_TAIL = {8: "<xBxxBxxB", 17: "<xIxxIxxI"}  # the last three memo writes of a tensor, by their length


def _run_of_tensors(data: bytes, start: int, first: int) -> tuple[list[tuple[bytes, ...]], int]:
    """The named tensors that follow each other from `start` without a gap, as the groups of their pattern, and where they end.

    `first` is the memo opcode after the first name.
    """
    pattern: Any = _named_tensor(first)  # Any: the type stubs do not know `scanner`, whose matches adjoin
    found = list(iter(pattern.scanner(data, start).match, None)) if pattern is not None else []
    return [match.groups() for match in found], found[-1].end() if found else start


_REFS = re.compile(_G, re.DOTALL)
_COUNTS = re.compile(_I, re.DOTALL)


def _parted(place_numel: bytes, offset_shape: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Two groups of a named tensor as their four parts: the reference to the place, the count; the offset, the shape."""
    place = 2 if place_numel[:1] == b"h" else 5
    offset = _COUNTS.match(offset_shape)
    at = offset.end() if offset else 0
    return place_numel[:place], place_numel[place:], offset_shape[:at], offset_shape[at:]


@lru_cache(maxsize=4096)
def _view(numel: bytes, offset: bytes, shape: bytes, strides: bytes) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """Elements of the storage, offset, shape and strides; a model has few of them and many tensors."""
    return _number(numel), _number(offset), _numbers(shape), _numbers(strides)


def _numbers(spelled: bytes) -> tuple[int, ...]:
    """The counts of a tuple, spelled from its first item to its closing opcode."""
    return tuple(map(_number, _COUNTS.findall(spelled, spelled[:1] == b"(")))


def _indices(puts: Sequence[bytes], width: int | None = None) -> Sequence[int]:
    """The numbers of several memo writes of one width, one byte or four."""
    spelled = b"".join(puts)
    return tuple(spelled) if (width or len(puts[0])) == 1 else struct.unpack(f"<{len(spelled) // 4}I", spelled)


def _memo_index(spelled: bytes) -> int:
    """The index of a memo opcode, of either width."""
    return spelled[1] if len(spelled) == 2 else int.from_bytes(spelled[1:], "little")


def _number(spelled: bytes) -> int:
    if len(spelled) <= 3 and spelled[0] != 0x8A:
        return int.from_bytes(spelled[1:], "little")
    return int.from_bytes(spelled[1 if spelled[0] == 0x4A else 2 :], "little", signed=True)
