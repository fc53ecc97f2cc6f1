"""The user's model, and all that surrounds a call, come back as they were; results are right."""

from __future__ import annotations

import copy
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import imu_fast as imu
from imu_fast.ambient import finish, plain_torch, uninterrupted
from imu_fast.errors import InputError
from imu_fast.model.guard import copies_of, exclusive, modes, preserved, rolled_back

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated", "ignore:.*spectral")


class Adapter(nn.Linear):
    """A low-rank adapter that merges at eval() and takes itself apart at train(), as LoRA's."""

    def __init__(self, d, c):
        super().__init__(d, c)
        self.a, self.b = nn.Parameter(torch.randn(c, 2)), nn.Parameter(torch.randn(2, d))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            with torch.no_grad():
                self.weight.add_(self.a @ self.b, alpha=-1 if self.merged else 1)
            self.merged = not self.merged
        return self

    def forward(self, x):
        low_rank = 0 if self.merged else x @ (self.a @ self.b).T
        return super().forward(x) + low_rank


class Replacing(Adapter):
    """Merges into a new Parameter."""

    def train(self, mode=True):
        nn.Linear.train(self, mode)
        if mode == self.merged:
            sign = -1 if self.merged else 1
            self.weight = nn.Parameter(self.weight.detach() + sign * (self.a @ self.b).detach())
            self.merged = not self.merged
        return self


class Around(nn.Module):
    """Merges into a module that it holds, which knows nothing of it."""

    def __init__(self, d, c):
        super().__init__()
        self.base, self.a = nn.Linear(d, c), nn.Parameter(torch.randn(c, d))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            with torch.no_grad():
                self.base.weight.data += (-1 if self.merged else 1) * self.a
            self.merged = not self.merged
        return self

    def forward(self, x):
        return self.base(x) + (0 if self.merged else x @ self.a.T)


class FrozenNorm(nn.Sequential):
    """A backbone whose BatchNorm stays in evaluation mode, as detectors have it."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self


class Counter(nn.Module):
    """A buffer that counts calls, one that is replaced, and a tensor that is none of the two."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(1))
        self.register_buffer("later", None)
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.plain = torch.zeros(())
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x):
        self.calls += 1
        self.plain += 1
        self.last = x.detach().clone()
        self.later = x.detach()
        self.kept = x * 1
        torch.rand(1, generator=self.generator)
        return x


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x)))


MODELS = {
    "plain": lambda: nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
    ),
    "merging": lambda: nn.Sequential(Adapter(6, 8), nn.ReLU(), nn.Linear(8, 3)),
    "merging, replaced": lambda: nn.Sequential(Replacing(6, 8), nn.ReLU(), nn.Linear(8, 3)),
    "merging, around": lambda: nn.Sequential(Around(6, 8), nn.ReLU(), nn.Linear(8, 3)),
    "merging in merging": lambda: nn.Sequential(
        FrozenNorm(Adapter(6, 8), nn.BatchNorm1d(8)), nn.Linear(8, 3)
    ),
    "frozen norm": lambda: FrozenNorm(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)),
    "spectral norm": lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)
    ),
    "old spectral norm": lambda: nn.Sequential(
        nn.utils.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)
    ),
    "old weight norm": lambda: nn.Sequential(
        nn.utils.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)
    ),
    "buffers": lambda: nn.Sequential(nn.Linear(6, 8), Counter(), nn.ReLU(), nn.Linear(8, 3)),
    "tied": Tied,
}


def data(n=12):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 6, generator=generator), torch.arange(n) % 3


def state(model):
    """All that may be seen of a model."""
    found = {"modes": [m.training for m in model.modules()]}
    for name, p in model.named_parameters(remove_duplicate=False):
        found[name] = (id(p), p.requires_grad, id(p.grad), p.detach().clone())
    for name, b in model.named_buffers(remove_duplicate=False):
        found[name] = (id(b), b.detach().to_dense().clone())
    found["hooks"] = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for m in model.modules()
    ]
    for i, m in enumerate(model.modules()):
        for name, value in vars(m).items():
            if isinstance(value, torch.Tensor) and name != "kept":
                found[f"{i}.{name}"] = value.detach().clone()
            if isinstance(value, bool):
                found[f"{i}.{name}"] = value
            if isinstance(value, torch.Generator):
                found[f"{i}.{name}"] = value.get_state()
        found[f"{i} names"] = [*m._parameters, *m._buffers]
    return found


def same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        pairs = zip(value, second[name], strict=True) if isinstance(value, tuple) else None
        for a, b in pairs or [(value, second[name])]:
            if isinstance(a, torch.Tensor):
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), name
            else:
                assert a == b, name


def in_mixed_modes(name):
    model = MODELS[name]().train()
    first, *rest = (m for m in model.children() if not isinstance(m, nn.ReLU))
    rest[-1].eval()  # by hand, a child of a model in training mode
    for parameter in first.parameters():
        parameter.requires_grad_(False)
        break
    x, y = data()
    nn.functional.cross_entropy(model(x), y).backward()
    for module in model.modules():
        vars(module).pop("kept", None)
    return model


def looked_at(model, x, y):
    imu.influence_scores(model, (x, y))
    linear = [k for k, m in model.named_modules() if type(m) is nn.Linear][-1]
    imu.capture(model, (x, y), layers=[linear])
    imu.evaluate(model, (x, y))
    imu.unlearn(model, (x, y), epochs=1, on_empty="uniform", inplace=False)


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


def ambient():
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


SURROUNDINGS = {
    "nothing": lambda: torch.enable_grad(),
    "no_grad": lambda: torch.no_grad(),
    "inference_mode": lambda: torch.inference_mode(),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
@pytest.mark.parametrize("layers", ["head", ["0", "4"]])
def test_results_do_not_depend_on_what_surrounds_the_call(name, layers):
    model, (x, y) = MODELS["plain"](), data()
    want = imu.influence_scores(model, (x, y), layers=layers)
    accuracy = imu.evaluate(model, (x, y))
    options = dict(epochs=2, scope="all", on_empty="uniform", inplace=False)
    unlearned = imu.unlearn(model, (x, y), **options).model
    factors = imu.capture(model, (x, y))
    with SURROUNDINGS[name]():
        outside = ambient()
        got = imu.influence_scores(model, (x.clone(), y.clone()), layers=layers)
        assert ambient() == outside
        self_scores = imu.self_influence(factors)
        found = imu.evaluate(model, (x, y))
        again = imu.unlearn(model, (x.clone(), y), **options).model
        assert ambient() == outside
    assert torch.equal(got, want) and not got.is_inference() and got.dtype == torch.float32
    assert torch.equal(self_scores, imu.self_influence(factors))
    assert torch.equal(found["confidence"], accuracy["confidence"])
    for ours, theirs in zip(again.parameters(), unlearned.parameters(), strict=True):
        assert torch.equal(ours, theirs) and not ours.is_inference()
    got.mul_(2)  # an ordinary tensor


def test_buffers_made_under_inference_mode_are_restored():
    class Inferring(Counter):
        def forward(self, x):
            with torch.inference_mode():
                self.calls += 1
            return x

    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(6, 3), Inferring())
    before = state(model)
    imu.evaluate(model, data())
    same(before, state(model))


def test_a_model_made_under_inference_mode():
    with torch.inference_mode():
        model, (x, y) = MODELS["plain"](), data()
    unlearned = imu.unlearn(model, (x, y), epochs=1, scope="all", inplace=False).model
    assert not torch.equal(unlearned[0].weight, model[0].weight)
    scores = imu.influence_scores(copy.deepcopy(model), (x, y))
    assert bool(torch.isfinite(scores).all()) and imu.evaluate(model, (x, y))["n"] == len(y)
    for call in (
        lambda: imu.influence_scores(model, (x, y)),
        lambda: imu.unlearn(model, (x, y), epochs=1, scope="all"),
        lambda: imu.capture(model, (x, y), layers=["0"]),
    ):
        with pytest.raises(InputError, match=r"0.weight was made under torch.inference_mode"):
            call()


def test_what_a_forward_leaves_behind_of_the_surroundings():
    class Meddling(nn.Linear):
        def forward(self, x):
            torch.set_default_dtype(torch.float64)
            torch.use_deterministic_algorithms(False)
            torch.set_grad_enabled(False)
            raise RuntimeError("and fails")

    outside = ambient()
    for door in (imu.influence_scores, imu.evaluate, imu.unlearn):
        with pytest.raises(RuntimeError, match="and fails"):
            door(Meddling(6, 3), data())
        assert ambient() == outside


@pytest.mark.parametrize("name", ["plain", "tied"])
def test_no_random_stream_is_moved(name):
    class Drawing(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, i):
            random.random(), np.random.rand(), torch.rand(1)
            return x[i], int(y[i])

    model, (x, y) = MODELS[name](), data()
    loader = torch.utils.data.DataLoader(Drawing(), 4, shuffle=True)

    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def seeded():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seeded()
    expected = draws()
    seeded()
    looked_at(model, x, y)
    imu.influence_scores(model, loader)
    imu.unlearn(model, loader, epochs=2, scope="all", dropout="train", on_empty="uniform")
    imu.unlearn(model, loader, method="random_label", epochs=1)
    assert draws() == expected


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


# Threads.


def test_several_threads_on_one_model():
    """Through the model, a wrapper of it and another model that shares its body, all at once."""
    body = nn.Sequential(nn.Linear(6, 64), nn.BatchNorm1d(64), nn.Dropout(0.5))
    model, (x, y) = nn.Sequential(body, nn.Linear(64, 3)).train(), data(300)
    other = nn.Sequential(body, nn.Linear(64, 3)).train()
    forms = [model, nn.DataParallel(model), other, model]
    want = [imu.influence_scores(form, (x, y)) for form in forms]
    accuracy = [imu.evaluate(form, (x, y))["confidence"] for form in forms]
    before, results, errors = state(model), [], []
    start = threading.Barrier(4)

    def work(k):
        try:
            start.wait()
            for _ in range(8):
                scores = imu.influence_scores(forms[k], (x, y))
                confidence = imu.evaluate(forms[k], (x, y))["confidence"]
                results.append(
                    torch.allclose(scores, want[k], rtol=1e-4, atol=1e-5)
                    and torch.allclose(confidence, accuracy[k], rtol=1e-4, atol=1e-5)
                )
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not errors and len(results) == 32 and all(results)
    same(before, state(model))


def test_calls_on_models_that_share_nothing_do_not_wait():
    first, second = MODELS["plain"](), MODELS["plain"]()
    done = threading.Event()

    def work():
        with exclusive(second):
            done.set()

    with exclusive(first), exclusive(nn.Sequential(first)):
        thread = threading.Thread(target=work)
        thread.start()
        assert done.wait(timeout=20)
        thread.join()


def test_surroundings_of_several_threads():
    """One thread leaves while another is inside: compiled code waits for the last."""
    compiled, (x, _) = torch.compile(MODELS["plain"]().eval(), backend="eager"), data()
    compiled(x)
    inside, leave = threading.Event(), threading.Event()
    calls = []
    compiled._orig_mod[4].register_forward_hook(lambda *_: calls.append(1))

    def work():
        with plain_torch():
            inside.set()
            leave.wait(timeout=60)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(timeout=60)
    with plain_torch():
        pass
    leave.set()
    thread.join()
    with plain_torch():
        compiled(x)
    assert calls == [1]


# Models that cannot be put into evaluation mode, or copied.


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


# A default device.


class OnDefault(nn.Linear):
    """Whose forward makes a constant on the default device, and says which that was."""

    seen: ClassVar[set[str]] = set()

    def forward(self, x):
        self.seen.add(torch.zeros(1).device.type)
        return super().forward(x)


class Drawn(torch.utils.data.Dataset):
    """Which notes the default device that it is read under."""

    def __init__(self):
        self.seen, self.columns = set(), data()

    def __len__(self):
        return 12

    def __getitem__(self, i):
        self.seen.add(torch.zeros(1).device.type)
        return tuple(column[i] for column in self.columns)


DOORS_OF_DATA = {
    "scores": lambda m, d: imu.influence_scores(m, d),
    "ggn": lambda m, d: imu.influence_scores(m, d, curvature="ggn"),
    "layers": lambda m, d: imu.influence_scores(m, d, layers=["0"], curvature="fisher_diag"),
    "factors": lambda m, d: imu.self_influence(imu.capture(m, d), curvature="fisher"),
    "evaluate": lambda m, d: torch.tensor(imu.evaluate(m, d)["loss"], device="cpu"),
    "importance": lambda m, d: imu.parameter_importance(m, d)["2.bias"],
    "unlearn": lambda m, d: imu.unlearn(m, d, epochs=2, inplace=False).scores,
    "unlearn all": lambda m, d: imu.unlearn(m, d, epochs=2, inplace=False, scope="all").scores,
}


@pytest.fixture
def read_under():
    OnDefault.seen.clear()
    return OnDefault.seen


@pytest.mark.parametrize("setting", ["context", "default"])
@pytest.mark.parametrize("door", DOORS_OF_DATA.values(), ids=DOORS_OF_DATA)
def test_a_default_device_without_values_changes_nothing(door, setting, read_under):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), OnDefault(8, 3)).eval()
    sets = [data(), Drawn(), torch.utils.data.DataLoader(Drawn(), batch_size=5)]

    def under_a_default(d):
        """In a thread of its own: what is set there ends there, and older torch cannot unset it."""
        torch.set_default_device("meta")
        found = door(model, d)
        assert torch.zeros(1).is_meta
        return found

    for d in sets:
        want = door(model, d)
        if setting == "context":
            with torch.device("meta"):
                found = door(model, d)
                assert torch.zeros(1).is_meta
        else:
            with ThreadPoolExecutor(1) as thread:
                found = thread.submit(under_a_default, d).result()
        assert torch.equal(found, want)
    assert read_under == sets[1].seen == sets[2].dataset.seen == {"cpu"}


@pytest.mark.parametrize("door", DOORS_OF_DATA.values(), ids=DOORS_OF_DATA)
def test_the_users_code_runs_under_its_default_device(door, monkeypatch, read_under):
    """The meta device stands for an accelerator."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), OnDefault(8, 3)).eval()
    dataset = Drawn()
    want = door(model, dataset)
    monkeypatch.setattr("imu_fast.ambient._WITHOUT_VALUES", ())
    dataset.seen.clear()
    read_under.clear()
    with torch.device("meta"):
        found = door(model, dataset)
    assert torch.equal(found, want)
    assert read_under == dataset.seen == {"meta"}
