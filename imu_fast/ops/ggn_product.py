"""The GGN-vector product of a head, streamed over tokens."""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from imu_fast.ops.mean_gradient import add_gradients
from imu_fast.ops.operation import PRODUCTS, kernel_dtypes, operation

# How the outputs meet in the loss: as a softmax's do, not at all, or by a matrix of each token.
Form = Literal["softmax", "diagonal", "dense"]
# Bytes of a chunk's largest array; three or four of them stay in cache, and each product is long
# enough to run at full speed.
CHUNK_BYTES = 1 << 22


def _kernel_limits(
    p: Tensor,
    scale: Tensor,
    act: Tensor,
    v: Tensor,
    n: int,
    damping: float,
    has_bias: bool,
    form: Form = "softmax",
    top: Tensor | None = None,
) -> str:
    if form == "dense":
        return "outputs that are coupled by a matrix of each token have no kernel"
    if v.dtype in (torch.bfloat16, torch.float16):
        return f"V is {v.dtype}, and products are computed in V's dtype"
    return kernel_dtypes(p, act, v)


def _launch(
    p: Tensor,
    scale: Tensor,
    act: Tensor,
    v: Tensor,
    n: int,
    damping: float,
    has_bias: bool,
    form: Form = "softmax",
    top: Tensor | None = None,
    *,
    precision: str,
) -> Tensor:
    from imu_fast.kernels import ggn_product as kernel

    many = v if v.dim() == 3 else v[None]
    top = p.argmax(dim=1) if form == "softmax" and top is None else top
    out = kernel.ggn_product(p, scale, act, many, n, damping, has_bias, top, precision)
    return out if v.dim() == 3 else out[0]


def _decide(
    p: Tensor, scale: Tensor, act: Tensor, v: Tensor, *_: object, **__: object
) -> tuple[Tensor]:
    """A solver's iterates, which stall where products are coarser than they are."""
    return (v,)


def _by_definition(
    reference: ModuleType,
    p: Tensor,
    scale: Tensor,
    act: Tensor,
    v: Tensor,
    n: int,
    damping: float,
    has_bias: bool,
    form: Form = "softmax",
    top: Tensor | None = None,
) -> Tensor:
    found: Tensor = reference.ggn_product(p, scale, act, v, n, damping, has_bias, form)
    return found.to(v.dtype)


@operation(
    reference=_by_definition,
    kernel=_launch,
    limits=_kernel_limits,
    products=PRODUCTS,
    decide=_decide,
)
def ggn_product(
    p: Tensor,
    scale: Tensor,
    act: Tensor,
    v: Tensor,
    n: int,
    damping: float,
    has_bias: bool,
    form: Form = "softmax",
    top: Tensor | None = None,
) -> Tensor:
    """``HV = 1/n sum_t B_t V a~_t a~_t^T + lam V``, ``B = c (diag(p) - p p^T)`` of a softmax.

    With ``u = a~ V^T`` and ``s = B u`` it is ``s^T a~ / n + lam V``; u and s exist for one chunk of
    tokens at a time. Of a softmax ``B u = c p (u' - p.u')`` with u' relative to the likeliest
    class: of a confident sample ``u - p.u`` would cancel there. Computed in v's dtype, p and act
    converted chunk by chunk.

    Args:
        p: [N, C], softmax probabilities; of the form "diagonal" h [N, C] with
            ``B = c diag(h)``; of "dense" b [N, C, C] with ``B = c b``.
        scale: [N], the ``c_t``. act: [N, d]. has_bias: whether a~ has a trailing 1.
        v: [C, D], or [m, C, D] for m of them. n: number of samples. damping: lam.
        form: "softmax", "diagonal" or "dense".
        top: the likeliest class [N] of a softmax, where it is known.

    Returns:
        v's shape and dtype.
    """
    # Several V are one tall one: their classes one below the other in both matrix products. Class
    # by class, s [m C, tokens], both are as fast as the widest of their sides allows.
    classes, d = p.shape[1], act.shape[1]
    tall = v.reshape(-1, v.shape[-1])
    weight, bias = tall[:, :d], tall[:, d, None] if has_bias else None
    out = tall * damping
    if form == "softmax" and top is None:
        top = p.argmax(dim=1)
    step = max(1, CHUNK_BYTES // (v.itemsize * max(len(tall), d)))
    if form == "dense":
        step = max(1, min(step, CHUNK_BYTES // (v.itemsize * classes**2)))
    for start in range(0, len(act), step):
        rows = slice(start, start + step)
        a, q = act[rows].to(v.dtype), p[rows].to(v.dtype)
        u = weight @ a.t() if bias is None else torch.addmm(bias, weight, a.t())
        u = u.view(-1, classes, len(a))
        if form == "dense":
            s = (q @ u.permute(2, 1, 0)).permute(2, 1, 0).contiguous()
        elif form == "diagonal":
            s = u.mul_(q.t())
        else:
            assert top is not None
            u -= u.gather(1, top[rows].expand(len(u), 1, -1))
            s = u.mul_(q.t())
            s.addcmul_(q.t(), s.sum(dim=1, keepdim=True), value=-1.0)
        s.mul_(scale[rows].to(v.dtype))
        add_gradients(out, s.flatten(0, 1).t(), a, has_bias, beta=1.0, alpha=1 / n)
    return out.view(v.shape)
