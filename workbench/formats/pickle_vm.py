"""A symbolic pickle machine: all 68 opcodes, protocols 0 to 5, with the semantics of C `_pickle`; it imports and calls nothing.

Globals become `Global`, calls become `Inert` nodes, persistent ids go to the caller's function. Every global and every call
is recorded when it is made, whatever becomes of its result. Where the C unpickler would raise, this machine raises
CorruptFileError with the byte; it never resynchronises and never guesses.

Source: CPython 3.11 Modules/_pickle.c and Lib/pickletools.py (opcode arguments).
"""

from __future__ import annotations

import _compat_pickle
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from workbench.errors import UnsupportedError
from workbench.formats.pickle_arguments import c_string, checked_key, float_line, int_line, pairs_of, string_line, text_of
from workbench.formats.pickle_loop import MAX_BUILT, MAX_OPCODES, MAX_STACK, STORAGE, Starved, carry_out
from workbench.formats.torch_template import carry_out_one, carry_out_run
from workbench.tensors import LazyTensor
from workbench.tree import NOTHING, Global, Inert, is_mapping, items_of, makes_tensor, wrapped

_FETCHES = (b"h", b"j")
_CROSSES = "a frame ends inside an opcode's argument: C drops what is left of the frame, or does not, by the kind of file it reads from"
SET_STATE = Global("torch.Tensor", "__setstate__")  # how `construct` is told of a state for what a call made: None, where it took it
_MAX_COPIED = 64 << 20  # bytes
_DOUBLE = struct.Struct(">d").unpack_from


class _SkippedMemo(Exception):
    """The pickle refers to a memo entry that the template did not write."""


class Machine:
    """One run over one pickle.

    Attributes:
        globals: every global named, with the byte where it first was.
        calls: every callable called or built, with the byte where it first was.
        texts: every byte string of four bytes and more, wherever it went; states: every state that an object was given.
        end: the byte after STOP.
        short: whether the machine stopped because the bytes ran out; crossed: because a frame ends inside an argument.
        ran, built: opcodes run singly, and those of them that the table carried out; bounded, and handed on to bound several pickles.
    """

    def __init__(
        self,
        data: bytes,
        *,
        persistent: Callable[[Any], Any],
        construct: Callable[[Inert], Any],
        torch: Any = None,
        entries: Callable[[Machine, int], bool] | None = None,
        start: int = 0,
        more: Callable[[int], bytes] | None = None,
        size: int | None = None,
    ) -> None:
        self.data = data  # as far as it was read
        self.base = 0  # where it begins, in the bytes that places count
        self.size = len(data) if size is None else size  # how long it may become
        self.more = more  # gives data that begins alike and is longer, by its length
        self.persistent = persistent
        self.construct = construct
        self.torch = torch  # makes tensors from the parts of torch's own opcode template; None: opcodes are run singly
        self.entries = entries  # carries out what begins at a short text, or at a fetch with `)` behind it, where a container spells it so
        self._start = start
        self.ran = self.built = 0
        self._reset()

    def _reset(self) -> None:
        self.pos = self._start
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.proto = 0
        self.globals: dict[Global, int] = {}
        self.calls: dict[str, int] = {}
        self.heads: dict[tuple[bytes, bytes, bytes], tuple[Global, str]] = {}  # the template's references, looked up once
        self.forms: dict[tuple[bytes, ...], Any] = {}  # what the template's tensors of one spelling share
        self.waiting: list[tuple[Iterable[int], Sequence[Any]]] = []  # memo entries of runs, which are rarely read
        self.highest = -1  # no memo index above it was written
        self.singly = 0  # up to this byte a run was refused, and is not tried again from each of its names
        self.unwritten = 0  # memo entries that a template left out of `memo`
        self.merged = 0  # entries of states that were given to one object after another state, or changed after they were given
        self.given: dict[int, list[Inert]] = {}  # by the ids of mappings, whose states they are
        self.texts: list[Any] = []
        self.states: list[Any] = []
        self.names: dict[tuple[str, str], Global] = {}
        self.copied = 0  # bytes of what may be asked for any number of times
        self.keys: set[str] = set()  # of storages that were named singly
        self.began = self.pos  # the opcode that is carried out
        self.end = 0
        self.short = self.crossed = False
        self.frame_end = 0

    def run(self) -> Any:
        """The object that the pickle describes.

        Raises:
            CorruptFileError: the C unpickler would raise here.
        """
        try:
            return self._run_on()
        except _SkippedMemo:
            self.torch = self.entries = None
            self._reset()
            return self._run_on()

    def _run_on(self) -> Any:
        while True:
            try:
                return self._run()
            except Starved:
                self.pos = self.began
                self._read_more()

    def _read_more(self) -> None:
        assert self.more is not None
        before, self.data = len(self.data), self.more(len(self.data))
        self.size = self.size if len(self.data) > before else before

    def _run(self) -> Any:
        return carry_out(self, _TABLE)

    @property
    def is_spent(self) -> bool:
        """Whether it stopped, or would, because it did more than is done for one file."""
        return self.ran >= MAX_OPCODES or self.built >= MAX_BUILT

    @property
    def is_whole(self) -> bool:
        """Whether `data` is all that it runs over, from its first byte."""
        return self._start == 0 and len(self.data) == self.size

    @property
    def place(self) -> int:
        """Where the machine is, in the bytes that places count."""
        return self.base + self.pos

    def partial(self) -> Any:
        """What was built before the machine stopped: open containers take what waits for them, as far as it is complete."""
        while self.marks:
            waiting = self._pop_mark()
            target = self.stack[-1] if self.stack else None
            if isinstance(target, list):
                target += waiting
            elif isinstance(target, (dict, Inert)):
                pairs = {
                    checked_key(key): value for key, value in zip(waiting[::2], waiting[1::2], strict=False) if isinstance(key, (str, int))
                }
                (target if isinstance(target, dict) else target.items).update(pairs)
        return self.stack[0] if self.stack else {}

    # stack

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("stack underflow")
        return self.stack.pop()

    def _top(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("stack underflow")
        return self.stack[-1]

    def _pop_mark(self) -> list[Any]:
        if not self.marks:
            raise ValueError("no mark on the stack")
        at = self.marks.pop()
        held = self.stack[at:]
        del self.stack[at:]
        return held

    def _take(self, count: int) -> bytes:
        if not 0 <= count <= self.size - self.pos:
            self.short = count >= 0
            raise ValueError(f"{count} bytes wanted, {self.size - self.pos} left")
        if self.pos + count > len(self.data):
            raise Starved
        if self.pos < self.frame_end < self.pos + count:
            self.cross()
        self.pos += count
        return self.data[self.pos - count : self.pos]

    def cross(self) -> NoReturn:
        self.crossed = True
        raise ValueError(_CROSSES)

    def _byte(self) -> int:
        return self._take(1)[0]

    def _line(self) -> bytes:
        end = self.data.find(b"\n", self.pos)
        if end < 0 and len(self.data) < self.size:
            raise Starved
        if end < 0:
            self.short = True
            raise ValueError("a line without an end")
        if self.pos < self.frame_end <= end:
            self.cross()
        line = self.data[self.pos : end]
        self.pos = end + 1
        return line

    def _word(self) -> bytes:
        line = self._line()
        if not line:
            raise ValueError("an empty name")
        return line

    def _uint(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _signed(self, data: bytes) -> None:
        self.stack.append(int.from_bytes(data, "little", signed=True))

    def _sized(self, width: int, signed: bool = False) -> bytes:
        return self._take(int.from_bytes(self._take(width), "little", signed=signed))

    def _spend(self, nbytes: int) -> None:
        self.copied += nbytes
        if self.copied > _MAX_COPIED:
            raise UnsupportedError("the pickle copies names and byte strings beyond all measure", offset=self.place)

    def _push_bytes(self, data: Any) -> None:
        self.stack.append(data)
        if len(data) > 3 and not isinstance(data, str):
            self.built += 1
            self.texts.append(data)

    # text

    def op_binunicode(self) -> None:
        may_name = self.torch is not None and _may_name_a_tensor(self.data, self.pos)
        if may_name and carry_out_run(self, self.pos - 1):
            return
        self.stack.append(self._sized(4).decode("utf-8", "surrogatepass"))
        if may_name:
            carry_out_one(self, self.pos)

    def op_short_binunicode(self) -> None:
        if self.entries is None or not self.entries(self, self.pos - 1):
            self.stack.append(self._sized(1).decode("utf-8", "surrogatepass"))

    # memo and persistent ids

    def _put(self, index: int) -> None:
        top = self._top()
        if index > self.highest:
            self.highest = index
        elif index in self.whole_memo():
            self.heads.clear()
            self.forms.clear()
        elif self.unwritten:
            raise _SkippedMemo
        self.memo[index] = top

    def _get(self, index: int) -> None:
        if index not in self.memo and index not in self.whole_memo():
            raise _SkippedMemo if self.unwritten else ValueError(f"memo {index} was never written")
        self.stack.append(self.memo[index])

    def whole_memo(self) -> dict[int, Any]:
        for places, values in self.waiting:
            self.memo.update(zip(places, values, strict=True))
            self.unwritten -= len(values)
        self.waiting.clear()
        return self.memo

    def op_put(self) -> None:
        index = int(c_string(self._line()))
        if index < 0:
            raise ValueError("negative memo index")
        self._put(index)

    def op_binget(self) -> None:
        if not self._by_template(self.pos + 1):
            self._get(self._byte())

    def op_long_binget(self) -> None:
        if not self._by_template(self.pos + 4):
            self._get(self._uint(4))

    def _by_template(self, behind: int) -> bool:
        """Whether a fetch, and `(` or `)` behind it, began what a template carried out."""
        following = self.data[behind : behind + 1]
        if following == b"(" and self.torch is not None:
            return carry_out_one(self, self.pos - 1)
        return following == b")" and self.entries is not None and self.entries(self, self.pos - 1)

    def _persistent(self, pid: Any) -> None:
        self.stack.append(self.persistent(pid))
        key, held = pid[2] if type(pid) is tuple and len(pid) > 4 else None, self.stack[-1]
        if not isinstance(held, LazyTensor) or held.locked is not None:
            self.built += 10  # a storage that is not there takes time, and is told
        elif type(key) is str and key not in self.keys:
            self.keys.add(key)
            self.ran, self.built = self.ran - STORAGE[0], self.built - STORAGE[1]

    # containers

    def op_mark(self) -> None:
        self.marks.append(len(self.stack))
        if self.entries is not None and self.data[self.pos : self.pos + 1] in _FETCHES:
            self.entries(self, self.pos)

    def op_pop(self) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop()

    def _tuple(self, count: int) -> None:
        at = len(self.stack) - count
        if at < (self.marks[-1] if self.marks else 0):
            raise ValueError("stack underflow")
        held = tuple(self.stack[at:])
        del self.stack[at:]
        self.stack.append(held)

    def op_append(self) -> None:
        item = self.pop()
        self._extend(self._top(), [item])

    def op_appends(self) -> None:
        items = self._pop_mark()
        self._extend(self._top(), items)

    def _extend(self, target: Any, items: list[Any]) -> None:
        if not items:
            return
        if isinstance(target, bytearray) and not {int, bool}.issuperset(map(type, items)):
            raise self._refusal("a bytearray takes numbers only", *items)
        if isinstance(target, (list, bytearray)):
            target.extend(items)
        elif isinstance(target, Inert):
            self.called(target.dotted)
            target.elements.extend(items)
        else:
            raise self._refusal(f"cannot append to {_kind(target)}", target if isinstance(target, Global) else None)

    def op_setitem(self) -> None:
        value, key = self.pop(), self.pop()
        self._set_items(self._top(), {checked_key(key): value})

    def op_setitems(self) -> None:
        pairs = pairs_of(self._pop_mark())
        self._set_items(self._top(), pairs)

    def _set_items(self, target: Any, pairs: dict[Any, Any]) -> None:
        if not pairs:
            return
        if id(target) in self.given:
            self._keep_states(target)
        if isinstance(target, dict):
            target.update(pairs)
        elif isinstance(target, Inert) and not isinstance(wrapped(target), LazyTensor):
            self.called(target.dotted)
            target.items.update(pairs)
        elif isinstance(target, (list, bytearray)):
            for key, value in pairs.items():
                if not isinstance(key, int):
                    raise self._refusal(f"{_kind(key)} is no place in a {_kind(target)}", key)
                if isinstance(target, bytearray) and not isinstance(value, int):
                    raise self._refusal("a bytearray takes numbers only", value)
                target[key] = value
        else:
            raise self._refusal(f"cannot set items of {_kind(target)}", target)

    def _keep_states(self, target: Any) -> None:
        """An object takes the entries that its state has when it is given; what is put into that mapping later is not its own."""
        held, nodes = items_of(target), self.given.pop(id(target))
        self._merge(len(held))
        kept = dict(held) if isinstance(target, dict) else replace(target, items=dict(held))
        for node in nodes:
            if isinstance(node.state, tuple):
                node.state = tuple(kept if half is target else half for half in node.state)
            elif node.state is target:
                node.state = kept

    def _merge(self, entries: int) -> None:
        self.merged += entries
        if self.merged > MAX_STACK:
            raise UnsupportedError("the states of an object are given again and again", offset=self.place)

    def op_additems(self) -> None:
        items = self._pop_mark()
        target = self._top()
        if isinstance(target, set):
            target.update(map(checked_key, items))
        elif isinstance(target, Inert):
            self._extend(target, items)
        elif items:
            raise self._refusal(f"cannot add to {_kind(target)}", target if isinstance(target, Global) else None)

    # globals and calls

    def _global(self, module: str, name: str) -> None:
        if self.proto < 3:
            if (module, name) in _compat_pickle.NAME_MAPPING:
                module, name = _compat_pickle.NAME_MAPPING[module, name]
            elif module in _compat_pickle.IMPORT_MAPPING:
                module = _compat_pickle.IMPORT_MAPPING[module]
        self.built += 1
        found = self.names.get((module, name))
        if found is None:
            self._spend(len(module) + len(name))
            found = self.names[module, name] = Global(module, name)
        self.globals.setdefault(found, self.place)
        self.stack.append(found)

    def op_global(self) -> None:
        module = self._word().decode("utf-8")
        self._global(module, self._word().decode("utf-8"))

    def op_stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise self._refusal("STACK_GLOBAL requires str", name, module)
        self._global(module, name)

    def _extension(self, width: int) -> None:
        code = int.from_bytes(self._take(width), "little", signed=width == 4)
        if code <= 0:
            raise ValueError("EXT specifies code <= 0")
        self.built += 1
        found = Global("copyreg", f"extension {code}")
        self.globals.setdefault(found, self.place)
        self.stack.append(found)

    def called(self, dotted: str) -> None:
        self.calls.setdefault(dotted, self.place)

    def _made(self, func: Any, args: Any, kwargs: Any = None, new: bool = False) -> None:
        if not isinstance(func, (Global, Inert)):
            raise TypeError(f"{_kind(func)} cannot be called")
        if not isinstance(args, (tuple, Inert)):
            raise self._refusal("call arguments must be a tuple", args)
        self.built += 2
        node = Inert(func, args, kwargs, new)
        self.called(node.dotted)
        self.stack.append(self.construct(node))

    def _call(self, new: bool) -> None:
        args, func = self.pop(), self.pop()
        self._made(func, args, new=new)

    def op_inst(self) -> None:
        module, name = self._word().decode("ascii"), self._word().decode("ascii")
        args = tuple(self._pop_mark())
        self._global(module, name)
        self._made(self.stack.pop(), args)

    def op_obj(self) -> None:
        func, *args = self._pop_mark()
        self._made(func, tuple(args))

    def op_newobj_ex(self) -> None:
        kwargs, args, func = self.pop(), self.pop(), self.pop()
        if not isinstance(kwargs, (dict, Inert)):
            raise self._refusal("keyword arguments must be a dict", kwargs)
        self._made(func, args, kwargs, new=True)

    def op_build(self) -> None:
        state = self.pop()
        target = self._top()
        is_told = makes_tensor(target) or (isinstance(target, Inert) and is_mapping(target))
        self.built += 1 + is_told  # which copies it
        self.states.append(state)
        if is_told and self.construct(Inert(SET_STATE, (target, state))) is None:
            self.called(SET_STATE.dotted)
            return
        if isinstance(target, (Inert, LazyTensor, Global)):
            self.called(SET_STATE.dotted if isinstance(target, LazyTensor) else _built(target))
        elif state is not None and not (type(state) is tuple and len(state) == 2 and state[0] is None and state[1] == {}):
            raise self._refusal(
                f"{_kind(target)} has no state to build", *(state if type(state) is tuple and len(state) == 2 else (state,))
            )
        if isinstance(target, Inert):
            if isinstance(target.state, dict) and isinstance(state, dict):
                self._merge(len(target.state) + len(state))
                target.state = {**target.state, **state}
            else:
                target.state = state if target.state is NOTHING else (target.state, state)
                for half in state if type(state) is tuple and len(state) == 2 else (state,):
                    if is_mapping(half):
                        self.given.setdefault(id(half), []).append(target)

    # bytes, frames and the rest

    def op_proto(self) -> None:
        self.proto = self._byte()
        if self.proto > 5:
            raise ValueError(f"unsupported pickle protocol {self.proto}")

    def op_frame(self) -> None:
        length = self._uint(8)
        if length > self.size - self.pos:
            self.short = True
            raise ValueError(f"a frame of {length} bytes, {self.size - self.pos} left")
        if self.pos < self.frame_end < self.pos + length:
            self.cross()
        self.frame_end = max(self.frame_end, self.pos + length)
        self.torch = None

    def _refusal(self, told: str, *values: Any) -> Exception:
        """What C raises; but where one of these is such that only C knows its type, as the result of a call, C may go on."""
        is_open = any(isinstance(value, (Global, Inert, LazyTensor)) for value in values)
        return UnsupportedError(f"{told}, as far as can be told", offset=self.place) if is_open else TypeError(told)

    def op_unknown(self) -> None:
        raise ValueError(f"invalid opcode 0x{self.data[self.pos - 1]:02x}")

    def op_readonly_buffer(self) -> None:
        buffer = self.pop()
        if not isinstance(buffer, (bytes, bytearray)):
            raise self._refusal("only a buffer can be made read-only", buffer)
        self._spend(len(buffer) if isinstance(buffer, bytearray) else 0)
        self.stack.append(bytes(buffer))

    def op_no_buffer(self) -> None:
        raise ValueError("out-of-band buffers are not part of a file")


def _may_name_a_tensor(data: bytes, at: int) -> bool:
    """Whether a text, its length at `at`, is memoised and then something is fetched, as before a tensor that torch wrote."""
    end = at + 4 + int.from_bytes(data[at : at + 4], "little")
    return data[end + 2 : end + 3] in _FETCHES if data[end : end + 1] == b"q" else data[end + 5 : end + 6] in _FETCHES


def _built(target: Global | Inert) -> str:
    """BUILD on a class changes the class itself, for the whole process; on an object of it, the object."""
    return f"a change to {target.dotted} itself" if isinstance(target, Global) else target.dotted


def _kind(value: Any) -> str:
    return value.dotted if isinstance(value, (Global, Inert)) else "bytes" if isinstance(value, bytes) else type(value).__name__


_OPS: dict[bytes, Callable[[Machine], None]] = {
    b"(": Machine.op_mark,
    b"0": Machine.op_pop, b"1": lambda m: (m._pop_mark(), None)[1], b"2": lambda m: m.stack.append(m._top()),
    b"F": lambda m: m.stack.append(float_line(m._line())), b"G": lambda m: m.stack.extend(_DOUBLE(m._take(8))), b"I": lambda m: m.stack.append(int_line(m._line())),
    b"J": lambda m: m._signed(m._take(4)), b"K": lambda m: m.stack.append(m._byte()),
    b"L": lambda m: m.stack.append(int(c_string(m._line().removesuffix(b"L")), 0)), b"M": lambda m: m.stack.append(m._uint(2)),
    b"\x8a": lambda m: m._signed(m._sized(1)), b"\x8b": lambda m: m._signed(m._sized(4, signed=True)),
    b"N": lambda m: m.stack.append(None), b"\x88": lambda m: m.stack.append(True), b"\x89": lambda m: m.stack.append(False),
    b"S": lambda m: m._push_bytes(string_line(m._line())),
    b"T": lambda m: m._push_bytes(text_of(m._sized(4, signed=True))), b"U": lambda m: m._push_bytes(text_of(m._sized(1))),
    b"V": lambda m: m.stack.append(m._line().decode("raw-unicode-escape")), b"X": Machine.op_binunicode,
    b"\x8c": Machine.op_short_binunicode,
    b"\x8d": lambda m: m.stack.append(m._sized(8).decode("utf-8", "surrogatepass")),
    b"B": lambda m: m._push_bytes(m._sized(4)), b"C": lambda m: m._push_bytes(m._sized(1)), b"\x8e": lambda m: m._push_bytes(m._sized(8)),
    b"\x96": lambda m: m._push_bytes(bytearray(m._sized(8))),
    b"P": lambda m: m._persistent(m._line().decode("ascii")), b"Q": lambda m: m._persistent(m.pop()),
    b"R": lambda m: m._call(False), b"b": Machine.op_build,
    b"c": Machine.op_global, b"\x93": Machine.op_stack_global, b"i": Machine.op_inst, b"o": Machine.op_obj,
    b"\x81": lambda m: m._call(True), b"\x92": Machine.op_newobj_ex,
    b"\x82": lambda m: m._extension(1), b"\x83": lambda m: m._extension(2), b"\x84": lambda m: m._extension(4),
    b"a": Machine.op_append, b"e": Machine.op_appends, b"d": lambda m: m.stack.append(pairs_of(m._pop_mark())), b"}": lambda m: m.stack.append({}), b"s": Machine.op_setitem, b"u": Machine.op_setitems,
    b"l": lambda m: m.stack.append(m._pop_mark()), b"]": lambda m: m.stack.append([]),
    b"t": lambda m: m.stack.append(tuple(m._pop_mark())), b")": lambda m: m.stack.append(()),
    b"\x85": lambda m: m._tuple(1), b"\x86": lambda m: m._tuple(2), b"\x87": lambda m: m._tuple(3),
    b"\x8f": lambda m: m.stack.append(set()), b"\x90": Machine.op_additems, b"\x91": lambda m: m.stack.append(frozenset(map(checked_key, m._pop_mark()))),
    b"g": lambda m: m._get(int(c_string(m._line()))), b"h": Machine.op_binget, b"j": Machine.op_long_binget,
    b"p": Machine.op_put, b"q": lambda m: m._put(m._byte()), b"r": lambda m: m._put(m._uint(4)), b"\x94": lambda m: m._put(len(m.memo) + m.unwritten),
    b"\x80": Machine.op_proto, b"\x95": Machine.op_frame, b"\x97": Machine.op_no_buffer, b"\x98": Machine.op_readonly_buffer,
}  # fmt: skip
_TABLE = [_OPS.get(bytes([code]), Machine.op_unknown) for code in range(256)]
