"""Weights that are used outside of their layer, heads inside transforms, convolutions as heads."""

from __future__ import annotations

import pytest
import torch
from model.test_between import C, N, Net, check, data, hessian_scores
from per_sample import assert_scores
from torch import nn
from torch.nn import functional as F

import imu_fast as imu
from imu_fast.errors import InputError, NoHeadFoundError


class Outside(Net):
    """The weight is used by the code of the model, not only by its layer."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        return self.form(self, self.features(x))


@pytest.mark.parametrize(
    "form",
    [
        lambda self, h: F.linear(h, self.fc.weight, self.fc.bias),
        lambda self, h: self.fc.forward(h),
        lambda self, h: self.fc(h) + F.linear(h * h, self.fc.weight),
        lambda self, h: F.linear(h * h, self.fc.weight) + self.fc(h),
    ],
)
def test_a_weight_used_outside_of_its_layer_is_refused(form):
    model, (x, y) = Outside(form), data()
    with pytest.raises(NoHeadFoundError, match=r"uses (the weight of 'fc' itself|it outside)"):
        imu.capture(model, (x, y))
    with pytest.raises(InputError, match=r"outside of the layer too|never ran"):
        imu.capture(model, (x, y), layers=["fc"])


def test_heads_inside_transforms_are_refused():
    model = Outside(lambda self, h: torch.func.vmap(self.fc)(h))
    with pytest.raises(InputError, match="vmap"):
        imu.capture(model, data())


class Convolutional(nn.Module):
    def __init__(self, after, kernel=1):
        super().__init__()
        self.body, self.fc = nn.Conv2d(2, 3, 3), nn.Conv2d(3, C, kernel)
        self.after = after

    def forward(self, x):
        return self.after(self.body(x).relu(), self.fc)


@pytest.mark.parametrize(
    ("after", "kernel", "softmax"),
    [
        (lambda h, fc: fc(h.mean((2, 3), keepdim=True)).flatten(1), 1, True),
        (lambda h, fc: fc(h.mean((2, 3), keepdim=True))[:, :, 0, 0] / 2, 1, True),
        (lambda h, fc: fc(h).mean((2, 3)), 1, True),
        (lambda h, fc: fc(h).relu().mean((2, 3)), 1, False),
        (lambda h, fc: fc(h).amax((2, 3)), 1, False),
        (lambda h, fc: fc(h).flatten(1), 4, True),
        (
            lambda h, fc: F.adaptive_avg_pool2d(
                fc(h).contiguous(memory_format=torch.channels_last), 1
            ).flatten(1),
            1,
            True,
        ),
    ],
)
def test_convolutions_as_heads(after, kernel, softmax):
    model = Convolutional(after, kernel)
    x, y = torch.randn(N, 2, 6, 6), torch.randint(C, (N,))
    factors = check(model, x, y)
    assert (factors.labels is not None) == softmax
    if softmax:
        truth = hessian_scores(model, x, y, ("fc.weight", "fc.bias"))
        assert_scores(imu.influence_scores(factors, curvature="ggn"), truth, 1e-4)


def test_a_convolution_over_positions_is_no_head():
    model = Convolutional(lambda h, fc: fc(h).mean((2, 3)), kernel=3)
    with pytest.raises(NoHeadFoundError, match="convolution over several positions"):
        imu.capture(model, (torch.randn(N, 2, 6, 6), torch.randint(C, (N,))))


def test_the_features_of_a_convolution_can_be_trained():
    model = Convolutional(lambda h, fc: fc(h.mean((2, 3), keepdim=True)).flatten(1))
    x, y = torch.randn(N, 2, 6, 6), torch.randint(C, (N,))
    found = imu.capture_features(model, (x, y))
    assert found.plain
    torch.testing.assert_close(found.head(found.features), model(x))
    with torch.no_grad():
        found.head.weight.mul_(2)
    torch.testing.assert_close(found.head(found.features), model(x))
