"""Forms in which models come: wrapped, compiled, quantised, adapted, with layers of their own."""

from __future__ import annotations

import copy
import dataclasses
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
