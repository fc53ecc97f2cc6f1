"""Self-distillation: its steps beside dense float64 autograd, its targets, what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import imu_fast as imu
from imu_fast.errors import InputError
from imu_fast.unlearning.edit.targets import lowered, softened

LAM, EPS, LR = 1e-2, 0.1, 1e-3


def network(seed=0, conv=True):
    torch.manual_seed(seed)
    first = nn.Conv2d(1, 3, 2) if conv else nn.Linear(9, 12)
    flat = [nn.Flatten()] if conv else []
    body = [first, nn.Tanh(), *flat, nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)]
    return nn.Sequential(*body).double()


def samples(n=24, seed=1, conv=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 3, 3, generator=generator, dtype=torch.float64)
    return (x if conv else x.flatten(1)), torch.arange(n) % 3


def matrix(layer):
    return torch.cat([layer.weight.detach().flatten(1), layer.bias.detach()[:, None]], dim=1)


def dense_sums(model, layer, x):
    """``B (x) A / n`` of a layer, one sample and one class at a time by autograd: [P, P]."""
    outputs = inputs = 0.0
    for one in x.split(1):
        seen = {}
        hook = layer.register_forward_hook(lambda m, i, o, seen=seen: seen.update(a=i[0], o=o))
        z = model(one)
        hook.remove()
        act = seen["a"]
        if isinstance(layer, nn.Conv2d):
            act = nn.functional.unfold(act, layer.kernel_size)[0].T
        act = torch.cat([act, torch.ones_like(act[:, :1])], dim=1).detach()
        inputs = inputs + act.T @ act / len(act)
        p = z.detach().softmax(1)[0]
        root = torch.diag(p.sqrt()) - torch.outer(p, p.sqrt())
        for column in root.T:
            [s] = torch.autograd.grad(z, seen["o"], column[None], retain_graph=True)
            s = s.flatten(2)[0].T if s.dim() == 4 else s
            outputs = outputs + s.T @ s
    return torch.kron(outputs, inputs) / len(x)


def dense_head(model, x):
    """The Hessian of the head's summed loss: [P, P]."""
    act = model[:-1](x).detach()
    act = torch.cat([act, torch.ones_like(act[:, :1])], dim=1)
    p = model(x).detach().softmax(1)
    b = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("ncd,ni,nj->cidj", b, act, act).reshape(3 * act.shape[1], -1)


def damped(full, decay):
    return full + (decay + EPS * float(full.trace()) / len(full)) * torch.eye(len(full)).double()


@pytest.mark.parametrize("with_summary", [True, False])
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_step_is_the_natural_gradient_of_dense_autograd(with_summary, calibrated, tmp_path):
    model, (x, y) = network(), samples()
    forget = x[:7], model(x[:7]).argmax(1)  # all right
    options = {"lr": LR, "eps": EPS, "max_steps": 1, "calibrated": calibrated}
    n, kept = 0, None
    if with_summary:
        kept = imu.save_summary(model, (x, y), tmp_path / "s", weight_decay=LAM)
        assert list(kept.inner) == ["0", "3"]
        n = len(x) - 7
    with pytest.warns(UserWarning, match="is not reached"):
        result = imu.unlearn(
            model,
            forget,
            "self_distillation",
            stop=imu.StopRule(forget_accuracy=0.1),
            summary=kept,
            inplace=False,
            **options,
        )
    assert result.steps == 1 and result.stopped_by == "max_steps" and result.reached is False
    logits = model(forget[0]).detach()
    aim = lowered(logits, forget[1], 0.1, 0.2)
    aim = (softened(aim, forget[1]) if calibrated else aim).softmax(1)
    loss = -(aim * model(forget[0]).log_softmax(1)).sum()
    for place in (0, 3, 5):
        layer = model[place]
        grads = torch.autograd.grad(loss, [layer.weight, layer.bias], retain_graph=True)
        g = torch.cat([grads[0].flatten(1), grads[1][:, None]], dim=1)
        whole = dense_head if place == 5 else lambda m, some, at=layer: dense_sums(m, at, some)
        full = whole(model, forget[0])
        if with_summary:
            if place == 5:
                full = whole(model, x) - full
            else:  # of both factors what is left
                full = whole(model, x[7:])
        step = torch.linalg.solve(damped(full, n * LAM), g.flatten()).view_as(g)
        found = matrix(result.model[place]) - matrix(layer)
        torch.testing.assert_close(found, -LR * step, rtol=1e-9, atol=1e-12)


def test_a_forget_set_predicted_with_certainty_is_forgotten():
    """Its Hessian is next to nothing, so that the first steps by its inverse are far too long."""
    model, (x, _) = network(), samples()
    with torch.no_grad():
        for parameter in model[5].parameters():
            parameter.mul_(100)
    labels = model(x).argmax(1)
    result = imu.unlearn(
        model, (x, labels), "self_distillation", stop=imu.StopRule(unseen_accuracy=0.5)
    )
    assert result.reached and result.trajectory[-1]["forget_accuracy"] <= 0.5


def test_a_run_that_finds_no_descent_says_so(monkeypatch):
    monkeypatch.setattr("imu_fast.unlearning.edit.distillation._HALVINGS", 0)
    model, (x, _) = network(), samples()
    rule = imu.StopRule(unseen_accuracy=0.5)
    with pytest.warns(UserWarning, match="is not reached"):
        result = imu.unlearn(model, (x, model(x).argmax(1)), "self_distillation", stop=rule)
    assert (result.steps, result.stopped_by, result.reached) == (0, "no_descent", False)


def test_targets_are_lowered_by_the_least_that_gives_the_accuracy():
    torch.manual_seed(0)
    z, y = torch.randn(40, 5, dtype=torch.float64), torch.randint(5, (40,))
    z[torch.arange(40), y] += 1.5
    before = (z.argmax(1) == y).double().mean()
    for accuracy in (0.5, 0.31, 0.0):
        found = lowered(z, y, accuracy, 1e-9)
        right = (found.argmax(1) == y).double().mean()
        assert right == int(accuracy * 40 + 1e-9) / 40 < before
        fell = (z - found)[torch.arange(40), y]
        assert fell.max() - fell.min() < 1e-12
        less = z.clone()
        less[torch.arange(40), y] -= fell[0] - 1e-6
        assert (less.argmax(1) == y).double().mean() > right
        others = torch.ones_like(z, dtype=torch.bool).scatter(1, y[:, None], False)
        assert torch.equal(found[others], z[others])
    assert torch.equal(lowered(z, y, 1.0, 0.5), z)
    assert torch.equal(softened(z, y), z), "as confident as right, or less"
    mean = softened(10 * z, y).softmax(1).amax(1).mean()
    assert mean <= before and mean == pytest.approx(float(before), abs=1e-3)


@pytest.mark.parametrize("given", ["own", "teacher"])
def test_it_comes_to_its_depths_and_leaves_the_rest_as_it_was(given):
    model, (x, y) = network(conv=False), samples(conv=False)
    y = model(x).argmax(1)
    frozen = model[0]
    for p in frozen.parameters():
        p.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    passed = []
    options = {} if given == "own" else {"targets": (model(x) / 2).detach().softmax(1)}
    result = imu.unlearn(
        model,
        (x, y),
        "self_distillation",
        milestones={"three quarters": imu.StopRule(forget_accuracy=0.75)},
        stop=imu.StopRule(unseen_accuracy=0.5),
        on_milestone=lambda name, record: passed.append((name, record["forget_accuracy"])),
        **options,
    )
    assert result.reached and result.stopped_by == "unseen_accuracy"
    assert (model(x).argmax(1) == y).double().mean() <= 0.5
    [(name, accuracy)] = passed
    assert name == "three quarters" and 0.5 < accuracy <= 0.75
    assert result.settings["layers"] == ["2", "4"], "a frozen layer does not move"
    for name in ("0.weight", "0.bias"):
        assert torch.equal(model.state_dict()[name], before[name])
    again = imu.unlearn(
        model, (x, y), "self_distillation", stop=imu.StopRule(unseen_accuracy=0.9), inplace=False
    )
    assert again.steps == 0 and again.reached


def test_progress_is_shown_where_it_is_asked_for(capsys):
    model, x = network(conv=False), samples(conv=False)[0]
    stop = imu.StopRule(forget_accuracy=0.5)
    for asked in (False, True):
        data = (x, model(x).argmax(1))
        imu.unlearn(model, data, "self_distillation", stop=stop, progress=asked, inplace=False)
        assert ("unlearn" in capsys.readouterr().err) == asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "stop=None with method='self_distillation': the targets are made for an accuracy"),
        ({"stop": imu.StopRule(forget_loss=2.0)}, "StopRule.forget_loss=2. with method="),
        ({"targets": torch.ones(24, 3)}, "targets=Tensor: pass probabilities"),
        ({"targets": torch.ones(2, 3) / 3}, r"targets has shape \(2, 3\)"),
        ({"layers": ["nothing"]}, "nothing"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"summary": "none"}, "summary has no K-FAC of a layer before the head"),
        ({"summary": "one", "layers": ["0"]}, "summary has no K-FAC of layer '0'; it has '3'"),
        ({"summary": "other"}, "summary is of other weights of layer '3'"),
    ],
)
def test_what_it_refuses_and_the_model_is_as_it_was(options, message, tmp_path):
    model, data = network(), samples()
    if isinstance(summary := options.get("summary"), str):
        inner = None if summary == "none" else ["3"]
        options = dict(options)
        options["summary"] = imu.save_summary(model, data, tmp_path / "s", inner_layers=inner)
        if summary == "other":
            with torch.no_grad():
                model[3].weight += 1.0
    before = copy.deepcopy(model.state_dict())
    data = data if "targets" in options else (data[0][:6], data[1][:6])
    given = {"stop": imu.StopRule(forget_accuracy=0.0), **options} if options else {}
    with pytest.raises(InputError, match=message):
        imu.unlearn(model, data, "self_distillation", **given)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_certain_teacher_is_taught_from():
    """Targets of probability one have no second label to lower the first to."""
    model, (x, _) = network(), samples()
    own = model(x).argmax(1)
    certain = nn.functional.one_hot(own, 3).float()
    result = imu.unlearn(
        model,
        (x, own),
        "self_distillation",
        targets=certain,
        stop=imu.StopRule(forget_accuracy=0.5),
    )
    assert result.reached


def test_depths_that_one_step_passes_are_at_one_place():
    model, (x, _) = network(), samples()
    rule, at = imu.StopRule(forget_accuracy=0.5), []
    result = imu.unlearn(
        model,
        (x, model(x).argmax(1)),
        "self_distillation",
        stop=rule,
        milestones={"half": rule},
        on_milestone=lambda _, record: at.append(record["step"]),
    )
    assert result.trajectory[-1]["step"] == at[0] == result.steps - 1 + result.step_fraction
    assert result.step_fraction < 1


class Beside(nn.Module):
    """A layer that runs, and on which no loss depends."""

    def __init__(self):
        super().__init__()
        self.first, self.beside, self.head = nn.Linear(9, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.first(x).tanh()
        return self.head(h + 0 * self.beside(h.detach()).detach())


def test_a_layer_without_a_signal_moves_only_where_it_is_named():
    torch.manual_seed(0)
    model, (x, _) = Beside().double(), samples(conv=False)
    options = {"stop": imu.StopRule(forget_accuracy=0.5)}
    forget = x, model(x).argmax(1)
    with pytest.raises(InputError, match="does not depend on the layer"):
        imu.unlearn(model, forget, "self_distillation", layers="beside", **options)
    result = imu.unlearn(model, forget, "self_distillation", **options)
    assert result.reached and result.settings["layers"] == ["first", "head"]


@pytest.mark.parametrize("method", ["self_distillation", "auto"])
def test_a_head_whose_output_is_made_into_the_logits_is_refused_with_a_way_out(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.LayerNorm(4)).double()
    x = torch.randn(20, 5).double()
    data, options = (x, model(x).argmax(1)), {"task": "samples"} if method == "auto" else {}
    with pytest.raises(
        imu.InputError, match=r"between the head '2' and the logits.*scope='layers'"
    ):
        imu.unlearn(
            model, data, method, stop=imu.StopRule(unseen_accuracy=(x, data[1].flip(0))), **options
        )
