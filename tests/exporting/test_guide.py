"""The format guide: every use leads to a file that can do it."""

import itertools

import pytest

from workbench.errors import SelectionError
from workbench.exporting import advise
from workbench.exporting.guide import KINDS

OPTIONS = ("resume", "mobile", "no_python", "other_hardware", "strangers", "no_class")


@pytest.mark.parametrize("chosen", [*itertools.product([False, True], repeat=len(OPTIONS))])
def test_what_is_advised_can_do_what_is_asked(chosen):
    asked = {option for option, yes in zip(OPTIONS, chosen, strict=True) if yes}
    advice = advise(**dict.fromkeys(asked, True))
    missed = asked - advice.kind.serves
    assert bool(missed) == bool(advice.missed) == all(asked - kind.serves for kind in KINDS)
    assert not missed or (advice.kind is KINDS[0] and missed <= advice.beside.serves and advice.beside.name in advice.headline)
    assert all(wish in advice.headline for wish in advice.missed)


@pytest.mark.parametrize(
    ("asked", "kind", "beside"),
    [
        ("strangers no_class", "ONNX (.onnx)", "state dict (.safetensors)"),
        ("resume strangers", "training checkpoint (.pt)", "state dict (.safetensors)"),
        ("resume no_class", "training checkpoint (.pt)", "torch.export (.pt2)"),
        ("resume no_python strangers", "training checkpoint (.pt)", "ONNX (.onnx)"),
        ("mobile strangers no_class", "ExecuTorch (.pte)", "ONNX (.onnx)"),
    ],
)
def test_every_wish_counts(asked, kind, beside):
    advice = advise(**dict.fromkeys(asked.split(), True))
    assert (advice.kind.name, advice.beside.name) == (kind, beside)
    assert any(kind in text.get_text() for text in advice.plot().axes[0].texts[-1:])


def test_an_answer_is_yes_or_no():
    with pytest.raises(SelectionError, match="no_python is 'no'"):
        advise(no_python="no")


def test_it_says_why_and_what_is_lost_and_draws_the_way():
    advice = advise(no_python=True)
    assert "ONNX" in advice.headline
    assert "Lost:" in advice.headline
    assert len(advice.tables()[1].rows) == len(KINDS)
    texts = [text.get_text() for text in advice.plot().axes[0].texts]
    assert "Must it run without Python?" in texts
    assert "safetensors" in advise().kind.name
