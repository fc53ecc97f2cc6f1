"""TracIn over checkpoints, against one autograd call per sample and checkpoint; what it refuses."""

from __future__ import annotations

import copy

import per_sample
import pytest
import torch
from cases import LargestTensor
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import imu_fast as imu
from imu_fast.errors import InputError
from imu_fast.storage import save_tensors


def make(width=7):
    return nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 3))


def cross_entropy(model, sample):
    return nn.functional.cross_entropy(model(sample[0].double()[None]), sample[1][None])


@pytest.fixture
def problem():
    """A model in training mode, checkpoints along its training, and data."""
    model = make()
    x, y = torch.randn(31, 5), torch.randint(3, (31,))
    optimizer, saved = torch.optim.SGD(model.parameters(), lr=0.3), []
    for _ in range(3):
        saved.append(copy.deepcopy(model.state_dict()))
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model, saved, (x, y), (x[:6] + 0.1, y[:6])


RATES = [0.3, 0.1, 0.05]


def gradients_at(state, data, names):
    model = make()
    model.load_state_dict(state)
    return per_sample.sample_gradients(model, list(zip(*data, strict=True)), names, cross_entropy)


def truth(saved, data, queries, layers=("3",)):
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    return sum(
        rate * gradients_at(state, data, names) @ gradients_at(state, queries, names).T
        for rate, state in zip(RATES, saved, strict=True)
    )


def state_of(model):
    return {
        "tensors": copy.deepcopy(model.state_dict()),
        "modes": [module.training for module in model.modules()],
        "flags": [(p.requires_grad, p.grad is None) for p in model.parameters()],
        "identity": [id(p) for p in model.parameters()],
    }


def assert_same(before, after):
    for name, tensor in before.pop("tensors").items():
        assert torch.equal(tensor, after["tensors"][name]), name
    after.pop("tensors")
    assert before == after


@pytest.mark.parametrize("layers", ["head", ["0", "3"]], ids=str)
def test_against_one_sample_at_a_time(problem, layers):
    model, saved, data, queries = problem
    before = state_of(model)
    found = imu.tracin(model, data, queries, checkpoints=saved, learning_rates=RATES, layers=layers)
    expected = truth(saved, data, queries, ["3"] if layers == "head" else layers)
    per_sample.assert_scores(found, expected)
    own = imu.tracin_self_influence(
        model, data, checkpoints=saved, learning_rates=RATES, layers=layers
    )
    full = truth(saved, data, data, ["3"] if layers == "head" else layers)
    per_sample.assert_scores(own, full.diagonal())
    assert_same(before, state_of(model))


def test_layers_whose_rows_come_and_go_in_training():
    """Dead units leave rows without a gradient, other ones at each checkpoint."""

    def convolutional():
        pool = nn.Sequential(nn.Flatten(2), nn.AdaptiveMaxPool1d(1), nn.Flatten())
        return nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), pool, nn.Linear(4, 3))

    saved = [convolutional().state_dict() for _ in RATES]
    data = torch.randn(9, 2, 8), torch.randint(3, (9,))
    queries = torch.randn(4, 2, 8), torch.randint(3, (4,))
    expected = 0
    for rate, state in zip(RATES, saved, strict=True):
        model = convolutional()
        model.load_state_dict(state)
        g, h = (
            per_sample.sample_gradients(
                model, list(zip(*part, strict=True)), ["0.weight", "0.bias"], cross_entropy
            )
            for part in (data, queries)
        )
        expected = expected + rate * g @ h.T
    found = imu.tracin(
        convolutional(), data, queries, checkpoints=saved, learning_rates=RATES, layers="0"
    )
    per_sample.assert_scores(found, expected)


def test_its_sign_is_that_of_proponents(problem):
    """A small step down a sample's loss lowers the losses that it is a proponent of."""
    model, saved, data, queries = problem
    found = imu.tracin(model, data, queries, checkpoints=saved[:1], learning_rates=1.0)
    model.load_state_dict(saved[0])
    minus = -imu.pairwise_influence(
        imu.capture(model, data), imu.capture(model, queries), curvature="identity"
    )
    torch.testing.assert_close(found, minus)
    model.double().eval()
    head, i, step = model[3], 4, 1e-5
    x, y = data[0].double(), data[1]
    q, t = queries[0].double(), queries[1]

    def losses():
        return nn.functional.cross_entropy(model(q), t, reduction="none").detach()

    before = losses()
    g = torch.autograd.grad(
        nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), [head.weight, head.bias]
    )
    with torch.no_grad():
        for parameter, gradient in zip((head.weight, head.bias), g, strict=True):
            parameter -= step * gradient
    torch.testing.assert_close((before - losses()) / step, found[i].double(), rtol=1e-3, atol=1e-5)


def test_files_wrapped_names_and_the_model_as_it_is(problem, tmp_path):
    model, saved, data, queries = problem
    expected = imu.tracin(model, data, queries, checkpoints=saved, learning_rates=RATES)
    save_tensors(tmp_path / "a.safetensors", saved[0], {})
    torch.save(saved[1], tmp_path / "b.pt")
    wrapped = {f"module.{name}": tensor for name, tensor in saved[2].items()}
    mixed = [tmp_path / "a.safetensors", str(tmp_path / "b.pt"), wrapped]
    found = imu.tracin(model, data, queries, checkpoints=mixed, learning_rates=RATES)
    assert torch.equal(found, expected)
    # References to the model's own tensors, which other checkpoints are loaded into meanwhile.
    model.load_state_dict(saved[2])
    live = [*saved[:2], model.state_dict()]
    found = imu.tracin(model, data, queries, checkpoints=live, learning_rates=RATES)
    assert torch.equal(found, expected)
    model = nn.DataParallel(model)
    found = imu.tracin(model, data, queries, checkpoints=saved, learning_rates=RATES)
    assert torch.equal(found, expected)


def test_generators_are_read_once_and_rates_may_be_one(problem):
    model, saved, data, queries = problem
    expected = imu.tracin(model, data, queries, checkpoints=saved, learning_rates=[0.5] * 3)
    batches = (batch for batch in DataLoader(TensorDataset(*data), batch_size=8))
    found = imu.tracin(model, batches, queries, checkpoints=saved, learning_rates=0.5)
    torch.testing.assert_close(found, expected)


def test_no_gradient_of_a_single_sample_is_formed():
    n, d, c = 40, 300, 50
    model = nn.Linear(d, c)
    data = torch.randn(n, d), torch.randint(c, (n,))
    saved = [copy.deepcopy(model.state_dict())] * 1
    with LargestTensor() as seen:
        imu.tracin(model, data, data, checkpoints=saved, learning_rates=0.1)
        imu.tracin_self_influence(model, data, checkpoints=saved, learning_rates=0.1)
    assert seen.largest <= c * d


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


BAD = {
    "none": (lambda s: [], "checkpoints=.. has none"),
    "a state dict alone": (lambda s: s[0], "pass a list of them"),
    "another architecture": (lambda s: [s[0], make(8).state_dict()], r"checkpoints\[1\] does not"),
    "a name missing": (lambda s: [s[0], without(s[1], "3.bias")], "3.bias"),
    "a name too many": (lambda s: [s[0], {**s[1], "4.bias": torch.ones(3)}], "4.bias"),
    "not finite": (
        lambda s: [s[0], {**s[1], "3.bias": torch.full((3,), float("nan"))}],
        r"checkpoints\[1\]: 3.bias is not finite",
    ),
    "no file": (lambda s: [s[0], "nowhere.pt"], r"checkpoints\[1\]='nowhere.pt' does not exist"),
    "a number": (lambda s: [s[0], 3], r"checkpoints\[1\] is a int"),
    "the same twice": (lambda s: [s[0], s[0]], r"checkpoints\[0\] and \[1\] are the same memory"),
}


@pytest.mark.parametrize("bad, message", BAD.values(), ids=BAD)
def test_checkpoints_that_do_not_fit_are_refused_before_any_work(problem, bad, message):
    model, saved, data, queries = problem
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    before = state_of(model)
    with pytest.raises(InputError, match=message):
        imu.tracin(model, data, queries, checkpoints=bad(saved), learning_rates=1.0)
    assert not calls
    assert_same(before, state_of(model))


def test_what_else_is_refused(problem):
    model, saved, data, queries = problem
    shuffled = DataLoader(TensorDataset(*data), shuffle=True)

    def run(data=data, rates=1.0, **options):
        return imu.tracin(model, data, queries, checkpoints=saved, learning_rates=rates, **options)

    with pytest.raises(InputError, match="data shuffles"):
        run(shuffled)
    with pytest.raises(InputError, match="learning_rates has 2 of them for 3"):
        run(rates=[0.1, 0.2])
    with pytest.raises(InputError, match=r"learning_rates\[1\]=-1"):
        run(rates=[0.1, -1, 0.2])
    with pytest.raises(InputError, match="no option"):
        run(tollerance=1)

    class Moving:
        """Another order at each pass, which nothing about it says."""

        passes = 0

        def __iter__(self):
            self.passes += 1
            yield data[0].roll(self.passes, 0), data[1].roll(self.passes, 0)

    with pytest.raises(InputError, match="another order, at each pass"):
        run(Moving())
    before = state_of(model)

    class Failing(Moving):
        def __iter__(self):
            self.passes += 1
            if self.passes == 2:
                raise KeyboardInterrupt
            yield data

    with pytest.raises(KeyboardInterrupt):
        run(Failing())
    assert_same(before, state_of(model))
