"""What unlearning changes, and measures: a head on cached features, or a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from imu_fast.ambient import random_states
from imu_fast.errors import InputError, NoSamplesError
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.source import Factors
from imu_fast.model.batches import ForgetSet, Parts, as_batches, empty_message, to_device
from imu_fast.model.called import called, from_sample
from imu_fast.model.capture import HeadFeatures, capture, capture_features
from imu_fast.model.convolution import scored_layers
from imu_fast.model.forward import inside
from imu_fast.model.guard import modes
from imu_fast.model.head import LinearLayer, check_gradients, check_not_frozen, shared_with
from imu_fast.model.labels import class_labels
from imu_fast.model.loss import labelled
from imu_fast.model.outputs import (
    Measurement,
    logits_of,
    measured,
    row_losses,
    row_sums,
    summed_rows,
)
from imu_fast.model.reading import Reading
from imu_fast.ops.head_ascent import head_logits
from imu_fast.ops.tokens import is_flat, tokens_of_samples
from imu_fast.unlearning.head_weight import HeadWeight

_EVALUATION_ROWS, _EVALUATION_ELEMENTS = 4096, 1 << 24


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Errors of a set that is measured say which it is."""
    try:
        yield
    except InputError as error:
        if name == "forget":
            raise
        which = "unseen of a StopRule" if name == "unseen" else f"watch[{name!r}]"
        which = name[1:-1] if name.startswith("(") else which
        raise type(error)(f"{which}: {error}") from error


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


class Scored(Protocol):
    """What weights are made of."""

    def factors(
        self, rows: Tensor | None = None, layers: Literal["head", "trained"] = "head"
    ) -> Sequence[Factors]:
        """Gradient factors of forget samples at the current state, one entry per layer.

        Args:
            rows: which samples; None: all.
            layers: the classifier, or the linear layers and convolutions that change.
        """
        ...


class Subject(Measured, Scored, Protocol):
    """What unlearning changes.

    Attributes:
        n: forget samples. dtype: in which the user's model holds what changes.
    """

    n: int

    @property
    def dtype(self) -> torch.dtype: ...

    def state(self) -> dict[str, Tensor]:
        """Every tensor that changes, by name; the live tensors, not copies."""
        ...

    def finish(self) -> None:
        """Leave the current state in the user's model."""
        ...

    def own(self, name: str) -> Measurement:
        """Measure the set ``name`` by the user's model itself, as :meth:`finish` has left it."""
        ...

    def rounded_away(self) -> float:
        """The fraction of changed weights that rounding to the model's dtype leaves as before."""
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

    A head whose memory is another layer's too (tied to an embedding) changes its own features: it
    is measured by the model itself at every state, and its features are captured again.

    Args:
        model: whose head it is. head: by name or as a module; None: found.
        loaders: "forget", and every set that is measured.

    Attributes:
        layers: the head's modules; several where the logits are a mean or a sum of theirs.
        theta: [C, D], weight and bias (of each side by side); float32, or float64 as the head is.
        sets: ``(features [N, d], labels [N])`` by name, in theta's dtype; of sequences every token
            that has a label. offsets: [n+1], the tokens of each sample, by name.
        tied: names of the parameters that share the head's memory.
        computed: the dtype in which the model computes the head: the weight's, or a coarser one
            where its forward has an autocast of its own.

    Raises:
        InputError: a classifier's sample has no label; or what is written would not hold.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Any,
        loaders: Mapping[str, Any],
        progress: bool = False,
        reading: Reading | None = None,
    ) -> None:
        self.model, self._loaders, self._progress = model, dict(loaders), progress
        self._asked, self._reading = head or "head", (reading or Reading()).given()
        # A data set that augments gives what is ascended again where that is measured.
        self._draws = random_states() if loaders["forget"].reads_anew else nullcontext
        captured = {"forget": self._captured("forget", self._asked)}
        found = captured["forget"]
        self.name, self.has_bias = found.name, found.head.bias is not None
        self.layers = [part.module for part, _ in found.parts]
        if self._asked == "head":
            check_not_frozen(model, self.name, self.layers)
        check_gradients(self.layers)
        captured |= {k: self._captured(k, self._asked) for k in loaders if k != "forget"}
        self.computed = max(
            (found.computed, found.head.weight.dtype), key=lambda dtype: torch.finfo(dtype).eps
        )
        self.tied = [name for part, _ in found.parts for name in shared_with(model, part)]
        self._weights = [(HeadWeight(p.as_linear(), p.name), columns) for p, columns in found.parts]
        self.trained = torch.cat([weight.read() for weight, _ in self._weights], dim=1)
        self._wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.sets = {k: (s.features.to(self._wide), s.labels) for k, s in captured.items()}
        device = found.features.device
        self.offsets = {k: s.offsets.to(device) for k, s in captured.items()}
        self.flat = all(is_flat(s.offsets) for s in captured.values())
        self.n = len(self.offsets["forget"]) - 1
        self.theta = self.trained.to(self._wide, copy=True)

    def _captured(self, name: str, head: Any) -> HeadFeatures:
        with naming(name), self._draws():
            found = capture_features(
                self.model, self._loaders[name], head, progress=self._progress, **self._reading
            )
            self._check(found)
        return found

    @staticmethod
    def _check(captured: HeadFeatures) -> None:
        if not captured.linear:
            what = captured.between or "something changes its output"
            raise InputError(
                f"scope='head' trains the head {captured.name!r} on its features, as if the logits "
                f"were linear in it; here they are not ({what}); use an ascent with scope='layers' "
                "(default: the head), which runs the model itself"
            )
        labels = captured.labels
        class_labels(labels, (*labels.shape[:1], len(captured.head.weight)))
        counts = captured.offsets.diff()
        if not captured.sequences and not bool((counts == 1).all()):
            sample = int(torch.nonzero(counts != 1)[0])
            raise InputError(
                f"sample {sample} has {int(counts[sample])} valid labels; unlearning needs exactly "
                "one per sample, remove it"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The head's own."""
        return self.trained.dtype

    def tensors(self) -> list[Tensor]:
        """Everything that :meth:`finish` changes."""
        return [tensor for weight, _ in self._weights for tensor in weight.tensors()]

    def capture_again(self) -> None:
        """Features as they are with the present weight in the model."""
        self.finish()
        for name in self.sets:
            found = self._captured(name, self._asked)
            self.sets[name] = found.features.to(self._wide), found.labels
            self.offsets[name] = found.offsets.to(found.features.device)

    def measure(self, name: str) -> Measurement:
        if self.tied:
            self.finish()
            return self.own(name)
        features, labels = self.sets[name]
        size = max(1, min(_EVALUATION_ROWS, _EVALUATION_ELEMENTS // len(self.theta)))
        chunks = zip(features.split(size), labels.split(size), strict=True)
        rows = [row_losses(self._logits(x), y) for x, y in chunks]
        losses, correct = (torch.cat(column) for column in zip(*rows, strict=True))
        return Measurement.of([summed_rows(losses, correct, self.offsets[name].diff())])

    def _logits(self, features: Tensor) -> Tensor:
        """As the model computes them: in its own precision, with the weight rounded to it."""
        dtype = self.computed
        if dtype == self._wide:
            return head_logits(features, self.theta, self.has_bias)
        return head_logits(features.to(dtype), self.theta.to(dtype), self.has_bias)

    def factors(
        self, rows: Tensor | None = None, layers: Literal["head", "trained"] = "head"
    ) -> Sequence[Factors]:
        # What changes is the head, so either way it is the same layer.
        (features, labels), offsets = self.sets["forget"], self.offsets["forget"]
        if rows is not None:
            tokens, counts = tokens_of_samples(offsets, rows.to(features.device))
            features, labels = features[tokens], labels[tokens]
            offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        d = features.shape[1]
        bias = self.theta[:, d] if self.has_bias else None
        weight = self.theta[:, :d]
        return [GradientFactors.from_head(features, weight, bias, labels, offsets.cpu())]

    def state(self) -> dict[str, Tensor]:
        return {"theta": self.theta}

    def finish(self) -> None:
        for weight, columns in self._weights:
            weight.write(self.theta[:, columns])

    def rounded_away(self) -> float:
        if self.theta.dtype == self.trained.dtype:
            return 0.0
        changed = self.theta != self.trained.to(self._wide)
        same = self.theta.to(self.trained.dtype) == self.trained
        return float((changed & same).sum() / changed.sum().clamp_min(1))

    def own(self, name: str) -> Measurement:
        with self._draws():
            return measured(self.model, self._loaders[name], Reading(**self._reading), "unlearn()")


class NetworkSubject:
    """Some parameters of a network, or all, in place.

    Half-precision ones are changed in float32 copies, which are rounded into the model: steps below
    their resolution add up.

    Args:
        loaders: "forget" (a :class:`ForgetSet`) and every set that is measured.
        parameters: names of those that change; every other one is frozen here.

    Attributes:
        reading: how the model is read.
        parameters: those that change, by name. trained: what an optimizer changes, by the same
            names: a parameter itself, or its copy.
    """

    def __init__(
        self,
        model: nn.Module,
        loaders: Mapping[str, Any],
        parameters: Sequence[str],
        reading: Reading | None = None,
    ) -> None:
        self.model, self.sets, self.reading = model, loaders, reading or Reading()
        self.forget: ForgetSet = loaders["forget"]
        self.n = self.forget.n
        chosen = set(parameters)
        self.parameters: dict[str, nn.Parameter] = {}
        self.trained: dict[str, Tensor] = {}
        self._halves: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
            if name in chosen:
                self.parameters[name] = self.trained[name] = parameter
                if parameter.dtype in (torch.bfloat16, torch.float16):
                    wide = parameter.detach().float()
                    self.trained[name] = wide
                    self._halves.append((parameter, wide, parameter.detach().clone()))
        self.device = next(iter(self.parameters.values())).device
        # Of several the coarsest, whose rounding is what may be lost.
        dtypes = {p.dtype for p in self.parameters.values()}
        self.dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def forward(
        self, batch: Parts, parameters: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [..., C] of a batch and their labels [...], -1 where there is none.

        Args:
            parameters: in the place of the model's own, by name.
        """
        args, kwargs, labels = to_device(batch, self.device)

        def other(*args: Any, **kwargs: Any) -> Any:
            inner, own = inside(self.model, parameters or {})
            return torch.func.functional_call(inner, own, args, kwargs)

        run = None if parameters is None else other
        output = called(self.model, args, kwargs, labels, run)
        logits = logits_of(output, labels, self.reading.output)
        return logits, labelled(self.reading, labels, logits, "unlearn()")

    def measure(self, name: str) -> Measurement:
        self.finish()
        with naming(name), torch.no_grad(), modes(self.model, batchnorm="eval", dropout="eval"):
            rows: list[tuple[Tensor, Tensor, Tensor]] = []
            samples = 0
            for batch in as_batches(self.sets[name], self.model):
                with from_sample(samples):
                    rows.append(row_sums(*self.forward(batch)))
                samples += batch.n
            if not rows:
                raise NoSamplesError(empty_message(self.sets[name]))
            return Measurement.of(rows)

    def factors(
        self, rows: Tensor | None = None, layers: Literal["head", "trained"] = "head"
    ) -> Sequence[Factors]:
        self.finish()
        data: Any = self.forget if rows is None else self.forget.subset(rows.tolist())
        chosen: Any = "head"
        if layers == "trained":
            chosen = [layer.name for layer in trained_layers(self)]
        captured = capture(self.model, data, layers=chosen, **self.reading.given())
        return captured if isinstance(captured, list) else [captured]

    def state(self) -> dict[str, Tensor]:
        return self.trained | dict(self.model.named_buffers())

    def finish(self) -> None:
        """Round the copies into the model; all else was changed there."""
        with torch.no_grad():
            for parameter, wide, _ in self._halves:
                parameter.copy_(wide)

    def rounded_away(self) -> float:
        changed = lost = 0
        for parameter, wide, before in self._halves:
            moved = wide != before.float()
            changed += int(moved.sum())
            lost += int((moved & (parameter.detach() == before)).sum())
        return lost / max(1, changed)

    def own(self, name: str) -> Measurement:
        return self.measure(name)


def trained_layers(subject: NetworkSubject) -> list[LinearLayer]:
    """The linear layers and convolutions whose weights change, in module order."""
    weights = {id(parameter) for parameter in subject.parameters.values()}
    scored = scored_layers(subject.model).values()
    return [layer for layer in scored if id(layer.module.weight) in weights]
