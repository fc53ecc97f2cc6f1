"""Inner layers by definition: dense float64 matrices over each, built by autograd alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Three linear layers, one without a bias."""

    def __init__(self, outputs=3):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5, bias=False), nn.Linear(5, outputs)

    def forward(self, x):
        return self.c(F.gelu(self.b(torch.tanh(self.a(x)))))


class Attention(nn.Module):
    """A causal transformer block over tokens: rows of a sample meet before the loss."""

    def __init__(self, vocabulary=5, width=4):
        super().__init__()
        self.emb = nn.Embedding(vocabulary, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.up, self.fc = nn.Linear(width, 6), nn.Linear(6, vocabulary)

    def forward(self, ids):
        x = self.emb(ids)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        mask = torch.full((x.shape[1],) * 2, float("-inf"), dtype=x.dtype).triu(1)
        mixed = torch.softmax(q @ k.mT / 2 + mask, dim=-1) @ v
        return self.fc(F.gelu(self.up(x + self.out(mixed))))


class Convolutional(nn.Module):
    """A convolution, whose positions are rows, and a head."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 3, 2, stride=2), nn.Linear(12, 3)

    def forward(self, x):
        return self.fc(torch.tanh(self.conv(x)).flatten(1))


@dataclass
class Dense:
    """Of one layer: the undamped Gauss-Newton matrix [P, P] in the order of [C, D], and K-FAC's."""

    ggn: torch.Tensor
    b: torch.Tensor
    a: torch.Tensor

    @property
    def kfac(self):
        return torch.kron(self.b, self.a)

    @property
    def blocks(self):
        width = len(self.a)
        return self.ggn * torch.block_diag(*[torch.ones(width, width).double()] * len(self.b))


def rows_of(module, x):
    """The layer's input as rows [R, d]."""
    if isinstance(module, nn.Conv2d):
        return F.unfold(x, module.kernel_size, stride=module.stride)[0].T
    return x.reshape(-1, x.shape[-1])


def dense(model, name, samples, loss):
    """By Jacobians of each sample's logits in the layer's output, row by row.

    Args:
        samples: pairs of one input [1, ...] and its labels. loss: of a sample's logits, labels.
    """
    model = copy.deepcopy(model).double().eval()
    module = model.get_submodule(name)
    classes = module.weight.shape[0]
    width = module.weight[0].numel() + (module.bias is not None)
    found = Dense(*(torch.zeros(k, k).double() for k in (classes * width, classes, width)))
    for x, y in samples:
        x = x.double() if x.is_floating_point() else x
        seen = {}

        def logits(shift, seen=seen, x=x):
            def hook(_, inputs, output):
                seen["act"] = rows_of(module, inputs[0].detach())
                by_row = output.flatten(2).mT if isinstance(module, nn.Conv2d) else output
                moved = by_row.reshape(-1, classes) + shift
                if isinstance(module, nn.Conv2d):
                    return moved.T.reshape(output.shape)
                return moved.view(output.shape)

            handle = module.register_forward_hook(hook)
            try:
                return model(x)[0]
            finally:
                handle.remove()

        logits(torch.zeros(1, classes).double())
        act = seen["act"]
        zero = torch.zeros(len(act), classes).double()
        j = torch.autograd.functional.jacobian(logits, zero)  # [..., C, R, classes]
        j = j.reshape(-1, len(act), classes)
        z = logits(zero).detach()
        h = torch.autograd.functional.hessian(lambda z, y=y: loss(z, y), z)
        h = h.reshape(z.numel(), z.numel())
        wide = torch.cat([act, torch.ones(len(act), width - act.shape[1]).double()], dim=1)
        whole = torch.einsum("orc,rd->ocd", j, wide).flatten(1)
        found.ggn += whole.T @ h @ whole / len(samples)
        found.b += torch.einsum("orc,op,pre->ce", j, h, j) / len(samples)
        alive = wide[(h.abs().sum(0) @ j.abs().sum(2)) != 0]
        found.a += alive.T @ alive / len(alive) / len(samples)
    return found
