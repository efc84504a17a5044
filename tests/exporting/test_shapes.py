"""dynamic_shapes and dynamic_axes in each spelling that torch documents, for each target; what cannot be meant is refused in words."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from workbench.errors import SelectionError
from workbench.exporting import export_model

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


class Two(nn.Module):
    def forward(self, a, b):
        return a * 2, b + 1


INPUTS = (torch.randn(4, 8), torch.randn(3, 5))
SPELLINGS = {
    "lists": {"a": [Dim("n"), None], "b": (None, None)},
    "a tuple of hints": ((Dim.DYNAMIC, Dim.STATIC), None),
    "names": {"a": {0: "n"}},
    "names in lists": [["n", None], None],
    "from the end": {"a": {-2: "n"}, "b": {0: Dim.AUTO}},
    "numbers": {"a": {0: Dim("n"), 1: 8}, "b": None},
}


@pytest.mark.parametrize("target", ["onnx", "pt2", "torchscript"])
@pytest.mark.parametrize("asked", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_serves_every_target(target, asked, tmp_path):
    one = export_model(Two(), INPUTS, to=target, folder=tmp_path, dynamic_shapes=asked)[target]
    assert one.ok, one.cause
    assert isinstance(one.inputs["a"][0], str)
    assert one.inputs["a"][0]
    assert one.inputs["a"][1] == 8
    assert "resized" in one.tried


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dynamic_shapes": {"a": {5: Dim("n")}, "b": None}}, "axis 5; that tensor is"),
        ({"dynamic_shapes": {"a": [Dim("n")]}}, "a size for each of 2 axes"),
        ({"dynamic_shapes": {"c": {0: "n"}}}, "speaks of 'c'"),
        ({"dynamic_shapes": 5}, "a dict by argument name"),
        ({"dynamic_shapes": {"a": {0: 2.5}}}, "it is 2.5"),
        ({"dynamic_axes": {"a": 0}}, "{axis: name} or"),
        ({"dynamic_axes": [0]}, "a dict by input name"),
        ({"opset_version": "18"}, "a whole number"),
        ({"kwargs": [1]}, "keyword arguments"),
        ({"rtol": float("nan")}, "a number from 0 on"),
        ({"methods": ["forward"]}, "methods is"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_work(options, words, tmp_path):
    with pytest.raises(SelectionError) as raised:
        export_model(Two(), INPUTS, folder=tmp_path, **options)
    assert words in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_an_axis_left_open_that_the_file_fixes_is_told(tmp_path):
    class Pinned(nn.Module):
        def forward(self, x):
            return x + torch.ones(4, 8)

    one = export_model(Pinned(), INPUTS[0], to="pt2", folder=tmp_path, dynamic_shapes={"x": {0: Dim.AUTO}})["pt2"]
    assert one.ok, one.cause
    assert "Left open by Dim.AUTO, and fixed in the file: axis 0 of x." in one.notes


class BySize(nn.Module):
    def __init__(self, most):
        super().__init__()
        self.most = most

    def forward(self, x):
        return x * 2 if x.shape[0] > self.most else x * 3


def test_an_axis_of_any_name_is_tried_and_a_bound_too_far_is_told(tmp_path):
    asked = {"dynamic_axes": {"x": {0: "batch-size"}}}
    assert "baked a size" in export_model(BySize(6), INPUTS[0], folder=tmp_path, **asked)["onnx"].cause
    far = export_model(BySize(5000), INPUTS[0], folder=tmp_path, **asked)["onnx"]
    assert far.ok
    assert any("Not tried, for they are too large: axis 0 of x at 5001" in note for note in far.notes)
