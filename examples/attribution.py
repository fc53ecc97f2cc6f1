"""Which training samples made a prediction, and which of them are mislabelled.

python examples/attribution.py
"""

from __future__ import annotations

import torch
from torch import nn

import imu_fast as imu


def main() -> None:
    torch.manual_seed(0)
    y = torch.arange(300) % 4
    x = 1.5 * torch.randn(4, 16)[y] + torch.randn(300, 16)
    said = y.clone()
    wrong = torch.randperm(200)[:10]  # ten of the two hundred training labels
    said[wrong] = (y[wrong] + 1) % 4
    train, test = (x[:200], said[:200]), (x[200:], y[200:])
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train[0]), train[1]).backward()
        optimizer.step()

    # Captured once; "ggn" is the exact Hessian of the head's loss. A small damping trusts
    # directions that the data hardly has: compare some.
    factors, queries = imu.capture(model, train), imu.capture(model, test)
    exact = {"curvature": "ggn", "damping": 0.1}
    helpful = imu.top_influences(factors, queries, k=3, **exact)[1]
    harmful = imu.top_influences(factors, queries, k=3, by="harmful", **exact)[1]
    print(f"test sample 0, of class {int(test[1][0])}, is helped by {helpful[0].tolist()},")
    print(f"of classes {train[1][helpful[0]].tolist()}, and harmed by {harmful[0].tolist()}")
    same = float((train[1][helpful[:, 0]] == test[1]).float().mean())
    mislabelled = float(torch.isin(harmful[:, 0], wrong).float().mean())
    print(f"the most helpful is of the query's class for {same:.0%} of the test samples,")
    print(f"the most harmful has a wrong label for {mislabelled:.0%}")

    # A label that the others contradict pulls hard by itself.
    suspects = imu.self_influence(factors, **exact).topk(20).indices
    found = int(torch.isin(wrong, suspects).sum())
    print(f"among the 20 of most self-influence are {found} of the 10 wrong labels")
    assert same > 0.9 and mislabelled > 0.9 and found >= 8


if __name__ == "__main__":
    main()
