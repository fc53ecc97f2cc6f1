"""Influence of n samples on m queries at a linear softmax head, by public libraries.

Each function takes a trained ``nn.Linear``, training samples, queries and the damping, and returns
scores [n, m], in that library's own sign and scale. Libraries that are not installed are skipped.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Samples = tuple[Tensor, Tensor]


def closed_form(head: nn.Linear, train: Samples, queries: Samples, damping: float) -> Tensor:
    """The plain float32 closed form: dense Hessian class pair by class pair, Cholesky, one GEMM."""

    def gradients(samples: Samples) -> tuple[Tensor, Tensor, Tensor]:
        x, y = samples
        a = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        p = torch.softmax(head(x), dim=1)
        delta = p - nn.functional.one_hot(y, p.shape[1])
        return p, a, (delta[:, :, None] * a[:, None, :]).flatten(1)

    with torch.no_grad():
        p, a, g = gradients(train)
        classes, width = p.shape[1], a.shape[1]
        hessian = torch.empty(classes, width, classes, width)
        for c in range(classes):
            for e in range(classes):
                weight = p[:, c] * (float(c == e) - p[:, e]) / len(a)
                hessian[c, :, e] = (a * weight[:, None]).T @ a
        hessian = hessian.view(classes * width, -1)
        hessian.diagonal().add_(damping)
        factor = torch.linalg.cholesky(hessian)
        if queries is train:
            return torch.linalg.solve_triangular(factor, g.T, upper=False).square().sum(dim=0)
        return g @ torch.cholesky_solve(gradients(queries)[2].T, factor)


def closed_form_self(head: nn.Linear, train: Samples, queries: Samples, damping: float) -> Tensor:
    """Self-influence by the same closed form."""
    return closed_form(head, train, train, damping)


def _dattri(
    kind: str,
    head: nn.Linear,
    train: Samples,
    queries: Samples,
    batch_size: int | None = None,
    **options,
) -> Tensor:
    from dattri.algorithm import influence_function
    from dattri.task import AttributionTask

    def loss(parameters, batch):
        x, y = batch
        logits = torch.func.functional_call(head, parameters, (x,))
        return nn.functional.cross_entropy(logits, y.long())

    task = AttributionTask(loss_func=loss, model=head, checkpoints=head.state_dict())
    attributor = getattr(influence_function, f"IFAttributor{kind}")(task, **options)

    def loader(samples: Samples, size: int | None) -> DataLoader:
        return DataLoader(TensorDataset(*samples), batch_size=size or len(samples[0]))

    # What defines the Hessian is one batch: of several the inverses would be summed.
    attributor.cache(loader(train, None))
    return attributor.attribute(loader(train, batch_size), loader(queries, batch_size)).detach()


def dattri_explicit(head: nn.Linear, train: Samples, queries: Samples, damping: float) -> Tensor:
    """dattri's IFAttributorExplicit: the Hessian by automatic differentiation, solved densely."""
    return _dattri("Explicit", head, train, queries, regularization=damping)


def dattri_explicit_batches(
    head: nn.Linear, train: Samples, queries: Samples, damping: float
) -> Tensor:
    """The same with samples and queries in batches of 500, as its MNIST example has them."""
    return _dattri("Explicit", head, train, queries, batch_size=500, regularization=damping)


def dattri_explicit_self(
    head: nn.Linear, train: Samples, queries: Samples, damping: float
) -> Tensor:
    """Self-influence as its example of noisy labels has it: the diagonal of all pairs."""
    return dattri_explicit(head, train, train, damping).diagonal()


def dattri_cg(head: nn.Linear, train: Samples, queries: Samples, damping: float) -> Tensor:
    """dattri's IFAttributorCG, with as many iterations as its residual of 1e-6 needs here."""
    return _dattri("CG", head, train, queries, regularization=damping, max_iter=100, tol=1e-6)


def _pydvl(kind: str, head: nn.Linear, train: Samples, queries: Samples, **options) -> Tensor:
    from pydvl.influence import InfluenceMode
    from pydvl.influence import torch as pydvl_torch

    influence = getattr(pydvl_torch, f"{kind}Influence")
    model = influence(copy.deepcopy(head), nn.functional.cross_entropy, **options)
    model = model.fit(DataLoader(TensorDataset(*train), batch_size=len(train[0])))
    return model.influences(*queries, *train, mode=InfluenceMode.Up).detach().T


def pydvl_direct(head: nn.Linear, train: Samples, queries: Samples, damping: float) -> Tensor:
    """pyDVL's DirectInfluence."""
    return _pydvl("Direct", head, train, queries, regularization=damping)


def pydvl_direct_self(head: nn.Linear, train: Samples, queries: Samples, damping: float) -> Tensor:
    """Self-influence by the same: the diagonal of all pairs."""
    return pydvl_direct(head, train, train, damping).diagonal()


def pydvl_cg(head: nn.Linear, train: Samples, queries: Samples, damping: float) -> Tensor:
    """pyDVL's CgInfluence, to a relative residual of 1e-6."""
    return _pydvl("Cg", head, train, queries, regularization=damping, rtol=1e-6)


def _tracin(head: nn.Linear, train: Samples, batch_size: int):
    from captum.influence import TracInCPFast

    model = nn.Sequential(nn.Identity(), copy.deepcopy(head))
    return TracInCPFast(
        model,
        model[1],
        TensorDataset(*train),
        [model.state_dict()],
        checkpoints_load_func=lambda m, state: m.load_state_dict(state) and 1.0,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=batch_size,
    )


def captum_tracin(head: nn.Linear, train: Samples, queries: Samples, damping: float) -> Tensor:
    """captum's TracInCPFast at one checkpoint: inner products of gradients, no curvature."""
    return _tracin(head, train, len(train[0])).influence(queries).detach().T


def captum_default(head: nn.Linear, train: Samples, queries: Samples, damping: float) -> Tensor:
    """The same with the batch size that captum takes when it is not told another: one sample."""
    return _tracin(head, train, 1).influence(queries).detach().T


def captum_self(head: nn.Linear, train: Samples, queries: Samples, damping: float) -> Tensor:
    """captum's TracInCPFast.self_influence at one checkpoint: squared norms of gradients."""
    return _tracin(head, train, len(train[0])).self_influence(train).detach()


def captum_self_default(
    head: nn.Linear, train: Samples, queries: Samples, damping: float
) -> Tensor:
    """The same over the data set it was given, in batches of one sample, its default."""
    return _tracin(head, train, 1).self_influence().detach()


def _vmap_gradients(head: nn.Linear, samples: Samples) -> Tensor:
    """Per-sample gradients [n, P] by ``torch.func.vmap(grad)``."""
    parameters = {k: v.detach() for k, v in head.named_parameters()}

    def loss(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(head, theta, (x[None],))
        return nn.functional.cross_entropy(logits, y[None])

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    return torch.cat([v.flatten(1) for v in per_sample(parameters, *samples).values()], dim=1)


def vmap_grad(head: nn.Linear, train: Samples, queries: Samples, damping: float) -> Tensor:
    """Inner products of per-sample gradients by ``torch.func.vmap(grad)``."""
    return _vmap_gradients(head, train) @ _vmap_gradients(head, queries).T


def vmap_self(head: nn.Linear, train: Samples, queries: Samples, damping: float) -> Tensor:
    """Squared norms of per-sample gradients by ``torch.func.vmap(grad)``."""
    return _vmap_gradients(head, train).square().sum(dim=1)


def vmap_exact(head: nn.Linear, train: Samples, queries: Samples, damping: float) -> Tensor:
    """As it is written by hand: ``vmap(grad)``, ``torch.func.hessian`` and a dense solve."""
    parameters = {k: v.detach() for k, v in head.named_parameters()}
    shapes = [v.shape for v in parameters.values()]
    flat = torch.cat([v.flatten() for v in parameters.values()])

    def loss(theta: Tensor) -> Tensor:
        pieces = theta.split([shape.numel() for shape in shapes])
        named = zip(parameters, pieces, shapes, strict=True)
        values = {name: piece.view(shape) for name, piece, shape in named}
        logits = torch.func.functional_call(head, values, (train[0],))
        return nn.functional.cross_entropy(logits, train[1])

    hessian = torch.func.hessian(loss)(flat)
    hessian.diagonal().add_(damping)
    return _vmap_gradients(head, train) @ torch.linalg.solve(
        hessian, _vmap_gradients(head, queries).T
    )


def vmap_exact_self(head: nn.Linear, train: Samples, queries: Samples, damping: float) -> Tensor:
    """Self-influence by the same: the diagonal of all pairs."""
    return vmap_exact(head, train, train, damping).diagonal()


EXACT = {
    "closed form": closed_form,
    "vmap(grad) and hessian": vmap_exact,
    "dattri Explicit": dattri_explicit,
    "dattri Explicit, batches of 500": dattri_explicit_batches,
    "dattri CG": dattri_cg,
    "pyDVL Direct": pydvl_direct,
    "pyDVL Cg": pydvl_cg,
}
EXACT_SELF = {
    "closed form": closed_form_self,
    "vmap(grad) and hessian": vmap_exact_self,
    "dattri Explicit": dattri_explicit_self,
    "pyDVL Direct": pydvl_direct_self,
}
GRADIENT_PRODUCTS = {
    "captum TracInCPFast": captum_tracin,
    "captum TracInCPFast, batches of 1": captum_default,
    "vmap(grad)": vmap_grad,
}
GRADIENT_NORMS = {
    "captum TracInCPFast": captum_self,
    "captum TracInCPFast, batches of 1": captum_self_default,
    "vmap(grad)": vmap_self,
}
