"""Activation checkpointing of either kind changes no number; what cannot follow it says so."""

from __future__ import annotations

import copy

import per_sample
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import imu_fast as imu

KINDS = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


class Model(nn.Module):
    """Two blocks that are checkpointed, or not; reentrant=None: not."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.fc, self.reentrant = nn.Linear(6, 4), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        for block in (self.a, self.b):
            if self.reentrant is None:
                x = block(x).tanh()
            else:
                x = checkpoint(lambda h, f=block: f(h).tanh(), x, use_reentrant=self.reentrant)
        return self.fc(x)


def _data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(9, 5).double(), torch.arange(9) % 4


@KINDS
@pytest.mark.parametrize("layer", ["stem", "a", "b", "fc"])
def test_scores_are_those_of_the_model_without_checkpoints(layer: str, reentrant: bool) -> None:
    x, y = _data()
    truth = per_sample.sample_gradients(
        Model(None),
        zip(x[:, None], y[:, None], strict=True),
        [f"{layer}.weight", f"{layer}.bias"],
        lambda m, sample: cross_entropy(m(sample[0]), sample[1]),
    )
    model = Model(reentrant).double()
    found = imu.influence_scores(model, (x, y), layers=layer)
    per_sample.assert_scores(found, per_sample.scores(truth), 1e-12)


@KINDS
@pytest.mark.parametrize("fisher", ["exact", "sampled"])
def test_signals_are_those_of_the_model_without_checkpoints(fisher: str, reentrant: bool) -> None:
    found = [
        imu.influence_scores(
            imu.capture(Model(kind).double(), _data(), layers=["a", "b"], fisher=fisher),
            curvature="ggn",
            damping=1e-2,
        )
        for kind in (None, reentrant)
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)


@KINDS
def test_a_network_is_ascended_as_without_checkpoints(reentrant: bool) -> None:
    found = []
    for kind in (None, reentrant):
        found.append(Model(kind).double())
        imu.unlearn(found[-1], _data(), "imu", scope="all", scored="trained", epochs=3, lr=0.05)
    for plain, ours in zip(found[0].parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)


@KINDS
def test_live_weights_are_those_of_the_model_without_checkpoints(reentrant: bool) -> None:
    x, y = _data()
    found = []
    for kind in (None, reentrant):
        model = Model(kind).double()
        with imu.live_weights(model, ["a", "b"]) as weigh:
            logits = model(x)
        found.append(weigh(logits, y))
        (found[-1] * cross_entropy(logits, y, reduction="none")).sum().backward()
        found.append(copy.deepcopy(model.a.weight.grad))
    torch.testing.assert_close(found[2:], found[:2], rtol=1e-12, atol=0)


@KINDS
@pytest.mark.parametrize("batch", [1, 9])
def test_importance_of_a_checkpointed_model_is_refused(reentrant: bool, batch: int) -> None:
    x, y = _data()
    with pytest.raises(imu.InputError, match=r"torch\.utils\.checkpoint.*switch that off"):
        imu.parameter_importance(Model(reentrant).double(), [(x[:batch], y[:batch])])


def test_torchs_own_kind_is_back_afterwards() -> None:
    own = torch.utils.checkpoint.CheckpointFunction
    imu.influence_scores(Model(True).double(), _data(), layers="a")
    with pytest.raises(imu.InputError):
        imu.influence_scores(Model(True).double(), [], layers="a")
    assert torch.utils.checkpoint.CheckpointFunction is own
