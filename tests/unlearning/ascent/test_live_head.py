"""Scores of the step's own forward pass are those of a capture, however a head's rows lie."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

import imu_fast as imu
from imu_fast.unlearning.ascent.network import NetworkSteps

N, D, H, C = 12, 6, 8, 5


class Pixels(nn.Module):
    """A class for each pixel: [n, C, h, w]."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Conv2d(2, H, 3, padding=1), nn.Conv2d(H, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).relu())


class PositionsFirst(nn.Module):
    """A head on [T, n, d], as recurrent layers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.GRU(D, H), nn.Linear(H, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x.transpose(0, 1))[0]).transpose(0, 1)


class Classifier(nn.Module):
    """Its head's input comes by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(D, H), nn.Linear(H, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(input=self.body(x).relu())


def _images() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 2, 4, 3), torch.randint(C, (N, 4, 3))


def _sequences() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 5, D), torch.randint(C, (5, 5))


def _samples() -> tuple[Tensor, Tensor]:
    return torch.randn(N, D), torch.randint(C, (N,))


CASES = {
    "pixels": (Pixels, _images, {"output": lambda z: z.movedim(1, -1)}),
    "positions first": (PositionsFirst, _sequences, {"shift": False}),
    "by keyword": (Classifier, _samples, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_that_of_captured_scores(case: str, monkeypatch, caplog) -> None:
    make, data, reading = CASES[case]
    torch.manual_seed(0)
    one, batch = make(), data()
    other = copy.deepcopy(one)
    options = {"scope": "all", "reweight": "batch", "batch_size": 5, "epochs": 2, "lr": 0.05}
    options |= {"on_empty": "uniform", **reading}
    with caplog.at_level(logging.INFO, "imu_fast"):
        imu.unlearn(one, [batch], "imu", **options)
    live = "forward pass of their own" not in caplog.text
    assert live == (case == "by keyword")
    monkeypatch.setattr(NetworkSteps, "seen", lambda self, rows, layers: self.subject)
    imu.unlearn(other, [batch], "imu", **options)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
