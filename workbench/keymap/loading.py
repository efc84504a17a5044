"""load_into and load_model: put a checkpoint's values into a model, tensor by tensor, and prove that they are there.

The module's own load_state_dict is asked first (it may accept names that a plain comparison rejects, and may fill tensors
itself); only when it is content, or strict is False, is a single value copied. A model with loading code of its own is
loaded through that code, for it may change values. Values are read on the host and placed one by one. What counts is read
from a new state_dict() afterwards, on the device where it ended up, against the file's bytes read a second time.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict, defaultdict
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from workbench import dtypes
from workbench.checkpoint import Checkpoint, Finding, Step
from workbench.errors import SelectionError, SpecMismatchError, UnsupportedError, WorkbenchError, located
from workbench.keymap.certificate import LoadCertificate, LoadedTensor, Unused, by_module, harmless
from workbench.keymap.inference import match
from workbench.keymap.maps import KeyMap, Pair
from workbench.keymap.naming import bare_name
from workbench.keymap.proof import agree, copy, difference, near, same_bytes
from workbench.keymap.values import made
from workbench.opening import open as open_checkpoint
from workbench.sections import rename_modules
from workbench.tensors import LazyTensor, Live, parts
from workbench.tree import Inert, is_mapping, items_of, live, plain, wrapped

if TYPE_CHECKING:
    import torch

_BLOCK_NBYTES = 1 << 20  # read and compared at once: what was just read is still in the core's cache


def load_model(
    model_class: Any, path: Any, device: Any = "auto", keymap: KeyMap | None = None, strict: bool = True, **config: Any
) -> tuple[Any, LoadCertificate]:
    """Build a model, load a checkpoint into it, prove it and place it.

    Args:
        model_class: the class, or any function that builds the model from `config`.
        path: anything `wb.open` takes.
        device, keymap, strict: as for `load_into`; "auto" is cuda, then mps, then cpu.
        config: the model's own arguments.
    Returns:
        ``model, certificate``: the model in eval mode and its proof, a pair so that neither is taken without seeing the other.
    Raises:
        As `load_into`.
    Cost: built on the host and moved tensor by tensor: the device's peak is one model.
    """
    import torch

    with torch.device("cpu"):
        model = model_class(**config)
    return model, load_into(model.eval() if isinstance(model, torch.nn.Module) else model, path, keymap, strict, device=device)


def load_into(
    model: torch.nn.Module, ckpt: Any, keymap: KeyMap | None = None, strict: bool = True, assign: bool = False, device: Any = None,
    dtype: Literal["model", "file"] | None = None,
) -> LoadCertificate:  # fmt: skip
    """Load a checkpoint into a model and prove every value.

    Args:
        model: any nn.Module. One on the meta device needs `assign` or `device`; what gets no value stays there, and is told.
        ckpt: anything `wb.open` takes; of a training checkpoint, its weights.
        keymap: from `wb.match`. Where absent, only the pairs that match finds certain are used.
        strict: refuse, before anything is copied, when the module would miss a tensor or a name of the file is left over that is not
            known to be harmless. False skips what is missing, left over or of another shape, and lists each.
        assign: put new tensors in place of the model's, as torch's `assign=True`; otherwise the model's own take the values.
        device: where the whole model goes ("auto", "cuda:1", a torch.device); None leaves it. One that does not exist falls back to
            one that does, and the certificate says so.
        dtype: "model" casts to the model's, "file" keeps the file's and needs `assign`. None is as torch: "file" where `assign`, else "model".
    Returns:
        LoadCertificate; falsy when a value in the model differs from the file.
    Raises:
        SpecMismatchError: strict, and names, shapes or kinds do not fit; the module's own code refuses; the file has different
            values for names that the model ties. The model is as it was.
        SelectionError: two sections of the file fit equally well, and none was chosen; or options that contradict each other.
    Cost: two reads of each tensor (one to copy, one to prove); memory is one block, or one tensor with `assign`. A model with loading
    code of its own (hooks, an override, state that is computed) is loaded through it, which holds the file's tensors in memory.
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        raise SelectionError(f"a {type(model).__name__} is no nn.Module to load into", hint="wb.match(…).apply(ckpt) gives tensors alone")
    if dtype not in (None, "model", "file") or (dtype == "file" and not assign):
        raise SelectionError(f'dtype={dtype!r} is not possible here: "model" casts, "file" keeps the file\'s and needs assign=True')
    home, told = (None, []) if device is None else _device(device)
    _require_room(_tensors(model), assign or home is not None)
    opened = open_checkpoint(ckpt)
    chosen = keymap if keymap is not None else _certain(match(opened, model))
    if keymap is None and chosen.rivals:
        sections, hint = ", ".join(map(repr, (chosen.section, *chosen.rivals))), "give one of them: wb.load_into(model, ckpt.section(…))"
        raise SelectionError(f"the sections {sections} fit the model equally well", hint=hint)
    if chosen.rivals:
        fit = ", ".join(map(repr, chosen.rivals))
        told = [*told, Finding("section", "warning", f"{chosen.section!r} was taken, as the map says, and {fit} fits as well")]
    job = _Job(model, chosen, opened, assign, dtype or ("file" if assign else "model"), home)
    missing, unexpected, refused = job.ask()
    unused = tuple(job.unused(name, name in unexpected) for name in (*job.spare, *job.others))
    absent = [name for name in missing if job.leader.get(name) not in job.values]  # a tied name is filled through its other
    left = [entry for entry in unused if not entry.fine and entry.name not in job.unfit]
    if refused or (strict and (absent or left or job.misfits)):
        job.restore()
        raise _refusal(job, absent, left, refused)
    job.fill()
    job.supply({name for name in job.own if job.own[name].is_meta}.difference(job.values, job.misfits, missing))
    if home is not None:  # what Module.to does, but a tensor left on the meta device stays there
        model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(home))  # type: ignore[no-untyped-call]
    try:
        rows, findings = job.prove()
    except WorkbenchError as error:  # the file changed, or cannot be read any more
        error.hint = "; ".join(filter(None, ["the model holds values that could not be proven: build it anew", error.hint]))
        raise
    if any(finding.severity == "danger" for finding in opened.findings):
        told = [*told, Finding("the file", "warning", "torch.load may run code of this file, which was not run here: wb.scan names it")]
    source, verdict = opened.source.url if opened.source is not None else opened.name, _verdict(missing, unexpected, job)
    return LoadCertificate(rows, unused, strict, chosen, verdict, _mode(model), (*told, *findings), type(model).__name__, source)


class _Job:
    """One load: what the model has, what the file gives for it, and where both lie."""

    def __init__(self, model: torch.nn.Module, keymap: KeyMap, opened: Checkpoint, assign: bool, policy: str, home: Any) -> None:
        self.model, self.keymap, self.policy, self.home = model, keymap, policy, home
        self.own, self.slots = _tensors(model), _slots(model)
        self.through = _loads_itself(model, self.own) or not self.own.keys() <= self.slots.keys()
        self.assign = assign or (self.through and any(value.is_meta for value in self.own.values()))
        self.buffer = bytearray(_BLOCK_NBYTES)
        self.part = _apart(keymap.part(opened), self.own)
        self.pairs: dict[str, Pair] = {}
        self.values: dict[str, LazyTensor] = {}
        self.misfits: dict[str, str] = {}  # by the model's name
        self.unfit: dict[str, str] = {}  # by the file's
        self.reshaped: list[str] = []  # of the misfits, those that torch refuses as well: it casts kinds, and takes [1] for []
        self._fit()
        groups: dict[Any, list[str]] = defaultdict(list)  # names of one memory
        for name, value in self.own.items():
            groups[_memory(value) if value.numel() else name].append(name)
        self.tied = {name: names for names in groups.values() for name in names}
        self.leader = {n: next((m for m in names if m in self.values), names[0]) for n, names in self.tied.items()}
        for name, leader in self.leader.items():
            if name in self.values and not agree(self.values[leader], self.values[name], self.own[name].dtype):
                a, b = (" + ".join(self.pairs[n].sources) for n in (leader, name))
                text = f"the model ties {leader!r} and {name!r}, the file has other values in {a!r} than in {b!r}, and nothing was loaded"
                raise SpecMismatchError(text, hint=f"choose one: wb.match(ckpt, model).edited(reject=({name!r},)); or untie the model")
        views: dict[Any, list[str]] = defaultdict(list)  # of one memory, in different ways
        for name, leader in self.leader.items():
            if name == leader and self.own[name].numel():
                views[_storage(self.own[name])].append(name)
        self.views = [names for names in views.values() if len(names) > 1]
        self.before = {name: value.clone() for name, value in self.own.items() if self.through or self.leader[name] not in self.values}
        self.kept = {name: getattr(*slot) for name, slot in self.slots.items()} if self.through else {}
        self.devices = {name: str(value.device) for name, value in self.own.items()}
        self.objects = _objects(self.part, model)
        taken = {(key,) for key, _ in self.objects.values()}
        used = {source for pair in self.pairs.values() for source in pair.sources}
        self.spare = [name for name in self.part if name not in used and self.part.paths[name][:1] not in taken]
        known = {(key,) for key, _ in self.objects.values()} | {path[:1] for path in self.part.paths.values()}
        entries, own = items_of(self.part.tree) if is_mapping(self.part.tree) else {}, set(map(bare_name, model.state_dict()))
        self.others = [str(k) for k in entries if (k,) not in known and bare_name(str(k)) not in own]  # no tensors, and nobody's
        self.extra = _extra_state(model) if self.through or self.objects else {}

    def _fit(self) -> None:
        """The values whose shapes and kinds agree, by target, and why the others do not."""
        wanted = {pair.target: pair for pair in self.keymap.pairs}
        reshaped = {u.target: (u.source, u.reason) for u in self.keymap.unmatched if u.source is not None}
        for name, value in self.own.items():
            pair, given = wanted.get(name), None
            sources = pair.sources if pair is not None else (name,)
            try:
                given = made(pair, self.part) if pair is not None else self.part.get(name)
                why = _misfit(given, value) if given is not None else None
            except SpecMismatchError as error:
                why = error.message
            if given is None and why is None and name in reshaped:
                near, why = reshaped[name]
                sources = (near or name,)
            if why is not None:
                self.misfits[name] = why
                if given is None or (given.shape != tuple(value.shape) and (value.ndim, len(given.shape)) != (0, 1)):
                    self.reshaped.append(name)
                elsewhere = name not in sources and pair is None
                self.unfit.update(dict.fromkeys(sources, f"it may be {name!r}, of another size" if elsewhere else why))
            elif given is not None and (pair is not None or name not in self.model.state_dict()):
                self.pairs[name], self.values[name] = pair or Pair.plain(name, name, "as it is", "certain", "the same name"), given

    def ask(self) -> tuple[list[str], list[str], str]:
        """(missing, unexpected, why it refused) by the module's own load_state_dict.

        Given the file's tensors where the model has loading code of its own. Otherwise what fits is copied onto itself, and of
        the file's spare tensors the module sees the names alone.
        """
        import torch

        state: OrderedDict[str, Any] = OrderedDict((name, self.own[name]) for name in self.values)
        for name in state if self.through else ():
            leader, old = self.leader[name], self.kept.get(name)
            state[name] = self.values[name].load() if leader == name or leader not in state else state[leader]
            if self.assign and leader == name:
                value = state[name].to(self.own[name].dtype) if self.policy == "model" else state[name]
                state[name] = torch.nn.Parameter(value, old.requires_grad) if isinstance(old, torch.nn.Parameter) else value
        named = [name for name in self.spare if name not in self.own and self.part[name].locked is None]
        state.update({name: self.part[name].load() if self.through else torch.empty(0, device="meta") for name in named})
        state.update(dict.fromkeys(self.others, torch.empty(0, device="meta")))
        state.update({name: value for name, (_, value) in self.objects.items()})
        if (metadata := _metadata(self.part, self.keymap)) is not None:
            state._metadata = metadata  # type: ignore[attr-defined]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*to a meta parameter")  # of what `supply` puts there
                result = self.model.load_state_dict(state, strict=False, **({"assign": True} if self.assign and self.through else {}))
        except Exception as error:  # the model's own code may raise anything
            return [], [], f"{type(error).__name__}: {error}".splitlines()[-1].strip()
        return [name for name in result.missing_keys if name not in self.misfits], list(result.unexpected_keys), ""

    def unused(self, name: str, unexpected: bool) -> Unused:
        """Why an entry of the file that fills nothing is or is not fine."""
        if name in self.others:
            took = "the module's own loading code took it"
            return Unused(name, not unexpected, "no tensor, and the module has no place for it" if unexpected else took)
        tensor, why = self.part[name], harmless(name, self.part[name].shape)
        if name in self.unfit:
            return Unused(name, False, self.unfit[name])
        if name in self.own:
            pair = self.pairs.get(name)
            return Unused(name, False, f"the map fills the model's from {' + '.join(pair.sources)!r}" if pair else "the map leaves it out")
        if not unexpected and tensor.locked is None:
            return Unused(name, True, "the module's own loading code took it")
        for slot in [slot for own, slot in self.slots.items() if why and bare_name(own) == bare_name(name)]:  # held, but never saved
            held = getattr(*slot).detach()
            same = not held.is_meta and tensor.shape == tuple(held.shape) and near(tensor.load(), held.cpu())
            return Unused(name, same, f"{why}; the model's own holds {'the same values' if same else 'other values, or none'}")
        return Unused(name, why is not None, why or "the module has no place for it")

    def restore(self) -> None:
        """Put back what the module's loading code may have touched, as far as it shows: tensors and extra state."""
        import torch

        for module, held in self.extra.items():
            with suppress(Exception):  # its own code; it took this state from itself a moment ago
                module.set_extra_state(held)

        for name, tensor in self.kept.items():
            setattr(*self.slots[name], tensor)
        with torch.no_grad():
            for name, value in _tensors(self.model).items():
                if name in self.before and not (value.is_quantized or value.is_meta or same_bytes(self.before[name], value)):
                    value.copy_(self.before[name])

    def fill(self) -> None:
        """Give every tensor its value, unless the module's own loading code did."""
        leading = [name for name in self.values if self.leader[name] == name and not self.through]
        for done, name in enumerate(leading):
            try:
                with located(tensor=self.pairs[name].source):
                    if self.assign or self.own[name].is_meta:
                        self._put(name)
                    else:
                        copy(self.values[name], self.own[name])
            except WorkbenchError as error:
                hints = [f"{done} of {len(leading)} tensors of the model were overwritten before this: build it anew"] * bool(done)
                error.hint = "; ".join([*hints, error.hint] if error.hint else hints) or None
                raise

    def supply(self, names: set[str]) -> None:
        """Put in place of tensors without values what torch's modules make themselves where a file lacks it, as BatchNorm's counter."""
        if (left := {name for name in names if self.leader[name] not in self.values}) and not self.through:
            state = OrderedDict((name, getattr(*slot)) for name, slot in self.slots.items() if name in self.own and name not in left)
            if (metadata := _metadata(self.part, self.keymap)) is not None:
                state._metadata = metadata  # type: ignore[attr-defined]
            self.model.load_state_dict(state, strict=False, assign=True)  # each takes itself

    def _put(self, name: str) -> None:
        """A new tensor with the file's values, made on the host, in place of the model's and of those tied to it."""
        import torch

        given, current, old = self.values[name], self.own[name], getattr(*self.slots[name])
        dtype = dtypes.to_torch(given.dtype) if self.policy == "file" else current.dtype
        fresh = torch.empty_like(current, dtype=dtype, device="cpu")
        copy(given, fresh)
        fresh = fresh.to(self.home or ("cpu" if current.is_meta else current.device))
        if isinstance(old, torch.nn.Parameter):
            fresh = torch.nn.Parameter(fresh, requires_grad=old.requires_grad)
        for tied in self.tied[name]:
            setattr(*self.slots[tied], fresh)  # one object, so that a tie stays a tie
            self.own[tied] = fresh.detach()  # the old one goes now: the peak is one model and one tensor

    def prove(self) -> tuple[tuple[LoadedTensor, ...], list[Finding]]:
        """A row for every tensor, by what a new state_dict() holds: only now does it show whether a computed one was loaded."""
        held, parameters = _tensors(self.model), {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        ties = [names for name, names in self.tied.items() if names[0] == name and len(names) > 1]
        torn = [names for names in ties if len({_memory(held[n]) for n in names if n in held}) > 1]
        unsaved = {name: getattr(*slot) for name, slot in self.slots.items() if name not in held}
        rows: dict[str, LoadedTensor] = {}
        for name, value in (*held.items(), *((n, v) for n, v in unsaved.items() if v.is_meta)):
            first, leader = self.tied.get(name, [name])[0], self.leader.get(name, name)
            pair, given = self.pairs.get(name) or self.pairs.get(leader), self.values.get(name) or self.values.get(leader)
            source, kind = " + ".join(pair.sources) if pair else None, "parameter" if name in parameters else "buffer"
            if first in rows and self.tied[name] not in torn:
                rows[name] = replace(rows[first], name=name, source=source, note=f"tied to {first}", tied_to=first)
                continue
            with located(tensor=source):
                state, note = self._state(name, value, given)
            shape, dtype, nbytes = tuple(value.shape), dtypes.from_torch(value.dtype).name, value.numel() * value.element_size()
            rows[name] = LoadedTensor(name, source, state, shape, dtype, nbytes, note, kind)
        rows.update({name: LoadedTensor(name, name, "set by the module", (), "object", 0, "", "object") for name in self.objects})
        casts = Counter((self.values[n].dtype.name, r.dtype) for n, r in rows.items() if n in self.values)
        moves = Counter((self.devices.get(name), str(value.device)) for name, value in held.items())
        apart = [names for names in self.views if len({_storage(held[n]) for n in names if n in held}) > 1]
        findings = [Finding("memory", "warning", f"{' and '.join(n)} were views of one memory and are apart now") for n in apart]
        findings += [Finding("tie lost", "danger", f"{' and '.join(names)} were tied and are apart now") for names in torn]
        findings += [Finding("dtype", "info", f"{n} tensors: {a} in the file, {b} in the model") for (a, b), n in casts.items() if a != b]
        findings += [Finding("device", "info", f"{n} tensors went from {a} to {b}") for (a, b), n in moves.items() if a not in (b, None)]
        if own := [name for name, value in unsaved.items() if not value.is_meta]:
            text = f"{len(own)} outside the state dict, as the constructor made them: {', '.join(own[:3])}" + ", …" * (len(own) > 3)
            findings.append(Finding("buffers", "info", text))
        return tuple(rows.values()), findings

    def _state(self, name: str, value: torch.Tensor, given: LazyTensor | None) -> tuple[str, str]:
        if value.is_meta:
            unsaved = "no part of the state dict: build the model off the meta device, or compute this buffer anew"
            return "empty", self.misfits.get(name, "") if name in self.own else unsaved
        if given is None:
            untouched = name in self.before and same_bytes(self.before[name], value)
            return "initial" if untouched else "set by the module", self.misfits.get(name) or harmless(name, tuple(value.shape)) or ""
        if wrong := difference(given, value, self.buffer):
            return "wrong", wrong + "; the model's own loading code ran, and whether it meant this cannot be proven" * self.through
        became = dtypes.from_torch(value.dtype)
        return "loaded", f"{given.dtype} became {became}" if became != given.dtype else ""


# the model


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the state dict, and parameters that a hook leaves out of it: torch loads those too."""
    import torch

    saved = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    others = [
        (n, p.detach()) for n, p in model.named_parameters(remove_duplicate=False) if n not in saved and not torch.nn.parameter.is_lazy(p)
    ]
    held = set(map(_memory, saved.values())) if others else set()
    return {**saved, **{name: value for name, value in others if _memory(value) not in held}}


def _slots(model: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, str]]:
    """name -> the module that holds it, and under which attribute; buffers that are not saved included."""
    return {
        f"{prefix}.{key}" if prefix else key: (module, key)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for key, value in (*module._parameters.items(), *module._buffers.items())
        if value is not None
    }


def _memory(value: torch.Tensor) -> Any:
    """Equal for tensors that view the same memory in the same way, on the meta device too."""
    import torch

    strided = value.layout is torch.strided
    return (_storage(value), value.storage_offset(), value.shape, value.stride()) if strided else id(value)


def _storage(value: torch.Tensor) -> int:
    import torch

    return value.untyped_storage()._cdata if value.layout is torch.strided else id(value)


def _loads_itself(model: torch.nn.Module, own: dict[str, torch.Tensor]) -> bool:
    """Whether the model has loading code that may change values: hooks, an override outside torch.nn, or state computed at each look."""
    import torch

    def is_own(module: Any) -> bool:
        override = "_load_from_state_dict" in vars(module) or not type(module)._load_from_state_dict.__module__.startswith(
            "torch.nn.modules."
        )
        return bool(override or module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks)

    again = _tensors(model)
    computed = any(_memory(value) != _memory(again[name]) or value.is_quantized for name, value in own.items())
    overridden = "load_state_dict" in vars(model) or type(model).load_state_dict is not torch.nn.Module.load_state_dict
    return computed or overridden or any(map(is_own, model.modules()))


def _require_room(own: dict[str, torch.Tensor], meta: bool) -> None:
    import torch

    for name, value in own.items():
        if torch.nn.parameter.is_lazy(value):
            hint = "run the model once on an example first"
            raise UnsupportedError("the model has a lazy parameter without a shape", tensor=name, hint=hint)
        if value.is_meta and not meta:
            hint = 'give assign=True, or a device for its memory: device="cpu"'
            raise UnsupportedError("the model is on the meta device and holds no values", tensor=name, hint=hint)
        if value.layout is torch.strided and any(
            stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)
        ):
            raise UnsupportedError("the model's tensor is expanded: its elements share memory and cannot each take a value", tensor=name)


def _mode(model: torch.nn.Module) -> str:
    """eval or train, and which layers give something else at each call or change as they are used."""
    from torch.nn.modules.batchnorm import _NormBase

    def is_live(module: Any) -> bool:
        rate = getattr(module, "p", getattr(module, "drop_prob", 0)) if "Drop" in type(module).__name__ else getattr(module, "dropout", 0)
        tracks = isinstance(module, _NormBase) and module.track_running_stats
        return module.training and (tracks or (isinstance(rate, (int, float)) and rate > 0))

    found = {name or "the model": type(module).__name__ for name, module in model.named_modules() if is_live(module)}
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(found.values()).items())
    return ("train" if model.training else "eval") + (f": {kinds} live until model.eval(), first {next(iter(found))}" if found else "")


def _device(asked: Any) -> tuple[torch.device, list[Finding]]:
    """The device asked for, or the best there is and a warning that says so."""
    import torch

    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        wanted = torch.device(best if asked == "auto" else asked)
    except (RuntimeError, TypeError) as error:
        raise SelectionError(f"{asked!r} is no device", hint='"auto", "cpu", "cuda", "cuda:1", "mps" or a torch.device') from error
    if wanted.type == "meta":
        raise SelectionError("the meta device holds no values", hint="leave device= away")
    room: Any = torch.backends.mps if wanted.type == "mps" else getattr(torch, wanted.type, None)
    count = int(wanted.type in ("cpu", "mps") or room.device_count()) if room is not None and room.is_available() else 0
    if (wanted.index or 0) < count:
        return wanted, []
    text = f"{wanted} was asked for and does not exist here ({count} of that type): {best} was taken"
    return torch.device(best), [Finding("device", "warning", text)]


# the file


def _extra_state(model: torch.nn.Module) -> dict[torch.nn.Module, Any]:
    """What modules hold beside tensors and would save, to be put back where a load is refused."""
    import torch

    own = [m for m in model.modules() if type(m).set_extra_state is not torch.nn.Module.set_extra_state]
    return {module: deepcopy(module.get_extra_state()) for module in own}


def _certain(keymap: KeyMap) -> KeyMap:
    return replace(keymap, pairs=tuple(pair for pair in keymap.pairs if pair.confidence == "certain"))


def _objects(part: Checkpoint, model: torch.nn.Module) -> dict[str, tuple[Any, Any]]:
    """What the model's state dict holds beside tensors (extra state, packed parameters): name -> the file's key of the same bare name, value.

    An entry that holds an object which stays inert is left out; the module then misses it, and says so.
    """
    entries = items_of(part.tree) if is_mapping(part.tree) else {}
    keys = {bare_name(key): key for key in entries if isinstance(key, str)}
    out = {}
    for name, value in model.state_dict().items():
        key = keys.get(bare_name(name))
        if key is not None and not hasattr(value, "data_ptr") and not isinstance(wrapped(entries[key]), LazyTensor):
            with suppress(UnsupportedError):
                out[name] = (key, live(entries[key]))
    return out


def _apart(part: Checkpoint, own: dict[str, torch.Tensor]) -> Checkpoint:
    """The source, with copies of what is read from memory of the model, directly or computed: copying must not change what is copied."""
    import torch

    held = {Live(value).storage_key for value in own.values() if value.layout is torch.strided}
    shared = {n for n, t in part.items() if any(isinstance(p.source, Live) and p.source.storage_key in held for p in parts(t))}
    if not shared:
        return part
    copies = [(n, replace(t, source=Live(t.load().clone())) if n in shared else t, n) for n, t in part.items()]
    return part.rewrite(copies, Step("copy", {}))


def _metadata(part: Checkpoint, keymap: KeyMap) -> Any:
    """The file's `_metadata` under the model's module names, which loading code asks for versions."""
    if isinstance(part.tree, Inert) and isinstance(part.tree.state, dict) and is_mapping(part.tree.state.get("_metadata")):
        told = {key: plain(value) for key, value in items_of(part.tree.state["_metadata"]).items()}
        return OrderedDict(rename_modules(told, keymap.mapping))
    return None


# what is said


def _misfit(given: LazyTensor, value: torch.Tensor) -> str | None:
    target = dtypes.from_torch(value.dtype)
    if given.locked is not None:
        return f"its bytes in the file are in doubt: {given.locked}"
    if isinstance(given.source, Live) and given.source.tensor.is_meta:
        return "its source is on the meta device and holds no values"
    if tuple(value.shape) != given.shape:
        return f"{list(given.shape)} in the file and {list(value.shape)} in the model"
    return f"{given.dtype} in the file and {target} in the model" if given.dtype.kind != target.kind and given.dtype != target else None


def _verdict(missing: list[str], unexpected: list[str], job: _Job) -> str:
    """What torch's strict load_state_dict makes of the file's entries under the names of the map."""
    words = {"misses": missing, "does not know": unexpected, "finds another shape in": job.reshaped}
    told = [f"{verb} {', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)}" for verb, names in words.items() if names]
    renamed = any(pair.source != name for name, pair in job.pairs.items())
    return "would refuse: it " + "; it ".join(told) if told else f"accepts the names {'that the map gives' if renamed else 'as they are'}"


def _refusal(job: _Job, missing: list[str], left: list[Unused], refused: str) -> SpecMismatchError:
    if refused:
        text = f"the module's own loading code refused, and no tensor was loaded: {refused}"
        return SpecMismatchError(text, hint="model.load_state_dict shows its whole message")
    lines = [f"{name}: {why}" for name, why in job.misfits.items()]
    for module, names in by_module(missing, set(job.own).difference(missing)).items():
        lines.append(f"{module or 'the whole model'}{f' ({len(names)} tensors)' * (len(names) > 1)}: not in the file")
    lines += [f"{entry.name}: in the file, {entry.reason}" for entry in left]
    words = {"of another shape or kind": job.misfits, "missing": missing, "left over": left}
    counts = ", ".join(f"{len(held)} {what}" for what, held in words.items() if held)
    shown = "; ".join(lines[:6]) + f"; and {len(lines) - 6} more" * (len(lines) > 6)
    hint = "strict=False loads the rest and lists what stays at initialisation"
    if any(tensor.dtype.name == "int8" and f"{name}_scale" in job.part for name, tensor in job.part.items()):
        hint = "the file is quantized: load wb.ops.dequantize(ckpt)"
    elif job.keymap.ambiguous or set(missing) - {u.target for u in job.keymap.unmatched}:
        hint = "wb.match(ckpt, model) shows likely and ambiguous pairs; give keymap= to accept them, or strict=False to load the rest"
    return SpecMismatchError(f"the file and the model do not fit ({counts}), and nothing was loaded: {shown}", hint=hint)
