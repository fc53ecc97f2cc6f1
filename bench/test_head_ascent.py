"""head_ascent: one reweighted step with L1 and momentum, on a batch of cached features."""

from __future__ import annotations

import roofline
import suites
import torch
from torch.nn.functional import cross_entropy

from imu_fast import reference
from imu_fast.ops.head_ascent import head_ascent

# alpha small, so that the gate sees the gradient in the momentum buffer.
RATES = dict(lr=1e-2, momentum=0.9, weight_decay=5e-4, alpha=1e-5)


def make(problem):
    """Features [B, d] in the problem's dtype; theta [C, D] and its buffer in float32."""
    n, classes, d = (problem.sizes[name] for name in ("N", "C", "d"))
    weights = torch.linspace(0.1, 1, n, device=problem.device)
    theta = suites.randn(problem, classes, d + 1, dtype=torch.float32) / d**0.5
    y = suites.labels(problem, n, classes)
    return suites.randn(problem, n, d), y, weights, theta, torch.zeros_like(theta), True, "ce"


def ours(features, labels, weights, theta, buffer, *options):
    loss = head_ascent(features, labels, weights, theta, buffer, *options, **RATES)
    return theta, buffer, loss


def formula(features, labels, weights, theta, buffer, has_bias, name):
    act, share = reference.augment(features.float(), has_bias), weights / weights.sum()
    log_p = torch.log_softmax(act @ theta.T, dim=1)
    loss = (share * log_p.gather(1, labels[:, None])[:, 0]).sum()
    one_hot = torch.arange(len(theta), device=theta.device) == labels[:, None]
    step = ((log_p.exp() - one_hot.float()) * -share[:, None]).T @ act
    step = step + RATES["alpha"] * theta.sign() + RATES["weight_decay"] * theta
    buffer = RATES["momentum"] * buffer + step
    loss = loss + RATES["alpha"] * theta.abs().sum()
    return theta - RATES["lr"] * buffer, buffer, loss


def naive(features, labels, weights, theta, buffer, has_bias, name):
    """By autograd and torch.optim.SGD."""
    act, theta = reference.augment(features.float(), has_bias), theta.detach().requires_grad_()
    rates = {name: RATES[name] for name in ("lr", "momentum", "weight_decay")}
    optimizer = torch.optim.SGD([theta], **rates)
    optimizer.state[theta]["momentum_buffer"] = buffer
    loss = cross_entropy(act @ theta.T, labels, reduction="none")
    loss = -(weights * loss).sum() / weights.sum() + RATES["alpha"] * theta.abs().sum()
    loss.backward()
    optimizer.step()
    return theta.detach(), buffer, loss.detach()


def bare(features, labels, weights, theta, *_):
    act, weight = features.to(theta.dtype), theta[:, : features.shape[1]].contiguous()
    z, out = act.new_empty(len(act), len(theta)), torch.empty_like(weight)
    return lambda: torch.matmul(torch.matmul(act, weight.T, out=z).T, act, out=out)


SUITE = suites.Suite(
    "head_ascent",
    make,
    ours,
    lambda *operands: reference.head_ascent(*operands, **RATES),
    formula,
    naive,
    bare,
    roofline.head_ascent,
    small={"N": 19, "C": 7, "d": 13},
    in_place=True,
    calls=10,
)


@suites.problems(
    cpu=[{"N": 64, "C": 1_000, "d": 512}],
    cuda=[
        ("tf32", {"N": 256, "C": 1_000, "d": 2_048}),
        ("fp32", {"N": 256, "C": 1_000, "d": 2_048}),
        ("bf16", {"N": 4_096, "C": 1_000, "d": 2_048}),
    ],
)
def test_head_ascent(benchmark, problem, role):
    suites.measure(benchmark, SUITE, problem, role)
