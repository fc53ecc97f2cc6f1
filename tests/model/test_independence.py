"""Models whose samples are not independent are refused; those that only look so are scored."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import imu_fast as imu

CLASSES = 5


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.body, self.fc, self.how = nn.Linear(12, 8), nn.Linear(8, CLASSES), forward
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return self.how(self, x)


def capacity(self, x):
    h = torch.zeros(len(x), 8)
    h[: max(1, len(x) // 2)] = self.body(x[: max(1, len(x) // 2)])
    return self.fc(h)


MIXED = {
    "attention over the batch": lambda m, x: m.fc(
        m.attention(*[m.body(x).unflatten(1, (2, 4)).repeat(1, 1, 2)] * 3)[0].mean(1)
    ),
    "inputs standardised": lambda m, x: m.fc(m.body((x - x.mean()) / x.std()).relu()),
    "features centred": lambda m, x: m.fc(m.body(x) - m.body(x).mean(0)),
    "features scaled": lambda m, x: m.fc(m.body(x) / m.body(x).abs().max()),
    "rolled": lambda m, x: m.fc(m.body(x) + m.body(x).roll(1, 0)),
    "batch norm": lambda m, x: m.fc(F.batch_norm(m.body(x), None, None, training=True)),
    "after the head": lambda m, x: m.fc(m.body(x)) - m.fc(m.body(x)).detach().mean(0),
    "centred without a gradient": lambda m, x: m.fc(m.body(x) - m.body(x).detach().mean(0)),
    "a capacity": capacity,
}
RANDOM = {
    "dropout": lambda m, x: m.fc(F.dropout(m.body(x), 0.5)),
    "noise": lambda m, x: m.fc(m.body(x) + 0.1 * torch.randn(8)),
    "after the head": lambda m, x: F.dropout(m.fc(m.body(x)), 0.5),
}


def _tracin(model, data):
    return imu.tracin_self_influence(
        model, data, checkpoints=[model.state_dict()], learning_rates=0.1
    )


DOORS = {
    "capture": imu.capture,
    "layers": lambda m, data: imu.influence_scores(m, data, layers=["body"]),
    "importance": imu.parameter_importance,
    "tracin": _tracin,
    "scores": imu.influence_scores,
    "self-influence": imu.self_influence,
    "unlearn": lambda m, data: imu.unlearn(m, data, "uniform"),
    "margin_edit": lambda m, data: imu.unlearn(m, data, "margin_edit"),
}


def data():
    torch.manual_seed(0)
    x, y = torch.randn(24, 12), torch.randint(CLASSES, (24,))
    return list(zip(x.split(8), y.split(8), strict=True))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("how", MIXED)
def test_samples_that_mix_are_refused(how, door):
    model = Net(MIXED[how]).eval()
    with pytest.raises(imu.InputError, match="change with the rest of its batch"):
        DOORS[door](model, data())


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("how", RANDOM)
def test_random_numbers_are_refused(how, door):
    with pytest.raises(imu.InputError, match="draws random numbers"):
        DOORS[door](Net(RANDOM[how]).eval(), data())


def test_it_is_seen_in_the_first_batch_of_several():
    model = Net(MIXED["features centred"]).eval()
    x, y = data()[0]
    imu.influence_scores(model, [(x[:1], y[:1]), (x[1:2], y[1:2])])  # each has its own loss
    with pytest.raises(imu.InputError, match="samples from 1 on.*change with the rest"):
        imu.influence_scores(model, [(x[:1], y[:1]), (x, y)])


def test_large_logits_are_looked_at_too(monkeypatch):
    monkeypatch.setattr("imu_fast.model.calls.SMALL_BYTES", 2 * CLASSES * 4)
    with pytest.raises(imu.InputError, match="change with the rest of its batch"):
        imu.influence_scores(Net(MIXED["features centred"]).eval(), data())


def test_rows_of_a_flattened_batch_are_looked_at_too(monkeypatch):
    """A head that never makes its logits, on positions of all samples one after another."""
    monkeypatch.setattr("imu_fast.model.calls.SMALL_BYTES", 2 * CLASSES * 4)

    def flattened(mixes):
        def forward(m, x):
            h = m.body(x)
            h = h - mixes * h.mean(0)
            return m.fc(h.flatten(0, 1)).unflatten(0, x.shape[:2])

        return Net(forward).eval()

    batch = torch.randn(8, 6, 12), torch.randint(CLASSES, (8, 6))
    imu.influence_scores(flattened(0), [batch], shift=False)
    with pytest.raises(imu.InputError, match="change with the rest of its batch"):
        imu.influence_scores(flattened(1), [batch], shift=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_mixing(dtype):
    torch.manual_seed(1)
    body = [nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()) for _ in range(8)]
    model = nn.Sequential(*body, nn.Linear(64, 10)).to(dtype).eval()
    imu.influence_scores(model, (torch.randn(64, 64).to(dtype), torch.randint(10, (64,))))


def test_a_batch_that_cannot_be_cut_is_scored():
    model = Net(lambda m, x: m.fc(m.body(x.reshape(8, 12)))).eval()  # takes eight samples only
    assert len(imu.influence_scores(model, data())) == 24


class Tokens(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.body, self.fc, self.how = nn.Linear(12, 8), nn.Linear(8, CLASSES), how

    def forward(self, x):
        return self.how(self.fc(self.body(x).relu()))


def tokens(length, n=6):
    torch.manual_seed(0)
    return torch.randn(n, length, 12), torch.randint(CLASSES, (n, length))


TURNED = {
    "turned": lambda z: z.transpose(1, 2),
    "and scaled": lambda z: (2 * z).transpose(1, 2),
    "log-probabilities": lambda z: z.log_softmax(-1).transpose(1, 2),
}
AXIS_DOORS = {
    "scores": lambda *a, **k: imu.influence_scores(*a, **k),
    "layers": lambda *a, **k: imu.influence_scores(*a, layers=["body"], **k),
    "importance": lambda *a, **k: imu.parameter_importance(*a, **k)["body.bias"],
    "evaluate": lambda *a, **k: torch.tensor(imu.evaluate(*a, **k)["loss"]),
}


@pytest.mark.parametrize("door", AXIS_DOORS)
@pytest.mark.parametrize("how", TURNED)
def test_classes_on_another_axis_of_the_same_size_are_refused(how, door):
    turned, batch, run = Tokens(TURNED[how]).eval(), tokens(CLASSES), AXIS_DOORS[door]
    before = [p.requires_grad for p in turned.parameters()]
    with pytest.raises(imu.InputError, match="last axis is not the classes.*output="):
        run(turned, [batch])
    assert [p.requires_grad for p in turned.parameters()] == before
    found = run(turned, [batch], output=lambda out: out.movedim(1, -1))
    plain = Tokens(lambda z: TURNED[how](z).transpose(1, 2))
    plain.load_state_dict(turned.state_dict())
    torch.testing.assert_close(found, run(plain.eval(), [batch]))


def test_a_convolution_head_has_its_classes_on_the_second_axis():
    model = nn.Sequential(nn.Conv1d(3, 6, 1), nn.ReLU(), nn.Conv1d(6, CLASSES, 1)).eval()
    x, y = torch.randn(4, 3, CLASSES), torch.randint(CLASSES, (4, CLASSES))
    for door in (imu.influence_scores, imu.parameter_importance, imu.evaluate):
        with pytest.raises(imu.InputError, match="last axis is not the classes"):
            door(model, [(x, y)])
    pixels = nn.Sequential(nn.Conv2d(3, CLASSES, 1)).eval()
    x, y = torch.randn(4, 3, CLASSES, CLASSES), torch.randint(CLASSES, (4, CLASSES, CLASSES))
    with pytest.raises(imu.InputError, match="last axis is not the classes"):
        imu.influence_scores(pixels, [(x, y)])


def test_samples_on_another_axis_of_the_same_size_are_refused():
    x, y = tokens(6)
    model = Tokens(lambda z: z.transpose(0, 1)).eval()
    for shift in ("auto", False):
        with pytest.raises(imu.InputError, match="first axis is not the samples'"):
            imu.influence_scores(model, [(x, y)], shift=shift)
