"""Small networks with BatchNorm that comparisons train from scratch, many times, on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from imu_fast.errors import check_choice

Samples = tuple[Tensor, Tensor]


def _convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, stride=stride)
        self.second = _convolution(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x).relu()) + self.shortcut(x)).relu()


class Classifier(nn.Module):
    """A backbone and a linear head ``fc``; feature width ``fc.in_features``."""

    def __init__(self, backbone: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.backbone, self.fc = backbone, nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x))


def resnet(channels: int, classes: int, width: int = 24) -> nn.Module:
    """Seven convolutions in three residual stages at half resolution; 4 * width features."""
    return Classifier(
        nn.Sequential(
            _convolution(channels, width, stride=2),
            nn.ReLU(),
            ResidualBlock(width, width, 1),
            ResidualBlock(width, 2 * width, 2),
            ResidualBlock(2 * width, 4 * width, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ),
        4 * width,
        classes,
    )


def vgg(channels: int, classes: int, width: int = 16) -> nn.Module:
    """Five plain convolutions, pooled, and a hidden layer of 128 features."""
    layers: list[nn.Module] = []
    stages = [(channels, width, False), (width, width, True), (width, 2 * width, False)]
    stages += [(2 * width, 2 * width, True), (2 * width, 4 * width, True)]
    for inputs, outputs, pool in stages:
        layers += [_convolution(inputs, outputs), nn.ReLU()]
        if pool:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
    hidden = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * width, 128), nn.ReLU()]
    return Classifier(nn.Sequential(*layers, *hidden), 128, classes)


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {"resnet": resnet, "vgg": vgg}


def train(
    arch: str,
    samples: Samples,
    classes: int,
    *,
    seed: int,
    epochs: int,
    lr: float = 0.1,
    batch_size: int = 128,
    mirror: bool = False,
) -> nn.Module:
    """Train a network of ``NETWORKS`` by SGD with a one-cycle learning rate; evaluation mode.

    The same seed, samples and thread count give the same weights.

    Args:
        samples: x [n, channels, height, width], y [n]. classes: C, whether all occur in y or not.
        lr: the peak of the cycle.
        mirror: flip each image with probability 1/2.
    """
    check_choice("arch", arch, NETWORKS)
    x, y = samples
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETWORKS[arch](x.shape[1], classes).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        # The last, smaller batch is dropped: a BatchNorm over a handful of samples is noise.
        steps = max(1, len(x) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(batch_size)[:steps]:
                optimizer.zero_grad()
                batch = x[rows].contiguous(memory_format=torch.channels_last)
                if mirror:
                    flipped = torch.rand(len(batch), 1, 1, 1) < 0.5
                    batch = torch.where(flipped, batch.flip(3), batch)
                nn.functional.cross_entropy(model(batch), y[rows]).backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def small_network() -> nn.Module:
    """A convolutional network with BatchNorm for 8x8 digits: 40,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 16, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train_small_network(samples: Samples, seed: int, epochs: int) -> nn.Module:
    """Train the small network; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = small_network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        x, y = samples
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
    return model.eval()
