"""Where the data show nothing to forget, ``auto`` leaves the model alone and says so."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.stats import binom, fisher_exact
from torch import nn

import imu_fast as imu
from imu_fast.unlearning.left_alone import no_better


@pytest.mark.parametrize(
    ("right", "n", "unseen", "count"),
    [(13, 13, 0.98, 180), (21, 30, 0.44, 1000), (0, 5, 0.5, 8), (126, 126, 176 / 180, 180)],
)
def test_the_p_value_is_fishers_or_the_binomials(right, n, unseen, count):
    theirs = round(unseen * count)
    table = [[right, n - right], [theirs, count - theirs]]
    truth = fisher_exact(table, alternative="greater").pvalue
    assert no_better(right, n, unseen, count) == pytest.approx(truth, rel=1e-9)
    truth = binom.sf(right - 1, n, unseen)
    assert no_better(right, n, unseen, None) == pytest.approx(truth, rel=1e-9)


def test_of_a_certain_unseen_accuracy():
    assert no_better(3, 3, 1.0, None) == 1.0 and no_better(1, 3, 0.0, None) == 0.0
    assert no_better(0, 3, 0.0, None) == 1.0 and no_better(3, 3, 1.0, 50) == pytest.approx(1.0)


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    x = torch.randn(400, 6)
    y = model(x).argmax(1)
    wrong = torch.arange(400) % 10 == 0
    return model, x, torch.where(wrong, (y + 1) % 4, y)


@pytest.mark.parametrize("with_summary", [True, False])
def test_auto_leaves_alone_what_is_not_better_than_unseen(with_summary, tmp_path):
    model, x, y = problem()
    forget, unseen = (x[1:10], y[1:10]), (x[200:], y[200:])  # 9 of 9 right, and 180 of 200
    before = copy.deepcopy(model.state_dict())
    options = {"unseen": unseen}
    if with_summary:
        path = tmp_path / "s"
        kept = imu.save_summary(model, (x[:200], y[:200]), path, unseen=unseen)
        assert kept.unseen_count == imu.load_summary(path).unseen_count == 200
        options = {"summary": kept}
    calls = []
    result = imu.unlearn(
        model, forget, "auto", callback=calls.append, watch={"unseen data": unseen}, **options
    )
    said = result.settings["auto"]
    assert "9 of 9 forget samples are right (1.000), which is not above the 0.900" in said
    assert "stop=imu_fast.StopRule(forget_accuracy=...)" in said and "--stop-accuracy" in said
    assert result.settings["method"] == result.stopped_by == "left_alone"
    assert (result.steps, result.reached, len(result.indices)) == (0, None, 0)
    [record] = result.trajectory
    assert calls == [record] and record["forget_accuracy"] == 1.0
    assert record["unseen data_accuracy"] == pytest.approx(0.9)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    options.pop("unseen", None)
    stop = imu.StopRule(unseen_accuracy=0.9)
    insisted = imu.unlearn(model, forget, "auto", stop=stop, inplace=False, **options)
    assert insisted.reached and insisted.trajectory[-1]["forget_accuracy"] <= 0.9
    assert "a depth was named" in insisted.settings["auto"]
    edit = "newton_removal" if with_summary else "margin_edit"
    assert insisted.settings["method"] == edit


def test_auto_forgets_what_is_better_than_unseen():
    model, x, y = problem()
    right = torch.arange(400) % 10 != 0
    forget, unseen = (x[right][:60], y[right][:60]), (x[200:], y[200:])
    result = imu.unlearn(model, forget, "auto", unseen=unseen, inplace=False)
    assert result.settings["method"] == "self_distillation" and result.reached
    assert result.settings["unseen_accuracy"] == pytest.approx(0.9)


def test_where_there_is_no_layer_before_the_head_auto_edits_it(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    x = torch.randn(80, 6)
    result = imu.unlearn(model, (x, model(x).argmax(1)), "auto", unseen=0.5, inplace=False)
    assert result.settings["method"] == "margin_edit"
    assert "no self-distillation: there is no layer before the head" in result.settings["auto"]
    network, x, y = problem()
    kept = imu.save_summary(network, (x, y), tmp_path / "s", unseen=0.3)
    data = network[:2](x[:60]).detach(), network(x[:60]).argmax(1)
    result = imu.unlearn(network[2:], data, "auto", summary=kept, inplace=False)
    assert result.settings["method"] == "newton_removal" and result.reached
    assert "the model has no layer '0', which the summary is of" in result.settings["auto"]


@pytest.mark.parametrize("right", [9, 100])
def test_options_are_those_of_self_distillation_whether_it_is_taken_or_not(right):
    """9 of 9 right are left alone where 180 of 200 are; 100 of 100 are not."""
    model, x, y = problem()
    rows = [i for i in range(200) if i % 10][:right]
    forget, options = (x[rows], y[rows]), {"unseen": (x[200:], y[200:])}
    result = imu.unlearn(model, forget, "auto", lr=0.2, max_steps=90, inplace=False, **options)
    assert result.settings["method"] == ("left_alone" if right == 9 else "self_distillation")
    for wrong in ({"alpha": 0.5}, {"targets": 3}, {"max_steps": 0}):
        with pytest.raises(imu.errors.InputError):
            imu.unlearn(model, forget, "auto", **options, **wrong)
