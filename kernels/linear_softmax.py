"""A head's softmax from features and weight: each logit lives in one tile and is never stored.

``normaliser``: log-sum-exp, ``1 - p_y`` and loss per token, online over the vocabulary, in two
deterministic stages. ``residual``: ``delta`` of one slab of classes, once the former are known.

FLOPs: 2 N C d each. Bytes: features and weight once (tiles are shared through L2), delta once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from imu_fast.kernels.specialisation import (
    Specialisation,
    aligned,
    dots,
    eights,
    forms,
    specialise,
    splits,
)

# "ieee" multiplies on the ordinary units, where a thread holds its outputs: smaller tiles.
CONFIGS = {
    "ieee": {"BLOCK_N": 32, "BLOCK_C": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3},
    "tf32x3": {"BLOCK_N": 64, "BLOCK_C": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    "tf32": {"BLOCK_N": 128, "BLOCK_C": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    "bf16": {"BLOCK_N": 128, "BLOCK_C": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    "half": {"BLOCK_N": 128, "BLOCK_C": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
}


@triton.jit
def logits_tile(
    act_ptr,
    weight_ptr,
    bias_ptr,
    n,
    c,
    mask_n,
    mask_c,
    d,
    stride_an,
    stride_ak,
    stride_wc,
    stride_wk,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """``z[n,c] = sum_k act[n,k] weight[c,k] + bias[c]``: [BLOCK_N, BLOCK_C] float32.

    d and the rows of act and weight are padded with zeros to multiples of 8.
    """
    d = eights(d)
    stride_an, stride_wc = eights(stride_an), eights(stride_wc)
    z = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, d, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask_k = k < d
        k = k.to(tl.int64)
        a = tl.load(
            act_ptr + n[:, None] * stride_an + k[None, :] * stride_ak,
            mask=mask_n[:, None] & mask_k[None, :],
            other=0.0,
        )
        w = tl.load(
            weight_ptr + c[None, :] * stride_wc + k[:, None] * stride_wk,
            mask=mask_c[None, :] & mask_k[:, None],
            other=0.0,
        )
        z = tl.dot(a.to(DOT), w.to(DOT), z, input_precision=INPUT_PRECISION)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def normaliser_kernel(
    act_ptr,
    weight_ptr,
    bias_ptr,
    labels_ptr,
    max_ptr,
    others_ptr,
    label_ptr,
    N,
    C,
    d,
    classes_per_split,
    stride_an,
    stride_ak,
    stride_wc,
    stride_wk,
    stride_os,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program: BLOCK_N tokens, one split of the classes, by an online softmax over its tiles.

        m = max_c z_c,   others = sum_{c != y} e^{z_c - m},   label = z_y, or 0 where y is elsewhere

    act_ptr [N, d]; weight_ptr [C, d]; bias_ptr [C] or None; labels_ptr [N] int64;
    max_ptr, others_ptr, label_ptr [splits, N] float32, rows stride_os apart.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    mask_n = n < N
    n = n.to(tl.int64)
    y = tl.load(labels_ptr + n, mask=mask_n, other=-1)

    m = tl.full([BLOCK_N], -3.0e38, tl.float32)
    others = tl.zeros([BLOCK_N], tl.float32)
    label = tl.zeros([BLOCK_N], tl.float32)
    stop = tl.minimum(C, (split + 1) * classes_per_split)
    for start in range(split * classes_per_split, stop, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask_c = c < stop
        c = c.to(tl.int64)
        z = logits_tile(
            act_ptr, weight_ptr, bias_ptr, n, c, mask_n, mask_c, d, stride_an, stride_ak,
            stride_wc, stride_wk, BLOCK_N, BLOCK_C, BLOCK_K, DOT, INPUT_PRECISION,
        )  # fmt: skip
        is_label = c[None, :] == y[:, None]
        label += tl.sum(tl.where(is_label, z, 0.0), axis=1)
        z = tl.where(mask_c[None, :], z, -float("inf"))
        new_m = tl.maximum(m, tl.max(z, axis=1))
        e = tl.where(is_label, 0.0, tl.exp(z - new_m[:, None]))
        others = others * tl.exp(m - new_m) + tl.sum(e, axis=1)
        m = new_m

    row = split.to(tl.int64) * stride_os + n
    tl.store(max_ptr + row, m, mask=mask_n)
    tl.store(others_ptr + row, others, mask=mask_n)
    tl.store(label_ptr + row, label, mask=mask_n)


@triton.jit
def residual_kernel(
    act_ptr,
    weight_ptr,
    bias_ptr,
    labels_ptr,
    scale_ptr,
    lse_ptr,
    q_ptr,
    delta_ptr,
    N,
    C,
    d,
    first,
    stride_an,
    stride_ak,
    stride_wc,
    stride_wk,
    stride_dn,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program: a tile of ``delta = scale e^{z - lse}``, and ``- scale q`` at the label.

    Programs that share tokens run side by side.

    act_ptr [N, d]; weight_ptr [C, d] and bias_ptr [C] or None: classes first .. first+C-1;
    labels_ptr [N] int64; scale_ptr, lse_ptr, q_ptr [N]: q = 1 - p_y; delta_ptr [N, C] float32.
    """
    tiles_c = tl.cdiv(C, BLOCK_C)
    n = tl.program_id(0) // tiles_c * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_n, mask_c = n < N, c < C
    n, c = n.to(tl.int64), c.to(tl.int64)
    z = logits_tile(
        act_ptr, weight_ptr, bias_ptr, n, c, mask_n, mask_c, d, stride_an, stride_ak,
        stride_wc, stride_wk, BLOCK_N, BLOCK_C, BLOCK_K, DOT, INPUT_PRECISION,
    )  # fmt: skip
    y = tl.load(labels_ptr + n, mask=mask_n, other=-1)
    scale = tl.load(scale_ptr + n, mask=mask_n, other=0.0)
    lse = tl.load(lse_ptr + n, mask=mask_n, other=0.0)
    q = tl.load(q_ptr + n, mask=mask_n, other=0.0)
    is_label = (c + first)[None, :] == y[:, None]
    delta = scale[:, None] * tl.where(is_label, -q[:, None], tl.exp(z - lse[:, None]))
    mask = mask_n[:, None] & mask_c[None, :]
    tl.store(delta_ptr + n[:, None] * stride_dn + c[None, :], delta, mask=mask)


def _constants(act: torch.Tensor, weight: torch.Tensor, precision: str) -> dict:
    made = dots(precision, act.dtype, weight.dtype)
    return {**made.constants, **CONFIGS[made.kind]}


def normaliser(
    act: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    scale: torch.Tensor | None,
    precision: str = "ieee",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """lse, ``1 - p_y`` and scaled loss, [N] float32 each; act [N, d], weight [C, d], labels [N]."""
    act, weight = aligned(act), aligned(weight)
    (N, d), C = act.shape, len(weight)
    constants = _constants(act, weight, precision)
    tiles = triton.cdiv(N, constants["BLOCK_N"])
    cuts = splits(max(tiles, 1), C, constants["BLOCK_C"])
    per_split = triton.cdiv(C, cuts)
    cuts = triton.cdiv(C, per_split)
    m, others, label = torch.empty(3, cuts, N, dtype=torch.float32, device=act.device)
    if N:
        normaliser_kernel[(tiles, cuts)](
            act, weight, bias, labels.contiguous(), m, others, label, N, C, d, per_split,
            *act.stride(), *weight.stride(), N, **constants,
        )  # fmt: skip
    # Second stage: the splits' sums on one footing, added in the order of the splits.
    # An ignored label has no logit, and zero would count as one.
    largest, z_y = m.amax(dim=0), torch.where(labels >= 0, label.sum(dim=0), -torch.inf)
    rest = (others * torch.exp(m - largest)).sum(dim=0)
    total = rest + torch.exp(z_y - largest)
    q, lse = rest / total, largest + total.log()
    loss = torch.where(q < 0.5, -torch.log1p(-q), lse - z_y)
    scale = torch.ones_like(loss) if scale is None else scale.float()
    return lse, q, torch.where(labels >= 0, loss * scale, 0.0)


def residual(
    act: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    scale: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    first: int,
    precision: str = "ieee",
) -> torch.Tensor:
    """delta [N, C] float32 of the classes first .. first+C-1, whose weight [C, d] and bias come."""
    act, weight = aligned(act), aligned(weight)
    (N, d), C = act.shape, len(weight)
    constants = _constants(act, weight, precision)
    delta = torch.empty(N, C, dtype=torch.float32, device=act.device)
    tiles = triton.cdiv(N, constants["BLOCK_N"]) * triton.cdiv(C, constants["BLOCK_C"])
    if N:
        residual_kernel[(tiles,)](
            act, weight, bias, labels.contiguous(), scale.contiguous(), lse, q, delta, N, C, d,
            first, *act.stride(), *weight.stride(), C, **constants,
        )  # fmt: skip
    return delta


def specialisations() -> Iterator[Specialisation]:
    """Every configuration of both kernels, without a bias (language models have none)."""
    for kernel in (normaliser_kernel, residual_kernel):
        for name, weights, inputs, constants, options in forms(CONFIGS):
            types = {arg: "*fp32" for arg in kernel.arg_names if arg.endswith("_ptr")}
            types |= {"act_ptr": f"*{inputs}", "weight_ptr": f"*{weights}", "labels_ptr": "*i64"}
            yield specialise(
                f"{kernel.__name__} {name}",
                kernel,
                types,
                {"bias_ptr": None, "stride_ak": 1, "stride_wk": 1, **constants},
                options,
                matrix_units=name != "ieee",
            )
