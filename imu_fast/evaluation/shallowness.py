"""Whether forgetting is shallow: how fast the forgotten comes back, what the features still know.

An edit of the classifier may reach any depth that outputs show and leave the knowledge in place.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from imu_fast.errors import (
    InputError,
    check_choice,
    check_count,
    check_finite_rows,
    check_installed,
    check_positive,
    check_seed,
    check_tensor,
)
from imu_fast.factors.operands import HALF
from imu_fast.model.batches import ForgetSet, device_of, split_batch, to_device
from imu_fast.model.called import called
from imu_fast.model.capture import capture_features
from imu_fast.model.forward import innermost
from imu_fast.model.guard import copied, door
from imu_fast.model.labels import class_labels
from imu_fast.model.outputs import logits_of, outputs_of
from imu_fast.model.reading import Reading, ReadingOptions
from imu_fast.model.run import right_batch_norms
from imu_fast.ops.head_ascent import head_logits
from imu_fast.ops.mean_gradient import add_gradients
from imu_fast.ops.softmax_residual import softmax_residual

_MOMENTUM = 0.9
_PROBE_RETAIN = 3000
# Standardised features with the default L2 penalty converge in some tens of iterations.
_PROBE_ITERATIONS = 300


def _minibatches(n: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Indices of one minibatch after another, without end; each epoch in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n, generator=generator).split(batch_size)


def _head_accuracies(
    model: nn.Module, samples: ForgetSet, batches: Iterator[Tensor], lr: float, reading: Reading
) -> Iterator[float]:
    """Accuracy on all samples before the first step, and after each: head only, closed form."""
    found = capture_features(model, samples, **reading.given())
    if not found.linear:
        what = found.between or "something changes its output"
        raise InputError(
            f"scope='head' trains the head {found.name!r} on its features, as if the logits were "
            f"linear in it; here they are not ({what}); use scope='all'"
        )
    wide = torch.float64 if found.features.dtype == torch.float64 else torch.float32
    features, labels = found.features.to(wide), found.labels
    class_labels(labels, (*labels.shape[:1], len(found.head.weight)))
    if len(labels) != samples.n:
        raise InputError(
            f"forget has {samples.n} samples but {len(labels)} labelled tokens; relearning is for "
            "classifiers, and each sample needs a label"
        )
    theta = found.head.weight.detach().to(wide, copy=True)
    has_bias = found.head.bias is not None
    if has_bias:
        theta = torch.cat([theta, found.head.bias.detach().to(wide)[:, None]], dim=1)
    velocity = torch.zeros_like(theta)
    half = max(found.computed, found.head.weight.dtype, key=lambda d: torch.finfo(d).eps)
    for step in itertools.count():
        logits = head_logits(features, theta, has_bias)
        _check_finite(logits, step, lr)
        # As the model predicts them, with its weight as coarse as it holds it.
        own = logits if half == wide else head_logits(features.to(half), theta.to(half), has_bias)
        yield float((own.argmax(dim=1) == labels).double().mean())
        rows = next(batches).to(labels.device)
        delta, _ = softmax_residual(logits[rows], labels[rows])
        add_gradients(
            velocity, delta, features[rows], has_bias, beta=_MOMENTUM, alpha=1 / len(rows)
        )
        theta.sub_(velocity, alpha=lr)


def _network_accuracies(
    model: nn.Module, samples: ForgetSet, batches: Iterator[Tensor], lr: float, reading: Reading
) -> Iterator[float]:
    """As :func:`_head_accuracies`, with every parameter of a copy of the network trained."""
    model = copied(innermost(model)).eval().requires_grad_()
    device = device_of(model)
    # Half-precision ones in float32: steps below their resolution add up.
    halves = {p: p.detach().float() for p in model.parameters() if p.dtype in HALF}
    trained = [halves.get(p, p) for p in model.parameters()]
    optimizer = torch.optim.SGD(trained, lr=lr, momentum=_MOMENTUM)
    for step in itertools.count():
        found = outputs_of(model, samples, **reading.given())
        _check_finite(found.logits, step, lr)
        yield found.accuracy
        args, kwargs, labels = to_device(split_batch(samples.get(next(batches).tolist())), device)
        model.zero_grad()
        with torch.enable_grad(), right_batch_norms(model):
            logits = logits_of(called(model, args, kwargs, labels), labels, reading.output)
            labels = reading.labels_of_all(labels, logits, "relearning_steps()")
            wide = logits if logits.dtype == torch.float64 else logits.float()
            nn.functional.cross_entropy(wide, labels).backward()
        for parameter, copy in halves.items():
            copy.grad = None if parameter.grad is None else parameter.grad.float()
        optimizer.step()
        with torch.no_grad():
            for parameter, copy in halves.items():
                parameter.copy_(copy)


def _check_finite(logits: Tensor, step: int, lr: float) -> None:
    """Raise InputError where descent has diverged: it has no accuracy."""
    if bool(torch.isnan(logits.logsumexp(dim=1)).any()):
        said = f"lr={lr!r}: relearning diverged by step {step}; lower it"
        raise InputError(said if step else "logits are not finite: the model has diverged")


_ACCURACIES = {"head": _head_accuracies, "all": _network_accuracies}


@door
def relearning_steps(
    model: nn.Module,
    forget: Any,
    *,
    target: float,
    lr: float = 0.01,
    batch_size: int = 128,
    max_steps: int = 50,
    seed: int = 0,
    scope: str = "head",
    **reading: Unpack[ReadingOptions],
) -> int:
    """Steps of descent on the forget set until its accuracy is back: few, if it was never gone.

    SGD with momentum 0.9 on the cross-entropy, in evaluation mode (BatchNorm frozen, no dropout),
    on a copy: the model is left as it was. Both scopes see the same minibatches.

    Args:
        forget: DataLoader, iterable of ``(inputs, labels)`` batches, or tensors (X, y).
        target: forget accuracy in [0, 1] that counts as relearned, asked after each step on the
            whole forget set; for example the accuracy before unlearning.
        scope: ``"head"``: the classifier, on features captured once. ``"all"``: the network.
        reading: ``output``, ``loss``, ``ignore_index``, as of :func:`imu_fast.capture_features`.

    Returns:
        Steps taken: 0 if the target holds already, ``max_steps`` if it is never reached.

    Raises:
        InputError: an argument is out of range, the forget set is empty, or the descent diverges.
        NoHeadFoundError: ``scope="head"`` and no linear layer produces the logits.
    """
    if check_positive("target", target, allow_zero=True) > 1:
        raise InputError(f"target={target!r} is an accuracy; pass a number in [0, 1]")
    check_positive("lr", lr)
    check_count("batch_size", batch_size)
    check_count("max_steps", max_steps)
    seed = check_seed("seed", seed)
    measure = _ACCURACIES[check_choice("scope", scope, _ACCURACIES)]
    how = Reading.of("relearning_steps()", reading)
    how.of_classes("relearning_steps()")
    samples = ForgetSet(forget, batch_size, model, dataset_order=True)
    accuracies = measure(model, samples, _minibatches(samples.n, batch_size, seed), lr, how)
    for step in range(max_steps):
        if next(accuracies) >= target:
            return step
    return max_steps


def linear_probe(features: Tensor, labels: Tensor, forget_mask: Tensor, *, seed: int = 0) -> float:
    """Accuracy on forget samples of a fresh linear classifier: what the features still know.

    A logistic regression (L2, standardised features) is trained on one half of the retain and
    forget samples with their true labels, and asked about the other half's forget samples. However
    the head was edited, features that still tell the forgotten apart score as high as before.

    Args:
        features: [N, d], the head's inputs. labels: [N] int64.
        forget_mask: [N] bool, True for the forget samples.
        seed: of the split, and of the subsample of 3,000 retain samples where there are more.

    Raises:
        InputError: shapes do not fit, features are not finite, or fewer than two forget samples.
    """
    check_installed("linear_probe()", "sklearn")
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    seed = check_seed("seed", seed)
    check_tensor("features", features, "floating", "[N, d]")
    check_tensor("labels", labels, "integer", "[N]")
    check_tensor("forget_mask", forget_mask, "boolean", "[N]")
    if (
        features.dim() != 2
        or not features.shape[1]
        or any(t.shape != (len(features),) for t in (labels, forget_mask))
    ):
        raise InputError(
            f"features have shape {tuple(features.shape)}, labels {tuple(labels.shape)}, "
            f"forget_mask {tuple(forget_mask.shape)}; pass [N, d], [N] and [N]"
        )
    check_finite_rows("features", features)
    labels = labels.to(torch.int64)
    if bool((labels < 0).any()):
        raise InputError("labels holds negative numbers, as of ignore_index; leave these rows out")
    mask = forget_mask.cpu()
    forget, retain = (torch.nonzero(m).flatten() for m in (mask, ~mask))
    if len(forget) < 2:
        raise InputError(
            f"forget_mask marks {len(forget)} samples; a half is trained on and a half tested: "
            "mark two or more"
        )
    generator = torch.Generator().manual_seed(seed)
    forget = forget[torch.randperm(len(forget), generator=generator)]
    retain = retain[torch.randperm(len(retain), generator=generator)[:_PROBE_RETAIN]]
    train = torch.cat([forget[: len(forget) // 2], retain[: len(retain) // 2]]).numpy()
    test = forget[len(forget) // 2 :].numpy()
    x, y = features.detach().double().cpu().numpy(), labels.cpu().numpy()
    if len(set(y[train])) == 1:  # the fit of one class is that class, whatever the features
        return float((y[test] == y[train][0]).mean())
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_PROBE_ITERATIONS))
    with warnings.catch_warnings():
        # Stopped at _PROBE_ITERATIONS it is a probe all the same, and the same for every method.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return float(probe.fit(x[train], y[train]).score(x[test], y[test]))
