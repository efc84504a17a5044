"""torch.export archives (.pt2): graphs as JSON, weights as raw bytes; listed, and never loaded as programs.

    <root>/archive_format, archive_version            'pt2' · '0'
    <root>/models/<model>.json                        the graph, its signature, opset and schema versions
    <root>/data/weights/<model>_weights_config.json   {"config": {name: {path_name, is_param, use_pickle, tensor_meta}}}
    <root>/data/weights/<path_name>                   one storage, raw bytes; a torch.save file where use_pickle is true
    <root>/data/constants/…                           likewise: <model>_constants_config.json, tensor_N, custom_obj_N, opaque_obj_N (a pickle)
    <root>/data/sample_inputs/<model>.pt              the inputs that the model was exported with, a torch.save file; may be empty
    <root>/data/aotinductor/<model>/…                 compiled native code
    <root>/extra/<name> · byteorder · .data/…
    tensor_meta: dtype (a number, see exported_graph), sizes and strides [{"as_int": n}], storage_offset {"as_int": n}, requires_grad, layout 7 (strided)

Until torch 2.7 the archive is a plain zip: serialized_exported_program.json, and the torch.save files serialized_state_dict.pt (.json in 2.1),
serialized_constants.pt and serialized_example_inputs.pt. torch 2.8 has the records above, but for data/weights/<model>.pt and data/constants/<model>.pt.

The checkpoint holds the state dict, and beside it `constants`, `sample_inputs` and `program`; under each model's name where there are several.
`.weights` is without these.

Source: torch 2.13 torch/export/pt2_archive (_package.py, constants.py), torch/_export/serde/schema.py; torch/export/__init__.py (older).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from workbench.checkpoint import Checkpoint, Finding
from workbench.dtypes import DTYPES
from workbench.errors import CorruptFileError, FormatError, UnsupportedError, located
from workbench.files import Span, read_span
from workbench.formats import exported_graph, torch_zip
from workbench.formats.exported_graph import DTYPES_BY_CODE, at
from workbench.formats.pickle_blobs import charge, counted_together, inner_archive
from workbench.formats.torch_archive import read_byteorder
from workbench.formats.torch_objects import TorchObjects, unpickle
from workbench.formats.zip_index import ZipIndex, read_record
from workbench.names import unique_pairs
from workbench.tensors import LazyTensor
from workbench.tree import NOTHING, Global, is_mapping, walk, with_asides

_MAX_JSON = 64 << 20  # of all JSON records of an archive, as are the values
_MAX_VALUES = 2_000_000
_MAX_WIDE = 16 << 20  # of a record whose characters may take four bytes each
_MAX_PICKLE = 64 << 20
_LEGACY = 5  # pickles of torch's legacy files, of which each is run
# where a model's parts lie: the stem of its weights and that of its constants, its sample inputs and its graph
_PLACES = ("data/weights/{}", "data/constants/{}", "data/sample_inputs/{}.pt", "models/{}.json")
_OLDER = ("serialized_state_dict", "serialized_constants", "serialized_example_inputs.pt", "serialized_exported_program.json")
_OBJECT = re.compile(r"(?:[^/]+/)?data/constants/(custom|opaque)_obj_")  # known by its name, whatever its entry says
_UNTYPED = Global("torch.storage", "UntypedStorage")


@dataclass
class _Job:
    """One reading of an archive: what was found, and what may still be read."""

    index: ZipIndex
    byteorder: str
    findings: list[Finding]
    json_left: int = _MAX_JSON
    values_left: int = _MAX_VALUES
    unpickled: dict[str, Any] = field(default_factory=dict)  # what a record holds, however often it is named


_HINT = "torch.export.load runs the pickles in it: use that only if you trust its author"


def open_archive(index: ZipIndex) -> Checkpoint:
    """List a torch.export archive.

    Raises:
        CorruptFileError: cut, damaged or contradictory. UnsupportedError: of a version that is not read.
    Cost: the directory, the JSON records and the nested pickles; no tensor data.
    """
    findings = [Finding("program", "info", "this is a program: its tensors are listed and it is not run", hint=_HINT)]
    places: dict[str, Any] = {"model": _OLDER}
    root, extra = "", "extra_files/"
    if _OLDER[-1] not in index.records:
        root = _root(index)
        extra = f"{root}extra/"
        held = [name for name in index.records if name.startswith(f"{root}models/")]
        names = [name[len(root) + 7 : -5] for name in held if name.endswith(".json")]
        for odd in [name for name in held if not name.endswith(".json")][:100]:
            what = f"torch takes {odd} for a model, whatever its ending, and it was not looked at as one"
            findings.append(Finding("model in doubt", "danger", what, {"record": odd}))
        places = {name: tuple(root + place.format(name) for place in _PLACES) for name in names}
    byteorder, found = read_byteorder(index, root)
    findings += found
    job = _Job(index, byteorder, findings)
    with index.file.kept_open(), counted_together():
        models = {name: _model(job, *records[:3]) for name, records in places.items()}
    for name, records in places.items():  # last, for the weights count more than what is told of the graph
        models[name] = with_asides(models[name], {"program": _program(job, records[3])})
    tree = next(iter(models.values())) if len(models) == 1 else models
    extras = {name[len(extra) :]: record.size for name, record in index.records.items() if name.startswith(extra)}
    tree = with_asides(tree, {"extra": extras})
    if native := [name for name in index.records if name.startswith(f"{root}data/aotinductor/")]:
        what = f"{len(native)} records belong to compiled native code: loading the file runs it, and nothing here can look inside"
        findings.append(Finding("native code", "danger", what, {"record": native[0]}))
    return Checkpoint(tree, name=index.file.name, format="torch-export", findings=tuple(findings), source=index.file)


def _root(index: ZipIndex) -> str:
    roots = [name[:-14] for name in index.records if f"/{name}".endswith("/archive_format") and name.count("/") < 2]
    if len(roots) != 1:
        raise CorruptFileError(f"the archive holds {len(roots)} records archive_format; it must hold one", path=index.file.url)
    for name, expected in (("archive_format", b"pt2"), ("archive_version", b"0")):
        found = read_record(index, roots[0] + name, 64)
        if found != expected:
            raise UnsupportedError(f"{name} is {found!r}; {expected!r} is read", path=index.file.url, record=roots[0] + name)
    return roots[0]


def _model(job: _Job, weights: str, constants: str, samples: str) -> Any:
    index = job.index
    state = _payloads(job, weights)
    if not is_mapping(state):
        raise CorruptFileError("the weights are no mapping of names to tensors", path=index.file.url, record=weights)
    held = _payloads(job, constants) if "/" in constants or f"{constants}.pt" in index.records else {}
    return with_asides(state, {"constants": held, "sample_inputs": _samples(job, samples)})


# weights and constants


def _payloads(job: _Job, stem: str) -> Any:
    """The tensors of one config in its order, each a view of a record; or what one torch.save file holds, where there is one instead."""
    for record in (f"{stem}.pt", *([] if "/" in stem else [f"{stem}.json"])):  # as torch 2.1 named it
        if record in job.index.records:
            return _torch_file(job, record)
    folder = stem.rpartition("/")[0]
    record = f"{stem}_{folder.rpartition('/')[2]}_config.json" if folder else f"{stem}.pt"
    spans = job.index.stored
    objects = TorchObjects(lambda record: spans.get(record) or job.index.storage(record), job.byteorder)
    out: dict[str, Any] = {}
    with located(path=job.index.file.url, record=record):
        config = _json(job, record).get("config")
        if not isinstance(config, dict):
            raise CorruptFileError("there must be an object called 'config'")
        for name, entry in config.items():
            try:
                path, pickled, meta = _told(entry, "path_name", "use_pickle", "tensor_meta")
                payload = f"{folder}/{path}"
                is_pickle = pickled or _OBJECT.match(payload)
                out[name] = _pickled(job, payload) if is_pickle else _tensor(job.index, objects, payload, spans.get(payload), meta)
            except Exception:  # entering a context for each of very many would take a tenth of the time
                with located(tensor=name):
                    raise
    job.findings += objects.troubles
    return out


def _tensor(index: ZipIndex, objects: TorchObjects, record: str, span: Span | None, meta: Any) -> LazyTensor:
    """A view of a record; `objects` proves that it lies within, and locks its values where it does not."""
    code, sizes, strides, offset, layout, grad = _told(meta, "dtype", "sizes", "strides", "storage_offset", "layout", "requires_grad")
    known = type(code) is int and code in DTYPES_BY_CODE and layout == 7
    if not (known and isinstance(sizes, list) and isinstance(strides, list)):
        raise CorruptFileError("tensor_meta must have a dtype of torch's numbers, sizes, strides and layout 7 (strided)")
    shape, steps = (tuple([at(n, "as_int") for n in numbers]) for numbers in (sizes, strides))
    nbytes = span.nbytes if span is not None else index.records[record].size if record in index.records else 0
    storage = objects.ref(("storage", _UNTYPED, record, "cpu", nbytes))
    return objects.tensor(storage, at(offset, "as_int"), shape, steps, DTYPES[DTYPES_BY_CODE[code]], grad)


# nested pickles


def _torch_file(job: _Job, record: str) -> Any:
    """The object in a torch.save file that is a record of the archive."""
    if record in job.unpickled:
        return job.unpickled[record]
    index, storage = job.index, job.index.storage(record)
    if not isinstance(storage, Span):
        raise UnsupportedError("a torch file inside the archive is packed, and is not read", record=record, path=index.file.url)
    charge(1)
    inner = torch_zip.open_archive(inner_archive(storage))
    job.findings += [replace(finding, where={**finding.where, "inside": record}) for finding in inner.findings]
    job.unpickled[record] = inner.tree
    return inner.tree


def _pickled(job: _Job, record: str) -> Any:
    """What torch.export.load unpickles, whatever it is: a tensor of a subclass, a sample, an object of the author's."""
    if record in job.unpickled:
        return job.unpickled[record]
    job.unpickled[record] = None
    index, findings, where = job.index, job.findings, {"record": record}
    try:
        storage = index.storage(record)
        if (known := _OBJECT.match(record)) and known[1] == "custom":
            archive = read_span(storage, 0, 4) == b"PK\3\4"  # or one that begins elsewhere, which only its C++ reader finds
            what = "the state of a C++ object is listed nowhere" + ("" if archive else ", and it is no archive as torch writes them")
            findings.append(Finding("object not read", "warning" if archive else "danger", what, where))
        elif isinstance(storage, Span) and storage.read(0, 2) == b"PK":
            del job.unpickled[record]
            return _torch_file(job, record)
        elif storage.nbytes:
            charge(1, 0 if isinstance(storage, Span) else storage.nbytes)
            data, end = read_record(index, record, _MAX_PICKLE), 0
            for _ in range(_LEGACY):
                if end and data[end : end + 1] != b"\x80":
                    break
                objects = TorchObjects(index.storage)
                _, machine, found = unpickle(data, objects, file=index.file, format="torch-export", record=record, start=end)
                findings += found
                end = machine.end
            findings.append(Finding("pickle not listed", "warning", "a pickle was looked through, and what it holds is not listed", where))
    except FormatError as error:
        what = f"torch.export.load would run this as a pickle, and it cannot be read: {error.message}"
        findings.append(Finding("unreadable pickle", "danger", what, where))
        findings += error.partial.findings if error.partial is not None else ()
    return None


def _samples(job: _Job, record: str) -> Any:
    if tree := _pickled(job, record) if record in job.index.records else None:
        what = "the inputs that the model was exported with are in the file: look at them before you pass it on"
        hint = "where its maker is you: workbench.export_model leaves them out"
        job.findings.append(Finding("sample inputs", "warning", what, {"record": record}, hint))
    held = record in job.index.records and job.index.records[record].size > 0
    keys = (key for path, leaf in walk(NOTHING if held and tree is None else tree) for key in (*path, NOTHING if leaf is NOTHING else ""))
    if (odd := next((key for key in keys if not exported_graph.is_quiet(key)), None)) is not None:
        why = "not all of them were looked at" if odd is NOTHING else f"this one cannot stand there: {str(odd)[:200]!r}"
        what = f"torch writes the keys of the sample inputs into source that it runs, and {why}"
        job.findings.append(Finding("code in the graph", "danger", what, {"record": record, "key": "sample inputs"}))
    return tree


# JSON


def _program(job: _Job, record: str) -> dict[str, Any]:
    """What people ask of a graph, and a finding for each text of it that torch would run."""
    texts = exported_graph.Texts()
    try:
        program = exported_graph.told(_json(job, record, texts.pairs))
    except UnsupportedError as error:
        what = f"torch.export.load makes Python of texts in the graph, and they were not looked at: {error.message}"
        job.findings.append(Finding("graph not read", "danger", what, {"record": record}))
        return {}
    job.findings += texts.findings(record)
    return program


def _json(job: _Job, record: str, pairs: Callable[[list[tuple[str, Any]]], Any] = unique_pairs) -> dict[str, Any]:
    path, what = job.index.file.url, f"the JSON of the archive holds more than {_MAX_VALUES} values"
    data = read_record(job.index, record, job.json_left) if job.values_left >= 0 else b""
    job.json_left -= len(data)
    job.values_left -= sum(map(data.count, (b",", b"[", b"{")))
    if job.values_left < 0 or not (len(data) <= _MAX_WIDE or data.isascii()):
        what = what if job.values_left < 0 else f"the record has {len(data)} bytes, and not all of them are ASCII as torch writes them"
        raise UnsupportedError(what, record=record, path=path)
    with located(path=path, record=record):
        value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs)
        if not isinstance(value, dict):
            raise CorruptFileError("the record must be a JSON object")
    return value


def _told(value: Any, *keys: str) -> list[Any]:
    """Several entries of an object; None for each that it has not."""
    return list(map(value.get, keys)) if isinstance(value, dict) else [None] * len(keys)
