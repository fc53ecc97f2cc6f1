"""``gbar = 1/n sum_i g_i``: one matrix product, since the mean over samples sums all tokens."""

from __future__ import annotations

from torch import Tensor

from imu_fast import backend


def gradient_sum(delta: Tensor, act: Tensor, has_bias: bool) -> Tensor:
    """``sum_t delta_t (x) a~_t``: [N, C], [N, d] to [C, D]; the bias column without storing a~."""
    out = delta.new_empty(delta.shape[1], act.shape[1] + has_bias)
    if has_bias:
        out[:, -1] = delta.sum(dim=0)
    out[:, : act.shape[1]] = delta.t() @ act
    return out


def mean_gradient(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> Tensor:
    """Mean per-sample gradient [C, D], SPEC section 3.

    Args:
        delta: [N, C]. act: [N, d]. offsets: [n+1]. has_bias: whether a~ has a trailing 1.
    """
    if backend.resolve("mean_gradient", ("reference", "torch")) == "reference":
        from imu_fast import reference

        return reference.mean_gradient(delta, act, offsets, has_bias).to(delta.dtype)
    return gradient_sum(delta, act, has_bias) / (len(offsets) - 1)
