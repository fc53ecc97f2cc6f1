"""The GGN-vector product of a head, the loss's second derivative fused between its two products.

With ``u = a~ V^T``: ``HV = 1/n sum_t s_t (x) a~_t + lam V``, ``s = c (p*u - p (p.u))`` of a
softmax. The sum p.u runs over all classes, so two stages: the first forms p*u and its row sums, the
second takes ``- p (p.u)`` and the scale on load. p*u exists for one chunk of tokens, sized to stay
in L2. Of the likeliest class m, ``p_m u_m - p_m (p.u) = (1 - p_m) p_m u_m - p_m sum_{j != m} p_j
u_j`` with ``1 - p_m`` as the sum of the others: the left side would cancel where p_m is nearly one.
Where outputs do not meet in the loss p stands for h, and ``s = c h*u``.

FLOPs: 4 N C D per V. Bytes: p and act twice, p*u written and read within L2, V and HV once.
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

# Elements of p*u at once: 32 MB of float32, which an H200's 50 MB L2 holds.
CHUNK_ELEMENTS = 1 << 23
# Of the first stage (u: tokens by classes) and of the second (HV: classes by columns).
CONFIGS = {
    "ieee": {"BLOCK_N": 64, "BLOCK_C": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 3},
    "tf32x3": {"BLOCK_N": 128, "BLOCK_C": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    "tf32": {"BLOCK_N": 128, "BLOCK_C": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    "bf16": {"BLOCK_N": 128, "BLOCK_C": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
}
OUT_CONFIGS = {
    "ieee": {"BLOCK_C": 64, "BLOCK_K": 64, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2},
    "tf32x3": {"BLOCK_C": 64, "BLOCK_K": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
    "tf32": {"BLOCK_C": 64, "BLOCK_K": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
    "bf16": {"BLOCK_C": 64, "BLOCK_K": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
}


@triton.jit
def ggn_forward_kernel(
    p_ptr,
    act_ptr,
    v_ptr,
    top_ptr,
    pu_ptr,
    sums_ptr,
    N,
    C,
    d,
    D,
    bias_column,
    stride_pn,
    stride_pc,
    stride_an,
    stride_ak,
    stride_vj,
    stride_vc,
    stride_vk,
    stride_uj,
    stride_un,
    stride_si,
    stride_sj,
    stride_ss,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program: a tile of ``p*u``, ``u[n,c] = sum_k a~[n,k] V[c,k]``, and its sums over c.

    a~ is act with a 1 in bias_column (-1: none); C, d, D and the rows are padded with zeros to
    multiples of 8.

    p_ptr [N, C]; act_ptr [N, d]; v_ptr [m, C, D]; top_ptr [N] int64, the likeliest class, or None
    where there are no sums; pu_ptr [m, N, C] float32; sums_ptr [3, m, tiles of classes, N] float32:
    p*u without that class, of that class alone, and p without it.
    """
    C, d, D = eights(C), eights(d), eights(D)
    stride_pn, stride_an = eights(stride_pn), eights(stride_an)
    stride_vj, stride_vc = eights(stride_vj), eights(stride_vc)
    stride_uj, stride_un = eights(stride_uj), eights(stride_un)
    tiles_c = tl.cdiv(C, BLOCK_C)
    tile_c = tl.program_id(0) % tiles_c
    j = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) // tiles_c * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_n, mask_c = n < N, c < C
    n, c = n.to(tl.int64), c.to(tl.int64)

    u = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask_k, mask_act = k < D, k < d
        k = k.to(tl.int64)
        a = tl.load(
            act_ptr + n[:, None] * stride_an + k[None, :] * stride_ak,
            mask=mask_n[:, None] & mask_act[None, :],
            other=0.0,
        ).to(DOT)
        a = tl.where(k[None, :] == bias_column, 1.0, a)
        v = tl.load(
            v_ptr + j * stride_vj + c[None, :] * stride_vc + k[:, None] * stride_vk,
            mask=mask_c[None, :] & mask_k[:, None],
            other=0.0,
        )
        u = tl.dot(a.to(DOT), v.to(DOT), u, input_precision=INPUT_PRECISION)

    mask = mask_n[:, None] & mask_c[None, :]
    p = tl.load(p_ptr + n[:, None] * stride_pn + c[None, :] * stride_pc, mask=mask, other=0.0)
    pu = p.to(tl.float32) * u
    tl.store(pu_ptr + j * stride_uj + n[:, None] * stride_un + c[None, :], pu, mask=mask)
    if top_ptr is not None:
        top = tl.load(top_ptr + n, mask=mask_n, other=-1)
        is_top = c[None, :] == top[:, None]
        sums = sums_ptr + j * stride_sj + tile_c.to(tl.int64) * stride_ss + n
        tl.store(sums, tl.sum(tl.where(is_top, 0.0, pu), axis=1), mask=mask_n)
        tl.store(sums + stride_si, tl.sum(tl.where(is_top, pu, 0.0), axis=1), mask=mask_n)
        rest = tl.where(is_top, 0.0, p.to(tl.float32))
        tl.store(sums + 2 * stride_si, tl.sum(rest, axis=1), mask=mask_n)


@triton.jit
def ggn_backward_kernel(
    p_ptr,
    scale_ptr,
    act_ptr,
    top_ptr,
    pu_ptr,
    sums_ptr,
    out_ptr,
    N,
    C,
    d,
    D,
    bias_column,
    m,
    tokens_per_split,
    alpha,
    stride_pn,
    stride_pc,
    stride_an,
    stride_ak,
    stride_uj,
    stride_un,
    stride_si,
    stride_sj,
    stride_oj,
    stride_oc,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program: a tile (c, k) of ``alpha sum_n s[n,c] a~[n,k]`` over one split of n, one V.

    ``s = scale (p*u - p (p.u))`` exists in registers only. Padding as above, but for D.

    p_ptr [N, C]; scale_ptr [N]; act_ptr [N, d]; top_ptr [N] int64 or None; pu_ptr [m, N, C]
    float32; sums_ptr [3, m, N] float32: those of the first stage; out_ptr [splits, m, C, D]
    float32, its first two axes as one of stride stride_oj.
    """
    C, d = eights(C), eights(d)
    stride_pn, stride_an = eights(stride_pn), eights(stride_an)
    stride_uj, stride_un = eights(stride_uj), eights(stride_un)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_c, mask_k = c < C, k < d
    c, k = c.to(tl.int64), k.to(tl.int64)
    split, j = tl.program_id(2) // m, (tl.program_id(2) % m).to(tl.int64)

    total = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    stop = tl.minimum(N, (split + 1) * tokens_per_split)
    for start in range(split * tokens_per_split, stop, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask_n = n < stop
        n = n.to(tl.int64)
        mask = mask_n[None, :] & mask_c[:, None]
        p = tl.load(p_ptr + n[None, :] * stride_pn + c[:, None] * stride_pc, mask=mask, other=0.0)
        pu = tl.load(
            pu_ptr + j * stride_uj + n[None, :] * stride_un + c[:, None], mask=mask, other=0.0
        )
        scale = tl.load(scale_ptr + n, mask=mask_n, other=0.0).to(tl.float32)
        s = pu
        if top_ptr is not None:
            top = tl.load(top_ptr + n, mask=mask_n, other=-1)
            sums = sums_ptr + j * stride_sj + n
            others = tl.load(sums, mask=mask_n, other=0.0)
            at_top = tl.load(sums + stride_si, mask=mask_n, other=0.0)
            rest = tl.load(sums + 2 * stride_si, mask=mask_n, other=0.0)
            is_top = c[:, None] == top[None, :]
            mean = tl.where(is_top, others[None, :], (others + at_top)[None, :])
            s = tl.where(is_top, rest[None, :] * pu, pu) - p.to(tl.float32) * mean
        s *= scale[None, :]
        a = tl.load(
            act_ptr + n[:, None] * stride_an + k[None, :] * stride_ak,
            mask=mask_n[:, None] & mask_k[None, :],
            other=0.0,
        ).to(DOT)
        a = tl.where(k[None, :] == bias_column, 1.0, a)
        total = tl.dot(s.to(DOT), a.to(DOT), total, input_precision=INPUT_PRECISION)

    piece = tl.program_id(2).to(tl.int64)
    out = out_ptr + piece * stride_oj + c[:, None] * stride_oc + k[None, :]
    tl.store(out, alpha * total, mask=mask_c[:, None] & (k[None, :] < D))


def ggn_product(
    p: torch.Tensor,
    scale: torch.Tensor,
    act: torch.Tensor,
    v: torch.Tensor,
    n: int,
    damping: float,
    has_bias: bool,
    top: torch.Tensor | None,
    precision: str = "ieee",
) -> torch.Tensor:
    """HV [m, C, D] float32 of v [m, C, D] float32; p [N, C], scale [N], act [N, d].

    top: [N] int64, the likeliest class of a softmax; None: p is a diagonal second derivative.
    """
    made, width = dots(precision, v.dtype, act.dtype), act.shape[1] + has_bias
    bias, classes = act.shape[1] if has_bias else -1, p.shape[1]
    out, scale, p, act = v * damping, scale.contiguous(), aligned(p), aligned(act)
    (N, C), v = p.shape, aligned(v, rows=p.shape[1])
    chunk = max(1, CHUNK_ELEMENTS // (C * len(v)))
    for start in range(0, N, chunk):
        rows = slice(start, min(N, start + chunk))
        likeliest = None if top is None else top[rows].contiguous()
        product = _chunk(p[rows], scale[rows], act[rows], likeliest, v, width, bias, 1 / n, made)
        out += product[:, :classes]
    return out


def _chunk(p, scale, act, top, v, width, bias, alpha, made):
    """``alpha s^T a~`` of one chunk of tokens: both stages, [m, C, width]."""
    (N, C), d, (m, _, D) = p.shape, act.shape[1], v.shape
    first, second, constants = CONFIGS[made.kind], OUT_CONFIGS[made.kind], made.constants
    tiles = triton.cdiv(C, first["BLOCK_C"])
    pu = torch.empty(m, N, C, dtype=torch.float32, device=v.device)
    sizes = (3, m, tiles, N) if top is not None else (1, 1, 1, 1)
    partial = torch.empty(sizes, dtype=torch.float32, device=v.device)
    strides = (*p.stride(), *act.stride())
    ggn_forward_kernel[(triton.cdiv(N, first["BLOCK_N"]) * tiles, m)](
        p, act, v, top, pu, partial, N, C, d, D, bias, *strides, *v.stride(), *pu.stride()[:2],
        *partial.stride()[:3], **constants, **first,
    )  # fmt: skip
    sums = partial.sum(dim=2) if top is not None else partial
    grid = triton.cdiv(C, second["BLOCK_C"]), triton.cdiv(width, second["BLOCK_K"])
    cuts = splits(grid[0] * grid[1] * m, N, second["BLOCK_N"])
    out = torch.empty(cuts, m, C, width, dtype=torch.float32, device=v.device)
    ggn_backward_kernel[(*grid, cuts * m)](
        p, scale, act, top, pu, sums, out, N, C, d, width, bias, m, triton.cdiv(N, cuts), alpha,
        *strides, *pu.stride()[:2], *sums.stride()[:2], *out.stride()[1:3], **constants, **second,
    )  # fmt: skip
    return out.sum(dim=0)


def specialisations() -> Iterator[Specialisation]:
    """Every configuration of both stages; p in float32."""
    for kernel, configs in ((ggn_forward_kernel, CONFIGS), (ggn_backward_kernel, OUT_CONFIGS)):
        for name, _, inputs, constants, options in forms(configs):
            constexprs = {"stride_pc": 1, "stride_ak": 1, "stride_vk": 1}
            constexprs = {k: one for k, one in constexprs.items() if k in kernel.arg_names}
            pointers = {arg: "*fp32" for arg in kernel.arg_names if arg.endswith("_ptr")}
            yield specialise(
                f"{kernel.__name__} {name}",
                kernel,
                {**pointers, "act_ptr": f"*{inputs}", "top_ptr": "*i64", "alpha": "fp32"},
                {**constexprs, **constants},
                options,
                matrix_units=name != "ieee",
            )
