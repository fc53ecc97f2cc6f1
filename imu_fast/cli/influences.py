"""The columns of a table of scores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer


def influences(
    model: Any, loader: Any, spec: Any, layers: Any, self_influence: bool
) -> tuple[dict[str, Any], Any]:
    """The columns score and weight, and self_influence where it is asked for; and the factors."""
    import torch

    from imu_fast.curvature.gauss_newton import fisher_for
    from imu_fast.influence.scores import influence_scores
    from imu_fast.influence.scores import self_influence as with_itself
    from imu_fast.influence.weights import influence_weights
    from imu_fast.model.capture import capture

    how: Any = {"progress": sys.stderr.isatty(), "fisher": fisher_for(spec, layers)}
    factors = capture(model, loader, layers, **how)
    scores = wide(influence_scores(factors, curvature=spec))
    selected, kept = influence_weights(scores, on_empty="uniform")
    columns = {"score": scores, "weight": torch.zeros_like(scores).index_put_((selected,), kept)}
    if self_influence:
        columns["self_influence"] = wide(with_itself(factors, curvature=spec))
    return columns, factors


def wide(column: Any) -> Any:
    """In a dtype that files have: no half precision."""
    return column if column.itemsize > 2 else column.float()


def said(scores: Any, out: Path) -> None:
    """The line that ends the command."""
    typer.echo(f"{len(scores)} scores, {int((scores < 0).sum())} negative, written to {out}")
