"""Optimizers that cannot train what they are given are refused by name, before the work."""

from __future__ import annotations

import copy

import every_option
import pytest
import torch

import imu_fast as imu

PROBLEM = every_option.problems()["random"]


class NeedsRows(torch.optim.SGD):
    """Which takes no small tensors."""

    def step(self, closure=None):
        for group in self.param_groups:
            if any(len(p) < 3 for p in group["params"]):
                raise RuntimeError("too small")
        return super().step(closure)


class FailsToStep(torch.optim.SGD):
    def step(self, closure=None):
        raise KeyError("slots")


def impossible(tensors):
    raise LookupError("no such optimizer")


SCOPES = {"head": {}, "all": {"scope": "all"}, "layers": {"scope": "layers", "layers": ["fc1"]}}
REFUSED = {
    "sparse": (torch.optim.SparseAdam, "head", "SparseAdam.*does not support dense gradients"),
    "sparse, all": (torch.optim.SparseAdam, "all", "SparseAdam.*does not support dense"),
    "of a rate": (lambda ts: torch.optim.Adam(ts, lr=-1.0), "head", "<lambda>.*Invalid learning"),
    "without a step": (FailsToStep, "layers", "FailsToStep.*KeyError"),
    "none": (impossible, "head", "impossible.*LookupError: no such optimizer"),
}
if hasattr(torch.optim, "Muon"):
    REFUSED |= {
        "of matrices, all": (torch.optim.Muon, "all", "Muon.*only supports 2D"),
        "of matrices, layers": (torch.optim.Muon, "layers", "Muon.*only supports 2D"),
    }


def forget(make, scope, **options):
    rate = {} if make.__name__ in ("<lambda>", "impossible") else {"lr": 0.01}
    options = {"epochs": 1, **SCOPES[scope], **rate, **options}
    model = copy.deepcopy(PROBLEM.model)
    return imu.unlearn(model, PROBLEM.data, optimizer=make, inplace=False, **options)


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused_by_name(case, monkeypatch):
    make, scope, said = case

    def scored(*_):
        raise AssertionError("scored before the optimizer was tried")

    monkeypatch.setattr("imu_fast.unlearning.ascent.run.Run.ascend", scored)
    with pytest.raises(imu.InputError, match=f"^optimizer={said}.*use one that can"):
        forget(make, scope)


def test_trying_leaves_no_trace(monkeypatch):
    """Neither in the random numbers that an optimizer draws, nor in its state."""

    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.add_(torch.randn_like(p), alpha=0.1)
            return super().step(closure)

    def made(tensors):
        optimizer = Noisy(tensors, lr=0.01, momentum=0.9)
        optimizers.append(optimizer)
        return optimizer

    optimizers = []
    result = forget(made, "head", lr=None, epochs=2)
    assert result.steps == 2 and len(optimizers) == 2
    assert forget(NeedsRows, "head").steps == 1
    again = forget(made, "head", lr=None, epochs=2)
    assert torch.equal(result.model.fc2.weight, again.model.fc2.weight)
    monkeypatch.setattr("imu_fast.unlearning.ascent.optimizer.Custom._try", lambda *_: None)
    untried = forget(made, "head", lr=None, epochs=2)
    assert torch.equal(result.model.fc2.weight, untried.model.fc2.weight)


def test_a_scheduler_may_be_in_it():
    """It wraps the optimizer's step, which has no other signature for that."""

    def scheduled(tensors):
        optimizer = torch.optim.SGD(tensors, lr=0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        optimizer.register_step_post_hook(lambda *_: scheduler.step())
        return optimizer

    class Halved(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.param_groups[0]["lr"] *= 0.5

    options = dict(lr=None, epochs=3)
    found = forget(scheduled, "head", **options).model
    wanted = forget(lambda ts: Halved(ts, lr=0.05, momentum=0.9), "head", **options).model
    assert torch.equal(found.fc2.weight, wanted.fc2.weight)
