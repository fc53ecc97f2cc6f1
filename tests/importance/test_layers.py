"""Importance of every kind of layer, against float64 autograd of one sample at a time."""

from __future__ import annotations

import pytest
import torch
from importance_truth import C, D, H, N, Net, T, check, images, pooled, tokens, truth
from torch import nn
from torch.nn import functional as F

import imu_fast as imu

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


@pytest.mark.parametrize("compiled", [True, False])
def test_a_tied_weight_of_several_uses_and_chunks(monkeypatch, compiled):
    from imu_fast.importance import gradients
    from imu_fast.ops import squared_products

    class Twice(Language):
        def forward(self, ids):
            more = self.wte(ids.flip(1)).cumsum(1)
            z = super().forward(ids)
            return z + self.head(torch.sin(more)) * torch.tanh(z)

    if not compiled:
        monkeypatch.setattr(squared_products, "extension", lambda tensor: None)
    monkeypatch.setattr(gradients, "_COPIED_ELEMENTS", 2 * 2 * T * 11)  # two samples, two uses
    ids = torch.randint(11, (N, T))
    check(Twice(True), ids, ids.roll(1, 1))


def test_slabs_of_a_weight_that_is_multiplied_and_looked_into(monkeypatch):
    from imu_fast.importance import batch

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.fc = nn.Parameter(torch.randn(H, D)), nn.Linear(H, C)

        def forward(self, x):
            h = torch.tanh(F.linear(x, self.w)).mean(1)
            return self.fc(h + (x.mean(1)[:, None] + self.w).tanh().sum(2))

    monkeypatch.setattr(batch, "_SLAB_ELEMENTS", 3 * D)
    check(Both(), *tokens())


def test_recurrent_networks():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.fc = nn.LSTM(D, H, batch_first=True), nn.Linear(H, C)

        def forward(self, x):
            return self.fc(self.lstm(x)[0][:, -1])

    check(Recurrent(), *tokens())


def test_an_embedding_that_renorms_its_weight():
    class Renormed(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.fc = nn.Embedding(11, H, max_norm=0.5), nn.Linear(H, C)

        def forward(self, ids):
            return self.fc(self.emb(ids).mean(1))

    check(Renormed(), torch.randint(11, (N, T)), torch.randint(C, (N,)))


class Grouped(nn.Module):
    """Bags, a gated recurrence, and adapters beside a linear layer."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(11, H, mode="sum", padding_idx=3)
        self.wte, self.gru = nn.Embedding(11, H), nn.GRU(H, H, batch_first=True)
        self.base, self.fc = nn.Linear(H, H), nn.Linear(H, C)
        self.base.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(H, 2, bias=False), nn.Linear(2, H, bias=False)

    def forward(self, ids):
        h = self.gru(self.wte(ids))[0].mean(1) + self.bag(ids)
        return self.fc(torch.tanh(self.base(h) + 2 * self.lora_B(self.lora_A(h))))


def test_bags_gated_recurrences_and_adapters():
    found = check(Grouped(), torch.randint(11, (N, T)), torch.randint(C, (N,)))
    assert float(found["base.weight"].sum()) > 0  # frozen, and included


class Patches(nn.Module):
    """The gradient that comes back to the norm is a slice, turned: its strides are odd."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, H, 3, padding=1, bias=False), nn.BatchNorm2d(H)
        self.token, self.fc = nn.Parameter(torch.randn(1, 1, H)), nn.Linear(H, C)

    def forward(self, x):
        h = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        return self.fc(torch.cat([self.token.expand(len(x), -1, -1), h], 1).tanh().mean(1))


def test_batch_norm_under_one_sample():
    """torch's own backward is wrong for it alone on some versions, so the truth runs it twice."""

    def twice(model, sample):
        x, y = sample
        out = model(torch.stack([x, x]).to(next(model.parameters()).dtype))
        return F.cross_entropy(out[:1], y[None])

    check(Patches(), *images(), sizes=[1] * N, loss=twice)
    check(Patches(), *images(), sizes=(1, N - 1), loss=twice)
