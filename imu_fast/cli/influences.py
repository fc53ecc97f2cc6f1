"""The columns of a table of scores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from imu_fast.cli.chunks import Checkpoint
from imu_fast.cli.processes import Processes


def influences(
    model: Any,
    loader: Any,
    spec: Any,
    layers: Any,
    self_influence: bool,
    here: Processes,
    checkpoint: Checkpoint | None = None,
) -> tuple[dict[str, Any], Any]:
    """The columns score and weight, and self_influence where it is asked for; and the factors.

    Columns are of all samples, in whichever process; factors are of those that this one read.
    """
    import torch

    from imu_fast.curvature.gauss_newton import fisher_for
    from imu_fast.errors import InputError, NoSamplesError
    from imu_fast.influence.scores import influence_scores
    from imu_fast.influence.scores import self_influence as with_itself
    from imu_fast.influence.weights import influence_weights
    from imu_fast.model.capture import capture
    from imu_fast.model.shared import shared_factors

    fisher: Any = fisher_for(spec, layers)
    progress = here.first and sys.stderr.isatty()
    if checkpoint is None:
        factors: Any = capture(
            model,
            here.share(loader),
            layers,
            progress=progress,
            group=here.group,
            fisher=fisher,
        )
    else:
        if fisher is not None:
            raise InputError(
                f"checkpoint: curvature={spec.name!r} of layers needs signals that no part keeps; "
                "leave --checkpoint out, or use fisher_diag"
            )

        def parts() -> Any:
            found = checkpoint.captured(model, loader, layers, here, progress)
            if found is None:
                raise NoSamplesError("data: no part of it is this process's")
            return found

        alone = here.group is None
        factors = parts() if alone else shared_factors(model, here.group, lambda _: parts())
    scores = here.whole(wide(influence_scores(factors, curvature=spec)))
    selected, kept = influence_weights(scores, on_empty="uniform")
    columns = {"score": scores, "weight": torch.zeros_like(scores).index_put_((selected,), kept)}
    if self_influence:
        columns["self_influence"] = here.whole(wide(with_itself(factors, curvature=spec)))
    return columns, getattr(factors, "local", factors)


def wide(column: Any) -> Any:
    """In a dtype that files have: no half precision."""
    return column if column.itemsize > 2 else column.float()


def said(scores: Any, out: Path) -> None:
    """The line that ends the command."""
    typer.echo(f"{len(scores)} scores, {int((scores < 0).sum())} negative, written to {out}")
