"""What network a checkpoint holds, read off names and shapes with the evidence for each claim, and whether its config.json agrees.

Structure decides: numbered blocks that repeat, matrices whose sides meet, tensors outside every block. Names only tell roles (q, k, v;
expert; norm), so an architecture nobody has seen is read like a known one. Refuses to guess: shapes do not tell how many
heads share a projection, so heads are a fact only where some tensor has one entry per head. Only the index is read.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from workbench.checkpoint import Checkpoint
from workbench.errors import CorruptFileError, located
from workbench.files import Folder, Span, place
from workbench.opening import open as open_checkpoint
from workbench.report import Report
from workbench.tables import Column, Table, format_bytes, table

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Claim = tuple[str, Any, str]  # what, value, evidence
_MAX_NAME = 1000  # a longer name is no module's
_MAX_NUMBERS = 5  # of one name that may number blocks
_MAX_CONFIG = 16 << 20
_MAX_TABLES = 8  # of positions; and of attentions in a block


class Fact(NamedTuple):
    """One claim about `part` of the network (a stack of blocks, a module; empty for the whole), and the tensors or the formula that prove it."""

    part: str
    what: str
    value: Any
    evidence: str


class Comparison(NamedTuple):
    """One field of the configuration against the weights; `agrees` is None where they cannot tell."""

    field: str
    stated: Any
    found: Any
    agrees: bool | None
    why: str


@dataclass(frozen=True, repr=False)
class DescriptionReport(Report):
    """What the network is; false where its configuration contradicts its weights."""

    name: str
    elements: int
    facts: tuple[Fact, ...]
    comparisons: tuple[Comparison, ...]
    memory: tuple[Fact, ...]  # bytes

    @property
    def ok(self) -> bool:
        return not any(c.agrees is False for c in self.comparisons)

    def value(self, what: str, part: str | None = None) -> Any:
        """The value of the first fact called `what` (about `part`), or None where shapes do not tell."""
        return next((f.value for f in self.facts if f.what == what and part in (None, f.part)), None)

    @property
    def headline(self) -> str:
        told = ("looks like", "depth", "width", "channels", "heads", "vocabulary")
        parts = [f"{what} {_shown(v)}" for what in told if (v := self.value(what)) is not None]
        text = ", ".join([f"{self.elements:,} elements", format_bytes(self.memory[0].value), *parts])
        if wrong := next((c for c in self.comparisons if c.agrees is False), None):
            return text + f"; its configuration contradicts it: {wrong.field} is {_shown(wrong.stated)}, found {_shown(wrong.found)}"
        checked = sum(c.agrees is True for c in self.comparisons)
        return text + (f"; its configuration agrees ({checked} of {len(self.comparisons)} fields can be checked)" if checked else "")

    def tables(self) -> tuple[Table, ...]:
        verdicts = {True: "agrees", False: "contradicts", None: "cannot be checked"}
        facts = [(f.part or None, f.what, _shown(f.value), f.evidence) for f in self.facts]
        fields = [(c.field, _shown(c.stated), _shown(c.found), verdicts[c.agrees], c.why) for c in self.comparisons]
        columns = (Column("field", "name"), Column("stated"), Column("found"), Column("verdict"), Column("why"))
        return (
            table("what it is", (Column("part", "name"), Column("what"), Column("value"), Column("evidence")), facts),
            table("configuration", columns, fields, empty="no configuration lies beside it"),
            table("memory", (Column("use"), Column("bytes", "bytes"), Column("formula")), [f[1:] for f in self.memory]),
        )


def _shown(value: Any) -> str | None:
    return None if value is None else " · ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def describe(ckpt: Any, config: Any = None) -> DescriptionReport:
    """Infer what a network is from its names and shapes, compare that with its configuration, and add up the memory it needs.

    Args:
        ckpt: anything `wb.open` takes; of a training checkpoint, its weights.
        config: a dict ({} for none), or the path of a JSON file; where absent, the config.json beside the file, or GGUF's own metadata.
    Raises:
        CorruptFileError, MissingFileError: the configuration is no JSON object, or is not there.
    Cost: the index, and the configuration.
    """
    ckpt = open_checkpoint(ckpt)
    weights = ckpt.weights
    shapes = {name: tensor.shape for name, tensor in weights.items() if len(name) <= _MAX_NAME}
    stacks = find_stacks(shapes)
    inside = {name for stack in stacks for name in stack.names}
    outside = {name: shape for name, shape in shapes.items() if name not in inside}
    facts = [fact for stack in stacks for fact in _stack_facts(stack, {n for shape in outside.values() for n in shape})]
    facts += [*_edge_facts(shapes, outside, facts), *_other_facts(weights, shapes)]
    stated = _configuration(ckpt, config)
    scopes = {"": stated, **{key: value for key, value in stated.items() if isinstance(value, dict) and _SCOPE.search(str(key))}}
    comparisons = [c for scope, fields in scopes.items() for c in _compared(scope, fields, _about(scope, list(scopes), facts))]
    elements = sum(t.numel for t in {(t.source, t.spec): t for t in weights.values()}.values())
    return DescriptionReport(ckpt.name, elements, tuple(facts), tuple(comparisons), tuple(_memory(weights, facts)))


# blocks


class Stack(NamedTuple):
    """Numbered blocks of one structure: their label, how many there are in each group of them, each one's shapes, and all their names."""

    label: str
    depths: tuple[int, ...]
    blocks: list[Shapes]  # without the label: "self_attn.q_proj.weight"
    names: list[str]


_NUMBERED, _NUMBERS = re.compile(r"(.*?)([0-9]{1,6})"), re.compile(r"[0-9]+(?=\.|$)")
_Blocks = dict[int, dict[str, tuple[Shape, str]]]  # number -> rest of the name -> shape, whole name


def find_stacks(shapes: Mapping[str, Shape]) -> list[Stack]:
    """The outermost runs of blocks; a run whose blocks are made of runs (stages) gives those, one group each."""
    numbered: dict[str, _Blocks] = {}
    above: dict[str, list[str]] = {}
    below: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        parts, outer = re.split(r"[./]", name), list[str]()
        for i, part in enumerate(parts[:-1]):
            if (found := _NUMBERED.fullmatch(part)) and len(outer) < _MAX_NUMBERS:
                label = ".".join([*parts[:i], found[1] + "*"])
                numbered.setdefault(label, {}).setdefault(int(found[2]), {})[".".join(parts[i + 1 :])] = (shape, name)
                if label not in above:
                    above[label] = list(outer)
                    for known in outer:
                        below.setdefault(known, []).append(label)
                outer.append(label)
    runs = {label for label, blocks in numbered.items() if _repeats(label, blocks)}
    nearest = {label: next((outer for outer in reversed(above[label]) if outer in runs), "") for label in runs}
    groups: dict[str, list[_Blocks]] = {}
    pending = [label for label in numbered if nearest.get(label) == ""][::-1]
    while pending:
        label = pending.pop()
        inner = [n for n in below.get(label, []) if nearest.get(n) == label and "expert" not in n.lower()]
        if 2 * sum(len(b) for n in inner for b in numbered[n].values()) > sum(map(len, numbered[label].values())):
            kinds = {_NUMBERS.sub("*", n) for n in inner}  # a stage of one block is a run among runs
            pending += [n for n in below[label] if _NUMBERS.sub("*", n) in kinds][::-1]
        else:
            groups.setdefault(_NUMBERS.sub("*", label), []).append(numbered[label])
    stacks = []
    for label, members in groups.items():
        blocks = [run[number] for run in members for number in sorted(run)]
        names = [name for block in blocks for _, name in block.values()]
        stacks.append(Stack(label, tuple(map(len, members)), [{rest: shape for rest, (shape, _) in b.items()} for b in blocks], names))
    return stacks


def _repeats(label: str, blocks: _Blocks) -> bool:
    """Whether numbered groups are blocks of one structure: consecutive, of two matrices or more, and most of them like another."""
    if blocks.keys() == {1, 2} and not label.endswith(".*"):
        return False  # norm1 and norm2, attn1 and attn2: two roles in one block
    matrices = [sum(len(shape) > 1 for shape, _ in block.values()) for block in blocks.values()]
    if max(blocks) - min(blocks) + 1 != len(blocks) or 2 * sum(n > 1 for n in matrices) < len(blocks):
        return False
    if len(blocks) == 1:
        return 0 in blocks and matrices[0] > 3
    kinds = Counter(frozenset(re.sub(r"[0-9]+", "#", rest) for rest in block) for block in blocks.values())
    common = [kind for kind, _ in kinds.most_common(8)]
    alike = sum(n for kind, n in kinds.items() if n > 1 or any(c != kind and len(c & kind) >= 0.4 * len(c | kind) for c in common))
    return 2 * alike >= len(blocks)


# what a stack of blocks is

_TAIL = r"(?:_?(?:proj|projection|lin|linear|dense|layer|conv|weight))*(?:\.(?:weight|qweight|base_layer|linear|conv|0))*$"
_ROLE = re.compile(r"(?:^|[._])(?:w|to_?)?(q|k|v|query|key|value)s?" + _TAIL, re.IGNORECASE)
_FUSED = re.compile(r"(?:^|[._])(?:w?qkv|query_key_value|c_attn|(?<=att)n?\.in_proj|in_proj(?=_weight))" + _TAIL, re.IGNORECASE)
_CROSS = re.compile(r"cross|enc\w*_?dec|encoder_att|multihead_attn|attn2", re.IGNORECASE)
_QK_NORM = re.compile(r"(?:^|[._])(q|k)(?:uery|ey)?_?(?:layer)?_?norm\w*(?:\.weight|\.scale)?$", re.IGNORECASE)
_PER_HEAD = {  # a tensor that has one entry per head -> in which of its dimensions
    re.compile(r"(relative_attention_bias|rel_pos_bias\w*|relative_bias\w*)\.weight$|relative_position_bias_table$"): -1,
    re.compile(r"(pos_bias_u|r_w_bias|sinks|slopes|logit_scale|head_scale)$"): 0,
}
_NO_FEED_FORWARD = re.compile(r"att|qkv|lora|mixer|ssm|mamba", re.IGNORECASE)


def _sides(shape: Shape) -> Shape:
    """A matrix's two sides, empty for anything else; a convolution of kernel 1 is a matrix."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape if len(shape) == 2 else ()


def _other(shape: Shape, width: int) -> int | None:
    """The side of a matrix that is not `width`; None where neither is."""
    sides = _sides(shape)
    return None if width not in sides else sides[0] if sides[1] == width else sides[1]


def _stack_facts(stack: Stack, known: set[int]) -> list[Fact]:
    kinds: dict[Any, list[Shapes]] = {}
    for block in stack.blocks:
        kinds.setdefault(frozenset(block.items()), []).append(block)
    depth: Any = stack.depths if len(stack.depths) > 1 else stack.depths[0]
    counted = f"{len(stack.blocks)} numbered blocks" + (f" of {len(kinds)} kinds" if len(kinds) > 1 else ", all alike")
    found: dict[str, dict[Any, str]] = {"depth": {depth: counted}}
    kept = 0
    for alike in kinds.values():
        for what, value, evidence in _block_claims(alike[0], known):
            found.setdefault(what, {}).setdefault(value, evidence)
            kept += 2 * value * len(alike) if what == "key width" else 0
    if kept:
        found["kept per token"] = {kept: "elements of keys and values, over all blocks"}
    if kept and "heads" not in found:
        found["heads"] = {None: "not derivable from shapes: no tensor here has one entry per head, and only a configuration tells"}
    values = {what: next(iter(told)) if len(told) == 1 else tuple(told) for what, told in found.items()}
    return [Fact(stack.label, what, value, next(iter(found[what].values()))) for what, value in values.items()]


def _block_claims(block: Shapes, known: set[int]) -> Iterator[Claim]:
    dense = {rest: shape for rest, shape in block.items() if "expert" not in rest.lower()}
    attentions = {parent: held for parent, held in _attentions(dense).items() if not _CROSS.search(parent)}
    kernels = [(rest, shape) for rest, shape in dense.items() if len(shape) > 3]
    if not attentions and any(math.prod(shape[2:]) > 1 for _, shape in kernels):
        yield "channels", kernels[-1][1][0], "{} {}, the last convolution of a block".format(*kernels[-1])
        return
    sides = Counter(n for shape in dense.values() for n in set(shape if len(shape) < 3 else shape[:2]) if n > 1)
    # the side that most tensors of a block share, before all one that tensors outside the blocks share too
    width = max(sides, key=lambda n: (n in known and sides[n] > 1, sides[n], n), default=0)
    yield "width", width, f"a side of {sides[width]} of {len(dense)} tensors of a block"
    for parent, held in attentions.items():
        yield from _attention_claims(dense, parent, held, width)
    if wide := _feed_forward((shape for rest, shape in dense.items() if not _NO_FEED_FORWARD.search(rest)), width):
        yield "feed-forward width", wide[0], f"matrices between {width} and {wide[0]}"
        yield "feed-forward", "gated" if wide[1] else "plain", f"{wide[2]} matrices between {width} and {wide[0]}"
    yield from _expert_claims({rest: shape for rest, shape in block.items() if rest not in dense}, dense, width)
    for rest, shape in dense.items():
        if rest.endswith(("A_log", "ssm_a")) and shape:
            yield ("state size", shape[1], f"{rest} {shape}") if _sides(shape) else ("state-space heads", shape[0], f"{rest} {shape}")


def _attentions(block: Shapes) -> dict[str, dict[str, tuple[str, Shape]]]:
    """parent -> role (q, k and v, or f for all in one) -> (name, shape) of each attention in a block."""
    roles: dict[str, dict[str, tuple[str, Shape]]] = {}
    for rest, shape in block.items():
        module = rest.removesuffix(".weight").rpartition(".")[0]
        if len(shape) > 1 and f"{module}.A_log" not in block and (found := _FUSED.search(rest) or _ROLE.search(rest)):
            role = found[1][0].lower() if found.re is _ROLE else "f"
            roles.setdefault(rest[: found.start()], {}).setdefault(role, (rest, shape))
    whole = ((parent, held) for parent, held in roles.items() if "f" in held or held.keys() >= set("qkv"))
    return dict(itertools.islice(whole, _MAX_TABLES))


def _attention_claims(block: Shapes, parent: str, held: Mapping[str, tuple[str, Shape]], width: int) -> Iterator[Claim]:
    (rest, shape), (key_rest, key_shape) = held.get("f") or held["q"], held.get("f") or held["k"]
    query, keys = _other(shape, width), _other(key_shape, width)
    outs = [n for r, s in block.items() if parent and r.startswith(parent) and (r, s) not in held.values() and (n := _other(s, width))]
    if "f" in held:  # the way out is as wide as the queries; keys and values share what is left
        whole, query = query or 0, outs[0] if outs else (query or 0) // 3
        keys = max(0, whole - query) // 2 if (whole - query) % 2 == 0 else None
    if not query or not keys:
        return
    yield "key width", keys, f"{key_rest} {key_shape}"
    if outs and query not in outs:
        return  # the projection carries more than queries (a gate), or values are of another width
    yield "query width", query, f"{rest} {shape}"
    if query % keys == 0:
        yield "queries per key", query // keys, f"query width {query}, key width {keys}"
    for name, entries in block.items():
        for pattern, axis in _PER_HEAD.items():
            if entries and pattern.search(name) and max(entries) > 1:
                yield "heads", entries[axis], f"{name} {entries} has one entry per head"
    norms = {m[1].lower(): (r, s) for r, s in block.items() if r.startswith(parent) and (m := _QK_NORM.search(r)) and len(s) == 1}
    if norms.keys() == {"q", "k"} and norms["q"][1] == norms["k"][1]:
        name, (size,) = norms["q"]
        if 0 < size < query and query % size == keys % size == 0:
            yield "head width", size, f"{name} {size}"
            yield "heads", query // size, f"query width {query}, and {name} {size} is as wide as a head"


def _feed_forward(shapes: Iterable[Shape], width: int) -> tuple[int, bool, int] | None:
    """(inner width, gated, matrices) of the matrices that lead from `width` to another width and back; the widest where several do."""
    sides = [s for s in map(_sides, shapes) if s]
    rows, columns = (Counter(s[i] for s in sides if s[1 - i] == width) for i in (0, 1))
    squares = rows.pop(width, 0)
    del columns[width]
    best = (width, False, squares) if squares == 2 else None
    for inner in sorted(rows.keys() | columns.keys()):
        pair = sorted((rows[inner], columns[inner]))
        joined = max(min(rows[2 * inner], columns[inner]), min(columns[2 * inner], rows[inner]))  # gate and way up in one matrix
        if pair[0] or joined:
            best = (inner, bool(joined) or pair[1] == 2 * pair[0], joined + sum(pair))
    return best


def _expert_claims(experts: Shapes, dense: Shapes, width: int) -> Iterator[Claim]:
    numbers: dict[int, list[Shape]] = {}
    for rest, shape in experts.items():
        if found := re.search(r"experts?[._](?:\w*_)?([0-9]{1,6})\.", rest):
            numbers.setdefault(int(found[1]), []).append(shape)
    stacked = [shape for shape in experts.values() if len(shape) == 3]
    if count := len(numbers) or next((n for n, times in Counter(s[0] for s in stacked).items() if times > 1), 0):
        router = next((f"; {rest} {shape} chooses among them" for rest, shape in dense.items() if _other(shape, width) == count), "")
        yield "experts", count, f"{len(experts)} tensors of experts in a block{router}"
        if inner := _feed_forward(next(iter(numbers.values()), [s[1:] for s in stacked]), width):
            yield "expert width", inner[0], f"matrices between {width} and {inner[0]}, {'gated' if inner[1] else 'plain'}"


# what lies outside the blocks

_TOKENS = re.compile(r"emb|wte|word|tok|vocab|shared", re.IGNORECASE)
_NO_TOKENS = re.compile(r"pos|wpe|type|segment|patch|time|label|class|rel|query|speaker|norm|proj|mapping|mask|prompt|point", re.IGNORECASE)
_POSITIONS = re.compile(r"(?<!relative_)pos\w{0,20}emb|wpe|embed_pos|pos_enc", re.IGNORECASE)
_HEAD = re.compile(r"^(?:(?:module|model)\.)?(?:head|classifier|fc|score)(?:\.(?:fc|out_proj|dense|[0-9]))?$")


def _edge_facts(shapes: Shapes, outside: Shapes, found: list[Fact]) -> Iterator[Fact]:
    """Vocabulary, positions, patches, channels and outputs: the tensors before the first block and after the last."""

    def fact(name: str, what: str, value: Any, more: str = "") -> Fact:
        return Fact(name.removesuffix(".weight"), what, value, f"{name} {shapes[name]}{more}")

    widths = {n for f in found if f.what == "width" for n in (f.value if isinstance(f.value, tuple) else (f.value,))}
    tables = {n: s for n, s in outside.items() if len(s) == 2 and n.endswith("weight") and 1 not in s and not _NO_TOKENS.search(n)}
    pairs = Counter(tables.values())  # an embedding and the scores are of one shape, whatever they are called
    tokens = {n: s for n, s in tables.items() if _TOKENS.search(n) and f"{n[:-6]}bias" not in shapes}
    tokens = tokens or {n: s for n, s in tables.items() if pairs[s] == 2 and s[0] != s[1]}
    if name := max(tokens, key=lambda n: tokens[n][0], default=""):
        rows, wide = tokens[name]
        others = {r for r, w in tables.values() if w == wide and rows < 2 * r < 2 * rows} | {r for r, _ in tokens.values()}
        yield fact(name, "vocabulary", rows if others == {rows} else tuple(sorted(others, reverse=True)), ", the embedding with most rows")
    kernels = {n: s for n, s in shapes.items() if len(s) > 3 and n.endswith("weight") and math.prod(s[2:]) > 1}
    first = min(kernels, key=lambda n: (kernels[n][1] != 3, kernels[n][1] > 4, kernels[n][1] == 1), default="")  # depthwise ones take 1
    patch = shapes[first] if first in outside and shapes[first][0] in widths and shapes[first][-1] == shapes[first][-2] else ()
    if first:
        yield fact(first, "input channels", shapes[first][1], ", the first convolution")
    if patch:
        yield fact(first, "patch size", patch[-1], ", if its stride is as large")
    for name, shape in itertools.islice(((n, s) for n, s in outside.items() if _POSITIONS.search(n)), _MAX_TABLES):
        if math.prod(shape[-2:]) == math.prod(shape) and len(shape) > 1 and shape[-1] in (widths or shape):
            yield fact(name, "positions", shape[-2])
    matrices = [n for n, s in shapes.items() if len(s) > 1 and n.endswith("weight")]
    last = _sides(shapes[matrices[-1]]) if matrices and matrices[-1] in outside else ()
    if last and last[0] != last[1] and last not in tokens.values():
        yield fact(matrices[-1], "outputs", last[0], ", the last matrix")
    chain = [shapes[n] for n in matrices]
    if len(chain) > 1 and not widths and all(len(a) == len(b) == 2 and a[0] == b[1] for a, b in itertools.pairwise(chain)):
        yield fact(matrices[0], "widths", (chain[0][1], *(s[0] for s in chain)), ": each matrix is as wide as the one before is high")


_LOOKS = {  # names that are certain signs; nothing else depends on them
    "GPT-2": r"attn\.c_attn\.weight$ mlp\.c_fc\.weight$ ln_1\.weight$",
    "BERT": r"attention\.self\.query\.weight$ intermediate\.dense\.weight$ word_embeddings\.weight$",
    "Llama": r"self_attn\.q_proj\.weight$ mlp\.gate_proj input_layernorm\.weight$ embed_tokens\.weight$",
    "T5": r"SelfAttention\.q\.weight$ DenseReluDense\.",
    "ResNet": r"^(?:module\.)?layer1\.0\.conv1\.weight$ ^(?:module\.)?bn1\.running_mean$",
    "ViT": r"blocks\.0\.attn\.qkv\.weight$ patch_embed\.proj\.weight$",
}


def _other_facts(weights: Checkpoint, shapes: Shapes) -> Iterator[Fact]:
    """Recurrent layers by torch's names, pairs of low-rank matrices, well-known names, element type, tied tables."""
    ranks: Counter[int] = Counter()
    for name, shape in shapes.items():
        part, found, layer = name.rpartition("weight_hh")
        if found and layer in ("", "_l0") and len(shape) == 2 and shape[1]:  # [gates × hidden, hidden or projected]
            hidden = (_sides(shapes.get(f"{part}weight_hr{layer}", ())) or shape)[1] or 1
            kind = {4: "LSTM", 3: "GRU", 1: "RNN"}.get(shape[0] // hidden, "recurrent")
            count = next(i for i in itertools.count(1) if f"{part}weight_hh_l{i}" not in shapes)
            told = (("recurrent", "bidirectional " * (f"{name}_reverse" in shapes) + kind), ("depth", count), ("width", hidden))
            yield from (Fact(part.rstrip("."), what, value, f"{name} {shape}") for what, value in told)
        elif "lora_" in name and (low := re.search(r"lora_(A|down)(?=[._])", name)):  # A [rank, in], B [out, rank]
            other = shapes.get(name[: low.start(1)] + {"A": "B", "down": "up"}[low[1]] + name[low.end(1) :], ())
            ranks.update(shape[:1] if len(shape) > 1 and shape[:1] == other[1:2] else ())
    if ranks:
        yield Fact("", "LoRA rank", next(iter(ranks)) if len(ranks) == 1 else tuple(ranks), f"a side of {ranks.total()} pairs of matrices")
    for what, signs in _LOOKS.items():
        alike = [next((name for name in shapes if re.search(sign, name)), "") for sign in signs.split()]
        if all(alike):
            yield Fact("", "looks like", what, f"names that its relatives share: {', '.join(alike)}")
    sizes: Counter[str] = Counter()
    for tensor in weights.values():
        sizes[tensor.dtype.name] += tensor.nbytes if tensor.dtype.is_floating else 0
    for dtype, held in sizes.most_common(1 if +sizes else 0):
        yield Fact("", "dtype", dtype, f"{100 * held / sizes.total():.3g} % of the floating bytes")
    ties = (pair for pair in weights.aliases.items() if re.search(r"emb|wte|head|shared|coder\.weight", "{} {}".format(*pair)))
    yield from (Fact("", "tied", True, f"{alias} is {kept}, the very same values") for alias, kept in itertools.islice(ties, 1))


# configuration

_FIELDS = {
    "depth": "num_hidden_layers n_layer n_layers num_layers encoder_layers depth depths block_count decoder_layers num_decoder_layers",
    "width": "hidden_size n_embd d_model dim embed_dim embedding_length",
    "heads": "num_attention_heads n_head n_heads num_heads encoder_attention_heads attention.head_count",
    "key heads": "num_key_value_heads n_kv_heads attention.head_count_kv",
    "head width": "head_dim d_kv attention.key_length",
    "feed-forward width": "intermediate_size n_inner d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim feed_forward_length",
    "expert width": "moe_intermediate_size expert_feed_forward_length",
    "experts": "num_experts num_local_experts n_routed_experts expert_count",
    "vocabulary": "vocab_size n_vocab",
    "positions": "max_position_embeddings n_positions n_ctx max_target_positions context_length",
    "patch size": "patch_size",
    "input channels": "num_channels in_channels in_chans",
    "outputs": "num_labels num_classes id2label",
    "dtype": "torch_dtype dtype",
    "tied": "tie_word_embeddings",
}
_SCOPE = re.compile(r"_config$|^encoder$|^decoder$")
_SENSES = {"vision": r"vision|visual|image|video", "audio": r"audio|speech|sound", "backbone": "backbone", "text": "(?!)", "llm": "(?!)"}


def _configuration(ckpt: Checkpoint, config: Any) -> dict[str, Any]:
    """The configuration given, or the one that lies beside the file; empty where there is none."""
    if isinstance(config, Mapping):
        return dict(config)
    if config is None and ckpt.format == "gguf":  # which states its own, under the name of its architecture
        return {key.partition(".")[2]: int(value) for key, value in ckpt.metadata.items() if value.isdecimal()}
    text = ckpt.metadata.get("config.json", "{}")
    near = ckpt.source.folder if ckpt.source and not ckpt.source.address and "config.json" in ckpt.source.folder else None
    if found := place(config) if config is not None else near:
        file = found.file("config.json") if isinstance(found, Folder) else found
        text = Span(file, 0, min(file.size, _MAX_CONFIG)).read().decode("utf-8", "replace")
    with located(path="config.json" if config is None else os.fsdecode(config)):
        stated = json.loads(text)
        if not isinstance(stated, dict):
            raise CorruptFileError("a configuration is one JSON object", hint="config={} leaves it out")
        return stated


def _about(scope: str, scopes: list[str], facts: list[Fact]) -> list[Fact]:
    """The facts about what a configuration (a nested one: vision_config) speaks of, as far as the names of parts tell."""
    words = {**_SENSES, **{(word := key.removesuffix("_config")): _SENSES.get(word, re.escape(word)) for key in scopes if key}}

    def sense(part: str) -> str:
        found = {word: m.start() for word, pattern in words.items() if (m := re.search(pattern, part, re.IGNORECASE))}
        return min(found, key=lambda word: found[word], default="")

    own = "" if scope in ("", "text_config", "llm_config") else scope.removesuffix("_config")
    mine = [f for f in facts if sense(f.part) == own]
    return mine if scope or len(scopes) > 1 or any(f.what == "depth" for f in mine) else facts


def _compared(scope: str, config: dict[str, Any], facts: list[Fact]) -> Iterator[Comparison]:
    for what, key in ((what, key) for what, keys in _FIELDS.items() for key in keys.split()):
        stated = len(config[key]) if key == "id2label" and isinstance(config.get(key), dict) else config.get(key)
        if stated is not None:
            side = next((s for s in ("decoder", "encoder") if s in key.replace("max_target", "decoder")), "")
            near = [f for f in facts if side in f.part] or [f for f in facts if "coder" not in f.part]
            values = [f.value for f in near if f.what == what and f.value is not None]
            found = values[0] if len(set(values)) == 1 else tuple(values) or None
            yield Comparison(f"{scope}.{key}".lstrip("."), stated, found, *_verdict(what, stated, values, config, near))


def _verdict(what: str, stated: Any, values: list[Any], config: dict[str, Any], facts: list[Fact]) -> tuple[bool | None, str]:
    """Whether the weights agree, None where they cannot tell; and why. Only one value can contradict."""

    def number(name: str) -> int:
        return next((config[k] for k in _FIELDS[name].split() if type(config.get(k)) is int), 0)

    def one(name: str) -> int:
        told = {f.value for f in facts if f.what == name}
        return next((n for n in told if len(told) == 1 and type(n) is int), 0)

    flat = {n for value in values for n in (value if isinstance(value, tuple) else (value,))}
    if what in ("dtype", "tied"):
        stated = bool(stated) if what == "tied" else str(stated).removeprefix("torch.")
    elif type(stated) is not int or stated < 1:
        same = isinstance(stated, (list, tuple)) and tuple(stated) in values
        return (True, "as the blocks are grouped") if same else (None, "the field is no number")
    if what in ("heads", "key heads") and not flat:
        wide, each, shared = one("query width" if what == "heads" else "key width"), number("head width"), one("queries per key")
        if wide and each:
            return stated * each == wide, f"{stated} heads of {each} are {stated * each} wide, and the weights {wide}"
        if what == "key heads" and number("heads") and shared:
            return stated * shared == number("heads"), f"{number('heads')} heads, {shared} queries per key"
        if wide % stated:
            return False, f"{wide} cannot be shared by {stated} heads"
        return None, "shapes do not tell it" + f"; {stated} heads of {wide // stated} are possible" * bool(wide)
    if what == "feed-forward width" and not flat and not number("expert width"):
        flat = {one("expert width")} - {0}
    if what == "depth":
        more = config.get("num_nextn_predict_layers")  # blocks that predict further tokens are numbered after the others
        flat |= {sum(v) if isinstance(v, tuple) else v - more if type(more) is int else v for v in values}
        flat |= {len(v) for v in values if isinstance(v, tuple)}
    if stated in flat:
        return True, "seen in the tensors"
    if what == "positions" and stated + 2 in flat:
        return True, "the table has two rows more, which some models keep for padding"
    headless = not any(_HEAD.search(f.part) for f in facts if f.what == what)
    unsure = {"patch size": True, "depth": flat == {1}, "feed-forward width": {2 * n for n in flat} == {stated}, "outputs": headless}
    if len(flat) == 1 and not unsure.get(what):
        return False, "seen in the tensors"
    return None, "several parts of it differ" if len(flat) > 1 else "names and shapes do not tell it"


# memory

_RUNNING = ("running_mean", "running_var", "inv_freq")  # no gradient ever reaches these


def _memory(weights: Checkpoint, facts: list[Fact]) -> Iterator[Fact]:
    distinct = {(t.source, t.spec): (name, t) for name, t in weights.items()}.values()
    floating = [(name, t) for name, t in distinct if t.dtype.is_floating]
    total, count = sum(t.nbytes for _, t in distinct), sum(t.numel for _, t in floating)
    fixed = total - sum(t.nbytes for _, t in floating)
    trained = sum(t.numel for name, t in floating if not name.endswith(_RUNNING))
    yield Fact("", "to load", total, "every distinct tensor at its own type")
    for name, largest in sorted(distinct, key=lambda pair: -pair[1].nbytes)[:1]:
        yield Fact("", "largest tensor", largest.nbytes, f"{name} {largest.shape} {largest.dtype}")
    for dtype, each in (("float32", 4), ("bfloat16", 2)):
        yield Fact("", f"to load as {dtype}", each * count + fixed, f"{each} × {count:,} floating elements + {fixed:,} of other types")
    for how, formula in (
        ("float32", "4 weights + 4 gradients + 8 moments"),
        ("mixed precision", "2 weights + 2 gradients + 4 master weights + 8 moments"),
        ("bfloat16", "2 weights + 2 gradients + 4 moments"),
    ):
        each = sum(map(int, re.findall("[0-9]+", formula)))
        yield Fact("", f"to train with Adam, {how}", each * trained, f"({formula}) × {trained:,} elements; activations come on top")
    aside = re.compile("encoder|" + "|".join(_SENSES.values()), re.IGNORECASE)
    kept = sum(f.value for f in facts if f.what == "kept per token" and not aside.search(f.part))
    if kept and any(f.what == "vocabulary" for f in facts):
        formula = f"{kept:,} elements of keys and values × 2 bytes, if it generates; no activations"
        yield Fact("", "to run, per token kept", 2 * kept, formula)
