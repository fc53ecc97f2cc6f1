"""What the doors cost beside what a careful user would write: ``python bench/doors.py``.

A door finds the head and checks it, reads any form of batch, restores the model; by hand one knows
the head, hooks it, runs the model and calls the same operations. Both in turn, the least of nine,
one thread; then the ratio. Checks are for the most part of the first batches, so a run of one batch
shows them at their dearest. ``layers=`` is beside a hand-written pass with hooks and one backward
pass; ``unlearn`` beside a loop of torch's SGD on features that are at hand, which measures the
forget set after every epoch, as ours does, but not the model itself at the end, as ours does too.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import imu_fast as imu

ROUNDS = 9


def least(*functions: Callable[[], Any]) -> list[float]:
    """Milliseconds of each, run in turn."""
    found = [float("inf")] * len(functions)
    for function in functions:
        function()
    for _ in range(ROUNDS):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            found[i] = min(found[i], 1e3 * (time.perf_counter() - start))
    return found


def hooked(model: nn.Module, head: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    """Scores by hand: one forward pass with a hook on a head that is known."""
    kept: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        model(x)
    handle.remove()
    return imu.influence_scores(
        imu.GradientFactors.from_head(kept[0], head.weight, head.bias, y), damping=1e-2
    )


def hooked_layers(
    model: nn.Module, layers: list[nn.Linear], batches: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Scores of several layers by hand: hooks, one backward pass of the summed losses."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    kept: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

    def keep(layer: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
        seen[layer] = inputs[0].detach(), out

    handles = [layer.register_forward_hook(keep) for layer in layers]
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
        deltas = torch.autograd.grad(loss, [seen[layer][1] for layer in layers])
        for layer, delta in zip(layers, deltas, strict=True):
            kept[layer].append((delta, seen[layer][0]))
    for handle in handles:
        handle.remove()
    offsets = torch.arange(sum(len(x) for x, _ in batches) + 1)
    return imu.influence_scores(
        [
            imu.GradientFactors(
                *(torch.cat(parts) for parts in zip(*kept[layer], strict=True)),
                offsets,
                layer.bias is not None,
            )
            for layer in layers
        ],
        damping=1e-2,
    )


def by_hand(features: Tensor, head: nn.Linear, y: Tensor, epochs: int, batch: int) -> None:
    """Uniform ascent of a head on features that are at hand, by torch's SGD."""
    weight, bias = (p.detach().clone().requires_grad_() for p in (head.weight, head.bias))
    optimizer = torch.optim.SGD([weight, bias], lr=1e-3, momentum=0.9, weight_decay=5e-4)
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(batch):
            optimizer.zero_grad()
            logits = nn.functional.linear(features[rows], weight, bias)
            (-nn.functional.cross_entropy(logits, y[rows])).backward()
            optimizer.step()
        with torch.no_grad():
            logits = nn.functional.linear(features, weight, bias)
            float(nn.functional.cross_entropy(logits, y))
            float((logits.argmax(dim=1) == y).double().mean())


def rows() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    torch.manual_seed(0)
    head = nn.Linear(512, 1000)
    x, y = torch.randn(256, 512), torch.randint(1000, (256,))
    body = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
    mlp = nn.Sequential(*body, nn.Linear(512, 10)).eval()
    labels = y % 10
    found: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "scores, bare head, n=256 C=1000 d=512": (
            lambda: imu.influence_scores(head, (x, y)),
            lambda: hooked(head, head, x, y),
        ),
        "scores, MLP 3 x 512, n=256 C=10": (
            lambda: imu.influence_scores(mlp, (x, labels)),
            lambda: hooked(mlp, mlp[4], x, labels),
        ),
        "scores, its 3 layers": (
            lambda: imu.influence_scores(mlp, (x, labels), layers=["0", "2", "4"]),
            lambda: hooked_layers(mlp, [mlp[0], mlp[2], mlp[4]], [(x, labels)]),
        ),
        "scores, its 3 layers, 8 such batches": (
            lambda: imu.influence_scores(mlp, [(x, labels)] * 8, layers=["0", "2", "4"]),
            lambda: hooked_layers(mlp, [mlp[0], mlp[2], mlp[4]], [(x, labels)] * 8),
        ),
        "unlearn, bare head, 10 epochs of 8": (
            lambda: imu.unlearn(
                head, (x, y), "uniform", epochs=10, lr=1e-3, batch_size=32, inplace=False
            ),
            lambda: by_hand(x, head, y, 10, 32),
        ),
    }
    try:
        import torchvision
    except ImportError:
        return found
    resnet = torchvision.models.resnet18(weights=None).eval()
    images, classes = torch.randn(32, 3, 96, 96), torch.randint(1000, (32,))
    found["scores, ResNet-18, 32 of 96x96"] = (
        lambda: imu.influence_scores(resnet, [(images, classes)]),
        lambda: hooked(resnet, resnet.fc, images, classes),
    )
    return found


def main() -> None:
    torch.set_num_threads(1)
    print(
        f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}, ms"
    )
    print(f"{'':40} {'imu_fast':>9} {'by hand':>9} {'ratio':>6}")
    for name, (ours, theirs) in rows().items():
        mine, hand = least(ours, theirs)
        print(f"{name:40} {mine:9.1f} {hand:9.1f} {mine / hand:6.2f}")


if __name__ == "__main__":
    main()
