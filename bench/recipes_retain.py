"""What forgets with retain data, for scale: ``python bench/recipes_retain.py --data FILE.npz``.

Each changes the whole network in a few epochs of SGD. Their constants are those with the smallest
average gap on the development models of ``recipes.py``, over this grid, which the command goes
through; random samples and classes have each their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from recipes_models import WEIGHT_DECAY, Models, Problem
from torch import Tensor, nn

EPOCHS = 3
GRID: dict[str, list[dict[str, float]]] = {
    "fine-tuning": [{"lr": lr} for lr in (0.005, 0.02, 0.05)],
    "l1-sparse": [{"lr": lr, "gamma": g} for lr in (0.005, 0.02) for g in (1e-4, 5e-4)],
    "salun": [{"lr": lr, "share": share} for lr in (0.005, 0.02) for share in (0.3, 0.5)],
    "scrub": [{"lr": lr, "ascents": m} for lr in (0.002, 0.005, 0.02) for m in (1, 2)],
}


def _batches(samples: tuple[Tensor, Tensor], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch of 64 samples at a time; the last, smaller batch is left out where there is more."""
    x, y = samples
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    for rows in order.split(64)[: max(1, len(x) // 64)]:
        yield x[rows], y[rows]


def _start(problem: Problem, lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = copy.deepcopy(problem.model).train()
    return model, torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=WEIGHT_DECAY)


def fine_tuned(problem: Problem, lr: float, gamma: float = 0.0) -> nn.Module:
    """A few more epochs on retain data; gamma: of an L1 norm that decays to zero over them.

    The second is the L1-sparse unlearning of Jia et al. 2023.
    """
    model, optimizer = _start(problem, lr)
    for epoch in range(EPOCHS):
        for x, y in _batches(problem.task.retain, problem.models.seed + epoch):
            loss = nn.functional.cross_entropy(model(x), y)
            if gamma:
                norm = torch.stack([p.abs().sum() for p in model.parameters()]).sum()
                loss = loss + gamma * (1 - epoch / EPOCHS) * norm
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def salun(problem: Problem, lr: float, share: float) -> nn.Module:
    """Random labels on forget, own on retain data, of the most salient weights (Fan et al. 2024).

    Args:
        share: of the weights that move: those with the largest gradient of the forget loss.
    """
    model, optimizer = _start(problem, lr)
    x, y = problem.task.forget
    loss = nn.functional.cross_entropy(problem.model(x), y)
    gradients = torch.autograd.grad(loss, list(problem.model.parameters()))
    every = torch.cat([g.abs().flatten() for g in gradients])
    line = every.kthvalue(max(1, round((1 - share) * len(every)))).values
    kept = [g.abs() >= line for g in gradients]
    start = [p.detach().clone() for p in model.parameters()]
    generator = torch.Generator().manual_seed(problem.models.seed)
    wrong = (y + torch.randint(1, problem.models.data.classes, y.shape, generator=generator)) % 10
    mixed = (torch.cat([x, problem.task.retain[0]]), torch.cat([wrong, problem.task.retain[1]]))
    for epoch in range(EPOCHS):
        for some, labels in _batches(mixed, problem.models.seed + epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(some), labels).backward()
            optimizer.step()
            with torch.no_grad():
                for p, mask, before in zip(model.parameters(), kept, start, strict=True):
                    p.copy_(torch.where(mask, p, before))
    return model.eval()


def scrub(problem: Problem, lr: float, ascents: int) -> nn.Module:
    """Away from the teacher on forget data, towards it on retain data (Kurmanji et al. 2023).

    Args:
        ascents: of the epochs, the first so many go away as well.
    """
    model, optimizer = _start(problem, lr)
    teacher = problem.model

    def divergence(x: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = teacher(x).log_softmax(dim=1)
        ours = model(x).log_softmax(dim=1)
        return nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")

    for epoch in range(EPOCHS):
        seed = problem.models.seed + epoch
        if epoch < ascents:
            for x, _ in _batches(problem.task.forget, seed):
                optimizer.zero_grad()
                (-divergence(x)).backward()
                optimizer.step()
        for x, y in _batches(problem.task.retain, seed):
            optimizer.zero_grad()
            loss = 0.99 * nn.functional.cross_entropy(model(x), y) + 0.001 * divergence(x)
            loss.backward()
            optimizer.step()
    return model.eval()


# The smallest gap of the grid, by kind of task.
CHOSEN: dict[str, dict[str, dict[str, float]]] = {
    "fine-tuning": {"random": {"lr": 0.05}, "class": {"lr": 0.05}},
    "l1-sparse": {"random": {"lr": 0.02, "gamma": 5e-4}, "class": {"lr": 0.02, "gamma": 5e-4}},
    "salun": {"random": {"lr": 0.02, "share": 0.5}, "class": {"lr": 0.02, "share": 0.3}},
    "scrub": {"random": {"lr": 0.02, "ascents": 2}, "class": {"lr": 0.005, "ascents": 2}},
}


def chosen(name: str, kind: str) -> dict[str, float]:
    """The constants of a method for "random" or "class"."""
    return CHOSEN[name][kind]


METHODS: dict[str, Callable[..., nn.Module]] = {
    "fine-tuning": fine_tuned,
    "l1-sparse": fine_tuned,
    "salun": salun,
    "scrub": scrub,
}


def main(
    data: Annotated[Path, typer.Option(help="CIFAR-10 as an .npz of JPEG files")],
    cache: Annotated[Path, typer.Option(help="folder of trained models")] = Path("recipes-cache"),
) -> None:
    """The grid, on the development models of CIFAR-10."""
    import recipes

    torch.set_num_threads(1)
    seeds, classes = recipes.PARTS["development"]
    gaps: dict[tuple[str, str, str], list[float]] = {}
    for seed in seeds:
        models = Models("cifar10", data, cache, seed)
        for task in (*recipes.RANDOM, *classes):
            problem = Problem.of(models, task)
            yardstick = recipes.Yardstick(problem)
            for name, grid in GRID.items():
                for given in grid:
                    row = yardstick.row(recipes.seen(METHODS[name](problem, **given), problem))
                    cell: tuple[str, str, Any] = (name, problem.task.kind, str(given))
                    gaps.setdefault(cell, []).append(row["gap"])
    for (name, kind, given), found in sorted(gaps.items()):
        print(f"{name:12} {kind:7} {given:40} {100 * sum(found) / len(found):.2f}")


if __name__ == "__main__":
    typer.run(main)
