"""Mean squared gradients of all parameters, against float64 autograd of one sample at a time."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from per_sample import sample_gradients
from torch import nn
from torch.nn import functional as F

import imu_fast as imu
from imu_fast.errors import InputError

N, T, D, H, C = 11, 4, 6, 8, 5


def cross_entropy(model, sample):
    x, y = sample
    x = x[None].to(next(model.parameters()).dtype) if x.is_floating_point() else x[None]
    out = model(x)
    return F.cross_entropy(getattr(out, "logits", out).flatten(0, -2), y.reshape(-1))


def truth(model, samples, loss=cross_entropy, dtype=torch.float64):
    parameters = dict(model.named_parameters())
    found = sample_gradients(model, samples, list(parameters), loss, dtype)
    parts = found.square().mean(dim=0).split([p.numel() for p in parameters.values()])
    return {k: g.view(p.shape) for (k, p), g in zip(parameters.items(), parts, strict=True)}


def check(model, x, y, *, sizes=(5, 1, 5), loss=cross_entropy, tolerance=1e-5, reading=None):
    """All parameters, each relative to itself; nothing of the model changes."""
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    found = imu.parameter_importance(
        model, list(zip(x.split(sizes), y.split(sizes), strict=True)), **(reading or {})
    )
    want = truth(model, list(zip(x, y, strict=True)), loss)
    assert list(found) == list(want)
    size = max(float(value.norm()) for value in want.values())
    for name, value in want.items():  # what is zero but for rounding, relative to the largest
        off = float((found[name].double() - value).norm())
        error = off / max(float(value.norm()), 1e-9 * size)
        assert error < tolerance, f"{name}: relative error {error:.2g}"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    return found


@pytest.fixture
def said(caplog):
    """Which parameters went one sample at a time, by what the log says."""

    def lines():
        return " ".join(r.getMessage() for r in caplog.records if "one sample" in r.getMessage())

    with caplog.at_level(logging.INFO, "imu_fast"):
        yield lines


class Net(nn.Module):
    """``mix(self, x)`` is the model."""

    def __init__(self, mix, **more):
        super().__init__()
        self.emb, self.fc, self.mix = nn.Linear(D, H), nn.Linear(H, C), mix
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.mix(self, x)


def tokens():
    return torch.randn(N, T, D), torch.randint(C, (N,))


def images(channels=4, size=6):
    return torch.randn(N, channels, size, size), torch.randint(C, (N,))


def pooled(body, width):
    return nn.Sequential(
        body, nn.Tanh(), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, C)
    )


CONVOLUTIONS = {
    "plain": (2, lambda: nn.Conv2d(4, 6, 3)),
    "stride, padding, dilation": (2, lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (2, 1))),
    "groups": (2, lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False)),
    "depthwise": (2, lambda: nn.Conv2d(4, 8, 3, groups=4)),
    "same": (2, lambda: nn.Conv2d(4, 6, (2, 3), padding="same", dilation=2)),
    "valid": (2, lambda: nn.Conv2d(4, 6, 3, padding="valid")),
    "circular": (2, lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")),
    "reflect": (2, lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect")),
    "one position": (2, lambda: nn.Conv2d(4, 6, 6)),
    "one by one": (2, lambda: nn.Conv2d(4, 6, 1)),
    "one axis": (1, lambda: nn.Conv1d(4, 6, 3, 2, 2, 1, 2)),
    "three axes": (3, lambda: nn.Conv3d(4, 6, (2, 3, 1), (1, 2, 1), (1, 0, 1), groups=2)),
    "transposed": (2, lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2)),
    "transposed, one axis": (1, lambda: nn.ConvTranspose1d(4, 6, 3, dilation=2)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, said):
    axes, make = CONVOLUTIONS[name]
    layer = make()
    x = torch.randn(N, 4, *[6] * axes)
    check(pooled(layer, layer.out_channels), x, torch.randint(C, (N,)))
    assert not said()


NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "group": lambda: nn.GroupNorm(2, 4),
    "layer": lambda: nn.LayerNorm([4, 6, 6]),
    "layer, last axis": lambda: nn.LayerNorm(6),
    "layer, no bias": lambda: nn.LayerNorm(6, bias=False),
    "root": lambda: nn.RMSNorm([6, 6]),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "prelu": lambda: nn.PReLU(4),
    "prelu of one": lambda: nn.PReLU(),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name, said):
    layer = NORMS[name]()
    for p in layer.parameters():
        nn.init.normal_(p)
    for b in layer.buffers():
        b.copy_(torch.rand_like(b.double()) + 0.5)
    check(pooled(nn.Sequential(nn.Conv2d(4, 4, 1), layer), 4).train(), *images())
    assert not said()


def over_time(self, x):
    h = self.emb(x[:, 0])
    for t in range(1, x.shape[1]):
        h = torch.tanh(self.a(h) + F.linear(x[:, t], self.emb.weight))
    return self.fc(h)


def tied_across(self, x):
    h = torch.tanh(self.emb(x)).mean(1)
    return self.fc(torch.tanh(h @ self.w)) + h @ self.w[:, :C]


def class_token(self, x):
    h = torch.cat([self.token.expand(len(x), -1, -1), self.emb(x)], 1) + self.position[:, : T + 1]
    return self.fc((h * self.scale + self.shift).tanh().mean(1))


def sequence_first(self, x):
    h = self.emb(x).transpose(0, 1) + self.position[0, :T, None]
    return self.fc(self.norm(h).mean(0))


def in_place(self, x):
    h = self.emb(x)
    h += self.shift
    h *= self.scale
    h[:, 0] = h[:, 0].clone() - self.shift
    return self.fc(F.relu(h, inplace=True).mean(1))


def windows(self, x):
    h = self.emb(x).view(len(x), 2, 2, H).roll(1, 2).transpose(1, 2).reshape(2 * len(x), 2, H)
    return self.fc(F.gelu(self.a(h) * self.scale).view(len(x), T, H).mean(1))


def positions_first(self, x):
    h = self.emb(x).transpose(0, 1).flatten(0, 1)
    return self.fc(F.gelu(self.a(h) + self.shift).view(T, len(x), H).mean(0))


def mixed_tokens(self, x):
    return self.fc(torch.matmul(self.square, torch.tanh(self.emb(x))).mean(1))


def addmm(self, x):
    return self.fc(
        torch.addmm(self.shift, self.emb(x).flatten(0, 1), self.w)
        .view_as(torch.empty(len(x), T, H))
        .tanh()
        .mean(1)
    )


def relative_bias(self, x):
    h = self.emb(x)
    bias = self.table[self.index.flatten()].view(T, T)
    return self.fc(((h @ h.mT + bias).softmax(-1) @ h).mean(1))


def latents(self, x):
    h, q = self.emb(x), self.latent.expand(len(x), -1, -1)
    return self.fc(F.scaled_dot_product_attention(q, h, h).mean(1))


def plus_a_number(self, x):
    return self.fc((2 * self.emb(x) / (1 + self.temperature**2) - self.temperature).tanh().mean(1))


P = {
    "token": lambda: nn.Parameter(torch.randn(1, 1, H)),
    "position": lambda: nn.Parameter(torch.randn(1, T + 3, H)),
    "scale": lambda: nn.Parameter(torch.randn(H)),
    "shift": lambda: nn.Parameter(torch.randn(H)),
    "w": lambda: nn.Parameter(torch.randn(H, H)),
    "square": lambda: nn.Parameter(torch.randn(T, T)),
    "latent": lambda: nn.Parameter(torch.randn(1, 3, H)),
    "table": lambda: nn.Parameter(torch.randn(2 * T)),
    "index": lambda: torch.arange(T)[:, None] + torch.arange(T),
    "temperature": lambda: nn.Parameter(torch.tensor(0.7)),
    "a": lambda: nn.Linear(H, H),
    "norm": lambda: nn.LayerNorm(H),
}
CODE = {
    over_time: "a",
    tied_across: "w",
    class_token: "token position scale shift",
    sequence_first: "position norm",
    in_place: "shift scale",
    windows: "a scale",
    positions_first: "a shift",
    mixed_tokens: "square",
    addmm: "shift w",
    relative_bias: "table index",
    latents: "latent",
    plus_a_number: "temperature",
}


@pytest.mark.parametrize("mix", CODE, ids=lambda f: f.__name__)
def test_parameters_that_the_models_code_uses(mix, said):
    check(Net(mix, **{name: P[name]() for name in CODE[mix].split()}), *tokens())
    assert not said()


def test_weights_that_are_made_of_parameters(said):
    torch.manual_seed(1)
    parametrized = nn.utils.parametrizations
    body = nn.Sequential(
        parametrized.weight_norm(nn.Linear(D, H)),
        nn.Tanh(),
        parametrized.spectral_norm(nn.Linear(H, H)),
        nn.Tanh(),
        nn.Linear(H, C),
    )
    with torch.no_grad():
        body(torch.randn(3, D))
    check(body, torch.randn(N, D), torch.randint(C, (N,)))
    assert not said()


def test_attention_of_torch(said):
    for batch_first in (False, True):
        encoder = nn.TransformerEncoderLayer(H, 2, 16, dropout=0.1, batch_first=batch_first)

        def mix(self, x, batch_first=batch_first):
            h = self.emb(x)
            h = self.encoder(h if batch_first else h.transpose(0, 1))
            return self.fc(h.mean(1 if batch_first else 0))

        check(Net(mix, encoder=encoder), *tokens())
    assert not said()


class Language(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, H, padding_idx=3), nn.Embedding(T, H)
        self.a, self.head = nn.Linear(H, H), nn.Linear(H, 11, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, ids):
        h = self.wte(ids) + self.wpe(torch.arange(ids.shape[1])[None])
        return self.head(torch.tanh(self.a(h)))


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_tied_weights_and_padding(tied, said):
    ids = torch.randint(11, (N, T))
    ids[:, 0] = 3
    labels = ids.roll(1, 1).masked_fill(torch.rand(N, T) < 0.3, -100)
    labels[2] = -100

    def loss(model, sample):
        x, y = sample
        if bool((y == -100).all()):
            return model(x[None]).sum() * 0
        return F.cross_entropy(model(x[None])[0], y, ignore_index=-100)

    model = Language(tied)
    check(model, ids, labels, loss=loss)

    def next_token(model, sample):
        return loss(lambda x: model(x)[:, :-1], (sample[0], sample[1][1:]))

    want = truth(model, list(zip(ids, labels, strict=True)), next_token)
    found = imu.parameter_importance(model, (ids, labels), shift=True)
    for name, value in want.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-9)
    assert not said()


def test_slabs_of_a_tied_weight(monkeypatch):
    from imu_fast.importance import batch

    monkeypatch.setattr(batch, "_SLAB_ELEMENTS", 3 * H)
    ids = torch.randint(11, (N, T))
    check(Language(True), ids, ids.roll(1, 1))


def routed(self, x):
    h = self.emb(x).flatten(0, 1)
    first = h.sum(1) > 0
    out = torch.zeros_like(h)
    out[first] = self.a(h[first])
    out[~first] = self.b(h[~first])
    return self.fc(F.gelu(out).view(len(x), T, H).mean(1))


def summed_by_einsum(self, x):
    return self.fc(torch.einsum("btd,de->bte", self.emb(x), self.w).tanh().mean(1))


def same_for_all(self, x):
    return self.fc((self.emb(x) * self.a(self.position[:, :T])).mean(1))


def by_its_graph(self, x):
    """A custom function: no override sees its operands."""

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return g * w, (g * x).sum(tuple(range(g.dim() - 1)))

    return self.fc(Scale.apply(self.emb(x), self.scale).tanh().mean(1))


FALLS_BACK = {
    routed: {"a": nn.Linear(H, H), "b": nn.Linear(H, H)},
    summed_by_einsum: {"w": P["w"]()},
    by_its_graph: {"scale": P["scale"]()},
}


@pytest.mark.parametrize("mix", FALLS_BACK, ids=lambda f: f.__name__)
def test_what_no_rule_covers_goes_sample_by_sample(mix, said):
    check(Net(mix, **FALLS_BACK[mix]), *tokens())
    name = next(iter(FALLS_BACK[mix]))
    assert name in said() and "emb" not in said() and "fc" not in said()


def test_rows_made_of_parameters_alone(said):
    check(Net(same_for_all, a=P["a"](), position=P["position"]()), *tokens())
    assert not said()


def test_recurrent_networks():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.fc = nn.LSTM(D, H, batch_first=True), nn.Linear(H, C)

        def forward(self, x):
            return self.fc(self.lstm(x)[0][:, -1])

    check(Recurrent(), *tokens())


def sorted_by_the_data(self, x):
    h = self.emb(x).mean(1)
    order = h[:, 0].detach().argsort() if float(h.detach()[0, 1]) > 0 else torch.arange(len(x))
    return self.fc(F.gelu(self.a(h[order]))[order.argsort()])


def test_a_layout_that_changes_with_the_data():
    model, n = Net(sorted_by_the_data, a=nn.Linear(H, H)), 5 * 12
    x, y = torch.randn(n, T, D), torch.randint(C, (n,))
    sign = model.emb(x).detach().mean(1).view(5, 12, H)[:, 0, 1]
    order = sign.argsort()  # the sorted batches come last
    x = x.view(5, 12, T, D)[order].flatten(0, 1)
    check(model, x, y, sizes=[12] * 5)


def turned(self, x):
    """Whether rows are turned is one number, which no function's name shows."""
    h = self.emb(x).mean(1)
    by = int(h.detach()[0, 1] > 0) * (len(x) // 2)
    h = F.gelu(self.a(torch.cat([h[by:], h[:by]])))
    return self.fc(torch.cat([h[len(x) - by :], h[: len(x) - by]]))


def branched(self, x):
    h = self.emb(x).mean(1)
    if float(h.detach()[0, 1]) > 0:
        return self.fc(F.gelu(self.a(h.flip(0))).flip(0))
    return self.fc(F.gelu(self.a(h)))


@pytest.mark.parametrize("mix", [turned, branched], ids=lambda f: f.__name__)
def test_code_that_lays_rows_out_in_another_way_later(mix):
    model, size, count = Net(mix, a=nn.Linear(H, H)), 12, 9
    x, y = torch.randn(size * count, T, D), torch.randint(C, (size * count,))
    parts = [part if k else part.flip(0) for k, part in enumerate(x.split(size))]
    order = [model.emb(part).detach().mean(1)[0, 1] for part in parts]
    parts = [parts[k] for k in torch.stack(order).argsort().tolist()]
    for part in (parts[0], *parts[-3:]):  # the first is straight, the last are not
        straight = part is parts[0]
        while (float(model.emb(part).detach().mean(1)[0, 1]) <= 0) != straight:
            part[0] = torch.randn(T, D)
    check(model, torch.cat(parts), y, sizes=[size] * count)
    batches = list(zip(parts, y.split(size), strict=True))
    if mix is branched:  # its code shows it, so that one pass is enough
        found = imu.parameter_importance(model, iter(batches))
        for name, value in imu.parameter_importance(model, batches).items():
            torch.testing.assert_close(found[name], value)
    else:
        with pytest.raises(InputError, match="in one way in some"):
            imu.parameter_importance(model, iter(batches))


def test_rows_that_are_always_sorted():
    """Those of all samples together; in the first batch they come in order."""

    def mix(self, x):
        h = self.emb(x).flatten(0, 1)
        order = h[:, 0].detach().argsort()
        return self.fc(F.gelu(self.a(h[order]))[order.argsort()].view(len(x), T, H).mean(1))

    model, size = Net(mix, a=nn.Linear(H, H)), 12
    x, y = torch.randn(3 * size, T, D), torch.randint(C, (3 * size,))
    rows = x[:size].flatten(0, 1)
    x[:size] = rows[model.emb(rows).detach()[:, 0].argsort()].view(size, T, D)
    batches = list(zip(x.split(size), y.split(size), strict=True))
    found = imu.parameter_importance(model, iter(batches))
    for name, value in truth(model, list(zip(x, y, strict=True))).items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-9)


def test_an_input_that_is_overwritten_after_its_use():
    def overwritten(self, x):
        z = torch.tanh(x)
        h = self.emb(z)
        z.mul_(0)
        return self.fc(h.mean(1))

    with pytest.raises(InputError, match=r"no gradient in emb\.bias, emb\.weight.*inplace"):
        imu.parameter_importance(Net(overwritten), tokens())


def test_samples_that_are_not_independent():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.fc = nn.Linear(D, H), nn.Linear(H, C)

        def forward(self, x):
            h = self.emb(x)
            return self.fc(torch.tanh(h - h.mean(0)))

    with pytest.raises(InputError, match=r"emb.*samples of a batch are not\s+independent"):
        imu.parameter_importance(Own(), (torch.randn(N, D), torch.randint(C, (N,))))
    normed = nn.Sequential(nn.Linear(D, H), nn.BatchNorm1d(H, track_running_stats=False))
    with pytest.raises(InputError, match="own statistics"):
        imu.parameter_importance(normed, (torch.randn(N, D), torch.randint(C, (N,))))
    functional = nn.Sequential(nn.Linear(D, H), Batch(), nn.Linear(H, C))
    with pytest.raises(InputError, match="0.weight|0.bias|1.scale"):
        imu.parameter_importance(functional, (torch.randn(N, D), torch.randint(C, (N,))))
    assert all(p.requires_grad for p in functional.parameters())


class Batch(nn.Module):
    """Normalises by the batch, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(H))

    def forward(self, x):
        return F.batch_norm(x, None, None, self.scale, training=True)


def test_what_does_not_reach_the_loss_is_zero_and_said(caplog):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.fc, self.unused = nn.Linear(D, H), nn.Linear(H, C), nn.Linear(2, 2)

        def forward(self, x):
            with torch.no_grad():
                h = self.emb(x)
            return self.fc(h)

    found = check(Half(), torch.randn(N, D), torch.randint(C, (N,)))
    assert float(found["emb.weight"].sum()) == float(found["unused.bias"].sum()) == 0
    assert "emb.weight" in caplog.text and "unused.bias" in caplog.text


def test_other_losses():
    model, x = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, C)), torch.randn(N, D)

    def loss_of(function):
        return lambda m, s: function(m(s[0][None].double())[0], s[1])

    y = torch.randn(N, C)
    squared = loss_of(lambda z, y: (z - y).square().sum())
    check(model, x, y, loss=squared, reading={"loss": "squared_error"})
    y = (y > 0).float()
    binary = loss_of(
        lambda z, y: F.binary_cross_entropy_with_logits(z, y.double(), reduction="sum")
    )
    check(model, x, y, loss=binary, reading={"loss": imu.BinaryCrossEntropy()})
    y = torch.randint(C, (N,))
    smooth = loss_of(lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1))
    check(model, x, y, loss=smooth, reading={"label_smoothing": 0.1})


def test_frozen_parameters_and_dtypes():
    model = pooled(nn.Conv2d(4, 6, 3), 6)
    model[0].requires_grad_(False)
    found = check(model, *images())
    assert {v.dtype for v in found.values()} == {torch.float32}
    found = check(model.double(), images()[0].double(), images()[1], tolerance=1e-12)
    assert {v.dtype for v in found.values()} == {torch.float64}
    model, (x, y) = model.to(torch.bfloat16), images()
    found = imu.parameter_importance(model, (x.bfloat16(), y))
    for name, value in truth(model, list(zip(x.bfloat16(), y, strict=True))).items():
        assert found[name].dtype == torch.float32
        assert float((found[name] - value).norm() / value.norm()) < 0.05


def test_refusals():
    model = nn.Sequential(nn.Linear(D, C))
    with pytest.raises(InputError, match="empty"):
        imu.parameter_importance(model, [])
    with pytest.raises(InputError, match="is outside"):
        imu.parameter_importance(model, (torch.randn(2, D), torch.tensor([0, C])))
    with pytest.raises(InputError, match="is a list"):
        imu.parameter_importance([model], (torch.randn(2, D), torch.tensor([0, 1])))
    with pytest.raises(InputError, match="no parameters"):
        imu.parameter_importance(nn.Flatten(), (torch.randn(2, D), torch.tensor([0, 1])))
    model.register_parameter("q", nn.Parameter(torch.ones(2, dtype=torch.int8), False))
    with pytest.raises(InputError, match=r"q is torch\.int8"):
        imu.parameter_importance(model, (torch.randn(2, D), torch.tensor([0, 1])))
    bad = nn.Sequential(nn.Linear(D, C), nn.Linear(C, C))
    nn.init.constant_(bad[0].weight, 1e25)
    with pytest.raises(InputError, match="not finite"):
        imu.parameter_importance(bad, (torch.randn(2, D) * 1e14, torch.tensor([0, 1])))


def test_an_embedding_that_renorms_its_weight():
    class Renormed(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.fc = nn.Embedding(11, H, max_norm=0.5), nn.Linear(H, C)

        def forward(self, ids):
            return self.fc(self.emb(ids).mean(1))

    check(Renormed(), torch.randint(11, (N, T)), torch.randint(C, (N,)))


def test_libraries_models():
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    tv = pytest.importorskip("torchvision").models
    x, y = torch.randn(N, 3, 32, 32), torch.randint(C, (N,))
    check(tv.resnet18(num_classes=C), x, y)
    check(tv.VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=C), x, y)
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=C, img_size=32, depth=2, init_values=0.1
    )
    check(vit, x, y)
    config = transformers.GPT2Config(
        n_layer=2,
        n_embd=32,
        n_head=2,
        vocab_size=50,
        n_positions=16,
        bos_token_id=1,
        eos_token_id=2,
    )
    ids = torch.randint(50, (N, T))
    check(transformers.GPT2LMHeadModel(config), ids, ids.roll(-1, 1), reading={"shift": False})


def test_one_backward_pass_a_batch_once_tested(monkeypatch):
    passes = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(1) or grad(*a, **k))
    n = 16 * 10
    x, y = torch.randn(n, D), torch.randint(C, (n,))
    model = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, C))
    imu.parameter_importance(model, list(zip(x.split(16), y.split(16), strict=True)))
    assert len(passes) == 10 + 2  # batches 0 and 8 are tested


def test_the_matrix_of_a_batch_is_never_held():
    """No tensor is larger than the weights, of which the matrix would have 64."""
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    x, y = torch.randn(64, 256), torch.randint(256, (64,))
    weights = sum(p.nbytes for p in model.parameters())
    biggest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                biggest.append(out.untyped_storage().nbytes())
            return out

    with Watch():
        imu.parameter_importance(model, (x, y))
    assert max(biggest) <= weights
