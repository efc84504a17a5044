"""A small convolutional network and real data for it, so that every number in a notebook is a measured one.

The data is scikit-learn's digits (UCI optical recognition of handwritten digits, 8 × 8 grey values in 0 to 16), which ships with
the package: nothing is downloaded. Training for a few epochs takes seconds on one core.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from workbench.errors import MissingDependencyError

_BATCH = 64
_TEST_SHARE = 0.2


class DigitsNet(nn.Module):
    """Two convolutions with batch normalisation and two linear layers: 151,498 parameters, images [n, 1, 8, 8] to scores [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.classifier(self.features(image))
        return scores


@dataclass(frozen=True)
class Digits:
    """Images [n, 1, 8, 8] in [0, 1] and their labels [n], in two parts that share no image."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def digits(seed: int = 0) -> Digits:
    """The digits, shuffled by `seed`, a fifth of them kept for testing.

    Raises:
        MissingDependencyError: scikit-learn, which carries the data, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(
            "the digits come with scikit-learn, which is not installed", hint='pip install "checkpoint-workbench[lab]"'
        ) from error
    loaded: Any = load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(loaded.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out = round(_TEST_SHARE * len(labels))
    test, train = order[:held_out], order[held_out:]
    return Digits(images[train], labels[train], images[test], labels[test])


def train_epoch(model: nn.Module, data: Digits, optimizer: torch.optim.Optimizer, *, seed: int) -> float:
    """One pass over the training images in an order drawn from `seed`; returns the mean loss."""
    model.train()
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(seed))
    total = 0.0
    for batch in torch.split(order, _BATCH):
        loss = nn.functional.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.item() * len(batch)
    return total / len(order)


def accuracy(model: nn.Module, data: Digits) -> float:
    """The share of test images whose highest score is their label; the model runs in eval mode and is given back as it was."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        right = (model(data.test_images).argmax(1) == data.test_labels).float().mean()
    model.train(was_training)
    return float(right)
