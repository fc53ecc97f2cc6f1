"""Whether the exact GGN takes the solver that is the fastest: ``python bench/solver_choice.py``.

Heads are drawn by a seed: n 50 to 10,000, d 64 to 2,048 and C 2 to 300 uniform in their logarithms,
damping 1e-2 or 1e-4, 1, 16 or 64 right-hand sides that are samples' gradients; features of
overlapping clusters after a ReLU, and a head trained on them for some steps. Each solver is forced
in turn, fit and solve to a relative residual of 1e-6, and ``auto`` beside them: its time over the
best one's. In CPU time on one thread, so that what else the machine does counts little.
A forced run ends at three times the best so far, or half a second (what it is in the middle of it
finishes); a problem whose best takes more than 20 s is dropped.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from tabulate import tabulate
from torch import Tensor, nn

import imu_fast as imu
from imu_fast.curvature.ggn.costs import solver_costs
from imu_fast.storage import replacing

FORCED = {
    "cg": {"solver": "cg", "preconditioner": "none"},
    "cg kfac": {"solver": "cg", "preconditioner": "kfac"},
    "cg nystrom": {"solver": "cg", "preconditioner": "nystrom"},
    "primal": {"solver": "primal"},
    "dual": {"solver": "dual"},
}
LIMIT, TIMES, FAIR = 20.0, 3.0, 1.4
LEAST = 0.5  # seconds that every forced run may take
STEPS = 50
SMALL = {"n": 50, "d": 8, "C": 3, "damping": 1e-2, "vectors": 16, "seed": 0}
ENOUGH = 0.5  # seconds of a measurement


class _OutOfTime(Exception):
    pass


def drawn(generator: torch.Generator) -> dict[str, float]:
    """n, d, C, damping, right-hand sides, and the seed of the data."""

    def between(low: int, high: int) -> int:
        u = float(torch.rand((), generator=generator))
        return round(math.exp(math.log(low) + u * (math.log(high) - math.log(low))))

    def one_of(*choices: float) -> float:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    sizes = {"n": between(50, 10_000), "d": between(64, 2048), "C": between(2, 300)}
    seed = int(torch.randint(1 << 30, (), generator=generator))
    return {**sizes, "damping": one_of(1e-2, 1e-4), "vectors": one_of(1, 16, 64), "seed": seed}


def problem(p: dict[str, float]) -> tuple[imu.GradientFactors, Tensor]:
    """Factors at a trained head, and right-hand sides [m, C, D]."""
    n, d, classes, m = (int(p[k]) for k in ("n", "d", "C", "vectors"))
    torch.manual_seed(int(p["seed"]))
    centres = torch.randn(classes, d) / d**0.25
    y = torch.randint(classes, (n + m,))
    x = (centres[y] + torch.randn(n + m, d)).relu()
    head = nn.Linear(d, classes)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.05, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(x[:n]), y[:n]).backward()
        optimizer.step()
    with torch.no_grad():
        delta = head(x[n:]).softmax(dim=1)
        delta[torch.arange(m), y[n:]] -= 1
    vectors = delta[:, :, None] * nn.functional.pad(x[n:], (0, 1), value=1.0)[:, None]
    return imu.GradientFactors.from_head(x[:n], head.weight, head.bias, y[:n]), vectors


def seconds(run: Callable[[], object], limit: float) -> float:
    """CPU seconds of a call, a mean over ENOUGH of them; infinite if one was stopped at the limit.

    The clock of CPU time may tick in some milliseconds.
    """

    def stop(*_: object) -> None:
        raise _OutOfTime

    calls = 0
    before = signal.signal(signal.SIGPROF, stop)
    try:
        start = time.process_time()
        while (taken := time.process_time() - start) < ENOUGH:
            signal.setitimer(signal.ITIMER_PROF, limit)
            run()
            signal.setitimer(signal.ITIMER_PROF, 0)
            calls += 1
    except _OutOfTime:
        return math.inf
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    return taken / calls


def measured(p: dict[str, float]) -> dict[str, float]:
    """Seconds of each solver that can be held, and of ``auto``."""
    factors, vectors = problem(p)
    sizes = (factors.num_tokens, factors.num_classes, factors.width)
    held = solver_costs(*sizes)
    found: dict[str, float] = {}

    def run(**how: str) -> None:
        fitted = imu.fit("ggn", factors, damping=p["damping"], **how)
        fitted.solve(vectors if len(vectors) > 1 else vectors[0])

    # auto first: what a forced run may take is three times the best.
    found["auto"] = seconds(run, TIMES * LIMIT)
    for name, how in FORCED.items():
        if how["solver"] in held:
            limit = min(LIMIT, max(LEAST, TIMES * min(found.values())))
            found[name] = seconds(lambda how=how: run(**how), limit)
    return found


def main(
    seed: Annotated[int, typer.Option(help="Of the problems.")] = 0,
    problems: Annotated[int, typer.Option(help="How many are drawn.")] = 60,
    out: Annotated[Path, typer.Option(help="Where the rows go.")] = Path(
        "bench/results/solver_choice.json"
    ),
) -> None:
    """Compare auto with every forced solver."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    measured(SMALL)  # what is made once
    rows = []
    for number in range(problems):
        p = drawn(generator)
        found = measured(p)
        auto = found.pop("auto")
        best = min(found, key=lambda name: found[name])
        if found[best] > LIMIT:
            print(f"{number}: dropped, none below {LIMIT:.0f} s: {p}")
            continue
        row = {**p, "auto": auto, "best": best, "ratio": auto / found[best], "forced": found}
        rows.append(row)
        print(f"{number}: {row}", flush=True)
    rows.sort(key=lambda row: -row["ratio"])
    results = {
        "seed": seed,
        "threads": 1,
        "versions": {"imu_fast": imu.__version__, "torch": torch.__version__},
        "rows": [
            {**row, "forced": {k: None if v == math.inf else v for k, v in row["forced"].items()}}
            for row in rows
        ],
    }
    with replacing(out) as path:
        path.write_text(json.dumps(results, indent=1) + "\n")
    keys = ("n", "d", "C", "damping", "vectors", "auto", "best", "ratio")
    print(tabulate([[row[k] for k in keys] for row in rows], headers=keys, floatfmt=".3g"))
    within = sum(row["ratio"] <= FAIR for row in rows)
    print(f"auto within {FAIR} of the best forced solver in {within} of {len(rows)} problems")


if __name__ == "__main__":
    typer.run(main)
