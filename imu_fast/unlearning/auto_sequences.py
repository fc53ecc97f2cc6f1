"""What ``auto`` takes for sequences: ``docs/language-study.md`` has the evidence.

The whole network, since a head alone ends farther from retraining than doing nothing: features say
what kind of text it is, and the head has one weight for all. SimNPO where there is the forget set
alone; with data that is to stay, plain ascent and a multiple of these data's divergence from the
model as it was, without which ascent ruins what it is not kept from.

AdamW moves each weight by about its rate a step, so the rate is in units of the weights. Where the
run ends by its depth, the crossing step bisected, rates some thirty times apart come to the same.
Chosen on development models: ``python bench/auto_sequences.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from imu_fast.errors import InputError
from imu_fast.options import Options
from imu_fast.unlearning.ascent.ascent import Ascent
from imu_fast.unlearning.ascent.objectives import SimNPO
from imu_fast.unlearning.ascent.optimizer import Custom
from imu_fast.unlearning.ascent.retain import Retain
from imu_fast.unlearning.ascent.scopes import Network
from imu_fast.unlearning.depth import Depths

# The rate over the weights' root mean square, and the epochs in which the depth is to be reached.
RELATIVE_RATE, EPOCHS = 5e-3, 100
# Of the divergence of data that is to stay.
RETAIN_WEIGHT = 5.0
# What changes more than how far or how long it goes.
_OTHER = ("objective", "weights", "scope", "optimizer", "preset", "retain_loss", "retain_weight")


def rate_of(model: nn.Module) -> float:
    """``RELATIVE_RATE`` times the root mean square of the trained matrices (1 of zeros)."""
    trained = [p.detach() for p in model.parameters() if p.requires_grad]
    # Gains of normalisations are near 1 whatever the size of the weights.
    wide = [p for p in trained if p.dim() > 1] or trained
    square = sum(float(torch.linalg.vector_norm(p, dtype=_wide(p))) ** 2 for p in wide)
    size = math.sqrt(square / max(1, sum(p.numel() for p in wide)))
    return RELATIVE_RATE * (size or 1.0)


def _wide(p: torch.Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def recipe(model: nn.Module, retain: Any) -> tuple[str, Ascent]:
    """The method for sequences of this model, its name before it.

    Args:
        retain: data that is to stay, or how that is done (``Retain(...)``); None: there is none.
    """
    optimizer = Custom(factory=torch.optim.AdamW, lr=rate_of(model))
    common: Any = {"scope": Network(), "optimizer": optimizer, "epochs": EPOCHS}
    if retain is None:
        return "simnpo", Ascent(objective=SimNPO(), **common)
    if not isinstance(retain, Options):
        retain = Retain(data=retain, retain_loss="kl", retain_weight=RETAIN_WEIGHT)
    return "uniform", Ascent(retain=retain, **common)


def why(kept: bool, given: Mapping[str, Any]) -> str:
    """Why this recipe, as far as the options that were given leave it what was measured."""
    other = [name for name in _OTHER if given.get(name) is not None]
    if other:
        return f"the recipe for sequences, with {', '.join(other)} as given"
    has = "data that is to stay, too" if kept else "the forget set alone"
    return f"nearest to retraining of those that have {has}"


def check_depth(depths: Depths) -> None:
    """Raise InputError where no depth is named: there is none that is right for every text."""
    if not depths.rules:
        raise InputError(
            "stop=None with method='auto' for sequences: pass unseen=X, X the model's token "
            "accuracy on text that it never saw, such as 0.31, or a loader of such text; or "
            "another depth, such as stop=imu_fast.StopRule(forget_loss=4.0)"
        )
