"""What the fast path is compared with: the same scores, obtained as others obtain them.

Baselines are written to be fair: no needless copies, no Python work that their authors do not do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap


def per_sample_twice(model: nn.Module, head: nn.Linear, x: Tensor, y: Tensor, lam: float) -> Tensor:
    """The authors' procedure: one sample at a time through the whole network, twice over.

    The first sweep accumulates the Fisher diagonal and the mean gradient, the second one scores.
    """
    parameters = [head.weight, head.bias]

    def gradient(i: int) -> Tensor:
        loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    fisher = torch.zeros(sum(p.numel() for p in parameters))
    mean = torch.zeros_like(fisher)
    for i in range(len(x)):
        g = gradient(i)
        fisher += g * g / len(x)
        mean += g / len(x)
    direction = mean / (fisher + lam)
    return torch.stack([-(gradient(i) @ direction) for i in range(len(x))])


def vmap_grad(head: nn.Linear, features: Tensor, y: Tensor, lam: float) -> Tensor:
    """``torch.func.vmap(grad)`` at the head, on features that are already there."""
    parameters = {k: v.detach() for k, v in head.named_parameters()}

    def loss(p: dict[str, Tensor], a: Tensor, label: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(head, p, (a[None],)), label[None])

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, features, y)
    g = torch.cat([per_sample[k].flatten(1) for k in ("weight", "bias")], dim=1)
    direction = g.mean(dim=0) / (g.square().mean(dim=0) + lam)
    return -(g @ direction)


def matmul_seconds(flops: float) -> float:
    """Seconds that bare ``torch.matmul`` needs for this many FLOPs here: the compute floor."""
    from torch.utils.benchmark import Timer

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    timer = Timer("a @ b", globals={"a": a, "b": b})
    return flops / (2 * 1024**3) * min(timer.blocked_autorange(min_run_time=0.3).times)
