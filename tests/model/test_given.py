"""A model may write to what it is given: the scores are its own, and the user's data stay."""

from __future__ import annotations

import pytest
import torch
from per_sample import assert_scores, sample_gradients, scores
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import imu_fast as imu

NAMES = ("fc.weight", "fc.bias")


class Net(nn.Module):
    """Prepares its inputs, in their memory or in its own, and scales what its head returns."""

    def __init__(self, in_place: bool, scale: float) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(6, 8), nn.Linear(8, 5)
        self.in_place, self.scale = in_place, scale

    def forward(self, x: Tensor) -> Tensor:
        x = x.sub_(0.5).div_(3.0) if self.in_place else (x - 0.5) / 3.0
        z = self.fc(self.body(x).relu())
        return z if self.scale == 1 else z * self.scale


def _loss(model: nn.Module, sample: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(sample[0][None].double()), sample[1][None])


FORMS = {
    "batches": lambda x, y: list(zip(x.split(7), y.split(7), strict=True)),
    "a sample at a time": lambda x, y: list(zip(x.split(1), y.split(1), strict=True)),
    "tensors": lambda x, y: (x, y),
    "dicts": lambda x, y: [{"x": x, "labels": y}],
}


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("form", FORMS)
def test_inputs_that_are_written_to(form: str, scale: float) -> None:
    torch.manual_seed(0)
    model, plain = Net(True, scale), Net(False, scale)
    plain.load_state_dict(model.state_dict())
    x, y = torch.randn(12, 6), torch.randint(5, (12,))
    truth = scores(sample_gradients(plain, zip(x, y, strict=True), NAMES, _loss))
    given = x.clone()
    for layers in ("head", ["fc"]):
        found = imu.influence_scores(model, FORMS[form](given, y), layers=layers)
        assert_scores(found, truth)
        assert torch.equal(given, x)


@pytest.mark.parametrize("scope", ["head", "layers", "all"])
def test_every_epoch_runs_on_the_same_inputs(scope: str) -> None:
    torch.manual_seed(0)
    model, plain = Net(True, 1.0), Net(False, 1.0)
    plain.load_state_dict(model.state_dict())
    x, y = torch.randn(12, 6), torch.randint(5, (12,))
    given = x.clone()
    for one in (model, plain):
        imu.unlearn(
            one, FORMS["batches"](given, y), "imu", scope=scope, epochs=3, on_empty="uniform"
        )
    assert torch.equal(given, x)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


class Masking(nn.Module):
    """Writes to the labels that it is given, which its logits are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(9, 6), nn.Linear(6, 9)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        z = self.fc(self.embed(ids).cumsum(1))
        if labels is None:
            return z[:, -1:]
        labels[labels == 0] = -100
        return z


def test_labels_that_are_written_to() -> None:
    torch.manual_seed(0)
    ids, labels = torch.randint(9, (2, 5, 6))
    given = labels.clone()
    factors = imu.capture(Masking(), [{"ids": ids, "labels": given}], shift=False)
    assert torch.equal(given, labels) and factors.offsets.diff().tolist() == [6] * 5


def test_two_inputs_in_one_beside_the_labels() -> None:
    """A pair of images, say, for a model of two towers."""

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return self.fc((self.body(one) - self.body(other)).abs())

    torch.manual_seed(0)
    model = Towers()
    one, other, y = torch.randn(12, 6), torch.randn(12, 6), torch.randint(5, (12,))

    def loss(model: nn.Module, sample: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        pair = (part[None].double() for part in sample[:2])
        return cross_entropy(model(*pair), sample[2][None])

    truth = scores(sample_gradients(model, zip(one, other, y, strict=True), NAMES, loss))
    rows = torch.arange(12).split(7)
    for pair in (list, tuple):
        batches = [(pair([one[r], other[r]]), y[r]) for r in rows]
        assert_scores(imu.influence_scores(model, batches), truth)
