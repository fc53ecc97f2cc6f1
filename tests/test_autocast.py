"""Autocast, inference mode and no_grad around a call change no result: products keep dtypes."""

import pytest
import torch

import imu_fast as imu

AROUND = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
}
CURVATURES = imu.curvatures()


def factors(implicit, rows=40, classes=7):
    generator = torch.Generator().manual_seed(0)
    act, weight, bias = (
        torch.randn(*shape, generator=generator)
        for shape in ((rows, 16), (classes, 16), (classes,))
    )
    labels = torch.arange(rows) % classes
    return imu.GradientFactors.from_head(act, weight, bias, labels, implicit=implicit)


def of_factors(implicit):
    source = factors(implicit)
    queries = factors(False, rows=5)
    return {
        "mean": source.mean_gradient(),
        "diagonal": source.fisher_diagonal(),
        "pairs": imu.pairwise_influence(queries, source, curvature="fisher_diag"),
        "top": imu.top_influences(queries, source, 3)[0],
    }


def of_curvature(name):
    source, queries = factors(False), factors(False, rows=5)
    options = {} if name == "identity" else {"damping": 1e-2}
    fitted = imu.fit(name, source, **options)
    v = torch.randn(7, 17, generator=torch.Generator().manual_seed(1))
    return {
        "product": fitted @ v,
        "solve": fitted.solve(v),
        "diagonal": fitted.diagonal(),
        "self": fitted.self_influence(queries),
        "pairs": fitted.pairwise(queries, source),
        "scores": imu.influence_scores(source, curvature=name, **options),
    }


def of_solve(_):
    root = torch.randn(3, 9, 9, generator=torch.Generator().manual_seed(2))
    a = (root[..., :, None, :] * root[..., None, :, :]).sum(-1)  # no product that autocast rounds
    return {"x": imu.damped_cholesky_solve(a, torch.ones(3, 9, 2), 0.1)}


JOBS = [
    *((of_factors, implicit) for implicit in (False, True)),
    *((of_curvature, name) for name in CURVATURES),
    (of_solve, None),
]


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("job, of", JOBS, ids=[f"{job.__name__} {of}" for job, of in JOBS])
def test_what_surrounds_a_call_changes_nothing(job, of, around):
    expected = job(of)
    with AROUND[around]():
        found = job(of)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)
