"""Batches in, outputs by path, and the messages for what holds no numbers."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from workbench.errors import SelectionError
from workbench.verification.values import Call, calls_from, outputs_by_path
from workbench.verification.variations import resized, variations


@dataclass
class Answer:
    loss: object
    logits: object


def test_paths_of_nested_outputs():
    pair = namedtuple("pair", "mean spread")
    t = torch.zeros(1)
    nest = {"a": t, "b": (t, [t, None]), "c": pair(t, t), "d": Answer(None, np.zeros(2)), "e": 3}
    assert list(outputs_by_path(nest, of="m")) == ["a", "b.0", "b.1.0", "c.mean", "c.spread", "d.logits", "e"]
    assert list(outputs_by_path(t, of="m")) == ["output"]


def test_paths_that_flatten_alike_do_not_vanish():
    found = outputs_by_path(OrderedDict([("a.b", torch.zeros(1)), ("a", {"b": torch.ones(1)})]), of="m")
    assert list(found) == ["a.b", "a.b#2"]
    assert found["a.b#2"] == 1


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"cache": object()}, "m returned a object at 'cache'"),
        ("text", "m returned a str at 'output'"),
        (torch.zeros(2, device="meta"), "a meta tensor at 'output'"),
        (None, "m returned no output"),
        ((), "m returned no output"),
        (np.array(["x"]), "which torch cannot hold"),
    ],
)
def test_what_holds_no_numbers_is_named(value, words):
    with pytest.raises(SelectionError, match=words):
        outputs_by_path(value, of="m")


def test_endless_nesting_ends():
    loop: list = []
    loop.append(loop)
    with pytest.raises(SelectionError, match="64 deep"):
        outputs_by_path(loop, of="m")


def test_what_inputs_mean():
    t, u = torch.zeros(2), torch.ones(3)
    assert [list(c.tensors()) for c in calls_from((t, {"m": u}))] == [["0", "1.m"]]
    assert [list(c.tensors()) for c in calls_from({"ids": t, "mask": u})] == [["ids", "mask"]]
    assert len(calls_from([t, (t, u), {"x": t}])) == 3
    (call,) = calls_from(np.ones((2, 2), dtype=np.float32))
    assert call.args[0].dtype == torch.float32


@pytest.mark.parametrize("nothing", [[], (), {}, torch.zeros(0, 3), (torch.zeros(0),), (1, "x"), 7, None])
def test_empty_inputs_are_refused(nothing):
    with pytest.raises(SelectionError):
        calls_from(nothing)


def test_read_only_arrays_do_not_warn():
    array = np.ones(3)
    array.setflags(write=False)
    assert calls_from(array)[0].args[0].sum() == 3


def test_variations_keep_shape_dtype_and_index_range():
    call = Call((torch.randn(2, 3), torch.tensor([5, 7, 1])), {"flag": torch.tensor([True, False]), "n": 4})
    for other in variations(call).values():
        for path, tensor in other.tensors().items():
            before = call.tensors()[path]
            assert (tensor.shape, tensor.dtype) == (before.shape, before.dtype)
            assert not torch.equal(tensor, before)
        assert sorted(other.args[1].tolist()) == [1, 5, 7]
        assert other.kwargs["n"] == 4


def test_resized_repeats_what_is_there():
    call = resized(Call((torch.tensor([[1, 2], [3, 4]]),)), {(0, 0): 3})
    assert call.args[0].tolist() == [[1, 2], [3, 4], [1, 2]]
