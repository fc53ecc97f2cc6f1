"""Whether a layer's output is ``act W^T + b``, to the rounding of what it was computed in."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from imu_fast.errors import NoHeadFoundError
from imu_fast.model.head import LinearLayer
from imu_fast.model.run import full_precision

# Multiply-adds that a check may cost; beyond, rows are drawn evenly.
_BUDGET = 1 << 30
# Rows and columns checked in each batch after the first, and batches whose rows wait for a check.
_ROWS, _COLUMNS, _WAITING = 4, 256, 64
# Outputs that are compared as one sum before any is compared by itself.
_GROUP = 16
_FORWARDS = tuple(
    kind.forward
    for kind in (
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    )
)
# Multiples of the expected rounding that a sound layer may be off by.
_SAFETY = 8.0


def deviation(layer: LinearLayer, act: Tensor, out: Tensor, columns: slice | None = None) -> str:
    """What is wrong with the claim ``out = act W^T + b``; empty if it holds.

    A sum of d products that is rounded at each step is off by about ``sqrt(d) u sum |a w|`` (errors
    add up like a random walk; Higham and Mary 2019), u of the dtype that accumulates; operands or
    outputs in a coarser dtype add its u times the size of the terms, ``|out| + |a * w|_2``.

    Args:
        act: [..., d], of several groups [..., G d]. out: [..., C], what the layer returned; more
            rows than the budget allows are drawn evenly. columns: which outputs these are, of one
            group; None: all.
    """
    weight, bias = layer.weight, layer.bias
    if not weight.is_floating_point() or type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {type(weight).__name__} of {weight.dtype}, quantised or sharded"
    if columns is not None:
        weight, bias = weight[columns], None if bias is None else bias[columns]
    act, out = act.reshape(-1, act.shape[-1]), out.reshape(-1, out.shape[-1])
    if act.shape[1] != weight.shape[1] * layer.groups or out.shape != (len(act), len(weight)):
        return f"it maps {tuple(act.shape)} to {tuple(out.shape)} by a weight {tuple(weight.shape)}"
    budget = max(1, _BUDGET // max(1, weight.numel()))
    if len(act) > budget:
        chosen = torch.linspace(0, len(act) - 1, budget, device=act.device).round().long()
        act, out = act[chosen], out[chosen]
    return _compare(act, weight, bias, out, layer.groups)


def _compare(act: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, groups: int = 1) -> str:
    d = weight.shape[1]
    dtypes = (act.dtype, weight.dtype, out.dtype)
    wide = torch.float64 if all(t == torch.float64 for t in dtypes) else torch.float32
    fine = torch.finfo(wide).eps / 2
    coarse = max(torch.finfo(t).eps / 2 for t in dtypes)
    if act.is_cuda and wide == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        coarse = max(coarse, 2.0**-11)
    walk = math.sqrt(d) + 2
    w = weight.to(wide)
    b = w.new_zeros(len(w)) if bias is None else bias.to(wide)
    with full_precision(act.device):
        a = act.to(wide).unflatten(1, (groups, d))
        heights, widths = a.norm(dim=2), w.norm(dim=1)
        rows = torch.arange(len(a), device=a.device)
        if groups == 1:
            # Most rows are far within what the smallest output may be off by.
            sound = _SAFETY * fine * walk * heights[:, 0] * widths.amin()
            rows = torch.nonzero(~(_off_in_groups(a[:, 0], w, b, out) <= sound)).flatten()
            if not len(rows):
                return ""
        a, heights, out = a[rows], heights[rows], out[rows].to(wide)
        each = w.unflatten(0, (groups, -1))
        if groups == 1:
            found = torch.nn.functional.linear(a[:, 0], w, b)
        else:
            found = torch.einsum("rgd,gcd->rgc", a, each).flatten(1).add_(b)
        off = found.sub_(out).abs_()
        # |a||w| bounds sum |a w|, and is about sqrt(d) |a * w|_2 where no entry stands out.
        size = (heights[:, :, None] * widths.unflatten(0, (groups, -1))).flatten(1)
        allowed = fine * walk * size + coarse * (size / math.sqrt(d) + out.abs())
        allowed += (fine + coarse) * b.abs()
        # What is not finite on both sides is for another check to report.
        wrong = (off > _SAFETY * allowed) & torch.isfinite(off)
        wrong |= torch.isfinite(out) & ~torch.isfinite(off)
        suspects = torch.nonzero(wrong)
        for row, column in suspects[:: max(1, len(suspects) // 64)]:
            spread = (a[row, column // each.shape[1]] * w[column]).norm()
            bound = _SAFETY * (allowed[row, column] + coarse * spread)
            if not off[row, column] <= bound:
                return (
                    f"output {int(column)} of row {int(rows[row])} is "
                    f"{float(out[row, column]):.6g}, off by {float(off[row, column]):.2g} where "
                    f"rounding allows {float(bound):.1g}"
                )
    return ""


def _off_in_groups(a: Tensor, w: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """The largest ``|sum_j s_j (a . w_j + b_j - out_j)|`` of groups j of outputs: [rows].

    The signs and sizes s, in 1 to 2, are random: errors of single outputs, of all of them or of a
    few that are alike show at no less than their size, rounding grows by the root of a group's
    size, and the product is smaller by that size.
    """
    classes = len(w)
    generator = torch.Generator().manual_seed(classes)
    s = 1 + torch.rand(classes, generator=generator, dtype=a.dtype)
    s = (s * (2 * torch.randint(2, (classes,), generator=generator) - 1)).to(a.device)
    whole = classes // _GROUP * _GROUP

    def summed(t: Tensor) -> Tensor:
        """[C, k] to [groups, k], the last group a smaller one; without a copy of t."""
        groups = s[:whole].view(-1, 1, _GROUP) @ t[:whole].unflatten(0, (-1, _GROUP))
        return torch.cat([groups[:, 0], (s[whole:] @ t[whole:])[None]])

    weighted = out * s
    grouped = torch.cat(
        [
            weighted[:, :whole].unflatten(1, (-1, _GROUP)).sum(dim=2),
            weighted[:, whole:].sum(dim=1, keepdim=True),
        ],
        dim=1,
    )
    bias = summed(b[:, None])[:, 0]
    return torch.nn.functional.linear(a, summed(w), bias).sub_(grouped).abs_().amax(dim=1)


class LinearChecks:
    """The claim about every call of some layers: in full at first, then on rows of each batch.

    Rows of later calls are put by and checked many at once, which costs next to nothing.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._known: dict[str, LinearLayer] = {}
        self._round = 0

    def add(self, layer: LinearLayer, act: Tensor, out: Tensor) -> None:
        """One call: act [..., d], and out [..., C] as the layer returned it.

        Raises:
            NoHeadFoundError: it, or one before it, is not ``act W^T + b``.
        """
        if layer.name not in self._known or not is_known(layer):
            _refuse(layer, deviation(layer, act, out))
            self._known[layer.name] = layer
            return
        act, out = act.reshape(-1, act.shape[-1]), out.reshape(-1, out.shape[-1])
        every = max(1, len(act) // _ROWS)
        waiting = self._waiting.setdefault(layer.name, [])
        waiting.append((act[::every].clone(), out[::every, self._columns(layer)].clone()))
        if len(waiting) >= _WAITING:
            self.finish()

    def finish(self) -> None:
        """Check what waits.

        Raises:
            NoHeadFoundError: a call was not ``act W^T + b``.
        """
        for name, waiting in self._waiting.items():
            layer = self._known[name]
            act, out = (torch.cat([pair[i] for pair in waiting]) for i in (0, 1))
            _refuse(layer, deviation(layer, act, out, self._columns(layer)))
        self._waiting.clear()
        self._round += 1

    def _columns(self, layer: LinearLayer) -> slice:
        if layer.groups > 1:
            return slice(None)
        step = max(1, layer.width // _COLUMNS)
        return slice(self._round % step, None, step)


def is_known(layer: LinearLayer) -> bool:
    """Whether the module's forward is torch's own, not a subclass's or set on the instance."""
    return getattr(layer.module.forward, "__func__", None) in _FORWARDS


def _refuse(layer: LinearLayer, wrong: str) -> None:
    if wrong:
        raise NoHeadFoundError(
            f"layer {layer.name!r} is a {layer.kind} whose output is not act W^T + b: {wrong}; "
            "score other layers, or pass its own features and effective weight to "
            "GradientFactors.from_head"
        )
