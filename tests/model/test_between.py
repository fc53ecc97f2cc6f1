"""What stands between the head and the loss: the right number for each kind, or a refusal."""

from __future__ import annotations

import logging

import pytest
import torch
from per_sample import assert_scores, sample_gradients, scores
from torch import nn
from torch.nn import functional as F

import imu_fast as imu
from imu_fast.errors import InputError, NoHeadFoundError

N, D, H, C = 14, 6, 8, 5


class Net(nn.Module):
    def __init__(self, after=lambda self, z: z):
        super().__init__()
        self.body, self.fc = nn.Linear(D, H), nn.Linear(H, C)
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.shift = nn.Parameter(torch.randn(C))
        self.after = after

    def features(self, x):
        return F.relu(self.body(x))

    def forward(self, x):
        return self.after(self, self.fc(self.features(x)))


def data(classes=C):
    return torch.randn(N, D), torch.randint(classes, (N,))


def cross_entropy(model, sample):
    x, y = sample
    return F.cross_entropy(model(x[None].double()), y[None])


def check(model, x, y, names=("fc.weight", "fc.bias"), loss=cross_entropy, **keywords):
    gradients = sample_gradients(model, zip(x, y, strict=True), names, loss)
    factors = imu.capture(model, [(x[:9], y[:9]), (x[9:], y[9:])], **keywords)
    for curvature in ("identity", "fisher_diag", "fisher"):
        found = imu.influence_scores(factors, curvature=curvature)
        assert_scores(found, scores(gradients, curvature))
    return factors


def hessian_scores(model, x, y, names, damping=1e-2):
    """With the Hessian of the mean loss, which the generalised Gauss-Newton matrix is here."""
    model = model.double().eval()
    parameters = [dict(model.named_parameters())[name] for name in names]
    gradients = sample_gradients(model, zip(x, y, strict=True), names, cross_entropy)
    loss = F.cross_entropy(model(x.double()), y)
    mean = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in mean])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in flat]
    hessian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    return -gradients @ torch.linalg.solve(
        hessian + damping * torch.eye(len(hessian)).to(hessian), gradients.mean(dim=0)
    )


def in_place(self, z):
    z /= 0.2
    return z


def masked(self, z):
    z[:, 3:] = -1e4
    return z


def by_data(self, z):
    z.data.mul_(2.0)
    return z


def without_grad(self, z):
    with torch.no_grad():
        z.add_(1.5 * torch.arange(C))
    return z


def padded_buffer(self, z):
    out = torch.zeros(len(z), C + 2, dtype=z.dtype)
    out[:, 1 : C + 1] = z
    return out[:, 1 : C + 1]


def only_largest(self, z):
    kept = z.topk(3, 1).indices
    return torch.full_like(z, -1e4).scatter(1, kept, z.gather(1, kept))


# Steps by which each row of logits is a number times a row of outputs, plus anything.
AFFINE = {
    "temperature": lambda self, z: z / 0.2,
    "temperature in place": in_place,
    "a learned scale": lambda self, z: z * self.scale,
    "a scale for each sample": lambda self, z: z * (1 + torch.arange(len(z)).view(-1, 1) * 0),
    "an added bias": lambda self, z: z + self.shift,
    "a mask in place": masked,
    "a mask of minus infinity": lambda self, z: z.masked_fill(torch.arange(C) > 2, -torch.inf),
    "another dtype": lambda self, z: z.double().float(),
    "a copy": lambda self, z: z.clone().unsqueeze(1).flatten(1),
    "written to without autograd": without_grad,
    "a flip there and back": lambda self, z: z.flip(0).flip(0),
    "other strides": lambda self, z: z.t().contiguous().t(),
    "the mean of copies": lambda self, z: z[:, None].expand(-1, 4, -1).mean(1),
    "one sample after another": lambda self, z: torch.stack([row * 2 for row in z]),
    "a padded buffer": padded_buffer,
    "its memory by .data": by_data,
    "negated": lambda self, z: -z,
}
# Steps with a Jacobian that is no number.
OTHER = {
    "softcap": lambda self, z: 0.5 * torch.tanh(z / 0.5),
    "clamp in place": lambda self, z: z.clamp_(-0.2, 0.2),
    "log_softmax of a temperature": lambda self, z: F.log_softmax(z / 0.3, dim=1),
    "softmax": lambda self, z: z.softmax(dim=1),
    "a scale of each class": lambda self, z: z * self.shift,
    "normalised": lambda self, z: 3 * F.normalize(z, dim=1),
    "its largest taken off": lambda self, z: z - 0.5 * z.amax(dim=1, keepdim=True),
    "relu in place": lambda self, z: F.relu(z, inplace=True),
    "its own logsumexp taken off": lambda self, z: z - z.logsumexp(1, keepdim=True),
    "centred in place": lambda self, z: z.sub_(z.mean(1, keepdim=True)),
    "groups with scales of their own": lambda self, z: torch.cat([z[:, :3] / 2, z[:, 3:] * 2], 1),
    "classes in another order": lambda self, z: z[:, torch.tensor([4, 2, 0, 1, 3])],
    "sorted": lambda self, z: z.sort(1).values,
    "all but the largest ruled out": only_largest,
    "a normalisation over classes": lambda self, z: F.layer_norm(z, (C,)),
    "ensembled by logsumexp": lambda self, z: torch.stack([z, z * 0.3]).logsumexp(0),
}


@pytest.mark.parametrize("kind", AFFINE)
def test_affine_steps_keep_every_curvature(kind):
    model, (x, y) = Net(AFFINE[kind]), data(3)
    factors = check(model, x, y)
    assert factors.labels is not None and factors.name == "fc"
    if kind != "another dtype":  # its Hessian would be rounded to float32
        truth = hessian_scores(model, x, y, ("fc.weight", "fc.bias"))
        for curvature in ("ggn", "ggn_block", "kfac", "ekfac"):
            found = imu.influence_scores(factors, curvature=curvature)
            if curvature == "ggn":
                assert_scores(found, truth, 1e-4)


@pytest.mark.parametrize("kind", [*AFFINE, *OTHER])
def test_large_outputs_which_are_not_copied_at_first(kind, monkeypatch):
    monkeypatch.setattr("imu_fast.model.calls.SMALL_BYTES", 0)
    check(Net((AFFINE | OTHER)[kind]), *data(3 if kind in AFFINE else C))


@pytest.mark.parametrize("kind", OTHER)
def test_other_steps_give_the_gradient_and_no_hessian(kind, caplog):
    model, (x, y) = Net(OTHER[kind]), data()
    with caplog.at_level(logging.WARNING, "imu_fast"):
        factors = check(model, x, y)
    assert "between its output and the loss" in caplog.text
    for curvature in ("ggn", "ggn_block", "kfac", "ekfac"):
        with pytest.raises(InputError, match="'fc' have no curvature of the loss"):
            imu.influence_scores(factors, curvature=curvature)


def test_a_step_that_acts_in_some_batches_only():
    model, (x, y) = Net(lambda self, z: z.clamp(-1.2, 1.2)), data()
    x[9:] *= 30
    factors = check(model, x, y)
    assert factors.labels is None
    first = imu.capture(model, (x[:9] * 0.1, y[:9]))
    assert first.labels is not None
    assert not imu.capture_features(model, (x[:9] * 0.1, y[:9])).plain


@pytest.mark.parametrize("step", [lambda z: z.mul_(0.1), lambda z: (z / 9).tanh()])
def test_a_branch_that_touches_only_a_later_batch(step):
    x, y = data()
    x[9:] *= 1e3
    check(Net(lambda self, z: step(z) if float(z.detach().abs().max()) > 20 else z), x, y)


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("returns", [False, True])
def test_hooks_of_the_user(always, returns):
    def hook(module, args, output):
        if returns:
            return output * 4
        output.mul_(4)

    model = Net()
    model.fc.register_forward_hook(hook, always_call=always)
    check(model, *data())
    assert len(model.fc._forward_hooks) == 1


def test_some_rows_are_scaled_in_place():
    def after(self, z):
        z[z[:, 0] > 0] *= 3
        return z

    assert check(Net(after), *data()).labels is not None  # each by a number of its own


def test_layers_beside_the_head_that_are_no_heads():
    class Tempered(Net):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Linear(H, 1)

        def forward(self, x):
            h = self.features(x)
            return self.fc(h) / F.softplus(self.temperature(h))

    assert check(Tempered(), *data()).labels is not None

    class Gated(Net):
        def __init__(self):
            super().__init__()
            self.gate, self.other = nn.Linear(H, 2), nn.Linear(H, C)

        def forward(self, x):
            h = self.features(x)
            weights = self.gate(h).softmax(1)
            return weights[:, :1] * self.fc(h) + weights[:, 1:] * self.other(h)

    factors = check(Gated(), *data(), BOTH)
    assert factors.name == "fc+other" and factors.labels is not None

    class Calibrated(Net):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Linear(C, C)

        def forward(self, x):
            return self.matrix(super().forward(x))

    assert check(Calibrated(), *data(), ("matrix.weight", "matrix.bias")).name == "matrix"


def test_a_normalisation_with_statistics_after_the_head():
    model = Net(lambda self, z: self.norm(z))
    model.norm = nn.BatchNorm1d(C)
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    check(model, *data())


def test_a_matrix_between_is_refused():
    model = Net(lambda self, z: (z.softmax(1) @ self.transition).log())
    model.register_buffer("transition", torch.rand(C, C).softmax(0))
    x, y = data()
    with pytest.raises(NoHeadFoundError, match=r"made by mm out of 'fc'.*layers=\['fc'\]"):
        imu.capture(model, (x, y))
    check(model, x, y, layers=["fc"])


def test_a_hook_that_changes_the_input_of_the_head():
    model = Net()
    model.fc.register_forward_pre_hook(lambda module, args: (args[0] * 2 - 1,))
    check(model, *data())


def test_the_input_of_the_head_is_written_to_afterwards():
    class Overwritten(Net):
        def forward(self, x):
            h = self.features(x)
            z = self.fc(h)
            h.zero_()
            return z

    model, (x, y) = Overwritten(), data()
    plain = Net()
    plain.load_state_dict(model.state_dict())
    found = imu.influence_scores(model, (x, y))
    torch.testing.assert_close(found, imu.influence_scores(plain, (x, y)))


def test_decorated_forwards():
    class NoGrad(Net):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    plain, (x, y) = Net(lambda self, z: z / 0.3), data()
    truth = imu.influence_scores(plain, (x, y))
    model = NoGrad(lambda self, z: z / 0.3)
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(imu.influence_scores(model, (x, y)), truth)

    class Inference(Net):
        @torch.inference_mode()
        def forward(self, x):
            return super().forward(x)

    model = Inference(lambda self, z: z / 0.3)
    with pytest.raises(InputError, match="inference_mode"):
        imu.influence_scores(model, (x, y))
    model.after, plain.after = [lambda self, z: z] * 2
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(
        imu.influence_scores(model, (x, y)), imu.influence_scores(plain, (x, y))
    )


class Heads(Net):
    """Two heads on features of their own; ``join`` makes the logits of them."""

    def __init__(self, join, bias=True):
        super().__init__()
        self.other, self.join = nn.Linear(D, C, bias=bias), join

    def forward(self, x):
        return self.join(self.fc(self.features(x)), self.other(x))


BOTH = ("fc.weight", "fc.bias", "other.weight", "other.bias")


@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: (a + b) / 2,
        lambda a, b: a + b,
        lambda a, b: torch.stack([a, b]).mean(0),
        lambda a, b: 0.3 * a - 2 * b,
        lambda a, b: b.add_(a),
    ],
)
def test_averaged_and_summed_heads_are_one(join):
    model, (x, y) = Heads(join), data()
    factors = check(model, x, y, BOTH)
    assert factors.name == "fc+other" and factors.labels is not None
    assert_scores(
        imu.influence_scores(factors, curvature="ggn"), hessian_scores(model, x, y, BOTH), 1e-4
    )


@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: torch.logaddexp(F.log_softmax(a, 1), F.log_softmax(b, 1)),
        torch.maximum,
        lambda a, b: a * torch.sigmoid(b),
    ],
)
def test_heads_joined_otherwise(join):
    factors = check(Heads(join), *data(), BOTH)
    assert factors.labels is None


def test_heads_that_share_a_weight_are_refused():
    model = Heads(lambda a, b: a + b)
    model.other = nn.Linear(D, C)
    model.fc, model.features = nn.Linear(D, C), lambda x: x * x
    model.other.weight = model.fc.weight
    with pytest.raises(NoHeadFoundError, match="share a weight"):
        imu.capture(model, data())


def test_heads_without_bias_and_zero_at_first():
    model, (x, y) = Heads(lambda a, b: (a + b) / 2, bias=False), data()
    check(model, x, y, BOTH[:3])
    nn.init.zeros_(model.other.weight)
    nn.init.zeros_(model.fc.weight)
    check(model, x, y, BOTH[:3])


def test_one_of_two_heads_by_name():
    model, (x, y) = Heads(lambda a, b: (a + b) / 2), data()
    factors = imu.capture_features(model, (x, y), "other")
    assert factors.name == "other" and not factors.plain and not factors.linear
    check(model, x, y, BOTH[2:], layers=["other"])


def test_a_head_called_twice():
    class Twice(Net):
        def forward(self, x):
            h = self.features(x)
            return (self.fc(h) + self.fc(h.flip(1))) / 2

    factors = check(Twice(), *data())
    assert factors.labels is not None and factors.is_flat

    class Gated(Net):
        def forward(self, x):
            h = self.features(x)
            return self.fc(h) * torch.sigmoid(self.fc(-h))

    check(Gated(), *data())

    class Unused(Net):
        def forward(self, x):
            h = self.features(x)
            self.fc(h + 1)
            return self.fc(h)

    check(Unused(), *data())


def test_a_head_that_feeds_itself_is_refused():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(C, C)

        def forward(self, x):
            return self.fc(F.relu(self.fc(x)))

    model, x, y = Recurrent(), torch.randn(N, C), torch.randint(C, (N,))
    with pytest.raises(NoHeadFoundError, match="several times, one after another"):
        imu.capture(model, (x, y))
    check(model, x, y, layers=["fc"])


def test_features_say_what_they_are():
    x, y = data()
    plain = imu.capture_features(Net(), (x, y))
    assert plain.plain and plain.linear and plain.why == "" and plain.output == ()
    model = Net(lambda self, z: z / 0.5)
    scaled = imu.capture_features(model, (x, y))
    assert not scaled.plain and scaled.linear and "div" in scaled.why
    torch.testing.assert_close(scaled.head(scaled.features), model(x))
    model = Heads(lambda a, b: (a + b) / 2)
    both = imu.capture_features(model, (x, y))
    assert not both.plain and both.linear
    torch.testing.assert_close(both.head(both.features), model(x))
    for layer, columns in both.parts:
        weight = both.head.weight[:, columns]
        torch.testing.assert_close(weight[:, :-1], layer.weight)
        torch.testing.assert_close(weight[:, -1], layer.bias)
    added = imu.capture_features(Net(lambda self, z: z + self.shift), (x, y))
    assert not added.plain and not added.linear and "add" in added.why


def test_half_precision_between():
    model, (x, y) = Net(lambda self, z: z.float() / 0.25).bfloat16(), data()
    x = x.bfloat16()
    gradients = sample_gradients(
        model.float(), zip(x.float(), y, strict=True), ("fc.weight", "fc.bias"), cross_entropy
    )
    found = imu.influence_scores(model.bfloat16(), (x, y))
    assert_scores(found, scores(gradients), 0.05)


def test_logits_that_mix_samples_are_refused():
    model = Net(lambda self, z: F.log_softmax(z, dim=0))
    with pytest.raises(InputError, match="change with the rest of its batch"):
        imu.capture(model, data())
    model = Net(lambda self, z: F.log_softmax(z.reshape(N, C), dim=0))  # cannot be cut
    with pytest.raises(InputError, match="changes the loss of others"):
        imu.capture(model, data())


def test_logits_that_are_not_finite_name_the_sample():
    x, y = data()
    with pytest.raises(InputError, match="not finite at sample 0"):
        imu.capture(Net(lambda self, z: z.tanh().log()), (x, y))
    with pytest.raises(InputError, match="rule out its label"):
        imu.capture(Net(lambda self, z: z.masked_fill(torch.arange(C) > 2, -torch.inf)), (x, y))
