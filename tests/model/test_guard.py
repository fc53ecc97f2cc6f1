"""The user's model comes back as it was, whatever happens."""

from __future__ import annotations

import copy
import signal

import pytest
import torch
from guarded import MODELS, Adapter, FrozenNorm, data, in_mixed_modes, looked_at, same, state
from torch import nn

import imu_fast as imu
from imu_fast.ambient import finish, uninterrupted
from imu_fast.errors import InputError
from imu_fast.model.guard import copies_of, modes, preserved, rolled_back

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated", "ignore:.*spectral")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_looked_at_is_as_it_was(name):
    model, (x, y) = in_mixed_modes(name), data()
    before = state(model)
    looked_at(model, x, y)
    same(before, state(model))
    for _ in range(3):  # no rounding adds up
        imu.evaluate(model, (x, y))
    same(before, state(model))


@pytest.mark.parametrize("name", ["buffers", "old weight norm", "old spectral norm"])
def test_what_a_forward_pass_leaves_behind_can_be_copied(name):
    model, (x, y) = MODELS[name](), data()
    with torch.no_grad():
        model(x)
    linear = [k for k, m in model.named_modules() if type(m) is nn.Linear]
    imu.capture(model, (x, y), layers=linear)
    copy.deepcopy(model)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_a_failure_in_the_middle(name, error):
    model, (x, y) = in_mixed_modes(name), data()

    def batches():
        yield x[:5], y[:5]
        model.train()
        raise error("in the middle")

    class Failing(nn.Module):
        def forward(self, x):
            raise error("in the middle")

    before = state(model)
    for door in (imu.influence_scores, imu.evaluate, imu.unlearn):
        with pytest.raises(error, match="in the middle"):
            door(model, batches())
    same(before, state(model))
    handle = model.register_forward_hook(lambda *_: (_ for _ in ()).throw(error("in the middle")))
    for door in (imu.influence_scores, imu.evaluate, imu.unlearn):
        with pytest.raises(error, match="in the middle"):
            door(model, (x, y))
    handle.remove()
    same(before, state(model))


@pytest.mark.parametrize("name", ["plain", "merging", "merging, around", "tied"])
@pytest.mark.parametrize("scope", ["head", "all"])
def test_unlearning_in_place_changes_values_only(name, scope):
    model, (x, y) = in_mixed_modes(name), data()
    before = state(model)
    imu.unlearn(model, (x, y), epochs=2, scope=scope, on_empty="uniform")
    after = state(model)
    assert before["modes"] == after["modes"] and before["hooks"] == after["hooks"]
    for key, _ in model.named_parameters():
        assert before[key][:3] == after[key][:3], key


def test_modes_are_exact_and_merged_weights_are_taken_apart():
    model = nn.Sequential(FrozenNorm(Adapter(6, 8), nn.BatchNorm1d(8)), nn.Linear(8, 3)).train()
    inner, before = model[0], [m.training for m in model.modules()]
    weight = inner[0].weight.detach().clone()
    with modes(model, batchnorm="eval", dropout="eval"):
        assert inner[0].merged and not any(m.training for m in model.modules())
    assert not inner[0].merged and [m.training for m in model.modules()] == before
    torch.testing.assert_close(inner[0].weight, weight)
    model.eval()
    with modes(model, batchnorm="train", dropout="eval"):
        assert inner[1].training and not inner[0].training and inner[0].merged
    with modes(model, batchnorm="eval", dropout="train"):
        assert not inner[1].training and inner[0].training and not inner[0].merged
    assert inner[0].merged and not any(m.training for m in model.modules())


def test_preserved_leaves_values_alone_where_asked():
    model, (x, _) = MODELS["plain"](), data()
    mean = model[1].running_mean.clone()
    with preserved(model, buffers=False):
        model.train()(x + 3)
        model[0].weight.data.zero_()
    assert not torch.equal(model[1].running_mean, mean)
    assert not model[0].weight.any()
    with preserved(model):
        model.train()(x - 9)
        now = model[1].running_mean.clone()
    assert not torch.equal(model[1].running_mean, now)


def test_rolled_back():
    model, (x, _) = MODELS["plain"](), data()
    before = state(model)
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), rolled_back(model, ["0.weight"]) as kept, torch.no_grad():
            kept += copies_of([model[4].bias])
            model.train()(x + 3)
            model[0].weight.zero_()
            model[4].bias.zero_()
            model[0].bias.grad = torch.ones(8)
            raise error
        same(before, state(model.train()))
    with rolled_back(model, ["0.weight"]), torch.no_grad():
        model[0].weight.zero_()
    assert not model[0].weight.any()


# Interrupts.


class Interrupted(Adapter):
    """Ctrl-C comes a second time, while the model is being restored."""

    at_train = 0

    def train(self, mode=True):
        if mode and self.at_train:
            self.at_train -= 1
            signal.raise_signal(signal.SIGINT)
        return super().train(mode)


class Raising(Adapter):
    def train(self, mode=True):
        if mode and not self.training:
            raise KeyboardInterrupt("while restoring")
        return super().train(mode)


def test_a_second_interrupt_waits_until_the_model_is_restored():
    model = nn.Sequential(Interrupted(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    model.train()[3].weight.requires_grad_(False)
    before, handler = state(model), signal.getsignal(signal.SIGINT)
    x, y = data()

    def batches():
        yield x, y
        model[0].at_train = 1
        raise KeyboardInterrupt("the first")

    for door in (imu.influence_scores, imu.evaluate, imu.unlearn):
        with pytest.raises(KeyboardInterrupt):
            door(model, batches())
        same(before, state(model))
    assert signal.getsignal(signal.SIGINT) is handler
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done = True
    finally:
        signal.signal(signal.SIGINT, handler)
    assert done


def test_an_error_while_restoring_does_not_stop_it():
    model = nn.Sequential(Raising(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)).train()
    x, y = data()
    mean, flags = model[1].running_mean.clone(), [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt, match="while restoring"):
        imu.capture(model, (x, y), layers=["3"])
    assert torch.equal(model[1].running_mean, mean)
    assert [p.requires_grad for p in model.parameters()] == flags
    ran = []
    with pytest.raises(ValueError, match="first"):
        finish([lambda: {}["x"] if ran.append(1) else int("first"), lambda: ran.append(2)])
    assert ran == [1, 1, 2]


# What surrounds a call.


def test_a_graph_that_the_user_holds_keeps_its_backward_pass():
    model, (x, y) = MODELS["plain"]().eval(), data()
    loss = nn.functional.cross_entropy(model(x), y)
    looked_at(model, x, y)
    loss.backward()


def test_lazy_modules_are_refused():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))
    for door in (imu.influence_scores, imu.evaluate, imu.unlearn):
        with pytest.raises(InputError, match=r"0.weight has no shape yet.*run the model"):
            door(model, data())


@pytest.mark.parametrize("how", ["wrapped", "in place", "inner"])
def test_compiled_models_that_have_run(how):
    model, (x, y) = MODELS["plain"]().eval(), data()
    want = imu.influence_scores(model, (x, y))
    if how == "wrapped":
        compiled = torch.compile(model, backend="eager")
    elif how == "in place":
        compiled = copy.deepcopy(model)
        compiled.compile(backend="eager")
    else:
        compiled = nn.Sequential(*model[:4], torch.compile(model[4], backend="eager"))
    compiled.eval()(x)
    before = state(model)
    for _ in range(2):
        torch.testing.assert_close(imu.influence_scores(compiled, (x, y)), want)
        compiled(x)
    imu.unlearn(compiled, (x, y), epochs=1, on_empty="uniform", inplace=False)
    same(before, state(model))
    # Afterwards it is compiled again.
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(x)


class WithoutMode(nn.Linear):
    def train(self):
        return self


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo):
        raise TypeError("no copies")


MODELESS = {
    "frozen": (
        lambda net: torch.jit.freeze(torch.jit.script(net.eval())),
        "frozen TorchScript module.*pass the original nn.Module",
    ),
    "exported": (
        lambda net: torch.export.export(net, (data()[0],)).module(),
        "made by torch.export.*pass the original nn.Module",
    ),
    "no mode": (
        lambda net: nn.Sequential(WithoutMode(6, 6), net),
        r"'0': WithoutMode.train takes no mode.*define train\(self, mode=True\)",
    ),
}


@pytest.mark.parametrize("case", MODELESS.values(), ids=MODELESS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_model_without_modes_is_refused_at_every_door(case):
    make, said = case
    model = make(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    for door in (
        imu.influence_scores,
        imu.evaluate,
        imu.capture_features,
        imu.parameter_importance,
        lambda m, d: imu.influence_scores(m, d, layers=["0"]),
        lambda m, d: imu.unlearn(m, d, epochs=1),
        lambda m, d: imu.unlearn(m, d, epochs=1, inplace=False),
        lambda m, d: imu.unlearn_in_turn(m, [d], epochs=1),
        lambda m, d: preserved(m).__enter__(),
    ):
        with pytest.raises(InputError, match=said):
            door(model, data())


def test_a_model_that_refuses_to_be_copied():
    model = nn.Sequential(nn.Linear(6, 8), Uncopied(8, 3))
    for door in (
        lambda: imu.unlearn(model, data(), epochs=1, inplace=False),
        lambda: imu.unlearn_in_turn(model, [data()], epochs=1, inplace=False),
    ):
        with pytest.raises(InputError, match=r"deepcopy.*no copies.*inplace=True") as caught:
            door()
        assert isinstance(caught.value.__cause__, TypeError)
    imu.unlearn(model, data(), epochs=1)
