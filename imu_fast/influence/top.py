"""The most influential samples of each query, without the matrix of all pairs."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import Unpack

from imu_fast import distributed
from imu_fast.curvature.base import Curvature
from imu_fast.curvature.in_step import the_same
from imu_fast.curvature.named import CurvatureName, OwnOptions
from imu_fast.errors import InputError, check_choice, check_count
from imu_fast.factors.joint import said
from imu_fast.factors.sharded import ShardedFactors
from imu_fast.factors.source import in_memory
from imu_fast.influence.scores import (
    Layers,
    as_layers,
    check_like,
    curvature_of_pairs,
    pairwise_influence,
)
from imu_fast.model.guard import door

By = Literal["helpful", "harmful", "magnitude"]
# Elements of [n, queries] that exist at once: 64 MB in float32.
_ELEMENTS = 1 << 24


@door
def top_influences(
    source: Layers,
    queries: Layers,
    k: int,
    *,
    by: By = "helpful",
    curvature: CurvatureName | Curvature | None = None,
    damping: float | None = None,
    **options: Unpack[OwnOptions],
) -> tuple[Tensor, Tensor]:
    """The k samples of largest influence on every query: those of each row of
    :func:`imu_fast.pairwise_influence`, some queries at a time.

    Args:
        source: factors of n samples; they define the curvature.
        queries: factors of m samples of the same layers.
        k: of the n samples, 1 <= k <= n.
        by: ``"helpful"``: the lowest, whose gradients pull with the query's (training on them
            lowers its loss); ``"harmful"``: the highest; ``"magnitude"``.
        curvature, damping, options: as in :func:`imu_fast.pairwise_influence`, default included.

    Returns:
        values [m, k], influences in that order, and indices [m, k] int64 of the samples; of equal
        ones the lower index first. Of samples that processes share, indices are among those of all,
        in the order of the ranks, and queries have to be the same in each process.

    Raises:
        InputError: as :func:`imu_fast.pairwise_influence`; k is out of range.
    """
    check_choice("by", by, get_args(By))
    all_layers, asked = as_layers(source, "source"), as_layers(queries, "queries")
    if len(all_layers) != len(asked):
        raise InputError(f"queries has {len(asked)} layers, source {len(all_layers)}")
    check_like("queries", all_layers, asked)
    shared = all_layers[0] if isinstance(all_layers[0], ShardedFactors) else None
    n = all_layers[0].n
    if check_count("k", k) > n:
        raise InputError(f"k={k} is more than the {n} samples of source; pass at most {n}")
    spec = curvature_of_pairs(all_layers, curvature, {"damping": damping, **options})
    whole = [in_memory(query, "queries") for query in asked]
    if shared is not None:
        said(shared, lambda: f"top_influences(k={k}, by={by!r})")
        for query in whole:
            the_same("queries", query.delta, shared)
            the_same("queries", query.act, shared)
            the_same("queries", query.offsets, shared)
    m, step = whole[0].n, max(1, _ELEMENTS // n)
    values, indices = [], []
    for first in range(0, m, step):
        some = [query.samples(first, min(first + step, m)) for query in whole]
        found = pairwise_influence(all_layers, some, curvature=spec)
        if shared is not None:
            found = distributed.rows_of_all(found, shared.group)
        found = found.T
        keys = found.abs() if by == "magnitude" else found
        order = torch.sort(keys, dim=1, descending=by != "helpful", stable=True).indices[:, :k]
        values.append(found.gather(1, order))
        indices.append(order)
    return torch.cat(values), torch.cat(indices)
