"""The margin edit's quadratic program on trained heads, two threads: seconds, gap and what flipped.

Floor: the Gram matrix of the whitened features takes ``count^2 D`` multiply-adds, and one Cholesky
factor of the active constraints ``count^3 / 3``.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from imu_fast.unlearning.edit.program import smallest_edit as margin_edit

pytestmark = pytest.mark.usefixtures("two_threads")

CLASSES = 10


def trained_head(n, d):
    """Rectified features of overlapping clusters, and a head trained on them: [C, D]."""
    torch.manual_seed(0)
    y = torch.arange(n) % CLASSES
    centres = torch.randn(CLASSES, d)
    x = (0.5 * centres[y] + torch.randn(n, d)).relu()
    head = nn.Linear(d, CLASSES)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(x), y).backward()
        optimizer.step()
    return x, y, torch.cat([head.weight, head.bias[:, None]], dim=1).detach()


@pytest.mark.parametrize("share", [0.5, 1.0], ids=["half", "all"])
@pytest.mark.parametrize(("n", "d"), [(500, 512), (1000, 128), (5000, 512)])
def test_margin_edit(benchmark, n, d, share):
    x, y, theta = trained_head(n, d)
    count = int(share * n)
    edit = margin_edit(x, y, theta, True, count=count)
    edited = theta + edit.step
    logits = x @ edited[:, :d].T + edited[:, d]
    # No timing on a red gate: everything chosen has lost its label.
    assert not bool((logits.argmax(dim=1) == y)[edit.chosen].any())
    benchmark.group = "margin edit, two threads"
    flops = 2 * count**2 * (d + 1) + count**3 // 3
    benchmark.extra_info.update(role="imu_fast", samples=n, flops=flops, threads=2, gap=edit.gap)
    rounds = 5 if n <= 1000 else 2
    benchmark.pedantic(
        lambda: margin_edit(x, y, theta, True, count=count), rounds=rounds, iterations=1
    )
