"""Which implementation each public call reaches, under every backend: by what it records."""

from __future__ import annotations

import copy
import inspect
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import imu_fast as imu
from imu_fast.backend import interpreted
from imu_fast.ops.named import operations

# What an operation is expected to take under "triton".
KERNEL, NONE, WIDE, BOTH, LIBRARY = (
    "its kernel",
    "has none",
    "float64",
    "some in float64",
    "library",
)
TOKENS = "the square of a sum over tokens"
UNDER_TRITON = {KERNEL: "triton", NONE: "torch", WIDE: "torch", TOKENS: "torch"}
UNDER_TRITON |= {BOTH: "torch, triton"}
LIBRARIES = ("extension", "cuda", "torch")
OPERATIONS = operations()

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
X, Y = torch.randn(10, 6), torch.arange(10) % 3
DATA = (X, Y)


def factors(**options):
    head = MODEL[2]
    features = MODEL[:2](X).detach()
    return imu.GradientFactors.from_head(features, head.weight, head.bias, Y, **options)


def tokens():
    return factors(offsets=torch.tensor([0, 3, 4, 8, 10]))


HALF = copy.deepcopy(MODEL).bfloat16()
HALF_DATA = (X.bfloat16(), Y)


def half(call, **options):
    return lambda: getattr(imu, call)(HALF, HALF_DATA, **options)


def of_layers():
    return imu.capture(MODEL, DATA, layers=[MODEL[0], MODEL[2]])


def refitted():
    """Of a head at the optimum of its objective."""
    return imu.leave_one_out(MODEL, DATA, weight_decay=0.1, refit=True)


def indexed():
    with tempfile.TemporaryDirectory() as folder:
        imu.build_index(MODEL, DATA, f"{folder}/index")
        index = imu.load_index(f"{folder}/index")
        return index.scores(index.capture(MODEL, DATA), curvature="identity")


def unlearn(method, **options):
    return lambda: imu.unlearn(copy.deepcopy(MODEL), DATA, method, **options)


def solved(curvature, f):
    f = f()
    return imu.fit(curvature, f).solve(f.mean_gradient())


SIGNAL = {"softmax_residual": KERNEL}
MEAN, CHOLESKY = {"mean_gradient": NONE}, {"damped_cholesky_solve": LIBRARY}
DIAGONAL = {**SIGNAL, **MEAN, "fisher_diagonal": KERNEL, "bilinear_scores": KERNEL}
CHECKPOINTS = dict(checkpoints=[MODEL.state_dict()], learning_rates=[0.1])
CALLS = {
    "capture": (lambda: imu.capture(MODEL, DATA), SIGNAL),
    "from_head": (factors, SIGNAL),
    "mean_gradient": (lambda: factors().mean_gradient(), SIGNAL | MEAN),
    "fisher_diagonal": (
        lambda: factors().fisher_diagonal(),
        {**SIGNAL, "fisher_diagonal": KERNEL},
    ),
    "influence_scores of a head that is not stored": (
        lambda: imu.influence_scores(factors(implicit=True)),
        {
            "linear_softmax_normaliser": KERNEL,
            "linear_softmax_residual": KERNEL,
            **{name: how for name, how in DIAGONAL.items() if name != "softmax_residual"},
        },
    ),
    "influence_scores of layers": (
        lambda: imu.influence_scores(MODEL, DATA, layers=[MODEL[0], MODEL[2]]),
        DIAGONAL,
    ),
    "self_influence of tokens": (
        lambda: imu.self_influence(tokens()),
        {**SIGNAL, "fisher_diagonal": KERNEL, "quadratic_scores": TOKENS},
    ),
    "influence_scores, ggn by conjugate gradient": (
        lambda: imu.influence_scores(factors(), curvature=imu.GGN(solver="cg")),
        {
            **SIGNAL,
            **MEAN,
            "ggn_product": BOTH,
            "conjugate_gradient_iteration": KERNEL,
            "bilinear_scores": KERNEL,
        },
    ),
    "top_influences": (
        lambda: imu.top_influences(factors(), factors(), k=2, curvature="fisher_diag"),
        {**SIGNAL, "fisher_diagonal": KERNEL, "bilinear_scores": KERNEL},
    ),
    "tracin": (
        lambda: imu.tracin(MODEL, DATA, DATA, **CHECKPOINTS),
        {**SIGNAL, "cross_gram": NONE},
    ),
    "tracin_self_influence": (
        lambda: imu.tracin_self_influence(MODEL, DATA, **CHECKPOINTS),
        {**SIGNAL, "gradient_norms": NONE},
    ),
    "pairwise_similarity": (
        lambda: imu.pairwise_similarity(factors(), factors()),
        {**SIGNAL, "gradient_norms": NONE, "cross_gram": NONE},
    ),
    "pairwise_similarity, product": (
        lambda: imu.pairwise_similarity(factors(), factors(), metric="product"),
        {**SIGNAL, "cross_gram": NONE},
    ),
    "similarity_scores": (
        lambda: imu.similarity_scores(of_layers()),
        {**SIGNAL, **MEAN, "gradient_norms": NONE, "bilinear_scores": KERNEL},
    ),
    "build_index, load_index": (indexed, {**SIGNAL, "cross_gram": NONE}),
    "leave_one_out": (refitted, {"softmax_residual": WIDE}),
    "unlearn_in_turn": (
        lambda: imu.unlearn_in_turn(copy.deepcopy(MODEL), [DATA], "imu", epochs=1),
        {**DIAGONAL, "head_ascent": KERNEL},
    ),
    "influence_scores of a bfloat16 model": (half("influence_scores"), DIAGONAL),
    "influence_scores of its layers": (
        half("influence_scores", layers=[HALF[0], HALF[2]]),
        DIAGONAL,
    ),
    "self_influence of a bfloat16 model": (
        half("self_influence"),
        {**SIGNAL, "fisher_diagonal": KERNEL, "quadratic_scores": KERNEL},
    ),
    "self_influence of a bfloat16 model, identity": (
        half("self_influence", curvature="identity"),
        {**SIGNAL, "gradient_norms": NONE},
    ),
    "influence_scores of a bfloat16 model, kfac": (
        half("influence_scores", curvature="kfac"),
        {**SIGNAL, **MEAN, "bilinear_scores": KERNEL},
    ),
    "influence_scores of a bfloat16 model, ggn by conjugate gradient": (
        half("influence_scores", curvature=imu.GGN(solver="cg")),
        {
            **SIGNAL,
            **MEAN,
            "ggn_product": BOTH,
            "conjugate_gradient_iteration": KERNEL,
            "bilinear_scores": KERNEL,
        },
    ),
    "batch_weights": (lambda: imu.batch_weights(factors()), DIAGONAL),
    "parameter_importance": (
        lambda: imu.parameter_importance(MODEL, DATA),
        {**SIGNAL, "fisher_diagonal": KERNEL},
    ),
    "damped_cholesky_solve": (
        lambda: imu.damped_cholesky_solve(torch.eye(2), torch.ones(2), 1.0),
        CHOLESKY,
    ),
    "unlearn, margin_edit": (unlearn("margin_edit"), CHOLESKY),
    "unlearn, uniform": (unlearn("uniform", epochs=1), {"head_ascent": KERNEL}),
    "unlearn, npo": (
        unlearn("npo", epochs=1),
        {
            **SIGNAL,
            "head_ascent_gradient": NONE,
            "objective": NONE,
            "objective_residual": NONE,
        },
    ),
    "unlearn, all layers": (
        unlearn("imu", scope="all", epochs=1),
        {**DIAGONAL, "objective": NONE},
    ),
}

# Curvature -> what scores, self-influence, pairs and a solve take of it beside the signal.
_SCORED = {**MEAN, "bilinear_scores": KERNEL}
_FISHER = {"gram": WIDE, **CHOLESKY}
_GGN = {**CHOLESKY, "ggn_product": WIDE}
_SQUARES = {"quadratic_scores": WIDE}
OF_CURVATURE = {
    "identity": (_SCORED, {"gradient_norms": NONE}, {"cross_gram": NONE}, MEAN),
    "fisher_diag": (
        DIAGONAL,
        {"fisher_diagonal": KERNEL, "quadratic_scores": KERNEL},
        {"fisher_diagonal": KERNEL, "bilinear_scores": KERNEL},
        {"fisher_diagonal": KERNEL, **MEAN},
    ),
    "fisher": (
        {**MEAN, **_FISHER, "bilinear_scores": BOTH},
        {**_FISHER, "bilinear_scores": WIDE},
        {**_FISHER, "bilinear_scores": BOTH},
        {**MEAN, **_FISHER, "bilinear_scores": WIDE},
    ),
    "ggn": (
        {**_SCORED, **_GGN},
        CHOLESKY,
        {**_GGN, "bilinear_scores": KERNEL},
        {**MEAN, **_GGN},
    ),
    "ggn_block": (
        {**_SCORED, **CHOLESKY},
        CHOLESKY,
        {**CHOLESKY, "bilinear_scores": KERNEL},
        {**MEAN, **CHOLESKY},
    ),
    "kfac": (_SCORED, _SQUARES, {"bilinear_scores": KERNEL}, MEAN),
    "ekfac": (_SCORED, _SQUARES, {"bilinear_scores": KERNEL}, MEAN),
}
for _name, _expected in OF_CURVATURE.items():
    _calls = (
        lambda c=_name: imu.influence_scores(factors(), curvature=c),
        lambda c=_name: imu.self_influence(factors(), curvature=c),
        lambda c=_name: imu.pairwise_influence(factors(), factors(), curvature=c),
        lambda c=_name: solved(c, factors),
    )
    _kinds = ("influence_scores", "self_influence", "pairwise_influence", "fit and solve")
    for _kind, _call, _takes in zip(_kinds, _calls, _expected, strict=True):
        CALLS[f"{_kind}, {_name}"] = (_call, SIGNAL | _takes)
    _step = {**SIGNAL, **_expected[0], "head_ascent": KERNEL}
    if _name in ("fisher", "fisher_diag", "ggn"):
        CALLS[f"unlearn, imu by {_name}"] = (unlearn("imu", curvature=_name, epochs=1), _step)

every_call = pytest.mark.parametrize("name", CALLS)


# Public functions that reach no operation, or do through one that is above.
NO_OPERATION = {
    "backends": "says what there is",
    "capture_features": "the model's own pass",
    "curvatures": "names",
    "evaluate": "the model's own pass",
    "find_head": "the model's own pass",
    "fit": "OF_CURVATURE",
    "influence_weights": "of scores",
    "linear_layers_matching": "names",
    "live_weights": "batch_weights, of a training step",
    "load_index": "build_index, load_index",
    "load_operator": "fit and solve",
    "load_summary": "a file",
    "load_text": "a file",
    "matrix_to_vector": "a view",
    "methods": "names",
    "record_backends": "says what ran",
    "save_summary": "sums in float64",
    "split": "data in two",
    "use_backend": "a choice",
    "use_precision": "a choice",
    "validate": "retrains",
    "vector_to_matrix": "a view",
}


def test_every_public_function_is_here_or_reaches_no_operation():
    functions = {
        name for name in imu.__all__ if inspect.isfunction(inspect.unwrap(getattr(imu, name)))
    }
    walked = {name for name in functions for call in CALLS if name in call}
    assert functions == walked | set(NO_OPERATION), functions ^ (walked | set(NO_OPERATION))


def test_every_curvature_and_kernel_is_reached():
    assert set(OF_CURVATURE) == set(imu.curvatures())
    reached = {
        name for _, takes in CALLS.values() for name, how in takes.items() if how in (KERNEL, BOTH)
    }
    kernels = {name for name, operation in OPERATIONS.items() if operation.kernel is not None}
    assert kernels - reached == {"gram"}, "which fisher alone calls, in float64"


@every_call
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_backend_by_name_runs_everything(name, backend):
    call, takes = CALLS[name]
    with imu.use_backend(backend), imu.record_backends() as ran:
        call()
    assert ran.reasons == {}, "nobody asked for a kernel"
    for operation, chosen in ran.items():
        assert chosen in (LIBRARIES if operation in CHOLESKY else (backend,)), operation
    # The definition of one operation calls no other, as a body may.
    assert set(ran) <= {*OPERATIONS, *CHOLESKY} and set(ran) & set(takes)


@pytest.mark.skipif(not interpreted(), reason="test_kernels_are_reached runs it interpreted")
@every_call
def test_under_triton(name):
    """And in what it multiplies: as it was asked to in kernels, more exactly on the CPU."""
    call, takes = CALLS[name]
    with imu.use_backend("triton"), imu.use_precision("tf32x3"), imu.record_backends() as ran:
        call()
    multiply = {o for o in ran if o in OPERATIONS and OPERATIONS[o].products}
    in_what = {"triton": "tf32x3", "torch": "ieee", "torch, triton": "ieee, tf32x3"}
    assert ran.precisions == {operation: in_what[ran[operation]] for operation in multiply}
    assert ran.pop("damped_cholesky_solve", None) in (
        LIBRARIES if CHOLESKY.keys() & takes else [None]
    )
    takes = {operation: how for operation, how in takes.items() if how != LIBRARY}
    assert ran == {operation: UNDER_TRITON[how] for operation, how in takes.items()}
    said = {WIDE: "torch.float64 is not among", BOTH: "torch.float64 is not among", TOKENS: TOKENS}
    assert set(ran.reasons) == {o for o, how in takes.items() if how in said}
    for operation, reason in ran.reasons.items():
        assert reason.startswith(said[takes[operation]])


def test_kernels_are_reached():
    """test_under_triton, in a process whose kernels are interpreted."""
    pytest.importorskip("triton", minversion="3.6")
    path = f"{Path(__file__)}::test_under_triton"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert f"{len(CALLS)} passed" in done.stdout
