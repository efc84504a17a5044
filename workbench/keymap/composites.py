"""Tensors that stand for one plain tensor together.

`composites` finds groups (weight_g + weight_v, orig + mask, base + LoRA, codes + scales) by their published names and shapes, and says how
the plain tensor is computed from them (`values.FORMULAS`). `locked_raw` tells which tensors are codes and no numbers. What cannot be known
from the file carries a `doubt` and is never to be used unasked. How such names are spelt otherwise is spellings.py's.
Owns no search: which composite fills which target is inference.py's.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property
from typing import Any, Literal, NamedTuple

from workbench.adapter_config import lora_scale
from workbench.sections import names_average
from workbench.tensors import LazyTensor, Stored

Tensors = Mapping[str, LazyTensor]
Config = Mapping[str, Any]
Confidence = Literal["certain", "likely"]
Outside = Callable[[], Mapping[str, tuple[int, ...]]]


class Composite(NamedTuple):
    """A plain tensor that the source holds in parts.

    Attributes:
        name: the plain name, in the source's own naming.
        parts: source names, the formula's arguments in order. Without a formula: the one part is the tensor as it is.
        params: what the formula needs; `shape` and `dtype` (those of the plain tensor) among them.
        doubt: why it must not be used unasked, or "".
        settled_by: "layer kind" where a doubt falls once it is known whether the layer is transposed (`params["dim"]` is 1) or not (0).
        beside: tensors that belong to the group and hold no weights; unused, and rightly so.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[str, ...]
    formula: str
    params: dict[str, Any]
    confidence: Confidence
    rule: str
    reason: str
    doubt: str = ""
    settled_by: str = ""
    beside: tuple[str, ...] = ()


def _group(
    name: str, shape: tuple[int, ...], dtype: str, parts: tuple[str, ...], rule: str, formula: str = "", reason: str = "",
    confidence: Confidence = "certain", **params: Any,
) -> Composite:  # fmt: skip
    return Composite(name, shape, dtype, parts, formula, {"shape": list(shape), "dtype": dtype, **params}, confidence, rule, reason)


_FP8 = {"float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"}
_CODES = _FP8 | {"float4_e2m1fn_x2", "int8", "uint8", "int16", "uint16", "int32", "uint32"}
_SCALED = _FP8 | {"int8"}
_WIDE = {"float32", "float16", "bfloat16", "float64"}
MODIFIED = "a part beside a weight"
_ENDS = ("_g", "_orig", "qweight", "_packed", "blocks", "__nf4", "__fp4")  # one name of each group, besides codes and LoRA
_PARAMETRIZED = re.compile(r"(.*\.)?parametrizations\.([^.]+)\.(.+)")
_LORA = re.compile(r"(.*\.)?lora(?:_|\.|_linear_layer\.)(embedding_)?([AB]|down|up)(?:\.(?!weight$|bias$)([^.]+))?(?:\.(weight|bias))?")
_FACTORS = {"down": "A", "up": "B"}
_HARMLESS = re.compile(r".*bias|input_.*|(?:output|act|activation|[qkv])_scale|lora_.*|weight_format|g_idx|.*_(?:shape|g_idx)|running_\w+")
_SCALE_WORDS = ("weight_scale", "_scale_inv", "scale_weight", "scaled_fp8", "SCB", "comfy_quant")


def composites(sources: Tensors, config: Config | None = None) -> list[Composite]:
    """Every group of `sources` that makes one plain tensor.

    Args:
        config: what `config_beside` gives of the file: LoRA's scale, GPTQ's format, the size of blocks.
    Cost: names, shapes and dtypes; of LoRA's B, GPTQ's zeros and 4-bit states the first bytes (of a B that starts with zeros, all).
    """
    file = _File(sources, config)
    found: list[Composite | None]
    found = [_parametrized(plain, pieces, sources) for plain, pieces in families(sources).items()]
    found += [_adapted(module, adapters, file) for module, adapters in adapters_in(sources).items()]
    found += [
        _tuned(module + leaf, beside, file) for module, beside in tuners_in(beside_bases(sources)).items() for leaf in ("weight", "bias")
    ]
    for name, tensor in sources.items():
        if "weight_" in name or "_weight" in name:
            found.append(_modified(name, tensor, sources))
        if name.endswith(_ENDS) or tensor.dtype.name in _CODES:
            finders = (_scaled,) if tensor.dtype.name in _SCALED else _QUANTIZED
            found.append(next((made for finder in finders if (made := finder(name, tensor, file))), None))
    return [made for made in found if made is not None]


def locked_raw(sources: Tensors, found: Iterable[Composite] = (), outside: Outside = dict) -> dict[str, str]:
    """name -> why its values are codes, which must never be cast into a float target.

    Args:
        found: what `composites` gave.
        outside: gives the shapes of what the file holds beside `sources`, by name; asked only where fp8 numbers have no scale.
    """
    owners = {part: made for made in found for part in made.parts}
    codes = {name: tensor.dtype.name for name, tensor in sources.items() if tensor.dtype.name in _CODES or tensor.dtype.kind == "quantized"}
    scaled = any(name.endswith(_SCALE_WORDS) for name in sources) if codes else False
    file, out = _File(sources), {}
    bare = [name for name, dtype in codes.items() if dtype in _FP8 and name not in owners]
    strange = {name: [n for n in file.strange(name) if _grid(sources[name].shape, sources[n].shape, {})] for name in bare}
    elsewhere = _elsewhere(sources, bare, outside()) if bare else {}
    scaled = scaled or any(strange.values()) or bool(elsewhere)
    for name, dtype in codes.items():
        if name in owners:
            out[name] = owners[name].doubt or f"codes of {owners[name].name!r} ({owners[name].rule})"
        elif dtype not in _FP8:
            out[name] = f"{dtype} numbers, and no scale of a known name beside them"
        elif told := strange[name]:
            out[name] = f"fp8 numbers, and {told[0]!r} beside them may scale them in a way that is not published"
        elif name in elsewhere:
            out[name] = f"fp8 numbers, and {elsewhere[name]!r} in another part of the file may scale them"
        elif scaled:
            out[name] = "fp8 numbers without a scale in a file that has scales"
    return out


def _elsewhere(sources: Tensors, names: Iterable[str], outside: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Those of `names` that something outside is called after, or after their module, which could be a scale by its shape."""
    called = {spelt: name for name in names for spelt in (name, name.removesuffix(".weight"))}
    out: dict[str, str] = {}
    for other, shape in outside.items():
        for end in (other[at:] for at in (0, *(dot.end() for dot in re.finditer(r"\.", other)))):
            whose = next((called[own] for own in (end, *(end[: cut.start()] for cut in re.finditer(r"[._]", end))) if own in called), "")
            if whose and shape != sources[whose].shape and _grid(sources[whose].shape, shape, {}):
                out.setdefault(whose, other)
    return out


# parametrizations: torch.nn.utils.weight_norm, spectral_norm, prune, and their successors in torch.nn.utils.parametrizations


def families(names: Collection[str]) -> dict[str, dict[str, str]]:
    """plain name -> its stored pieces, under the names of torch.nn.utils.parametrize (`orig` and `mask` of pruning)."""
    out: dict[str, dict[str, str]] = defaultdict(dict)
    told = "\0".join(names) + "\0"  # most models have none, and a hundred thousand names are soon asked at once
    for name in names if any(mark in told for mark in ("parametrizations.", "_g\0", "_orig\0")) else ():
        if "parametrizations." in name:
            if found := _PARAMETRIZED.fullmatch(name):
                out[(found[1] or "") + found[2]][found[3]] = name
        elif name.endswith("_g") and name[:-1] + "v" in names and "weight" in name.rpartition(".")[2]:
            out[name[:-2]] |= {"original0": name, "original1": name[:-1] + "v"}
        elif name.endswith("_orig"):
            plain = name.removesuffix("_orig")
            if f"{plain}_u" in names and f"{plain}_v" in names:
                out[plain] |= {"original": name, "0._u": f"{plain}_u", "0._v": f"{plain}_v"}
            elif f"{plain}_mask" in names:
                out[plain] |= {"orig": name, "mask": f"{plain}_mask"}
    return out


def _parametrized(plain: str, pieces: Mapping[str, str], sources: Tensors) -> Composite | None:
    order = next((order for order in _ORDERS if set(order) == set(pieces)), ())
    parts = tuple(pieces[piece] for piece in order)
    if not parts or plain in sources:
        return None
    first, second, *rest = [sources[part] for part in parts]
    shape, dtype = first.shape, first.dtype.name
    if dtype not in _WIDE or (order[0] != "orig" and any(tensor.dtype != first.dtype for tensor in (second, *rest))):
        return None
    if order[0] == "orig" and shape == second.shape:
        return _group(plain, shape, dtype, parts, "pruning mask", "product", "orig times mask, as torch.nn.utils.prune does", "certain")
    if order[0] == "original0":
        over, reason = _norm_axes(shape, second.shape), "v * g / norm(v), over the axes that g does not have"
        made = _group(plain, second.shape, dtype, parts, "weight_norm", "weight_norm", reason, "certain", over=over)
        return made if over != [] else None
    u, v = second.shape, rest[0].shape if rest else ()
    fits = [d for d, n in enumerate(shape) if (n,) == u and (math.prod(shape) // max(n, 1),) == v]
    if len(shape) < 2 or not fits:
        return None
    made = _group(plain, shape, dtype, parts, "spectral_norm", "spectral_norm", "orig / (u . W v), as in eval mode", "certain", dim=fits[0])
    doubt = "u and v fit a convolution (rows along dim 0) and a transposed one (dim 1)"
    return made if len(fits) == 1 or len(shape) == 2 else made._replace(doubt=doubt, settled_by="layer kind")


def _norm_axes(g: tuple[int, ...], v: tuple[int, ...]) -> list[int] | None:
    """The axes that the norm of weight_norm runs over: all but one; None for all of them; none where g cannot be a norm of v."""
    over = [axis for axis, count in enumerate(g) if count == 1]
    fits = len(over) >= max(len(g) - 1, 1) and g == tuple(1 if axis in over else n for axis, n in enumerate(v))
    return (over if fits else []) if g else None


def decomposed(targets: Mapping[str, tuple[int, ...]]) -> list[Composite]:
    """The other way round: g and v of the targets under weight_norm, each made of the plain weight, which `parts` names as the target would."""
    out = []
    for plain, pieces in families(targets).items():
        if set(pieces) == set(_ORDERS[0]) and (over := _norm_axes(*(targets[pieces[piece]] for piece in _ORDERS[0]))) != []:
            g, v, reason = pieces["original0"], pieces["original1"], "the norm of the plain weight, and that weight as the direction"
            out.append(_group(g, targets[g], "float32", (plain,), "into weight_norm", "norm", reason, over=over))
            out.append(_group(v, targets[v], "float32", (plain,), "into weight_norm", "", reason))
    return out


_ORDERS: tuple[tuple[str, ...], ...] = (("original0", "original1"), ("original", "0._u", "0._v"), ("orig", "mask"))


def _modified(name: str, tensor: LazyTensor, sources: Tensors) -> Composite | None:
    """A matrix beside something that is called after it and may change it by its shape: a mask, a difference, a gain for each row."""
    module, _, leaf = name.rpartition(".")
    plain = f"{module}.weight" if module else "weight"
    base = sources.get(plain) if leaf.startswith("weight_") or leaf.endswith("_weight") else None
    if base is None or base.dtype.name not in _WIDE or base.ndim < 2 or _HARMLESS.fullmatch(leaf) or names_average(leaf):
        return None
    if tensor.numel < 2 or not _grid(base.shape, tensor.shape, {}):
        return None
    doubt = f"{name!r} stands beside it, may be a part of its value by its name and shape, and the model has no place for it"
    return _group(plain, base.shape, base.dtype.name, (plain, name), MODIFIED)._replace(doubt=doubt)


# LoRA: peft (wrapped or adapter beside base) and loralib


def adapters_in(names: Iterable[str]) -> dict[str, dict[str, dict[str, str]]]:
    """module -> adapter -> A.weight, B.weight, B.bias, magnitude -> name."""
    out: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for name in names:
        if "lora" not in name:
            continue
        if found := _LORA.fullmatch(name):
            out[found[1] or ""][found[4] or ""][f"{_FACTORS.get(found[3], found[3])}.{found[5] or 'weight'}"] = name
        elif "lora_magnitude_vector" in name:
            out[name[: name.rindex("lora_magnitude_vector")]]["magnitude"]["magnitude"] = name
    return out


def beside_bases(names: Collection[str]) -> dict[str, list[str]]:
    """module -> what peft, or whoever wraps a layer as `base_layer`, put beside that."""
    out: dict[str, list[str]] = {name[: -len(end)]: [] for end in _BASES for name in names if name.endswith(f".{end}")}
    for name in names if out else ():
        for dot in re.finditer(r"\.", name):
            if name[: dot.end()] in out and not name.startswith("base_layer.", dot.end()) and name[dot.end() :] not in ("weight", "bias"):
                out[name[: dot.end()]].append(name)
    return out


_BASES = ("base_layer.weight", "base_layer.bias")


def tuners_in(beside: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Those of them that are no LoRA: what they do to the base, its bias included, only their own code tells."""
    return {module: found for module, found in beside.items() if found and not any("lora_" in name for name in found)}


def _tuned(plain: str, beside: list[str], file: _File) -> Composite | None:
    module, _, leaf = plain.rpartition(".")
    base = file.sources.get(f"{module}.base_layer.{leaf}")
    if base is None:
        return None
    doubt = f"{beside[0]!r} stands beside its base_layer, and how an adapter changes that is told by its config and code"
    parts = (f"{module}.base_layer.{leaf}", *beside)
    return _group(plain.rpartition("base_model.model.")[2], base.shape, base.dtype.name, parts, "adapter")._replace(doubt=doubt)


def _adapted(module: str, adapters: Mapping[str, Mapping[str, str]], file: _File) -> Composite | None:
    base = next((name for name in (f"{module}base_layer.weight", f"{module}weight") if name in file.sources), None)
    held = [pieces for pieces in adapters.values() if {"A.weight", "B.weight"} <= set(pieces)]
    if base is None or not (held or "magnitude" in adapters):
        return None
    shape, dtype = file.sources[base].shape, file.sources[base].dtype.name
    plain = _group(f"{module}weight", shape, dtype, (base,), "LoRA at its start", "", "lora_B is zero: the base is the model", "certain")
    if "magnitude" in adapters:
        return plain._replace(doubt="DoRA: the merged weight needs lora_alpha and a norm of its columns")
    if all(_is_zero(file.sources[pieces["B.weight"]]) for pieces in held):
        return plain
    if len(held) > 1:
        return plain._replace(doubt=f"{len(held)} adapters stand beside it, and the file does not say which are active")
    parts = (base, held[0]["A.weight"], held[0]["B.weight"])
    inner, outer, direct = _factors(held[0], file)
    rank = inner[0] if inner else 0
    scale, reason = lora_scale(file.config, module, rank)
    if scale is None:
        return plain._replace(doubt=reason)
    turned = "lora_embedding_" in parts[1] or (shape != direct and shape == direct[::-1])
    if not turned and len(shape) == 2 and shape[0] == shape[1]:  # peft keeps one flag for all layers, that of the last
        turned = bool(file.config["adapter_config.json"].get("fan_in_fan_out"))
        if file.lie - {turned}:
            return plain._replace(
                doubt="some layers of this adapter lie as [in, out] and some as [out, in], and of a square one it is not told"
            )
    if outer[1:2] != (rank,) or math.prod(outer[2:]) != 1 or shape != (direct[::-1] if turned else direct) or dtype not in _WIDE:
        return plain._replace(doubt=f"the adapter's shapes {list(inner)} and {list(outer)} make no {dtype} {list(shape)}")
    formula = "lora_transposed" if turned else "lora"
    return _group(plain.name, shape, dtype, parts, "LoRA merge", formula, reason, "likely", scale=scale)


def _factors(pieces: Mapping[str, str], file: _File) -> tuple[tuple[int, ...], ...]:
    """The shapes of A and B, and that of their product."""
    inner, outer = (file.sources[pieces[f"{word}.weight"]].shape for word in "AB")
    return inner, outer, (*outer[:1], *inner[1:])


def _is_zero(tensor: LazyTensor) -> bool:
    return not tensor.locked and not any(tensor.peek(8)) and not any(bool(chunk.any()) for _, chunk in tensor.chunks())


# quantized weights: codes and what turns them into numbers


class _File:
    """The source's tensors and config, and which tensors stand side by side in a module."""

    def __init__(self, sources: Tensors, config: Config | None = None) -> None:
        quantized = (config or {}).get("quantization_config")
        self.sources, self.config = sources, {**(config or {}), **(quantized if isinstance(quantized, dict) else {})}
        self._modules: dict[str, list[str]] = {}

    @cached_property
    def lie(self) -> set[bool]:
        """Whether oblong matrices under adapters lie as [in, out]: True, False, both."""
        out = set()
        for module, adapters in adapters_in(self.sources).items():
            bases = [name for name in (f"{module}base_layer.weight", f"{module}weight") if name in self.sources]
            shape = self.sources[bases[0]].shape if bases else ()
            for pieces in adapters.values() if len(set(shape)) == 2 == len(shape) else ():
                if {"A.weight", "B.weight"} <= pieces.keys() and "lora_embedding_" not in pieces["A.weight"]:
                    out.add(shape != _factors(pieces, self)[2])
        return out

    @cached_property
    def along(self) -> dict[str, set[int]]:
        """By the last word of scales, one for each row or column: the axes of codes that those of oblong ones go along."""
        out: dict[str, set[int]] = defaultdict(set)
        for name, codes in self.sources.items():
            for scale in _scales_of(name, self.sources) if codes.dtype.name in _SCALED else ():
                axes = [axis for axis, count in enumerate(codes.shape) if (count,) == self.sources[scale].shape]
                out[scale.rpartition(".")[2]].update(axes if len(axes) == 1 else ())
        return out

    def strange(self, name: str, *known: str) -> list[str]:
        """Tensors beside `name` that may have a part in its value and are neither `known` nor known to have none."""
        if not self._modules:
            for other in self.sources:
                module = other[: other.rfind(".") + 1]
                self._modules.setdefault(module, []).append(other)
                self._modules.setdefault(module[: module.rfind(".", 0, -1) + 1] + "*", []).append(other)  # of what lies in a module
        at = name.rfind(".") + 1
        stem = name if name[at:] not in ("weight", "weight_packed") else name[:at]
        within = (other for other in self._modules.get(f"{name[:at]}*", ()) if other.startswith(name))
        beside = (other for other in (*self._modules.get(name[:at], ()), *within) if other != name and other not in known)
        return [other for other in beside if other.startswith(stem) and not _HARMLESS.fullmatch(other[at:])]


def _grid(shape: tuple[int, ...], scales: tuple[int, ...], config: Config) -> tuple[list[int], list[int], bool] | None:
    """(the scales' shape, elements per scale along each axis, whether that is beyond doubt), or None where they do not fit."""
    if math.prod(scales) == 1:
        return [1] * len(shape), list(shape), True
    rows = scales[: max(axis + 1 for axis, count in enumerate(scales) if count != 1)]
    grid = [*rows, *[1] * (len(shape) - len(rows))] if rows == shape[: len(rows)] else list(scales)
    told, blocks, sure = config.get("weight_block_size"), [], True
    told = told if isinstance(told, (list, tuple)) and len(told) == 2 and all(isinstance(n, int) and n > 0 for n in told) else None
    if len(grid) != len(shape) or 0 in grid:
        return None
    for axis, (count, held) in enumerate(zip(shape, grid, strict=True), -len(shape)):
        ragged = -(-count // 128) == held > 1 and count % 128 != 0
        if told is not None and axis >= -2 and -(-count // told[axis]) == held:
            blocks.append(told[axis])
        elif count % held == 0:
            blocks.append(count // held)
            sure = sure and not ragged
        elif ragged:
            blocks.append(128)  # DeepSeek's block, the only one published that ends ragged
        else:
            return None
    return grid, blocks, sure


def _scales_of(name: str, sources: Tensors) -> list[str]:
    plain, module = name.removesuffix("._data"), name[: name.rfind(".") + 1]
    spelt = [f"{name}_scale_inv", f"{name}_scale"] if plain == name else [f"{plain}._scale"]
    spelt += [f"{module}{leaf}" for leaf in ("scale_weight", "SCB", "scale") if name == f"{module}weight"]
    return [other for other in spelt if other in sources]


def _scaled(name: str, codes: LazyTensor, file: _File) -> Composite | None:
    """int8 or fp8 codes times scales: one, one for each row, one for each block."""
    kind, shape, module, plain = codes.dtype.name, codes.shape, name[: name.rfind(".") + 1], name.removesuffix("._data")
    held = _scales_of(name, file.sources)
    if not held:
        return None
    scale, last, rule = file.sources[held[0]], held[0].rpartition(".")[2], f"dequantize {kind}"
    dtype = scale.dtype.name if scale.dtype.name in _WIDE else "bfloat16"
    doubtful = _group(plain, shape, dtype, (name, held[0]), rule)
    if last == "SCB":
        order = f"{module}weight_format"
        if kind != "int8" or len(shape) != 2 or scale.shape != shape[:1] or (order in file.sources and file.sources[order].peek(1) != [0]):
            return doubtful._replace(doubt="bitsandbytes int8 in another order than rows")
        beside = (order,) if order in file.sources else ()
        return _group(plain, shape, dtype, doubtful.parts, "dequantize bitsandbytes int8", "int8_scb", "weight times SCB / 127")._replace(
            beside=beside
        )
    zeros = f"{name}_zero_point"
    if strange := file.strange(name, *held, zeros):
        return doubtful._replace(doubt=_STRANGE.format(strange[0]))
    exponents = scale.dtype.name in ("uint8", "float8_e8m0fnu")
    if kind == "int8" and exponents:  # two 4-bit floats in a byte
        return _fp4(plain, doubtful.parts, file)
    grid = _grid(shape, scale.shape, file.config)
    if grid is None or len(held) > 1 or not (dtype == scale.dtype.name or exponents):
        return doubtful._replace(doubt=f"the scales {', '.join(held)} do not fit {list(shape)} in a published way")
    if last == "scale" and (kind == "int8" or scale.ndim != 2 or any(b != 128 and g != 1 for g, b in zip(*grid[:2], strict=True))):
        return doubtful._replace(doubt="'scale' multiplies in blocks of 128 (DeepSeek); in other shapes it may do anything")
    if scale.ndim == 1 < len(shape) and scale.numel > 1 and shape.count(scale.numel) > 1 and file.along[last] != {0}:
        told = "others of this file go along another axis than the rows" if file.along[last] else "no other one of this file tells"
        return doubtful._replace(doubt=f"its scales may be one for each row or one for each column, and {told}")
    if not grid[2]:
        return doubtful._replace(doubt=f"{list(scale.shape)} scales over {list(shape)}: blocks of 128 with a short last one, or equal ones")
    formula, parts = "scale_exponent" if scale.dtype.name == "uint8" else "scale", doubtful.parts
    if zeros in file.sources:
        if file.sources[zeros].shape != scale.shape or exponents:
            return doubtful._replace(doubt="its zero points do not have the shape of its scales")
        formula, parts = "scale_shift", (*parts, zeros)
    sure: Confidence = "certain" if last in ("weight_scale", "weight_scale_inv") and scale.shape != shape[:1] else "likely"
    reason = f"{kind} times {last}, one for {'x'.join(map(str, grid[1]))} values"
    return _group(plain, shape, dtype, parts, rule, formula, reason, sure, grid=grid[0], block=grid[1])


def _packed(name: str, codes: LazyTensor, file: _File) -> Composite | None:
    """compressed-tensors `weight_packed`: integers in words, or 4-bit floats in bytes; and ModelOpt's 4-bit floats."""
    plain, kind = name.removesuffix("_packed"), codes.dtype.name
    scale, shapes, factor = f"{plain}_scale", f"{plain}_shape", f"{plain}_scale_2" if plain == name else f"{plain}_global_scale"
    if scale not in file.sources or kind not in ("int32", "uint8", "float4_e2m1fn_x2") or not codes.ndim:
        return None
    doubtful = _group(plain, (), "bfloat16", (name, scale), "dequantize packed integers")
    if strange := file.strange(name, scale, factor, shapes):
        return doubtful._replace(doubt=_STRANGE.format(strange[0]))
    if kind != "int32":
        return _fp4(plain, (name, scale, factor) if factor in file.sources else (name, scale), file)
    shape = tuple(file.sources[shapes].peek(4)) if shapes in file.sources else ()
    bits = next((b for b in (4, 8, 2) if shape and -(-shape[-1] * b // 32) == codes.shape[-1]), 0)
    dtype = file.sources[scale].dtype.name
    grid = _grid(shape, file.sources[scale].shape, file.config) if bits and shape[:-1] == codes.shape[:-1] else None
    if grid is None or not grid[2] or dtype not in _WIDE:
        return doubtful._replace(doubt="packed integers whose shape and scales do not fit together in a published way")
    reason = f"compressed-tensors: int{bits} times weight_scale"
    made = _group(plain, shape, dtype, doubtful.parts, doubtful.rule, "scale_packed", reason, bits=bits, grid=grid[0], block=grid[1])
    return made._replace(beside=(shapes,))


def _fp4(plain: str, parts: tuple[str, ...], file: _File) -> Composite:
    """Two e2m1 floats in each byte, times a scale for 32 (MX: an exponent) or for 16 of them (NVIDIA: e4m3, and one float for all)."""
    codes, scale = (file.sources[part] for part in parts[:2])
    shape, group = (*codes.shape[:-1], 2 * codes.shape[-1] if codes.ndim else 0), 32 if len(parts) == 2 else 16
    kinds = ("uint8", "float8_e8m0fnu") if group == 32 else ("float8_e4m3fn",)
    formula = "fp4" if group == 32 else "nvfp4_divided" if parts[2].endswith("_global_scale") else "nvfp4"
    reason = f"{'MXFP4' if group == 32 else 'NVFP4'}: e2m1 values, the low half of a byte first, times a scale for {group}"
    made = _group(plain, shape, "bfloat16", parts, "dequantize 4-bit floats", formula, reason)
    fits = scale.shape == (*shape[:-1], shape[-1] // group) and scale.dtype.name in kinds and scale.numel > 0 and shape[-1] % group == 0
    return made if fits else made._replace(doubt="4-bit codes whose scales do not fit in a published way")


def _mxfp4(name: str, codes: LazyTensor, file: _File) -> Composite | None:
    """gpt-oss: `*_blocks` in transformers' files (experts are [E, in, out] there), `*.blocks` in OpenAI's."""
    turned, scales = name.endswith("_blocks"), name.removesuffix("blocks") + "scales"
    scale = file.sources.get(scales) if name.endswith(("_blocks", ".blocks")) else None
    if scale is None or not codes.dtype.name == scale.dtype.name == "uint8" or codes.shape != (*scale.shape, 16) or codes.ndim < 3 + turned:
        return None
    *outer, rows, columns = (*codes.shape[:-2], codes.shape[-2] * 32)
    shape, reason = (*outer, columns, rows) if turned else (*outer, rows, columns), "gpt-oss: e2m1 values times 2^(scale - 127)"
    return _group(
        name[: -len("_blocks")], shape, "bfloat16", (name, scales), "dequantize MXFP4", "fp4_transposed" if turned else "fp4", reason
    )


def _bnb_4bit(name: str, state: LazyTensor, file: _File) -> Composite | None:
    """bitsandbytes nf4 and fp4: the state is a JSON text, stored as bytes."""
    plain, mark, _ = name.partition(".quant_state.bitsandbytes__")
    parts = tuple(plain + end for end in ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"))
    parts = parts[: 5 if parts[3] in file.sources else 3]
    if not mark or any(part not in file.sources for part in parts):
        return None
    codes, absmax, table, *_ = (file.sources[part] for part in parts)
    doubtful = _group(plain, (), "float16", parts, "dequantize bitsandbytes 4 bit")._replace(
        doubt="its quant_state does not fit its tensors"
    )
    try:
        stored = isinstance(state.source, Stored) and state.is_contiguous
        told = json.loads(state.raw(0, 4096) if stored else bytes(state.peek(4096)))
        shape, block = tuple(map(int, told["shape"])), max(int(told["blocksize"]), 1)
        params: dict[str, Any] = {"blocksize": block}
        if len(parts) == 5:
            params |= {"nested_blocksize": int(told["nested_blocksize"]), "offset": float(told["nested_offset"])}
    except (ValueError, KeyError, TypeError, AttributeError):
        return doubtful._replace(doubt="its quant_state cannot be read")
    count, dtype = math.prod(shape), str(told.get("dtype"))
    if (
        codes.dtype.name != "uint8"
        or dtype not in _WIDE
        or (codes.numel, absmax.numel, table.numel) != (-(-count // 2), -(-count // block), 16)
    ):
        return doubtful
    reason = f"quant_map[code] * absmax for {block} values, the high half of a byte first"
    formula = "bnb_4bit_nested" if len(parts) == 5 else "bnb_4bit"
    return _group(plain, shape, dtype, parts, doubtful.rule, formula, reason, **params)._replace(beside=(name,))


def _words(name: str, codes: LazyTensor, file: _File) -> Composite | None:
    """GPTQ and AWQ: int32 words. GPTQ packs the rows of [in, out], AWQ the columns, and the shapes tell which."""
    module = name.removesuffix("qweight")
    parts = (name, f"{module}qzeros", f"{module}scales")
    if not name.endswith("qweight") or any(part not in file.sources for part in parts):
        return None
    zeros, scales, index = file.sources[parts[1]], file.sources[parts[2]], f"{module}g_idx"
    dtype, plain = scales.dtype.name, f"{module}weight"
    doubtful = _group(plain, (), dtype, parts, "dequantize GPTQ")._replace(doubt="its tensors do not fit together as GPTQ's or AWQ's do")
    if not codes.ndim == zeros.ndim == scales.ndim == 2 or not codes.dtype.name == zeros.dtype.name == "int32" or dtype not in _WIDE:
        return doubtful
    (groups, rows), is_awq = scales.shape, codes.shape[1] * 8 == scales.shape[1]
    bits = 4 if is_awq else 32 * zeros.shape[1] // max(rows, 1)
    columns = codes.shape[0] if is_awq else codes.shape[0] * 32 // bits if codes.shape[1] == rows and bits in (2, 4, 8) else 0
    if (
        not columns
        or not groups
        or zeros.shape != (groups, rows * bits // 32)
        or ((is_awq or index not in file.sources) and columns % groups)
    ):
        return doubtful
    reason = f"{bits} bits: (code - zero) * scale, transposed"
    if is_awq:
        return _group(plain, (rows, columns), dtype, parts, "dequantize AWQ", "awq", reason, group=columns // groups)
    shift = _gptq_shift(zeros, bits, file.config)
    if shift is None:
        return doubtful._replace(
            doubt="GPTQ v1 stores zero - 1 and v2 the zero: neither the zeros nor a checkpoint_format tell which this is"
        )
    if index not in file.sources:
        group = columns // groups
        return _group(plain, (rows, columns), dtype, parts, doubtful.rule, "gptq_in_order", reason, bits=bits, shift=shift, group=group)
    made = _group(plain, (rows, columns), dtype, (*parts, index), doubtful.rule, "gptq", reason, bits=bits, shift=shift)
    return made if file.sources[index].shape == (columns,) else made._replace(doubt="g_idx does not have one entry for each input")


def _gptq_shift(zeros: LazyTensor, bits: int, config: Config) -> int | None:
    """1 for GPTQ v1, 0 for v2, None where that cannot be known. Symmetric zeros are half the range in v2, one less in v1."""
    told = {"gptq": 1, "gptq_v2": 0}.get(str(config.get("checkpoint_format")))
    words = set(zeros.peek(64)) if zeros.numel >= 4 and not zeros.locked else set()
    ones = sum(1 << at for at in range(0, 32, bits))
    for shift in (1, 0):
        word = ones * ((1 << bits - 1) - shift)
        if words == {word - (1 << 32) * (word >> 31)}:
            return shift if told in (None, shift) else None
    return told


_STRANGE = "{!r} stands beside it, and its part in the value is not known"
_QUANTIZED = (_bnb_4bit, _words, _mxfp4, _packed)
