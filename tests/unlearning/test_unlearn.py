"""unlearn end to end: closed form against autograd, stop rules, presets, resuming, restoring."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import imu_fast as imu
from imu_fast.errors import EmptySelectionError, InputError, is_finite
from imu_fast.unlearning.result import DivergedError

CLASSES, WIDTH, N = 5, 12, 40


def make_model(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(4 * 16, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, CLASSES),
    ).to(dtype)
    x, y = torch.randn(200, 1, 4, 4, dtype=dtype), torch.arange(200) % CLASSES
    x += y[:, None, None, None]  # separable: the model has something to forget
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval(), x[:N], y[:N]


@pytest.fixture
def trained():
    return make_model()


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same_state(model, before):
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("objective", ["ce", "margin", "log1mp"])
@pytest.mark.parametrize("alpha", [0.0, 1e-3])
def test_closed_form_head_equals_autograd_on_the_head(trained, objective, alpha):
    model, x, y = trained
    other = copy.deepcopy(model)
    options = dict(objective=objective, alpha=alpha, epochs=3, batch_size=16, lr=0.05)
    a = imu.unlearn(model, (x, y), scope="head", **options)
    b = imu.unlearn(other, (x, y), scope="layers", **options)
    assert torch.equal(a.indices, b.indices)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[key], rtol=1e-9, atol=1e-11)
    # float32 in the recorded loss only: measurements are reported, not trained on.
    assert a.batch_losses == pytest.approx(b.batch_losses, rel=1e-9)


def test_one_step_is_the_formula(trained):
    """One full-batch step of plain SGD: theta - lr * d/dtheta (- sum w f / sum w)."""
    model, x, y = trained
    head = copy.deepcopy(model[-1])
    features = model[:-1](x).detach()
    result = imu.unlearn(
        model, (x, y), epochs=1, batch_size=N, lr=0.1, momentum=0.0, weight_decay=0.0
    )
    rows, w = result.indices, result.weights
    loss = nn.functional.cross_entropy(head(features[rows]), y[rows], reduction="none")
    (-(w * loss).sum() / w.sum()).backward()
    expected = head.weight - 0.1 * head.weight.grad
    torch.testing.assert_close(model[-1].weight, expected, rtol=1e-10, atol=1e-12)
    assert (result.steps, result.epochs, result.stopped_by) == (1, 1, "epochs")


def test_only_the_trained_parameters_change(trained):
    model, x, y = trained
    before = state(model)
    imu.unlearn(model, (x, y), epochs=1)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"7.weight", "7.bias"}
    before = state(model)
    imu.unlearn(model, (x, y), epochs=1, scope="layers", layers=["5"])
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"5.weight", "5.bias"}
    before = state(model)
    imu.unlearn(model, (x, y), epochs=1, scope="all", batchnorm="train")
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == set(before)  # running statistics and their counter drifted too


def test_batchnorm_eval_keeps_running_statistics(trained):
    model, x, y = trained
    mean = model[1].running_mean.clone()
    imu.unlearn(model, (x, y), epochs=2, scope="all")
    assert torch.equal(model[1].running_mean, mean)


@pytest.mark.parametrize("scope", ["head", "layers", "all"])
def test_modes_flags_hooks_and_gradients_are_restored(trained, scope):
    model, x, y = trained
    model.train()
    model[4].eval()
    model[0].weight.requires_grad_(False)
    model[7].weight.grad = torch.ones_like(model[7].weight)
    modes = [m.training for m in model.modules()]
    imu.unlearn(model, (x, y), epochs=1, scope=scope)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 7
    assert torch.equal(model[7].weight.grad, torch.ones_like(model[7].weight))
    assert model[0].weight.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("scope", ["head", "all"])
def test_model_is_as_it_was_after_a_failure_in_the_middle(trained, scope, error):
    model, x, y = trained
    before, calls = state(model), []

    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            calls.append(1)
            if len(calls) == 3:
                raise error("in the middle")
            return super().step(closure)

    with pytest.raises(error, match="in the middle"):
        imu.unlearn(
            model,
            (x, y),
            scope=scope,
            batchnorm="train" if scope == "all" else "eval",
            batch_size=8,
            optimizer=lambda p: Failing(p, lr=0.1),
        )
    assert len(calls) == 3
    assert_same_state(model, before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_inplace_false_leaves_the_model_alone(trained):
    model, x, y = trained
    before = state(model)
    result = imu.unlearn(model, (x, y), epochs=1, inplace=False)
    assert_same_state(model, before)
    assert not torch.equal(result.model[-1].weight, model[-1].weight)


@pytest.mark.parametrize("scope", ["head", "all"])
@pytest.mark.parametrize("method", ["imu", "permuted", "uniform"])
def test_stop_at_half_accuracy_is_met_and_barely(trained, method, scope):
    model, x, y = trained
    stop = imu.StopRule(forget_accuracy=0.5)
    result = imu.unlearn(
        model, (x, y), method=method, scope=scope, lr=0.05, epochs=200, stop=stop, record="step"
    )
    assert result.stopped_by == "forget_accuracy"
    accuracy = imu.evaluate(model, [(x, y)])["accuracy"]
    assert accuracy <= 0.5
    assert result.trajectory[-1]["forget_accuracy"] == pytest.approx(accuracy)
    assert result.trajectory[-2]["forget_accuracy"] > 0.5
    assert 0 < result.step_fraction <= 1
    assert result.trajectory[-1]["step"] == result.steps - 1 + result.step_fraction


def test_stop_by_loss_is_exact_after_bisection(trained):
    model, x, y = trained
    stop = imu.StopRule(forget_loss=2.0)
    whole = copy.deepcopy(model)
    found = imu.unlearn(model, (x, y), lr=0.1, epochs=200, stop=stop, record="step")
    imu.unlearn(whole, (x, y), lr=0.1, epochs=200, max_steps=found.steps)
    before, reached = found.trajectory[-2]["forget_loss"], imu.evaluate(model, [(x, y)])["loss"]
    # The loss is convex in the head, so its slope is largest at the end of the step; 2^-12 of that
    # beyond the line at most.
    beyond = imu.evaluate(whole, [(x, y)])["loss"] - before
    assert before < 2.0 <= reached <= 2.0 + 2 * beyond * 2**-12


def test_stop_by_membership_auc(trained):
    pytest.importorskip("sklearn")
    model, x, y = trained
    torch.manual_seed(1)
    unseen = (x + 0.5 * torch.randn_like(x), y)
    stop = imu.StopRule(membership_auc=0.4, unseen=unseen)
    result = imu.unlearn(model, (x, y), lr=0.05, epochs=300, stop=stop, objective="margin")
    assert result.stopped_by in ("membership_auc", "epochs")


def test_already_deep_enough_makes_no_step(trained):
    model, x, y = trained
    before = state(model)
    result = imu.unlearn(model, (x, y), stop=imu.StopRule(forget_accuracy=1.0))
    assert (result.steps, result.stopped_by) == (0, "forget_accuracy")
    assert_same_state(model, before)


@pytest.mark.parametrize("scope", ["head", "all"])
@pytest.mark.parametrize("reweight", ["once", "epoch", "batch"])
def test_a_seed_gives_the_same_trajectory(trained, scope, reweight):
    model, x, y = trained
    options = dict(
        scope=scope, reweight=reweight, batch_size=16, epochs=3, seed=7, record="step",
        watch={"all": (x, y)},
    )  # fmt: skip
    runs = []
    for _ in range(2):
        torch.rand(3)  # the user's generator must not matter
        runs.append(imu.unlearn(copy.deepcopy(model), (x, y), **options))
    assert runs[0].trajectory == runs[1].trajectory
    assert runs[0].batch_losses == runs[1].batch_losses
    assert {"all_loss", "all_accuracy", "weight_mean"} <= runs[0].trajectory[-1].keys()


def test_the_users_generator_is_not_moved(trained):
    model, x, y = trained
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    imu.unlearn(model, (x, y), epochs=1, scope="all", dropout="train")
    assert torch.equal(torch.rand(2), expected)


def test_shuffling_loaders_do_not_misalign_the_scores(trained):
    """Scores follow the loader's pass; the selected samples and the outcome are those of any."""
    model, x, y = trained
    loader = DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True)
    a = imu.unlearn(copy.deepcopy(model), loader, epochs=1)
    b = imu.unlearn(copy.deepcopy(model), (x, y), epochs=1)
    torch.testing.assert_close(a.scores.sort()[0], b.scores.sort()[0], rtol=1e-12, atol=1e-14)
    weights = [result.weights.sort()[0] for result in (a, b)]
    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-14)
    # The global generator is not moved, so that the same pass can be asked for again.
    again = imu.influence_scores(copy.deepcopy(model), loader)
    torch.testing.assert_close(a.scores, again, rtol=1e-12, atol=1e-14)


def test_only_the_samples_that_the_sampler_draws_are_forgotten(trained):
    """A DataLoader over the whole training set with a sampler for the forget set is common."""
    model, x, y = trained
    data, chosen = TensorDataset(x, y), [30, 2, 17, 5, 11, 2]
    expected = imu.unlearn(copy.deepcopy(model), (x[chosen], y[chosen]), epochs=1).scores
    batches = torch.utils.data.BatchSampler(chosen, batch_size=2, drop_last=False)
    for loader in (
        DataLoader(data, batch_size=2, sampler=chosen),
        DataLoader(data, batch_sampler=batches),
        DataLoader(torch.utils.data.Subset(data, chosen), batch_size=2),
        DataLoader([(x[chosen], y[chosen])], batch_size=None),
    ):
        scores = imu.unlearn(copy.deepcopy(model), loader, epochs=1).scores
        torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-14)


def test_layers_given_as_modules_also_of_a_copy(trained):
    model, x, y = trained
    before = state(model)
    for scope in ("head", "layers"):
        named = imu.unlearn(model, (x, y), scope=scope, layers="7", epochs=1, inplace=False)
        given = imu.unlearn(model, (x, y), scope=scope, layers=model[7], epochs=1, inplace=False)
        assert torch.equal(named.model[7].weight, given.model[7].weight)
        assert not torch.equal(given.model[7].weight, before["7.weight"])
    paper = imu.unlearn(model, (x, y), preset="paper", layers=[model[7]], lr=1e-3, inplace=False)
    assert paper.settings["top_fraction"] == 0.1
    assert_same_state(model, before)


def test_a_model_that_is_itself_the_head():
    head = nn.Linear(6, 3).double()
    x, y = torch.randn(9, 6).double(), torch.arange(9) % 3
    other = copy.deepcopy(head)
    imu.unlearn(head, (x, y), epochs=2)
    imu.unlearn(other, (x, y), epochs=2, scope="layers")
    torch.testing.assert_close(head.weight, other.weight)


def test_permuted_is_the_same_weights_elsewhere(trained):
    model, x, y = trained
    a = imu.unlearn(copy.deepcopy(model), (x, y), epochs=1)
    b = imu.unlearn(copy.deepcopy(model), (x, y), epochs=1, method="permuted")
    assert torch.equal(a.indices, b.indices)
    assert not torch.equal(a.weights, b.weights)
    assert torch.equal(a.weights.sort().values, b.weights.sort().values)


def test_precondition_features_keeps_the_gradients_norm(trained):
    model, x, y = trained
    options = dict(epochs=1, batch_size=N, lr=0.1, momentum=0.0, weight_decay=0.0)
    before = torch.cat([model[-1].weight, model[-1].bias[:, None]], dim=1).detach()
    features = model[:-1](x).detach()
    a = torch.cat([features, torch.ones(N, 1, dtype=x.dtype)], dim=1)
    moment = a.T @ a / N
    moves = {}
    for name, value in {"none": None, "features": "features", "stored": moment}.items():
        changed = copy.deepcopy(model)
        imu.unlearn(changed, (x, y), precondition=value, **options)
        moves[name] = torch.cat([changed[-1].weight, changed[-1].bias[:, None]], 1) - before
    torch.testing.assert_close(moves["features"].norm(), moves["none"].norm())
    torch.testing.assert_close(moves["features"], moves["stored"])
    eps = 1e-2 * moment.trace() / len(moment)
    direct = moves["none"] @ torch.linalg.inv(moment + eps * torch.eye(len(moment)))
    cosine = (direct * moves["features"]).sum() / direct.norm() / moves["features"].norm()
    assert float(cosine.detach()) == pytest.approx(1.0, abs=1e-9)


def test_preset_paper_without_fc_layers_says_what_to_do(trained):
    model, x, y = trained
    with pytest.raises(InputError, match=r"fc.*layers="):
        imu.unlearn(model, (x, y), preset="paper")


@pytest.mark.parametrize("scope", ["head", "all"])
def test_resumed_run_equals_an_uninterrupted_one(trained, tmp_path, scope):
    model, x, y = trained
    options = dict(scope=scope, batch_size=16, reweight="epoch", alpha=1e-4, dropout="eval")
    if scope == "all":
        options |= dict(dropout="train", batchnorm="train")
    whole, part = copy.deepcopy(model), copy.deepcopy(model)
    expected = imu.unlearn(whole, (x, y), epochs=4, **options)
    path = tmp_path / "run.safetensors"
    imu.unlearn(copy.deepcopy(model), (x, y), epochs=2, checkpoint=path, **options)
    result = imu.unlearn(part, (x, y), epochs=4, checkpoint=path, **options)
    assert_same_state(part, state(whole))
    assert result.trajectory == expected.trajectory
    assert result.steps == expected.steps
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]

    with pytest.raises(InputError, match=r"belongs to another run.*lr.*resume=False"):
        imu.unlearn(copy.deepcopy(model), (x, y), checkpoint=path, lr=0.5, **options)


def test_divergence_is_an_error_and_the_model_is_kept(trained):
    model, x, y = trained
    before = state(model)
    with pytest.raises(DivergedError, match="lr=1e\\+200"):
        imu.unlearn(model, (x, y), lr=1e200, epochs=50)
    assert_same_state(model, before)


def test_nothing_negative():
    # Two samples with opposite gradients: the mean is zero, and so is every score.
    features = torch.ones(2, CLASSES, dtype=torch.float64)
    head = nn.Sequential(nn.Linear(CLASSES, 2)).double()
    with torch.no_grad():
        head[0].weight.zero_()
        head[0].bias.zero_()
    data = (features, torch.tensor([0, 1]))
    with pytest.raises(EmptySelectionError, match="on_empty='uniform'"):
        imu.unlearn(head, data)
    with pytest.warns(UserWarning, match="uniform weights"):
        result = imu.unlearn(head, data, on_empty="uniform", epochs=1)
    assert result.weights.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="gradient"), "method='gradient' is unknown; choose one of auto, imu"),
        (dict(scope="body"), "scope='body'"),
        (dict(objective="mse"), "objective='mse'"),
        (dict(reweight="never"), "reweight='never'"),
        (dict(curvature="hessian"), "curvature='hessian'.*fisher_diag"),
        (dict(damping=0), "damping=0 must be finite and > 0"),
        (dict(damping=float("nan")), "damping=nan"),
        (dict(lr=-1), "lr=-1"),
        (dict(epochs=0), "epochs=0"),
        (dict(batch_size=2.5), "batch_size=2.5"),
        (dict(top_fraction=1.5), "top_fraction=1.5"),
        (dict(precondition="adam"), "precondition='adam'"),
        (dict(precondition="features", scope="all"), "no option precondition.*scope='head' would"),
        (dict(precondition=torch.eye(3)), r"expected the features' second moment \[13, 13\]"),
        (dict(batchnorm="train"), "use scope='layers'"),
        (dict(stop=0.5), "StopRule"),
        (dict(preset="nature"), "preset='nature'"),
        (dict(scope="layers", layers=["nine"]), "'nine', which is no module"),
        (dict(watch={"forget": []}), "choose another name"),
        (dict(watch=[torch.zeros(2, 8)]), "watch is a list; pass a dict"),
        (dict(watch={3: []}), "watch has the name 3; names are texts"),
        (dict(milestones={None: imu.StopRule(forget_loss=1.0)}), "milestones has the name None"),
    ],
)
def test_bad_arguments(trained, options, message):
    model, x, y = trained
    before = state(model)
    with pytest.raises(InputError, match=message):
        imu.unlearn(model, (x, y), **options)
    assert_same_state(model, before)


def test_bad_data(trained):
    model, x, y = trained
    with pytest.raises(InputError, match="empty"):
        imu.unlearn(model, [])
    with pytest.raises(InputError, match="empty"):
        imu.unlearn(model, (x[:0], y[:0]))
    with pytest.raises(InputError, match="labels"):
        imu.unlearn(model, (x, y + 100))
    bad = x.clone()
    bad[3] = torch.nan
    with pytest.raises(InputError, match="sample 3"):
        imu.unlearn(model, (bad, y))
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        imu.unlearn("model", (x, y))
    with pytest.raises(InputError, match="sample 2 has 0 valid labels"):
        imu.unlearn(model, (x, torch.where(torch.arange(N) == 2, -100, y)))


def test_stop_rule_arguments():
    with pytest.raises(InputError, match="no condition"):
        imu.StopRule()
    with pytest.raises(InputError, match="forget_accuracy=2"):
        imu.StopRule(forget_accuracy=2)
    with pytest.raises(InputError, match="unseen=None"):
        imu.StopRule(membership_auc=0.5)


def test_any_optimizer_and_max_steps(trained):
    model, x, y = trained
    result = imu.unlearn(
        model, (x, y), optimizer=lambda p: torch.optim.Adam(p, lr=1e-2), max_steps=3, batch_size=8
    )
    assert (result.steps, result.stopped_by) == (3, "max_steps")


def test_dict_batches_and_list_of_batches(trained):
    model, x, y = trained

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(model)

        def forward(self, pixel_values):
            return {"logits": self.net(pixel_values)}

    batches = [
        {"pixel_values": x[:25], "labels": y[:25]},
        {"pixel_values": x[25:], "labels": y[25:]},
    ]
    a = imu.unlearn(Wrapped(), batches, epochs=1, scope="layers")
    b = imu.unlearn(copy.deepcopy(model), [(x[:25], y[:25]), (x[25:], y[25:])], epochs=1)
    torch.testing.assert_close(a.scores, b.scores)


class Rotated(torch.nn.Module):
    """With a complex buffer, as rotary embeddings have."""

    def __init__(self):
        super().__init__()
        self.register_buffer("turn", torch.polar(torch.ones(4), torch.arange(4.0)))
        self.fc = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(torch.view_as_real(torch.view_as_complex(x) * self.turn).flatten(1))


def test_a_network_may_have_complex_buffers():
    model, x, y = Rotated(), torch.randn(12, 4, 2), torch.arange(12) % 3
    before = model.fc.weight.detach().clone()
    result = imu.unlearn(model, (x, y), "uniform", scope="all", lr=0.01, epochs=2)
    assert result.steps == 2 and not torch.equal(model.fc.weight, before)


@pytest.mark.parametrize("bad", [complex("nan"), complex(0, float("inf"))])
def test_complex_numbers_are_finite_or_not(bad):
    numbers = torch.full((3,), 1e38 + 1e38j)
    assert is_finite(numbers) and is_finite(numbers.conj())
    numbers[1] = bad
    assert not is_finite(numbers)
