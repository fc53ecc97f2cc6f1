"""``gbar = 1/n sum_i g_i``: one matrix product, since the mean over samples sums all tokens."""

from __future__ import annotations

from torch import Tensor

from imu_fast.ops.operation import PRODUCTS, operation
from imu_fast.ops.tokens import widened


def add_gradients(
    out: Tensor, delta: Tensor, act: Tensor, has_bias: bool, *, beta: float, alpha: float
) -> Tensor:
    """``out = beta out + alpha sum_t delta_t (x) a~_t``, in place: [N, C], [N, d] into [C, D].

    One matrix product straight into ``out``; the bias column without storing a~. With ``beta=0``
    what ``out`` held is not read.
    """
    d = act.shape[1]
    out[:, :d].addmm_(delta.t(), act, beta=beta, alpha=alpha)
    if has_bias:
        column = delta.sum(dim=0)
        if alpha != 1:
            column.mul_(alpha)
        out[:, d] = column if beta == 0 else out[:, d] * beta + column
    return out


@operation(products=PRODUCTS)
def mean_gradient(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> Tensor:
    """``gbar = 1/n sum_i g_i``, the mean per-sample gradient.

    Args:
        delta: [N, C]. act: [N, d], delta's dtype or a narrower one. offsets: [n+1].
        has_bias: whether a~ has a trailing 1.

    Returns:
        [C, D] in delta's dtype.
    """
    out = delta.new_empty(delta.shape[1], act.shape[1] + has_bias)
    alpha = 1 / (offsets.shape[0] - 1)
    if act.dtype == delta.dtype:
        return add_gradients(out, delta, act, has_bias, beta=0.0, alpha=alpha)
    for i, (signal, inputs, _) in enumerate(widened(delta, act, offsets)):
        add_gradients(out, signal, inputs, has_bias, beta=float(i > 0), alpha=alpha)
    return out
