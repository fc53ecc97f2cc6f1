"""When a run is measured: where somebody asked for it, and at its two ends."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import imu_fast as imu
from imu_fast.errors import InputError
from imu_fast.unlearning.subject import HeadSubject, NetworkSubject

EPOCHS, BATCH, N = 3, 8, 20
BATCHES = 3  # an epoch's


@pytest.fixture
def job():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    return model, (torch.randn(N, 6).double(), torch.randint(4, (N,)))


def run(job, **options):
    model, data = job
    common = {"epochs": EPOCHS, "batch_size": BATCH, "lr": 0.01}
    return imu.unlearn(copy.deepcopy(model), data, "uniform", **common | options)


@pytest.mark.parametrize("scope", ["head", "layers", "all"])
def test_measurements_are_those_that_somebody_asked_for(job, scope, monkeypatch):
    passes = []
    for subject in (HeadSubject, NetworkSubject):
        measure = subject.measure

        def counted(self, name, measure=measure):
            passes.append(name)
            return measure(self, name)

        monkeypatch.setattr(subject, "measure", counted)

    def steps(**options):
        passes.clear()
        return [record["step"] for record in run(job, scope=scope, **options).trajectory]

    last = EPOCHS * BATCHES
    assert steps() == [0, last]
    assert len(passes) <= 3, "before, after, and the model's own"
    each = list(range(0, last + 1, BATCHES))
    assert steps(callback=lambda record: None) == each
    assert steps(watch={"other": job[1]}) == each
    assert steps(record="epoch") == each
    assert steps(record="step") == list(range(last + 1))
    assert steps(record="ends", callback=lambda record: None) == [0, last]
    assert steps(max_steps=4) == [0, 4]
    assert steps(max_steps=4, record="epoch") == [0, 3, 4]


@pytest.mark.parametrize("scope", ["head", "all"])
def test_the_ends_are_those_of_a_run_that_is_measured_on_the_way(job, scope, tmp_path):
    often, ends = run(job, scope=scope, record="epoch"), run(job, scope=scope)
    assert ends.trajectory == [often.trajectory[0], often.trajectory[-1]]
    assert ends.batch_losses == often.batch_losses
    kept = tmp_path / "run.safetensors"
    first = run(job, scope=scope, checkpoint=kept)
    again = run(job, scope=scope, checkpoint=kept)  # nothing is left to do
    assert again.trajectory == first.trajectory == ends.trajectory


def test_other_times_are_refused(job):
    with pytest.raises(
        InputError, match="record='batch' is unknown; choose one of epoch, step, ends"
    ):
        run(job, record="batch")
