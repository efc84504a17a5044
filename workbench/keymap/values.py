"""The values of a KeyMap's pairs: parts cut, joined and regrouped, and the formulas that are more than that.

A formula is a function of the sources' tensors; its row below gives its code for people, what it computes and where that is
published. Everything is deferred: a target that is no source as it stands is one Block over its sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench.dtypes import DTYPES
from workbench.errors import SpecMismatchError
from workbench.tensors import Block, Derived, LazyTensor, TensorSpec, kernel

if TYPE_CHECKING:
    import torch

    from workbench.keymap.maps import Pair, Regroup


def made(pair: Pair, sources: Mapping[str, LazyTensor]) -> LazyTensor:
    """The target tensor of a pair, unread.

    Raises:
        SpecMismatchError: the sources do not have the shapes that the pair was made for.
    Cost: nothing now; when read, the sources are held whole, and the result beside them.
    """
    if pair.is_plain:
        return sources[pair.source]
    held = tuple(sources[part.source] for part in pair.parts if part.source)
    for part in pair.parts:
        if part.source and part.shape and sources[part.source].shape != part.shape:
            told, found = list(part.shape), list(sources[part.source].shape)
            raise SpecMismatchError(f"{part.source!r} has the shape {found} and the map was made for {told}", tensor=part.source)
    params = {
        "parts": [[bool(p.source), p.regroup, p.rows] for p in pair.parts], "regroup": pair.regroup,
        "formula": pair.formula, "params": dict(pair.params),
    }  # fmt: skip
    if pair.formula:
        spec = TensorSpec(DTYPES[pair.params["dtype"]], tuple(pair.params["shape"]))
    else:
        shapes = [p.regroup.shape if p.regroup else sources[p.source].shape if p.source else (0,) for p in pair.parts]
        joined = shapes[0]
        if len(pair.parts) > 1 or pair.parts[0].rows is not None:
            _require_joint(pair, held, [shape for p, shape in zip(pair.parts, shapes, strict=True) if p.source])
            joined = (sum(p.rows[1] - p.rows[0] if p.rows else s[0] for p, s in zip(pair.parts, shapes, strict=True)), *joined[1:])
        spec = TensorSpec(held[0].dtype, pair.regroup.shape if pair.regroup else joined)
    peak = 2 * sum(tensor.nbytes for tensor in held) + (24 * spec.numel if pair.formula else 3 * spec.nbytes)
    return LazyTensor(spec, Derived(Block(f"{__name__}:carry_out", params, held, (spec,), "full", peak=peak), 0))


def _require_joint(pair: Pair, held: Sequence[LazyTensor], shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise unless parts can be put together along dim 0, which torch would find out in the middle of a load."""
    if len({shape[1:] for shape in shapes}) > 1 or () in shapes or len({tensor.dtype for tensor in held}) > 1:
        told = ", ".join(f"{tensor.dtype} {list(shape)}" for tensor, shape in zip(held, shapes, strict=True))
        raise SpecMismatchError(f"{pair.target!r} cannot be put together from {told}")


def carry_out(params: dict[str, Any], whole: Sequence[Any], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """The kernel of `made`."""
    import torch

    if params["formula"]:
        out = FORMULAS[params["formula"]].compute(params["params"], *blocks)
        return [_regrouped(out, params["regroup"]).to(getattr(torch, params["params"]["dtype"])).contiguous()]
    given, pieces = iter(blocks), []
    for is_source, regroup, rows in params["parts"]:
        tensor = _regrouped(next(given), regroup) if is_source else torch.zeros(rows[1], dtype=blocks[0].dtype)
        pieces.append(tensor[rows[0] : rows[1]] if is_source and rows is not None else tensor)
    joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return [_regrouped(joined, params["regroup"]).contiguous()]


def starts_alike(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether the first quarter of a million elements are the same; the certificate of a load compares them all."""
    count = min(one.numel, other.numel, 1 << 18)
    return one.spec == other.spec and bool((one.read(0, count) == other.read(0, count)).all())


def _regrouped(tensor: torch.Tensor, regroup: Regroup | None) -> torch.Tensor:
    return tensor if regroup is None else tensor.reshape(regroup[0]).permute(regroup[1]).reshape(regroup[2])


def regroup_code(regroup: Regroup | None, shape: tuple[int, ...] = ()) -> str:
    """What the regrouping of a tensor of this shape (where it is known) is in Python."""
    if regroup is None:
        return ""
    if math.prod(regroup.view) == math.prod(regroup.shape) and regroup.axes == tuple(range(len(regroup.axes))):
        return f".reshape{regroup.shape}"
    if regroup.view == regroup.shape[::-1] and regroup.axes == (1, 0):
        return f"{'' if shape == regroup.view else f'.reshape{regroup.view}'}.T.contiguous()"
    return f".reshape{regroup.view}.permute{regroup.axes}.reshape{regroup.shape}"


class Formula(NamedTuple):
    """A row of FORMULAS: what `formulas.py` computes under the same name.

    Attributes:
        code: the same for people, with `{0}`, `{1}` for the sources and `{name}` for params.
        source: where it is published.
    """

    name: str
    code: str
    source: str

    def compute(self, params: Mapping[str, Any], *sources: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = kernel(f"workbench.keymap.formulas:{self.name}")(params, *sources)  # type: ignore[assignment]
        return out


_SPREAD = "torch.kron({%d}.reshape({grid}), torch.ones({block}))[tuple(map(slice, {shape}))]"
_SCALES = _SPREAD.replace("{%d}", "{1}.float()")
_E2M1 = "torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6])"
_FP4 = f"{_E2M1}[torch.stack([{{0}}.view(torch.uint8) & 15, {{0}}.view(torch.uint8) >> 4], -1).long()].reshape(*{{1}}.shape, -1)"
_MXFP4 = f"({_FP4} * torch.exp2({{1}}.view(torch.uint8).float() - 127)[..., None]).flatten(-2)"
_BNB = "({2}.float()[torch.stack([{0} >> 4, {0} & 15], -1).flatten().long()][:torch.Size({shape}).numel()] * %s.repeat_interleave({blocksize})[:torch.Size({shape}).numel()]).reshape({shape})"
_NESTED = "({4}.float()[{1}.flatten().long()] * {3}.float().repeat_interleave({nested_blocksize})[:{1}.numel()] + {offset})"
_WORDS = "(({0}[:, None] >> torch.arange(0, 32, {bits})[:, None]) & (1 << {bits}) - 1).flatten(0, 1)"
_ZEROS = "((({1}[..., None] >> torch.arange(0, 32, {bits})) & (1 << {bits}) - 1).flatten(1) + {shift})"
_NIBBLES = "(({%d}[..., None] >> torch.tensor([0, 16, 4, 20, 8, 24, 12, 28])) & 15).flatten(1)"
_GROUPS = ".repeat_interleave({group}, 0)"

_ROWS = (
    Formula("weight_norm", "{1} * ({0} / torch.linalg.vector_norm({1}, dim={over}, keepdim=True))", "torch.nn.utils.weight_norm"),
    Formula("norm", "torch.linalg.vector_norm({0}, dim={over}, keepdim={over} is not None)", "torch.norm_except_dim"),
    Formula("spectral_norm", "{0} / {1}.dot({0}.movedim({dim}, 0).flatten(1).mv({2}))", "torch.nn.utils.spectral_norm, in eval mode"),
    Formula("product", "{0} * {1}.to({0}.dtype)", "torch.nn.utils.prune"),
    Formula("shifted", "({0}.float() + {by})", "llama.cpp, convert_hf_to_gguf.py: GemmaModel, NemotronModel"),
    Formula("lora", "{0} + {scale} * ({2}.float().flatten(1) @ {1}.float().flatten(1)).reshape({0}.shape)", "Hu et al. 2021, arXiv:2106.09685; peft.tuners.lora"),
    Formula("lora_transposed", "{0} + {scale} * ({2}.float() @ {1}.float()).T", "peft.tuners.lora: embeddings and fan_in_fan_out"),
    Formula("scale", f"{{0}}.float() * {_SCALES}", "DeepSeek-V3 inference/fp8_cast_bf16.py; compressed-tensors; FBGEMM"),
    Formula("scale_exponent", "{0}.float() * " + _SPREAD.replace("{%d}", "torch.exp2({1}.float() - 127)"), "OCP Microscaling Formats v1.0; transformers finegrained_fp8.py"),
    Formula("scale_shift", "({0}.float() - " + _SPREAD.replace("{%d}", "{2}.float()") + f") * {_SCALES}", "compressed-tensors, asymmetric"),
    Formula("scale_packed", f"((({{0}}[..., None] >> torch.arange(0, 32, {{bits}})) & (1 << {{bits}}) - 1).flatten(-2)[..., :{{shape}}[-1]] - (1 << {{bits}} - 1)).float() * {_SCALES}", "compressed-tensors, pack-quantized"),
    Formula("int8_scb", "{0}.float() * {1}.float()[:, None] / 127", "bitsandbytes, Linear8bitLt"),
    Formula("fp4", _MXFP4, "OCP Microscaling Formats v1.0; openai/gpt-oss gpt_oss/torch/weights.py"),
    Formula("fp4_transposed", f"{_MXFP4}.mT", "transformers mxfp4.py: experts are [E, in, out]"),
    Formula("nvfp4", f"({_FP4} * ({{1}}.float() * {{2}}.float())[..., None]).flatten(-2)", "NVIDIA ModelOpt, NVFP4"),
    Formula("nvfp4_divided", f"({_FP4} * ({{1}}.float() / {{2}}.float())[..., None]).flatten(-2)", "compressed-tensors, nvfp4-pack-quantized"),
    Formula("bnb_4bit", _BNB % "{1}.float()", "bitsandbytes functional.QuantState"),
    Formula("bnb_4bit_nested", _BNB % _NESTED, "bitsandbytes functional.QuantState, double quantization"),
    Formula("gptq", f"(({_WORDS} - {_ZEROS}[{{3}}.long()]).float() * {{2}}.float()[{{3}}.long()]).T", "AutoGPTQ qlinear; GPTQModel"),
    Formula("gptq_in_order", f"(({_WORDS} - {_ZEROS}{_GROUPS}).float() * {{2}}.float(){_GROUPS}).T", "AutoGPTQ qlinear, without g_idx"),
    Formula("awq", f"(({_NIBBLES % 0} - {_NIBBLES % 1}{_GROUPS}).float() * {{2}}.float(){_GROUPS}).T", "AutoAWQ utils/packing_utils.py"),
)  # fmt: skip
FORMULAS: dict[str, Formula] = {row.name: row for row in _ROWS}


def formula_code(pair: Pair, at: Callable[[str], str]) -> str:
    """What the pair computes, as an expression over torch and what `at` makes of each source's name."""
    sources = [at(part.source) for part in pair.parts]
    code = FORMULAS[pair.formula].code.format(*sources, **{name: repr(value) for name, value in pair.params.items()})
    return f"({code}){regroup_code(pair.regroup)}.to(torch.{DTYPES[pair.params['dtype']]})"
