"""What ``auto`` does with a summary of the training set."""

from __future__ import annotations

import dataclasses
import logging

import every_option
import pytest
import torch

import imu_fast as imu

PROBLEMS = every_option.problems()
[SUMMARY] = every_option.VALUES["summary"]


def unlearned(task, **options):
    problem = PROBLEMS[task]
    return imu.unlearn(problem.model, problem.data, "auto", inplace=False, **options)


def test_samples_go_to_the_accuracy_on_unseen_data_and_the_reason_is_said(caplog):
    with caplog.at_level(logging.INFO, logger="imu_fast"):
        result = unlearned("random", summary=SUMMARY)
    assert result.settings["method"] == "self_distillation" and result.reached
    assert result.settings["calibrated"] and result.settings["layers"] == ["fc1", "fc2"]
    assert result.settings["unseen_accuracy"] == SUMMARY.unseen_accuracy == 0.6
    assert result.trajectory[-1]["forget_accuracy"] <= 0.6
    said = result.settings["auto"]
    assert f"auto takes self_distillation for samples: {said}" in caplog.text
    without = unlearned("random", unseen=0.6)
    assert without.settings["method"] == "self_distillation"
    assert not without.settings["calibrated"] and without.settings["auto"] != said


def test_a_depth_that_is_given_wins():
    deeper = unlearned("random", summary=SUMMARY, unseen=0.4)
    assert deeper.settings["unseen_accuracy"] == 0.4
    rule = imu.StopRule(forget_accuracy=0.3)
    assert unlearned("random", summary=SUMMARY, stop=rule).stopped_by == "forget_accuracy"
    unknown = dataclasses.replace(SUMMARY, unseen_accuracy=None)
    with pytest.warns(UserWarning, match="stop=None with method='auto' for samples"):
        unlearned("random", summary=unknown)


def test_a_class_needs_no_summary_and_another_models_is_refused_all_the_same():
    result = unlearned("a class", summary=SUMMARY)
    assert result.settings["method"] == "single_row"
    assert "a summary" in result.settings["auto"]
    same = unlearned("a class")
    for a, b in zip(result.model.parameters(), same.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(imu.InputError, match="summary is of other weights"):
        unlearned("none negative", summary=SUMMARY)
    with pytest.raises(imu.InputError, match="takes 'self_distillation' .*no option k"):
        unlearned("random", summary=SUMMARY, k=0.1)
    assert unlearned("random", summary=SUMMARY, margin=1.5).settings["margin"] == 1.5
    with pytest.raises(imu.InputError, match="summary is a int; pass what imu_fast.save_summary"):
        unlearned("random", summary=3)
