"""A torchvision network forgets a class.

python examples/forget_class.py

The pictures are made here; with yours, ``model`` is what you trained, and the sets are DataLoaders.
"""

from __future__ import annotations

import torch
import torchvision
from torch.utils.data import DataLoader, TensorDataset

import imu_fast as imu


def main() -> None:
    torch.manual_seed(0)
    centres = torch.randn(4, 3, 8, 8).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    y = torch.arange(160) % 4
    x = centres[y] + torch.randn(160, 3, 32, 32)
    model = torchvision.models.resnet18(num_classes=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(6):
        for inputs, labels in DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    model.eval()

    forget = DataLoader(TensorDataset(x[y == 1], y[y == 1]), batch_size=32)
    kept = DataLoader(TensorDataset(x[y != 1], y[y != 1]), batch_size=32)
    before = imu.evaluate(model, kept)["accuracy"]
    result = imu.unlearn(model, forget, "auto")
    forgotten, after = (imu.evaluate(model, data)["accuracy"] for data in (forget, kept))
    print(result)
    print(f"forget accuracy {forgotten:.2f}; kept classes {before:.2f} -> {after:.2f}")
    assert result.reached and forgotten == 0


if __name__ == "__main__":
    main()
