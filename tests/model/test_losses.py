"""Every loss through the doors, against autograd of the model's own loss in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from per_sample import assert_scores, sample_gradients, scores
from torch import nn
from torch.nn import functional as F

import imu_fast as imu
from imu_fast.errors import InputError
from imu_fast.evaluation.shallowness import relearning_steps
from imu_fast.losses.auto import AutoLoss

N, OUTPUTS, LAM = 11, 3, 1e-2
CE, BCE, SE = imu.CrossEntropy, imu.BinaryCrossEntropy, imu.SquaredError
WEIGHTS = (0.5, 2.0, 1.0)


class Net(nn.Module):
    """A head, or one whose outputs are cooled before they are returned."""

    def __init__(self, outputs=OUTPUTS, temperature=1.0):
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, outputs)
        self.temperature = temperature

    def forward(self, x):
        z = self.head(self.body(x).tanh())
        return z / self.temperature if self.temperature != 1 else z


def mean_of(function, **options):
    """A sample's loss: over its outputs summed, over its rows the mean."""
    return lambda z, y: function(z, y.double(), reduction="sum", **options)


def ce(z, y, **options):
    weight = torch.tensor(WEIGHTS).double()
    return F.cross_entropy(
        z, y if z.shape != y.shape else y.double(), weight=weight, reduction="sum", **options
    )


# Ours, labels, and torch's sum of one row.
LOSSES = {
    "soft": (
        CE(class_weights=WEIGHTS, label_smoothing=0.1),
        lambda *rows: torch.softmax(torch.randn(*rows, OUTPUTS), dim=-1),
        lambda z, y: ce(z, y, label_smoothing=0.1),
    ),
    "hard": (
        CE(class_weights=WEIGHTS),
        lambda *rows: torch.randint(OUTPUTS, rows),
        ce,
    ),
    "binary": (
        BCE(pos_weight=WEIGHTS),
        lambda *rows: torch.randint(2, (*rows, OUTPUTS)),
        mean_of(F.binary_cross_entropy_with_logits, pos_weight=torch.tensor(WEIGHTS).double()),
    ),
    "squared": (SE(), lambda *rows: torch.randn(*rows, OUTPUTS), mean_of(F.mse_loss)),
}
every_loss = pytest.mark.parametrize("which", LOSSES)


def gradients(model, loss, x, y, names):
    """[n, P] of each named layer, one sample at a time, in float64."""
    wide = copy.deepcopy(model).double().eval()
    layers = [wide.get_submodule(name) for name in names]
    found = []
    for i in range(len(x)):
        total = loss(wide, x[i : i + 1], y[i : i + 1])
        parts = []
        for layer in layers:
            g = torch.autograd.grad(total, [layer.weight, layer.bias], retain_graph=True)
            parts.append(torch.cat([g[0], g[1][:, None]], dim=1))
        found.append(parts)
    return [torch.stack([parts[k] for parts in found]) for k in range(len(names))]


def check(factors, truth):
    from imu_fast import reference

    g = reference.sample_gradients(factors.delta, factors.act, factors.offsets, factors.has_bias)
    assert float((g - truth).norm() / truth.norm()) <= 1e-5


@every_loss
@pytest.mark.parametrize("rows", [(N,), (N, 4)], ids=["samples", "positions"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_factors_of_a_head_and_of_layers(which, rows, temperature):
    torch.manual_seed(0)
    ours, labels, torchs = LOSSES[which]
    model = Net(temperature=temperature)
    x, y = torch.randn(*rows, 6), labels(*rows)

    def loss(wide, one, label):
        z = wide(one.double()).reshape(-1, OUTPUTS)
        flat = label.reshape(len(z), *label.shape[len(rows) :])
        return sum(torchs(a, b) for a, b in zip(z, flat, strict=True)) / len(z)

    head, body = gradients(model, loss, x, y, ["head", "body"])
    found = imu.capture(model, [(x[:7], y[:7]), (x[7:], y[7:])], loss=ours)
    check(found, head)
    both = imu.capture(model, (x, y), ["head", "body"], loss=ours)
    for one, truth in zip(both, [body, head], strict=True):
        check(one, truth)
    # Its GGN is the Hessian of the mean loss in the head, which is linear.
    for curvature in ("ggn", "ggn_block", "kfac", "ekfac", "fisher", "fisher_diag"):
        scores = imu.influence_scores(model, (x, y), curvature=curvature, damping=LAM, loss=ours)
        again = imu.influence_scores(found, curvature=curvature, damping=LAM)
        torch.testing.assert_close(scores, again, rtol=1e-4, atol=1e-5)
    wide = copy.deepcopy(model).double()
    theta = torch.cat([wide.head.weight, wide.head.bias[:, None]], dim=1).detach()

    def mean_loss(flat):
        t = flat.view_as(theta)
        h = wide.body(x.double()).tanh()
        z = (h @ t[:, :-1].T + t[:, -1]) / temperature
        z, flat_y = z.reshape(-1, OUTPUTS), y.reshape(-1, *y.shape[len(rows) :])
        return sum(torchs(a, b) for a, b in zip(z, flat_y, strict=True)) / len(z)

    matrix = torch.autograd.functional.hessian(mean_loss, theta.flatten())
    matrix += LAM * torch.eye(len(matrix))
    g = head.flatten(1)
    truth = -(g @ torch.linalg.solve(matrix, g.mean(dim=0)))
    scores = imu.influence_scores(model, (x, y), curvature="ggn", damping=LAM, loss=ours)
    assert float((scores.double() - truth).norm() / truth.norm()) <= 1e-5


@pytest.mark.parametrize("shape", [(N,), (N, 1)])
@pytest.mark.parametrize("loss", [BCE(), SE()], ids=["binary", "squared"])
@pytest.mark.parametrize("layers", ["head", ["head"]], ids=str)
def test_one_output_with_labels_of_either_shape(shape, loss, layers):
    model, x, y = Net(1), torch.randn(N, 6), torch.randint(2, shape)
    found = imu.capture(model, (x, y), layers, loss=loss)
    found = found[0] if isinstance(found, list) else found
    function = F.binary_cross_entropy_with_logits if loss == BCE() else F.mse_loss

    def own(wide, one, label):
        return function(wide(one.double()), label.double().view(1, 1), reduction="sum")

    check(found, gradients(model, own, x, y, ["head"])[0])


def test_flat_options_belong_to_the_named_loss():
    torch.manual_seed(0)
    model, x, y = Net(), torch.randn(N, 6), torch.randint(2, (N, OUTPUTS))
    for given, loss in (
        ({"pos_weight": WEIGHTS}, BCE(pos_weight=WEIGHTS)),
        ({"ignore_index": 7}, BCE(ignore_index=7)),
    ):
        a = imu.influence_scores(model, (x, y), loss="binary_cross_entropy", **given)
        assert torch.equal(a, imu.influence_scores(model, (x, y), loss=loss))
    hard = y[:, 0]
    smooth = imu.self_influence(model, (x, hard), label_smoothing=0.2, class_weights=WEIGHTS)
    loss = CE(label_smoothing=0.2, class_weights=WEIGHTS)
    assert torch.equal(smooth, imu.self_influence(model, (x, hard), loss=loss))
    with pytest.raises(InputError, match="has no option pos_weight"):
        imu.influence_scores(model, (x, hard), pos_weight=2.0)


def test_labels_that_do_not_fit_are_refused():
    model, x = Net(), torch.randn(N, 6)
    for y, options, message in (
        (
            torch.rand(N),
            {"loss": "squared_error"},
            r"squared_error takes labels of shape \(11, 3\)",
        ),
        (torch.rand(N, 3), {}, "no row of probabilities"),
        (torch.rand(N, 3), {"loss": "auto"}, "loss='auto' follows config.problem_type"),
        (5 * torch.rand(N, 3) + 2, {"loss": "binary_cross_entropy"}, r"outside \[0, 1\]"),
    ):
        for layers in ("head", "body"):
            with pytest.raises(InputError, match=message):
                imu.capture(model, (x, y), layers, **options)
    with pytest.raises(InputError, match="follows a model, and there is none here"):
        imu.GradientFactors.from_head(x, torch.randn(3, 6), None, torch.ones(N), loss="auto")


@pytest.mark.parametrize(
    "loss", [BCE(), SE(), CE(label_smoothing=0.1), CE(class_weights=WEIGHTS), "auto"], ids=str
)
def test_doors_for_classifiers_refuse_other_losses_by_name(loss):
    model, x, y = Net(), torch.randn(N, 6), torch.randint(OUTPUTS, (N,))
    for door in (
        lambda: imu.unlearn(model, (x, y), loss=loss),
        lambda: imu.unlearn(model, (x, y), method="margin_edit", loss=loss),
        lambda: imu.evaluate(model, (x, y), loss=loss),
    ):
        with pytest.raises(InputError, match="takes loss=.*where it is for classifiers"):
            door()


def test_soft_labels_are_refused_where_classes_are_counted():
    model, x, y = Net(), torch.randn(N, 6), torch.softmax(torch.randn(N, OUTPUTS), dim=1)
    for door in (
        lambda: imu.unlearn(model, (x, y)),
        lambda: imu.unlearn(model, (x, y), scope="all"),
        lambda: imu.evaluate(model, (x, y)),
        lambda: relearning_steps(model, (x, y), target=1.0, lr=0.1),
        lambda: relearning_steps(model, (x, y), target=1.0, lr=0.1, scope="all"),
    ):
        with pytest.raises(InputError, match="one-hot or soft labels, which are not supported"):
            door()


PROBLEMS = {
    "single_label_classification": lambda n, c: torch.randint(c, (n,)),
    "multi_label_classification": lambda n, c: torch.randint(2, (n, c)).float(),
    "regression": torch.randn,
}


def transformer(outputs, kind):
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(
        vocab_size=50, dim=16, hidden_dim=24, n_layers=1, n_heads=2, max_position_embeddings=16,
        num_labels=outputs, problem_type=kind, dropout=0.0, attention_dropout=0.0,
        seq_classif_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.DistilBertForSequenceClassification(config).eval()


@pytest.mark.parametrize(
    ("kind", "outputs"),
    [(kind, outputs) for kind in (*PROBLEMS, None) for outputs in (1, 3)][1:],  # one is no class
)
def test_auto_is_the_loss_of_a_transformers_model(kind, outputs):
    """Also where it decides by the number of outputs and the labels' dtype."""
    kinds = [kind] if kind else ["regression"] if outputs == 1 else list(PROBLEMS)[:2]
    for decided in kinds:
        model = transformer(outputs, kind)
        ids = torch.randint(50, (N, 7))
        y = PROBLEMS[decided](N, outputs)
        if decided == "regression" and outputs == 1:
            y = y[:, 0]

        def own(wide, one, label):
            label = label.double() if label.is_floating_point() else label
            return wide(input_ids=one, labels=label).loss

        truth = gradients(model, own, ids, y, ["classifier", "pre_classifier"])
        data = [{"input_ids": ids[:6], "labels": y[:6]}, {"input_ids": ids[6:], "labels": y[6:]}]
        check(imu.capture(model, data, loss="auto"), truth[0])
        for one in imu.capture(model, data, ["classifier", "pre_classifier"], loss="auto"):
            check(one, truth[0 if one.name == "classifier" else 1])
        assert model.config.problem_type == kind


@pytest.mark.parametrize("kind", ["multi_label_classification", None])
def test_one_hot_rows_are_classes_unless_the_loss_is_asked_to_follow_the_model(kind, caplog):
    """Of such rows a transformers model makes one loss per class; what differs is said."""
    model, ids = transformer(3, kind), torch.randint(50, (N, 7))
    y = torch.nn.functional.one_hot(torch.arange(N) % 3, 3).float()
    with caplog.at_level("WARNING", "imu_fast"):
        imu.capture(model, {"input_ids": ids, "labels": y})
    assert "the model's own loss on the first samples is" in caplog.text
    assert "loss='auto' takes the model's own kind of loss" in caplog.text
    caplog.clear()
    imu.capture(model, {"input_ids": ids, "labels": y}, loss="auto")
    assert not caplog.text


def test_auto_of_a_language_model_is_cross_entropy():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(20, (5, 6))
    data = [{"input_ids": ids, "labels": ids}]
    found = imu.capture(model, data, loss="auto", shift=True)
    assert found.loss == CE(shift=False), "of rows that are lined up with their labels"
    assert torch.equal(found.delta, imu.capture(model, data, shift=True).delta)
    assert torch.equal(found.delta, imu.capture(model, data, loss="auto").delta)


def test_auto_takes_no_option_that_its_loss_does_not_have():
    labels = torch.zeros(2, 3)
    for kind in ("regression", "multi_label_classification"):
        with pytest.raises(InputError, match=f"shift=True is for .* is {kind}"):
            AutoLoss(problem_type=kind, shift=True).of(labels, labels.shape)
    with pytest.raises(InputError, match="ignore_index=-1: loss='auto' is regression"):
        AutoLoss(problem_type="regression", ignore_index=-1).of(labels, labels.shape)


@pytest.mark.parametrize("name", ["shift", "shift_labels"])
def test_shift_is_the_losses_own_option_under_either_name(name):
    """Beside ``loss=`` it was dropped, or did nothing, under its second name."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 3), torch.randn(5, 6, 4)
    y = torch.randint(3, (5, 6))
    found = {
        value: imu.capture(model, (x, y), loss="cross_entropy", **{name: value}).losses
        for value in (True, False)
    }
    for value, losses in found.items():
        rows, of = (model(x)[:, :-1], y[:, 1:]) if value else (model(x), y)
        own = torch.nn.functional.cross_entropy(rows.mT, of, reduction="none").mean(1)
        torch.testing.assert_close(losses, own.detach())
    for loss in ("squared_error", "binary_cross_entropy", SE()):
        with pytest.raises(InputError, match=f"no option {name};.*'cross_entropy' would"):
            imu.capture(model, (x, torch.zeros(5, 6, 3)), loss=loss, **{name: True})
    with pytest.raises(InputError, match=f"object, which holds its own options; give {name} to it"):
        imu.capture(model, (x, y), loss=CE(), **{name: True})
    with pytest.raises(InputError, match="are two names of one option"):
        imu.capture(model, (x, y), shift=True, shift_labels=False)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("loss", ["cross_entropy", "auto"])
def test_logits_without_positions_are_not_shifted(loss, soft):
    model, x, y = torch.nn.Linear(4, 3), torch.randn(5, 4), torch.arange(5) % 3
    if soft:
        y = torch.nn.functional.one_hot(y, 3).float()
        loss = CE(shift=True) if loss == "cross_entropy" else AutoLoss(by_labels=True, shift=True)
    given = {"loss": loss} if soft else {"loss": loss, "shift": True}
    for call in (imu.capture, imu.parameter_importance, imu.self_influence):
        with pytest.raises(InputError, match="shift=True is for"):
            call(model, (x, y), **given)


def test_what_auto_is_made_of():
    with pytest.raises(InputError, match="problem_type='ranking' is unknown"):
        AutoLoss(problem_type="ranking")
    labels = torch.zeros(2, 3)
    assert AutoLoss(problem_type="regression").of(labels, labels.shape) == SE(reduction="mean")
    loss = AutoLoss(by_labels=True, ignore_index=5)
    assert loss.of(labels, labels.shape) == BCE(reduction="mean", ignore_index=5)
    assert loss.of(labels.long(), labels.shape) == CE(ignore_index=5)
    for call in (loss.valid, lambda y: loss.residual(y, y, None)):
        with pytest.raises(InputError, match="there is none here"):
            call(labels)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "class_weights": WEIGHTS}])
@pytest.mark.parametrize("first", ["indices", "probabilities"])
@pytest.mark.parametrize("layers", ["head", "body"])
def test_some_batches_may_have_indices_and_others_probabilities(layers, first, options):
    """As loaders that mix samples now and then have them."""
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(N, 6).double()
    hard, soft = torch.arange(6) % OUTPUTS, torch.rand(N - 6, OUTPUTS).double().softmax(dim=1)
    rows = torch.cat([F.one_hot(hard, OUTPUTS).double(), soft])
    batches = [(x[:6], hard), (x[6:], soft)]
    order = torch.arange(N) if first == "indices" else torch.arange(N).roll(N - 6)
    batches = batches if first == "indices" else batches[::-1]
    alike = {"layers": layers, "curvature": "fisher", "damping": LAM, **options}
    found = imu.influence_scores(model, batches, **alike)
    truth = imu.influence_scores(model, (x[order], rows[order]), **alike)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=0)


RULED_OUT = {
    "filled": lambda z, value: z.masked_fill(torch.arange(OUTPUTS) > 1, value),
    "written": lambda z, value: torch.cat([z[:, :2], torch.full_like(z[:, 2:], value)], dim=1),
}


@pytest.mark.parametrize("how", RULED_OUT)
@pytest.mark.parametrize("layers", ["head", ["body"]])
def test_smoothing_where_a_class_is_ruled_out(how, layers):
    """The class has a share of the label, and no gradient: it is a constant."""
    model, x, y = Net(), torch.randn(N, 6), torch.randint(2, (N,))
    value = [-1e4]
    model.register_forward_hook(lambda m, args, z: RULED_OUT[how](z, value[0]))

    def loss(model, sample):
        z = model(sample[0][None].double())
        return F.cross_entropy(z, sample[1][None], label_smoothing=0.1)

    name = "head" if layers == "head" else "body"
    names = [f"{name}.weight", f"{name}.bias"]
    truth = scores(sample_gradients(model, zip(x, y, strict=True), names, loss))
    found = imu.influence_scores(model, (x, y), layers=layers, label_smoothing=0.1)
    assert_scores(found, truth)
    if layers == "head":
        value[0] = -torch.inf
        with pytest.raises(InputError, match="logits are not finite at sample 0"):
            imu.influence_scores(model, (x, y), label_smoothing=0.1)


def test_batches_of_indices_and_of_probabilities_behind_a_temperature():
    model, x, y = Net(temperature=0.4), torch.randn(N, 6), torch.randint(OUTPUTS, (N,))
    soft = torch.softmax(torch.randn(4, OUTPUTS), dim=1)
    whole = torch.cat([F.one_hot(y[:7], OUTPUTS).float(), soft])
    for curvature in ("ggn", "kfac", "fisher_diag"):
        mixed = imu.influence_scores(model, [(x[:7], y[:7]), (x[7:], soft)], curvature=curvature)
        expected = imu.influence_scores(model, (x, whole), curvature=curvature)
        torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)
