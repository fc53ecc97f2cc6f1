"""What a kernel is compiled for: the list that ahead-of-time tests compile, and launch helpers."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Programs that a launch aims at where an operation can be cut further: two waves on an H200's 132
# multiprocessors. A constant, not a device query, so that results do not depend on the device.
TARGET_PROGRAMS = 264
# Elements that rows start at and consist of multiples of: 16 bytes of half precision, one vector
# load. Kernels say so with ``eights``; unsaid, masks and strides make loads scalar.
ALIGN = 8
TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TRITON_DTYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}


@triton.jit
def eights(x):
    """``x``, a multiple of ALIGN, so that the compiler knows (hints on arguments are lost)."""
    return x // 8 * 8


class Specialisation(NamedTuple):
    """One compiled form of a kernel; ``matrix_units``: its dots must run on tensor cores."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]
    matrix_units: bool


def specialise(
    name: str,
    kernel: Any,
    types: dict[str, str],
    constexprs: dict[str, Any],
    options: dict[str, int],
    matrix_units: bool = False,
    unaligned: tuple[str, ...] = (),
) -> Specialisation:
    """The form that a launch gets: tensors start on 16 bytes, nothing is known of the integers.

    Args:
        types: of pointers and floats; every other argument is a 32-bit integer.
        constexprs: the constants, and strides that are 1.
        unaligned: pointers whose tensors may start anywhere.
    """
    signature = {
        arg: "constexpr" if arg in constexprs else types.get(arg, "i32") for arg in kernel.arg_names
    }
    attrs: dict[tuple[int, ...], list[list[Any]]] = {
        (i,): [["tt.divisibility", 16]]
        for i, arg in enumerate(kernel.arg_names)
        if signature[arg] != "constexpr" and arg.endswith("_ptr") and arg not in unaligned
    }
    return Specialisation(name, kernel, signature, constexprs, attrs, options, matrix_units)


def dot_kind(dtype: torch.dtype, input_precision: str) -> str:
    """The key into CONFIGS: "ieee" or "tf32" for float32 dots, "half" for bfloat16 and float16."""
    return input_precision if dtype == torch.float32 else "half"


def dot_dtype(dtype: torch.dtype) -> Any:
    """The type in which operands enter ``tl.dot``: their own (accumulation is in float32).

    The interpreter multiplies bfloat16 by its bit patterns, so there it is float32.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return tl.float32
    return TRITON_DTYPES[TRITON_NAMES[dtype]]


def aligned(x: torch.Tensor, rows: int = 0) -> torch.Tensor:
    """``x`` [..., r, w] as kernels read it: adjacent columns, w and all strides multiples of ALIGN.

    A copy padded with zeros, which add nothing to a sum of products, where x is not like that or
    has fewer than ``rows`` rows; so every launch runs the form that is compiled ahead of time.
    """
    height, width = max(rows, x.shape[-2]), triton.cdiv(x.shape[-1], ALIGN) * ALIGN
    fits = (height, width) == tuple(x.shape[-2:]) and x.stride(-1) == 1
    fits = fits and all(stride % ALIGN == 0 for stride in x.stride()[:-1])
    if fits and x.data_ptr() % 16 == 0:
        return x
    out = x.new_zeros(*x.shape[:-2], height, width)
    out[..., : x.shape[-2], : x.shape[-1]] = x
    return out


def splits(programs: int, length: int, block: int) -> int:
    """Into how many pieces to cut a reduction of ``length`` so that the device is full."""
    return max(1, min(triton.cdiv(TARGET_PROGRAMS, programs), triton.cdiv(length, 4 * block)))
