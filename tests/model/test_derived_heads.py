"""Heads that are no plain linear layer: subclasses, prototypes, adapters, derived weights."""

from __future__ import annotations

import logging

import pytest
import torch
from model.test_forms import C, D, H, N, Net, data, truth
from per_sample import assert_scores
from torch import nn
from torch.nn import functional as F

import imu_fast as imu
from imu_fast.errors import InputError, NoHeadFoundError


class Exact(nn.Linear):
    """A subclass that does what nn.Linear does, in its own way."""

    def forward(self, input):
        return (self.weight @ input.T).T + self.bias


class Cosine(nn.Linear):
    def forward(self, input):
        return F.linear(F.normalize(input, dim=1), F.normalize(self.weight, dim=1))


class Slightly(nn.Linear):
    def forward(self, input):
        return 1.001 * super().forward(input)


class Noisy(nn.Linear):
    def forward(self, input):
        return super().forward(input + 1e-3)


class Adapted(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.a, self.b = (nn.Parameter(torch.randn(*s)) for s in ((2, H), (C, 2)))

    def forward(self, input):
        return super().forward(input) + input @ self.a.T @ self.b.T


class Tuple(nn.Linear):
    def forward(self, input):
        return super().forward(input), self.bias


@pytest.mark.parametrize("kind", [Cosine, Slightly, Noisy, Adapted])
@pytest.mark.parametrize("layers", ["head", ["fc"]])
def test_subclasses_that_are_not_linear_are_refused(kind, layers):
    with pytest.raises(InputError, match=f"'fc' is a {kind.__name__} whose output is not act W"):
        imu.capture(Net(kind(H, C)), data(), layers=layers)


def test_a_head_that_changes_later_is_noticed():
    model, (x, y) = Net(), data()
    batches = list(zip(x.split(2), y.split(2), strict=True))
    forward, ran = model.fc.forward, []

    def patched(h):
        ran.append(1)
        return forward(h) * (1 + 1e-3 * (len(ran) > 5))  # the first sample once more, alone

    model.fc.forward = patched
    with pytest.raises(NoHeadFoundError, match="samples from 8 on.*not act W"):
        imu.capture(model, batches)

    def meddling():
        yield from batches[:3]
        with torch.no_grad():
            model.fc.weight[2, 3] += 0.1
        yield from batches[3:]

    del model.fc.forward
    for layers in ("head", ["fc"]):
        with pytest.raises(NoHeadFoundError, match="not act W"):
            imu.capture(model, meddling(), layers=layers)


def test_subclasses_that_are_linear():
    model, (x, y) = Net(Exact(H, C)), data()
    assert_scores(imu.influence_scores(model, (x, y)), truth(model, x, y))
    model.fc = Tuple(H, C)
    model.forward = lambda x: model.fc(model.features(x))[0]
    with pytest.raises(NoHeadFoundError, match="'fc': it maps a Tensor to a tuple"):
        imu.capture(model, (x, y))


class CosineHead(nn.Module):
    def __init__(self, d=H):
        super().__init__()
        self.register_buffer("means", torch.randn(C, d))


class ByProduct(nn.Module):
    def __init__(self, d=H):
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(C, d))

    def forward(self, h):
        return F.normalize(h, dim=1) @ F.normalize(self.prototypes, dim=1).T * 10


class BySimilarity(CosineHead):
    def forward(self, h):
        return F.cosine_similarity(h[:, None], self.means[None], dim=2)


class ByDistance(CosineHead):
    def forward(self, h):
        return -(h[:, None] - self.means).square().sum(2)


class ByEinsum(CosineHead):
    def forward(self, h):
        return torch.einsum("bd,cd->bc", h, self.means)


@pytest.mark.parametrize("kind", [ByProduct, BySimilarity, ByDistance, ByEinsum])
@pytest.mark.parametrize("d", [H, C])  # also where the embedding is as wide as the logits
def test_heads_of_prototypes_are_refused_by_name(kind, d):
    class Projected(Net):
        def __init__(self):
            super().__init__(kind(d), d)

        def forward(self, x):
            return self.fc(self.body(x))

    (x, y) = data()
    with pytest.raises(NoHeadFoundError, match=f"'fc', a {kind.__name__}.*from_head"):
        imu.capture(Projected(), (x, y))
    model = Projected()
    found = imu.influence_scores(model, (x, y), layers=["body"])  # the way out
    assert_scores(found, truth(model, x, y, ("body.weight", "body.bias")))


def test_functional_heads_are_refused():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.weight = nn.Linear(D, H), nn.Parameter(torch.randn(C, H))

        def forward(self, x):
            return F.linear(F.relu(self.body(x)), self.weight)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.body = nn.Embedding(C, H), nn.Linear(D, H)

        def forward(self, x):
            return self.body(x) @ self.emb.weight.T

    for model in (Functional(), Tied()):
        with pytest.raises(NoHeadFoundError, match=f"the code of {type(model).__name__} itself"):
            imu.capture(model, data())


def test_quantised_heads_are_refused():
    from torch.ao.nn.quantized import dynamic

    model, (x, y) = Net(dynamic.Linear(H, C)), data()
    with pytest.raises(NoHeadFoundError, match=r"'fc', a Linear.*from_head"):
        imu.capture(model, (x, y))

    class Int8(nn.Linear):
        def __init__(self):
            super().__init__(H, C)
            self.weight = nn.Parameter((self.weight * 100).round().to(torch.int8), False)

        def forward(self, input):
            return F.linear(input, self.weight.to(input.dtype) / 100, self.bias)

    with pytest.raises(NoHeadFoundError, match="Int8.*quantised"):
        imu.capture(Net(Int8()), (x, y))


class Lora(nn.Module):
    def __init__(self, modules):
        super().__init__()
        self.base = nn.Linear(H, C)
        if modules:
            self.lora_A, self.lora_B = nn.Linear(H, 2, bias=False), nn.Linear(2, C, bias=False)
        else:
            self.a, self.b = (nn.Parameter(torch.randn(*s)) for s in ((H, 2), (2, C)))

    def forward(self, h):
        if hasattr(self, "a"):
            return self.base(h) + h @ self.a @ self.b
        return self.base(h) + self.lora_B(self.lora_A(h))


def test_adapters():
    x, y = data()
    with pytest.raises(NoHeadFoundError, match="merge it"):
        imu.capture(Net(Lora(True)), (x, y))
    model = Net(Lora(True))
    for name in ("base", "lora_A", "lora_B"):
        names = [n for n, _ in model.named_parameters() if name in n]
        found = imu.influence_scores(model, (x, y), layers=[f"fc.{name}"])
        assert_scores(found, truth(model, x, y, names))
    model = Net(Lora(False))
    factors = imu.capture(model, (x, y))
    assert factors.name == "fc.base"
    assert_scores(
        imu.influence_scores(factors), truth(model, x, y, ("fc.base.weight", "fc.base.bias"))
    )


WRAPS = [
    nn.utils.weight_norm,
    nn.utils.spectral_norm,
    nn.utils.parametrizations.weight_norm,
    nn.utils.parametrizations.spectral_norm,
    nn.utils.parametrizations.orthogonal,
]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.filterwarnings("ignore")
def test_derived_weights(wrap, caplog):
    model, (x, y) = Net(wrap(nn.Linear(H, C))), data()
    model(x)
    model.eval()
    plain = Net()
    plain.load_state_dict(
        {
            "body.weight": model.body.weight,
            "body.bias": model.body.bias,
            "fc.weight": model.fc.weight.detach(),
            "fc.bias": model.fc.bias,
        }
    )
    with caplog.at_level(logging.WARNING, "imu_fast"):
        found = imu.influence_scores(model, (x, y))
    assert "makes its weight from other parameters" in caplog.text
    assert_scores(found, truth(plain, x, y))
    features = imu.capture_features(model, (x, y))
    assert not features.plain and "computes its weight" in features.why
    assert_scores(imu.influence_scores(model, (x, y), layers=["fc"]), truth(plain, x, y))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.filterwarnings("ignore")
def test_a_derived_weight_is_the_one_that_evaluation_makes(wrap, training):
    """Whatever was made of it before: parameters are loaded, and nothing has run since."""
    model, (x, y) = Net(wrap(nn.Linear(H, C))), data()
    other = Net(wrap(nn.Linear(H, C)))
    with torch.no_grad():
        next(p for n, p in other.fc.named_parameters() if "weight" in n).mul_(3).add_(0.5)
    model.load_state_dict(other.state_dict())
    fresh = Net(wrap(nn.Linear(H, C)))
    fresh.load_state_dict(other.state_dict())
    fresh.eval()(x)
    plain = Net()
    weights = {"body.weight": fresh.body.weight, "body.bias": fresh.body.bias}
    weights |= {"fc.weight": fresh.fc.weight.detach(), "fc.bias": fresh.fc.bias}
    plain.load_state_dict(weights)
    model.train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for layers in ("head", ["fc"]):
        assert_scores(imu.influence_scores(model, (x, y), layers=layers), truth(plain, x, y))
    found = imu.capture_features(model, (x, y))
    torch.testing.assert_close(found.head(found.features), plain(x))
    assert model.training is training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_shared_weights_are_said():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.out = nn.Embedding(C, H), nn.Linear(H, C, bias=False)
            self.out.weight = self.emb.weight

        def forward(self, ids):
            return self.out(self.emb(ids).mean(1))

    features = imu.capture_features(Tied(), (torch.randint(C, (N, 3)), torch.randint(C, (N,))))
    assert not features.plain and features.linear and "emb.weight" in features.why


def test_a_vocabulary_that_is_padded():
    class Padded(Net):
        def __init__(self):
            super().__init__(nn.Linear(H, C + 3))

        def forward(self, x):
            return super().forward(x)[:, :C]

    model, (x, y) = Padded(), data()
    factors = imu.capture(model, (x, y))
    assert factors.num_classes == C + 3 and factors.labels is not None
    assert_scores(imu.influence_scores(factors), truth(model, x, y))
    assert not imu.capture_features(model, (x, y)).linear
