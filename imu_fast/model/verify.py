"""Whether a layer's output is ``act W^T + b``, to the rounding of what it was computed in."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from imu_fast.model.head import LinearLayer
from imu_fast.model.run import full_precision

# Multiply-adds that a check may cost; beyond, rows are drawn evenly.
_BUDGET = 1 << 31
# Rows checked in each batch after the first.
SAMPLED_ROWS = 4
# Multiples of the expected rounding that a sound layer may be off by.
_SAFETY = 8.0


def deviation(layer: LinearLayer, act: Tensor, out: Tensor, rows: int | None = None) -> str:
    """What is wrong with the claim ``out = act W^T + b``; empty if it holds.

    A sum of d products that is rounded at each step is off by about ``sqrt(d) u sum |a w|`` (errors
    add up like a random walk; Higham and Mary 2019), u of the dtype that accumulates; operands or
    outputs in a coarser dtype add its u times the size of the terms, ``|out| + |a * w|_2``.

    Args:
        act: [..., d]. out: [..., C], what the layer returned.
        rows: how many are checked, spread evenly; None: all that the budget allows.
    """
    weight, bias = layer.weight, layer.bias
    if not weight.is_floating_point() or type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {type(weight).__name__} of {weight.dtype}, quantised or sharded"
    act, out = act.reshape(-1, act.shape[-1]), out.reshape(-1, out.shape[-1])
    if act.shape[1] != weight.shape[1] or out.shape != (len(act), len(weight)):
        return f"it maps {tuple(act.shape)} to {tuple(out.shape)} by a weight {tuple(weight.shape)}"
    budget = max(1, _BUDGET // max(1, weight.numel()))
    count = min(len(act), budget, len(act) if rows is None else rows)
    if count < len(act):
        chosen = torch.linspace(0, len(act) - 1, count, device=act.device).round().long()
        act, out = act[chosen], out[chosen]
    return _compare(act, weight, bias, out)


def _compare(act: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> str:
    d = act.shape[1]
    dtypes = (act.dtype, weight.dtype, out.dtype)
    wide = torch.float64 if all(t == torch.float64 for t in dtypes) else torch.float32
    fine = torch.finfo(wide).eps / 2
    coarse = max(torch.finfo(t).eps / 2 for t in dtypes)
    if act.is_cuda and wide == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        coarse = max(coarse, 2.0**-11)
    a, w = act.to(wide), weight.to(wide)
    b = a.new_zeros(len(w)) if bias is None else bias.to(wide)
    with full_precision(act.device):
        off = (out.to(wide) - torch.nn.functional.linear(a, w, b)).abs_()
        # |a||w| bounds sum |a w|, and is about sqrt(d) |a * w|_2 where no entry stands out.
        size = a.norm(dim=1)[:, None] * w.norm(dim=1)
        walk, terms = math.sqrt(d) + 2, size / math.sqrt(d)
        allowed = fine * walk * size + coarse * (terms + out.to(wide).abs())
        allowed += (fine + coarse) * b.abs()
        # Not finite on both sides is for another check to report.
        wrong = (off > _SAFETY * allowed) & torch.isfinite(off)
        wrong |= torch.isfinite(out) & ~torch.isfinite(off)
        suspects = torch.nonzero(wrong)
        for row, column in suspects[:: max(1, len(suspects) // 64)]:
            spread = (a[row].double() * w[column].double()).norm()
            bound = _SAFETY * (allowed[row, column] + coarse * spread)
            if not off[row, column] <= bound:
                return (
                    f"output {int(column)} of row {int(row)} is {float(out[row, column]):.6g}, "
                    f"off by {float(off[row, column]):.2g} where rounding allows {float(bound):.1g}"
                )
    return ""
