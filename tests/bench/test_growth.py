"""The model of growth: its arithmetic, beside what the operations do at one small size."""

from __future__ import annotations

import json
from dataclasses import replace

import growth
import pytest
import torch
from growth_checks import data, spec
from growth_model import IMPLICIT_BYTES, MAX_MEMORY, METHODS, Job, estimate
from memory import peak
from torch.utils.flop_counter import FlopCounterMode

import imu_fast as imu

SMALL = {"n": 3_000, "classes": 40, "d": 64}
RESULTS = growth.RESULTS / "growth.json"


def scored(method: str):
    """A call that scores, of inputs that are there before."""
    x, weight, bias, y = data(SMALL["n"], SMALL["classes"], SMALL["d"])

    def work() -> None:
        factors = imu.GradientFactors.from_head(x, weight, bias, y)
        imu.influence_scores(factors, curvature=spec(method))

    return work


@pytest.mark.parametrize("method", ["fisher_diag", "kfac", "ggn"])
def test_memory_is_what_the_operations_allocate(method):
    job = Job(method, **SMALL)
    inputs = job.features + 4 * job.classes * job.width + 8 * job.n
    work = scored(method)
    work()
    assert peak(work) == pytest.approx(estimate(job).memory - inputs, rel=0.3)


def test_flops_of_scoring_are_those_that_torch_counts():
    def product(out, left, right, **_):
        return 2 * left[0] * left[1] * right[1]

    in_place, work = {torch.ops.aten.addmm_: product}, scored("fisher_diag")
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        work()
    found = sum(phase.work.get("fp32", 0) for phase in estimate(Job("fisher_diag", **SMALL)).phases)
    assert counter.get_total_flops() == pytest.approx(found, rel=0.05)  # of a bias column, say


def flops(job: Job) -> float:
    return sum(phase.flops for phase in estimate(job).phases)


@pytest.mark.parametrize("method", METHODS)
def test_more_is_never_less(method):
    for classes, d in growth.HEADS[:4]:
        for n in growth.SAMPLES:
            job = Job(method, n, classes, d)
            if estimate(job).refused:
                continue
            assert flops(replace(job, n=10 * n)) > flops(job)
            assert flops(replace(job, classes=classes - 1)) < flops(job)
            eight = replace(job, devices=8)
            assert flops(eight) <= flops(job)
            # But for what is kept in memory, or dealt with whole, once it is small enough.
            spared = IMPLICIT_BYTES + MAX_MEMORY / 4 + 3 * job.head
            assert estimate(eight).memory <= estimate(job).memory + spared


def test_what_is_exchanged_does_not_grow_with_samples_but_of_ascent():
    for method in METHODS:
        few, many = (estimate(Job(method, n, 10, 512, 8)).exchanged for n in (1_000, 10_000))
        assert (few < many) == (method == "ascent")


def test_the_page_is_of_the_results_and_these_of_the_model():
    results = json.loads(RESULTS.read_text())
    assert results["predictions"] == growth.predicted(results)
    assert growth.PAGE.read_text() == growth.render(results)
    compared = [growth.compared(one, results)["ratio"] for one in results["checks"]]
    assert {ratio["exchanged"] for ratio in compared if "exchanged" in ratio} == {1.0}  # it says
