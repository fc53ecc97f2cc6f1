"""Predicted time of every kernel on an H200, from counted bytes and FLOPs: ``make roofline``.

A prediction is ``max(bytes / bandwidth, FLOPs / rate)``: what the card's limits allow, not what a
kernel reached. A run on a GPU confirms or refutes it. The counts are the package's.
"""

from __future__ import annotations

from imu_fast.check.counts import Ceilings as Ceilings
from imu_fast.check.counts import Cost as Cost
from imu_fast.check.counts import bilinear_scores as bilinear_scores
from imu_fast.check.counts import conjugate_gradient as conjugate_gradient
from imu_fast.check.counts import fisher_diagonal as fisher_diagonal
from imu_fast.check.counts import ggn_product as ggn_product
from imu_fast.check.counts import gram as gram
from imu_fast.check.counts import head_ascent as head_ascent
from imu_fast.check.counts import linear_softmax_scores as linear_softmax_scores
from imu_fast.check.counts import mean_gradient as mean_gradient
from imu_fast.check.counts import normaliser as normaliser
from imu_fast.check.counts import residual as residual
from imu_fast.check.counts import scoring as scoring
from imu_fast.check.counts import softmax_residual as softmax_residual

# Measured: device copy (read plus written), bf16 matrix product on random data. Assumed from the
# data sheet's ratios: TF32 at half the bf16 rate, float32 at 67 TFLOP/s.
H200 = Ceilings(4.3e12, {"bf16": 790e12, "tf32": 395e12, "fp32": 67e12})

IMAGES = {"N": 50_000, "C": 1_000, "d": 2_048}
TOKENS = {"N": 32_768, "C": 1_000, "d": 1_024}
PROBLEMS = [
    (softmax_residual, "bf16", {"N": 50_000, "C": 1_000}),
    (softmax_residual, "bf16", {"N": 4_096, "C": 128_256}),
    (fisher_diagonal, "bf16", IMAGES),
    (fisher_diagonal, "tf32", IMAGES),
    (fisher_diagonal, "fp32", IMAGES),
    (fisher_diagonal, "bf16", {**TOKENS, "n": 512}),
    (bilinear_scores, "bf16", IMAGES),
    (bilinear_scores, "tf32", IMAGES),
    (bilinear_scores, "fp32", IMAGES),
    (bilinear_scores, "bf16", {**IMAGES, "m": 8}),
    (gram, "bf16", {"N": 16_384, "C": 1_000, "d": 2_048}),
    (gram, "bf16", {**TOKENS, "n": 512}),
    (ggn_product, "tf32", IMAGES),
    (ggn_product, "fp32", IMAGES),
    (ggn_product, "tf32", {**IMAGES, "m": 8}),
    (conjugate_gradient, "fp32", {"C": 1_000, "d": 2_048}),
    (conjugate_gradient, "fp32", {"C": 1_000, "d": 2_048, "m": 8, "preconditioned": 1}),
    (head_ascent, "tf32", {"N": 256, "C": 1_000, "d": 2_048}),
    (head_ascent, "fp32", {"N": 256, "C": 1_000, "d": 2_048}),
    (head_ascent, "bf16", {"N": 4_096, "C": 1_000, "d": 2_048}),
    (scoring, "bf16", IMAGES),
    (normaliser, "bf16", {"N": 8_192, "C": 128_256, "d": 4_096}),
    (residual, "bf16", {"N": 8_192, "C": 4_096, "d": 4_096}),
    (linear_softmax_scores, "bf16", {"N": 8_192, "C": 128_256, "d": 4_096}),
    (linear_softmax_scores, "tf32", {"N": 8_192, "C": 128_256, "d": 4_096}),
]


def table() -> list[list[str]]:
    """One row per kernel and problem: sizes, arithmetic, GB, TFLOP, bound, predicted ms."""
    rows = []
    for count, kind, sizes in PROBLEMS:
        cost = count(kind, **sizes)
        shape = " ".join(f"{name}={size:,}" for name, size in sizes.items())
        amounts = f"{cost.bytes / 1e9:.3f}", f"{cost.flops / 1e12:.3f}"
        rows.append(
            [
                count.__name__,
                kind,
                shape,
                *amounts,
                cost.bound_on(H200),
                f"{1e3 * cost.seconds_on(H200):.3f}",
            ]
        )
    return rows


def main() -> None:
    from tabulate import tabulate

    print("Predicted, not measured: the roofline of an H200 (4.3 TB/s, 790 TFLOP/s bf16).")
    names = ["kernel", "dots in", "sizes", "GB", "TFLOP", "bound by", "ms"]
    print(tabulate(table(), names, disable_numparse=True, colalign=("left",) * 3))


if __name__ == "__main__":
    main()
