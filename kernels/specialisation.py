"""What a kernel is compiled for: the list that ahead-of-time tests compile, and launch helpers."""

from __future__ import annotations

import os
from collections.abc import Iterator
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


class Dots(NamedTuple):
    """How ``tl.dot`` multiplies: the key into CONFIGS, and the constants of a kernel.

    Attributes:
        kind: "half", of operands that are both bfloat16, or float16, as they are; or the precision
            that wider ones are brought to: "ieee", "tf32x3", "tf32", "bf16".
        dtype: in which operands enter (accumulation is in float32).
    """

    kind: str
    dtype: torch.dtype

    @property
    def constants(self) -> dict[str, Any]:
        """The interpreter multiplies bfloat16 by its bit patterns, so there it is float32."""
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        name = "fp32" if interpreted else TRITON_NAMES[self.dtype]
        precision = "ieee" if self.kind in ("half", "bf16") else self.kind
        return {"DOT": TRITON_DTYPES[name], "INPUT_PRECISION": precision}


def dots(precision: str, left: torch.dtype, right: torch.dtype, squared: bool = False) -> Dots:
    """Of operands of these dtypes; no product is less exact than ``precision``.

    Args:
        squared: what is multiplied are their squares, which half precision does not hold.
    """
    if left == right and left.itemsize == 2 and not squared:
        return Dots("half", left)
    if precision != "bf16":
        return Dots(precision, torch.float32)
    halves = left == right == torch.bfloat16
    return Dots("half" if halves else "bf16", torch.bfloat16)


# What the forms of a kernel read, by the kind of their dots; "mixed": float32 beside bfloat16.
READ = {kind: "fp32" for kind in ("ieee", "tf32x3", "tf32", "bf16")} | {"half": "bf16"}
MIXED = ("tf32", "bf16")


def forms(configs: dict[str, dict]) -> Iterator[tuple[str, str, str, dict, dict]]:
    """Name, types of signal and of inputs, constants and options of each form of a kernel.

    Of half-precision models inputs are narrower than the signal, in the kinds that they take
    unless another is asked for.
    """
    for kind, config in configs.items():
        options = {key: config[key] for key in ("num_warps", "num_stages")}
        blocks = {key: value for key, value in config.items() if key not in options}
        narrow = tl.bfloat16 if kind in ("half", "bf16") else tl.float32
        precision = "ieee" if kind in ("half", "bf16") else kind
        constants = {"DOT": narrow, "INPUT_PRECISION": precision, **blocks}
        yield kind, READ[kind], READ[kind], constants, options
        if kind in MIXED:
            yield f"{kind} mixed", "fp32", "bf16", constants, options


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
