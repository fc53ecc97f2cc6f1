"""The best forget-only recipe found so far, by task: ``bench/FINDINGS.md`` has the evidence.

* A class: ascent of the forgotten classes' rows alone. What another row would do for a sample of a
  kept class cannot get worse that way: only the forgotten class's own logit moves.
* Samples drawn across classes: the margin edit, the smallest disturbance that flips them.

Without a stop rule both go to forget accuracy zero. Both change the head alone: what the features
know of the forgotten remains, as the probe and the relearning steps of a comparison show. Where
that matters, ``method="npo", scope="all"`` or retraining is what there is.
"""

from __future__ import annotations

from torch import Tensor


def is_class(labels: Tensor, classes: int) -> bool:
    """Whether forget labels [n] are of chosen classes rather than drawn across all of them.

    They are if they hit fewer than half as many of the C classes as n uniform draws would, which
    is ``C (1 - (1 - 1/C)^n)`` in expectation.
    """
    expected = classes * (1 - (1 - 1 / classes) ** len(labels))
    return len(labels.unique()) < expected / 2


def choose(labels: Tensor, classes: int) -> str:
    """The name of the method for these forget labels [n]."""
    return "single_row" if is_class(labels, classes) else "margin_edit"
