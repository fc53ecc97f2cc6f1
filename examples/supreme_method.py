"""imu_fast among the unlearning methods of supreme-unlearning.

    pip install supreme-unlearning
    python examples/supreme_method.py

Registers the method and calls it as supreme's pipeline does; its command line then takes
``-method imu_fast``.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import torch
from supreme.registry import resolve_method_location
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from imu_fast.integrations.supreme import register


def main() -> None:
    register()
    module, name = resolve_method_location("imu_fast")
    print(f"supreme finds {module}:{name}")
    method = getattr(import_module(module), name)

    torch.manual_seed(0)
    y = torch.arange(200) % 4
    x = 2 * torch.randn(4, 8)[y] + torch.randn(200, 8)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    # Its batches: images, subclasses (none here), classes.
    class_1 = TensorDataset(x[y == 1], torch.empty(50, 0), y[y == 1])
    forget = DataLoader(class_1, batch_size=16)
    model = method(
        fabric=SimpleNamespace(world_size=1),
        num_gpus=0,
        wandb_logging_flag=False,
        type_of_unlearning_strategy="fullclass",
        model=model,
        model_name="mlp",
        forget_train_dataloader=forget,
        num_labels=4,
    )
    right = model(x).argmax(1) == y
    forgotten, kept = (float(right[rows].float().mean()) for rows in (y == 1, y != 1))
    print(f"forget accuracy {forgotten:.2f}, retain {kept:.2f}")
    assert forgotten == 0


if __name__ == "__main__":
    main()
