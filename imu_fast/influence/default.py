"""The curvature of data attribution where none is named: one rule, chosen on development data.

On the digits of docs/validation.md, by linear datamodeling scores of every other query alone:
EK-FAC under a damping relative to the mean eigenvalue was within the intervals of the best, at the
head and at all layers, over the model's labels and over the data's; of the dampings tried 1e-2 had
the highest mean of head and all layers. The diagonal of the Fisher, which scores for unlearning
keep, was well behind.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from imu_fast.curvature.base import Curvature
from imu_fast.curvature.fisher_diag import FisherDiag
from imu_fast.curvature.gauss_newton import kept_of
from imu_fast.curvature.kfac import EKFAC
from imu_fast.errors import InputError
from imu_fast.factors.probabilities import signals_or_curvature
from imu_fast.factors.source import Factors
from imu_fast.losses.signals import GroupedRows

logger = logging.getLogger("imu_fast")

# Relative to the mean eigenvalue.
DAMPING = 1e-2
# Of an eigendecomposition, which takes a minute of one core there.
MAX_ORDER = 4096


def attribution_curvature(layers: Sequence[Factors]) -> Curvature:
    """The same for all layers: the first of these that each of them allows.

    1. ``EKFAC(damping=1e-2, damping_mode="relative")``: the loss's curvature is known.
    2. The same with ``fisher="empirical"``: layers that were captured without signals, delta of the
       caller's own.
    3. ``FisherDiag()``: a layer has more than MAX_ORDER outputs or inputs, or several groups.

    Which one it is, and why, goes to the log.
    """
    largest = max(max(layer.num_classes, layer.width) for layer in layers)
    if largest > MAX_ORDER:
        spec: Curvature = FisherDiag()
        why = f"a layer has {largest} outputs or inputs, more than the {MAX_ORDER} that EKFAC takes"
    elif grouped := [layer.name for layer in layers if isinstance(kept_of(layer), GroupedRows)]:
        spec, why = FisherDiag(), f"layer {grouped[0]!r} has several groups"
    elif all(map(_known, layers)):
        spec = EKFAC(damping=DAMPING, damping_mode="relative")
        why = "the loss's curvature is known"
    else:
        spec = EKFAC(damping=DAMPING, damping_mode="relative", fisher="empirical")
        why = "the loss's curvature is not known at every layer; capture(..., fisher=) brings it"
    logger.info("attribution under curvature=%r: %s", spec, why)
    return spec


def _known(factors: Factors) -> bool:
    """Whether the loss's curvature is, by a sample."""
    try:
        signals_or_curvature(next(iter(factors.chunks())).samples(0, 1))
    except InputError:
        return False
    return True
