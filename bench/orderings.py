"""How each curvature orders a forget set beside the exact one: ``python bench/orderings.py``.

Rank correlation (Spearman), correlation (Pearson) and the overlap of the top tenth by influence,
against the exact GGN of the head; and, for a network small enough, against influence with the GGN
of all its parameters.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from problems import Problem, problems
from scipy import stats
from tabulate import tabulate
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import imu_fast as imu
from imu_fast.curvature.named import CURVATURES
from imu_fast.storage import replacing

OTHERS = ("identity", "fisher_diag", "fisher", "ggn_block", "kfac", "ekfac")
MEASURES = ("spearman", "pearson", "top")


def all_parameter_scores(model: nn.Module, x: Tensor, y: Tensor, damping: float) -> Tensor:
    """``- g_i^T (J^T H J / n + lam I)^-1 gbar`` over every parameter, dense, float64: [n]."""
    model = model.double()
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def logits(theta: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, theta, (one[None],))[0]

    per_sample = vmap(jacrev(logits), in_dims=(None, 0))(parameters, x.double())
    jacobian = torch.cat([j.flatten(2) for j in per_sample.values()], dim=2)
    p = torch.softmax(model(x.double()).detach(), dim=1)
    g = ((p - nn.functional.one_hot(y, p.shape[1])).unsqueeze(1) @ jacobian).squeeze(1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    curved = (hessian @ jacobian).flatten(0, 1)
    ggn = jacobian.flatten(0, 1).T @ curved / len(x)
    ggn.diagonal().add_(damping)
    return -g @ torch.linalg.solve(ggn, g.mean(dim=0))


def compare(scores: Tensor, exact: Tensor) -> dict[str, float]:
    """Spearman, Pearson, and the overlap of the tenth with the most negative scores."""
    k = max(1, len(exact) // 10)
    tops = [set(s.argsort(stable=True)[:k].tolist()) for s in (scores, exact)]
    a, b = scores.double().numpy(), exact.double().numpy()
    return {
        "spearman": float(stats.spearmanr(a, b).statistic),
        "pearson": float(stats.pearsonr(a, b).statistic),
        "top": len(tops[0] & tops[1]) / k,
    }


def rows_of(problem: Problem, damping: float) -> list[dict[str, Any]]:
    """One row per curvature and per exact answer."""
    f = problem.factors
    head = imu.influence_scores(f, curvature="ggn", damping=damping)
    exact = {"exact head": head}
    if problem.network is not None and problem.x is not None:
        assert f.labels is not None
        exact["all parameters"] = all_parameter_scores(
            problem.network, problem.x, f.labels, damping
        )
    rows = []
    for against, truth in exact.items():
        for name in (*OTHERS, "ggn") if against != "exact head" else OTHERS:
            lam = damping if "damping" in CURVATURES[name].paths() else None
            scores = imu.influence_scores(f, curvature=name, damping=lam)
            rows.append(
                {"problem": problem.name, "n": f.n, "against": against, "curvature": name}
                | compare(scores, truth)
            )
        if against == "exact head" and f.losses is not None:
            rows.append(
                {"problem": problem.name, "n": f.n, "against": against, "curvature": "-loss"}
                | compare(-f.losses, truth)
            )
    return rows


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """A matrix of rank correlations: problems down, curvatures across."""
    names = [*OTHERS, "ggn", "-loss"]
    lines = list(dict.fromkeys((r["problem"], r["against"]) for r in rows))
    values = {(r["problem"], r["against"], r["curvature"]): r["spearman"] for r in rows}
    grid = [[values.get((*line, name), float("nan")) for name in names] for line in lines]
    figure = Figure(layout="constrained", dpi=120, figsize=(9, 0.5 * len(lines) + 1.6))
    axes = figure.subplots()
    image = axes.imshow(grid, vmin=-1, vmax=1, cmap="RdBu", aspect="auto")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(lines)), [f"{p}\nagainst {a}" for p, a in lines], fontsize=7)
    for i, line in enumerate(grid):
        for j, value in enumerate(line):
            if value == value:
                color = "white" if abs(value) > 0.7 else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    axes.set_title("Spearman correlation of each curvature's scores with the exact ones")
    figure.colorbar(image)
    with replacing(path) as temporary:
        figure.savefig(temporary)


def main(
    out: Annotated[Path, typer.Option(help="Folder for orderings.json, .md and .png.")] = Path(
        "bench/results/orderings"
    ),
    data: Annotated[Path | None, typer.Option(help="CIFAR-10 as an .npz of JPEG files.")] = None,
    damping: Annotated[float, typer.Option(help="lam > 0.")] = 1e-2,
) -> None:
    """Compare the score orderings of every curvature with the exact ones."""
    rows = [row for problem in problems(data) for row in rows_of(problem, damping)]
    out.mkdir(parents=True, exist_ok=True)
    versions = {"imu_fast": imu.__version__, "torch": torch.__version__}
    versions |= {"python": platform.python_version(), "machine": platform.machine()}
    results = {"damping": damping, "seed": 0, "versions": versions, "rows": rows}
    table = tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3f")
    with replacing(out / "orderings.json") as path:
        path.write_text(json.dumps(results, indent=1) + "\n")
    with replacing(out / "orderings.md") as path:
        path.write_text(table + "\n")
    draw(out / "orderings.png", rows)
    typer.echo(table)


if __name__ == "__main__":
    typer.run(main)
