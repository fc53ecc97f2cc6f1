"""Reading what Fitted.save wrote."""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from imu_fast.curvature.base import OPERATOR_FORMAT, Fitted, Layer, Saved
from imu_fast.curvature.fisher import FittedFisher
from imu_fast.curvature.fisher_diag import FittedFisherDiag
from imu_fast.curvature.ggn.ggn import FittedGGN
from imu_fast.curvature.ggn.signals import FittedSignalGGN
from imu_fast.curvature.ggn_block import FittedGGNBlock
from imu_fast.curvature.identity import FittedIdentity
from imu_fast.curvature.kronecker import KroneckerEigenbasis, RefinedKronecker
from imu_fast.errors import InputError, brief, check_positive
from imu_fast.storage import load_tensors

# What each curvature is, once fitted.
FITTED: dict[str, type[Fitted]] = {
    "ekfac": KroneckerEigenbasis,
    "fisher": FittedFisher,
    "fisher_diag": FittedFisherDiag,
    "ggn": FittedGGN,
    "ggn_block": FittedGGNBlock,
    "identity": FittedIdentity,
    "kfac": KroneckerEigenbasis,
}
# Of inner layers, where that is another.
_OF_SIGNALS: dict[str, type[Fitted]] = {"ggn": FittedSignalGGN}
# By an eigenbasis in float32, which is made anew.
_REFINED: dict[str, type[Fitted]] = {"kfac": RefinedKronecker}
# What a file raises whose text and tensors do not belong together.
_DAMAGE = (
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    ArithmeticError,
)


def load_operator(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Fitted:
    """The curvature that ``fitted.save(path)`` wrote: the same bits on the same machine.

    ``ggn``, ``ggn_block`` and ``fisher`` hold their samples' factors, and are factored anew.

    Args:
        device: where it is to be.

    Raises:
        InputError: the file is missing, damaged, no operator's or of another format; there is no
            such device.
    """
    try:  # with its index, as tensors name it
        where = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device={device!r} cannot be used here: {brief(error)}") from error
    tensors, metadata = load_tensors(path)
    shown = f"path={os.fspath(path)!r}"
    if "operator" not in metadata:
        raise InputError(
            f"{shown} holds no fitted curvature; save one by imu_fast.fit(...).save(path)"
        )
    try:
        found = json.loads(metadata["operator"])
        if found["format"] != OPERATOR_FORMAT:
            raise InputError(
                f"{shown} has the operator format {found['format']}, this version reads "
                f"{OPERATOR_FORMAT}; fit it anew, or use the version of imu_fast that wrote it"
            )
        if found["curvature"] not in FITTED:
            raise InputError(
                f"{shown} holds curvature={found['curvature']!r}, which this version does not "
                f"know; it has {', '.join(FITTED)}"
            )
        classes, width = found["shape"]
        layer = Layer(classes, width, found["has_bias"], where)
        damping = found["damping"]
        if found["curvature"] != "identity":
            check_positive("damping", damping)
        saved = Saved(found["curvature"], layer, damping, tensors, found["options"])
        refined = _REFINED if saved.options.get("refined") else FITTED
        kinds = _OF_SIGNALS if saved.options.get("signals") else refined
        fitted = kinds[saved.curvature]._restored(saved)
        _check(fitted, found)
    except _DAMAGE as error:
        if isinstance(error, InputError) and str(error).startswith(shown):
            raise
        raise InputError(f"{shown} is damaged or was changed: {brief(error)}") from error
    return fitted


def _check(fitted: Fitted, found: dict[str, Any]) -> None:
    """Raise ValueError where tensors are not what the text says."""
    diagonal = fitted.diagonal()
    if list(diagonal.shape) != found["shape"] or fitted.layer.has_bias != found["has_bias"]:
        raise ValueError(f"it says shape {found['shape']} and holds {list(diagonal.shape)}")
    if str(diagonal.dtype) != f"torch.{found['dtype']}":
        raise ValueError(f"it says dtype {found['dtype']} and holds {diagonal.dtype}")
