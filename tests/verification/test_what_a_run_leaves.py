"""What a run leaves behind: in its inputs, in the model, and in outputs that are empty."""

import copy
import threading
from collections import deque

import pytest
import torch
from torch import nn

from workbench.errors import SelectionError
from workbench.verification.comparison import parity
from workbench.verification.runners import evaluating


class Writing(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x, cache):
        out = x * 2 + cache.sum()
        if self.factor:
            cache[:, 0] = x[:, 0].sin() * self.factor
        return out


def batch():
    return {"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), "cache": torch.zeros(4, 3)}


@pytest.mark.filterwarnings("ignore")
def test_what_is_written_into_an_input_must_be_written_by_both(tmp_path):
    given = batch()
    for one, other in ((1.0, 0.0), (0.0, 1.0)):
        report = parity(Writing(one), Writing(other), given)
        assert not report
        assert "writes into its input 'cache' and" in report.problems[0]
        assert report.cause == ""
    assert parity(Writing(1.0), Writing(1.0), given)
    assert parity(Writing(1.0), torch.jit.script(Writing(1.0)), given)
    assert "they differ by" in parity(Writing(1.0), Writing(1.001), given).problems[0]
    assert parity(Writing(1.0), Writing(1.001), given, atol=0.01)
    assert not given["cache"].any()
    torch.onnx.export(
        Writing(1.0), (*batch().values(),), str(tmp_path / "m.onnx"), dynamo=False, input_names=["x", "cache"], output_names=["y"]
    )
    report = parity(Writing(1.0), tmp_path / "m.onnx", given)  # a graph never does: told, and no fault of its answers
    assert report
    assert "m.onnx does not" in report.notes[0]
    assert report.notes[0] in str(report)


class Cache:
    def __init__(self):
        self.held = [torch.zeros(2)]


def test_objects_among_the_arguments_are_copied_for_each_run():
    def remember(x, cache):
        cache.held.append(x)
        return x * len(cache.held)

    cache = Cache()
    assert parity(remember, remember, (torch.ones(2), cache))
    assert len(cache.held) == 1
    with pytest.raises(SelectionError, match="a lock among the arguments cannot be copied"):
        parity(remember, remember, (torch.ones(2), threading.Lock()))


class Hoarding(nn.Module):
    def __init__(self):
        super().__init__()
        self.list, self.dict, self.set, self.deque = [torch.zeros(2)], {"k": [torch.zeros(1)]}, {1}, deque([1], maxlen=3)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        self.list[0] += 1
        self.list.append(x)
        self.dict[x.shape[0]] = x
        self.dict["k"].append(x)
        self.set.add(len(self.set) + 1)
        self.deque.append(x)
        self.fc.register_forward_hook(lambda *_: None)
        self.register_forward_pre_hook(lambda *_: None)
        return self.fc(x)


def test_containers_and_hooks_are_put_back():
    model = Hoarding()
    held = (model.list, model.dict, model.dict["k"], model.set, model.deque, model.fc._forward_hooks)
    assert parity(model, copy.deepcopy(model), torch.randn(3, 4))
    with evaluating(model):
        model(torch.randn(2, 4))
    assert all(
        a is b
        for a, b in zip(held, (model.list, model.dict, model.dict["k"], model.set, model.deque, model.fc._forward_hooks), strict=True)
    )
    assert (len(model.list), list(model.dict), len(model.dict["k"]), model.set, list(model.deque)) == (1, ["k"], 1, {1}, [1])
    assert model.deque.maxlen == 3
    assert not model.list[0].any()
    assert not model.fc._forward_hooks
    assert not model._forward_pre_hooks


def test_outputs_pair_by_position_where_it_is_asked():
    expected, found = (lambda x: {"a": x * 2, "b": x * 3}), (lambda x: {"b": x * 2, "a": x * 3})
    assert not parity(expected, found, torch.ones(3))
    assert parity(expected, found, torch.ones(3), by_position=True)
    assert not parity(expected, lambda x: {"a": x * 3, "b": x * 2}, torch.ones(3), by_position=True)


def test_an_empty_output_beside_others_is_compared_by_shape_and_dtype():
    report = parity(lambda x: (x, x[:0]), lambda x: (x, x[:0]), torch.ones(3, 2))
    assert report
    assert "empty in every batch" in report.outputs[1].note
    assert not parity(lambda x: (x, x[:0]), lambda x: (x, x[:0].double()), torch.ones(3, 2))
    assert not parity(lambda x: (x, x[:0]), lambda x: (x, x[:0, :1]), torch.ones(3, 2))


def test_inputs_without_a_tensor_are_told_as_such():
    for nothing, told in (
        ((3,), "there is no tensor in it"),
        ({}, "there is no tensor in it"),
        (torch.zeros(0, 2), "its tensors are empty"),
    ):
        with pytest.raises(SelectionError, match=told):
            parity(abs, abs, nothing)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "a"])
def test_a_tolerance_is_a_number_that_is_not_negative(value):
    for name in ("rtol", "atol"):
        with pytest.raises(SelectionError, match=f"{name} is"):
            parity(abs, abs, torch.ones(2), **{name: value})
    with pytest.raises(SelectionError, match="at least one run"):
        parity(abs, abs, torch.ones(2), calls=1.5)


def test_what_a_strangers_function_answers_is_told_in_our_words():
    with pytest.raises(SelectionError, match="the mask function fails"):
        parity(abs, abs, torch.ones(2), mask=lambda x: 1 / 0)
    jagged = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)
    with pytest.raises(SelectionError, match="nested tensor"):
        parity(lambda x: jagged, abs, torch.ones(2))
    small = lambda x: x.to(torch.float8_e4m3fn)  # noqa: E731
    assert parity(small, small, torch.ones(2))
    assert not parity(small, lambda x: small(x * 4), torch.ones(2))


def test_the_formula_for_half_precision_stays_below_the_values():
    halved = lambda x: x.bfloat16() / 2  # noqa: E731
    assert not parity(lambda x: x.bfloat16(), halved, torch.ones(4))
