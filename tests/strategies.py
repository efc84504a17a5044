"""Hypothesis strategies for state dicts and training checkpoints: odd names, every storable dtype, every kind of view."""

from collections import OrderedDict

import torch
from hypothesis import strategies as st

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SAFETENSORS_DTYPES = [
    *FLOATS, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool, torch.complex64, torch.float4_e2m1fn_x2,
]  # fmt: skip
TORCH_DTYPES = [
    *SAFETENSORS_DTYPES,
    torch.complex128,
    torch.complex32,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.bits8,
    torch.bits16,
]

# flattening collides on purpose: "a.b" beside a nested "a" -> "b", "w#2" beside the second "w"
ODD_NAMES = ["", ".", "a", "a.b", "a.b.c", "w", "w#2", "w#3", "layers.10.weight", "layers.2.weight", "two words", "naïve.β", "\u202eevil", "\x1b[2J", "tab\there", "line\nbreak", "__metadata__x", "*", "?", "{0-3}", "<img src=x onerror=alert(1)>", "a$b_{$c", "0", "\x7f", "😀.bias"]  # fmt: skip

names = st.one_of(st.sampled_from(ODD_NAMES), st.text(st.characters(codec="utf-8"), max_size=12)).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 5), max_size=4)


def bits(tensor: torch.Tensor) -> bytes:
    """The logical elements' own bytes: equal bits, NaN payloads included."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(width).contiguous().numpy().tobytes()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and tuple(a.shape) == tuple(b.shape) and bits(a) == bits(b)


@st.composite
def tensors(draw, dtypes=TORCH_DTYPES, shape=None):
    """A contiguous tensor with arbitrary bits, NaN and infinities among them."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(shapes) if shape is None else shape
    numel = int(torch.Size(shape).numel())
    width = torch.empty(0, dtype=dtype).element_size()
    pattern = draw(st.binary(min_size=width, max_size=4 * width))
    data = bytearray((pattern * (numel + 1))[: numel * width])
    if dtype is torch.bool:
        data = bytearray(b & 1 for b in data)
    flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return flat.clone().view(dtype).reshape(shape)


@st.composite
def views(draw, dtypes=TORCH_DTYPES):
    """A tensor as it may lie in memory: plain, transposed, sliced with steps, expanded, at an offset, or a parameter."""
    tensor = draw(tensors(dtypes))
    kind = draw(st.sampled_from(["plain", "plain", "transposed", "stepped", "expanded", "offset", "flattened"]))
    if kind == "transposed" and tensor.ndim >= 2:
        return tensor.transpose(0, tensor.ndim - 1)
    if kind == "stepped" and tensor.ndim:
        return tensor[:: draw(st.integers(1, 3))]
    if kind == "expanded":
        return tensor[None].expand(draw(st.integers(1, 3)), *tensor.shape)
    if kind == "offset" and tensor.ndim and tensor.shape[0] > 1:
        return tensor[1:]
    if kind == "flattened":
        return tensor.reshape(-1)
    return tensor


@st.composite
def state_dicts(draw, dtypes=TORCH_DTYPES, tensor=None, min_size=0, max_size=6):
    """name -> tensor, some of them tied and some of them views of one another."""
    made = OrderedDict(
        (name, draw(views(dtypes) if tensor is None else tensor))
        for name in draw(st.lists(names, min_size=min_size, max_size=max_size, unique=True))
    )
    for extra in draw(st.lists(names, max_size=2, unique=True)):
        if made and extra not in made:
            other = made[draw(st.sampled_from(list(made)))]
            made[extra] = other if draw(st.booleans()) or not other.ndim else other[: max(0, other.shape[0] - 1)]
    return made


plain_keys = st.one_of(st.text(max_size=5), st.integers(-3, 300))
plain_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.binary(min_size=1, max_size=8),
)
extras = st.recursive(
    plain_leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(plain_keys, inner, max_size=3),
        st.sets(st.integers(), max_size=3),
    ),
    max_leaves=8,
)


@st.composite
def training_trees(draw):
    """What a training loop saves: weights, optimizer state under integer keys, and plain values around them."""
    weights = draw(state_dicts(FLOATS, max_size=4))
    steps = {i: {"step": torch.tensor(float(i)), "exp_avg": tensor.clone()} for i, tensor in enumerate(weights.values())}
    return {
        draw(st.sampled_from(["model", "state_dict", "net"])): weights,
        "optimizer": {"state": steps, "param_groups": [{"lr": draw(st.floats(0, 1)), "betas": (0.9, 0.999), "params": list(steps)}]},
        "epoch": draw(st.integers(0, 10**6)),
        "config": draw(extras),
    }


def leaves(node, path=()):
    """(path, tensor) of every tensor in a plain tree, in order, by walking it here and not by our code."""
    if isinstance(node, torch.Tensor):
        yield path, node
    elif isinstance(node, dict):
        for key, child in node.items():
            yield from leaves(child, (*path, key))
    elif isinstance(node, (list, tuple)):
        for i, child in enumerate(node):
            yield from leaves(child, (*path, i))
