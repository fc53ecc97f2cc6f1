"""Models that send each sample to a head of its own: all of them are scored, or it is said."""

from __future__ import annotations

import pytest
import torch
from per_sample import assert_scores, sample_gradients, scores
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import imu_fast as imu

NAMES = ("first.weight", "first.bias", "second.weight", "second.bias")


class Experts(nn.Module):
    """Head by the sign of the first input; ``calls_all``: also one that no sample is sent to."""

    def __init__(self, calls_all: bool = False) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(8, 5)
        self.calls_all = calls_all

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).relu()
        out = h.new_zeros(len(x), 5)
        for head, own in ((self.second, x[:, 0] > 0), (self.first, x[:, 0] <= 0)):
            if self.calls_all or bool(own.any()):
                out[own] = head(h[own])
        return out


def _batches(*signs: str) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    batches = []
    for row in signs:
        x, y = torch.randn(len(row), 6), torch.randint(5, (len(row),))
        x[:, 0] = x[:, 0].abs() * torch.tensor([1.0 if sign == "+" else -1.0 for sign in row])
        batches.append((x, y))
    return batches, [sample for x, y in batches for sample in zip(x, y, strict=True)]


def _loss(model: nn.Module, sample: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(sample[0][None].double()), sample[1][None])


@pytest.mark.parametrize("calls_all", [False, True])
@pytest.mark.parametrize("later", ["+-+-", "++++", "----"])
def test_a_first_batch_that_has_all(later: str, calls_all: bool) -> None:
    batches, samples = _batches("+-++-", later)
    model = Experts(calls_all)
    truth = scores(sample_gradients(model, samples, NAMES, _loss))
    assert_scores(imu.influence_scores(model, batches), truth)
    of_each = [sample_gradients(model, samples, NAMES[k : k + 2], _loss) for k in (0, 2)]
    found = imu.influence_scores(model, batches, layers=["first", "second"])
    assert_scores(found, sum(map(scores, of_each)))


@pytest.mark.parametrize("later", ["+-+-", "++++", "---+"])
def test_a_head_that_comes_later_is_refused(later: str) -> None:
    batches, _ = _batches("-----", later)
    with pytest.raises(imu.InputError, match="samples from 5 on: .*'second'|not the producer"):
        imu.influence_scores(Experts(), batches)


def test_one_of_them_by_name() -> None:
    batches, samples = _batches("-----", "+-+-")
    truth = scores(sample_gradients(_seeded(), samples, NAMES[:2], _loss))
    assert_scores(imu.influence_scores(_seeded(), batches, layers=["first"]), truth)


def _seeded() -> Experts:
    torch.manual_seed(1)
    return Experts()
