"""quantize and dequantize: weights in fewer bits, in layouts that compressed-tensors (and so transformers and vLLM) load.

    int-quantized    X.weight int8 [out, in] · X.weight_scale float32 · X.weight_zero_point int8, as the scale
    float-quantized  X.weight float8_e4m3fn [out, in] · X.weight_scale float32
    pack-quantized   X.weight_packed int32 [out, ceil(in / 8)] · X.weight_scale float32 · X.weight_shape int64 [2]
                     X.weight_zero_point int32 [ceil(out / 8), groups], eight rows in a word; per tensor int8 [1]

Scales are [1] for a tensor, [out, 1] for channels, [out, in / group] for groups; w ≈ (code - zero point) * scale. Tensors of other names and
of other dimensions are stored likewise: see `Scheme`. A scheme is one more row of workbench.ops.schemes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench import dtypes
from workbench.checkpoint import Checkpoint, Finding, Step
from workbench.dtypes import DTYPES
from workbench.errors import SelectionError
from workbench.names import Patterns, require_names
from workbench.ops.schemes import GRID, Per, Scheme, decode, encode, error, fit, pack, scales, unpack
from workbench.ops.scope import floating, on_section, rounded, weights_of, wide
from workbench.sections import Path
from workbench.tensors import Block, Derived, LazyTensor, TensorSpec

if TYPE_CHECKING:
    import torch

Told = str | Mapping[str, Any] | Scheme

_SPAN_NUMEL = 1 << 20  # values of one scale up to so many are read once; more of them again, so that memory stays bounded
_CODES = ("int8", "float8_e4m3fn", "float8_e5m2")


def quantize(
    ckpt: Checkpoint,
    scheme: Told = "int8",
    *,
    per: Per | None = None,
    group_size: int | None = None,
    symmetric: bool = True,
    search: bool = False,
    plan: Mapping[str, Told] | None = None,
    names: Patterns | None = None,
    exclude: Patterns | None = None,
    section: str | Path | None = None,
    everything: bool = False,
) -> Checkpoint:
    """Store floating weights in fewer bits, with their scales beside them.

    Args:
        scheme: "int8", "int4", "float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", a Scheme, or a mapping such as {"scheme": "int4", "group_size": 64}.
        per, group_size, symmetric, search: as in `Scheme`, with the name of a scheme.
        plan: name or glob -> scheme, for mixed precision; where several entries match a tensor, the last one counts. In place of all the above and `names`.
        names: glob over names; where absent, every floating tensor of two dimensions or more. A vector is taken by its own name alone.
        exclude: glob over names that are left.
    Returns:
        Each chosen tensor in its new layout (see the module), the others as they were. Tied tensors stay tied. A finding tells which chosen ones were left, and why.
    Raises:
        SelectionError: nothing is selected, a tensor given by its own name cannot be stored so, or a name is taken; when values are read, NaN or Inf.
    Cost: one read of each chosen tensor (two for packed zero points, three or four where a scale serves more than a million values); peak is one block.
    """
    if plan is not None and (scheme, per, group_size, symmetric, search, names) != ("int8", None, None, True, False, None):
        raise SelectionError("plan= tells the scheme of each tensor, and goes with exclude=, section= and everything= alone")
    if plan is None:
        given = {"per": per, "group_size": group_size, "symmetric": symmetric, "search": search}
        chosen = {key: value for key, value in given.items() if value is not None and value is not (key == "symmetric")}
        if chosen and not isinstance(scheme, str):
            raise SelectionError(f"{', '.join(chosen)} go with the name of a scheme; {scheme!r} tells its own")
        one = Scheme.of({"scheme": scheme, **chosen} if isinstance(scheme, str) else scheme)
        entries: list[tuple[Patterns | None, Scheme]] = [(names, one)]
        params: dict[str, Any] = {"scheme": one.to_dict(), "names": names}
    else:
        entries = [(pattern, Scheme.of(told)) for pattern, told in plan.items()]
        params = {"plan": {pattern: Scheme.of(told).to_dict() for pattern, told in plan.items()}}
    findings: list[Finding] = []

    def made(part: Checkpoint) -> Iterator[tuple[str, LazyTensor, str]]:
        taken, left = _assigned(part, entries, exclude)
        for (why, told), found in left.items():
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            findings.append(Finding("not quantized", "info", f"{told} leaves {found[0]!r}{more} as it was: {why}", {"tensors": found}))
        for name, first in part.aliases.items():
            if taken.get(name) != taken.get(first) and "int4" in {s.name for s in (taken.get(name), taken.get(first)) if s}:
                text = f"{first!r} and {name!r} were one tensor and are two now; a model that ties them takes one of the two"
                findings.append(Finding("tie ended", "warning", text, {"tensor": name}))
        done: dict[object, dict[str, LazyTensor]] = {}
        for name, tensor in part.items():
            if name not in taken:
                yield name, tensor, name
                continue
            key = (tensor.source, tensor.spec, taken[name])
            if key not in done:
                done[key] = _quantized(tensor, taken[name])
            for suffix, result in done[key].items():
                if suffix and name + suffix in part:
                    raise SelectionError(f"the name {name + suffix!r} is taken", hint="this tensor may be quantized already")
                yield name + suffix, result, name

    step = Step("quantize", {**params, "exclude": exclude, "section": section, "everything": everything})
    result = on_section(ckpt, section, everything, step, made)
    return replace(result, findings=(*result.findings, *findings)) if findings else result


def _assigned(
    part: Checkpoint, entries: list[tuple[Patterns | None, Scheme]], exclude: Patterns | None
) -> tuple[dict[str, Scheme], dict[tuple[str, Scheme], list[str]]]:
    """(name -> scheme of the tensors that are taken, (reason, scheme) -> names of those chosen and left)."""
    chosen: dict[str, tuple[Scheme, bool]] = {}
    for patterns, scheme in entries:
        exact = () if patterns is None else (patterns,) if isinstance(patterns, str) else patterns
        chosen |= {name: (scheme, name in exact) for name in floating(part, patterns)}
    gone = set(require_names(exclude, part)) if exclude is not None else set()
    held = {name for layout in _layouts(part)[0] for name in layout.parts}
    taken: dict[str, Scheme] = {}
    left: dict[tuple[str, Scheme], list[str]] = {}
    for name, (scheme, is_named) in chosen.items():
        tensor = part[name]
        if name in gone or scheme.name == "float32" or (name in held and not is_named):
            continue
        reason = scheme.refusal(tensor.shape, tensor.dtype)
        if name in held:
            reason = "it is part of a tensor that is quantized already"
        elif tensor.ndim < 2 and scheme.scaled and not is_named:
            reason = "a vector is taken by its own name alone"
        if reason is None:
            taken[name] = scheme
        elif is_named:
            raise SelectionError(f"{name!r} {list(tensor.shape)} cannot be stored as {scheme}: {reason}", hint="leave it out with exclude=")
        else:
            left.setdefault((reason, scheme), []).append(name)
    if not taken and (left or gone):
        why = "; ".join(f"{names[0]!r}: {reason}" for (reason, _), names in left.items()) or "exclude= leaves none"
        raise SelectionError(f"no tensor can be quantized so ({why})", hint="choose another scheme, or other tensors with names=")
    return taken, left


def _quantized(tensor: LazyTensor, scheme: Scheme) -> dict[str, LazyTensor]:
    """Suffix -> what is stored under the tensor's name with it."""
    layout = {suffix: TensorSpec(DTYPES[name], shape) for suffix, (name, shape) in scheme.layout(tensor.shape).items()}
    if not scheme.scaled:
        spec = layout[""]
        block = Block("workbench.ops.cast:cast_kernel", {"dtype": scheme.name, "overflow": "raise"}, (tensor,), (spec,))
        return {"": LazyTensor(spec, Derived(block, 0), tensor.requires_grad, tensor.locked)}
    span, row, is_packed = scheme.span(tensor.shape), (scheme.rows(tensor.shape) or (1,))[-1], "_packed" in layout
    columns = _columns(row, 8) if is_packed else 1
    params = {"scheme": scheme.to_dict(), "span": span, "columns": columns}
    suffix, (codes, scale) = next(iter(layout)), [layout["_packed" if is_packed else ""], layout["_scale"]]
    specs = (codes, scale) if scheme.symmetric else (codes, scale, TensorSpec(DTYPES["int8"], scale.shape))
    if span <= _SPAN_NUMEL:
        block = _by_rows("quantize_spans", params, (tensor,), specs, tensor.numel // math.lcm(span, columns))
        results = [LazyTensor(spec, Derived(block, slot), locked=tensor.locked) for slot, spec in enumerate(specs)]
    else:
        rowed = (tensor, tensor) if scheme.search else (tensor,)
        ranges = Block(f"{__name__}:span_scales", {**params, "shape": list(scale.shape)}, rowed, specs[1:], "scan")
        found = [LazyTensor(spec, Derived(ranges, slot), locked=tensor.locked) for slot, spec in enumerate(specs[1:])]
        block = _by_rows("quantize_pieces", params, (tensor,), specs[:1], tensor.numel // columns, tuple(found))
        results = [LazyTensor(codes, Derived(block, 0), locked=tensor.locked), *found]
    out = {suffix: results[0], "_scale": results[1]}
    for zeros in results[2:]:
        out["_zero_point"] = zeros if layout["_zero_point"].dtype == zeros.dtype else _scan("pack_zeros", zeros, layout["_zero_point"])
    if is_packed:
        told = Block(f"{__name__}:constant", {"values": list(tensor.shape)}, (), (layout["_shape"],), "scan")
        out["_shape"] = LazyTensor(layout["_shape"], Derived(told, 0))
    return out


def _columns(row: int, in_word: int) -> int:
    """Values that are packed by themselves: a word of them, or a row that ends within a word."""
    return row if row % in_word else in_word


def _by_rows(
    op: str,
    params: dict[str, Any],
    rowed: tuple[LazyTensor, ...],
    specs: tuple[TensorSpec, ...],
    rows: int,
    whole: tuple[LazyTensor, ...] = (),
) -> Block:
    """A block whose slots are those specs cut into as many rows."""
    cut = tuple(TensorSpec(spec.dtype, (rows, spec.numel // rows)) for spec in specs)
    return Block(f"{__name__}:{op}", params, rowed, cut, "rows", whole)


def _scan(op: str, tensor: LazyTensor, spec: TensorSpec, **params: Any) -> LazyTensor:
    block = Block(f"{__name__}:{op}", {"shape": list(tensor.shape), **params}, (tensor,), (spec,), "scan")
    return LazyTensor(spec, Derived(block, 0), locked=tensor.locked)


def dequantize(ckpt: Checkpoint, dtype: str = "float32", *, section: str | Path | None = None, everything: bool = False) -> Checkpoint:
    """Turn quantized tensors back into floating ones: what `quantize` made, and compressed-tensors' int-, float- and pack-quantized files.

    Returns:
        The names and shapes that `quantize` was given; scales, zero points and shapes are gone. A finding names what looks quantized in a way
        that is not known here.
    Raises:
        SelectionError: nothing here is quantized so; when values are read, a product that does not fit `dtype`.
    """
    wanted = dtypes.dtype(dtype)
    findings: list[Finding] = []

    def made(part: Checkpoint) -> Iterator[tuple[str, LazyTensor, str]]:
        layouts, doubts = _layouts(part)
        if not layouts:
            text = next((f"{name!r} cannot be dequantized: {why}" for name, why in doubts.items()), "no tensor here is quantized")
            raise SelectionError(text, hint="wb.load_into knows more layouts" if doubts else "it takes codes with a '_scale' beside them")
        findings.extend(
            Finding("left quantized", "warning", f"{name!r} stays as it is: {why}", {"tensor": name}) for name, why in doubts.items()
        )
        by_codes = {layout.codes: layout for layout in layouts}
        gone = {name for layout in layouts for name in layout.parts}
        done: dict[object, LazyTensor] = {}
        for name, tensor in part.items():
            if name in by_codes:
                layout = by_codes[name]
                key = (tensor.source, layout.shape, *(part[n].source for n in layout.parts[1:3]))
                if key not in done:
                    done[key] = _dequantized(part, layout, TensorSpec(wanted, layout.shape))
                yield layout.name, done[key], name
            elif name not in gone:
                yield name, tensor, name

    step = Step("dequantize", {"dtype": wanted.name, "section": section, "everything": everything})
    result = on_section(ckpt, section, everything, step, made)
    return replace(result, findings=(*result.findings, *findings)) if findings else result


class _Layout(NamedTuple):
    """One quantized tensor of a checkpoint, told from names, types and shapes."""

    name: str  # of the floating tensor
    parts: tuple[str, ...]  # codes, scales, zero points, shape: those that there are
    zeros: str | None
    shape: tuple[int, ...]
    span: int
    bits: int  # of a packed code; 0 where codes are elements
    row: int

    @property
    def codes(self) -> str:
        return self.parts[0]


def _layouts(part: Checkpoint) -> tuple[list[_Layout], dict[str, str]]:
    """(the quantized tensors that are certain, name of codes -> what is not known of them)."""
    sure: list[_Layout] = []
    doubts: dict[str, str] = {}
    for scale in part:
        name = scale.removesuffix("_scale")
        codes = f"{name}_packed" if f"{name}_packed" in part else name
        if name == scale or codes not in part or (codes == name and part[codes].dtype.name not in _CODES):
            continue
        found = _layout(part, name, codes)
        if isinstance(found, str):
            doubts[codes] = found
        else:
            sure.append(found)
    return sure, doubts


def _layout(part: Checkpoint, name: str, codes: str) -> _Layout | str:
    tensor, scale, told, zeros = part[codes], part[f"{name}_scale"], f"{name}_shape", f"{name}_zero_point"
    if strange := [other for other in (f"{name}_g_idx", f"{name}_global_scale") if other in part]:
        return f"{strange[0]!r} has a part in it"
    shape, row, bits = tensor.shape, tensor.shape[-1] if tensor.ndim else 1, 0
    if codes != name:
        listed = told in part and part[told].dtype.kind == "int" and part[told].numel <= 8 and part[told].locked is None
        shape = tuple(part[told].peek(8)) if listed else ()
        fits = [
            (rows[-1], width)
            for width in (2, 4, 8)
            for rows in ([shape, (shape[0], math.prod(shape[1:]))] if len(shape) > 2 else [shape])
            if len(shape) > 1 and tensor.shape == (*rows[:-1], -(-rows[-1] * width // 32))
        ]
        if tensor.dtype.name != "int32" or len(fits) != 1 or min(shape) < 1:
            return "its words and its shape do not fit together as 2, 4 or 8 bits in int32"
        row, bits = fits[0]
    span = _span(shape, scale.shape)
    if span is None or not scale.dtype.is_floating:
        return f"{scale.dtype} scales {list(scale.shape)} do not fit {list(shape)} in one way"
    parts = (codes, f"{name}_scale", *(n for n in (zeros, told) if n in part and (n == zeros or bits)))
    if zeros in part:
        *outer, rows, groups = (0, 0, *scale.shape)
        expected = (*outer[2:], -(-rows * bits // 32), groups) if _is_packed(part[zeros], bits) else scale.shape
        if part[zeros].shape != expected:
            return f"zero points {list(part[zeros].shape)} do not fit scales {list(scale.shape)}"
    return _Layout(name, parts, zeros if zeros in part else None, shape, span, bits, row)


def _is_packed(zeros: LazyTensor, bits: int) -> bool:
    return bool(bits) and zeros.dtype.name == "int32"


def _span(shape: tuple[int, ...], scales: tuple[int, ...]) -> int | None:
    """Consecutive values of `shape` that one of `scales` serves, or None where they may go otherwise."""
    numel, held = math.prod(shape), scales
    while held and held[-1] == 1:
        held = held[:-1]
    if not numel or not math.prod(scales) or (len(scales) == 1 < len(shape) and held and shape.count(held[0]) > 1):
        return None
    if held == shape[: len(held)]:
        return math.prod(shape[len(held) :])
    rows = shape if len(held) == len(shape) else (*shape[:1], math.prod(shape[1:]))
    return rows[-1] // held[-1] if len(held) == len(rows) and held[:-1] == rows[:-1] and rows[-1] % held[-1] == 0 else None


def _dequantized(part: Checkpoint, layout: _Layout, spec: TensorSpec) -> LazyTensor:
    tensors = [part[layout.codes], part[layout.parts[1]]]
    if layout.zeros is not None:
        zeros, scale = part[layout.zeros], tensors[1]
        if _is_packed(zeros, layout.bits):
            zeros = _scan("unpack_zeros", zeros, TensorSpec(DTYPES["int8"], scale.shape), rows=scale.shape[-2], bits=layout.bits)
        tensors.append(zeros)
    columns = _columns(layout.row, 32 // layout.bits) if layout.bits else 1
    params = {"span": layout.span, "columns": columns, "bits": layout.bits, "dtype": spec.dtype.name}
    if layout.span <= _SPAN_NUMEL:
        block = _by_rows("dequantize_spans", params, tuple(tensors), (spec,), spec.numel // math.lcm(layout.span, columns))
    else:
        block = _by_rows("dequantize_pieces", params, (tensors[0],), (spec,), spec.numel // columns, tuple(tensors[1:]))
    return LazyTensor(spec, Derived(block, 0), locked=next((t.locked for t in tensors if t.locked), None))


def quantization_config(ckpt: Checkpoint) -> dict[str, Any]:
    """What a transformers config.json says under "quantization_config" of the quantized weights here, for compressed-tensors.

    transformers 5.23 with compressed-tensors 0.20 loads every scheme so, but no int4 embedding (leave it out with exclude=), and int4 with
    zero points only by CompressedTensorsConfig(dequantize=True).

    Raises:
        SelectionError: nothing is quantized, or in a way that compressed-tensors does not load: it takes weights of linear and embedding layers.
    """
    part = weights_of(ckpt)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for layout in _layouts(part)[0]:
        codes, scale, stem = part[layout.codes], part[layout.parts[1]].shape, layout.name.removesuffix(".weight")
        kind, strategy = codes.dtype.name, "tensor" if len(scale) == 1 else "channel" if scale[-1] == 1 else "group"
        if kind == "float8_e5m2" or len(layout.shape) != 2 or stem == layout.name:
            told = f"{layout.name!r}, {kind} of {list(layout.shape)}"
            raise SelectionError(
                f"compressed-tensors has no way to load {told}",
                hint="it takes int8, int4 and float8_e4m3fn matrices called '….weight': leave others out with exclude=",
            )
        form = "pack-quantized" if layout.bits else "int-quantized" if kind == "int8" else "float-quantized"
        size = layout.span if strategy == "group" else None
        groups.setdefault((form, layout.bits or 8, strategy, size, layout.zeros is None), []).append(stem)
    if not groups:
        raise SelectionError("no tensor here is quantized", hint="wb.ops.quantize does it")
    forms = {key[0] for key in groups}
    config = {
        f"group_{i}": {
            "targets": names,
            "format": form,
            "weights": {
                "num_bits": bits, "type": "float" if form == "float-quantized" else "int", "strategy": strategy, "group_size": size,
                "symmetric": symmetric, "dynamic": False,
            },
        }
        for i, ((form, bits, strategy, size, symmetric), names) in enumerate(groups.items())
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "config_groups": config,
        "ignore": [],
    }


# kernels


def quantize_spans(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """Rows of whole spans -> their codes, scales and zero points."""
    scheme, rows = Scheme.of(params["scheme"]), len(blocks[0])
    values = wide(blocks[0]).reshape(-1, params["span"])
    scale, zero = fit(values, scheme)
    codes = _stored(encode(values, scale, zero, scheme), scheme, params)
    return [part.view(rows, -1) for part in (codes, scale, zero) if part is not None]


def span_scales(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[Any], at: int) -> list[torch.Tensor]:
    """One pass over a tensor of long spans -> their scales and zero points; a search takes a second one for the errors."""
    import torch

    scheme, span, count = Scheme.of(params["scheme"]), params["span"], math.prod(params["shape"])
    reach: list[torch.Tensor] = []
    for start, chunk in blocks[0]:
        values = wide(chunk)
        reach = reach or [torch.zeros(count, dtype=values.dtype), torch.zeros(count, dtype=values.dtype)]
        for index, low, high in _pieces(start, values.numel(), span):
            piece = values[low:high]
            reach[0][index] = torch.minimum(reach[0][index], piece.amin())
            reach[1][index] = torch.maximum(reach[1][index], piece.amax())
    tried = [scales(reach[0] * ratio, reach[1] * ratio, scheme) for ratio in (GRID if scheme.search else GRID[:1])]
    best = torch.zeros(count, dtype=torch.int64)
    if scheme.search:
        lost = torch.zeros(len(tried), count, dtype=torch.float64)
        for start, chunk in blocks[1]:
            for index, low, high in _pieces(start, chunk.numel(), span):
                for step, found in enumerate(tried):
                    lost[step, index] += error(wide(chunk[None, low:high]), *_one(found, index), scheme)[0]
        best = lost.argmin(0)
    parts = zip(*tried, strict=True)
    return [torch.stack(part).gather(0, best[None])[0].view(params["shape"]) for part in parts if part[0] is not None]


def quantize_pieces(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """Pieces of long spans -> their codes, by the scales and zero points of all."""
    import torch

    scheme, values = Scheme.of(params["scheme"]), wide(blocks[0]).reshape(-1)
    pieces = [
        encode(values[None, low:high], *_one(whole, index), scheme)[0]
        for index, low, high in _pieces(at * params["columns"], values.numel(), params["span"])
    ]
    return [_stored(torch.cat(pieces), scheme, params).view(len(blocks[0]), -1)]


def dequantize_spans(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """Rows of whole spans, with their scales and zero points -> floating values."""
    codes = _unstored(blocks[0], params).view(-1, params["span"])
    values = decode(codes, wide(blocks[1]).reshape(-1), blocks[2].reshape(-1) if len(blocks) > 2 else None)
    return [rounded(values, dtypes.to_torch(DTYPES[params["dtype"]])).view(len(blocks[0]), -1)]


def dequantize_pieces(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """Pieces of long spans -> floating values, by the scales and zero points of all."""
    import torch

    codes, parts = _unstored(blocks[0], params).reshape(-1), (wide(whole[0]), *whole[1:])
    cuts = _pieces(at * params["columns"], codes.numel(), params["span"])
    values = torch.cat([decode(codes[None, low:high], *_one(parts, index))[0] for index, low, high in cuts])
    return [rounded(values, dtypes.to_torch(DTYPES[params["dtype"]])).view(len(blocks[0]), -1)]


def pack_zeros(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[Any], at: int) -> list[torch.Tensor]:
    """int8 zero points […, rows, groups] -> words of eight rows […, ceil(rows / 8), groups]."""
    import torch

    *outer, rows, groups = params["shape"]
    zeros = torch.cat([chunk for _, chunk in blocks[0]]).view(*outer, rows, groups)
    words = torch.zeros(*outer, -(-rows // 8), groups, dtype=torch.int32)
    for row in range(min(rows, 8)):
        part = zeros[..., row::8, :]
        words[..., : part.shape[-2], :] |= (part.int() + 8) << (4 * row)
    return [words]


def unpack_zeros(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[Any], at: int) -> list[torch.Tensor]:
    """Words of zero points […, words, groups] -> int8 […, rows, groups]."""
    import torch

    words, bits, rows = torch.cat([chunk for _, chunk in blocks[0]]).view(params["shape"]), params["bits"], params["rows"]
    zeros = torch.empty(*words.shape[:-2], rows, words.shape[-1], dtype=torch.int8)
    for row in range(min(rows, 32 // bits)):
        part = zeros[..., row :: 32 // bits, :]
        part.copy_(((words[..., : part.shape[-2], :] >> (bits * row)) & ((1 << bits) - 1)) - (1 << (bits - 1)))
    return [zeros]


def constant(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[Any], at: int) -> list[torch.Tensor]:
    """Numbers that are known without reading anything."""
    import torch

    return [torch.tensor(params["values"])]


def _stored(codes: torch.Tensor, scheme: Scheme, params: dict[str, Any]) -> torch.Tensor:
    return pack(codes.view(-1, params["columns"])) if scheme.name == "int4" else codes


def _unstored(codes: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
    bits, columns = params["bits"], params["columns"]
    return unpack(codes.reshape(-1, -(-columns * bits // 32)), columns, bits) if bits else codes


def _one(parts: Sequence[torch.Tensor | None], index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scale and the zero point of one span."""
    scale, zero, *_ = (None if part is None else part.reshape(-1)[index : index + 1] for part in (*parts, None))
    assert scale is not None
    return scale, zero


def _pieces(start: int, count: int, span: int) -> Iterator[tuple[int, int, int]]:
    """Cut a flat range at the borders of spans: (index of the span, low, high), relative to the range."""
    low = 0
    while low < count:
        index = (start + low) // span
        high = min(count, (index + 1) * span - start)
        yield index, low, high
        low = high
