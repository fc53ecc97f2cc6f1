"""What a user's own ten lines cost beside ours, on one thread: ``python bench/rivals.py``.

Each row is one job: ours and its plain rival in turn in one process, CPU time, the median of the
rounds' ratios theirs / ours (below 1: we lose) and the interval that holds the median 19 times of
20, by order statistics; below six rounds their whole range. ``head``: ``unlearn(scope="head")`` on
cached features, with every check, the records of each epoch and the model's own measurement at the
end, beside a loop of autograd and torch.optim.SGD and one in closed form, which have none of these.
``ggn``: a fit and a solve by ``GGN()`` as it chooses, beside its cheapest forced preconditioner.
``kfac``: from features and labels to every sample's influence by K-FAC, beside the same in float32
throughout, by torch.linalg.eigh; each with the relative error of its scores, to float64 ones.

``python bench/rivals.py head --rounds 5 --seconds 10`` runs the rows whose name begins so; a row
ends early after so many seconds, but for its first three rounds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from problems import random_problem
from torch import Tensor, nn

import imu_fast as imu

EPOCHS, BATCH = 10, 256
RATES = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
# (n, d, C)
HEADS = [
    (64, 512, 10),
    (64, 512, 1_000),
    (500, 512, 10),
    (522, 512, 100),
    (5_000, 512, 10),
    (5_001, 130, 97),
    (50_000, 64, 10),
]
# (n, d, C, damping, right-hand sides)
SYSTEMS = [
    (522, 512, 10, 1e-4, 1),
    (522, 512, 10, 1e-2, 1),
    (522, 512, 10, 1e-4, 16),
    (130, 65, 3, 1e-2, 1),
    (2_000, 128, 97, 1e-2, 1),
]
# (n, d, C, damping)
VOCABULARIES = [(2_000, 128, 2_000, 1e-2), (2_000, 768, 2_000, 1e-4), (2_000, 1_024, 10, 1e-2)]
Job = Callable[[], object]


def autograd(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Plain gradient ascent, as anyone writes it."""
    optimizer = torch.optim.SGD(model.parameters(), **RATES)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            (-nn.functional.cross_entropy(model(x[rows]), y[rows])).backward()
            optimizer.step()


@torch.no_grad()
def closed_form(model: nn.Linear, x: Tensor, y: Tensor) -> None:
    """The same with the softmax's residual and one matrix product."""
    weight, bias = model.weight, model.bias
    moved = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            act = x[rows]
            p = torch.softmax(torch.addmm(bias, act, weight.t()), dim=1)
            p[torch.arange(len(rows)), y[rows]] -= 1
            p /= -len(rows)
            for parameter, buffer, g in zip(
                (weight, bias), moved, (p.t() @ act, p.sum(dim=0)), strict=True
            ):
                buffer.mul_(RATES["momentum"]).add_(g.add_(parameter, alpha=RATES["weight_decay"]))
                parameter.add_(buffer, alpha=-RATES["lr"])


def head_rows() -> Iterator[tuple[str, Job, Job]]:
    for n, d, classes in HEADS:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, d, generator=generator)
        y = torch.randint(classes, (n,), generator=generator)
        model = nn.Linear(d, classes)

        def ours(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> object:
            return imu.unlearn(copy.deepcopy(model), (x, y), "uniform", scope="head")

        for rival in (autograd, closed_form):

            def theirs(
                model: nn.Linear = model, x: Tensor = x, y: Tensor = y, rival: Callable = rival
            ) -> object:
                return rival(copy.deepcopy(model), x, y)

            yield f"head {rival.__name__} n={n} d={d} C={classes}", ours, theirs


def ggn_rows() -> Iterator[tuple[str, Job, Job]]:
    for n, d, classes, damping, many in SYSTEMS:
        factors = random_problem(n, d, classes).factors
        sides = torch.randn(many, classes, d + 1, generator=torch.Generator().manual_seed(1))

        def solve(factors=factors, sides=sides, damping=damping, **how: str) -> object:
            return imu.GGN(damping=damping, **how).fit(factors).solve(sides)

        for how in ("none", "kfac"):

            def theirs(solve: Callable = solve, how: str = how) -> object:
                return solve(solver="cg", preconditioner=how)

            name = f"ggn cg/{how} n={n} d={d} C={classes} damping={damping:g} m={many}"
            yield name, solve, theirs


@torch.no_grad()
def float32_kfac(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, damping: float) -> Tensor:
    """Influence on the mean gradient, as anyone writes it: two eigendecompositions in float32."""
    n = len(x)
    p = torch.softmax(torch.addmm(bias, x, weight.t()), dim=1)
    act = torch.cat([x, x.new_ones(n, 1)], dim=1)
    b = torch.diag(p.mean(dim=0)) - p.t() @ p / n
    values_b, q_b = torch.linalg.eigh(b)
    values_a, q_a = torch.linalg.eigh(act.t() @ act / n)
    delta = p
    delta[torch.arange(n), y] -= 1
    v = q_b.t() @ (delta.t() @ act / n) @ q_a
    v /= torch.outer(values_b, values_a) + damping
    return -((delta @ (q_b @ v @ q_a.t())) * act).sum(dim=1)


def kfac_rows() -> Iterator[tuple[str, Job, Job]]:
    for n, d, classes, damping in VOCABULARIES:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, d, generator=generator)
        weight = torch.randn(classes, d, generator=generator) / d**0.5
        bias = torch.zeros(classes)
        y = torch.randint(classes, (n,), generator=generator)

        def ours(x=x, weight=weight, bias=bias, y=y, damping=damping) -> Tensor:
            factors = imu.GradientFactors.from_head(x, weight, bias, y)
            return imu.influence_scores(factors, curvature=imu.KFAC(damping=damping))

        def theirs(x=x, weight=weight, bias=bias, y=y, damping=damping) -> Tensor:
            return float32_kfac(x, weight, bias, y, damping)

        exact = ours(x.double(), weight.double(), bias.double())
        errors = [float((job() - exact).norm() / exact.norm()) for job in (theirs, ours)]
        said = "errors {:.0e} {:.0e}".format(*errors)
        yield f"kfac n={n} d={d} C={classes} damping={damping:g}, {said}", ours, theirs


def cpu_seconds(job: Job) -> float:
    start = time.process_time()
    job()
    return time.process_time() - start


def interval(ratios: list[float]) -> tuple[float, float]:
    """Of the median, at 95 %: order statistics of the binomial's tails; the range below six."""
    found, n = sorted(ratios), len(ratios)
    tail, k = 0.5**n, 0
    below = tail
    while k < (n - 1) // 2:
        tail *= (n - k) / (k + 1)
        if below + tail > 0.025:
            break
        below, k = below + tail, k + 1
    return found[k], found[n - 1 - k]


def compare(ours: Job, theirs: Job, rounds: int, seconds: float) -> tuple[list[float], list[float]]:
    """CPU seconds of each, in turn, the order turned every round."""
    times: dict[Job, list[float]] = {ours: [], theirs: []}
    ours(), theirs()
    start = time.perf_counter()
    for round_ in range(rounds):
        if round_ >= 3 and time.perf_counter() - start > seconds:
            break
        for job in (ours, theirs) if round_ % 2 else (theirs, ours):
            times[job].append(cpu_seconds(job))
    return times[ours], times[theirs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="?", default="", help="rows whose name begins so")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a row, about")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':76s}{'theirs':>9s}{'ours':>9s}  theirs/ours")
    for rows in (head_rows, ggn_rows, kfac_rows):
        if not rows.__name__.startswith(asked.only.split()[0] if asked.only else ""):
            continue
        for name, ours, theirs in rows():
            if not name.startswith(asked.only):
                continue
            mine, other = compare(ours, theirs, asked.rounds, asked.seconds)
            ratios = [b / a for a, b in zip(mine, other, strict=True)]
            low, high = interval(ratios)
            middle = statistics.median(ratios)
            print(
                f"{name:76s}{1e3 * statistics.median(other):7.1f}ms"
                f"{1e3 * statistics.median(mine):7.1f}ms  {middle:.2f} [{low:.2f}, {high:.2f}]"
                f"{'  loses' if high < 0.95 else ''}",
                flush=True,
            )


if __name__ == "__main__":
    main()
