"""``delta = c (softmax(z) - onehot(y))`` and the loss ``-c log softmax(z)_y``, online over classes.

Bytes: z twice (the second time mostly from L2) and delta once; FLOPs are negligible.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from imu_fast.kernels.specialisation import Specialisation, specialise

# (BLOCK_N rows, BLOCK_C classes, num_warps): the first that holds all classes, else the last.
# 2,048 elements per program are 16 registers per thread; wide rows take 4,096 on 8 warps.
CONFIGS = [(128, 16, 4), (16, 128, 4), (2, 1024, 4), (1, 4096, 8)]


@triton.jit
def softmax_residual_kernel(
    logits_ptr,
    labels_ptr,
    scale_ptr,
    delta_ptr,
    loss_ptr,
    N,
    C,
    stride_zn,
    stride_zc,
    stride_dn,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_N rows, all classes.

        m = max_j z_j,   others = sum_{j != y} e^{z_j - m},   label = e^{z_y - m}
        p_j = e^{z_j - m} / (others + label),   q = others / (others + label) = 1 - p_y
        delta_j = c p_j,   delta_y = -c q,   loss = -c log(1 - q)

    q is a sum of what it is made of, so delta_y keeps its digits where p_y - 1 would cancel.

    logits_ptr [N, C]; labels_ptr [N] int64, negative: ignored (zero delta, zero loss);
    scale_ptr [N] or None: c; delta_ptr [N, C] float32, rows stride_dn apart; loss_ptr [N] float32.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < N
    n = n.to(tl.int64)
    label = tl.load(labels_ptr + n, mask=mask_n, other=-1)
    row_ptr = logits_ptr + n[:, None] * stride_zn
    z_y = tl.load(logits_ptr + n * stride_zn + label * stride_zc, mask=label >= 0, other=0.0)
    z_y = z_y.to(tl.float32)

    m = z_y  # the largest logit so far
    others = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask_c = c < C
        z = tl.load(
            row_ptr + c[None, :].to(tl.int64) * stride_zc,
            mask=mask_n[:, None] & mask_c[None, :],
            other=-float("inf"),
        ).to(tl.float32)
        new_m = tl.maximum(m, tl.max(z, axis=1))
        e = tl.where(c[None, :] == label[:, None], 0.0, tl.exp(z - new_m[:, None]))
        others = others * tl.exp(m - new_m) + tl.sum(e, axis=1)
        m = new_m
    total = others + tl.exp(z_y - m)
    q = others / total

    scale = (label >= 0).to(tl.float32)
    if scale_ptr is not None:
        scale *= tl.load(scale_ptr + n, mask=mask_n, other=0.0).to(tl.float32)

    # -log(1 - q) = 2 artanh(h), h = q / (2 - q) <= 1/3: a series whose 9th term is below 1e-9.
    h = tl.minimum(q, 0.5) / (2.0 - tl.minimum(q, 0.5))
    h2 = h * h
    series = 1.0 / 15 + h2 * (1.0 / 17)
    series = 1.0 / 11 + h2 * (1.0 / 13 + h2 * series)
    series = 1.0 / 7 + h2 * (1.0 / 9 + h2 * series)
    series = 1.0 + h2 * (1.0 / 3 + h2 * (1.0 / 5 + h2 * series))
    loss = tl.where(q < 0.5, 2.0 * h * series, m - z_y + tl.log(total))
    tl.store(loss_ptr + n, scale * loss, mask=mask_n)

    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask_c = c < C
        mask = mask_n[:, None] & mask_c[None, :]
        z = tl.load(row_ptr + c[None, :].to(tl.int64) * stride_zc, mask=mask, other=0.0)
        p = tl.exp(z.to(tl.float32) - m[:, None]) / total[:, None]
        delta = tl.where(c[None, :] == label[:, None], -q[:, None], p) * scale[:, None]
        tl.store(delta_ptr + n[:, None] * stride_dn + c[None, :], delta, mask=mask)


def config(classes: int) -> tuple[int, int, int]:
    """The entry of CONFIGS for this many classes."""
    return next((entry for entry in CONFIGS if entry[1] >= classes), CONFIGS[-1])


def softmax_residual(
    logits: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """delta [N, C] and loss [N], float32, of logits [N, C] (any strides), labels [N], scale [N]."""
    (N, C), device = logits.shape, logits.device
    delta = torch.empty(N, C, dtype=torch.float32, device=device)
    loss = torch.empty(N, dtype=torch.float32, device=device)
    BLOCK_N, BLOCK_C, num_warps = config(C)
    if N:
        softmax_residual_kernel[(triton.cdiv(N, BLOCK_N),)](
            logits_ptr=logits,
            labels_ptr=labels.contiguous(),
            scale_ptr=None if scale is None else scale.contiguous(),
            delta_ptr=delta,
            loss_ptr=loss,
            N=N,
            C=C,
            stride_zn=logits.stride(0),
            stride_zc=logits.stride(1),
            stride_dn=C,
            BLOCK_N=BLOCK_N,
            BLOCK_C=BLOCK_C,
            num_warps=num_warps,
        )
    return delta, loss


def specialisations() -> Iterator[Specialisation]:
    """Every configuration in float32, and the widest in bfloat16."""
    for dtype, entries in (("fp32", CONFIGS), ("bf16", CONFIGS[-1:])):
        for BLOCK_N, BLOCK_C, num_warps in entries:
            yield specialise(
                f"softmax_residual {dtype} {BLOCK_N}x{BLOCK_C}",
                softmax_residual_kernel,
                {
                    "logits_ptr": f"*{dtype}",
                    "labels_ptr": "*i64",
                    "scale_ptr": "*fp32",
                    "delta_ptr": "*fp32",
                    "loss_ptr": "*fp32",
                },
                {"stride_zc": 1, "BLOCK_N": BLOCK_N, "BLOCK_C": BLOCK_C},
                {"num_warps": num_warps},
            )
