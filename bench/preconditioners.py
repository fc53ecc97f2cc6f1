"""What a preconditioner saves conjugate gradient on the GGN: ``python bench/preconditioners.py``.

Iterations and seconds to a relative residual of 1e-6, recomputed in float64, on features of
networks trained here and on random ones, by two dampings.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from problems import problems, random_problem
from tabulate import tabulate

import imu_fast as imu
from imu_fast.storage import replacing

PRECONDITIONERS = ("none", "kfac", "nystrom")


def main(
    out: Annotated[Path, typer.Option(help="Where the rows go.")] = Path(
        "bench/results/preconditioners.json"
    ),
    data: Annotated[Path | None, typer.Option(help="CIFAR-10 as an .npz of JPEG files.")] = None,
) -> None:
    """Compare preconditioners; seconds are the best of three, setting up included."""
    rows = []
    for problem in [*problems(data), random_problem(), random_problem(relu=True)]:
        f = problem.factors
        v = f.mean_gradient()
        for damping in (1e-2, 1e-4):
            for name in PRECONDITIONERS:
                best = float("inf")
                for _ in range(3):
                    start = time.perf_counter()
                    fitted = imu.fit("ggn", f, damping=damping, solver="cg", preconditioner=name)
                    fitted.solve(v)
                    best = min(best, time.perf_counter() - start)
                rows.append(
                    {
                        "problem": problem.name,
                        "n": f.n,
                        "C": f.num_classes,
                        "D": f.width,
                        "damping": damping,
                        "preconditioner": name,
                        "iterations": fitted.iterations,
                        "residual": fitted.residual,
                        "seconds": best,
                    }
                )
    results = {
        "threads": torch.get_num_threads(),
        "versions": {"imu_fast": imu.__version__, "torch": torch.__version__},
        "rows": rows,
    }
    with replacing(out) as path:
        path.write_text(json.dumps(results, indent=1) + "\n")
    typer.echo(tabulate(rows, headers="keys", tablefmt="github"))


if __name__ == "__main__":
    typer.run(main)
