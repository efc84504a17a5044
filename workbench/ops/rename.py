"""rename: keys, and the module names in `_metadata` that go with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from workbench.checkpoint import Checkpoint, Step
from workbench.errors import SelectionError
from workbench.names import WRAPPERS, Patterns, require_names
from workbench.ops.scope import on_section
from workbench.sections import Path


def rename(
    ckpt: Checkpoint, mapping: Mapping[str, str] | Callable[[str], str], *, section: str | Path | None = None, everything: bool = False
) -> Checkpoint:
    """Give tensors new names.

    Args:
        mapping: old name -> new name, where both may hold one ``*`` that stands for the same text
            (``{"module.*": "*"}``); whole names win over patterns, earlier patterns over later; or a function from old name to new name.
    Returns:
        The same tensors under new names, in the same order; `_metadata` is renamed along.
    Raises:
        SelectionError: two tensors would get one name, a name would be no text, or a pattern matches nothing.
    Cost: nothing is read.
    """

    def pairs(part: Checkpoint) -> dict[str, str]:
        return {name: mapping(name) for name in part} if callable(mapping) else _renamed(part, mapping)

    target = ckpt if everything else ckpt.section(ckpt.weights_section.path) if section is None else ckpt.section(section)
    moved = pairs(target)  # a function cannot be written into a recipe; what it did can
    if odd := [old for old, new in moved.items() if not isinstance(new, str)]:
        raise SelectionError(f"{odd[0]!r} would be called {moved[odd[0]]!r}, which is no name")
    step = Step(
        "rename",
        {
            "mapping": {old: new for old, new in moved.items() if old != new} if callable(mapping) else dict(mapping),
            "section": section,
            "everything": everything,
        },
    )
    return on_section(ckpt, section, everything, step, lambda part: [(moved[name], tensor, name) for name, tensor in part.items()])


def strip_prefix(ckpt: Checkpoint, prefix: str, *, section: str | Path | None = None, everything: bool = False) -> Checkpoint:
    """Remove `prefix` from every name that starts with it, as ``module.`` of DataParallel."""
    return rename(ckpt, {f"{prefix}*": "*"}, section=section, everything=everything)


def add_prefix(ckpt: Checkpoint, prefix: str, *, section: str | Path | None = None, everything: bool = False) -> Checkpoint:
    """Put `prefix` before every name."""
    return rename(ckpt, {"*": f"{prefix}*"}, section=section, everything=everything)


_KINDS = {
    "DataParallel": "module", "DDP": "module", "FSDP": "_fsdp_wrapped_module", "compile": "_orig_mod",
    "checkpoint": "_checkpoint_wrapped_module", "Fabric": "_forward_module",
}  # fmt: skip


def add_wrapper(
    ckpt: Checkpoint, kind: str, modules: Patterns | None = None, *, section: str | Path | None = None, everything: bool = False
) -> Checkpoint:
    """The names that a wrapped model has: of the whole, or of each of its `modules`.

    FSDP and activation checkpointing leave their names out of `state_dict()` themselves; such a model loads plain names.

    Args:
        kind: "DataParallel", "DDP", "FSDP", "compile", "checkpoint" (activation checkpointing), "Fabric", or the segment itself.
        modules: glob over module names, as "blocks.{0-11}"; the root where absent.
    Raises:
        SelectionError: no such kind, or no such module.
    Cost: nothing is read.
    """
    segment = _KINDS.get(kind, kind)
    if segment not in WRAPPERS:
        raise SelectionError(f"{kind!r} is no wrapper known here", hint=f"known: {', '.join([*_KINDS, *WRAPPERS])}")
    if modules is None:
        return add_prefix(ckpt, f"{segment}.", section=section, everything=everything)
    part = ckpt if everything else ckpt.section(ckpt.weights_section.path if section is None else section)
    found = {".".join(parts[:i]) for name in part if (parts := name.split(".")) for i in range(1, len(parts))}
    chosen = set(require_names(modules, sorted(found), what="module"))

    def wrapped(name: str) -> str:
        parts = name.split(".")
        return ".".join(f"{p}.{segment}" if ".".join(parts[: i + 1]) in chosen else p for i, p in enumerate(parts))

    return rename(ckpt, wrapped, section=section, everything=everything)


def strip_wrappers(ckpt: Checkpoint, *, section: str | Path | None = None, everything: bool = False) -> Checkpoint:
    """The plain model's names: without ``module.`` where every name begins so, and without the other wrappers' names wherever they stand.

    A `module` inside a name may be the model's own, and stays: ``wb.match(ckpt, model)`` tells. `n_averaged` of an AveragedModel stays.
    """

    def bare(name: str) -> str:
        return ".".join(part for part in name.split(".") if part == "module" or part not in WRAPPERS) or name

    part = ckpt if everything else ckpt.section(ckpt.weights_section.path if section is None else section)
    plain = {name: bare(name) for name in part}
    while (led := [name for name in plain.values() if name != "n_averaged"]) and all(name.startswith("module.") for name in led):
        plain = {name: new.removeprefix("module.") for name, new in plain.items()}
    return rename(ckpt, plain.__getitem__, section=section, everything=everything)


def _renamed(part: Checkpoint, mapping: Mapping[str, str]) -> dict[str, str]:
    patterns = [(_pattern(old), old, new) for old, new in mapping.items() if "*" in old]
    used: set[str] = set()
    out: dict[str, str] = {}
    for name in part:
        out[name] = mapping.get(name, name)
        if name in mapping:
            used.add(name)
            continue
        for pattern, old, new in patterns:
            if found := pattern.fullmatch(name):
                out[name] = new.replace("*", found[1], 1)
                used.add(old)
                break
    if unused := [old for old in mapping if old not in used]:
        raise SelectionError(f"no tensor matches {unused[0]!r}", hint=f"names here begin with {', '.join(list(part)[:3])}")
    return out


def _pattern(old: str) -> re.Pattern[str]:
    if old.count("*") > 1:
        raise SelectionError(f"{old!r} has more than one *; give a function for more than that")
    return re.compile(re.escape(old).replace(r"\*", "(.*)"), re.DOTALL)
