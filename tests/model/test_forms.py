"""Forms in which models come: wrapped, compiled, quantised, adapted, with layers of their own."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections import namedtuple

import pytest
import torch
from per_sample import assert_scores, sample_gradients, scores
from torch import nn
from torch.nn import functional as F

import imu_fast as imu
from imu_fast.errors import InputError, NoHeadFoundError

N, D, H, C = 12, 6, 8, 5
HEAD = ("fc.weight", "fc.bias")


class Net(nn.Module):
    def __init__(self, fc=None, d=H):
        super().__init__()
        self.body, self.fc = nn.Linear(D, d), fc or nn.Linear(d, C)

    def features(self, x):
        return F.relu(self.body(x))

    def forward(self, x):
        return self.fc(self.features(x))


def data():
    return torch.randn(N, D), torch.randint(C, (N,))


def cross_entropy(model, sample):
    x, y = sample
    return F.cross_entropy(model(x[None].to(next(model.parameters()).dtype)), y[None])


def truth(model, x, y, names=HEAD, loss=cross_entropy):
    return scores(sample_gradients(model, zip(x, y, strict=True), names, loss))


# Wrappers and modes.


def test_wrappers():
    model, (x, y) = Net(), data()
    want = truth(model, x, y)
    wrapped = nn.DataParallel(model)
    assert imu.capture(wrapped, (x, y)).name == "module.fc" == imu.find_head(wrapped)[0]
    for layers in ("head", ["fc"], ["module.fc"], [model.fc]):
        assert_scores(imu.influence_scores(wrapped, (x, y), layers=layers), want)


@pytest.mark.parametrize("how", ["wrapped", "in place", "a part of it", "the head", "a function"])
def test_compiled_models(how):
    model, (x, y) = Net(), data()
    want, want_body = truth(model, x, y), truth(model, x, y, ("body.weight", "body.bias"))

    def compiled(module):
        return torch.compile(module, backend="eager")

    if how == "wrapped":
        model = compiled(model)
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "a part of it":
        model.body = compiled(model.body)
    elif how == "the head":
        model.fc = compiled(model.fc)
    else:
        model.forward = compiled(model.forward)
    model(x)  # has run before
    assert_scores(imu.influence_scores(model, (x, y)), want)
    body = next(name for name, m in model.named_modules() if m is not model and "body" in name)
    body = "body._orig_mod" if how == "a part of it" else body
    assert_scores(imu.influence_scores(model, (x, y), layers=[body]), want_body)
    model(x)


def test_inference_mode_and_no_grad_around_the_call():
    model, (x, y) = Net(), data()
    want, want_body = truth(model, x, y), truth(model, x, y, ("body.weight", "body.bias"))
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            inside = x.clone(), y.clone()
            for layers, wanted in (("head", want), (["body"], want_body)):
                factors = imu.capture(model, inside, layers=layers)
                assert_scores(imu.influence_scores(factors), wanted)
        assert_scores(imu.influence_scores(model, inside, layers=["body"]), want_body)
    with torch.inference_mode():
        born = Net()
    with pytest.raises(InputError, match="made under torch.inference_mode"):
        imu.capture(born, (x, y))


def test_autocast_around_the_call():
    model, (x, y) = Net(d=64), data()
    want = truth(model, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        factors = imu.capture(model, (x, y))
        body = imu.capture(model, (x, y), layers="body")
        seen = imu.capture_features(model, (x, y))
        floating = Net(d=64)
        floating.load_state_dict(model.state_dict())
        floating.fc.register_forward_hook(lambda *a: a[2].float())
        imu.capture(floating, (x, y), layers=["body"])
    again = imu.GradientFactors.from_head(seen.features, model.fc.weight, model.fc.bias, y)
    assert factors.delta.dtype == torch.float32 and torch.equal(factors.delta, again.delta)
    assert_scores(imu.influence_scores(factors), want, 0.03)
    assert_scores(
        imu.influence_scores(body), truth(model, x, y, ("body.weight", "body.bias")), 0.05
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [8, 700])
def test_half_precision_passes_the_check(dtype, d):
    model, (x, y) = Net(d=d).to(dtype), data()
    x = x.to(dtype)
    assert_scores(imu.influence_scores(model, (x, y)), truth(model, x, y), 0.05)


def test_lazy_and_scripted_models_are_refused():
    x, y = data()
    with pytest.raises(InputError, match="no shape yet"):
        imu.capture(nn.Sequential(nn.LazyLinear(C)), (x, y))
    with pytest.raises(InputError, match="TorchScript"):
        imu.capture(torch.jit.trace(Net(), x), (x, y))
    model = Net()
    want = truth(model, x, y)
    model.body = torch.jit.trace(model.body, x)
    assert_scores(imu.influence_scores(model, (x, y)), want)
    with pytest.raises(InputError, match="'body' is no linear layer of the model but a"):
        imu.capture(model, (x, y), layers=["body"])
    with pytest.raises(InputError, match="model is a function"):
        imu.capture(lambda x: x, (x, y))


def test_the_users_model_is_left_alone():
    model, (x, y) = Net().train(), data()
    model.body.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    for layers in ("head", ["body", "fc"]):
        imu.capture(model, (x, y), layers=layers)
    assert model.training and torch.is_grad_enabled()
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    assert torch.equal(rng, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# Heads that are not nn.Linear, or not only.


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


def test_one_output_for_two_classes():
    class Binary(Net):
        def __init__(self):
            super().__init__(nn.Linear(H, 1))

        def forward(self, x):
            z = super().forward(x)
            return torch.cat([torch.zeros_like(z), z], dim=1)

    model, (x, y) = Binary(), data()
    assert_scores(imu.influence_scores(model, (x, y % 2)), truth(model, x, y % 2))


# What models return.


@dataclasses.dataclass
class Record:
    hidden: torch.Tensor
    scores: torch.Tensor


class Plain:
    def __init__(self, z):
        self.z, self.note = z, "text"


Named = namedtuple("Named", "hidden prediction")


class Returning(Net):
    def __init__(self, form):
        super().__init__()
        self.form, self.second = form, nn.Linear(H, 7)

    def forward(self, x):
        h = self.features(x)
        return self.form(self, h, self.fc(h))


def returned(model, x, index):
    return index(model(x))


FORMS = {
    "embedding and logits": (lambda m, h, z: (h, z), lambda o: o[1]),
    "logits and embedding": (lambda m, h, z: (z, h), lambda o: o[0]),
    "logits, named": (lambda m, h, z: {"logits": z, "probs": z.softmax(1)}, lambda o: o["logits"]),
    "a loss first": (lambda m, h, z: (z.sum(), z), lambda o: o[1]),
    "a dataclass": (lambda m, h, z: Record(h, z), lambda o: o.scores),
    "a namedtuple": (lambda m, h, z: Named(h, z), lambda o: o.prediction),
    "an object": (lambda m, h, z: Plain(z), lambda o: o.z),
    "nested": (lambda m, h, z: {"out": [h, {"z": z}], "name": "x"}, lambda o: o["out"][1]["z"]),
    "sequences beside": (lambda m, h, z: (h[:, None].expand(-1, 3, -1), z), lambda o: o[1]),
    "not the last": (lambda m, h, z: (z, m.second(h)), None),
    "probabilities beside": (lambda m, h, z: [z, z.softmax(1)], None),
    "twice": (lambda m, h, z: {"a": z, "b": z * 2}, None),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layers", ["head", ["fc"]])
def test_what_models_return(form, layers):
    make, get = FORMS[form]
    model, (x, y) = Returning(make), data()
    if get is None:
        with pytest.raises(InputError, match="several tensors.*output="):
            imu.capture(model, (x, y), layers=layers)
        return
    want = truth(
        model, x, y, loss=lambda m, s: F.cross_entropy(get(m(s[0][None].double())), s[1][None])
    )
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    found = imu.capture(model, batches, layers=layers)
    assert_scores(imu.influence_scores(found), want)


def test_the_caller_says_which_output():
    model, (x, y) = Returning(lambda m, h, z: {"task": z, "other": m.second(h), "n": 3}), data()
    both = {"fc": "task", "second": "other"}
    for name, key in both.items():
        want = truth(
            model,
            x,
            y,
            (f"{name}.weight", f"{name}.bias"),
            lambda m, s, key=key: F.cross_entropy(m(s[0][None].double())[key], s[1][None]),
        )
        for output in (key, list(both.values()).index(key), lambda o, key=key: o[key], (key,)):
            found = imu.capture(model, (x, y), output=output)
            assert found.name == name
            assert_scores(imu.influence_scores(found), want)
            layer = imu.capture(model, (x, y), layers=[name], output=output)
            assert_scores(imu.influence_scores(layer), want)
    assert imu.capture_features(model, (x, y), output="other").output == "other"
    assert imu.capture(model, (x, y + 2)).name == "second"  # label 6 fits one of them only
    with pytest.raises(InputError, match="output='tusk': the model returned a dict with 'task'"):
        imu.capture(model, (x, y), output="tusk")
    with pytest.raises(InputError, match="output='n' gives a int"):
        imu.capture(model, (x, y), output="n")
    with pytest.raises(InputError, match="without logits of shape"):
        imu.capture(Returning(lambda m, h, z: {"h": h[0]}), (x, y))


def test_classes_that_the_model_declares():
    model, (x, y) = Returning(lambda m, h, z: (m.second(h), z)), data()
    model.num_classes = C
    assert imu.capture(model, (x, y)).name == "fc"


def test_a_reason_names_the_module_that_makes_the_logits():
    model = nn.Sequential(nn.Linear(D, H), nn.Bilinear(H, H, C))
    model.forward = lambda x: model[1](model[0](x), model[0](x))
    with pytest.raises(NoHeadFoundError, match="'1', a Bilinear"):
        imu.capture(model, data())
