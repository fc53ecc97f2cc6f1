"""What every method of unlearning keeps, and no option of any method ignored."""

from __future__ import annotations

import copy
import json
import re

import every_option
import pytest
import torch

import imu_fast as imu
from imu_fast.unlearning.ascent.ascent import Ascent
from imu_fast.unlearning.named import METHODS, SUMMARIES

PROBLEMS = every_option.problems()
every_method = pytest.mark.parametrize("name", list(METHODS))
every_task = pytest.mark.parametrize("task", ["a class", "random"])


def unlearned(name, task="random", **options):
    """The result, of a model that is not the problem's own."""
    problem = PROBLEMS[task]
    model = copy.deepcopy(problem.model)
    options = every_option.with_depth(name, task, options)
    return imu.unlearn(model, problem.data, method=name, **options)


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(model, before):
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_every_name_is_listed():
    assert imu.methods() == list(METHODS) == list(SUMMARIES)


@every_method
def test_nothing_that_is_passed_is_ignored(name):
    ignored = [
        option
        for option, verdict in every_option.verdicts_of(PROBLEMS, name).items()
        if not verdict.startswith(("used", "refused", "the same by definition"))
    ]
    assert not ignored


def test_an_option_that_does_nothing_would_be_found(monkeypatch):
    """The check above, tried on a fault of its kind."""
    run = Ascent.run

    def deaf(self, job):
        return run(METHODS["uniform"].with_options("", {"lr": self.optimizer.lr}), job)

    monkeypatch.setattr(Ascent, "run", deaf)
    assert every_option.verdict(PROBLEMS, "uniform", "alpha") == "IGNORED"
    assert every_option.verdict(PROBLEMS, "uniform", "lr") == "used"


@every_method
@every_task
def test_what_is_reported_is_what_the_model_does(name, task):
    problem = PROBLEMS[task]
    result = unlearned(name, task, watch={"same": problem.data})
    own, last = imu.evaluate(result.model, problem.data), result.trajectory[-1]
    assert last["forget_accuracy"] == pytest.approx(own["accuracy"], abs=1e-12)
    assert last["forget_loss"] == pytest.approx(own["loss"], rel=1e-6, abs=1e-7)
    assert last["same_accuracy"] == last["forget_accuracy"]
    assert len(result.indices) == len(result.weights)
    assert set(result.indices.tolist()) <= set(range(len(problem.data[1])))
    first = imu.evaluate(problem.model, problem.data)
    assert result.trajectory[0]["forget_loss"] == pytest.approx(first["loss"], rel=1e-6, abs=1e-7)


@every_method
def test_a_seed_gives_the_same_run_and_the_users_generator_is_not_moved(name):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = unlearned(name, seed=5)
    assert torch.equal(torch.rand(2), expected)
    second = unlearned(name, seed=5)
    assert_same(first.model, state(second.model))
    assert first.trajectory == second.trajectory and first.batch_losses == second.batch_losses


@every_method
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_model_as_it_was(name, error):
    """In the callback, at a milestone, and at the end of the trajectory."""
    problem = PROBLEMS["random"]
    model = copy.deepcopy(problem.model).train()
    model.fc1.weight.grad = torch.ones_like(model.fc1.weight)
    model.norm.weight.requires_grad_(False)
    before, left = state(model), [0]
    modes = [m.training for m in model.modules()]

    def fail(*_):
        left[0] -= 1
        if not left[0]:
            raise error("in the middle")

    rule = imu.StopRule(forget_accuracy=1.0)
    for at, options in (
        (1, {"callback": fail}),
        (2, {"callback": fail}),
        (1, {"milestones": {"a": rule}, "on_milestone": fail}),
    ):
        left[0] = at
        with pytest.raises(error, match="in the middle"):
            options = every_option.with_depth(name, "random", options)
            imu.unlearn(model, problem.data, method=name, **options)
        assert_same(model, before)
        assert [m.training for m in model.modules()] == modes
        assert torch.equal(model.fc1.weight.grad, torch.ones_like(model.fc1.weight))
        assert model.fc2.weight.grad is None and not model.norm.weight.requires_grad
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@every_method
def test_a_copy_is_made_where_the_users_model_is_to_stay(name):
    problem = PROBLEMS["random"]
    before = state(problem.model)
    options = every_option.with_depth(name, "random", {"inplace": False})
    result = imu.unlearn(problem.model, problem.data, method=name, **options)
    assert_same(problem.model, before)
    changed = [k for k, v in result.model.state_dict().items() if not torch.equal(v, before[k])]
    inner = ["fc1.weight", "fc1.bias"] if name == "self_distillation" else []
    assert changed == [*inner, "fc2.weight", "fc2.bias"]


@every_method
def test_an_object_is_what_its_name_is_short_for(name):
    method = METHODS[name]
    assert method == METHODS[name] and hash(method) == hash(METHODS[name])
    by_name, by_object = unlearned(name), unlearned(method)
    assert_same(by_name.model, state(by_object.model))
    with pytest.raises(imu.InputError, match="is an object, which holds its own options"):
        unlearned(method, lr=0.1)
    with pytest.raises(imu.InputError, match=f"method is the class {type(method).__name__}"):
        unlearned(type(method))
    assert name in SUMMARIES and len(SUMMARIES[name]) < 80


@every_method
def test_results_say_what_was_done(name):
    records = []
    result = unlearned(name, callback=records.append, watch={"same": PROBLEMS["random"].data})
    # The last record is the model's own, and so known to rounding when the callback gets it.
    assert records[:-1] == result.trajectory[:-1]
    assert records[-1] == pytest.approx(result.trajectory[-1], rel=1e-5, abs=2**-8)
    assert repr(result).count("\n") == 0 and len(repr(result)) < 160
    assert result.settings["method"] in repr(result)
    table = result.table().splitlines()
    assert len(table) == 2 + len(result.trajectory)
    assert len({len(line) for line in table}) == 1 and "forget_accuracy" in table[0]
    cells = [cell.strip() for cell in table[-1].strip("|").split("|")]
    names = [cell.strip() for cell in table[0].strip("|").split("|")]
    for key, cell in zip(names, cells, strict=True):
        assert cell == f"{result.trajectory[-1][key]:.4g}"
    chosen = "margin_edit" if name == "auto" else name
    assert result.settings["method"] == chosen
    # Every option, under one of its names.
    paths = METHODS[chosen].paths()
    assert {paths[name] for name in result.settings if name in paths} == set(paths.values())
    json.dumps({k: v for k, v in result.settings.items() if not isinstance(v, torch.Tensor)})


@every_method
def test_checkpoints_are_resumed_or_refused(name, tmp_path):
    path = tmp_path / "run.safetensors"
    if not METHODS[name].resumable:
        with pytest.raises(imu.InputError, match=re.escape(f"checkpoint={str(path)!r}")):
            unlearned(name, checkpoint=path)
        assert not path.exists()
        return
    whole = unlearned(name, epochs=4, batch_size=8)
    unlearned(name, epochs=2, batch_size=8, checkpoint=path)
    resumed = unlearned(name, epochs=4, batch_size=8, checkpoint=path)
    assert_same(resumed.model, state(whole.model))
    assert resumed.trajectory == whole.trajectory
    with pytest.raises(imu.InputError, match=r"belongs to another run \(differs in .*lr"):
        unlearned(name, epochs=4, batch_size=8, lr=0.5, checkpoint=path)


def test_options_of_auto_go_to_the_method_that_it_takes():
    assert unlearned("auto", "a class", lr=0.5).settings["lr"] == 0.5
    assert unlearned("auto", "random", margin=0.5).settings["margin"] == 0.5
    with pytest.raises(imu.InputError, match="auto' takes 'margin_edit' .*no option lr; it has"):
        unlearned("auto", "random", lr=0.5)
    with pytest.raises(imu.InputError, match="auto' takes 'single_row' .*no option margin"):
        unlearned("auto", "a class", margin=0.5)
    with pytest.raises(imu.InputError, match="'auto' has no option curvature; it has"):
        unlearned("auto", "a class", curvature="kfac")


def test_an_optimizer_gets_the_rates_that_are_given():
    seen = []

    def make(tensors, **given):
        seen.append(given)
        return torch.optim.Adam(tensors, **given)

    unlearned("uniform", optimizer=make, lr=0.2, weight_decay=0.1)
    unlearned("uniform", optimizer=make)
    tried, made = seen[::2], seen[1::2]
    assert tried == made == [{"lr": 0.2, "weight_decay": 0.1}, {}]
    a = unlearned("uniform", optimizer=torch.optim.Adam, lr=0.2)
    b = unlearned("uniform", optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.2))
    assert_same(a.model, state(b.model))
    for options, message in (
        ({"optimizer": torch.optim.Adam, "momentum": 0.5}, "optimizer=Adam takes no momentum"),
        ({"optimizer": lambda t: torch.optim.SGD(t, lr=1.0), "lr": 0.1}, "takes no lr; set it"),
        ({"optimizer": lambda t: None}, "returned a NoneType"),
        ({"optimizer": torch.optim.LBFGS}, "makes a LBFGS, whose step needs a closure"),
        ({"optimizer": torch.optim.Adam([torch.ones(1)])}, "pass what makes it"),
        (
            {"optimizer": lambda t: torch.optim.SGD([torch.ones(1)], lr=1.0)},
            "holds other tensors",
        ),
        ({"optimizer": 3}, "optimizer=3; pass a Optimizer or one of the names sgd"),
    ):
        with pytest.raises(imu.InputError, match=message):
            unlearned("uniform", **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"callback": 3}, "callback=3 cannot be called"),
        ({"on_milestone": print}, "on_milestone is given without milestones"),
        ({"seed": -1}, "seed=-1"),
        ({"stop": 0.5}, r"pass imu_fast.StopRule"),
        ({"watch": {"unseen": []}}, "choose another name"),
        ({"watch": {"w": []}}, r"watch\['w'\]: loader is empty"),
        ({"on_milestone": "x", "milestones": {}}, "on_milestone='x' cannot be called"),
        ({"milestones": [imu.StopRule(forget_loss=1.0)]}, "milestones is a list"),
        ({"inplace": "no"}, "inplace='no' must be True or False"),
        ({"resume": "no"}, "resume='no' must be True or False"),
        ({"checkpoint": 3}, "checkpoint=3"),
        (
            {"stop": imu.StopRule(membership_auc=0.5, unseen=[], forget_accuracy=0.0)},
            "unseen of a StopRule: loader is empty",
        ),
    ],
)
@every_method
def test_bad_arguments_of_a_run(name, arguments, message):
    with pytest.raises(imu.InputError, match=message):
        unlearned(name, **arguments)
