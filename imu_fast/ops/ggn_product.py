"""The GGN-vector product of a softmax head, streamed over tokens."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from imu_fast.backend import input_precision
from imu_fast.ops.mean_gradient import add_gradients
from imu_fast.ops.operation import kernel_dtypes, operation

# Bytes of a chunk's largest array; three or four of them stay in cache, and each product is long
# enough to run at full speed.
CHUNK_BYTES = 1 << 22


def _kernel_limits(
    p: Tensor, scale: Tensor, act: Tensor, v: Tensor, n: int, damping: float, has_bias: bool
) -> str:
    if v.dtype in (torch.bfloat16, torch.float16):
        return f"V is {v.dtype}, and products are computed in V's dtype"
    return kernel_dtypes(p, act, v)


def _launch(
    p: Tensor, scale: Tensor, act: Tensor, v: Tensor, n: int, damping: float, has_bias: bool
) -> Tensor:
    from imu_fast.kernels import ggn_product as kernel

    many = v if v.dim() == 3 else v[None]
    out = kernel.ggn_product(p, scale, act, many, n, damping, has_bias, input_precision())
    return out if v.dim() == 3 else out[0]


def _by_definition(
    reference: ModuleType,
    p: Tensor,
    scale: Tensor,
    act: Tensor,
    v: Tensor,
    n: int,
    damping: float,
    has_bias: bool,
) -> Tensor:
    found: Tensor = reference.ggn_product(p, scale, act, v, n, damping, has_bias)
    return found.to(v.dtype)


@operation(reference=_by_definition, kernel=_launch, limits=_kernel_limits)
def ggn_product(
    p: Tensor, scale: Tensor, act: Tensor, v: Tensor, n: int, damping: float, has_bias: bool
) -> Tensor:
    """``HV = 1/n sum_t c_t (diag(p_t) - p_t p_t^T) V a~_t a~_t^T + lam V``.

    With ``u = a~ V^T`` and ``s = c (p u - p (p.u))`` it is ``s^T a~ / n + lam V``; u and s exist
    for one chunk of tokens at a time. Computed in v's dtype, p and act converted chunk by chunk.

    Args:
        p: [N, C], softmax probabilities. scale: [N], the ``c_t``. act: [N, d].
        v: [C, D], or [m, C, D] for m of them. n: number of samples. damping: lam.

    Returns:
        v's shape and dtype.
    """
    # Several V are one tall one: their classes one below the other in both matrix products. Class
    # by class, s [m C, tokens], both are as fast as the widest of their sides allows.
    classes, d = p.shape[1], act.shape[1]
    tall = v.reshape(-1, v.shape[-1])
    weight, bias = tall[:, :d], tall[:, d, None] if has_bias else None
    out = tall * damping
    step = max(1, CHUNK_BYTES // (v.itemsize * max(len(tall), d)))
    for start in range(0, len(act), step):
        rows = slice(start, start + step)
        a, q = act[rows].to(v.dtype), p[rows].t().to(v.dtype)
        u = weight @ a.t() if bias is None else torch.addmm(bias, weight, a.t())
        s = u.view(-1, classes, len(a)).mul_(q)
        s.addcmul_(q, s.sum(dim=1, keepdim=True), value=-1.0)
        s.mul_(scale[rows].to(v.dtype))
        add_gradients(out, s.flatten(0, 1).t(), a, has_bias, beta=1.0, alpha=1 / n)
    return out.view(v.shape)
