"""The format guide: every use leads to a file that can do it."""

import itertools

import pytest

from workbench.exporting import advise
from workbench.exporting.guide import KINDS

OPTIONS = ("resume", "mobile", "no_python", "other_hardware", "strangers", "no_class")


@pytest.mark.parametrize("chosen", [*itertools.product([False, True], repeat=len(OPTIONS))][::5])
def test_what_is_advised_can_do_what_is_asked(chosen):
    asked = dict(zip(OPTIONS, chosen, strict=True))
    advice = advise(**asked)
    kind = advice.kind
    if asked["resume"]:
        assert kind.use == "resume training"
        return
    assert not (asked["no_python"] and kind.needs_python)
    assert not (asked["other_hardware"] and not kind.other_hardware)
    assert not (asked["strangers"] and not kind.safe)
    first = next((option for option in OPTIONS if asked[option]), None)
    assert not (first == "no_class" and kind.needs_class)


def test_it_says_why_and_what_is_lost_and_draws_the_way():
    advice = advise(no_python=True)
    assert "ONNX" in advice.headline
    assert "Lost:" in advice.headline
    assert len(advice.tables()[1].rows) == len(KINDS)
    texts = [text.get_text() for text in advice.plot().axes[0].texts]
    assert "Must it run without Python?" in texts
    assert "safetensors" in advise().kind.name
