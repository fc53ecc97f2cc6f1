"""Factors as named tensors and text, which is what a file holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from imu_fast.losses.forms import FORMS
from imu_fast.losses.named import LOSSES
from imu_fast.losses.output_curvature import StoredCurvature

# What the names of the curvature's tensors begin with.
_CURVATURE = "curvature."
F = TypeVar("F")


def packed(factors: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All that ``GradientFactors`` hold; :func:`unpacked` is its inverse."""
    tensors = {"delta": factors.delta, "act": factors.act, "offsets": factors.offsets}
    if factors.labels is not None:
        tensors["labels"] = factors.labels
    if factors.losses is not None:
        tensors["losses"] = factors.losses
    metadata = {"has_bias": str(int(factors.has_bias)), "name": factors.name}
    if isinstance(factors.curvature, StoredCurvature):
        kept = factors.curvature.tensors()
        tensors |= {f"{_CURVATURE}{key}": value for key, value in kept.items()}
        metadata["curvature"] = factors.curvature.form
    if factors.loss is not None:
        metadata["loss"] = json.dumps({"loss": factors.loss.name, **factors.loss.flat()})
    return tensors, metadata


def unpacked(
    make: Callable[..., F], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> F:
    """The factors that were packed.

    Args:
        make: ``GradientFactors``, whose file imports this one.
    """
    options = json.loads(metadata["loss"]) if "loss" in metadata else None
    curvature = None
    if form := metadata.get("curvature"):
        kept = {k: v for k, v in tensors.items() if k.startswith(_CURVATURE)}
        curvature = FORMS[form](**{k.removeprefix(_CURVATURE): v for k, v in kept.items()})
    return make(
        tensors["delta"],
        tensors["act"],
        tensors["offsets"],
        metadata.get("has_bias") == "1",
        tensors.get("labels"),
        tensors.get("losses"),
        metadata.get("name", "head"),
        options and LOSSES.choose(options.pop("loss"), "loss", **options),
        curvature,
    )
