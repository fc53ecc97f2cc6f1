"""A network whose batch norm torch's CPU backward gets wrong for one sample alone."""

from __future__ import annotations

import torch
from torch import nn


class Patches(nn.Module):
    """The gradient that comes back to the norm is a slice, turned: its strides are odd."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.token, self.fc = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 3)

    def forward(self, x):
        h = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        return self.fc(torch.cat([self.token.expand(len(x), -1, -1), h], 1).tanh().mean(1))
