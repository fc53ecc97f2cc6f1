"""The jobs of ``bench/rivals.py``: ours, and what a user would write of the same formula."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from problems import random_problem
from torch import Tensor, nn

import imu_fast as imu
from imu_fast.ops.conjugate_gradient import Iterates, iterate, start
from imu_fast.ops.ggn_product import ggn_product
from imu_fast.ops.softmax_residual import softmax_residual

EPOCHS, BATCH = 10, 256
RATES = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
# (n, d, C)
HEADS = [
    (64, 512, 10),
    (64, 512, 1_000),
    (500, 512, 10),
    (522, 512, 100),
    (5_000, 512, 10),
    (5_001, 130, 97),
    (50_000, 64, 10),
]
# (n, d, C, damping, right-hand sides)
SYSTEMS = [
    (522, 512, 10, 1e-4, 1),
    (522, 512, 10, 1e-2, 1),
    (522, 512, 10, 1e-4, 16),
    (130, 65, 3, 1e-2, 1),
    (2_000, 128, 97, 1e-2, 1),
]
Job = Callable[[], object]


def autograd(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Plain gradient ascent, as anyone writes it."""
    optimizer = torch.optim.SGD(model.parameters(), **RATES)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            (-nn.functional.cross_entropy(model(x[rows]), y[rows])).backward()
            optimizer.step()


@torch.no_grad()
def closed_form(model: nn.Linear, x: Tensor, y: Tensor) -> None:
    """The same with the softmax's residual and one matrix product."""
    weight, bias = model.weight, model.bias
    moved = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            act = x[rows]
            p = torch.softmax(torch.addmm(bias, act, weight.t()), dim=1)
            p[torch.arange(len(rows)), y[rows]] -= 1
            p /= -len(rows)
            for parameter, buffer, g in zip(
                (weight, bias), moved, (p.t() @ act, p.sum(dim=0)), strict=True
            ):
                buffer.mul_(RATES["momentum"]).add_(g.add_(parameter, alpha=RATES["weight_decay"]))
                parameter.add_(buffer, alpha=-RATES["lr"])


def head_rows() -> Iterator[tuple[str, Job, Job]]:
    for n, d, classes in HEADS:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, d, generator=generator)
        y = torch.randint(classes, (n,), generator=generator)
        model = nn.Linear(d, classes)

        def ours(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> object:
            return imu.unlearn(copy.deepcopy(model), (x, y), "uniform", scope="head")

        for rival in (autograd, closed_form):

            def theirs(
                model: nn.Linear = model, x: Tensor = x, y: Tensor = y, rival: Callable = rival
            ) -> object:
                return rival(copy.deepcopy(model), x, y)

            yield f"head {rival.__name__} n={n} d={d} C={classes}", ours, theirs


def ggn_rows() -> Iterator[tuple[str, Job, Job]]:
    for n, d, classes, damping, many in SYSTEMS:
        factors = random_problem(n, d, classes).factors
        sides = torch.randn(many, classes, d + 1, generator=torch.Generator().manual_seed(1))

        def solve(factors=factors, sides=sides, damping=damping, **how: str) -> object:
            return imu.GGN(damping=damping, **how).fit(factors).solve(sides)

        for how in ("none", "kfac"):

            def theirs(solve: Callable = solve, how: str = how) -> object:
                return solve(solver="cg", preconditioner=how)

            name = f"ggn cg/{how} n={n} d={d} C={classes} damping={damping:g} m={many}"
            yield name, solve, theirs


# (n, C)
LOGITS = [(64, 10), (64, 1_000), (500, 97), (5_001, 10), (5_001, 100), (50_000, 10), (50_000, 97)]


def plain_residual(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    loss = nn.functional.cross_entropy(logits, labels, reduction="none")
    p = torch.softmax(logits, dim=1)
    p[torch.arange(len(p)), labels] -= 1
    return p, loss


def residual_rows() -> Iterator[tuple[str, Job, Job]]:
    for n, classes in LOGITS:
        logits, labels = drawn(n, classes), torch.arange(n) % classes

        def ours(logits: Tensor = logits, labels: Tensor = labels) -> object:
            return softmax_residual(logits, labels)

        def theirs(logits: Tensor = logits, labels: Tensor = labels) -> object:
            return plain_residual(logits, labels)

        yield f"residual n={n} C={classes}", ours, theirs


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


# (n, d, C), scored from the head's inputs; the last is that of a torchvision classifier's batch
SCORED = [(64, 512, 1_000), (64, 65, 10), (522, 512, 97), (5_001, 130, 10), (50_000, 65, 10)]


def plain_scores(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """IMU's scores with the diagonal Fisher, for one label a sample."""
    n, (delta, _) = len(x), plain_residual(nn.functional.linear(x, weight, bias), labels)
    mean, mean_bias = delta.t() @ x / n, delta.mean(dim=0)
    squared = delta.square()
    fisher, fisher_bias = squared.t() @ x.square() / n, squared.mean(dim=0)
    one, two = mean / (fisher + 0.01), mean_bias / (fisher_bias + 0.01)
    return -((x @ one.t() + two) * delta).sum(dim=1)


def score_rows() -> Iterator[tuple[str, Job, Job]]:
    for n, d, classes in SCORED:
        x, labels = drawn(n, d), torch.arange(n) % classes
        head = drawn(classes, d, seed=1) / d**0.5, drawn(classes, seed=2)

        def ours(x: Tensor = x, head=head, labels: Tensor = labels) -> object:
            factors = imu.GradientFactors.from_head(x, *head, labels)
            return imu.influence_scores(factors, curvature="fisher_diag", damping=0.01)

        def theirs(x: Tensor = x, head=head, labels: Tensor = labels) -> object:
            return plain_scores(x, *head, labels)

        yield f"scores n={n} d={d} C={classes}", ours, theirs


# (n, queries, d, C)
PAIRS = [(64, 8, 65, 10), (522, 64, 512, 10), (522, 16, 130, 97), (5_001, 64, 130, 10)]


def one_more(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


def fisher_pairs(known: imu.GradientFactors, queries: imu.GradientFactors) -> Tensor:
    act, act_q = one_more(known.act), one_more(queries.act)
    diagonal = known.delta.square().t() @ act.square() / len(act) + 0.01
    solved = queries.delta[:, :, None] * act_q[:, None, :] / diagonal
    inner = act @ solved.flatten(0, 1).t()  # [n, mC]
    return -torch.einsum("nmc,nc->nm", inner.view(len(act), len(act_q), -1), known.delta)


def kfac_pairs(known: imu.GradientFactors, queries: imu.GradientFactors) -> Tensor:
    """In the eigenbasis of a Kronecker product, damped there."""
    act, act_q = one_more(known.act), one_more(queries.act)
    p = known.delta + nn.functional.one_hot(known.labels, known.delta.shape[1])
    a, q_a = torch.linalg.eigh(act.t() @ act / len(act))
    b, q_b = torch.linalg.eigh(torch.diag(p.mean(dim=0)) - p.t() @ p / len(p))
    eigenvalues = b[:, None] * a + 0.01
    rotated = queries.delta @ q_b, act_q @ q_a
    solved = rotated[0][:, :, None] * rotated[1][:, None, :] / eigenvalues
    inner = (act @ q_a) @ solved.flatten(0, 1).t()
    return -torch.einsum("nmc,nc->nm", inner.view(len(act), len(act_q), -1), known.delta @ q_b)


def pair_rows() -> Iterator[tuple[str, Job, Job]]:
    for name, plain in (("fisher_diag", fisher_pairs), ("kfac", kfac_pairs)):
        for n, many, d, classes in PAIRS:
            known = random_problem(n, d, classes).factors
            queries = random_problem(many, d, classes, relu=True).factors

            def ours(known=known, queries=queries, name: str = name) -> object:
                return imu.pairwise_influence(known, queries, curvature=name, damping=0.01)

            def theirs(known=known, queries=queries, plain: Callable = plain) -> object:
                return plain(known, queries)

            yield f"pairs {name} n={n} m={many} d={d} C={classes}", ours, theirs


# (n, d, C, vectors)
PRODUCTS = [(64, 65, 10, 128), (500, 512, 10, 128), (522, 130, 97, 128), (5_001, 130, 10, 128)]


def plain_product(p: Tensor, act: Tensor, v: Tensor) -> Tensor:
    """``(G + lam) v`` of many v at once."""
    t = (act @ v.flatten(0, 1).t()).view(len(act), len(v), -1)
    t = p[:, None] * (t - (t * p[:, None]).sum(dim=-1, keepdim=True))
    return (t.flatten(1).t() @ act).view_as(v) / len(act) + 0.01 * v


def vectors_rows() -> Iterator[tuple[str, Job, Job]]:
    for n, d, classes, many in PRODUCTS:
        p, act = torch.softmax(drawn(n, classes), dim=1), drawn(n, d, seed=1)
        v = drawn(many, classes, d, seed=2)
        scale = torch.ones(n)

        def ours(p=p, scale=scale, act=act, v=v, n: int = n) -> object:
            return ggn_product(p, scale, act, v, n, 0.01, False)

        def theirs(p=p, act=act, v=v) -> object:
            return plain_product(p, act, v)

        yield f"vectors n={n} d={d} C={classes} m={many}", ours, theirs


# (m, C, D): right-hand sides and their shape
ITERATIONS = [(1, 10, 65), (1, 10, 513), (1, 97, 513), (16, 100, 130), (64, 10, 513)]


def plain_iteration(state: Iterates, mp: Tensor) -> None:
    x, r, p, rho = state.x, state.r, state.p, state.rho
    step = rho / (p * mp).sum((1, 2), keepdim=True)
    x.addcmul_(step, p)
    r.addcmul_(step, mp, value=-1)
    size = r.square().sum((1, 2), keepdim=True)
    p.mul_(size / rho).add_(r)


def iteration_rows() -> Iterator[tuple[str, Job, Job]]:
    for many, classes, width in ITERATIONS:
        v = drawn(many, classes, width)
        mp = v * (1 + drawn(classes, width, seed=1).square())

        def ours(v: Tensor = v, mp: Tensor = mp) -> object:
            return iterate(start(v, v.clone(), tolerance=0.0), mp)

        def theirs(v: Tensor = v, mp: Tensor = mp) -> object:
            return plain_iteration(start(v, v.clone(), tolerance=0.0), mp)

        yield f"iteration m={many} C={classes} D={width}", ours, theirs


# (matrices, order, right-hand sides)
MATRICES = [(10, 8, 1), (1, 8, 1), (1, 33, 1), (1, 65, 1), (1, 89, 4), (1, 522, 16), (1, 2_001, 16)]


def cholesky_rows() -> Iterator[tuple[str, Job, Job]]:
    for dtype in (torch.float32, torch.float64):
        for many, order, sides in MATRICES:
            root = drawn(many, order, 2 * order).to(dtype)
            a, b = root @ root.mT / order, drawn(many, order, sides, seed=1).to(dtype)

            def ours(a: Tensor = a, b: Tensor = b) -> object:
                return imu.damped_cholesky_solve(a, b, 0.01)

            def theirs(a: Tensor = a, b: Tensor = b) -> object:
                eye = torch.eye(a.shape[-1], dtype=a.dtype)
                return torch.cholesky_solve(b, torch.linalg.cholesky(a + 0.01 * eye))

            kind = str(dtype).removeprefix("torch.")
            yield f"cholesky {kind} {many} of order {order}, {sides} sides", ours, theirs


# (n, d, C)
OWN = [(130, 65, 3), (500, 64, 10), (522, 130, 4)]


def dense_self_influence(factors: imu.GradientFactors) -> Tensor:
    """Of the whole GGN, formed and factored in float64."""
    act, n = one_more(factors.act).double(), factors.n
    p = factors.delta + nn.functional.one_hot(factors.labels, factors.delta.shape[1])
    root = p.double().sqrt()
    root = torch.diag_embed(root) - p.double()[:, :, None] * root[:, None, :]
    rows = torch.einsum("nck,nd->nkcd", root, act).reshape(-1, root.shape[1] * act.shape[1])
    matrix = rows.t() @ rows / n
    matrix.diagonal().add_(0.01)
    g = torch.einsum("nc,nd->ncd", factors.delta.double(), act).flatten(1)
    factor = torch.linalg.cholesky(matrix)
    return torch.linalg.solve_triangular(factor, g.t(), upper=False).square().sum(dim=0)


def own_rows() -> Iterator[tuple[str, Job, Job]]:
    for n, d, classes in OWN:
        factors = random_problem(n, d, classes).factors

        def ours(factors=factors) -> object:
            return imu.self_influence(factors, curvature="ggn", damping=0.01)

        def theirs(factors=factors) -> object:
            return dense_self_influence(factors)

        yield f"self ggn n={n} d={d} C={classes}", ours, theirs


ROWS = (
    head_rows,
    ggn_rows,
    residual_rows,
    score_rows,
    pair_rows,
    vectors_rows,
    iteration_rows,
    cholesky_rows,
    own_rows,
)
