"""What a capture keeps of each batch: copies where they are needed, each once."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import imu_fast as imu
from imu_fast.curvature.gradients import gradients
from imu_fast.model.packing import BatchPacker
from imu_fast.model.stacks import Stack

N, T, D, C = 6, 3, 5, 4


class Attention(nn.Module):
    """Three layers that read the same tensor; what comes after it is told by ``after``."""

    def __init__(self, after=None):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
        self.fc, self.after = nn.Linear(D, C), after

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.after is not None:
            q, v = self.after(x, q, v)
        return self.fc((q @ k.transpose(1, 2)).softmax(dim=2) @ v).mean(dim=1)


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, T, D, generator=generator)
    return x, torch.randint(C, (N,), generator=generator)


def truth(model, x, y):
    """Of each sample by one backward pass in float64: [n, C, D] of every layer."""
    model = type(model)(model.after).double()
    found = {}
    for name in "qkv":
        layer = model.get_submodule(name)
        rows = []
        for one, label in zip(x.double(), y, strict=True):
            loss = nn.functional.cross_entropy(model(one[None].clone()), label[None])
            w, b = torch.autograd.grad(loss, [layer.weight, layer.bias])
            rows.append(torch.cat([w, b[:, None]], dim=1))
        found[name] = torch.stack(rows)
    return found


def assert_right(factors, expected):
    for layer in factors:
        g = gradients(layer).double()
        off = (g - expected[layer.name]).norm() / expected[layer.name].norm()
        assert off < 1e-5, layer.name


def batches(x, y):
    return [(x[:4].clone(), y[:4]), (x[4:].clone(), y[4:])]


def test_layers_that_read_the_same_tensor_share_their_inputs():
    x, y = data()
    model = Attention()
    found = imu.capture(model, batches(x, y), layers=["q", "k", "v"])
    assert_right(found, truth(model, x, y))
    assert len({layer.act.data_ptr() for layer in found}) == 1


def first_position(x, q, v):
    """No gradient at the other positions of q: its rows are others than those of k and v."""
    return q[:, :1].expand_as(q), v


def test_layers_that_keep_other_rows_have_inputs_of_their_own():
    x, y = data()
    model = Attention(first_position)
    q, k, v = imu.capture(model, batches(x, y), layers=["q", "k", "v"])
    assert (q.num_tokens, k.num_tokens, v.num_tokens) == (N, N * T, N * T)
    assert k.act.data_ptr() == v.act.data_ptr()
    assert_right([q, k, v], truth(model, x, y))


def writes_to_outputs(x, q, v):
    return q.mul_(0.5), v.tanh_()


@pytest.mark.parametrize("later", [False, True])
def test_outputs_that_the_model_writes_to(later):
    def after(x, q, v):
        return writes_to_outputs(x, q, v) if not later or len(x) < 4 else (q * 0.5, v.tanh())

    x, y = data()
    model = Attention(after)
    found = imu.capture(model, batches(x, y), layers=["q", "k", "v"])
    assert_right(found, truth(Attention(writes_to_outputs), x, y))


def test_inputs_that_the_model_writes_to_later_on():
    """Here also the batch's own. In a later batch: the first asks for the weights' gradients too,
    which autograd refuses.
    """

    def after(x, q, v):
        if len(x) == 2:
            x.zero_()
        return q, v

    x, y = data()
    found = imu.capture(Attention(after), batches(x, y), layers=["q", "k", "v"])
    assert_right(found, truth(Attention(), x, y))


def test_a_loader_that_fills_one_buffer_again_and_again():
    x, y = data()

    def loader():
        buffer = torch.empty(2, T, D)
        for start in range(0, N, 2):
            buffer.numpy()[:] = x[start : start + 2].numpy()  # which no version counts
            yield buffer, y[start : start + 2]

    found = imu.capture(Attention(), loader(), layers=["q", "k", "v"])
    assert_right(found, truth(Attention(), x, y))


def test_only_rows_of_zeros_are_left_out():
    """Not those whose squares vanish, nor those that are not finite."""
    delta = torch.zeros(6, 3)
    delta[1, 2], delta[3, 0], delta[4, 1] = 1e-30, float("nan"), float("inf")
    owner = torch.tensor([0, 0, 1, 1, 1, 2])
    part = BatchPacker(torch.tensor([True, True, True]))(delta, torch.randn(6, 2), owner)
    # The third sample has no gradient, and a row of zeros.
    assert part.counts.tolist() == [1, 2, 1]
    assert not part.finite
    expected = torch.cat([delta[[1, 3, 4]], torch.zeros(1, 3)])
    torch.testing.assert_close(part.delta, expected, rtol=0, atol=0, equal_nan=True)
    stack = Stack(2)
    for _ in range(2):
        stack.add(part.signal, part.packing, torch.float32)
    whole = stack.tensor(torch.float32)
    torch.testing.assert_close(whole, torch.cat([expected] * 2), rtol=0, atol=0, equal_nan=True)


def test_memory_of_a_batch_is_not_reused_between_layers():
    """Rows of several calls are joined in memory of their own, which may come back at one place."""
    pack = BatchPacker(torch.ones(2, dtype=torch.bool))
    owner = torch.tensor([0, 1, 1])
    parts = [pack(torch.ones(3, 2), torch.full((3, 4), float(i)), owner) for i in range(20)]
    assert [float(part.act[0, 0]) for part in parts] == [float(i) for i in range(20)]


@pytest.mark.parametrize("lengths", [[1, 1, 1], [4, 4], [2, 0, 5]])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gradients_go_where_they_are_wanted(lengths, has_bias):
    torch.manual_seed(0)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    delta, act = torch.randn(int(offsets[-1]), C), torch.randn(int(offsets[-1]), D)
    factors = imu.GradientFactors(delta, act, offsets, has_bias)
    wide = torch.cat([act, torch.ones(len(act), int(has_bias))], dim=1)
    cuts = list(pairwise(offsets.tolist()))
    expected = torch.stack([delta[a:b].T @ wide[a:b] for a, b in cuts])
    whole = torch.full((len(lengths), expected[0].numel() + 7), 2.0)
    gradients(factors, out=whole[:, 3:-4].unflatten(1, expected.shape[1:]))
    torch.testing.assert_close(whole[:, 3:-4], expected.flatten(1))
    torch.testing.assert_close(gradients(factors), expected)
    assert bool((whole[:, :3] == 2).all()) and bool((whole[:, -4:] == 2).all())


class Labelled(nn.Module):
    """A language model that makes its inputs from the labels, where ``shifts`` says so."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(C, D), nn.Linear(D, C)
        self.config, self.asked = type("Config", (), {})(), []
        self.config.shifts = self.shifts = False

    def forward(self, input_ids, labels=None):
        self.asked += [True] * (labels is not None)
        if (self.shifts or self.config.shifts) and labels is not None:
            input_ids = labels.roll(1, dims=1)
        return {"logits": self.head(self.embedding(input_ids))}


@pytest.mark.parametrize("of", ["config", "model"])
def test_a_model_is_asked_once_what_it_does_with_labels_until_it_changes(of):
    ids = torch.randint(C, (4, 5))
    batch = {"input_ids": ids, "labels": ids}
    model = Labelled()

    def asked():
        model.asked.clear()
        imu.capture(model, [batch], layers=["head"], shift=True)
        return len(model.asked)

    assert (asked(), asked()) == (1, 0)
    {"config": model.config, "model": model}[of].shifts = True
    assert asked() > 1  # once, and then with each batch


class Reads(nn.Module):
    """Two layers, of which the second reads what the first reads where ``same`` says so."""

    def __init__(self, same):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.fc = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, C)
        self.same = same

    def forward(self, x):
        return self.fc(self.a(x) + self.b(x if self.same(x) else x * 2).tanh()).mean(dim=1)


FORMS = {"list": list, "iterator": iter, "loader": lambda batches: Batches(batches)}


class Batches:
    """Of a length that it does not say."""

    def __init__(self, batches):
        self._batches = batches

    def __iter__(self):
        return iter(self._batches)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [[2, 2, 2], [1, 4, 1], [4, 1, 1], [6]], ids=str)
@pytest.mark.parametrize("which", ["always", "first", "last", "never"])
def test_batches_of_any_sizes_and_inputs_that_are_not_always_shared(which, sizes, form):
    """Lengths of sequences differ as well, so that no batch says how large the others are."""
    generator = torch.Generator().manual_seed(1)
    data = [
        (torch.randn(n, T + i, D, generator=generator), torch.arange(n) % C)
        for i, n in enumerate(sizes)
    ]
    same = {
        "always": lambda x: True,
        "first": lambda x: x.shape[1] == T,
        "last": lambda x: x.shape[1] == T + len(sizes) - 1,
        "never": lambda x: False,
    }[which]
    model = Reads(same)
    a, b = imu.capture(model, FORMS[form](data), layers=["a", "b"], shift=False)
    shared = which == "always" or (len(sizes) == 1 and which != "never")
    assert (a.act.data_ptr() == b.act.data_ptr()) == shared
    for layer in (a, b):
        assert layer.act.untyped_storage().nbytes() <= 1.4 * layer.act.nbytes
        assert layer.delta.untyped_storage().nbytes() <= 1.4 * layer.delta.nbytes
        expected = []
        for x, y in data:
            exact = Reads(same).double()
            weight = exact.get_submodule(layer.name).weight
            for one, label in zip(x.double(), y, strict=True):
                loss = nn.functional.cross_entropy(exact(one[None]), label[None])
                expected.append(torch.autograd.grad(loss, weight)[0])
        g = gradients(layer)[..., :D].double()
        assert (g - torch.stack(expected)).norm() < 1e-5 * torch.stack(expected).norm()
