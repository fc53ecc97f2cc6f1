"""What surrounds a call (contexts, random streams, threads, devices) is as it was afterwards."""

from __future__ import annotations

import copy
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import pytest
import torch
from guarded import MODELS, Counter, data, looked_at, same, state
from torch import nn

import imu_fast as imu
from imu_fast.ambient import plain_torch
from imu_fast.errors import InputError
from imu_fast.model.guard import exclusive

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated", "ignore:.*spectral")


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
