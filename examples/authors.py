"""A script of the authors of IMU (arXiv 2508.01620) with one changed import line.

    python examples/authors.py

Their ``main_random.py`` calls ``unlearn.get_unlearn_method("IMU")(data_loaders, model, criterion,
args)``; the import is what changes.
"""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

# from unlearn.IMU import IMU, compute_fisher_matrix_from_dataset, compute_influence_weights
from imu_fast.integrations.authors.classification import (
    IMU,
    compute_fisher_matrix_from_dataset,
    compute_influence_weights,
)


class Net(nn.Module):
    """Ends in ``fc``, which their code looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Sequential(nn.Linear(8, 32), nn.ReLU()), nn.Linear(32, 4)

    def forward(self, x):
        return self.fc(self.body(x))


def main() -> None:
    torch.manual_seed(0)
    y = torch.arange(200) % 4
    x = 2 * torch.randn(4, 8)[y] + torch.randn(200, 8)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    forget, retain = (TensorDataset(x[rows], y[rows]) for rows in (y == 1, y != 1))
    loaders = OrderedDict(forget=DataLoader(forget, 16), retain=DataLoader(retain, 16))
    args = SimpleNamespace(
        unlearn_lr=0.1,
        unlearn_epochs=5,
        alpha=0.001,
        top_data=0.5,
        batch_size=16,
        decreasing_lr="91,136",
        gpu=0,
    )
    collate = loaders["forget"].collate_fn
    inverse = compute_fisher_matrix_from_dataset(model, forget, collate, gpu=args.gpu)
    scores = compute_influence_weights(model, inverse, forget, collate)
    print(f"scores of {len(scores)} samples, {int((scores < 0).sum())} of them negative")

    def accuracy(data):
        inputs, labels = data.tensors
        return float((model(inputs).argmax(1) == labels).float().mean())

    print(f"before: forget {accuracy(forget):.2f}, retain {accuracy(retain):.2f}")
    IMU(loaders, model, nn.CrossEntropyLoss(), args)
    print(f"after:  forget {accuracy(forget):.2f}, retain {accuracy(retain):.2f}")
    assert accuracy(forget) < 0.1


if __name__ == "__main__":
    main()
