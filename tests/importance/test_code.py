"""Importance of parameters that the model's own code uses."""

from __future__ import annotations

import pytest
import torch
from importance_truth import C, H, Net, T, check, tokens
from torch import nn
from torch.nn import functional as F


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
