"""``torch.no_grad()`` in a model's code stops gradients, as ``detach()`` does, and autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from per_sample import assert_scores, sample_gradients, scores
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import imu_fast as imu

Stopped = Callable[[Callable[[], Tensor]], Tensor]


def detached(make: Callable[[], Tensor]) -> Tensor:
    return make().detach()


def without_grad(make: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return make()


class Prior(nn.Module):
    """Its head is called twice, once for what is only subtracted."""

    def __init__(self, stop: Stopped) -> None:
        super().__init__()
        self.body, self.fc, self.stop = nn.Linear(6, 8), nn.Linear(8, 5), stop

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).relu()
        return self.fc(h) - 0.5 * self.stop(lambda: self.fc(h.flip(1)))


class Gated(nn.Module):
    """A layer whose output is only a factor, and what is computed behind it too."""

    def __init__(self, stop: Stopped) -> None:
        super().__init__()
        self.body, self.gate, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.stop = stop

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).tanh()
        return self.fc(h * self.stop(lambda: self.gate(h).sigmoid() * h))


def _data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(12, 6), torch.randint(5, (12,))


def _truth(model: nn.Module, x: Tensor, y: Tensor, layer: str) -> Tensor:
    def loss(model: nn.Module, sample: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(sample[0][None].double()), sample[1][None])

    names = [f"{layer}.weight", f"{layer}.bias"]
    return scores(sample_gradients(model, zip(x, y, strict=True), names, loss))


@pytest.mark.parametrize("stop", [detached, without_grad])
def test_at_the_head(stop: Stopped) -> None:
    x, y = _data()
    model = Prior(stop)
    batches = list(zip(x.split(7), y.split(7), strict=True))
    for layers in ("head", ["fc"]):
        found = imu.influence_scores(model, batches, layers=layers)
        assert_scores(found, _truth(model, x, y, "fc"))


@pytest.mark.parametrize("stop", [detached, without_grad])
def test_at_inner_layers(stop: Stopped) -> None:
    x, y = _data()
    model = Gated(stop)
    found = imu.influence_scores(model, (x, y), layers=["body", "gate"])
    assert_scores(found, _truth(model, x, y, "body"))
    assert not imu.influence_scores(model, (x, y), layers=["gate"]).any()


@pytest.mark.parametrize("stop", [detached, without_grad])
def test_a_step_that_is_listened_to_is_as_it_was(stop: Stopped) -> None:
    x, y = _data()
    model = Gated(stop)
    cross_entropy(model(x), y).backward()
    expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with imu.live_weights(model, ["body", "gate"], on_empty="uniform") as weigh:
        logits = model(x)
    weights = weigh(logits, y)
    assert_scores(weights, imu.batch_weights(model, (x, y), layers=["body"]).double())
    cross_entropy(logits, y).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_that_is_run_so_as_a_whole_has_its_scores(mode: type) -> None:
    class Whole(Prior):
        @mode()
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(x).relu())

    x, y = _data()
    model, plain = Whole(detached), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    plain[0], plain[2] = model.body, model.fc
    torch.testing.assert_close(
        imu.influence_scores(model, (x, y)), imu.influence_scores(plain, (x, y))
    )


class _Turned(torch.autograd.Function):
    """What it is given; what comes back is turned around, and scaled by sample."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.linspace(-2, -1, 5).to(gradient)


def test_a_gradient_of_its_own_behind_the_head() -> None:
    """As gradient reversal has it: the numbers are the head's, what is learned is not."""

    class Reversed(Prior):
        def forward(self, x: Tensor) -> Tensor:
            return _Turned.apply(self.fc(self.body(x).relu()))

    x, y = _data()
    model = Reversed(detached)
    batches = list(zip(x.split(7), y.split(7), strict=True))
    for layers in ("head", ["fc"]):
        found = imu.influence_scores(model, batches, layers=layers)
        assert_scores(found, _truth(model, x, y, "fc"))
