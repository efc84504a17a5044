"""Checkpoint: an immutable mapping from name to LazyTensor, with the tree it came from.

The path in the tree is a tensor's identity; the flat dotted name is for people. Nothing vanishes: where two paths
flatten alike, later ones get `#2`, `#3` and a finding. Ops build new Checkpoints by `rewrite`; a section of a training
checkpoint is a Checkpoint of its own, and `with_section` is the only way back into the tree.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from workbench import tree as trees
from workbench.errors import SelectionError, TensorNotFoundError
from workbench.files import FileRef
from workbench.names import Patterns, join_path, require_names, suggest, unique_name
from workbench.sections import Path, Section, find_sections, known_rank, section_rank, with_renamed_metadata
from workbench.tensors import LazyTensor
from workbench.tree import NOTHING, Inert, get, is_mapping, items_of, plain, walk, wrapped

_MAX_COLLISIONS = 100  # told one by one
Severity = Literal["info", "warning", "danger"]


@dataclass(frozen=True)
class Finding:
    """Something a reader should know: what, how bad, where, and the cure."""

    kind: str
    severity: Severity
    message: str
    where: dict[str, Any] = field(default_factory=dict)
    hint: str | None = None


@dataclass(frozen=True)
class Step:
    """One op in the history of a checkpoint, as a recipe can replay it."""

    op: str
    params: dict[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint(Mapping[str, LazyTensor]):
    """A checkpoint that has been listed and not read. Immutable; every op returns a new one.

    Attributes:
        tree: containers, plain values and LazyTensor leaves, as the file nests them.
        name, format: what it is called and which reader listed it.
        metadata: the container's own text metadata (safetensors ``__metadata__``).
        restored: alias -> kept name, for names that the file records but does not store.
        findings: what a reader should know, worst first.
        source: the file, or None for live objects and results of ops.
        within: for a section, its path in the whole.
        history: the ops that led here.
    """

    tree: Any
    name: str = "checkpoint"
    format: str = "memory"
    metadata: Mapping[str, str] = field(default_factory=dict)
    restored: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    source: FileRef | None = None
    within: Path = ()
    history: tuple[Step, ...] = ()
    _tensors: dict[str, LazyTensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        found = list(self.findings)
        stopped = collisions = 0
        counts: dict[str, int] = {}
        tensors = self._tensors
        paths: dict[str, Path] = {}
        entries = items_of(self.tree) if is_mapping(self.tree) else {}
        is_flat = set(map(type, entries)) == {str} and set(map(type, entries.values())) == {LazyTensor}
        if is_flat:  # as most files are: a walk would find the same, three times as slowly
            tensors.update(entries)
        else:
            object.__setattr__(self, "_paths", paths)
        for path, value in () if is_flat else walk(self.tree, values=False):
            if isinstance(value, LazyTensor):
                name = flat = join_path(path) if path else "tensor"
                if flat in tensors:
                    name = unique_name(flat, tensors, counts)
                    collisions += 1
                    if collisions <= _MAX_COLLISIONS:
                        where = {"tensor": name, "paths": [list(map(str, paths[flat])), list(map(str, path))]}
                        text = f"{flat!r} names two tensors; the later one is shown as {name!r}"
                        found.append(Finding("name collision", "warning", text, where))
                tensors[name] = value
                paths[name] = path
            elif value is NOTHING:
                stopped += 1
        if collisions > _MAX_COLLISIONS:
            text = f"{collisions - _MAX_COLLISIONS} more names are taken twice, and their later tensors are shown with a number"
            found.append(Finding("name collision", "warning", text))
        if stopped:
            found.append(
                Finding("tree cut", "warning", f"{stopped} parts of the tree nest too deep or repeat too often, and are not listed")
            )
        order = {"danger": 0, "warning": 1, "info": 2}
        object.__setattr__(self, "findings", tuple(sorted(_distinct(found), key=lambda f: order[f.severity])))

    def __getitem__(self, name: str) -> LazyTensor:
        try:
            return self._tensors[name]
        except KeyError:
            close = suggest(str(name), self._tensors)
            hint = "did you mean " + ", ".join(close) + "?" if close else None
            if any(other.startswith(f"{name}.") for other in self._tensors):
                hint = f"tensors lie below it: ckpt.section({name!r}) is a checkpoint of its own"
            raise TensorNotFoundError(f"no tensor is called {name!r}", hint=hint) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def items(self) -> ItemsView[str, LazyTensor]:
        return self._tensors.items()

    def values(self) -> ValuesView[LazyTensor]:
        return self._tensors.values()

    # what is in it

    @cached_property
    def _paths(self) -> dict[str, Path]:
        """Of a flat mapping; of any other, they are found with the tensors."""
        return dict(zip(self._tensors, zip(self._tensors, strict=True), strict=True))

    @property
    def paths(self) -> Mapping[str, Path]:
        """Where each name lies in the tree."""
        return self._paths

    @cached_property
    def extras(self) -> Mapping[str, Any]:
        """Every value that is no tensor, by dotted path; objects are shown by name, never built. Made when first asked for."""
        out: dict[str, Any] = {}
        parent, prefix = (), ""
        for path, value in walk(self.tree):
            if value is not NOTHING and not isinstance(value, LazyTensor) and "_metadata" not in path:
                if path[:-1] != parent:
                    parent, prefix = path[:-1], f"{join_path(path[:-1])}." if path[:-1] else ""
                out[prefix + join_path(path[-1:])] = plain(value)
        return out

    @property
    def aliases(self) -> dict[str, str]:
        """name -> earlier name of the very same values (tied weights)."""
        kept: dict[Any, str] = {}
        ties = {
            name: first
            for name, tensor in self.items()
            if (first := kept.setdefault((tensor.source, tensor.spec), name)) != name and tensor.numel
        }
        return {**ties, **self.restored}

    @property
    def nbytes(self) -> int:
        """Logical bytes of all tensors, tied ones once."""
        return sum({(t.source, t.spec): t.nbytes for t in self.values()}.values())

    @property
    def dangers(self) -> tuple[str, ...]:
        """Dotted names that the file would import or call and that are not plain data."""
        return tuple(dict.fromkeys(f.where["global"] for f in self.findings if f.severity == "danger" and "global" in f.where))

    # sections

    def sections(self) -> tuple[Section, ...]:
        """The state dicts found in the tree, best candidate for `weights` first."""
        return self._sections

    @cached_property
    def _sections(self) -> tuple[Section, ...]:
        below: dict[Path, list[LazyTensor]] = {}
        if set(map(len, self._paths.values())) == {1}:
            below = dict(zip(self._paths.values(), ([tensor] for tensor in self._tensors.values()), strict=True))
            below[()] = list(self._tensors.values())
        for name, path in () if below else self._paths.items():
            for depth in range(len(path) + 1):
                below.setdefault(path[:depth], []).append(self._tensors[name])
        return tuple(sorted(find_sections(self.tree, below), key=section_rank))

    def section(self, which: str | Path) -> Checkpoint:
        """One section as a Checkpoint of its own; `which` is its path or its dotted name.

        Raises:
            SelectionError: there is no such section; the hint lists those there are.
        """
        path = self._resolve(which)
        try:
            node = get(self.tree, path)
        except KeyError:
            names = ", ".join(s.name or "(root)" for s in self.sections())
            raise SelectionError(f"there is no section {join_path(path)!r}", hint=f"sections here: {names}") from None
        if not path:
            return self
        return replace(
            self,
            tree=node,
            name=f"{self.name} › {join_path(path)}",
            within=(*self.within, *path),
            restored={},
            findings=_kept(self.findings),
        )

    @property
    def modules(self) -> tuple[tuple[str, str], ...]:
        """(dotted name, class) of every module of a model that was pickled whole; nothing of it is imported."""
        return tuple((join_path(path), cls) for path, cls in trees.modules(self.tree))

    @property
    def weights_section(self) -> Section:
        """The section a model would load, with the reason for the choice."""
        found = self.sections()
        if not found or found[0].kind not in ("weights", "ema"):
            return Section((), "", "weights", len(self), self.nbytes, "the file holds no nested state dict, so all of it is taken")
        if self.rival_sections:
            others = ", ".join(s.name for s in self.rival_sections)
            return replace(found[0], reason=f"{found[0].reason}; largest of several ({others} are others: use section())")
        return found[0]

    @property
    def rival_sections(self) -> tuple[Section, ...]:
        """Sections that the names alone give as good a claim to be the weights as the one taken."""
        first, *others = self.sections() or (None,)
        if first is None or first.kind not in ("weights", "ema"):
            return ()
        return tuple(s for s in others if s.kind == first.kind and known_rank(s) == known_rank(first))

    @property
    def weights(self) -> Checkpoint:
        """The state dict a model would load; the checkpoint itself where it is one already.

        Of several with an equal claim (`rival_sections`) it is the largest, and a finding says so.
        """
        chosen = self.section(self.weights_section.path)
        kept = trees.without_asides(chosen.tree)
        told: tuple[Finding, ...] = ()
        if self.rival_sections:
            names = [self.weights_section.name, *(s.name for s in self.rival_sections)]
            text = f"the sections {', '.join(map(repr, names))} have an equal claim to be the weights, and this is {names[0]!r}"
            told = (Finding("several sections", "warning", text, hint=f"choose one: ckpt.section({names[0]!r})"),)
        elif kept is chosen.tree:
            return chosen
        return replace(chosen, tree=kept, findings=(*_kept(chosen.findings), *told))

    def with_section(self, path: str | Path, new: Checkpoint) -> Checkpoint:
        """The whole tree with the section at `path` replaced by `new`."""
        key = self._resolve(path)
        if not key:
            return new
        self.section(key)  # refuses a path that leads nowhere
        new_tree = trees.replace(self.tree, {key: lambda k, _: [(k, new.tree)]})
        return replace(
            self,
            tree=new_tree,
            source=None,
            restored={},
            findings=_kept(self.findings),
            history=(*self.history, *new.history[len(self.history) :]),
        )

    def _resolve(self, which: str | Path) -> Path:
        if isinstance(which, tuple):
            return which
        return next((s.path for s in self.sections() if s.name == which), tuple(which.split(".")) if which else ())

    # new checkpoints

    def rewrite(self, entries: Iterable[tuple[str, LazyTensor, str]], step: Step) -> Checkpoint:
        """A Checkpoint in which each old tensor became the (new name, tensor, old name) entries that name it.

        The containers, everything that is no tensor, and `_metadata` (its module names renamed along) are kept. A tensor
        that no entry names is dropped. A name that lies under its old parent stays there; any other moves to the root.
        """
        produced: dict[str, list[tuple[str, LazyTensor]]] = {}
        taken: dict[str, str] = {}
        for new, tensor, old in entries:
            if new in taken:
                raise SelectionError(f"two tensors would be called {new!r}: {taken[new]!r} and {old!r}", hint="rename one of them first")
            taken[new] = old
            produced.setdefault(old, []).append((new, tensor))
        left: tuple[Finding, ...] = ()
        new_tree: Any
        if () in self._paths.values():  # the whole file is one tensor
            results = [pair for pairs in produced.values() for pair in pairs]
            new_tree = results[0][1] if [new for new, _ in results] == list(self._paths) else dict(results)
        elif self._paths and all(_object_path(self.tree, path) == () for path in self._paths.values()):
            # the root itself is an object that stays inert: only its tensors can be carried on
            new_tree = {new: tensor for results in produced.values() for new, tensor in results}
            left = (Finding("object left behind", "warning", f"an op carried on the tensors of {plain(self.tree)} and nothing else of it"),)
        else:
            new_tree = self._rewritten_tree(produced)
        moved = {old: results[0][0] for old, results in produced.items()}
        return replace(
            self,
            tree=with_renamed_metadata(new_tree, moved),
            source=None,
            metadata={key: value for key, value in self.metadata.items() if key not in self.restored},  # aliases are recorded anew
            restored={},
            findings=(*_kept(self.findings), *left),
            history=(*self.history, step),
        )

    def _rewritten_tree(self, produced: dict[str, list[tuple[str, LazyTensor]]]) -> Any:
        hoisted: list[tuple[str, LazyTensor]] = []
        plan: dict[Path, Any] = {}
        inside: dict[Path, list[str]] = {}
        for old, path in self._paths.items():
            if (at := _object_path(self.tree, path)) is not None:
                inside.setdefault(at, []).append(old)
                continue
            if not produced.get(old) and not is_mapping(get(self.tree, path[:-1])):
                raise SelectionError(
                    f"{old!r} is an item of a list, and without it the others would change their names",
                    hint="take them out of the list first: wb.open(dict(ckpt))",
                )
            parent = join_path(path[:-1])
            pairs: list[tuple[Any, LazyTensor]] = []
            for new, tensor in produced.get(old, []):
                if new == old:
                    pairs.append((path[-1], tensor))
                elif not path[:-1]:
                    pairs.append((new, tensor))
                elif new.startswith(parent + ".") and not isinstance(path[-1], int):
                    pairs.append((new[len(parent) + 1 :], tensor))
                else:
                    hoisted.append((new, tensor))
            if not (len(pairs) == 1 and pairs[0] == (path[-1], self._tensors[old])):
                plan[path] = lambda _, node, pairs=pairs: [(key, _rewrapped(node, tensor)) for key, tensor in pairs]
        for at, names in inside.items():
            kept = [name for name in names if produced.get(name)]
            if any(produced[name] != [(name, self._tensors[name])] for name in kept) or len(kept) not in (0, len(names)):
                raise SelectionError(
                    f"{names[0]!r} lies inside {plain(get(self.tree, at))}, an object that stays inert and is not changed",
                    hint='choose other tensors or a section, or free them first: wb.save(ckpt, path, unsafe="drop")',
                )
            if not kept:
                plan[at] = lambda *_: []
        new_tree = trees.replace(self.tree, plan) if plan else self.tree
        if hoisted:
            if not is_mapping(new_tree):
                raise SelectionError("names can move only inside a mapping, and the root of this checkpoint is a list")
            merged = trees.unique_entries([*items_of(new_tree).items(), *hoisted])
            new_tree = merged if isinstance(new_tree, dict) else replace(new_tree, items=merged)
        return new_tree

    def select(self, names: Patterns) -> Checkpoint:
        """Only the tensors that `names` selects; everything that is no tensor is kept."""
        chosen = set(require_names(names, self))
        return self.rewrite(
            ((n, t, n) for n, t in self.items() if n in chosen), Step("select", {"names": names if isinstance(names, str) else list(names)})
        )

    def drop(self, names: Patterns) -> Checkpoint:
        """All tensors but those that `names` selects."""
        chosen = set(require_names(names, self))
        return self.rewrite(
            ((n, t, n) for n, t in self.items() if n not in chosen),
            Step("drop", {"names": names if isinstance(names, str) else list(names)}),
        )

    def __str__(self) -> str:
        from workbench.render.text import render_checkpoint

        return render_checkpoint(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from workbench.render.html import render_checkpoint

        return render_checkpoint(self)


def _distinct(findings: Iterable[Finding]) -> list[Finding]:
    return list({(f.kind, f.message, str(f.where)): f for f in findings}.values())


def _kept(findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """Findings that stay true of a part or of a result; those about names are found anew."""
    return tuple(f for f in findings if f.kind not in ("name collision", "tree cut"))


def _object_path(root: Any, path: Path) -> Path | None:
    """Where the way to `path` enters an object whose entries cannot be replaced, or None."""
    node = root
    for depth, key in enumerate(path):
        if not (is_mapping(node) or type(node) in (list, tuple)):
            return path[:depth]
        node = items_of(node)[key] if is_mapping(node) else node[key]
    return None


def _rewrapped(node: Any, tensor: LazyTensor) -> Any:
    """A new tensor in its old wrapper (Parameter…), which falls away where the new dtype could not carry it."""
    if wrapped(node) is node or not isinstance(node, Inert):
        return tensor
    if not tensor.dtype.is_floating and tensor.dtype.kind != "complex":
        return tensor
    return replace(node, args=tuple(_rewrapped(a, tensor) if isinstance(wrapped(a), LazyTensor) else a for a in node.args))
