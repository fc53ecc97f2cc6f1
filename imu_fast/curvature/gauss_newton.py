"""What the GGN and its relatives have in common: over whose labels its expectation is taken."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from imu_fast.curvature.base import gradient_slabs
from imu_fast.curvature.damping import Damped
from imu_fast.errors import InputError, one_of
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.implicit_head import ImplicitHead
from imu_fast.factors.mapped import changed
from imu_fast.factors.probabilities import pseudo_samples
from imu_fast.factors.sharded import ShardedFactors
from imu_fast.factors.source import Factors
from imu_fast.losses.signals import EmpiricalSignals, GroupedRows, Signals
from imu_fast.options import option, options

logger = logging.getLogger("imu_fast")

Fisher = Literal["auto", "exact", "sampled", "empirical"]
Expectation = Literal["exact", "sampled"]


@options
class GaussNewton(Damped):
    """A curvature made of the second derivative of the loss in the logits.

    Attributes:
        damping, damping_mode: of lam: see :class:`Damped`.
        fisher: over which labels the expectation is: "exact": the model's own predictions, in
            closed form at the head, or by signals that ``capture(..., fisher="exact")`` brought to
            an inner layer; "sampled": labels drawn from these predictions
            (``fisher="sampled"``: the true Fisher, Martens and Grosse 2015); "empirical": the
            data's labels, another matrix, which any factors have; "auto": exact where it is in
            closed form, else what the factors were captured with (of a model: "sampled").
    """

    fisher: Fisher = option(default="auto", check=one_of(*get_args(Fisher)))

    # Whether it is made of single rows, and not of samples' gradients.
    of_rows: ClassVar[bool] = False

    @property
    def signals(self) -> Expectation | None:
        """What inner layers have to be captured with."""
        if self.fisher == "auto":
            return "sampled"
        return None if self.fisher == "empirical" else self.fisher

    def expected(self, factors: Factors) -> Factors:
        """The factors with what M is made of.

        Raises:
            InputError: they were captured with another expectation.
        """
        if self.fisher == "empirical":
            if self.of_rows and isinstance(kept_of(factors), GroupedRows):
                raise InputError(
                    f"curvature={self.name!r} is of the rows of one matrix, and layer "
                    f"{factors.name!r} has several groups; use 'fisher_diag', 'fisher', or "
                    "fisher='empirical' of 'ggn' and 'ggn_block'"
                )
            return with_own_signals(factors)
        if self.fisher == "auto":
            return factors
        kept = signals_of(factors)
        found = "exact" if kept is None else kept.kind
        if found != self.fisher:
            have = f"were captured with fisher={found!r}"
            if kept is None:
                have = "have no drawn labels (of a head the expectation is exact, in closed form)"
            raise InputError(
                f"fisher={self.fisher!r} of curvature={self.name!r}: the factors {have}; leave "
                f"fisher out, or capture the layer by name with fisher={self.fisher!r}"
            )
        return factors


def signals_of(factors: Factors) -> Signals | None:
    """The signals of the first samples: None where the factors have none."""
    if isinstance(factors, ImplicitHead):
        return None
    if isinstance(factors, ShardedFactors):
        return signals_of(factors.local)
    first = kept_of(factors)
    return first if isinstance(first, Signals) else None


def kept_of(factors: Factors) -> Any:
    """What the first samples' factors keep of the loss's curvature."""
    if isinstance(factors, GradientFactors):
        return factors.curvature
    return next(iter(factors.chunks())).curvature


def signal_gradients(chunk: GradientFactors) -> Iterator[Tensor]:
    """``g_ik`` of the chunk's signals, [k, C, D] at a time, float64."""
    assert isinstance(chunk.curvature, Signals)
    for one in pseudo_samples(chunk, chunk.curvature):
        for _, g in gradient_slabs(one):
            yield g


def _own(chunk: GradientFactors) -> GradientFactors:
    own = EmpiricalSignals(chunk.delta[:, None])
    return replace(chunk, curvature=own, loss=None, labels=None)


def with_own_signals(factors: Factors) -> Factors:
    """The factors as those of an empirical Fisher."""
    if isinstance(factors, ShardedFactors):
        return factors.changed(_own)
    return changed(factors, _own)


def fisher_for(spec: Any, layers: Any) -> Expectation | None:
    """What ``capture(model, data, layers)`` is to bring for a curvature: of the head nothing."""
    of_head = isinstance(layers, str) and layers == "head"
    return spec.signals if isinstance(spec, GaussNewton) and not of_head else None


_said: set[tuple[str, str]] = set()


def warn_of_rounding(
    curvature: str, factors: Factors, damping: float, largest: float, smallest: float
) -> None:
    """Say once of a layer that its inverse is that of rounding in some directions.

    What a matrix of the layer's gradients is made of was rounded to the dtype of the factors, so
    that its eigenvalues below ``eps * largest`` are noise, which a smaller damping magnifies.

    Args:
        largest: at most the largest eigenvalue. smallest: of the undamped matrix; 0 where its rank
            is below its order.
    """
    noise = torch.finfo(factors.dtype).eps * largest
    if damping + smallest >= noise or (curvature, factors.name) in _said:
        return
    _said.add((curvature, factors.name))
    logger.warning(
        "%s of layer %r: damping %.2g is below the rounding of its largest eigenvalue in %s, %.2g, "
        "and it has smaller ones (its rank is below its order, or nearly): there the inverse is "
        "that of rounding. Raise the damping, or take float64 or more samples",
        curvature,
        factors.name,
        damping,
        str(factors.dtype).removeprefix("torch."),
        noise,
    )
