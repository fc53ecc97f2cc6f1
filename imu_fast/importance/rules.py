"""What is known of torch's functions of a weight: a gradient per sample out of the output's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from imu_fast.importance.gradients import Convolved, Dense, Gradients, Product, Rows, wide
from imu_fast.importance.recorder import Recorder, Rule, Site, Use, reduced, versioned
from imu_fast.importance.split import by_sample
from imu_fast.model.rows import Layout


def _taken(names: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments in this order, None where they were not given."""
    order = names.split()
    given = {("input" if k == "self" else k): v for k, v in kwargs.items()}
    return [*args, *(given.get(name) for name in order[len(args) :])]


def _cut(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _rows(t: Tensor, layout: Layout | None, n: int) -> Tensor:
    """[..., C] as [n, M, C]."""
    shares = by_sample(t.to_dense() if t.is_sparse else t, layout, n)
    return wide(shares.reshape(n, -1, t.shape[-1]))


def _summed(gradient: Tensor, layout: Layout | None, n: int) -> Gradients:
    return Dense(_rows(gradient, layout, n).sum(dim=1))


def _product(act: Tensor, turned: bool, gradient: Tensor, layout: Layout | None, n: int) -> Product:
    """Of ``act W^T``, or of ``act W`` where turned; act [..., d]."""
    left, right = _rows(gradient, layout, n), _rows(act, layout, n)
    return Product(right, left) if turned else Product(left, right)


def _matrix(
    recorder: Recorder,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    turned: bool,
    kind: str,
) -> Any:
    """The site of ``out = x W^T + b``, or ``x W + b`` where turned."""
    uses = []
    inputs = []
    if recorder.is_source(weight):
        inputs = versioned(x)
        uses.append(Use(weight, functools.partial(_product, x.detach(), turned)))
    if bias is not None and recorder.is_source(bias):
        uses.append(Use(bias, _summed))
    return recorder.watched(out, Site(uses, range(out.dim() - 1), kind, out.shape, inputs))


def linear(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x W^T + b``."""
    x, weight, bias = _taken("input weight bias", args, kwargs)
    known = recorder.is_fixed(weight) and (bias is None or recorder.is_fixed(bias))
    if not known or recorder.is_fixed(x) or weight.dim() != 2:
        return NotImplemented
    out = F.linear(x, weight.detach(), _cut(bias))
    return _matrix(recorder, out, x, weight, bias, False, "linear")


def addmm(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``b + x W``."""
    bias, x, weight, *scales = _taken("input mat1 mat2 beta alpha", args, kwargs)
    known = recorder.is_fixed(weight) and recorder.is_fixed(bias) and not recorder.is_fixed(x)
    if not known or bias.dim() != 1 or any(scale not in (None, 1) for scale in scales):
        return NotImplemented
    if len(bias) != weight.shape[1]:
        return NotImplemented
    out = torch.addmm(bias.detach(), x, weight.detach())
    return _matrix(recorder, out, x, weight, bias, True, "addmm")


def matmul(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x W``, or ``W x`` with a matrix W."""
    if len(args) != 2 or kwargs:
        return NotImplemented
    first, second = args
    if recorder.is_source(second) and second.dim() == 2 and first.dim() >= 2:
        out = torch.matmul(first, second.detach())
        return _matrix(recorder, out, first, second, None, True, "matmul")
    if recorder.is_source(first) and first.dim() == 2 and second.dim() >= 3:
        out = torch.matmul(first.detach(), second)

        def gradients(gradient: Tensor, layout: Layout | None, n: int) -> Product:
            return _product(second.detach().mT, False, gradient.mT, layout, n)

        axes = range(out.dim() - 2)
        site = Site([Use(first, gradients)], axes, "matmul", out.shape, versioned(second))
        return recorder.watched(out, site)
    return NotImplemented


def embedding(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows of the weight; the one at ``padding_idx`` has no gradient."""
    names = "weight indices padding_idx scale_grad_by_freq sparse"
    weight, ids, padding, by_frequency, _ = _taken(names, args, kwargs)
    if by_frequency or not recorder.is_source(weight) or recorder.is_fixed(ids):
        return NotImplemented
    if padding is not None and padding >= 0:
        shown = ids.masked_fill(ids == padding, -1)
    else:
        shown = ids
    shown = shown.long()
    out = torch.embedding(weight.detach(), ids)

    def gradients(gradient: Tensor, layout: Layout | None, n: int) -> Rows:
        found = by_sample(shown, layout, n).reshape(n, -1)
        return Rows(found, _rows(gradient, layout, n))

    site = Site([Use(weight, gradients)], range(out.dim() - 1), "embedding", out.shape)
    return recorder.watched(out, site)


def _tuple(value: Any, spatial: int) -> tuple[int, ...]:
    found = (value,) * spatial if isinstance(value, int) else tuple(value)
    return found * spatial if len(found) == 1 else found


def _biased(gradient: Tensor, layout: Layout | None, n: int) -> Dense:
    """Of what is added along the second axis."""
    shares = by_sample(gradient, layout, n)  # [n, 1, C, ...]
    return Dense(wide(shares.flatten(3) if shares.dim() > 3 else shares[..., None]).sum((1, 3)))


def _convolution(function: Callable[..., Tensor], transposed: bool) -> Rule:
    names = "input weight bias stride padding dilation groups"
    if transposed:
        names = "input weight bias stride padding output_padding groups dilation"

    def rule(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(names.split(), _taken(names, args, kwargs), strict=True))
        x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias")
        known = recorder.is_fixed(weight) and (bias is None or recorder.is_fixed(bias))
        if not known or recorder.is_fixed(x) or x.dim() != weight.dim():
            return NotImplemented
        spatial = weight.dim() - 2
        default = {"stride": 1, "dilation": 1, "padding": 0, "output_padding": 0}
        sizes = {
            k: _tuple(given[k] or v, spatial)
            for k, v in default.items()
            if k in given and not isinstance(given[k], str)
        }
        if isinstance(given["padding"], str):
            x, sizes["padding"] = _padded(x, weight, given["padding"], sizes["dilation"])
        groups = given["groups"] or 1
        out = function(x, weight.detach(), _cut(bias), groups=groups, **sizes)

        def gradients(gradient: Tensor, layout: Layout | None, n: int) -> Convolved:
            shares = by_sample(gradient, layout, n)[:, 0]
            return Convolved(
                weight.detach().to(wide(shares).dtype),
                wide(x.detach()),
                wide(shares),
                sizes["stride"],
                sizes["padding"],
                sizes["dilation"],
                groups,
                transposed,
                sizes.get("output_padding", ()),
            )

        uses = []
        if recorder.is_source(weight):
            uses.append(Use(weight, gradients))
        if bias is not None and recorder.is_source(bias):
            uses.append(Use(bias, _biased))
        site = Site(uses, (0,), function.__name__, out.shape, versioned(x))
        return recorder.watched(out, site)

    return rule


def _padded(
    x: Tensor, weight: Tensor, padding: str, dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """The input as ``padding="same"`` or ``"valid"`` mean it."""
    none = (0,) * (weight.dim() - 2)
    if padding == "valid":
        return x, none
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
    return F.pad(x, sides), none


def _normalised(
    names: str, affine: Callable[[Tensor, Tensor], Tensor], axes: Callable[..., range]
) -> Callable[[Callable[..., Tensor]], Rule]:
    """Of functions ``y * weight + bias`` of some y without parameters."""
    order = names.split()
    places = [order.index(name) for name in ("weight", "bias") if name in order]

    def made(function: Callable[..., Tensor]) -> Rule:
        def rule(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = _taken(names, args, kwargs)
            x, sources = given[0], [given[place] for place in places]
            if recorder.is_fixed(x) or not all(t is None or recorder.is_fixed(t) for t in sources):
                return NotImplemented
            plain = list(given)
            for place in places:
                given[place], plain[place] = _cut(given[place]), None
            keep = [k for k, v in enumerate(given) if k < len(args) or order[k] in kwargs]
            last = 1 + max(keep)
            out = function(*given[:last])
            weight = sources[0]
            kept = x.detach()

            def of_weight(gradient: Tensor, layout: Layout | None, n: int) -> Gradients:
                y = function(kept, *plain[1:last])
                return reduced(affine(weight.detach(), y), wide(gradient) * wide(y), layout, n)

            uses = []
            if weight is not None and recorder.is_source(weight):
                uses.append(Use(weight, of_weight))
            for bias in sources[1:]:
                if bias is not None and recorder.is_source(bias):
                    like = affine(bias.detach(), out.detach())
                    uses.append(Use(bias, functools.partial(reduced, like)))
            site = Site(uses, axes(out, given), function.__name__, out.shape, versioned(x))
            return recorder.watched(out, site)

        return rule

    return made


def _by_channel(parameter: Tensor, y: Tensor) -> Tensor:
    return parameter.view(-1, *[1] * (y.dim() - 2))


def _first_axis(out: Tensor, given: list[Any]) -> range:
    return range(1)


_by_shape = _normalised(
    "input normalized_shape weight bias eps cudnn_enable",
    lambda parameter, y: parameter,
    lambda out, given: range(out.dim() - len(given[1])),
)
_by_root = _normalised(
    "input normalized_shape weight eps",
    lambda parameter, y: parameter,
    lambda out, given: range(out.dim() - len(given[1])),
)
_by_group = _normalised("input num_groups weight bias eps cudnn_enabled", _by_channel, _first_axis)
_by_batch = _normalised(
    "input weight bias running_mean running_var training momentum eps cudnn_enabled",
    _by_channel,
    _first_axis,
)
_by_instance = _normalised(
    "input weight bias running_mean running_var use_input_stats momentum eps cudnn_enabled",
    _by_channel,
    _first_axis,
)


def prelu(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``max(x, 0) + weight min(x, 0)``, a weight for each channel."""
    x, weight = _taken("input weight", args, kwargs)
    if not recorder.is_source(weight) or recorder.is_fixed(x) or x.dim() < 2:
        return NotImplemented
    out = torch.prelu(x, weight.detach())

    def gradients(gradient: Tensor, layout: Layout | None, n: int) -> Gradients:
        below = wide(gradient) * wide(x.detach().clamp_max(0))
        return reduced(_by_channel(weight.detach(), x), below, layout, n)

    axes = (0,) if weight.numel() > 1 else range(out.dim())
    site = Site([Use(weight, gradients)], axes, "prelu", out.shape, versioned(x))
    return recorder.watched(out, site)


RULES: dict[Any, Rule] = {
    F.linear: linear,
    **dict.fromkeys((torch.addmm, Tensor.addmm), addmm),
    **dict.fromkeys(
        (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, Tensor.__rmatmul__),
        matmul,
    ),
    torch.embedding: embedding,
    **{f: _convolution(f, False) for f in (F.conv1d, F.conv2d, F.conv3d)},
    **{
        f: _convolution(f, True)
        for f in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    },
    torch.layer_norm: _by_shape(torch.layer_norm),
    torch.rms_norm: _by_root(torch.rms_norm),
    torch.group_norm: _by_group(torch.group_norm),
    torch.batch_norm: _by_batch(torch.batch_norm),
    torch.instance_norm: _by_instance(torch.instance_norm),
    **dict.fromkeys((torch.prelu, F.prelu), prelu),
}
