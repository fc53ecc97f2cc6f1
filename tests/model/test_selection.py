"""Which layers a name, the end of one, a pattern or a module stands for."""

from __future__ import annotations

import pytest
import torch
from per_sample import assert_scores, sample_gradients, scores
from torch import nn
from torch.nn import functional as F

import imu_fast as imu
from imu_fast.errors import InputError, NoHeadFoundError
from imu_fast.model.selection import selected

D, H, C, N = 5, 6, 4, 9


class Adapted(nn.Module):
    """A linear layer with an adapter, in peft's structure."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        size = base.out_features, base.in_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(size[1], 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, size[0], bias=False)})

    def forward(self, x):
        return self.base_layer(x) + 2 * self.lora_B["default"](self.lora_A["default"](x))


class Block(nn.Module):
    def __init__(self, adapted):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(H, H), nn.Linear(H, H)
        if adapted:
            self.q_proj = Adapted(self.q_proj)
        self.eq_proj = nn.Linear(H, H)

    def forward(self, x):
        return x + torch.tanh(self.q_proj(x) + self.k_proj(x)) + self.eq_proj(x)


class Net(nn.Module):
    def __init__(self, adapted=False):
        super().__init__()
        self.inp, self.fc = nn.Linear(D, H), nn.Linear(H, C)
        self.blocks = nn.ModuleList([Block(adapted), Block(adapted)])
        self.k_proj = nn.Linear(H, H)

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(self.k_proj(x))


CASES = [
    ("fc", "fc", True),
    ("blocks.0.q_proj", "blocks.0.q_proj", True),
    ("k_proj", "k_proj", True),  # a whole name wins
    ("q_proj", "blocks.0.q_proj blocks.1.q_proj", False),
    ("0.q_proj", "blocks.0.q_proj", False),
    ("*.k_proj", "blocks.0.k_proj blocks.1.k_proj", False),
    (
        "blocks.?.[kq]_proj",
        "blocks.0.q_proj blocks.0.k_proj blocks.1.q_proj blocks.1.k_proj",
        False,
    ),
    (
        ["*.k_proj", "blocks.1.*", "fc"],
        "fc blocks.0.k_proj blocks.1.q_proj blocks.1.k_proj blocks.1.eq_proj",
        False,
    ),
    (["fc"], "fc", False),
]


@pytest.mark.parametrize("layers, names, single", CASES, ids=lambda v: str(v)[:30])
def test_names(layers, names, single):
    found, one = selected(Net(), layers)
    assert sorted(layer.name for layer in found) == sorted(names.split()) and one == single
    order = [name for name, _ in Net().named_modules()]
    assert [layer.name for layer in found] == sorted(names.split(), key=order.index)


def test_adapters_and_what_they_wrap():
    model = Net(adapted=True)
    wanted = {
        "q_proj": [f"blocks.{k}.q_proj.base_layer" for k in (0, 1)],
        "*.q_proj": [f"blocks.{k}.q_proj.base_layer" for k in (0, 1)],
        "lora_A": [f"blocks.{k}.q_proj.lora_A.default" for k in (0, 1)],
        "*lora_B*": [f"blocks.{k}.q_proj.lora_B.default" for k in (0, 1)],
        "blocks.1.q_proj": ["blocks.1.q_proj.base_layer"],
    }
    for layers, names in wanted.items():
        assert [layer.name for layer in selected(model, layers)[0]] == names
    x, y = torch.randn(N, D), torch.randint(C, (N,))
    for layers, names in wanted.items():
        parameters = [n for n, _ in model.named_parameters() if n.rpartition(".")[0] in names]
        truth = sum(  # each layer has a curvature of its own
            scores(sample_gradients(model, zip(x, y, strict=True), own, loss))
            for name in names
            for own in [[n for n in parameters if n.rpartition(".")[0] == name]]
        )
        assert_scores(imu.influence_scores(model, (x, y), layers=layers), truth)


def loss(model, sample):
    return F.cross_entropy(model(sample[0][None].double()), sample[1][None])


def test_inside_a_wrapper():
    model = nn.DataParallel(Net())
    assert [layer.name for layer in selected(model, "q_proj")[0]] == [
        "module.blocks.0.q_proj",
        "module.blocks.1.q_proj",
    ]
    assert selected(model, "fc")[1]


def test_transposed_convolution_of_gpt2():
    """act [N, d] and delta [N, C] of ``x W + b``: the scores of W^T, flattened as [C, d]."""
    transformers = pytest.importorskip("transformers")
    conv = transformers.pytorch_utils.Conv1D(C, D)
    model = nn.Sequential(nn.Tanh(), conv)
    x, y = torch.randn(N, D), torch.randint(C, (N,))
    factors = imu.capture(model, (x, y), layers="1")
    want = sample_gradients(model, zip(x, y, strict=True), ["1.weight", "1.bias"], loss)
    mean = want.mean(dim=0)
    weight, bias = mean[: C * D].view(D, C), mean[C * D :]
    expected = torch.cat([weight.T, bias[:, None]], dim=1)
    torch.testing.assert_close(factors.mean_gradient().double(), expected, rtol=1e-5, atol=1e-7)
    assert_scores(imu.influence_scores(factors), scores(want))


def test_refusals():
    model = Net()
    with pytest.raises(NoHeadFoundError, match=r"'qproj' is no linear layer.*did you mean"):
        selected(model, "qproj")
    with pytest.raises(InputError, match=r"'\*\.v_proj' matches none of the linear layers \['inp'"):
        selected(model, "*.v_proj")
    with pytest.raises(NoHeadFoundError, match="is no linear layer of the model but a Block"):
        selected(model, "blocks.0")
    with pytest.raises(InputError, match="twice"):
        selected(model, ["fc", model.fc])
    with pytest.raises(InputError, match="names no layer"):
        selected(model, [])
