"""Random samples are forgotten as deep as data that the model never saw, and the model is saved.

python examples/forget_samples.py [FILE]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import imu_fast as imu


def main(path: Path) -> None:
    torch.manual_seed(0)
    y = torch.arange(400) % 4
    x = torch.randn(4, 20)[y] + 1.5 * torch.randn(400, 20)
    train, unseen = (x[:300], y[:300]), (x[300:], y[300:])
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train[0]), train[1]).backward()
        optimizer.step()

    rows = torch.zeros(300, dtype=torch.bool)
    rows[torch.randperm(300)[:30]] = True
    sets = {
        "forget": (train[0][rows], train[1][rows]),
        "kept": (train[0][~rows], train[1][~rows]),
        "unseen": unseen,
    }
    before = {name: imu.evaluate(model, data)["accuracy"] for name, data in sets.items()}
    result = imu.unlearn(model, sets["forget"], "auto", unseen=unseen, task="samples")
    print(result)
    for name, data in sets.items():
        print(f"{name}: accuracy {before[name]:.3f} -> {imu.evaluate(model, data)['accuracy']:.3f}")
    assert result.reached

    torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path))
    print(f"saved to {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp() + "/forgotten.pt"))
