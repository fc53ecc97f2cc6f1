"""The door: losses, dtypes, refusals, passes and memory."""

from __future__ import annotations

import pytest
import torch
from importance_truth import C, D, H, N, check, images, pooled, truth
from torch import nn
from torch.nn import functional as F

import imu_fast as imu
from imu_fast.errors import InputError


def test_what_does_not_reach_the_loss_is_zero_and_said(caplog):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.fc, self.unused = nn.Linear(D, H), nn.Linear(H, C), nn.Linear(2, 2)

        def forward(self, x):
            with torch.no_grad():
                h = self.emb(x)
            return self.fc(h)

    found = check(Half(), torch.randn(N, D), torch.randint(C, (N,)))
    assert float(found["emb.weight"].sum()) == float(found["unused.bias"].sum()) == 0
    assert "emb.weight" in caplog.text and "unused.bias" in caplog.text


def test_other_losses():
    model, x = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, C)), torch.randn(N, D)

    def loss_of(function):
        return lambda m, s: function(m(s[0][None].double())[0], s[1])

    y = torch.randn(N, C)
    squared = loss_of(lambda z, y: (z - y).square().sum())
    check(model, x, y, loss=squared, reading={"loss": "squared_error"})
    y = (y > 0).float()
    binary = loss_of(
        lambda z, y: F.binary_cross_entropy_with_logits(z, y.double(), reduction="sum")
    )
    check(model, x, y, loss=binary, reading={"loss": imu.BinaryCrossEntropy()})
    y = torch.randint(C, (N,))
    smooth = loss_of(lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1))
    check(model, x, y, loss=smooth, reading={"label_smoothing": 0.1})


def test_frozen_parameters_and_dtypes():
    model = pooled(nn.Conv2d(4, 6, 3), 6)
    model[0].requires_grad_(False)
    found = check(model, *images())
    assert {v.dtype for v in found.values()} == {torch.float32}
    found = check(model.double(), images()[0].double(), images()[1], tolerance=1e-12)
    assert {v.dtype for v in found.values()} == {torch.float64}
    model, (x, y) = model.to(torch.bfloat16), images()
    found = imu.parameter_importance(model, (x.bfloat16(), y))
    for name, value in truth(model, list(zip(x.bfloat16(), y, strict=True))).items():
        assert found[name].dtype == torch.float32
        assert float((found[name] - value).norm() / value.norm()) < 0.05


def test_refusals():
    model = nn.Sequential(nn.Linear(D, C))
    with pytest.raises(InputError, match="empty"):
        imu.parameter_importance(model, [])
    with pytest.raises(InputError, match="is outside"):
        imu.parameter_importance(model, (torch.randn(2, D), torch.tensor([0, C])))
    with pytest.raises(InputError, match="is a list"):
        imu.parameter_importance([model], (torch.randn(2, D), torch.tensor([0, 1])))
    with pytest.raises(InputError, match="no parameters"):
        imu.parameter_importance(nn.Flatten(), (torch.randn(2, D), torch.tensor([0, 1])))
    model.register_parameter("q", nn.Parameter(torch.ones(2, dtype=torch.int8), False))
    with pytest.raises(InputError, match=r"q is torch\.int8"):
        imu.parameter_importance(model, (torch.randn(2, D), torch.tensor([0, 1])))
    bad = nn.Sequential(nn.Linear(D, C), nn.Linear(C, C))
    nn.init.constant_(bad[0].weight, 1e25)
    with pytest.raises(InputError, match="not finite"):
        imu.parameter_importance(bad, (torch.randn(2, D) * 1e14, torch.tensor([0, 1])))


def test_one_backward_pass_a_batch_once_tested(monkeypatch):
    passes = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(1) or grad(*a, **k))
    n = 16 * 10
    x, y = torch.randn(n, D), torch.randint(C, (n,))
    model = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, C))
    imu.parameter_importance(model, list(zip(x.split(16), y.split(16), strict=True)))
    assert len(passes) == 10 + 2  # batches 0 and 8 are tested


def test_the_matrix_of_a_batch_is_never_held():
    """No tensor is larger than the weights, of which the matrix would have 64."""
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    x, y = torch.randn(64, 256), torch.randint(256, (64,))
    weights = sum(p.nbytes for p in model.parameters())
    biggest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                biggest.append(out.untyped_storage().nbytes())
            return out

    with Watch():
        imu.parameter_importance(model, (x, y))
    assert max(biggest) <= weights
