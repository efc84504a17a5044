"""Several matrices in one: queries, keys and values, gates and ups; put together, taken apart, their rows regrouped.

    blocks     [q; k; v]                   torch.nn.MultiheadAttention, timm, GPT-2, Phi-3, litgpt
    per head   [q0; k0; v0; q1; k1; v1 …]  GPT-NeoX, BLOOM, Megatron `query_key_value`, where keys have as many heads as queries
    per group  [q… q; k; v] for each head of the keys   InternLM2 `wqkv`, Megatron Core `linear_qkv`

Which of them a file holds is told by its word and those beside it (conventions.LAYOUTS), never by shapes; what is not known is ambiguous.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

from workbench.keymap.conventions import EQUAL, IN_OUT, LAYOUTS, UNKNOWN
from workbench.keymap.maps import Ambiguous, Pair, Part, Regroup
from workbench.keymap.targets import Target


class Item(NamedTuple):
    """What a source can give: a tensor, or a composite of several."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Part, ...]
    formula: str = ""
    params: Mapping[str, Any] = {}
    note: str = ""
    after: Regroup | None = None
    reason: str = ""  # of a composite that is no more than likely


class Fusion(NamedTuple):
    """`whole` is made of `parts`, in this order, as words in a role."""

    whole: str
    parts: tuple[str, ...]


FUSIONS = (
    Fusion(".attn.qkv.", (".attn.q.", ".attn.k.", ".attn.v.")),
    Fusion(".xattn.qkv.", (".xattn.q.", ".xattn.k.", ".xattn.v.")),
    Fusion(".attn.kv.", (".attn.k.", ".attn.v.")),
    Fusion(".mlp.gateup.", (".mlp.gate.", ".mlp.up.")),
    Fusion(".mlp.upgate.", (".mlp.up.", ".mlp.gate.")),
    Fusion(".mlp.experts.gateup.", (".mlp.experts.gate.", ".mlp.experts.up.")),
)


def fused_pairs(
    fusion: Fusion, held: Mapping[str, str], wanted: Mapping[str, str], items: Mapping[str, Item], target: Target
) -> Iterator[Pair | Ambiguous]:
    """What one block's free tensors (role -> source name) make of its open ones (role -> target name), by this fusion."""
    for param in ("weight.", "bias.", ""):
        whole, parts = fusion.whole + param, [part + param for part in fusion.parts]
        if whole in held and any(part in wanted for part in parts) and not any(part in held for part in parts):
            yield from _taken_apart(held[whole], [wanted.get(part, "") for part in parts], fusion, items, target)
        elif whole in wanted and held.keys() & set(parts) and whole not in held:
            if param == "bias." and any(part not in held and part.replace("bias.", "weight.") not in held for part in parts):
                continue  # not a module without a bias: the file has lost it
            yield from _put_together([held.get(part, "") for part in parts], wanted[whole], fusion, items, target)


def layout_of(name: str, names: Container[str], fewer: bool = False) -> str:
    """How a fused matrix of this name lays its rows, by its word and those beside it, and whether its keys are fewer than its queries."""
    module = ".".join(name.split(".")[:-3])
    for word, beside, layout, _ in LAYOUTS:
        if re.search(word, name) and (not beside or any(f"{module}.{other}.weight" in names for other in beside)):
            return "blocks" if fewer and layout == EQUAL else layout
    return "blocks"


def relaid(source: str, name: str, items: Mapping[str, Item], target: Target) -> tuple[Regroup | None, str]:
    """What a fused matrix needs where the target's lays its rows in another way, and why it cannot be said."""
    old, new, shape = layout_of(source, items), layout_of(name, target.shapes), items[source].shape
    if old == new and (old not in (UNKNOWN, EQUAL) or source.split(".")[-2:] == name.split(".")[-2:]):
        return None, ""
    heads = target.heads("q")
    if (old, new) != ("per head", "blocks") and (old, new) != ("blocks", "per head"):
        return None, f"the rows lie {old} in the file and {new} in the model"
    if not heads or shape[0] % (3 * heads) or target.heads("k") != heads or shape != target.shapes[name]:
        if heads and target.heads("k") == 1 and shape == target.shapes[name]:
            return None, ""  # multi-query: one head of keys and values, which both lay last
        return None, f"the rows lie {old} in the file and {new} in the model, and the number of heads is not known"
    depth, rest = shape[0] // (3 * heads), shape[1:]
    view = (heads, 3, depth, *rest) if old == "per head" else (3, heads, depth, *rest)
    return Regroup(view, (1, 0, 2, *range(3, 3 + len(rest))), shape), ""


def _taken_apart(source: str, names: list[str], fusion: Fusion, items: Mapping[str, Item], target: Target) -> Iterator[Pair | Ambiguous]:
    shape, known = items[source].shape, [target.shapes[name] for name in names if name]
    if items[source].formula or items[source].after or not shape or not all(known) or any(name.endswith(IN_OUT) for name in names):
        return
    total = max(shape) if len(shape) == 2 else shape[0]
    sizes = [target.shapes[name][0] if name else 0 for name in names]
    missing = [i for i, name in enumerate(names) if not name]
    if missing:  # keys without a bias have the rows of the values
        for i in missing:
            sizes[i] = (total - sum(sizes)) // len(missing)
    turn = None
    rows = shape[0]
    if len(shape) == 2 and (rows != sum(sizes) or source.endswith(IN_OUT)) and shape[1] == sum(sizes) and known[0][1:] == shape[:1]:
        turn, rows, shape = Regroup(shape, (1, 0), shape[::-1]), shape[1], shape[::-1]
    if rows != sum(sizes) or min(sizes) <= 0 or any(s[1:] != shape[1:] for s in known):
        return
    layout = layout_of(source, items, sizes[0] > sizes[1]) if len(fusion.parts) == 3 else "blocks"
    rule = f"{fusion.whole.strip('.')} taken apart"
    heads, groups = target.heads("q"), target.heads("k")
    if layout == "per head" and len(set(sizes)) > 1:
        layout = "blocks" if sizes[1] == sizes[2] and heads and sizes[0] == heads * sizes[1] else UNKNOWN
    matrix = items.get(f"{source.rpartition('.')[0]}.weight", items[source])
    layout = UNKNOWN if len(matrix.shape) == 3 else layout  # a convolution's: guided diffusion had two orders under one name
    if layout in ("per head", "per group") and (turn is not None or not heads or sizes[0] % heads):
        layout = UNKNOWN
    if layout == "per group" and (not groups or sizes[1] * heads != sizes[0] * groups):
        layout = UNKNOWN
    at = 0
    for number, (name, size) in enumerate(zip(names, sizes, strict=True)):
        if name and layout in (UNKNOWN, EQUAL):
            yield Ambiguous(
                name, (source,), f"{source!r} may hold its rows in blocks, by heads or by groups, and the heads or the order are not known"
            )
        elif name:
            regroup, after = turn, None
            rest, axes = shape[1:], tuple(range(3, 2 + len(shape)))
            if layout == "per head":
                view = (heads, 3, size // heads, *rest)
                regroup = Regroup(view, (1, 0, 2, *axes), shape)
            elif layout == "per group":
                each, depth = heads // groups, sizes[0] // heads
                regroup = Regroup((groups, each + 2, depth, *rest), (1, 0, 2, *axes), shape)
                after = Regroup((each, groups, depth, *rest), (1, 0, 2, *axes), (size, *rest)) if number == 0 else None
            part = Part(source, regroup, (at, at + size), items[source].shape)
            yield Pair(
                name, (part,), f"{rule}, {layout}", "likely", f"rows {at} to {at + size} of {source!r}; its word says how they lie", after
            )
        at += size


def _put_together(names: list[str], whole: str, fusion: Fusion, items: Mapping[str, Item], target: Target) -> Iterator[Pair | Ambiguous]:
    shape = target.shapes[whole]
    held = [items[name] for name in names if name]
    if any(item.formula or item.after or not item.shape for item in held) or not shape:
        return
    turns = {i.name: Regroup(i.shape, (1, 0), i.shape[::-1]) for i in held if len(i.shape) == 2 and i.name.endswith(IN_OUT)}
    if stacked := len(shape) == 3 and shape[1] != shape[2] and "experts" in fusion.whole and all(len(i.shape) == 3 for i in held):
        turns = {i.name: Regroup(i.shape, (1, 0, 2), (i.shape[1], i.shape[0] * i.shape[2])) for i in held}
    items = {i.name: i._replace(shape=turns[i.name].shape) if i.name in turns else i for i in held}
    held = list(items.values())
    turned = len(shape) == 2 and held[0].shape[1:] != shape[1:] and shape[0] == held[0].shape[-1]
    full = (shape[1], shape[0] * shape[2]) if stacked else shape[::-1] if turned else shape
    sizes = [items[name].shape[0] if name else 0 for name in names]
    empty = [i for i, name in enumerate(names) if not name]
    if empty and len(shape) == 1 and len(empty) == 1 and fusion.parts[empty[0]].endswith(".k."):
        sizes[empty[0]] = full[0] - sum(sizes)
    if sum(sizes) != full[0] or min(sizes) <= 0 or any(item.shape[1:] != full[1:] for item in held):
        return
    layout, heads = (layout_of(whole, target.shapes, sizes[0] > sizes[1]) if len(fusion.parts) == 3 else "blocks"), target.heads("q")
    if layout == "per head" and (len(set(sizes)) > 1 or not heads or turned):
        layout = UNKNOWN
    if layout not in ("blocks", "per head"):
        yield Ambiguous(whole, tuple(name for name in names if name), f"the order of the rows of {whole!r} is not known")
        return
    own = {name: turns[name].view if name in turns else item.shape for name, item in items.items()} | {"": ()}
    parts = tuple(Part(name, turns.get(name), (0, size), own[name]) for name, size in zip(names, sizes, strict=True))
    after = Regroup((shape[1], shape[0], shape[2]), (1, 0, 2), shape) if stacked else Regroup(full, (1, 0), shape) if turned else None
    if layout == "per head":
        after = Regroup((3, heads, sizes[0] // heads, *full[1:]), (1, 0, 2, *range(3, 2 + len(full))), full)
    zeros = "; keys without a bias get zeros" if empty else ""
    rule = f"{fusion.whole.strip('.')} put together, {layout}"
    yield Pair(whole, parts, rule, "likely", f"{', '.join(word.strip('.') for word in fusion.parts)}, in this order{zeros}", after)


def fused_from(role: str) -> set[str]:
    for word in ("q", "k", "v"):
        if f"attn.{word}." in role:
            return {role.replace(f"attn.{word}.", "attn.qkv."), role.replace(f"attn.{word}.", "attn.kv.")}
    if "attn.qkv." in role:
        return {role.replace("attn.qkv.", "attn.q.")}
    for whole in (".gateup.", ".upgate."):
        if whole in role:
            return {role.replace(whole, ".gate.")}
    if ".mlp.gate." in role or ".mlp.up." in role:
        return {role.replace(".mlp.gate.", whole).replace(".mlp.up.", whole) for whole in (".mlp.gateup.", ".mlp.upgate.")}
    return set()
