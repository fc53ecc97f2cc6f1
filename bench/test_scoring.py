"""Throughput of scoring, and of a whole head-scope run, on a ResNet-18 (224x224, 1000 classes).

FLOPs of scoring with n samples, C classes, D features: logits, Fisher diagonal, mean gradient and
bilinear scores are one [n,C,D] product each: 8 n C D. Bytes that must move: features, weight once,
delta twice. The floor reported is the time of a bare torch.matmul with the same FLOPs in this run.
"""

from __future__ import annotations

import baselines
import pytest
import torch

import imu_fast as imu

SAMPLES, CLASSES, LAM = 256, 1000, 1e-2
FEW = 8  # samples for the baseline that goes one at a time


@pytest.fixture(scope="module")
def problem():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=CLASSES).eval()
    x, y = torch.randn(SAMPLES, 3, 224, 224), torch.randint(CLASSES, (SAMPLES,))
    captured = imu.capture_features(model, (x, y))
    return model, x, y, captured.features


def run(benchmark, role, samples, function, rounds=5, warmup=1, **extra):
    benchmark.group = "ResNet-18, one thread"
    benchmark.extra_info.update(role=role, samples=samples, dtype="float32", **extra)
    return benchmark.pedantic(function, rounds=rounds, iterations=1, warmup_rounds=warmup)


def score(model, features, labels):
    factors = imu.GradientFactors.from_head(features, model.fc.weight, model.fc.bias, labels)
    return imu.influence_scores(factors, damping=LAM)


def test_scores_agree(problem):
    """No timing on a red gate: all three procedures give the same scores."""
    model, x, y, features = problem
    ours = score(model, features[:FEW], y[:FEW])
    torch.testing.assert_close(
        ours, baselines.vmap_grad(model.fc, features[:FEW], y[:FEW], LAM), rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(
        ours,
        baselines.per_sample_twice(model, model.fc, x[:FEW], y[:FEW], LAM).detach(),
        rtol=1e-3,
        atol=1e-6,
    )


def test_scoring_imu_fast(benchmark, problem):
    model, _, y, features = problem
    flops = 8 * SAMPLES * CLASSES * (features.shape[1] + 1)
    moved = features.nbytes + model.fc.weight.nbytes + 2 * 4 * SAMPLES * CLASSES
    run(
        benchmark,
        "imu_fast",
        SAMPLES,
        lambda: score(model, features, y),
        rounds=30,
        flops=flops,
        bytes=moved,
        floor_s=baselines.matmul_seconds(flops),
    )


def test_scoring_vmap_grad(benchmark, problem):
    model, _, y, features = problem
    run(
        benchmark,
        "vmap(grad)",
        SAMPLES,
        lambda: baselines.vmap_grad(model.fc, features, y, LAM),
    )


def test_scoring_authors_procedure(benchmark, problem):
    model, x, y, _ = problem
    run(
        benchmark,
        "authors",
        FEW,
        lambda: baselines.per_sample_twice(model, model.fc, x[:FEW], y[:FEW], LAM),
        rounds=3,
    )


def forward(model, x):
    with torch.no_grad():
        return [model(batch) for batch in x.split(64)]


def test_one_forward_pass(benchmark, problem):
    model, x, _, _ = problem
    run(benchmark, "forward", SAMPLES, lambda: forward(model, x), rounds=2, warmup=0)


def test_head_run_10_epochs(benchmark, problem):
    """Score, reweight and ten epochs of ascent on features already captured: a run's own cost."""
    model, _, y, features = problem
    head = torch.nn.Sequential(torch.nn.Linear(features.shape[1], CLASSES))
    head[0].load_state_dict(model.fc.state_dict())
    run(
        benchmark,
        "imu_fast",
        SAMPLES,
        lambda: imu.unlearn(head, (features, y), epochs=10, lr=1e-3, batch_size=32, inplace=False),
        against=["forward"],
    )
