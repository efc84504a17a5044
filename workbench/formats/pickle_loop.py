"""The pickle machine's inner loop: the most frequent opcodes, in local variables, and the bounds of what is done for one file.

Source: CPython 3.11 Modules/_pickle.c.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from workbench.errors import CorruptFileError, FormatError, UnsupportedError
from workbench.tree import Global, Inert

if TYPE_CHECKING:
    from workbench.formats.pickle_vm import Machine

MAX_OPCODES = 3_000_000  # run singly, at a tenth of a microsecond or two; a text or a long number counts as two
MAX_BUILT = (
    300_000  # of those that the table carries out, and two or three for each name, call, state or payload, at some microseconds each
)
STORAGE = (100, 20)  # what one more storage allows of both, so that a file of a million tensors is listed, if slowly
MAX_STACK = 1_000_000  # Python's own pickler empties its stack every 1,000 items
TOO_MUCH = f"the pickle has more than {MAX_OPCODES:,} opcodes, or builds more than {MAX_BUILT:,} things"
_STRIDE = 1 << 16  # opcodes between two looks at the stack
_SHORT = 1 << 10  # bytes of a text that is read at once, whatever it is read from
_OPENERS, _FETCH = (b"(", b")"), b"hj"  # what stands behind the fetch that begins a template; what such a fetch is
_ONE_BYTE = frozenset(b"Khq\x8a\x8c")  # opcodes here that look at one byte behind them
_UINT = struct.Struct("<I").unpack_from
_DOUBLE = struct.Struct(">d").unpack_from


class Starved(Exception):
    """An opcode's argument is not in `data` yet. It changed nothing, and is carried out again when more was read."""


def carry_out(vm: Machine, table: Sequence[Callable[[Machine], None]]) -> Any:
    """Carry out opcodes up to STOP, and return the object: the most frequent ones here, all others by the table.

    Raises:
        CorruptFileError: the C unpickler would raise here. UnsupportedError: the pickle is too long. Starved: see there.
    """
    data, stack, marks, memo = vm.data, vm.stack, vm.marks, vm.memo
    pos, highest, frame_end, unwritten, op, done = vm.pos, vm.highest, vm.frame_end, vm.unwritten, 0, 0
    at = pos
    floor, bare = marks[-1] if marks else 0, vm.torch is None
    free, singly = bare, bare and vm.entries is None
    calls, construct, dear = vm.calls, vm.construct, 0
    try:
        while not vm.is_spent:
            if len(stack) + len(marks) > MAX_STACK:
                raise UnsupportedError(f"more than {MAX_STACK:,} values wait on the stack", offset=vm.base + pos)
            for done in range(_STRIDE):  # noqa: B007 (what a run that ends here has done)
                at = pos
                op = data[pos]
                pos += 1
                if op < 0x50:
                    if op == 0x4B:  # BININT1
                        stack.append(data[pos])
                        pos += 1
                        continue
                    if op == 0x4E:  # NONE
                        stack.append(None)
                        continue
                    if op == 0x28 and vm.entries is None:  # MARK
                        floor = len(stack)
                        marks.append(floor)
                        continue
                    if op == 0x29:  # EMPTY_TUPLE
                        stack.append(())
                        continue
                    if op == 0x4A and pos + 4 <= len(data) and not pos < frame_end < pos + 4:  # BININT
                        stack.append(int.from_bytes(data[pos : pos + 4], "little", signed=True))
                        pos += 4
                        continue
                    if op == 0x47 and pos + 8 <= len(data) and not pos < frame_end < pos + 8:  # BINFLOAT
                        stack += _DOUBLE(data, pos)
                        pos += 8
                        continue
                    if op == 0x4D and pos + 2 <= len(data) and not pos < frame_end < pos + 2:  # BININT2
                        pos += 2
                        stack.append(data[pos - 2] | data[pos - 1] << 8)
                        continue
                    if op == 0x30 and len(stack) > floor:  # POP
                        stack.pop()
                        continue
                    if op == 0x2E:  # STOP
                        vm.end, vm.pos = vm.base + pos, pos
                        return vm.pop()
                elif op > 0x7F:
                    if op == 0x94:  # MEMOIZE
                        index = len(memo) + unwritten
                        if index > highest and len(stack) > floor:
                            memo[index] = stack[-1]
                            highest = index
                            continue
                    elif op == 0x8C and singly:  # SHORT_BINUNICODE
                        end = pos + 1 + data[pos]
                        if not pos < frame_end < end and end <= len(data):
                            stack.append(data[pos + 1 : end].decode("utf-8", "surrogatepass"))
                            pos = end
                            dear += 1
                            continue
                    elif 0x85 <= op <= 0x87:  # TUPLE1, TUPLE2, TUPLE3
                        count = 0x84 - op
                        if len(stack) + count >= floor:
                            stack[count:] = (tuple(stack[count:]),)
                            continue
                    elif op == 0x8A and data[pos] < 16:  # LONG1
                        end = pos + 1 + data[pos]
                        if not pos < frame_end < end and end <= len(data):
                            stack.append(int.from_bytes(data[pos + 1 : end], "little", signed=True))
                            pos = end
                            dear += 1
                            continue
                    elif op == 0x89 or op == 0x88:  # NEWFALSE, NEWTRUE
                        stack.append(op == 0x88)
                        continue
                elif op < 0x6B:
                    if op == 0x58:  # BINUNICODE, unless a tensor may follow it
                        end = pos + 4 + _UINT(data, pos)[0] if pos + 4 <= len(data) else pos
                        if not bare:
                            behind = end + 2 if data[end : end + 1] == b"q" else end + 5
                            free = behind < len(data) and data[behind] not in _FETCH
                        if free and not pos < frame_end < end and pos < end <= len(data) and end - pos < _SHORT:
                            stack.append(data[pos + 4 : end].decode("utf-8", "surrogatepass"))
                            pos = end
                            dear += 1
                            continue
                    if op == 0x52 and len(stack) > floor + 1 and type(func := stack[-2]) is Global and type(stack[-1]) is tuple:  # REDUCE
                        vm.built += 3
                        node = Inert(func, stack.pop())
                        if func.dotted not in calls:
                            calls[func.dotted] = vm.base + pos
                        stack[-1] = construct(node)
                        continue
                    if op == 0x68 and (singly or data[pos + 1 : pos + 2] not in _OPENERS):  # BINGET
                        index = data[pos]
                        if index in memo:
                            stack.append(memo[index])
                            pos += 1
                            continue
                    elif (
                        op == 0x6A and (singly or data[pos + 4 : pos + 5] not in _OPENERS) and not pos < frame_end < pos + 4
                    ):  # LONG_BINGET
                        index = int.from_bytes(data[pos : pos + 4], "little")
                        if index in memo and pos + 4 <= len(data):
                            stack.append(memo[index])
                            pos += 4
                            continue
                    elif op == 0x65 and marks and floor and len(stack) > floor and type(stack[floor - 1]) is list:  # APPENDS
                        at_end = marks[-2] if len(marks) > 1 else 0
                        if floor > at_end:
                            stack[floor - 1] += stack[floor:]
                            del stack[floor:]
                            marks.pop()
                            floor = at_end
                            continue
                    elif op == 0x5D:  # EMPTY_LIST
                        stack.append([])
                        continue
                    elif op == 0x61 and len(stack) > floor + 1 and type(stack[-2]) is list:  # APPEND
                        item = stack.pop()
                        stack[-1].append(item)
                        continue
                elif op == 0x71:  # BINPUT
                    index = data[pos]
                    if index > highest and len(stack) > floor:
                        memo[index] = stack[-1]
                        highest = index
                        pos += 1
                        continue
                elif op == 0x72:  # LONG_BINPUT
                    index = int.from_bytes(data[pos : pos + 4], "little")
                    if index > highest and len(stack) > floor and pos + 4 <= len(data) and not pos < frame_end < pos + 4:
                        memo[index] = stack[-1]
                        highest = index
                        pos += 4
                        continue
                elif op == 0x7D:  # EMPTY_DICT
                    stack.append({})
                    continue
                elif op == 0x74 and marks:  # TUPLE
                    stack[floor:] = (tuple(stack[floor:]),)
                    marks.pop()
                    floor = marks[-1] if marks else 0
                    continue
                vm.built += 1
                vm.pos, vm.highest = pos, highest
                table[op](vm)
                pos, highest, frame_end, unwritten = vm.pos, vm.highest, vm.frame_end, vm.unwritten
                floor, bare = marks[-1] if marks else 0, vm.torch is None
                free, singly = bare, bare and vm.entries is None
            vm.ran += _STRIDE + dear
            dear = 0
        raise UnsupportedError(TOO_MUCH, offset=vm.base + pos)
    except FormatError:
        raise
    except (IndexError, KeyError, TypeError, ValueError, struct.error, OverflowError) as error:
        cut = at >= len(data) or (op in _ONE_BYTE and at + 1 >= len(data))
        if cut and len(data) < vm.size:
            raise Starved from None
        vm.pos, vm.short = max(vm.pos, pos), vm.short or cut
        what = "the pickle ends early" if vm.short else f"the pickle is damaged: {type(error).__name__}: {error}"
        raise CorruptFileError(what, offset=vm.place) from error
    finally:
        vm.began, vm.highest = at, max(highest, vm.highest)
        vm.ran += done + dear
