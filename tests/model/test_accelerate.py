"""Loaders and models that accelerate has prepared, by accelerate itself."""

from __future__ import annotations

import logging

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import imu_fast as imu

N = 21
FORMS = {
    "plain": {},
    "split": {"split_batches": True},
    "dispatched": {"dispatch_batches": True},
    "seedable": {"use_seedable_sampler": True},
    "stateless": {"use_stateful_dataloader": False, "even_batches": False},
}


@pytest.fixture
def accelerator():
    """What makes one, with its settings, which are of the process otherwise."""

    def reset():
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()

    def make(mixed_precision="no", **loading):
        reset()
        configuration = DataLoaderConfiguration(**loading)
        return Accelerator(
            cpu=True, mixed_precision=mixed_precision, dataloader_config=configuration
        )

    yield make
    reset()


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return model, torch.randn(N, 6), torch.randint(3, (N,))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_prepared_loaders(accelerator, problem, caplog, form, shuffle):
    model, x, y = problem
    expected = imu.influence_scores(model, (x, y))
    data = TensorDataset(x, y)
    for door in ("scores", "unlearn"):
        loader = accelerator(**FORMS[form]).prepare(DataLoader(data, 4, shuffle=shuffle))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "imu_fast"):
            if door == "scores":
                found = imu.influence_scores(model, loader)
            else:
                found = imu.unlearn(model, loader, epochs=1, inplace=False).scores
        assert ("shuffles" in caplog.text) == shuffle
        if shuffle:  # in the order that was given, which is no other's
            assert not torch.allclose(found, expected)
            found, wanted = found.sort().values, expected.sort().values
        else:
            wanted = expected
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_prepared_model_in_mixed_precision_is_reported_as_it_is(accelerator, problem):
    """Its forward has an autocast of its own: what is measured on cached features allows for it."""
    model, x, y = problem
    expected = imu.influence_scores(model, (x, y))
    model = accelerator(mixed_precision="bf16").prepare(model)
    scores = imu.influence_scores(model, (x, y))
    torch.testing.assert_close(scores, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
    assert not torch.equal(scores, expected), "it does compute in half precision"
    for scope in ("head", "layers", "all"):
        result = imu.unlearn(model, (x, y), epochs=3, lr=0.05, scope=scope, inplace=False)
        own = imu.evaluate(result.model, (x, y))
        assert result.trajectory[-1]["forget_loss"] == pytest.approx(own["loss"], abs=1e-6)
        assert result.trajectory[0]["forget_loss"] < own["loss"]
