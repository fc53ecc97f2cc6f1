"""What ``layers=`` says of parameters that have no factors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import imu_fast as imu
from imu_fast.errors import NoHeadFoundError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.norm, self.fc = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.mix, self.gain = nn.Conv1d(8, 8, 1, groups=2), nn.Parameter(torch.ones(8))
        self.drop = nn.Dropout()

    def forward(self, ids):
        return self.fc(self.norm(self.mix(self.wte(ids).mT).mT).mean(1) * self.gain)


@pytest.mark.parametrize("entry", ["wte", "norm", "gain", "norm.weight", "fc.bias"])
def test_parameters_without_factors_are_sent_to_their_importance(entry):
    model, data = Net(), (torch.randint(11, (6, 4)), torch.randint(3, (6,)))
    for layers in (entry, [entry, "fc"]):
        with pytest.raises(NoHeadFoundError, match=r"linear layer.*imu\.parameter_importance"):
            imu.influence_scores(model, data, layers=layers)
    if entry == "norm":
        with pytest.raises(NoHeadFoundError, match=r"imu\.parameter_importance"):
            imu.influence_scores(model, data, layers=model.norm)
    assert imu.parameter_importance(model, data).keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("entry", ["drop", "nothing"])
def test_what_has_no_parameters_is_not(entry):
    data = (torch.randint(11, (6, 4)), torch.randint(3, (6,)))
    with pytest.raises(NoHeadFoundError) as refusal:
        imu.influence_scores(Net(), data, layers=entry)
    assert "parameter_importance" not in str(refusal.value)
