"""What is ascended, step by step: the head on cached features, or the network with autograd.

Both problems offer the same few methods, so that the loop in unlearn.py does not know which it
drives: ``step``, ``measure``, ``factors`` and the tensors that define the state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from imu_fast.capture import (
    HeadFeatures,
    as_batches,
    capture,
    capture_features,
    logits_of,
    split_batch,
    to_device,
)
from imu_fast.errors import InputError, check_positive
from imu_fast.factors import IGNORE_INDEX, GradientFactors, check_labels
from imu_fast.head_run import StepSequence
from imu_fast.ops.head_ascent import head_ascent, head_ascent_gradient, head_logits
from imu_fast.ops.objective import objective

OptimizerFactory = Callable[[list[Tensor]], torch.optim.Optimizer]
_EVALUATION_ROWS = 4096


def _indices_of(loader: Any) -> Sequence[int] | None:
    """Which samples of its dataset a DataLoader draws, ascending; None: not to be read by index."""
    data = torch.utils.data
    if not isinstance(loader, data.DataLoader) or isinstance(loader.dataset, data.IterableDataset):
        return None
    if loader.batch_sampler is None:  # batch_size=None: the dataset's items are batches
        return None
    if loader.batch_size is None:  # the user's own batch_sampler
        return sorted({i for batch in loader.batch_sampler for i in batch})
    everything = range(len(loader.dataset))  # type: ignore[arg-type]
    if isinstance(loader.sampler, data.SequentialSampler):
        return everything
    drawn = sorted(set(loader.sampler))
    return everything if len(drawn) == len(everything) else drawn


class ForgetSet:
    """The forget samples by index, in one fixed order whatever the loader's shuffling.

    Args:
        loader: a DataLoader over a map-style dataset (read by index with its ``collate_fn``; only
            the samples that its sampler draws, in ascending order), a tuple of tensors, or any
            iterable of batches (kept in memory: forget sets are small).
        batch_size: samples per batch of :meth:`batches`.

    Raises:
        InputError: the loader is empty.
    """

    def __init__(self, loader: Any, batch_size: int) -> None:
        self.batch_size = batch_size
        self._get: Callable[[list[int]], Any]
        drawn = _indices_of(loader)
        if drawn is not None:
            dataset = loader.dataset
            self.n = len(drawn)
            self._get = lambda rows: loader.collate_fn([dataset[drawn[i]] for i in rows])
        else:
            batches = list(as_batches(loader))
            if batches and isinstance(batches[0], Mapping):
                columns = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
                self.n = len(next(iter(columns.values())))
                self._get = lambda rows: {k: v[rows] for k, v in columns.items()}
            else:
                parts = [torch.cat(part) for part in zip(*batches, strict=True)]
                self.n = len(parts[0]) if parts else 0
                self._get = lambda rows: tuple(part[rows] for part in parts)
        if self.n == 0:
            raise InputError("forget_loader is empty; pass at least one forget sample")

    def get(self, rows: Sequence[int]) -> Any:
        """One batch with the samples of these indices."""
        return self._get(list(rows))

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, self.n, self.batch_size):
            yield self.get(range(start, min(start + self.batch_size, self.n)))


@dataclass(frozen=True)
class Measurement:
    """How a set of samples is classified: cross-entropy, correctness and p_y, each [n]."""

    loss: Tensor
    correct: Tensor
    confidence: Tensor

    @property
    def mean_loss(self) -> float:
        """Mean cross-entropy."""
        return float(self.loss.mean())

    @property
    def accuracy(self) -> float:
        """Fraction classified as labelled."""
        return float(self.correct.double().mean())


def _measure_logits(batches: Iterable[tuple[Tensor, Tensor]]) -> Measurement:
    losses, correct = [], []
    for logits, labels in batches:
        losses.append(nn.functional.cross_entropy(logits.float(), labels, reduction="none"))
        correct.append(logits.argmax(dim=1) == labels)
    loss = torch.cat(losses)
    return Measurement(loss, torch.cat(correct), torch.exp(-loss))


@dataclass(frozen=True)
class StopRule:
    """When ascent is deep enough; the first condition met stops it (SPEC section 5).

    The step that crosses the line is bisected, so that two methods stop at the same depth.

    Args:
        forget_accuracy: stop at or below this accuracy on the forget set, in [0, 1].
        forget_loss: stop at or above this mean cross-entropy on the forget set.
        membership_auc: stop once the AUC that tells forget samples (positive) from ``unseen``
            ones by their confidence p_y is at or below this (0.5: indistinguishable).
        unseen: loader of samples the model never saw; needed by ``membership_auc``.
    """

    forget_accuracy: float | None = None
    forget_loss: float | None = None
    membership_auc: float | None = None
    unseen: Any = None

    def __post_init__(self) -> None:
        values = (self.forget_accuracy, self.forget_loss, self.membership_auc)
        if all(value is None for value in values):
            raise InputError(
                "stop=StopRule() has no condition; set forget_accuracy, forget_loss or "
                "membership_auc"
            )
        for name in ("forget_accuracy", "membership_auc"):
            value = getattr(self, name)
            if value is not None and check_positive(name, value, allow_zero=True) > 1:
                raise InputError(f"{name}={value!r} must lie in [0, 1]")
        if self.forget_loss is not None:
            check_positive("forget_loss", self.forget_loss, allow_zero=True)
        if self.membership_auc is not None and self.unseen is None:
            raise InputError("unseen=None: membership_auc needs a loader of unseen samples")

    def reached(self, state: Measured) -> str | None:
        """The name of the condition that holds now, or None."""
        forget = state.measure("forget")
        if self.forget_accuracy is not None and forget.accuracy <= self.forget_accuracy:
            return "forget_accuracy"
        if self.forget_loss is not None and forget.mean_loss >= self.forget_loss:
            return "forget_loss"
        if self.membership_auc is not None:
            from sklearn.metrics import roc_auc_score

            unseen = state.measure("unseen")
            confidence = torch.cat([forget.confidence, unseen.confidence]).cpu().numpy()
            member = [1] * len(forget.confidence) + [0] * len(unseen.confidence)
            if roc_auc_score(member, confidence) <= self.membership_auc:
                return "membership_auc"
        return None


class Measured(Protocol):
    """Something that can say how a set is classified at its current state."""

    def measure(self, name: str) -> Measurement:
        """Measure the set ``name``: "forget", "unseen" or a watched one."""
        ...


class Problem(Measured, Protocol):
    """What the ascent loop drives.

    sequence: several steps at once, for where the loop has nothing to do between them; or None.
    """

    n: int
    optimizer: torch.optim.Optimizer

    @property
    def sequence(self) -> StepSequence | None: ...

    def step(self, rows: Tensor, weights: Tensor) -> Tensor:
        """One reweighted step on forget samples ``rows`` [B]; returns the loss (scalar tensor)."""
        ...

    def factors(self, rows: Tensor | None = None) -> list[GradientFactors]:
        """Gradient factors of the forget samples at the current state, one entry per layer."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Every tensor that ascent changes, by name; the live tensors, not copies."""
        ...

    def finish(self) -> None:
        """Leave the result in the user's model."""
        ...


def plain_sgd(optimizer: torch.optim.Optimizer) -> tuple[float, float, float] | None:
    """lr, momentum and weight decay of an SGD that does nothing else; None for other optimizers.

    Subclasses, hooks, schedulers that wrap ``step``, dampening and the like all do something else.
    """
    watched = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    if type(optimizer) is not torch.optim.SGD or "step" in vars(optimizer) or watched:
        return None
    group = optimizer.param_groups[0]
    if any(group[key] for key in ("dampening", "nesterov", "maximize", "differentiable")):
        return None
    if isinstance(group["lr"], Tensor):
        return None
    return group["lr"], group["momentum"], group["weight_decay"]


class HeadProblem:
    """Ascent of the classifier alone: features are captured once, gradients are in closed form.

    Args:
        head: the linear layer; written only by :meth:`finish`.
        sets: captured features of "forget", and of every set that is measured.
        auxiliary: [n], what the objective needs to know of each forget sample, or None.
        rows: [C] bool, the classes whose weights may change; None: all.
    """

    def __init__(
        self,
        head: nn.Linear,
        sets: Mapping[str, HeadFeatures],
        make_optimizer: OptimizerFactory,
        *,
        objective: str,
        alpha: float,
        auxiliary: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> None:
        self.head, self.objective, self.alpha = head, objective, alpha
        self.auxiliary = None if auxiliary is None else auxiliary.to(head.weight.device)
        self.frozen = None if rows is None else ~rows.to(head.weight.device)
        # [C, D] -> [C, D], applied to the ascent gradient, which keeps its own norm.
        self.preconditioner: Callable[[Tensor], Tensor] | None = None
        dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
        self.sets = {k: (s.features.to(dtype), s.labels) for k, s in sets.items()}
        self.n = len(self.sets["forget"][1])
        self.has_bias = head.bias is not None
        parts = [head.weight.detach()]
        if self.has_bias:
            parts.append(head.bias.detach()[:, None])
        self.theta = torch.cat(parts, dim=1).to(dtype)
        self.optimizer = make_optimizer([self.theta])

    @cached_property
    def sequence(self) -> StepSequence | None:
        """Several steps at once; a graph of them where a step only launches kernels."""
        return StepSequence(self.step, self.theta.is_cuda and self._rates() is not None)

    def _rates(self) -> tuple[float, float, float] | None:
        """Those of :func:`plain_sgd`, where the step is that and nothing more."""
        more = (self.preconditioner, self.auxiliary, self.frozen)
        return plain_sgd(self.optimizer) if all(m is None for m in more) else None

    def step(self, rows: Tensor, weights: Tensor) -> Tensor:
        features, labels = self.sets["forget"]
        rows = rows.to(features.device)
        batch = features[rows], labels[rows], weights, self.theta
        if (rates := self._rates()) is not None:
            lr, momentum, weight_decay = rates
            # The buffer lives where torch keeps it, so that a checkpoint finds it.
            slots = self.optimizer.state[self.theta]
            if momentum and "momentum_buffer" not in slots:
                slots["momentum_buffer"] = torch.zeros_like(self.theta)
            buffer = slots["momentum_buffer"] if momentum else None
            return head_ascent(
                *batch,
                buffer,
                self.has_bias,
                self.objective,
                lr=lr,
                momentum=momentum,
                weight_decay=weight_decay,
                alpha=self.alpha,
            )
        auxiliary = None if self.auxiliary is None else self.auxiliary[rows]
        gradient, loss = head_ascent_gradient(*batch, self.has_bias, self.objective, auxiliary)
        if self.preconditioner is not None:
            moved = self.preconditioner(gradient).to(gradient)
            scale = gradient.norm() / moved.norm().clamp_min(torch.finfo(moved.dtype).tiny)
            gradient = moved.mul_(scale)
        if self.alpha:
            gradient.add_(self.theta.sign(), alpha=self.alpha)
            loss = loss + self.alpha * self.theta.abs().sum()
        self.theta.grad = gradient
        # Not by a gradient of zero: weight decay and momentum move what has none.
        kept = None if self.frozen is None else self.theta[self.frozen]
        self.optimizer.step()
        if kept is not None:
            self.theta[self.frozen] = kept
        return loss

    def measure(self, name: str) -> Measurement:
        features, labels = self.sets[name]
        chunks = zip(features.split(_EVALUATION_ROWS), labels.split(_EVALUATION_ROWS), strict=True)
        return _measure_logits((head_logits(x, self.theta, self.has_bias), y) for x, y in chunks)

    def factors(self, rows: Tensor | None = None) -> list[GradientFactors]:
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


@contextmanager
def _modes(model: nn.Module, *, batchnorm: str, dropout: str) -> Iterator[None]:
    """The model in evaluation mode, but for the kinds of layers asked for in training mode."""
    saved = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for module in model.modules():
            norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if (batchnorm if norm else dropout) == "train":
                module.training = True
        yield
    finally:
        for module, training in saved:
            module.training = training


class NetworkProblem:
    """Ascent of some parameters, or all, with autograd.

    Args:
        parameters: names of the trained parameters; every other one stays frozen.
        batchnorm: ``"train"`` lets running statistics drift on forget data, ``"eval"`` not.
        dropout: mode of every layer that is not a BatchNorm, same values.
        score_layers: what :meth:`factors` captures.
        auxiliary: [n], what the objective needs to know of each forget sample, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        sets: Mapping[str, Any],
        make_optimizer: OptimizerFactory,
        parameters: Sequence[str],
        *,
        objective: str,
        alpha: float,
        batchnorm: str,
        dropout: str,
        score_layers: Any,
        auxiliary: Tensor | None = None,
    ) -> None:
        self.sequence = None
        self.model, self.sets, self.objective, self.alpha = model, sets, objective, alpha
        self.auxiliary = auxiliary
        self.batchnorm, self.dropout, self.score_layers = batchnorm, dropout, score_layers
        self.forget: ForgetSet = sets["forget"]
        self.n = self.forget.n
        chosen = set(parameters)
        self.parameters: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
            if name in chosen:
                self.parameters[name] = parameter
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = make_optimizer(list(self.parameters.values()))

    def _forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        args, kwargs, labels = to_device(split_batch(batch), self.device)
        logits = logits_of(self.model(*args, **kwargs))
        check_labels(labels, logits.shape[-1], IGNORE_INDEX)
        return logits, labels

    def step(self, rows: Tensor, weights: Tensor) -> Tensor:
        share = weights.to(self.device) / weights.sum()
        with _modes(self.model, batchnorm=self.batchnorm, dropout=self.dropout):
            with torch.enable_grad():
                logits, labels = self._forward(self.forget.get(rows.tolist()))
                auxiliary = None
                if self.auxiliary is not None:
                    auxiliary = self.auxiliary[rows.to(self.auxiliary.device)].to(self.device)
                values = objective(logits.to(share.dtype), labels, self.objective, auxiliary)
                loss = -(share * values).sum()
                if self.alpha:
                    penalty = [p.abs().sum() for p in self.parameters.values()]
                    loss = loss + self.alpha * torch.stack(penalty).sum()
            gradients = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def measure(self, name: str) -> Measurement:
        with torch.no_grad(), _modes(self.model, batchnorm="eval", dropout="eval"):
            return _measure_logits(self._forward(batch) for batch in as_batches(self.sets[name]))

    def factors(self, rows: Tensor | None = None) -> list[GradientFactors]:
        data: Any = self.forget if rows is None else [self.forget.get(rows.tolist())]
        captured = capture(self.model, data, layers=self.score_layers)
        return [captured] if isinstance(captured, GradientFactors) else captured

    def state(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = dict(self.parameters)
        return tensors | dict(self.model.named_buffers())

    def finish(self) -> None:
        """Nothing to do: the model itself was trained."""


def head_sets(
    model: nn.Module, head: Any, loaders: Mapping[str, Any], progress: bool
) -> dict[str, HeadFeatures]:
    """Features of every set, one batched pass each; "forget" must have one label per sample.

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
    return sets
