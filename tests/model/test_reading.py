"""How a model is read is said alike at every door that takes a model, and nowhere in vain."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import imu_fast as imu
from imu_fast.errors import InputError
from imu_fast.evaluation.shallowness import relearning_steps
from imu_fast.model.outputs import outputs_of

CLASSES = 4


class TwoTasks(nn.Module):
    """Two heads whose outputs fit the labels alike."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 9)
        self.ours, self.other = nn.Linear(9, CLASSES), nn.Linear(9, CLASSES)

    def forward(self, x):
        h = self.body(x).relu()
        return {"other": self.other(h), "ours": self.ours(h)}


class OneTask(nn.Module):
    def __init__(self, model: TwoTasks) -> None:
        super().__init__()
        self.body, self.ours = copy.deepcopy(model.body), copy.deepcopy(model.ours)

    def forward(self, x):
        return self.ours(self.body(x).relu())


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = TwoTasks()
    return model, OneTask(model), torch.randn(20, 6), torch.randint(CLASSES, (20,))


def _unlearned(**options):
    def run(model, data, **reading):
        return imu.unlearn(
            model, data, watch={"again": data}, inplace=False, epochs=3, **options, **reading
        ).trajectory[-1]

    return run


DOORS = {
    "capture": lambda *a, **k: imu.capture(*a, **k).delta,
    "capture layers": lambda *a, **k: imu.capture(*a, layers="body", **k).delta,
    "capture_features": lambda *a, **k: imu.capture_features(*a, **k).features,
    "influence_scores": imu.influence_scores,
    "self_influence": imu.self_influence,
    "similarity_scores": imu.similarity_scores,
    "tracin": lambda m, data, **k: imu.tracin(
        m, data, data, checkpoints=[m.state_dict()], learning_rates=0.1, **k
    ),
    "tracin_self_influence": lambda m, data, **k: imu.tracin_self_influence(
        m, data, checkpoints=[m.state_dict()], learning_rates=0.1, **k
    ),
    "leave_one_out": lambda *a, **k: (
        imu.leave_one_out(*a, weight_decay=0.1, refit=True, **k).logits
    ),
    "outputs_of": lambda *a, **k: outputs_of(*a, **k).logits,
    "evaluate": lambda *a, **k: imu.evaluate(*a, **k)["loss"],
    "relearning_steps": lambda *a, **k: relearning_steps(*a, target=1.0, lr=0.3, **k),
    "relearning_steps all": lambda *a, **k: relearning_steps(
        *a, target=1.0, lr=0.3, scope="all", **k
    ),
    "unlearn head": _unlearned(method="imu"),
    "unlearn all": _unlearned(method="imu", scope="all"),
    "unlearn layers": _unlearned(method="npo", scope="layers"),
    "unlearn boundary": _unlearned(method="boundary_shrink", scope="all"),
    "unlearn relabel": _unlearned(method="random_label"),
    "unlearn auto": lambda *a, **k: imu.unlearn(
        *a, method="auto", stop=imu.StopRule(unseen_accuracy=a[1]), inplace=False, **k
    ).trajectory[-1],
    "unlearn edit": lambda *a, **k: imu.unlearn(
        *a, method="margin_edit", inplace=False, **k
    ).trajectory[-1],
}


def same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    else:
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("door", DOORS)
def test_output_says_which_logits_at_every_door(problem, door):
    model, alone, x, y = problem
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="output="):
        DOORS[door](model, (x, y))
    for output in ("ours", ("ours",), lambda out: out["ours"]):
        same(DOORS[door](model, (x, y), output=output), DOORS[door](alone, (x, y)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"output": 1.5}, "output=1.5"),
        ({"output": ()}, "output"),
        ({"loss": "hinge"}, "loss='hinge' is unknown"),
        ({"ignore_index": "x"}, "ignore_index='x'"),
        ({"outputs": "ours"}, "outputs"),
    ],
)
def test_what_is_no_reading_is_refused_before_work(problem, door, option, says):
    _, alone, x, y = problem
    calls = []
    alone.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises((InputError, TypeError), match=says):
        DOORS[door](alone, (x, y), **option)
    assert not calls


@pytest.mark.parametrize("door", [d for d in DOORS if d.split()[0] not in ("unlearn",)])
def test_ignore_index_is_the_losses(problem, door):
    _, alone, x, y = problem
    y = y.clone()
    y[3] = 250
    with pytest.raises(InputError, match="250"):
        DOORS[door](alone, (x, y))
    if door.startswith(("capture", "influence", "self", "similarity", "tracin")):
        kept = DOORS[door](alone, (x, y), ignore_index=250)
        named = DOORS[door](alone, (x, y), loss=imu.CrossEntropy(ignore_index=250))
        same(kept, named)
    else:  # what counts samples has no place for one without a label
        with pytest.raises(InputError, match="250|each sample needs a label"):
            DOORS[door](alone, (x, y), ignore_index=250)


def test_factors_have_been_read_already(problem):
    _, alone, x, y = problem
    factors = imu.capture(alone, (x, y))
    for option in ({"output": "ours"}, {"loss": "cross_entropy"}, {"ignore_index": 3}):
        with pytest.raises(InputError, match="captured already"):
            imu.influence_scores(factors, **option)
        with pytest.raises(InputError, match="captured already"):
            imu.self_influence(factors, **option)
