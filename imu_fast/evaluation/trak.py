"""TRAK (Park et al. 2023), as a rival that scores are compared with; small models alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from imu_fast.errors import InputError, check_count, check_finite_rows, check_seed, check_tensor
from imu_fast.losses.cross_entropy import check_labels
from imu_fast.model.guard import preserved
from imu_fast.model.labels import class_labels
from imu_fast.model.parts import device_of

Samples = tuple[Tensor, Tensor]


def check_samples(name: str, samples: Samples, least: int = 1) -> None:
    """Raise InputError unless these are tensors ``(x [n, ...], y [n])`` of ``least`` samples."""
    if not isinstance(samples, tuple | list) or len(samples) != 2:
        raise InputError(f"{name} is a {type(samples).__name__}; pass tensors (x, y)")
    x, y = samples
    check_tensor(f"{name}[0]", x, "any", "[n, ...]")
    check_tensor(f"{name}[1]", y, "any", "[n]")
    counts = [len(part) if part.dim() else 0 for part in (x, y)]
    if counts[0] != counts[1] or counts[0] < least:
        raise InputError(
            f"{name} has {counts[0]} inputs and {counts[1]} labels; pass as many of both, "
            f"{least} or more"
        )


def _margin(logits: Tensor, label: Tensor) -> Tensor:
    """``log(p_y / (1 - p_y))`` of one sample, from logits [C]; no index depends on data."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    own = torch.arange(logits.shape[-1], device=logits.device) == label
    others = logits.masked_fill(own, -torch.inf)
    return logits.masked_fill(~own, 0.0).sum() - others.logsumexp(0)


def _checked(model: nn.Module, samples: Samples, name: str) -> Samples:
    """Samples on the model's device, labels as int64, each of a class of the model's.

    Raises:
        InputError: they are not, or the model returns no logits [n, C].
    """
    x, y = (part.to(device_of(model)) for part in samples)
    with torch.no_grad():
        logits = model(x[:1])
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"models: one returns {what}; trak() takes models that return [n, C]")
    labels = class_labels(y, (len(y), logits.shape[1]))
    check_labels(labels, logits.shape[1])
    if bool((labels < 0).any()):
        raise InputError(f"{name}: {int((labels < 0).sum())} samples have no label; remove them")
    return x, labels


def _projected(
    model: nn.Module, samples: Samples, projection: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the margin by all parameters, projected [n, k]; and ``1 - p_y`` [n].

    Both float64, on the CPU; products are in float32 at least.
    """
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def margin(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = functional_call(model, {**theta, **buffers}, (x[None],))[0]
        found = _margin(logits, y)
        return found, found.detach()

    per_sample = vmap(grad(margin, has_aux=True), in_dims=(None, 0, 0))
    rows, margins = [], []
    for x, y in zip(*(part.split(chunk) for part in samples), strict=True):
        gradients, found = per_sample(parameters, x, y)
        flat = torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
        flat = flat if flat.dtype == torch.float64 else flat.float()
        rows.append((flat @ projection.to(flat)).double().cpu())
        margins.append(found.double().cpu())
    return torch.cat(rows), torch.sigmoid(-torch.cat(margins))


def trak(
    models: Sequence[nn.Module],
    data: Samples,
    queries: Samples,
    *,
    width: int = 512,
    seed: int = 0,
    chunk: int = 64,
) -> Tensor:
    """Attributions to the loss of each query: [n, m] float64.

    The mean over models of ``phi_q^T (Phi^T Phi)^-1 phi_i``, times that of ``1 - p_i``, with
    ``phi`` the gradient of the margin ``log(p_y / (1 - p_y))`` by all parameters, projected to
    ``width`` numbers at random. That predicts the margin; its negative is returned, which predicts
    the loss. The paper's soft threshold, which asks for a parameter to be tuned, is left out, and
    the Gram matrix has a millionth of its mean eigenvalue added, so that it can be inverted.

    Args:
        models: trained on random subsets of the data, as the paper does; each is run in evaluation
            mode, and left in its own.
        data: (x [n, ...], y [n]). queries: (x [m, ...], y [m]). chunk: samples at a time.

    Raises:
        InputError: no model, one that does not return logits [n, C], or labels that are no class
            indices in [0, C).
    """
    if not models:
        raise InputError("models is empty; pass at least one")
    check_samples("data", data)
    check_samples("queries", queries)
    check_count("width", width)
    check_count("chunk", chunk)
    generator = torch.Generator().manual_seed(check_seed("seed", seed))
    total = torch.zeros(len(data[1]), len(queries[1]), dtype=torch.float64)
    uncertain = torch.zeros(len(data[1]), dtype=torch.float64)
    for model in models:
        size = sum(p.numel() for p in model.parameters())
        projection = torch.randn(size, width, generator=generator) / width**0.5
        with preserved(model):
            model.eval()
            ours, asked = _checked(model, data, "data"), _checked(model, queries, "queries")
            phi, rest = _projected(model, ours, projection, chunk)
            theirs, _ = _projected(model, asked, projection, chunk)
        for name, found in (("data", phi), ("queries", theirs)):
            check_finite_rows(f"{name}: a model's gradients", found)
        gram = phi.T @ phi
        ridge = 1e-6 * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)
        total += phi @ torch.linalg.solve(gram + ridge, theirs.T)
        uncertain += rest
    return -(uncertain / len(models))[:, None] * (total / len(models))
