"""What a caller may pass by mistake in a tensor's place, each made of the tensor that fits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Plain(Tensor):
    """A subclass without behaviour of its own: as good as a tensor."""


def _filled(t: Tensor, value: float) -> Tensor:
    changed = t.clone() if t.is_floating_point() else t.double()
    changed.view(-1)[changed.numel() // 2] = value
    return changed


def _nested(t: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([t.float(), t.float()])


def _quantised(t: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)


_INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]


# Never acceptable: no number comes of these.
WRONG: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda t: None,
    "string": lambda t: "features",
    "number": lambda t: 3,
    "object": lambda t: object(),
    "empty": lambda t: t[:0],
    "scalar": lambda t: t.reshape(-1)[0],
    "more_axes": lambda t: t[None, None],
    "complex": lambda t: t.to(torch.complex64),
    "boolean": lambda t: t.bool(),
    "sparse": lambda t: t.to_sparse(),
    "nested": _nested,
    "quantised": _quantised,
    "meta": lambda t: t.to("meta"),
    "nan": lambda t: _filled(t, float("nan")),
    "infinite": lambda t: _filled(t, float("inf")),
    "no_columns": lambda t: t[..., :0],
}
# Right, or refused.
ODD: dict[str, Callable[[Tensor], Any]] = {
    "list": lambda t: t.tolist(),
    "array": lambda t: t.detach().numpy(),
    "requires_grad": lambda t: t.double().requires_grad_() if t.is_floating_point() else t,
    "subclass": lambda t: t.as_subclass(Plain),
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "half": lambda t: t.half() if t.is_floating_point() else t,
    "bfloat16": lambda t: t.bfloat16() if t.is_floating_point() else t,
    "float8": lambda t: t.to(torch.float8_e4m3fn) if t.is_floating_point() else t,
    "single": lambda t: t.float() if t.is_floating_point() else t,
    "huge": lambda t: t * 1e30 if t.is_floating_point() else t,
    "tiny": lambda t: t * 1e-30 if t.is_floating_point() else t,
    "zeros": torch.zeros_like,
    "negative": lambda t: -t,
    "strided": lambda t: t.repeat_interleave(2, 0)[::2],
    "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    "floating": lambda t: t.double(),
    **{
        f"{kind}".removeprefix("torch."): lambda t, kind=kind: t.abs().to(kind)
        for kind in _INTEGERS
    },
    "one_row_more": lambda t: torch.cat([t, t[-1:]]) if t.dim() else t,
}
