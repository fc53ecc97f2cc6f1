"""Influence in a training loop of your own: the weights of a batch in one line, or a loss module.

python examples/plain_loop.py
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import imu_fast as imu


def main() -> None:
    torch.manual_seed(0)
    y = torch.arange(200) % 4
    x = 2 * torch.randn(4, 8)[y] + torch.randn(200, 8)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    forget = DataLoader(TensorDataset(x[y == 1], y[y == 1]), batch_size=16, shuffle=True)
    other = copy.deepcopy(model)

    # The weights in one line: of any model, head and layers; the step under way is undisturbed.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for batch in forget:
        weights = imu.batch_weights(model, batch)
        losses = cross_entropy(model(batch[0]), batch[1], reduction="none")
        loss = -(weights * losses).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # A loss module: the weights come from the forward pass that is made anyway.
    body, head = other[:-1], other[-1]
    criterion = imu.InfluenceWeightedLoss(head)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.02)
    for inputs, labels in forget:
        optimizer.zero_grad()
        criterion(body(inputs), labels).backward()
        optimizer.step()

    for name, one in (("batch_weights", model), ("InfluenceWeightedLoss", other)):
        right = one(x).argmax(1) == y
        forgotten, kept = (float(right[rows].float().mean()) for rows in (y == 1, y != 1))
        print(f"{name}: forget accuracy {forgotten:.2f}, retain {kept:.2f}")
        assert forgotten < 1


if __name__ == "__main__":
    main()
