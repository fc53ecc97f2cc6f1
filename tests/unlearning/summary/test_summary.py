"""A training set's summary: beside autograd's dense Hessian, in its file, refused elsewhere."""

from __future__ import annotations

import copy
import json
import logging
import os

import pytest
import torch
from torch import nn

import imu_fast as imu
from imu_fast.errors import InputError, SingularMatrixError
from imu_fast.storage import load_tensors, save_tensors
from imu_fast.unlearning.summary import hessian as hessians
from imu_fast.unlearning.summary.hessian import HESSIANS, head_hessian

every_kind = pytest.mark.parametrize("kind", HESSIANS)


def network(classes=3, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, classes, bias=bias)).double()


def samples(n=17, classes=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.arange(n) % classes


def head_of(model):
    head = model[-1]
    parts = [head.weight.detach()]
    if head.bias is not None:
        parts.append(head.bias.detach()[:, None])
    return torch.cat(parts, dim=1)


def augmented(model, x):
    act = model[:-1](x).detach()
    return torch.cat([act, torch.ones_like(act[:, :1])], 1) if model[-1].bias is not None else act


def dense_hessian(model, x, y):
    """Autograd's, of the summed loss in ``theta [C, D]``, flattened by rows: [P, P]."""
    act, theta = augmented(model, x), head_of(model)

    def loss(flat):
        return nn.functional.cross_entropy(act @ flat.view_as(theta).T, y, reduction="sum")

    return torch.autograd.functional.hessian(loss, theta.flatten())


def dense(operator, shape):
    """What an operator on [C, D] is as a matrix."""
    eye = torch.eye(shape[0] * shape[1], dtype=torch.float64).view(-1, *shape)
    return operator(eye).flatten(1).T


def of_kind(full, kind, model, x):
    """The dense Hessian as the kind keeps it."""
    classes, width = head_of(model).shape
    if kind == "exact":
        return full
    blocks = full.view(classes, width, classes, width)
    if kind == "blocks":
        return torch.block_diag(*(blocks[c, :, c] for c in range(classes)))
    p, act = model(x).detach().softmax(1), augmented(model, x)
    outputs = torch.diag(p.sum(0)) - p.T @ p
    return torch.kron(outputs, act.T @ act) / len(x)


@every_kind
@pytest.mark.parametrize("classes, bias", [(3, True), (2, False)])
def test_it_is_autograds_hessian_less_that_of_the_forgotten(kind, classes, bias, tmp_path):
    model, (x, y) = network(classes, bias), samples(classes=classes)
    found = imu.save_summary(model, (x, y), tmp_path / "s", kind=kind)
    with torch.no_grad():
        act = augmented(model, x)
    part = imu.save_summary(model, (x[:4], y[:4]), tmp_path / "part", kind=kind)
    shape = found.hessian.shape
    less = found.hessian - part.hessian
    for hessian, rows in ((found.hessian, slice(None)), (less, slice(4, None))):
        truth = of_kind(dense_hessian(model, x[rows], y[rows]), kind, model, x[rows])
        damped = hessian.damped(0.3)
        truth_damped = truth + 0.3 * torch.eye(len(truth), dtype=torch.float64)
        torch.testing.assert_close(dense(damped.product, shape), truth_damped, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            dense(damped.solve, shape), torch.linalg.inv(truth_damped), rtol=0, atol=1e-10
        )
        assert hessian.trace() == pytest.approx(float(truth.trace()), rel=1e-12)
        assert hessian.n == len(x[rows])
    torch.testing.assert_close(found.second_moment, act.T @ act / len(x), rtol=1e-13, atol=1e-14)
    means = torch.stack([act[y == c, :5].mean(0) for c in range(classes)])
    torch.testing.assert_close(found.class_means, means, rtol=1e-13, atol=1e-14)
    assert found.class_counts.tolist() == torch.bincount(y).tolist()


@every_kind
def test_a_loader_of_any_batches_and_a_float32_model(kind, tmp_path):
    model, (x, y) = network(), samples()
    whole = imu.save_summary(model, (x, y), tmp_path / "a", kind=kind)
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    pieces = imu.save_summary(model, batches, tmp_path / "b", kind=kind)
    narrow = imu.save_summary(
        copy.deepcopy(model).float(), (x.float(), y), tmp_path / "c", kind=kind
    )
    for name, truth in whole.hessian.tensors().items():
        for other, atol in ((pieces, 1e-12), (narrow, 1e-5)):
            torch.testing.assert_close(other.hessian.tensors()[name], truth, rtol=0, atol=atol)
            assert other.hessian.tensors()[name].dtype == torch.float64


@every_kind
def test_what_is_read_is_what_was_written(kind, tmp_path, caplog):
    model, (x, y) = network(), samples()
    path = tmp_path / "new folder" / "s"
    with caplog.at_level(logging.INFO, logger="imu_fast"):
        saved = imu.save_summary(
            model, (x, y), path, kind=kind, weight_decay=5e-4, unseen=(x[:6], y[:6])
        )
    assert repr(saved) in caplog.text and f"hessian {kind} (loses {saved.loses})" in repr(saved)
    assert os.listdir(tmp_path / "new folder") == ["s"], "nothing temporary is left"
    found = imu.load_summary(path)
    assert repr(found) == repr(saved) and found.nbytes == saved.nbytes <= path.stat().st_size
    assert found.unseen_accuracy == float((model(x[:6]).argmax(1) == y[:6]).double().mean())
    written = load_tensors(path)[0]
    assert sum(tensor.nbytes for tensor in written.values()) == found.nbytes
    for name, tensor in saved.hessian.tensors().items():
        assert torch.equal(found.hessian.tensors()[name], tensor), name
    for name in ("second_moment", "class_means", "class_counts"):
        assert torch.equal(getattr(found, name), getattr(saved, name)), name
    v = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(found.hessian.damped(0.1).solve(v), saved.hessian.damped(0.1).solve(v))


def test_it_is_exact_up_to_an_order_and_kfac_beyond(tmp_path, monkeypatch):
    model, data = network(), samples()
    assert imu.save_summary(model, data, tmp_path / "s").kind == "exact"
    monkeypatch.setattr(hessians, "EXACT_ORDER", 11)
    assert imu.save_summary(model, data, tmp_path / "s").kind == "kfac"
    assert imu.save_summary(model, data, tmp_path / "s", kind="exact").kind == "exact"


def test_confident_samples_keep_their_curvature(tmp_path):
    """Of a probability of 1 - 1e-12 the complement is not a difference from one."""
    model, (x, y) = network(), samples()
    with torch.no_grad():
        model[-1].weight *= 40
    for kind in HESSIANS:
        found = imu.save_summary(model, (x[:1], y[:1]), tmp_path / "s", kind=kind).hessian
        p = model(x[:1]).detach().softmax(1)
        others = 1 - p if float(p.max()) < 0.9 else torch.where(p < 0.5, 1 - p, p.sum() - p.max())
        truth = float((p * others).sum() * augmented(model, x[:1]).square().sum())
        assert found.trace() == pytest.approx(truth, rel=1e-3), kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"kind": "dense"}, "kind='dense' is unknown; choose one of auto, exact, blocks, kfac"),
        ({"unseen": 1.5}, r"unseen=1.5 must lie in \[0, 1\]"),
        ({"unseen": []}, "unseen: loader is empty"),
        ({"layers": 3}, "layers=3"),
        ({"layers": "0"}, "'0'"),
        ({"loss": "squared_error"}, r"save_summary\(\) takes loss=SquaredError"),
        ({"nonsense": 3}, r"save_summary\(\) has no option nonsense"),
    ],
)
def test_bad_arguments_are_refused_before_any_file(options, message, tmp_path):
    with pytest.raises((InputError, imu.ImuFastError), match=message):
        imu.save_summary(network(), samples(), tmp_path / "s", **options)
    assert not os.listdir(tmp_path)


def test_data_that_a_summary_cannot_be_of(tmp_path):
    model, (x, y) = network(), samples()
    path = tmp_path / "s"
    with pytest.raises(InputError, match=r"model is a str"):
        imu.save_summary("model", (x, y), path)
    with pytest.raises(InputError, match="loader is empty"):
        imu.save_summary(model, [], path)
    with pytest.raises(InputError, match="sample 0 has 0 valid labels"):
        imu.save_summary(model, (x, torch.where(y == 0, -100, y)), path)
    with pytest.raises(InputError, match="is a folder"):
        imu.save_summary(model, (x, y), tmp_path)
    assert not path.exists()


class Tied(nn.Module):
    """Its features change with the head."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Linear(5, 5), nn.Linear(5, 5)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.tanh(self.embedding(x)))


def test_a_head_whose_features_change_with_it(tmp_path):
    x, y = torch.randn(20, 5), torch.randint(5, (20,))
    model = Tied()
    before = model.head.weight.detach().clone()
    message = "'head' shares its weight with embedding.weight, so its features change with it"
    with pytest.raises(InputError, match=message):
        imu.save_summary(model, (x, y), tmp_path / "s")
    with pytest.raises(InputError, match=message):
        imu.unlearn(model, (x, y), "newton_removal", stop=imu.StopRule(forget_accuracy=0.0))
    assert torch.equal(model.head.weight, before) and not os.listdir(tmp_path)


def test_labels_of_a_dtype_that_are_no_classes(tmp_path):
    x, y = samples()
    for labels, message in (
        (nn.functional.one_hot(y).float(), "one-hot or soft labels"),
        (y.float(), "labels have dtype torch.float32"),
        (y > 0, "dtype torch.bool"),
    ):
        with pytest.raises(InputError, match=message):
            imu.save_summary(network(), (x, labels), tmp_path / "s")
    given = imu.save_summary(network(), (x, y), tmp_path / "s").hessian.trace()
    again = imu.save_summary(network(), (x, y.to(torch.int16)), tmp_path / "s").hessian.trace()
    assert given == again


def test_a_file_that_was_changed_or_is_another_is_refused(tmp_path):
    model, path = network(), tmp_path / "s"
    imu.save_summary(model, samples(), path)
    tensors, metadata = load_tensors(path)
    said = json.loads(metadata["training_summary"])
    for change, message in (
        ({"format": 2}, "has the summary format 2, this version reads 3"),
        ({"kind": "dense"}, "is damaged or was changed"),
        ({"shape": [3, 7]}, "is damaged or was changed"),
        ({"n": 18}, "its counts are not those of 18 samples"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
    ):
        save_tensors(path, tensors, {"training_summary": json.dumps({**said, **change})})
        with pytest.raises(InputError, match=message):
            imu.load_summary(path)
    for name in tensors:
        fewer = {k: v for k, v in tensors.items() if k != name}
        save_tensors(path, fewer, metadata)
        with pytest.raises(InputError, match="is damaged or was changed"):
            imu.load_summary(path)
    imu.fit("identity", imu.capture(model, samples())).save(path)
    with pytest.raises(InputError, match="holds no summary of a training set"):
        imu.load_summary(path)
    with pytest.raises(InputError, match="does not exist"):
        imu.load_summary(tmp_path / "absent")


@pytest.mark.parametrize("method", ["newton_removal", "margin_edit"])
def test_it_is_of_one_model_and_of_more_than_is_forgotten(method, tmp_path):
    model, (x, y) = network(), samples()
    summary = imu.save_summary(model, (x, y), tmp_path / "s")
    before = copy.deepcopy(model.state_dict())

    def refused(message, other, data, given=summary):
        with pytest.raises(InputError, match=message):
            imu.unlearn(other, data, method, summary=given)

    refused("summary is of other weights of the head '2'", network(seed=5), (x[:4], y[:4]))
    refused(r"summary is of a head \[3, 6\], the model's is \[4, 6\]", network(4), (x[:4], y[:4]))
    refused("nothing would be left", model, (x, y))
    features = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(features.parameters())).mul_(0.9)
    refused("summary is of features of other weights", features, (x[:4], y[:4]))
    refused("summary is a str; pass what imu_fast.save_summary", model, (x, y), "s")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    imu.unlearn(model, (x[:4], y[:4]), method, summary=summary)
    refused("or of this one before it was changed", model, (x[:4], y[:4]))


@every_kind
def test_an_indefinite_difference_says_how_much_damping_works(kind):
    model, (x, y) = network(), samples()
    small = head_hessian(imu.capture(model, (x[:3], y[:3])), kind)
    large = head_hessian(imu.capture(model, (3 * x, y)), kind)
    with pytest.raises(SingularMatrixError) as caught:
        (small - large).damped(1e-9)
    assert caught.value.smallest_damping is not None and caught.value.pivot >= 1
    (small - large).damped(1.01 * caught.value.smallest_damping)
