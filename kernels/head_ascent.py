"""One reweighted ascent step at a softmax head: residual, gradient and SGD update, in two launches.

The first turns logits into the residual of the objective, weighted; the second multiplies it with
the features and ends, in the same registers, with L1, weight decay, momentum and the update, so
that theta and its momentum are each read once and written once. The logits are torch's product.

FLOPs: 2 B C D. Bytes: z read, delta written; theta and momentum read and written; features once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from imu_fast.kernels.specialisation import (
    ALIGN,
    Specialisation,
    aligned,
    dots,
    eights,
    forms,
    specialise,
)

# (BLOCK_N rows, BLOCK_C classes, num_warps): the first that holds all classes, else the last.
RESIDUAL_CONFIGS = [(64, 16, 4), (8, 128, 4), (1, 2048, 4)]
# Of the update. Half-precision features are exact in TF32, where a small share of a weighted
# residual keeps its exponent and 11 bits: so there is no "half" and no "bf16". theta and its
# momentum join the tile in registers: twice this tile spills.
CONFIGS = {
    "ieee": {"BLOCK_C": 64, "BLOCK_K": 64, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2},
    "tf32x3": {"BLOCK_C": 64, "BLOCK_K": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
    "tf32": {"BLOCK_C": 64, "BLOCK_K": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
}
# Below every logit: a finite stand-in for minus infinity, whose differences are not NaN.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def ascent_residual_kernel(
    logits_ptr,
    labels_ptr,
    share_ptr,
    delta_ptr,
    loss_ptr,
    N,
    C,
    stride_zn,
    stride_zc,
    stride_dn,
    OBJECTIVE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_N rows, all classes, of ``delta = - share d f / d z`` and ``- share f``.

        m = max_{j != y} z_j,   others = sum_{j != y} e^{z_j - m},   p_y = 1 - q
        ce:      f = -log p_y,               f'_j = p_j,                      f'_y = -q
        margin:  f = -max(0, z_y - m),       f'_j = 1 at the first maximum,   f'_y = -1, if z_y >= m
        log1mp:  f = log(1 - p_y),           f'_j = p_y e^{z_j - m} / others, f'_y = -p_y

    q and p_y are sums of what they are made of, never ``1 - p``, which would cancel.

    logits_ptr [N, C]; labels_ptr [N] int64; share_ptr [N]: w / sum w; delta_ptr [N, C] float32,
    rows stride_dn apart and filled with zeros; loss_ptr [N] float32.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < N
    n = n.to(tl.int64)
    label = tl.load(labels_ptr + n, mask=mask_n, other=0)
    share = tl.load(share_ptr + n, mask=mask_n, other=0.0).to(tl.float32)
    row_ptr = logits_ptr + n[:, None] * stride_zn
    z_y = tl.load(logits_ptr + n * stride_zn + label * stride_zc, mask=mask_n, other=0.0)
    z_y = z_y.to(tl.float32)

    m = tl.full([BLOCK_N], LOWEST, tl.float32)
    others = tl.zeros([BLOCK_N], tl.float32)
    runner_up = tl.full([BLOCK_N], -1, tl.int32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = mask_n[:, None] & (c < C)[None, :]
        z = tl.load(row_ptr + c[None, :].to(tl.int64) * stride_zc, mask=mask, other=LOWEST)
        is_other = (c[None, :] != label[:, None]) & mask
        z = tl.where(is_other, z.to(tl.float32), LOWEST)
        largest = tl.max(z, axis=1)
        first = tl.min(tl.where(is_other & (z == largest[:, None]), c[None, :], C), axis=1)
        runner_up = tl.where(largest > m, first, runner_up)
        new_m = tl.maximum(m, largest)
        e = tl.where(is_other, tl.exp(z - new_m[:, None]), 0.0)
        others = others * tl.exp(m - new_m) + tl.sum(e, axis=1)
        m = new_m

    # Factors of e^{z_j - m}, and the label's entry, both with the sign of ascent.
    top = tl.maximum(m, z_y)
    rest, at_label = others * tl.exp(m - top), tl.exp(z_y - top)
    total = rest + at_label
    if OBJECTIVE == "ce":
        f = top - z_y + tl.log(total)
        factor, f_y = tl.exp(m - top) / total, -rest / total
    elif OBJECTIVE == "log1mp":
        f = m - top + tl.log(others) - tl.log(total)
        factor, f_y = at_label / total / others, -at_label / total
    else:
        f = tl.minimum(m - z_y, 0.0)
        factor = tl.where(z_y >= m, 1.0, 0.0)
        f_y = -factor
    tl.store(loss_ptr + n, -share * f, mask=mask_n)

    for start in range(0, stride_dn, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask_c = c < C
        z = tl.load(
            row_ptr + c[None, :].to(tl.int64) * stride_zc,
            mask=mask_n[:, None] & mask_c[None, :],
            other=LOWEST,
        )
        if OBJECTIVE == "margin":
            f_j = tl.where(c[None, :] == runner_up[:, None], factor[:, None], 0.0)
        else:
            f_j = tl.exp(z.to(tl.float32) - m[:, None]) * factor[:, None]
        f_j = tl.where(c[None, :] == label[:, None], f_y[:, None], f_j)
        delta = tl.where(mask_c[None, :], -share[:, None] * f_j, 0.0)
        mask = mask_n[:, None] & (c < stride_dn)[None, :]
        tl.store(delta_ptr + n[:, None] * stride_dn + c[None, :], delta, mask=mask)


@triton.jit
def ascent_update_kernel(
    delta_ptr,
    act_ptr,
    theta_ptr,
    momentum_ptr,
    penalty_ptr,
    N,
    C,
    d,
    D,
    bias_column,
    lr,
    momentum,
    weight_decay,
    alpha,
    stride_dn,
    stride_dc,
    stride_an,
    stride_ak,
    stride_tc,
    stride_mc,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program: a tile (c, k) of the gradient, over all samples, and of the step along it.

        g = sum_n delta[n,c] a~[n,k] + alpha sign(theta) + weight_decay theta
        buffer <- momentum buffer + g,   theta <- theta - lr buffer

    a~ is act with a 1 in bias_column (-1: none); d and the rows of delta and act are padded with
    zeros to multiples of 8.

    delta_ptr [N, C]; act_ptr [N, d]; theta_ptr [C, D] float32 and momentum_ptr, the buffer, alike
    or None, both in place; penalty_ptr [tiles of columns, tiles of classes] float32:
    ``alpha sum |theta|`` before the step.
    """
    width, d = tl.cdiv(C, 8) * 8, eights(d)
    stride_dn, stride_an = eights(stride_dn), eights(stride_an)
    tile_c, tile_k = tl.program_id(0), tl.program_id(1)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_c, mask_k = c < width, k < d
    c, k = c.to(tl.int64), k.to(tl.int64)

    g = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask_n = n < N
        n = n.to(tl.int64)
        delta = tl.load(
            delta_ptr + n[None, :] * stride_dn + c[:, None] * stride_dc,
            mask=mask_n[None, :] & mask_c[:, None],
            other=0.0,
        )
        a = tl.load(
            act_ptr + n[:, None] * stride_an + k[None, :] * stride_ak,
            mask=mask_n[:, None] & mask_k[None, :],
            other=0.0,
        ).to(DOT)
        a = tl.where(k[None, :] == bias_column, 1.0, a)
        g = tl.dot(delta.to(DOT), a.to(DOT), g, input_precision=INPUT_PRECISION)

    mask = (c < C)[:, None] & (k < D)[None, :]
    tile_ptr = theta_ptr + c[:, None] * stride_tc + k[None, :]
    theta = tl.load(tile_ptr, mask=mask, other=0.0)
    penalty = alpha * tl.sum(tl.sum(tl.abs(theta), axis=1), axis=0)
    tl.store(penalty_ptr + tile_k * tl.num_programs(0) + tile_c, penalty)
    sign = tl.where(theta > 0, 1.0, tl.where(theta < 0, -1.0, 0.0))
    g += alpha * sign + weight_decay * theta
    if momentum_ptr is not None:
        buffer_ptr = momentum_ptr + c[:, None] * stride_mc + k[None, :]
        g += momentum * tl.load(buffer_ptr, mask=mask, other=0.0)
        tl.store(buffer_ptr, g, mask=mask)
    tl.store(tile_ptr, theta - lr * g, mask=mask)


def residual_config(classes: int) -> tuple[int, int, int]:
    """The entry of RESIDUAL_CONFIGS for this many classes."""
    fits = (entry for entry in RESIDUAL_CONFIGS if entry[1] >= classes)
    return next(fits, RESIDUAL_CONFIGS[-1])


def head_ascent(
    logits: torch.Tensor,
    features: torch.Tensor,
    labels: torch.Tensor,
    share: torch.Tensor,
    theta: torch.Tensor,
    buffer: torch.Tensor | None,
    has_bias: bool,
    objective: str,
    lr: float,
    momentum: float,
    weight_decay: float,
    alpha: float,
    precision: str = "ieee",
) -> torch.Tensor:
    """Step theta [C, D] and its momentum buffer in place, float32; returns the loss, a scalar.

    logits [N, C] = a~ theta^T (any strides); features [N, d]; labels [N]; share [N], w / sum w;
    rows of theta and the buffer may be apart, their columns are adjacent.
    """
    (N, C), D, bias = logits.shape, theta.shape[1], features.shape[1] if has_bias else -1
    features, width = aligned(features), triton.cdiv(C, ALIGN) * ALIGN
    delta = torch.empty(N, width, dtype=torch.float32, device=theta.device)
    loss = torch.empty(N, dtype=torch.float32, device=theta.device)
    BLOCK_N, BLOCK_C, num_warps = residual_config(C)
    ascent_residual_kernel[(triton.cdiv(N, BLOCK_N),)](
        logits, labels.contiguous(), share.contiguous(), delta, loss, N, C, *logits.stride(),
        width, OBJECTIVE=objective, BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C, num_warps=num_warps,
    )  # fmt: skip
    made = dots(precision, torch.float32, features.dtype)
    config = CONFIGS[made.kind]
    tiles = triton.cdiv(C, config["BLOCK_C"]), triton.cdiv(D, config["BLOCK_K"])
    penalty = torch.empty(tiles[::-1], dtype=torch.float32, device=theta.device)
    ascent_update_kernel[tiles](
        delta, features, theta, buffer, penalty, N, C, features.shape[1], D, bias, lr, momentum,
        weight_decay, alpha, *delta.stride(), *features.stride(), theta.stride(0),
        0 if buffer is None else buffer.stride(0), **made.constants, **config,
    )  # fmt: skip
    return loss.sum() + penalty.sum()


def specialisations() -> Iterator[Specialisation]:
    """The residual's widest form per objective; every form of the update, with momentum."""
    BLOCK_N, BLOCK_C, num_warps = RESIDUAL_CONFIGS[-1]
    pointers = {arg: "*fp32" for arg in ascent_residual_kernel.arg_names if arg.endswith("_ptr")}
    for objective in ("ce", "margin", "log1mp"):
        yield specialise(
            f"ascent_residual {objective}",
            ascent_residual_kernel,
            {**pointers, "labels_ptr": "*i64"},
            {"stride_zc": 1, "OBJECTIVE": objective, "BLOCK_N": BLOCK_N, "BLOCK_C": BLOCK_C},
            {"num_warps": num_warps},
        )
    floats = {arg: "fp32" for arg in ("lr", "momentum", "weight_decay", "alpha")}
    pointers = {arg: "*fp32" for arg in ascent_update_kernel.arg_names if arg.endswith("_ptr")}
    for name, _, inputs, constants, options in forms(CONFIGS):
        yield specialise(
            f"ascent_update {name}",
            ascent_update_kernel,
            {**pointers, "act_ptr": f"*{inputs}", **floats},
            {"stride_dc": 1, "stride_ak": 1, **constants},
            options,
            matrix_units=name != "ieee",
        )
