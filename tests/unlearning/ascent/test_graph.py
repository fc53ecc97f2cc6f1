"""Steps in sequence: the plain loop, and the bookkeeping of a graph with the loop in its place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import imu_fast as imu
from imu_fast.unlearning.ascent import graph as head_run
from imu_fast.unlearning.ascent import head as ascent
from imu_fast.unlearning.ascent.graph import StepSequence

OWN = ascent.HeadSteps.sequence.func


class Walk:
    """A step with state: ``x += sum rows * weights``; the loss is x before it."""

    def __init__(self):
        self.x = torch.zeros(())

    def step(self, rows, weights):
        before = self.x.clone()
        self.x += (rows * weights).sum()
        return before


def batches(k, size=3):
    return torch.arange(k * size).view(k, size), torch.rand(k, size)


def test_a_graph_is_captured_once_per_shape_and_sees_each_calls_operands(monkeypatch):
    captured, replayed = [], []

    def capture(run):
        captured.append(run)
        return lambda: (replayed.append(run), run())[1]

    monkeypatch.setattr(head_run, "capture", capture)
    plain, graphed = Walk(), Walk()
    loop, sequence = StepSequence(plain.step, False), StepSequence(graphed.step, True)
    for k in (2, 2, 2, 2, 4, 4, 2):
        operands = batches(k)
        assert torch.equal(sequence(*operands), loop(*operands))
        assert torch.equal(graphed.x, plain.x)
    # The first of each run of one shape is the loop, the second captures, the rest replay.
    assert (len(captured), len(replayed)) == (2, 4)


def test_what_cannot_be_captured_runs_one_by_one(monkeypatch, caplog):
    def capture(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(head_run, "capture", capture)
    plain, graphed = Walk(), Walk()
    loop, sequence = StepSequence(plain.step, False), StepSequence(graphed.step, True)
    for _ in range(4):
        operands = batches(2)
        assert torch.equal(sequence(*operands), loop(*operands))
    assert caplog.text.count("not permitted") == 1


@pytest.fixture
def head():
    x, y = torch.randn(50, 6), torch.arange(50) % 4
    return nn.Linear(6, 4), x, y


def run(head, monkeypatch, graph, **options):
    """unlearn, its sequences counted; how many steps they made, and the trained head.

    ``graph``: None for the steps' own sequence, which on a CPU is one call of a compiled loop;
    else a StepSequence, with a graph or without.
    """
    model, x, y = head
    model, made = copy.deepcopy(model), []

    def sequence(steps):
        inner = OWN(steps) if graph is None else StepSequence(steps.step, graph)

        def counted(rows, weights):
            made.append(len(rows))
            return inner(rows, weights)

        return counted

    monkeypatch.setattr(ascent.HeadSteps, "sequence", property(sequence))
    monkeypatch.setattr(head_run, "capture", lambda run: run)
    rate = {} if options.get("optimizer") else dict(lr=0.05)
    options = dict(epochs=4, batch_size=16, method="uniform") | rate | options
    return imu.unlearn(model, (x, y), **options), sum(made)


@pytest.mark.parametrize("optimizer", [None, lambda p: torch.optim.Adam(p, lr=1e-2)])
def test_a_run_in_sequences_is_the_run_step_by_step(head, monkeypatch, optimizer):
    alone, none = run(head, monkeypatch, False, record="step", optimizer=optimizer)
    assert none == 0
    for graph in (None, False, True):
        result, made = run(head, monkeypatch, graph, optimizer=optimizer)
        assert made == 4 * 3 and result.steps == 4 * 4  # the last batch of 2 goes alone
        assert result.batch_losses == alone.batch_losses
        assert torch.equal(result.model.weight, alone.model.weight)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(stop=imu.StopRule(forget_accuracy=0.0)), 0),
        (dict(max_steps=10), 2 * 3),  # the third epoch would reach the limit within
        (dict(reweight="batch", method="imu"), 0),
        (dict(scope="all"), 0),
        (dict(batch_size=64), 0),
    ],
)
def test_where_the_host_has_work_between_steps_they_go_one_by_one(
    head, monkeypatch, options, expected
):
    result, made = run(head, monkeypatch, False, **options)
    assert made == expected
    assert result.steps == len(result.batch_losses)
