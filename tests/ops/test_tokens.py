"""What offsets say of samples, compiled and not."""

from __future__ import annotations

import pytest
import torch

from imu_fast.ops import extension, tokens

WAYS = ["torch"] if extension.load() is None else ["torch", "extension"]


@pytest.fixture(params=WAYS, autouse=True)
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(tokens, "load", lambda: None)


@pytest.mark.parametrize(
    "offsets, found",
    [
        ([0, 1], (0, 1, 1, 1)),
        ([0, 1, 2, 3], (0, 3, 1, 1)),
        ([0, 2, 2, 7], (0, 7, 0, 5)),
        ([3, 5, 1, 1], (3, 1, -4, 2)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_lengths(offsets, found, dtype):
    assert tuple(tokens.lengths(torch.tensor(offsets, dtype=dtype))) == found
    apart = torch.tensor(offsets, dtype=dtype).repeat_interleave(2)[::2]
    assert tuple(tokens.lengths(apart)) == found


def test_one_length_of_all():
    assert tokens.is_flat(torch.arange(4)) and tokens.equal_length(torch.arange(4)) == 1
    assert tokens.equal_length(torch.arange(0, 9, 2)) == 2
    assert not tokens.is_flat(torch.arange(0, 9, 2))
    assert tokens.equal_length(torch.tensor([0, 1, 3])) == 0
    assert not tokens.is_flat(torch.tensor([0, 0, 2]))
    nobody = torch.zeros(1, dtype=torch.int64)
    assert tokens.is_flat(nobody) and tokens.equal_length(nobody) == 0
