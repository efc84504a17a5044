"""Reordering: the same sums in the opposite order, the other half of a noise floor.

Owns the mode that stands at every operation of torch, and the one under which torch adds the terms of every matrix product, convolution,
sum, mean and attention score from the last to the first, and leaves oneDNN's and the encoder's fused kernels, which would hide those sums,
unused. Exact arithmetic would give the same answers. The next kind of sum is one entry of `_FLIPPED`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def reversed_sums() -> Iterator[None]:
    """Inside the `with`, sums are taken in reverse order; normalisation and grouped convolutions stay as they are.

    Cost: one copy of each operand of a product.
    """
    fused, fast = torch._C._get_mkldnn_enabled(), torch.backends.mha.get_fastpath_enabled()
    try:
        torch._C._set_mkldnn_enabled(False)
        torch.backends.mha.set_fastpath_enabled(False)
        with standing_by(lambda func, args: flip(*args) if (flip := _FLIPPED.get(func.overloadpacket)) else args):
            yield
    finally:
        torch._C._set_mkldnn_enabled(fused)
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def standing_by(change: Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]) -> Iterator[None]:
    """Inside the `with`, every operation that torch runs takes its arguments as `change(operation, arguments)` gives them.

    The branches and bodies of `torch.cond`, `while_loop`, `scan` and `map` are entered. torch compiles those by themselves, and what it
    compiles under a mode stays broken without one, so nothing is compiled meanwhile.
    """
    with torch.compiler.set_stance("force_eager"), _StandingBy(change):
        yield


class _StandingBy(TorchDispatchMode):  # type: ignore[no-untyped-call]
    supports_higher_order_operators = True

    def __init__(self, change: Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.change = change

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.HigherOrderOperator):
            args = tuple(self.entering(a) if callable(a) and not isinstance(a, torch.Tensor) else a for a in args)
            return func(*args, **(kwargs or {}))
        if func._can_decompose():  # in there a linear layer is one operation still
            with self:
                return func.decompose(*args, **(kwargs or {}))
        return func(*self.change(func, args), **(kwargs or {}))

    def entering(self, body: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return body(*args, **kwargs)

        return run


def _product(a: torch.Tensor, b: torch.Tensor, *rest: Any) -> tuple[Any, ...]:
    """[…, n, k] @ […, k, m], or a vector on either side."""
    return (a.flip(-1), b.flip(-2 if b.ndim > 1 else 0), *rest)


def _added_product(start: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *rest: Any) -> tuple[Any, ...]:
    return (start, *_product(a, b, *rest))


def _convolution(x: torch.Tensor, w: torch.Tensor, *rest: Any) -> tuple[Any, ...]:
    """x [n, in, …], w [out, in, …] (transposed: [in, out, …]); grouped ones sum too little to turn round."""
    transposed, groups = rest[4], rest[6]
    return (x.flip(1), w.flip(0 if transposed else 1), *rest) if groups == 1 else (x, w, *rest)


def _sum(x: torch.Tensor, axes: Any = None, *rest: Any) -> tuple[Any, ...]:
    turned = x.flip(list(range(x.ndim)) if not axes else [axes] if isinstance(axes, int) else list(axes))
    return (turned,) if axes is None else (turned, axes, *rest)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[Any, ...]:
    """Scores sum over the last axis of q and k; the keys stay in place, for a causal mask counts them."""
    return (q.flip(-1), k.flip(-1), v, *rest)


_aten: Any = torch.ops.aten
_FLIPPED: dict[Any, Callable[..., tuple[Any, ...]]] = {
    **dict.fromkeys((_aten.mm, _aten.bmm, _aten.mv, _aten.dot), _product),
    **dict.fromkeys((_aten.addmm, _aten.baddbmm, _aten.addmv, _aten._addmm_activation), _added_product),
    _aten.convolution: _convolution,
    **dict.fromkeys((_aten.sum, _aten.mean), _sum),
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}
