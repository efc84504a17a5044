"""The teaching data is real, split without overlap, the same each time, and learnable."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch

from workbench.errors import MissingDependencyError
from workbench.teaching import samples


def test_digits_are_all_there_and_no_image_is_in_both_parts() -> None:
    from sklearn.datasets import load_digits

    data = samples.digits()
    assert (len(data.train_labels), len(data.test_labels)) == (1438, 359)
    assert data.train_images.shape == (1438, 1, 8, 8)
    assert float(data.train_images.min()) == 0.0
    assert float(data.train_images.max()) == 1.0
    both = torch.cat([data.train_images, data.test_images]).flatten(1)
    expected = torch.tensor(load_digits().images, dtype=torch.float32).flatten(1) / 16
    assert sorted(both.tolist()) == sorted(expected.tolist())


def test_the_split_follows_its_seed() -> None:
    assert torch.equal(samples.digits(3).test_images, samples.digits(3).test_images)
    assert not torch.equal(samples.digits(3).test_images, samples.digits(4).test_images)


def test_training_is_repeatable_and_learns() -> None:
    data = samples.digits()

    def trained() -> tuple[samples.DigitsNet, list[float]]:
        torch.manual_seed(0)
        model = samples.DigitsNet()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return model, [samples.train_epoch(model, data, optimizer, seed=epoch) for epoch in (1, 2)]

    (first, losses), (second, again) = trained(), trained()
    assert losses == again
    assert losses[1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert samples.accuracy(first, data) > 0.9


def test_accuracy_counts_what_it_says_and_leaves_the_mode_alone() -> None:
    data = samples.digits()

    class Oracle(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            assert not self.training
            scores = torch.nn.functional.one_hot(data.test_labels, 10).float()
            scores[0] = scores[0].roll(1)  # one wrong
            return scores

    model = Oracle().train()
    assert samples.accuracy(model, data) == pytest.approx(358 / 359)
    assert model.training


def test_the_model_is_as_large_as_its_docstring_says() -> None:
    assert sum(p.numel() for p in samples.DigitsNet().parameters()) == 151_498


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refusing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(MissingDependencyError, match=r"scikit-learn.*\n?.*checkpoint-workbench\[lab\]"):
        samples.digits()
