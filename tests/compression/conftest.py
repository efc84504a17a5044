"""A network trained on the digits, once: what a plan is worth shows only on weights that mean something."""

import pytest
import torch

from workbench.teaching.samples import DigitsNet, digits, train_epoch


@pytest.fixture(scope="session")
def data():
    return digits()


@pytest.fixture(scope="session")
def net(data):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DigitsNet()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for epoch in range(5):
        train_epoch(model, data, optimizer, seed=epoch)
    torch.set_num_threads(before)
    return model.eval()
