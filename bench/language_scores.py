"""Scores of language models by the one-line call: ``python bench/language_scores.py``.

Small configurations with random weights, untied and tied, padded right and left, one sample
without a label. The truth is autograd of the model's own loss in float64, one sample at a time, in
the head's weight (of a tied head its own use of it) and in one attention layer's. Exits with 1
above 1e-5.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import language_models as lm
from per_sample import scores

import imu_fast as imu

TOLERANCE = 1e-5


def error(found: Tensor, truth: Tensor) -> float:
    """Relative, over all samples."""
    return float((found.double() - truth).norm() / truth.norm())


def row(kind: str, tied: bool) -> tuple[str, float]:
    """One line of the table, and its largest error in float32."""
    head, attention = lm.KINDS[kind].head, lm.KINDS[kind].attention
    model, found = lm.make(kind, tied), []
    for padding in ("right", "left"):
        data = lm.batch(kind, padding=padding)
        truth = scores(lm.gradients(model, kind, data, head))
        found.append(error(imu.influence_scores(model, [data]), truth))
    data = lm.batch(kind)
    truth = scores(lm.gradients(model, kind, data, attention))
    found.append(error(imu.influence_scores(model, [data], layers=[attention]), truth))
    half = model.bfloat16()
    truth = scores(lm.gradients(half, kind, data, head))
    coarse = error(imu.influence_scores(half, [data]), truth)
    shown = " | ".join(f"{e:.1e}" for e in [*found, coarse])
    return f"| {kind}{' tied' * tied} | {shown} |", max(found)


def main() -> int:
    logging.getLogger("imu_fast").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print("| model | head, right | head, left | attention | head, bf16 |")
    print("| --- | --- | --- | --- | --- |")
    worst = 0.0
    for kind, made in lm.KINDS.items():
        for tied in (False, True)[: 1 + made.tied]:
            line, largest = row(kind, tied)
            print(line)
            worst = max(worst, largest)
    print(f"largest in float32: {worst:.1e}")
    return int(not worst < TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
