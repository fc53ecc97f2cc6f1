"""Writing a head's new weight into the user's model, so that it holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from imu_fast.errors import InputError

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
        if not head.weight.is_floating_point():
            raise self._refusal(f"is {head.weight.dtype}", "dequantise it first")
        self.derived = "weight" not in head._parameters
        if self.derived or self._hooked:
            self._try()

    @property
    def dtype(self) -> torch.dtype:
        """The head's own."""
        return self.head.weight.dtype

    @property
    def _hooked(self) -> bool:
        return bool(self.head._forward_pre_hooks or self.head._forward_hooks)

    def tensors(self) -> list[Tensor]:
        """Everything that writing changes."""
        return [*self.head.parameters(), *self.head.buffers()]

    def read(self) -> Tensor:
        """``[W, b]``: [C, D], a new tensor of the head's dtype."""
        with torch.no_grad():
            parts = [self.head.weight.detach()]
            if self.head.bias is not None:
                parts.append(self.head.bias.detach()[:, None])
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

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        kept = [(tensor, tensor.detach().clone()) for tensor in self.tensors()]
        derived = self.head.weight if self.derived and "weight" in vars(self.head) else None
        mode = self.head.training
        try:
            self.head.training = False
            yield
        finally:
            self.head.training = mode
            with torch.no_grad():
                for tensor, before in kept:
                    tensor.copy_(before)
            if derived is not None:
                self.head.weight = derived

    def _try(self) -> None:
        """Write another weight, and see whether the layer then computes with it."""
        generator = torch.Generator().manual_seed(0)
        theta = self.read()
        wide = torch.float64 if theta.dtype == torch.float64 else torch.float32
        noise = torch.randn(theta.shape, generator=generator).to(theta.device, wide)
        size = theta.to(wide).square().mean().sqrt().clamp_min(1e-3)
        other = (theta.to(wide) + 0.5 * size * noise).to(theta.dtype)
        d = self.head.in_features
        x = torch.randn(_PROBES, d, generator=generator).to(theta.device, theta.dtype)
        with torch.no_grad(), self._unchanged():
            try:
                self.write(other)
                got = self.head(x)
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
        if parametrize.is_parametrized(self.head, "weight"):
            kinds = [type(p).__name__ for p in self.head.parametrizations["weight"]]  # type: ignore[index]
            return f"has a weight made by {', '.join(kinds)}, which cannot give any weight"
        hooks = [*self.head._forward_pre_hooks.values(), *self.head._forward_hooks.values()]
        names = [type(h).__name__ for h in hooks]
        return f"has a weight or an output that hooks make ({', '.join(names)})"

    def _remedy(self) -> str:
        if parametrize.is_parametrized(self.head, "weight"):
            how = f"torch.nn.utils.parametrize.remove_parametrizations({self.name}, 'weight')"
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
