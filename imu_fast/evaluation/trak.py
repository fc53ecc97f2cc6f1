"""TRAK (Park et al. 2023), as a rival that scores are compared with; small models alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from imu_fast.errors import InputError, check_count, check_seed
from imu_fast.losses.cross_entropy import check_labels
from imu_fast.model.guard import modes
from imu_fast.model.labels import class_labels

Samples = tuple[Tensor, Tensor]


def _margin(logits: Tensor, label: Tensor) -> Tensor:
    """``log(p_y / (1 - p_y))`` of one sample, from logits [C]; no index depends on data."""
    own = (torch.arange(logits.shape[-1], device=logits.device) == label).to(logits.dtype)
    return (logits * own).sum() - (logits - 1e9 * own).logsumexp(0)


def _checked(model: nn.Module, samples: Samples, name: str) -> Samples:
    """Samples with labels as int64, each of a class of the model's.

    Raises:
        InputError: they are not, or the model returns no logits [n, C].
    """
    x, y = samples
    with torch.no_grad():
        logits = model(x[:1])
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"models: one returns {what}; trak() takes models that return [n, C]")
    if len(x) != len(y):
        raise InputError(f"{name} has {len(x)} inputs and {len(y)} labels")
    labels = class_labels(y, (len(y), logits.shape[1]))
    check_labels(labels, logits.shape[1])
    if bool((labels < 0).any()):
        raise InputError(f"{name}: {int((labels < 0).sum())} samples have no label; remove them")
    return x, labels


def _projected(
    model: nn.Module, samples: Samples, projection: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the margin by all parameters, projected [n, k]; and ``1 - p_y`` [n]."""
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
        rows.append(flat @ projection.to(flat))
        margins.append(found)
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
    check_count("width", width)
    check_count("chunk", chunk)
    generator = torch.Generator().manual_seed(check_seed("seed", seed))
    total = torch.zeros(len(data[1]), len(queries[1]), dtype=torch.float64)
    uncertain = torch.zeros(len(data[1]), dtype=torch.float64)
    for model in models:
        size = sum(p.numel() for p in model.parameters())
        projection = torch.randn(size, width, generator=generator) / width**0.5
        with modes(model, batchnorm="eval", dropout="eval"):
            data, queries = _checked(model, data, "data"), _checked(model, queries, "queries")
            phi, rest = _projected(model, data, projection, chunk)
            theirs, _ = _projected(model, queries, projection, chunk)
        phi, theirs = phi.double(), theirs.double()
        gram = phi.T @ phi
        ridge = 1e-6 * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)
        total += phi @ torch.linalg.solve(gram + ridge, theirs.T)
        uncertain += rest.double()
    return -(uncertain / len(models))[:, None] * (total / len(models))
