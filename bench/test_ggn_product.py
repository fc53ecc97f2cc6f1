"""ggn_product: the softmax Jacobian between two matrix products; one vector, and eight."""

from __future__ import annotations

import roofline
import suites
import torch
from torch.nn.functional import cross_entropy

from imu_fast import reference
from imu_fast.ops.ggn_product import ggn_product

LAM = 0.1


def make(problem):
    """The product's operands, then the head [C, D] whose probabilities they are."""
    n, classes, d = (problem.sizes[name] for name in ("N", "C", "d"))
    m = problem.sizes.get("m", 1)
    act, head = suites.randn(problem, n, d), suites.randn(problem, classes, d + 1) / d**0.5
    p = torch.softmax(reference.augment(act, True) @ head.T, dim=1)
    v = suites.randn(problem, m, classes, d + 1)
    return p, p.new_ones(n), act, v[0] if m == 1 else v, n, LAM, True, head


def formula(p, scale, act, v, n, damping, has_bias, head):
    act, tall = reference.augment(act, has_bias), v.reshape(-1, v.shape[-1])
    u = (act @ tall.T).view(len(p), -1, p.shape[1])
    s = p[:, None] * u
    s = (s - p[:, None] * s.sum(dim=2, keepdim=True)) * scale[:, None, None]
    return ((s.flatten(1).T @ act) / n + damping * tall).view(v.shape)


def naive(p, scale, act, v, n, damping, has_bias, head):
    """Forward over reverse automatic differentiation of the mean loss."""
    act = reference.augment(act, has_bias)
    labels = torch.zeros(len(act), dtype=torch.int64, device=act.device)  # no part in the Hessian

    def gradient(weight):
        return torch.func.grad(lambda w: cross_entropy(act @ w.T, labels))(weight)

    many = v if v.dim() == 3 else v[None]
    products = [torch.func.jvp(gradient, (head,), (x,))[1] + damping * x for x in many]
    return torch.stack(products).view(v.shape)


def reference_product(p, scale, act, v, *rest):
    many = v if v.dim() == 3 else v[None]
    products = [reference.ggn_product(p, scale, act, x, *rest[:-1]) for x in many]
    return torch.stack(products).view(v.shape)


def bare(p, scale, act, v, *_):
    tall = v.reshape(-1, v.shape[-1])[:, : act.shape[1]].contiguous()
    u, out = act.new_empty(len(act), len(tall)), torch.empty_like(tall)
    return lambda: torch.matmul(torch.matmul(act, tall.T, out=u).T, act, out=out)


SUITE = suites.Suite(
    "ggn_product",
    make,
    lambda *operands: ggn_product(*operands[:-1]),
    reference_product,
    formula,
    naive,
    bare,
    roofline.ggn_product,
    small={"N": 19, "C": 7, "d": 13},
)


@suites.problems(
    cpu=[{"N": 2_000, "C": 100, "d": 512}, {"N": 500, "C": 100, "d": 512, "m": 8}],
    cuda=[
        ("tf32", roofline.IMAGES),
        ("fp32", roofline.IMAGES),
        ("tf32", {**roofline.IMAGES, "m": 8}),
    ],
)
def test_ggn_product(benchmark, problem, role):
    suites.measure(benchmark, SUITE, problem, role)
