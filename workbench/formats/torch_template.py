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
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from itertools import accumulate, chain, islice
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
    text = key.decode("ascii") if key else memo.get(memo_index(key_ref))
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
    vm.unwritten += len(written) - bool(name_put) - bool(key_put) - 1
    tensor = torch.template_tensor(*known, text, *_view(numel, offset, shape, strides), grad == b"\x88")
    memo[written[-1]] = tensor
    vm.stack.append(tensor)
    vm.pos = found.end()
    return True


def carry_out_run(vm: Machine, start: int) -> bool:
    """Carry out a run of names and tensors, each on a storage of its own: most of a state dict, in a few passes over it."""
    data = vm.data
    name_end = start + 5 + int.from_bytes(data[start + 1 : start + 5], "little")
    head = data[name_end : name_end + 12]
    if vm.torch is None or start < vm.singly or b"((" not in head[4:] or (pattern := _named_tensor(head[0])) is None:
        return False
    return _carry_out_alike(vm, start, pattern) or (start >= vm.singly and _carry_out_mixed(vm, start, pattern))


def _carry_out_alike(vm: Machine, start: int, pattern: Any) -> bool:
    """A run that repeats one block of tensors: names and keys are others of the same length, memo places count on, all else is the same."""
    data = vm.data
    found = [m for m in islice(iter(pattern.scanner(data, start).match, None), _PROBED) if m[1]]  # they adjoin
    layouts = [(len(m[0]), len(m[2]), len(m[6]), m.group(4, 8, 10, 12, 14)) for m in found]
    period = next((n for n in range(1, _PROBED // 2) if layouts[n:] == layouts[:-n]), 0)
    if not period or len(found) < _PROBED or len(found[0][3]) != 4:
        return False
    block, step = found[:period], found[period - 1].end() - start
    count = min(len(data) - start, _MOST) // step
    puts = [[m.start(g) for g in (3, 7, 9, 11, 13) if m[g]] + [m.start(15) + at for at in (1, 7, 13)] for m in block]
    bases = [0, *accumulate(map(len, puts))]  # memo places of a block before each of its tensors
    first, each = int.from_bytes(block[0][3], "little"), bases[-1]
    lengths_agree = all(int.from_bytes(m[g], "little") == len(m[g + 1]) for m in block for g in (1, 5))
    if not lengths_agree or not vm.highest < first < (1 << 32) - count * each:
        return False
    # what the run would be, and how much of it is there
    run, places = bytearray(data[start : start + step] * count), struct.pack(f"<{count * each}I", *range(first, first + count * each))
    for put, at in enumerate(chain.from_iterable(puts)):
        for byte in range(4):
            run[at - start + byte :: step] = places[4 * put + byte :: 4 * each]
    texts = [[m.span(g) for m in block] for g in (2, 6)]
    for at in (at for span in chain(*texts) for at in range(*span)):
        run[at - start :: step] = data[at : start + count * step : step]
    count = bisect_left(range(1, count + 1), True, key=lambda n: data[start : start + n * step] != run[: n * step])
    if count * period < _PROBED:
        return False
    names, keys = ([data[i + at : i + to] for i in range(0, count * step, step) for at, to in spans] for spans in texts)
    forms = _forms(vm, [layout[-1] for layout in layouts[:period]])
    if forms is None or not b"".join(keys).isdigit():
        return False
    written = [
        chain.from_iterable(zip(*(range(first + base, first + count * each, each) for base in some), strict=True))
        for some in (bases[:-1], [b + 1 for b in bases[:-1]], [b - 1 for b in bases[1:]])
    ]
    return _carried_out(vm, names, keys, forms * count, written, count * each, first + count * each - 1, start + count * step)


def _carry_out_mixed(vm: Machine, start: int, pattern: Any) -> bool:
    """A run of tensors that are spelled as they may be."""
    data, stop = vm.data, min(len(vm.data), start + _MOST)
    rows = pattern.findall(data, start, stop)
    behind = rows.pop()[-1] if rows and rows[-1][-1] else b""
    vm.singly = end = stop - len(behind)
    if len(rows) < 2:  # tensors that are spelled otherwise, most often with others behind them that are
        vm.singly = max(end, start + _APART)
        return False
    name_lengths, names, name_put, heads, key_lengths, keys, key_put, numels, pids, *rest = zip(*rows, strict=True)
    views, shape_put, strides, strides_put, hooks, puts, _ = rest
    names_at, keys_at, tails = _indices(name_put), _indices(key_put), _TAILS[len(puts[0])].iter_unpack(b"".join(puts))
    hooks_put, args_put, put = zip(*tails, strict=True)
    written = [*names_at, *keys_at, *_indices([*pids, *filter(None, shape_put), *filter(None, strides_put)]), *hooks_put, *args_put, *put]
    apart = min(written) > vm.highest or vm.whole_memo().keys().isdisjoint(written)
    lengths_agree = _indices(name_lengths, 4) == tuple(map(len, names)) and _indices(key_lengths, 4) == tuple(map(len, keys))
    if not apart or len(set(written)) != len(written) or not lengths_agree:
        return False
    forms = _forms(vm, list(zip(heads, numels, views, strides, hooks, strict=True)))
    return forms is not None and _carried_out(vm, names, keys, forms, (names_at, keys_at, put), len(written), max(written), end)


def _carried_out(
    vm: Machine,
    names: Sequence[bytes],
    keys: Sequence[bytes],
    forms: list[Any],
    written: Iterable[Iterable[int]],
    count: int,
    highest: int,
    end: int,
) -> bool:
    """Put a run's names and tensors on the stack; `written` are the memo places of the names, keys and tensors, among `count` of all parts."""
    vm.singly = end
    try:
        told = [name.decode("utf-8", "surrogatepass") for name in names]
    except UnicodeDecodeError:  # told at its own byte, when the opcodes are run singly
        return False
    texts = b"\n".join(keys).decode("ascii").split("\n")
    tensors = vm.torch.run(texts, forms)
    if tensors is None:
        return False
    vm.waiting += zip(written, (told, texts, tensors), strict=True)
    vm.highest = max(vm.highest, highest)
    vm.stack.extend(chain.from_iterable(zip(told, tensors, strict=True)))
    vm.unwritten += count
    vm.pos = end
    return True


def _forms(vm: Machine, kinds: list[tuple[bytes, ...]]) -> list[Any] | None:
    """What torch makes of each spelling; None where one is not plain."""
    if new := set(kinds).difference(vm.forms):
        vm.forms.update({kind: _form(vm, *kind) for kind in new})
    forms = list(map(vm.forms.get, kinds))
    return None if None in forms else forms


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
    func, word, cls = (memo.get(memo_index(spelled)) for spelled in REFS.findall(head))
    where = memo.get(memo_index(place))
    if (
        func != _REBUILD
        or word != "storage"
        or type(cls) is not Global
        or type(where) is not str
        or memo.get(memo_index(hooks)) != _ORDERED_DICT
    ):
        return None
    vm.called(_REBUILD.dotted)
    vm.heads[head, place, hooks] = (cls, where)
    return cls, where


INTEGER = rb"(?:K.|M..|J....|\x8a(?:\x05.{5}|\x06.{6}))"  # pickle spells a count by the shortest of these
GET = rb"(?:h.|j....)"


_SIZES = rb"\)|%b\x85|%b{2}\x86|%b{3}\x87|\(%b{4,}t" % ((INTEGER,) * 4)
_SHORT, _LONG = rb"q(.)", rb"r(....)"


@cache  # compiled when first met: a process that lists one file needs few of them
def _one_tensor(first: int) -> re.Pattern[bytes] | None:
    """A tensor, by its first opcode: the memo write of a name before it, or the reference to the rebuild function itself."""
    put = {ord("q"): _SHORT, ord("r"): _LONG, ord("h"): _LONG, ord("j"): _LONG}.get(first)
    if put is None:
        return None
    start = put if first in b"qr" else b"()"
    key = rb"(?:X(....)([0-9]+)%b|(%b))" % (put, GET)
    storage = rb"%b(%b)(%b)N?t%bQ(%b)" % (key, GET, INTEGER, put, INTEGER)
    sizes = rb"(%b)(?:(?<!\))%b)?" % (_SIZES, put)
    hooks = rb"([\x88\x89])(%b)\)R%b" % (GET, put)
    return re.compile(start + rb"(%b\(\(%b%b)" % (GET, GET, GET) + storage + sizes + sizes + hooks + b"t" + put + b"R" + put, re.DOTALL)


@cache
def _named_tensor(first: int) -> re.Pattern[bytes] | None:
    """A name and its tensor on a storage of its own, as they follow each other in a state dict; what is alike in many is one group."""
    put = {ord("q"): _SHORT, ord("r"): _LONG}.get(first)
    if put is None:
        return None
    key = rb"X(....)([0-9]+)%b" % put
    storage = rb"%b(%b%b)N?t%bQ(%b" % (key, GET, INTEGER, put, INTEGER)
    sizes = rb"(?:%b))(?:(?<!\))%b)?(%b)(?:(?<!\))%b)?" % (_SIZES, put, _SIZES, put)
    write = put.translate(None, b"()")
    hooks = rb"([\x88\x89]%b\)R)(%bt%bR%b)" % (GET, write, write, write)
    tensor = rb"X(....)(.{0,1024}?)%b(%b\(\(%b%b)" % (put, GET, GET, GET) + storage + sizes + hooks
    return re.compile(tensor + rb"|(.+)", re.DOTALL)


_TAILS = {8: struct.Struct("<xBxxBxxB"), 17: struct.Struct("<xIxxIxxI")}  # the last three memo writes of a tensor, by their length
_APART = 1 << 11  # bytes, until a run is looked for again
_PROBED = 32  # tensors that tell whether a run repeats
_MOST = 1 << 17  # bytes of one run; Python's own pickler puts 1,000 items into a dict at once


REFS = re.compile(GET, re.DOTALL)
_COUNTS = re.compile(INTEGER, re.DOTALL)


def _parted(place_numel: bytes, offset_shape: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Two groups of a named tensor as their four parts: the reference to the place, the count; the offset, the shape."""
    place = 2 if place_numel[:1] == b"h" else 5
    offset = _COUNTS.match(offset_shape)
    at = offset.end() if offset else 0
    return place_numel[:place], place_numel[place:], offset_shape[:at], offset_shape[at:]


@lru_cache(maxsize=4096)
def _view(numel: bytes, offset: bytes, shape: bytes, strides: bytes) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """Elements of the storage, offset, shape and strides; a model has few of them and many tensors."""
    return number(numel), number(offset), numbers(shape), numbers(strides)


def numbers(spelled: bytes) -> tuple[int, ...]:
    """The counts of a tuple, spelled from its first item to its closing opcode."""
    return tuple(map(number, _COUNTS.findall(spelled, spelled[:1] == b"(")))


def _indices(puts: Sequence[bytes], width: int | None = None) -> Sequence[int]:
    """The numbers of several memo writes of one width, one byte or four."""
    spelled = b"".join(puts)
    return tuple(spelled) if (width or len(puts[0])) == 1 else struct.unpack(f"<{len(spelled) // 4}I", spelled)


def memo_index(spelled: bytes) -> int:
    """The index of a memo opcode, of either width."""
    return spelled[1] if len(spelled) == 2 else int.from_bytes(spelled[1:], "little")


def memo_indices(spelled: Sequence[bytes]) -> list[int]:
    """The indices of many."""
    joined = b"".join(spelled)
    return [index for (index,) in struct.iter_unpack("<xI", joined)] if len(joined) == 5 * len(spelled) else list(map(memo_index, spelled))


def number(spelled: bytes) -> int:
    if len(spelled) <= 3 and spelled[0] != 0x8A:
        return int.from_bytes(spelled[1:], "little")
    return int.from_bytes(spelled[1 if spelled[0] == 0x4A else 2 :], "little", signed=True)
