"""The predictions' bookkeeping: FLOPs against torch's own counter, bounds against arithmetic."""

from __future__ import annotations

import pytest
import roofline
import torch
from torch.utils.flop_counter import FlopCounterMode

from imu_fast.ops.bilinear_scores import bilinear_scores
from imu_fast.ops.fisher_diagonal import fisher_diagonal
from imu_fast.ops.ggn_product import ggn_product

N, C, D = 20, 6, 9


def addmm_flops(out, left, right, **_):
    """``out += left @ right``, which the counter does not know in place; arguments are shapes."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("operation", ["fisher_diagonal", "bilinear_scores", "ggn_product"])
def test_flops_are_those_that_torch_counts(operation):
    delta, act, x = torch.rand(N, C), torch.rand(N, D - 1), torch.rand(C, D - 1)
    offsets = torch.arange(N + 1)
    in_place = {torch.ops.aten.addmm_: addmm_flops}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        if operation == "fisher_diagonal":
            fisher_diagonal(delta, act, offsets, False)
        elif operation == "bilinear_scores":
            bilinear_scores(delta, act, x, offsets, False)
        else:
            ggn_product(delta, delta[:, 0], act, x, N, 0.1, False)
    predicted = getattr(roofline, operation)("fp32", N, C, D - 1).flops
    assert counter.get_total_flops() * D == predicted * (D - 1)  # the table counts a bias column


def test_scoring_is_bound_by_flops_and_fits_the_goal():
    """50,000 samples at d=2,048, C=1,000 in bf16 in under 4 ms is within the card's limits."""
    cost = roofline.scoring("bf16", **roofline.IMAGES)
    assert cost.bound_on(roofline.H200) == "FLOPs" and cost.flops == 6 * 50_000 * 1_000 * 2_049
    assert cost.seconds_on(roofline.H200) == pytest.approx(cost.flops / 790e12)
    assert cost.seconds_on(roofline.H200) < 4e-3


def test_every_row_is_printed(capsys):
    roofline.main()
    printed = capsys.readouterr().out
    assert all(row[-1] in printed for row in roofline.table())


def test_vector_updates_are_bound_by_bytes():
    """44 bytes per entry and system: two reads, then six, then three, of float32."""
    one, eight = (roofline.conjugate_gradient("fp32", 1_000, 2_048, m) for m in (1, 8))
    assert one.bound_on(roofline.H200) == eight.bound_on(roofline.H200) == "bytes"
    assert one.bytes == 44 * 1_000 * 2_049 and eight.bytes == 8 * one.bytes
    step = roofline.head_ascent("tf32", 256, 1_000, 2_048)
    assert step.bound_on(roofline.H200) == "bytes" and step.bytes >= 5 * 4 * 1_000 * 2_049
    # Beside its two products the step does little.
    assert step.flops == pytest.approx(4 * 256 * 1_000 * 2_049, rel=0.02)
