"""The depth of a random forget set: as well as data that the model never saw, and not below it."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import imu_fast as imu

CLASSES = 4


@pytest.fixture(scope="module")
def problem():
    """A network that knows its training samples by heart; forget, retained and unseen ones."""
    torch.manual_seed(0)
    means = 1.2 * torch.randn(CLASSES, 8)
    y = torch.arange(300) % CLASSES
    x = means[y] + 1.5 * torch.randn(300, 8)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:200]), y[:200]).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval(), (x[:40], y[:40]), (x[200:], y[200:])


def accuracy(model, data):
    return imu.evaluate(model, data)["accuracy"]


def test_methods_stop_where_unseen_data_are(problem):
    model, forget, unseen = problem
    line = accuracy(model, unseen)
    assert line < 0.9 and accuracy(model, forget) == 1.0
    forms = [line, unseen, DataLoader(TensorDataset(*unseen), batch_size=16), iter([unseen])]
    for form in forms:
        for method, options in (("auto", {}), ("margin_edit", {}), ("uniform", {"lr": 0.1})):
            if isinstance(form, type(iter([]))):
                form = iter([unseen])
            rule = imu.StopRule(unseen_accuracy=form)
            if method == "uniform":
                options = {**options, "epochs": 400}
            result = imu.unlearn(model, forget, method, stop=rule, inplace=False, **options)
            assert result.stopped_by == "unseen_accuracy" and result.reached
            assert result.settings["unseen_accuracy"] == pytest.approx(line)
            deep = accuracy(result.model, forget)
            assert line - 2 / len(forget[1]) <= deep <= line
            assert result.trajectory[-1]["forget_accuracy"] == pytest.approx(deep)


def test_unseen_data_are_measured_once_on_the_model_as_it_was(problem):
    model, forget, unseen = problem
    rule = imu.StopRule(unseen_accuracy=unseen)
    model, sizes = copy.deepcopy(model), []
    model.register_forward_hook(lambda _, args, out: sizes.append(len(out)))
    imu.unlearn(model, forget, "margin_edit", milestones={"a": rule}, stop=rule)
    assert sizes.count(len(unseen[1])) == 1


def test_no_step_where_the_forget_set_is_there_already(problem, caplog):
    model, forget, _ = problem
    for method in ("auto", "imu"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "imu_fast"):
            rule = imu.StopRule(unseen_accuracy=1.0)
            result = imu.unlearn(model, forget, method, stop=rule, inplace=False)
        assert all(
            torch.equal(a, b)
            for a, b in zip(result.model.parameters(), model.parameters(), strict=True)
        )
        assert result.reached and "before any step" in caplog.text
        assert len(result.trajectory) == 1


def test_the_higher_of_two_accuracies_ends_a_run(problem):
    model, forget, _ = problem
    for a, b, reason in ((0.9, 0.5, "forget_accuracy"), (0.5, 0.9, "unseen_accuracy")):
        rule = imu.StopRule(forget_accuracy=a, unseen_accuracy=b)
        assert rule.accuracy == 0.9
        result = imu.unlearn(model, forget, "margin_edit", stop=rule, inplace=False)
        assert result.stopped_by == reason
        assert result.trajectory[-1]["forget_accuracy"] == pytest.approx(0.9)


def test_auto_asks_for_the_depth_of_samples(problem):
    model, forget, _ = problem
    before = copy.deepcopy(model.state_dict())
    for task in (None, "samples"):
        with pytest.warns(UserWarning, match=r"ruins much.*Name the depth: pass unseen=X.*loader"):
            result = imu.unlearn(model, forget, "auto", task=task, inplace=False)
        assert accuracy(result.model, forget) == 0.0
    zero = imu.StopRule(forget_accuracy=0)
    with pytest.warns(UserWarning, match=r"forget_accuracy=0 .*ruins much"):
        imu.unlearn(model, forget, "auto", stop=zero, inplace=False)
    with pytest.raises(imu.InputError, match="unseen= of method='auto' is the depth where there"):
        imu.unlearn(model, forget, "auto", unseen=0.5, stop=imu.StopRule(forget_loss=1.0))
    with pytest.raises(imu.InputError, match=r"unseen_accuracy=7 must lie in \[0, 1\]"):
        imu.unlearn(model, forget, "auto", unseen=7)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_unseen_is_the_depth_of_auto(problem):
    model, forget, unseen = problem
    line = accuracy(model, unseen)
    for form in (line, unseen):
        result = imu.unlearn(model, forget, "auto", unseen=form, inplace=False)
        assert result.stopped_by == "unseen_accuracy" and result.reached
        assert line - 2 / len(forget[1]) <= accuracy(result.model, forget) <= line
    one = forget[1] == 2
    data = (forget[0][one], forget[1][one])
    with pytest.raises(imu.InputError, match="unseen= with task='class'"):
        imu.unlearn(model, data, "auto", task="class", unseen=unseen)
    result = imu.unlearn(model, data, "auto", unseen=unseen, inplace=False)  # samples of one class
    assert result.settings["method"] == "self_distillation"
    assert result.stopped_by == "unseen_accuracy"


def test_auto_takes_a_class_to_zero(problem, caplog):
    model, forget, _ = problem
    one = forget[1] == 2
    data = (forget[0][one], forget[1][one])
    result = imu.unlearn(model, data, "auto", task="class", inplace=False)
    assert result.settings["method"] == "single_row" and accuracy(result.model, data) == 0.0
    many = (data[0].repeat(3, 1), data[1].repeat(3))
    with caplog.at_level(logging.WARNING, "imu_fast"):
        result = imu.unlearn(model, many, "auto", inplace=False)
    assert accuracy(result.model, many) == 0.0 and "task='class' is guessed" in caplog.text
    result = imu.unlearn(
        model,
        data,
        "auto",
        task="samples",
        stop=imu.StopRule(forget_accuracy=0.5),
        inplace=False,
    )
    assert result.settings["method"] == "margin_edit"


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), "0.7", True])
def test_what_is_no_accuracy_is_refused(value):
    with pytest.raises(imu.InputError, match="unseen_accuracy"):
        imu.StopRule(unseen_accuracy=value)


def test_unseen_data_that_cannot_be_read_are_named_before_any_work(problem):
    model, forget, _ = problem
    before = copy.deepcopy(model.state_dict())
    for data in ([], (torch.randn(3, 8), torch.tensor([9, 0, 0])), object()):
        with pytest.raises(imu.InputError, match="unseen_accuracy"):
            imu.unlearn(model, forget, stop=imu.StopRule(unseen_accuracy=data))
    with pytest.raises(imu.InputError, match="pass the loader as unseen_accuracy"):
        imu.StopRule(forget_accuracy=0.5, unseen=forget)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_number_may_be_a_tensor():
    """A tensor without an axis is no data."""
    rule = imu.StopRule(unseen_accuracy=torch.tensor(0.25), forget_loss=torch.tensor(2))
    assert (rule.unseen_accuracy, rule.forget_loss) == (0.25, 2)
    with pytest.raises(imu.InputError, match="unseen_accuracy=1.5 must lie"):
        imu.StopRule(unseen_accuracy=torch.tensor(1.5))
