"""Writing a head's new weight into the user's model, so that it holds."""

from __future__ import annotations

from copy import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from imu_fast.errors import InputError
from imu_fast.model.guard import copied
from imu_fast.model.head import made

# Rows of random input that a written weight is tried on.
_PROBES = 4


def _weight_norm(head: nn.Module) -> object | None:
    """The hook of ``torch.nn.utils.weight_norm``, which makes the weight before each forward."""
    from torch.nn.utils.weight_norm import WeightNorm

    hooks = head._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, WeightNorm)), None)


class HeadWeight:
    """Weight and bias of a head as one matrix, read and written.

    A weight that is made of others (weight_norm, any parametrization) is written by solving for
    those; where that cannot be done it is refused before any work.

    Args:
        head: a linear layer. name: the head's, for messages.

    Raises:
        InputError: what is written would not hold.
    """

    def __init__(self, head: nn.Linear, name: str = "head") -> None:
        self.head, self.name = head, name
        if not self.dtype.is_floating_point:
            raise self._refusal(f"is {self.dtype}", "dequantise it first")
        self.derived = "weight" not in head._parameters
        if self.derived or "bias" not in head._parameters or self._hooked:
            self._try()

    @property
    def dtype(self) -> torch.dtype:
        """The head's own."""
        return made(self.head, "weight").dtype

    @property
    def _hooked(self) -> bool:
        return bool(self.head._forward_pre_hooks or self.head._forward_hooks)

    @property
    def _parametrized(self) -> str | None:
        names = ("weight", "bias")
        return next((name for name in names if parametrize.is_parametrized(self.head, name)), None)

    def tensors(self) -> list[Tensor]:
        """Everything that writing changes."""
        return [*self.head.parameters(), *self.head.buffers()]

    def read(self) -> Tensor:
        """``[W, b]``: [C, D], a new tensor of the head's dtype."""
        with torch.no_grad():
            parts = [made(self.head, "weight").detach()]
            if self.head.bias is not None:
                parts.append(made(self.head, "bias").detach()[:, None])
            return torch.cat(parts, dim=1)

    def write(self, theta: Tensor) -> None:
        """Make the layer compute with theta [C, D], rounded to its dtype."""
        d = self.head.in_features
        with torch.no_grad():
            self._write_weight(theta[:, :d].to(self.dtype))
            if self.head.bias is not None:
                self.head.bias.copy_(theta[:, d])

    def _write_weight(self, weight: Tensor) -> None:
        if not self.derived:
            self.head.weight.copy_(weight)
        elif parametrize.is_parametrized(self.head, "weight"):
            self.head.weight = weight  # by the right inverses of its parametrizations
        elif (hook := _weight_norm(self.head)) is not None:
            name, dim = hook.name, hook.dim  # type: ignore[attr-defined]
            magnitude = torch.norm_except_dim(weight, 2, dim)
            getattr(self.head, f"{name}_g").copy_(magnitude)
            getattr(self.head, f"{name}_v").copy_(weight)
            setattr(self.head, name, hook.compute_weight(self.head))  # type: ignore[attr-defined]
        else:
            raise RuntimeError("no way known to write a weight that is derived like this")

    def _try(self) -> None:
        """Write another weight into a copy, and see whether that then computes with it."""
        generator = torch.Generator().manual_seed(0)
        theta = self.read()
        wide = torch.float64 if theta.dtype == torch.float64 else torch.float32
        noise = torch.randn(theta.shape, generator=generator).to(theta.device, wide)
        size = theta.to(wide).square().mean().sqrt().clamp_min(1e-3)
        other = (theta.to(wide) + 0.5 * size * noise).to(theta.dtype)
        d = self.head.in_features
        x = torch.randn(_PROBES, d, generator=generator).to(theta.device, theta.dtype)
        probe = copy(self)
        probe.head = cast(nn.Linear, copied(self.head).eval())
        with torch.no_grad():
            try:
                probe.write(other)
                got = probe.head(x)
            except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
                raise self._refusal(self._made_of(), self._remedy()) from error
            bias = other[:, d] if self.head.bias is not None else None
            expected = nn.functional.linear(x, other[:, :d], bias)
        # The output's own rounding, and that of sums of d products in wide.
        size = x.to(wide).abs() @ other[:, :d].to(wide).abs().T + 1.0
        bound = 2 * torch.finfo(theta.dtype).eps * expected.abs().max().to(wide)
        bound = bound + d * torch.finfo(wide).eps * size
        if not bool(((got - expected).abs() <= bound).all()):
            raise self._refusal(self._made_of(), self._remedy())

    def _made_of(self) -> str:
        if (name := self._parametrized) is not None:
            kinds = [type(p).__name__ for p in self.head.parametrizations[name]]  # type: ignore[index]
            return f"has a {name} made by {', '.join(kinds)}, which cannot give any {name}"
        hooks = [*self.head._forward_pre_hooks.values(), *self.head._forward_hooks.values()]
        names = [type(h).__name__ for h in hooks]
        return f"has a weight or an output that hooks make ({', '.join(names)})"

    def _remedy(self) -> str:
        if (name := self._parametrized) is not None:
            how = f"torch.nn.utils.parametrize.remove_parametrizations({self.name}, {name!r})"
        elif any(type(h).__name__ == "SpectralNorm" for h in self.head._forward_pre_hooks.values()):
            how = f"torch.nn.utils.remove_spectral_norm({self.name})"
        else:
            how = f"torch.nn.utils.prune.remove({self.name}, 'weight'), or removing the hook,"
        return f"{how} makes it plain; or use scope='layers', which trains what it is made of"

    def _refusal(self, what: str, remedy: str) -> InputError:
        return InputError(
            f"the head {self.name!r} ({type(self.head).__name__}) {what}, so what is computed for "
            f"it would not hold in the model; {remedy}"
        )
