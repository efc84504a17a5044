"""Files that begin with a pickle: torch's container before 1.6, and plain pickles of tensors or arrays.

The legacy container (torch.save until 1.6, and with _use_new_zipfile_serialization=False):

    pickle    0x1950a86a20f9469cfc6c
    pickle    1001, the protocol's version
    pickle    {"protocol_version", "little_endian", "type_sizes"}; never used, for storages are little-endian wherever they were written
    pickle    the object, with persistent ids ('storage', class, key, place, elements, None or (view's key, offset, elements))
              and ('module', class, file, source text)
    pickle    the storages' keys, in the order in which they follow
    each      8 bytes count of elements, little-endian, then the elements

The object is read twice: once for where it ends and which storages it names, and again when their places are known. The
storages must end where the file does; each count is proved at the first read of its storage. A plain pickle is one object;
its data lie in it (pickle_blobs), torch's as a whole file in a byte string. Any other zip, tar or joblib file is not read here.

Source: torch 2.13 torch/serialization.py (_legacy_save, _legacy_load), torch/csrc/serialization.cpp, torch/storage.py (_load_from_bytes).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

from workbench.checkpoint import Checkpoint, Finding
from workbench.dtypes import DTYPES
from workbench.errors import CorruptFileError, FormatError, UnsupportedError
from workbench.files import FileRef, Span, Storage
from workbench.formats import torch_zip
from workbench.formats.known_globals import NESTED, danger_findings
from workbench.formats.pickle_blobs import (
    MAX_OPCODES,
    Left,
    Pages,
    PayloadMachine,
    PayloadObjects,
    Placed,
    charge,
    inner_archive,
    kept,
    most_nested,
    payload_span,
)
from workbench.formats.pickle_vm import Machine
from workbench.formats.torch_objects import TorchObjects, counted, storage_dtype, trailing_finding, unpickle
from workbench.tensors import Block, Derived, LazyTensor, TensorSpec
from workbench.tree import Global, Inert

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_HEAD, _CLAIM = 1 << 16, 1 << 12  # bytes that are run, at the start of a pickle and to tell whether it is one
_MORE_PICKLES = 64  # of those that follow a plain one


def open_file(file: FileRef) -> Checkpoint:
    """List a legacy torch file or a plain pickle, as its content says.

    Raises:
        CorruptFileError: cut, damaged or contradictory. UnsupportedError: a joblib file.
    Cost: a legacy file's pickles; a plain pickle's opcodes and its short payloads. No tensor data.
    """
    whole = Span(file, 0, file.size)
    head = whole.read(0, _HEAD)
    return _open_legacy(whole, head) if _is_legacy(head) else _open_plain(file)


def claims(file: FileRef) -> bool:
    """Whether a file without a pickle's mark is one all the same: protocols 0 and 1 have none, and text can look like them."""
    head = Span(file, 0, file.size).read(0, _CLAIM)
    machine = Machine(head, persistent=_same, construct=_same)
    try:
        value = machine.run()
    except FormatError:
        names = [found for found in machine.globals if re.fullmatch(r"\w+(\.\w+)*", found.dotted)]
        known = any(found.module.partition(".")[0] in sys.stdlib_module_names for found in names)
        return known or bool(names and machine.calls) or (machine.short and bool(machine.memo))
    holds = bool(value) if isinstance(value, (dict, list, tuple)) else value == _MAGIC
    return bool(machine.globals) or holds or machine.end == file.size


def _same(value: Any) -> Any:
    return value


# the legacy container


def _is_legacy(head: bytes) -> bool:
    try:
        return bool(Machine(head, persistent=_same, construct=_same).run() == _MAGIC)
    except FormatError:
        return False


def _open_legacy(whole: Span, head: bytes) -> Checkpoint:
    pickles, storages = _Pickles(whole, head), _Storages(whole)
    objects = TorchObjects(storages.find, "little", storages.find_all)
    objects.troubles = pickles.findings
    start, trouble = None, None
    try:
        pickles.read()
        if (version := pickles.read()) != _VERSION:
            told = version if type(version) is int and version.bit_length() < 64 else f"a {type(version).__name__}"
            raise UnsupportedError(f"the container's version is {told}; {_VERSION} is read", path=whole.file.url)
        system, start = pickles.read(), pickles.at
        if isinstance(system, dict) and system.get("little_endian") is False:
            message = "it was written on a big-endian machine; this container stores values little-endian wherever it is written"
            pickles.findings.append(Finding("big-endian writer", "info", message))
        pickles.read(storages)
        if behind := storages.place(pickles.read(), pickles.at):
            pickles.findings.append(trailing_finding(behind, "the last storage"))
    except FormatError as error:
        trouble = error
    tree: Any = {}
    found = tuple(pickles.findings)
    if start is not None:
        tree, _, found = unpickle(pickles.data, objects, file=whole.file, format="torch-legacy", start=start)
    ckpt = Checkpoint(tree, name=whole.file.name, format="torch-legacy", findings=found, source=whole.file)
    if trouble is not None:
        trouble.partial = ckpt
        raise trouble
    return ckpt


class _Pickles:
    """The pickles at the head of a legacy file, over a prefix that grows while its bytes run out."""

    def __init__(self, whole: Span, head: bytes) -> None:
        self._whole, self.data, self.at = whole, head, 0
        self.findings: list[Finding] = []

    def read(self, storages: _Storages | None = None) -> Any:
        """The value of the next one. The object's is none: it is run for the storages that it names, and unpickled later."""
        made: list[Inert] = []
        persistent, construct = (storages.persistent, _same) if storages else (_same, kept(made))
        size = self._whole.nbytes
        machine = Machine(self.data, persistent=persistent, construct=construct, torch=storages, start=self.at, more=self._more, size=size)
        try:
            with counted(machine):
                value = machine.run()
        except FormatError:
            self.findings += danger_findings(machine, made)
            raise
        self.findings += [] if storages else danger_findings(machine, made)
        self.at = machine.end
        return value

    def _more(self, count: int) -> bytes:
        if count > MAX_OPCODES:
            raise UnsupportedError(f"more than {MAX_OPCODES >> 20} MiB of pickle are not read")
        self.data += self._whole.read(count, 4 * count)
        return self.data


class _Storages:
    """The storages that an object names, and where they lie once their keys were read. Makes no tensors."""

    _TENSOR = LazyTensor(TensorSpec(DTYPES["uint8"], ()), Derived(Block("", {}, (), ()), 0))

    _ABSENT = replace(_TENSOR, locked="the file does not hold as many bytes")

    def __init__(self, whole: Span) -> None:
        self._whole = whole
        self._needed = 0  # bytes of those that were named singly
        self._named: dict[str | int, tuple[int, int]] = {}  # elements and bytes
        self._places: dict[str, Span] = {}

    def persistent(self, pid: Any) -> Any:
        if type(pid) is tuple and len(pid) == 4:
            return pid[1]  # a class, with its source
        if type(pid) is tuple and len(pid) >= 5 and isinstance(pid[1], Global) and type(pid[4]) is int and _is_key(pid[2]):
            known = len(self._named)
            self.template_tensor(pid[1], pid[3], pid[2], pid[4])
            self._needed += 8 + max(0, self._named[pid[2]][1]) if len(self._named) > known else 0
        return self._TENSOR if self._needed <= self._whole.nbytes else self._ABSENT

    def template_tensor(self, cls: Global, place: Any, key: str | int, numel: int, *_: Any) -> LazyTensor:
        self._named.setdefault(key, self.form(cls, place, numel))
        return self._TENSOR

    def form(self, cls: Global, place: Any, numel: int, *_: Any) -> tuple[int, int]:
        dtype = storage_dtype(cls)
        return numel, numel * (dtype.itemsize if dtype else 1)

    def run(self, keys: list[str], forms: list[tuple[int, int]]) -> list[LazyTensor] | None:
        for key, form in zip(keys, forms, strict=True):
            self._named.setdefault(key, form)
        return [self._TENSOR] * len(keys)

    def place(self, keys: Any, at: int) -> int:
        """Lay the storages out from byte `at`, in the order of their keys; how many bytes follow the last.

        Raises:
            CorruptFileError: they end behind the file, or the keys are not those that the object names.
        """
        file, start, nbytes = self._whole.file, self._whole.start, self._whole.nbytes
        if not isinstance(keys, list) or not all(map(_is_key, keys)) or len(set(map(str, keys))) != len(keys):
            raise CorruptFileError("the list of storages is not a list of different keys", offset=start + at)
        for key in keys:
            if key not in self._named:
                raise CorruptFileError("the file holds a storage that its object does not name", record=str(key))
            numel, size = self._named[key]
            if size >= 0 and at + 8 + size <= nbytes:
                self._places[str(key)] = Span(file, start + at + 8, size, _Count(numel, str(key)))
            at += 8 + size
        if at > nbytes:
            raise CorruptFileError(f"the storages end at byte {start + at} and the file at {start + nbytes}: the file is cut")
        return nbytes - at

    def find(self, key: str) -> Storage:
        if key not in self._places:
            raise CorruptFileError("the file does not hold this storage", record=key)
        return self._places[key]

    def find_all(self, keys: Iterable[str]) -> list[Storage] | None:
        found = list(map(self._places.get, keys))
        return None if None in found else found  # type: ignore[return-value]


class _Count(NamedTuple):
    """The proof of one storage: its own count of elements stands before it."""

    numel: int
    key: str

    def prove(self, pread: Callable[[int, int], bytes], start: int) -> None:
        if pread(start - 8, 8) != self.numel.to_bytes(8, "little"):
            raise CorruptFileError(f"the storage does not begin with its count of {self.numel} elements", record=self.key, offset=start - 8)

    def alone(self, start: int) -> _Count:
        return self


def _is_key(key: Any) -> bool:
    return type(key) in (str, int)  # text; numbers in some files of Python 2


# plain pickles


def _open_plain(file: FileRef) -> Checkpoint:
    objects = _PlainObjects(file)
    with file.open() as source:
        try:
            pages: Any = Pages(source.pread, file.size)  # a PayloadMachine's bytes
            tree, machine, findings = unpickle(pages, objects, file=file, format="pickle", machine=PayloadMachine, plain=objects.are_plain)
        except FormatError as error:
            if any(name.startswith("joblib.") for name in error.partial.dangers):
                told = UnsupportedError("this is a joblib file: its arrays lie between the opcodes, and are not read", path=file.url)
                told.partial = error.partial
                raise told from error
            raise
        behind = _behind(source.pread, file, machine) if machine.end < file.size else []
    return Checkpoint(tree, name=file.name, format="pickle", findings=(*behind, *findings), source=file)


def _behind(pread: Callable[[int, int], bytes], file: FileRef, machine: Machine) -> list[Finding]:
    """What stands behind the first pickle: told, and its dangers named, for a program may load one pickle after the other."""
    findings, count, start = list[Finding](), 0, machine.end
    at = start
    while at < file.size and count < _MORE_PICKLES:
        made, spent = list[Inert](), (machine.ran, machine.built)
        machine = PayloadMachine(Pages(pread, file.size), persistent=_same, construct=kept(made), start=at)
        machine.ran, machine.built = spent
        try:
            machine.run()
        except FormatError:
            break
        finally:
            findings += danger_findings(machine, made)
        count, at = count + 1, machine.end
    told = f"{count} further pickles and {file.size - at} bytes follow the object; they are not listed"
    return [*findings, Finding("bytes after the pickle", "warning", told, {"offset": start})]


class _PlainObjects(PayloadObjects):
    """What a plain pickle holds: arrays, and torch storages as whole files in byte strings."""

    def __init__(self, file: FileRef) -> None:
        super().__init__(file, self._absent)
        self._nested: dict[int, tuple[Any, Any]] = {}  # by where a payload lies, or by its id, which it keeps while it is held here
        self._read: set[int] = set()  # the calls, by their ids, that had one

    def _absent(self, key: str) -> Storage:
        raise CorruptFileError("a plain pickle does not hold the storage that it names", record=key)

    def are_plain(self, found: Global) -> bool:
        """Whether a name is plain here: torch's own call for a nested file, where each of them was read and its dangers are told."""
        calls = [node for node in self.strangers if node.dotted == NESTED] if found.dotted == NESTED else []
        return bool(calls) and all(id(node) in self._read for node in calls)

    def _file(self, node: Inert) -> Any:
        if len(node.args) != 1:
            return node
        payload = node.args[0]
        key = payload.start if isinstance(payload, (Placed, Left)) else id(payload)
        if key not in self._nested:
            charge()
            if len(self._nested) >= (most := most_nested(self.file)):
                raise UnsupportedError(f"of the torch files inside this pickle only {most:,} are read: save it with torch.save instead")
            try:
                ckpt = _open_nested(payload_span(self.file, payload))
                self._nested[key] = (payload, ckpt.tree)
                self._read.add(id(node))
                self.read.append(payload)
            except FormatError as error:
                self._nested[key], ckpt = (payload, node), error.partial
                message = f"a torch file inside the pickle is not read: {error.message}"
                self.tell("nested file", "danger", message, error.where)
            self.troubles += ckpt.findings if ckpt is not None else ()
        elif self._nested[key][1] is not node:
            self._read.add(id(node))
        return self._nested[key][1]

    rebuilds: ClassVar = {**PayloadObjects.rebuilds, NESTED: _file}


def _open_nested(span: Span | None) -> Checkpoint:
    if span is None:
        raise CorruptFileError("it is no byte string")
    head = span.read(0, _HEAD)
    return torch_zip.open_archive(inner_archive(span)) if head[:4] == b"PK\x03\x04" else _open_legacy(span, head)
