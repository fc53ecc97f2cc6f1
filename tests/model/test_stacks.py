"""How many batches come is a guess: what it says has no part in what is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import imu_fast as imu


class Stream(IterableDataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for i in range(11):
            yield torch.randn(6, generator=generator), i % 3


# The last two are more rows than any memory has, and than a size can say.
@pytest.mark.parametrize("length", [3, 17, 10**13, 2**62])
@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
def test_a_length_that_is_not_true(length):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    layers = ["0", "2"]
    truth = imu.capture(model, DataLoader(list(Stream(11)), batch_size=3), layers=layers)
    found = imu.capture(model, DataLoader(Stream(length), batch_size=3), layers=layers)
    for one, other in zip(found, truth, strict=True):
        assert torch.equal(one.delta, other.delta) and torch.equal(one.act, other.act)
        assert one.act.untyped_storage().nbytes() < 2 * one.act.nbytes
