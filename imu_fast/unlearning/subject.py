"""What unlearning changes, and measures: a head on cached features, or a network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError
from imu_fast.factors.gradient_factors import IGNORE_INDEX, GradientFactors, check_labels
from imu_fast.model.batches import ForgetSet, as_batches, split_batch, to_device
from imu_fast.model.capture import HeadFeatures, capture, capture_features
from imu_fast.model.guard import modes
from imu_fast.model.head import linears
from imu_fast.model.outputs import Measurement, logits_of, measure_logits
from imu_fast.ops.head_ascent import head_logits

_EVALUATION_ROWS = 4096


def check_head_layer(name: str, value: Any) -> None:
    """Raise InputError unless ``value`` can name a head: a name, a module, or None to find it."""
    if value is not None and not isinstance(value, str | nn.Module):
        raise InputError(
            f"layers={value!r}: a head is one layer, by name or as a module; use scope='layers' "
            "for several"
        )


class Measured(Protocol):
    """Something that can say how a set is classified at its current state."""

    def measure(self, name: str) -> Measurement:
        """Measure the set ``name``: "forget", "unseen" or a watched one."""
        ...


class Subject(Measured, Protocol):
    """What unlearning changes.

    Attributes:
        n: forget samples.
    """

    n: int

    def factors(
        self, rows: Tensor | None = None, layers: Literal["head", "trained"] = "head"
    ) -> list[GradientFactors]:
        """Gradient factors of forget samples at the current state, one entry per layer.

        Args:
            rows: which samples; None: all.
            layers: the classifier, or the linear layers that change.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """Every tensor that changes, by name; the live tensors, not copies."""
        ...

    def finish(self) -> None:
        """Leave the current state in the user's model."""
        ...


def snapshot(subject: Subject) -> dict[str, Tensor]:
    """A copy of the subject's state."""
    return {name: t.detach().clone() for name, t in subject.state().items()}


def move(subject: Subject, before: dict[str, Tensor], after: dict[str, Tensor], t: float) -> None:
    """Set the state to ``before + t (after - before)``; integer buffers take ``after``."""
    with torch.no_grad():
        for name, tensor in subject.state().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.lerp(before[name], after[name], t))
            else:
                tensor.copy_(after[name])


class HeadSubject:
    """A classifier's head: features are captured once, and no backbone runs again.

    Args:
        head: the linear layer; written only by :meth:`finish`.
        sets: captured features of "forget", and of every set that is measured.

    Attributes:
        theta: [C, D], weight and bias; float32, or float64 where the head is.
        sets: ``(features [n, d], labels [n])`` by name.
    """

    def __init__(self, head: nn.Linear, sets: Mapping[str, HeadFeatures]) -> None:
        self.head, self.has_bias = head, head.bias is not None
        dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
        self.sets = {k: (s.features.to(dtype), s.labels) for k, s in sets.items()}
        self.n = len(self.sets["forget"][1])
        parts = [head.weight.detach()]
        if self.has_bias:
            parts.append(head.bias.detach()[:, None])
        self.theta = torch.cat(parts, dim=1).to(dtype)

    @classmethod
    def of(
        cls, model: nn.Module, head: Any, loaders: Mapping[str, Any], progress: bool
    ) -> HeadSubject:
        """Features of every set, one batched pass each.

        Raises:
            InputError: a sample has no label, or several.
        """
        sets = {}
        for name, loader in loaders.items():
            captured = capture_features(model, loader, head, progress=progress)
            counts = captured.offsets.diff()
            if not bool((counts == 1).all()):
                sample = int(torch.nonzero(counts != 1)[0])
                raise InputError(
                    f"{name} loader: sample {sample} has {int(counts[sample])} valid labels; "
                    "scope='head' needs exactly one per sample, remove it or use scope='layers'"
                )
            sets[name] = captured
        return cls(sets["forget"].head, sets)

    def measure(self, name: str) -> Measurement:
        features, labels = self.sets[name]
        chunks = zip(features.split(_EVALUATION_ROWS), labels.split(_EVALUATION_ROWS), strict=True)
        return measure_logits((head_logits(x, self.theta, self.has_bias), y) for x, y in chunks)

    def factors(
        self, rows: Tensor | None = None, layers: Literal["head", "trained"] = "head"
    ) -> list[GradientFactors]:
        # What changes is the head, so either way it is the same layer.
        features, labels = self.sets["forget"]
        if rows is not None:
            rows = rows.to(features.device)
            features, labels = features[rows], labels[rows]
        d = features.shape[1]
        bias = self.theta[:, d] if self.has_bias else None
        return [GradientFactors.from_head(features, self.theta[:, :d], bias, labels)]

    def state(self) -> dict[str, Tensor]:
        return {"theta": self.theta}

    def finish(self) -> None:
        d = self.head.in_features
        with torch.no_grad():
            self.head.weight.copy_(self.theta[:, :d])
            if self.has_bias:
                self.head.bias.copy_(self.theta[:, d])


class NetworkSubject:
    """Some parameters of a network, or all, in place.

    Args:
        loaders: "forget" (a :class:`ForgetSet`) and every set that is measured.
        parameters: names of those that change; every other one is frozen here.
    """

    def __init__(
        self, model: nn.Module, loaders: Mapping[str, Any], parameters: Sequence[str]
    ) -> None:
        self.model, self.sets = model, loaders
        self.forget: ForgetSet = loaders["forget"]
        self.n = self.forget.n
        chosen = set(parameters)
        self.parameters: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
            if name in chosen:
                self.parameters[name] = parameter
        self.device = next(iter(self.parameters.values())).device

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits and labels of a batch."""
        args, kwargs, labels = to_device(split_batch(batch), self.device)
        logits = logits_of(self.model(*args, **kwargs))
        check_labels(labels, logits.shape[-1], IGNORE_INDEX)
        return logits, labels

    def measure(self, name: str) -> Measurement:
        with torch.no_grad(), modes(self.model, batchnorm="eval", dropout="eval"):
            return measure_logits(self._outputs(as_batches(self.sets[name])))

    def _outputs(self, batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.forward(batch) for batch in batches)

    def factors(
        self, rows: Tensor | None = None, layers: Literal["head", "trained"] = "head"
    ) -> list[GradientFactors]:
        data: Any = self.forget if rows is None else [self.forget.get(rows.tolist())]
        chosen: Any = "head"
        if layers == "trained":
            weights = {id(parameter) for parameter in self.parameters.values()}
            chosen = [k for k, m in linears(self.model).items() if id(m.weight) in weights]
        captured = capture(self.model, data, layers=chosen)
        return [captured] if isinstance(captured, GradientFactors) else captured

    def state(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = dict(self.parameters)
        return tensors | dict(self.model.named_buffers())

    def finish(self) -> None:
        """Nothing to do: the model itself was changed."""
