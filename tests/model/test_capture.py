"""Capture: the head is found in every family of models, in one pass, and nothing is left behind."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import imu_fast as imu
from imu_fast import reference
from imu_fast.errors import InputError, NoHeadFoundError
from imu_fast.model.guard import preserved
from imu_fast.model.head import linear_layers_matching


def plain():
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
    )


def data(n=10, classes=3):
    return torch.randn(n, 6), torch.arange(n) % classes


def build(name):
    """A small model of each family, its input, and its head's name."""
    image = torch.randn(4, 3, 32, 32)
    if name == "torchvision resnet":
        models = pytest.importorskip("torchvision").models
        return models.resnet18(num_classes=5), {"x": image}, "fc"
    if name == "torchvision mobilenet":
        models = pytest.importorskip("torchvision").models
        return models.mobilenet_v3_small(num_classes=5), {"x": image}, "classifier.3"
    if name == "timm":
        timm = pytest.importorskip("timm")
        return timm.create_model("resnet10t", num_classes=5), {"x": image}, "fc"
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    if name == "transformers ViT":
        config = transformers.ViTConfig(image_size=32, patch_size=16, num_labels=5, **small)
        model = transformers.ViTForImageClassification(config)
        return model, {"pixel_values": image}, "classifier"
    ids = torch.randint(1, 50, (4, 7))
    if name == "transformers BERT":
        config = transformers.BertConfig(vocab_size=50, num_labels=5, **small)
        model = transformers.BertForSequenceClassification(config)
        return model, {"input_ids": ids}, "classifier"
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, num_labels=5, pad_token_id=0
    )
    return transformers.GPT2ForSequenceClassification(config), {"input_ids": ids}, "score"


FAMILIES = [
    "torchvision resnet",
    "torchvision mobilenet",
    "timm",
    "transformers ViT",
    "transformers BERT",
    "transformers GPT2 (every token is scored, one is picked)",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_every_family(family):
    model, inputs, name = build(family)
    labels = torch.tensor([0, 4, 2, 1])
    batch = (inputs["x"], labels) if "x" in inputs else {**inputs, "labels": labels}
    found = imu.capture_features(model, [batch])
    assert found.name == name
    assert imu.find_head(model)[0] == name
    model.eval()
    with torch.no_grad():
        out = model(inputs["x"]) if "x" in inputs else model(**inputs).logits
    torch.testing.assert_close(found.head(found.features), out, rtol=1e-5, atol=1e-5)
    assert imu.influence_scores(model, [batch]).shape == (4,)


def test_one_forward_pass_and_the_order_of_the_loader():
    model, (x, y) = plain(), data()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    found = imu.capture_features(model, DataLoader(TensorDataset(x, y), batch_size=4))
    assert len(calls) == 3
    assert torch.equal(found.labels, y)
    expected = model.eval()[:4](x)
    torch.testing.assert_close(found.features, expected)
    assert not found.features.requires_grad


def test_by_name_by_module_and_all_the_ways_to_pass_data():
    model, (x, y) = plain(), data()
    first = imu.capture(model, (x, y))
    batches = [{"input": x[:5], "label": y[:5]}, {"input": x[5:], "label": y[5:]}]
    for factors in (
        imu.capture(model, [(x, y)]),
        imu.capture(model, batches),
        imu.capture(model, DataLoader(TensorDataset(x, y), batch_size=3), progress=True),
    ):
        torch.testing.assert_close(factors.delta, first.delta)
    for head in ("4", model[4]):
        assert torch.equal(imu.capture_features(model, (x, y), head).features, first.act)


def test_any_linear_layers_have_autograds_gradients():
    model, (x, y) = plain().double(), data()
    x = x.double()
    captured = imu.capture(model, (x, y), layers=["4", model[0]])
    assert [f.name for f in captured] == ["0", "4"]  # in the model's order
    model.eval()
    for factors, layer in zip(captured, (model[0], model[4]), strict=True):
        g = reference.sample_gradients(factors.delta, factors.act, factors.offsets, True)
        for i in range(len(x)):
            loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
            w, b = torch.autograd.grad(loss, [layer.weight, layer.bias])
            torch.testing.assert_close(g[i], torch.cat([w, b[:, None]], 1))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    single = imu.capture(model, (x, y), layers="0")
    torch.testing.assert_close(single.delta, captured[0].delta)
    assert linear_layers_matching(model, "4") == ["4"]


def test_token_labels_are_packed_and_shifted():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.score = nn.Embedding(11, 6), nn.Linear(6, 11)

        def forward(self, ids):
            return self.score(self.body(ids))

    model = Tagger()
    ids = torch.randint(11, (3, 5))
    labels = ids.clone()
    labels[0, 2:] = -100
    labels[1] = -100
    f = imu.capture(model, (ids, labels), shift=False)
    assert f.offsets.diff().tolist() == [2, 0, 5]
    shifted = imu.capture(model, (ids, labels), shift=True)
    assert torch.equal(imu.capture(model, (ids, labels)).act, shifted.act)  # labels are its inputs
    assert shifted.offsets.diff().tolist() == [1, 0, 4]
    torch.testing.assert_close(shifted.act[-1], model.body(ids[2, 3]).detach())
    loss = nn.functional.cross_entropy(model(ids[2, :-1]), labels[2, 1:])
    torch.testing.assert_close(shifted.losses[2], loss.detach())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("layers", ["head", ["0"]])
def test_everything_is_restored_after_a_failure(error, layers):
    model, (x, y) = plain(), data()
    model.train()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    modes = [m.training for m in model.modules()]
    mean = model[1].running_mean.clone()

    def batches():
        yield x[:4], y[:4]
        model.train()  # even if the user's loader meddles
        yield x[4:], y[4:]
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        imu.capture(model, batches(), layers=layers)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert torch.equal(model[1].running_mean, mean)
    assert sum(len(m._forward_hooks) for m in model.modules()) == 1


def test_preserved_restores_buffers_only_when_asked():
    model = plain()
    mean = model[1].running_mean.clone()
    with preserved(model):
        model.train()(torch.randn(5, 6) + 3)
    assert torch.equal(model[1].running_mean, mean)
    with preserved(model, buffers=False):
        model.train()(torch.randn(5, 6) + 3)
    assert not torch.equal(model[1].running_mean, mean)


def test_half_precision_models():
    model, (x, y) = plain().to(torch.bfloat16), data()
    f = imu.capture(model, (x.to(torch.bfloat16), y))
    assert f.delta.dtype == torch.float32


def test_a_shuffling_loader_is_reported(caplog):
    model, (x, y) = plain(), data()
    with caplog.at_level(logging.WARNING, "imu_fast"):
        imu.capture(model, DataLoader(TensorDataset(x, y), shuffle=True))
    assert "shuffles" in caplog.text


def test_models_without_a_linear_head():
    convolution = nn.Sequential(nn.Conv2d(1, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    batch = (torch.randn(2, 1, 4, 4), torch.tensor([0, 1]))
    with pytest.raises(NoHeadFoundError, match="linear layers.*none"):
        imu.capture(convolution, batch)
    with pytest.raises(NoHeadFoundError, match="none"):
        imu.find_head(convolution)
    with pytest.raises(NoHeadFoundError, match="layers='body'.*'4'"):
        imu.capture(plain(), data(), layers=["body"])
    with pytest.raises(NoHeadFoundError, match="no linear layer of the model"):
        imu.find_head(plain(), nn.Linear(2, 2))
    with pytest.raises(NoHeadFoundError, match=r"0: not the producer of the logits.*'4': \(3, 8\)"):
        imu.capture_features(plain(), data(), "0")


def test_bad_data():
    model, (x, y) = plain(), data()
    with pytest.raises(InputError, match="loader is empty"):
        imu.capture(model, [])
    with pytest.raises(InputError, match="loader is empty"):
        imu.capture(model, (x[:0], y[:0]))
    with pytest.raises(InputError, match="loader is empty"):
        imu.capture(model, [], layers=["0"])
    with pytest.raises(InputError, match=r"samples from 5 on: labels\[2\]=3"):
        imu.capture(model, [(x[:5], y[:5]), (x[5:], torch.tensor([0, 1, 3, 0, 0]))])
    bad = x.clone()
    bad[7, 0] = torch.inf
    with pytest.raises(InputError, match="features is not finite at sample 7"):
        imu.capture(model, (bad, y))
    with pytest.raises(InputError, match="lengths"):
        imu.capture(model, (x, y[:3]))
    with pytest.raises(InputError, match="pass a DataLoader"):
        imu.capture(model, 3)
    with pytest.raises(InputError, match="'labels' or 'label'"):
        imu.capture(model, [{"x": x}])
    with pytest.raises(InputError, match=r"\(inputs, labels\)"):
        imu.capture(model, [x])
    with pytest.raises(InputError, match="one label per row"):
        imu.capture(model, (x, torch.zeros(10, 2, dtype=torch.int64)))
    with pytest.raises(InputError, match="names no layer"):
        imu.capture(model, (x, y), layers=[])

    class Odd(nn.Module):
        def forward(self, x):
            return 3

    with pytest.raises(NoHeadFoundError, match="no linear head"):
        imu.capture(Odd(), (x, y))


def test_find_head_of_plain_models():
    assert imu.find_head(plain())[0] == "4"
    assert imu.find_head(nn.Linear(3, 2))[0] == "(model)"
