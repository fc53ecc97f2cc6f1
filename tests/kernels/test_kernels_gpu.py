"""Every kernel on a GPU: the cases that CI interprets, larger ones, same bits, and CUDA graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import factors_of
from kernels_interpreted import *  # noqa: F403  every test and fixture of that file
from kernels_interpreted import (
    LARGER,
    LARGER_RAGGED,
    _triton,  # noqa: F401  automatic
    ascent_arguments,
    check_head_ascent,
    ggn_arguments,
    gram_arguments,
    linear_softmax_case,
    scores_arguments,
)
from torch import nn

import imu_fast as imu
from imu_fast.backend import interpreted, record_backends
from imu_fast.ops.bilinear_scores import bilinear_scores
from imu_fast.ops.conjugate_gradient import iterate, start
from imu_fast.ops.fisher_diagonal import fisher_diagonal
from imu_fast.ops.ggn_product import ggn_product
from imu_fast.ops.gram import gram
from imu_fast.ops.head_ascent import head_ascent
from imu_fast.ops.softmax_residual import softmax_residual
from imu_fast.solvers.cholesky.cholesky import damped_cholesky
from imu_fast.solvers.cholesky.low_precision import BLOCK, rounding_bound
from imu_fast.unlearning.ascent import head as ascent
from imu_fast.unlearning.ascent.graph import StepSequence

if not torch.cuda.is_available() or interpreted():
    pytest.skip("kernels are compiled for a CUDA device; none here", allow_module_level=True)

RATES = dict(lr=0.1, momentum=0.9, weight_decay=0.01, alpha=0.05)


@pytest.mark.parametrize("name", ["ce", "margin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_ascent_of_several_tiles(dtype, name, precision):
    check_head_ascent(LARGER, dtype, name)


def fisher_of(case, dtype):
    return fisher_diagonal(*factors_of(case, dtype))


def softmax_of(case, dtype):
    p = case.make(torch.float64)
    return softmax_residual(p.logits.to(dtype), p.labels, p.scale.float())


def ascent_of(case, dtype):
    (features, labels, weights, theta, buffer, *options), *_ = ascent_arguments(case, dtype, "ce")
    loss = head_ascent(features, labels, weights, theta, buffer, *options, **RATES)
    return loss, theta, buffer


def iterations_of(case, dtype):
    v = torch.randn(3, case.classes, case.features)
    diagonal, state = 1 + torch.rand(case.classes, case.features), start(v, v, tolerance=0.0)
    for _ in range(3):
        state = iterate(state, diagonal * state.p)
    return state[:3]


def vocabulary_of(case, dtype):
    head, offsets, *_ = linear_softmax_case(case, dtype)
    factors = imu.GradientFactors.from_head(*head[:4], offsets, implicit=True)
    return imu.influence_scores(factors, damping=0.1), factors.losses


OPERATIONS = {
    "softmax_residual": softmax_of,
    "fisher_diagonal": fisher_of,
    "bilinear_scores": lambda *case: bilinear_scores(*scores_arguments(*case, 3)[0]),
    "gram": lambda *case: gram(*gram_arguments(*case)[0]),
    "ggn_product": lambda *case: ggn_product(*ggn_arguments(*case, 2)[0]),
    "head_ascent": ascent_of,
    "conjugate_gradient": iterations_of,
    "linear_softmax": vocabulary_of,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [LARGER, LARGER_RAGGED], ids=lambda case: case.why)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_same_bits_run_to_run(operation, case, dtype):
    """From the same numbers in other memory, with the device busy or not."""
    runs = []
    for _ in range(4):
        torch.manual_seed(0)
        found = OPERATIONS[operation](case, dtype)
        runs.append([found] if isinstance(found, torch.Tensor) else list(found))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_a_captured_sequence_is_the_loop():
    """A step of our kernel, its loss and state, over calls that warm up, capture and replay."""
    (features, labels, _, theta, buffer, *options), *_ = ascent_arguments(
        LARGER, torch.float32, "ce"
    )

    def walk(graph):
        state = theta.clone(), buffer.clone()

        def step(rows, weights):
            return head_ascent(features[rows], labels[rows], weights, *state, *options, **RATES)

        return StepSequence(step, graph), state

    (loop, plain), (sequence, graphed) = walk(False), walk(True)
    for _ in range(4):
        rows, weights = torch.randint(len(labels), (5, 64)), torch.rand(5, 64) + 0.1
        torch.testing.assert_close(sequence(rows, weights), loop(rows, weights))
        for a, b in zip(graphed, plain, strict=True):
            torch.testing.assert_close(a, b)
    assert sequence._replay is not None, "nothing was captured"


@pytest.mark.parametrize("optimizer", [None, lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)])
def test_a_run_in_cuda_graphs_is_the_run_step_by_step(monkeypatch, caplog, optimizer):
    model, x, y = nn.Linear(65, 10), torch.randn(200, 65), torch.arange(200) % 10
    made = []

    class Kept(StepSequence):
        def __init__(self, step, graph):
            super().__init__(step, graph)
            made.append(self)

    def run(**options):
        with imu.use_backend("auto"):
            options = dict(epochs=6, batch_size=32, lr=0.05, optimizer=optimizer) | options
            return imu.unlearn(copy.deepcopy(model), (x, y), **options)

    alone = run(record="step")
    monkeypatch.setattr(ascent, "StepSequence", Kept)
    result = run()
    assert "no CUDA graph" not in caplog.text
    assert made and all(sequence._replay is not None for sequence in made)
    assert result.steps == alone.steps
    torch.testing.assert_close(result.model.weight, alone.model.weight)


@pytest.mark.parametrize("order", [BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 77])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_cholesky_in_matrix_units_is_its_emulation_within_the_bound(order, precision):
    """And waits for nothing, whatever torch's own setting, which stays."""
    x = torch.randn(order, 2 * order)
    a, damping = x @ x.mT / order, 0.1
    before = torch.get_float32_matmul_precision()
    options = dict(precision=precision, check=False)
    factor = damped_cholesky(a, damping, **options)  # handles and memory, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    torch.set_float32_matmul_precision("high")
    try:
        again = damped_cholesky(a, damping, **options)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again.factor.triu(), factor.factor.triu())

    eye = torch.eye(order, dtype=torch.float64)
    trace = float(a.double().trace()) + order * damping
    float32 = (order + 8) * torch.finfo(torch.float32).eps * trace
    bound = float(rounding_bound(a, damping, precision)) + float32
    emulated = damped_cholesky(a.cpu(), damping, **options).factor.to(a.device)
    found, expected = (u.double().triu() for u in (factor.factor, emulated))
    found, expected = found.mT @ found, expected.mT @ expected
    assert float((found - (a.double() + damping * eye)).norm()) <= bound
    assert float((found - expected).norm()) <= 2 * bound

    with record_backends():  # none of them a kernel's
        b = torch.randn(order, 3, dtype=torch.float64)
        solution = factor.solve_refined(b)
    residual = (a.double() @ solution.x + damping * solution.x - b).norm() / b.norm()
    assert solution.residual <= 1e-12 and float(residual) <= 1e-12
