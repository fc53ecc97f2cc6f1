"""Rows of layers and their samples, in every layout; and what is refused."""

from __future__ import annotations

import logging

import pytest
import torch
from per_sample import assert_scores, sample_gradients, scores
from torch import nn
from torch.nn import functional as F

import imu_fast as imu
from imu_fast.errors import InputError, NoHeadFoundError
from imu_fast.model.rows import LayoutChanged, Ownership

N, T, D, H, C = 12, 4, 6, 8, 3


class Net(nn.Module):
    """``mix(self, x)`` is the model; layers ``a`` and ``b`` are what is captured."""

    def __init__(self, mix, **more):
        super().__init__()
        self.emb, self.a, self.b = nn.Linear(D, H), nn.Linear(H, H), nn.Linear(H, H, bias=False)
        self.fc, self.mix = nn.Linear(H, C), mix
        self.position = nn.Parameter(torch.randn(T, H))
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.mix(self, x)


def cross_entropy(model, sample):
    x, y = sample
    x = x[None].double() if x.is_floating_point() else x[None]
    return F.cross_entropy(model(x), y[None])


def check(model, x, y, layers=("a", "b"), batches=None, loss=cross_entropy):
    if batches is None:
        batches = [(x[:5], y[:5]), (x[5:6], y[5:6]), (x[6:], y[6:])]
    names = [
        f"{layer}.{kind}"
        for layer in layers
        for kind in ("weight", "bias")
        if f"{layer}.{kind}" in dict(model.named_parameters())
    ]
    gradients = sample_gradients(model, zip(x, y, strict=True), names, loss)
    found = imu.capture(model, batches, layers=list(layers))
    for curvature in ("identity", "fisher_diag"):
        assert_scores(
            imu.influence_scores(found, curvature=curvature), scores(gradients, curvature)
        )
    return found


def sequence_first(self, x):
    h = self.emb(x).transpose(0, 1)
    return self.fc(F.gelu(self.b(F.gelu(self.a(h)))).mean(0))


def positions_first_flattened(self, x):
    h = self.emb(x).transpose(0, 1).flatten(0, 1)
    return self.fc(self.b(F.gelu(self.a(h))).view(T, len(x), H).mean(0))


def windows(self, x):
    h = self.emb(x).view(len(x), 2, 2, H).roll(1, 2).transpose(1, 2).reshape(2 * len(x), 2, H)
    return self.fc(self.b(F.gelu(self.a(h))).view(len(x), T, H).mean(1))


def over_time(self, x):
    h = self.emb(x[:, 0])
    for t in range(1, T):
        h = torch.tanh(self.a(h) + self.b(x[:, t] @ self.emb.weight.T))
    return self.fc(h)


def only_one_token(self, x):
    return self.fc(self.b(F.gelu(self.a(self.emb(x))))[:, 0])


def reversed_samples(self, x):
    h = self.emb(x).flip(0)
    return self.fc(self.b(F.gelu(self.a(h))).flip(0).mean(1))


def channels_last(self, x):
    h = self.emb(x).view(len(x), 2, 2, H)
    return self.fc(self.b(F.gelu(self.a(h))).mean((1, 2)))


def patches_moved(self, x):
    h = self.emb(x).view(len(x), 2, 2, H).permute(1, 0, 2, 3)
    return self.fc(self.b(F.gelu(self.a(h))).mean((0, 2)))


def routed(self, x):
    h = self.emb(x).flatten(0, 1)
    first = h.sum(1) > 0
    out = torch.zeros_like(h)
    out[first] = self.a(h[first])
    out[~first] = self.b(h[~first])
    return self.fc(F.gelu(out).view(len(x), T, H).mean(1))


def routed_sorted(self, x):
    h = self.emb(x).flatten(0, 1)
    order = h.sum(1).argsort()
    out = torch.empty_like(h)
    out[order] = F.gelu(self.a(h[order]))
    return self.fc(self.b(out.view(len(x), T, H)).mean(1))


def in_place_afterwards(self, x):
    h = F.relu(self.a(self.emb(x)), inplace=True)
    z = self.b(h)
    z *= 2
    return self.fc(z.mean(1))


def ragged(self, x):
    """Bags of different sizes: rows are no multiple of the samples."""
    kept = x[..., 0] > 0
    kept[:, 0] = True
    h = F.gelu(self.a(self.emb(x[kept])))
    owner = kept.nonzero()[:, 0]
    h = torch.zeros(len(x), H, dtype=h.dtype).index_add(0, owner, self.b(h))
    return self.fc(h / kept.sum(1, keepdim=True))


LAYOUTS = [
    sequence_first,
    positions_first_flattened,
    windows,
    over_time,
    only_one_token,
    reversed_samples,
    channels_last,
    patches_moved,
    routed,
    routed_sorted,
    in_place_afterwards,
    ragged,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts(layout):
    check(Net(layout), torch.randn(N, T, D), torch.randint(C, (N,)))


def shared_rows(self, x):
    return self.fc((self.emb(x) * self.b(F.gelu(self.a(self.position)))).mean(1))


def shared_rows_of_one(self, x):
    return self.fc((self.emb(x) + self.b(self.a(self.position[None]))).tanh().mean(1))


@pytest.mark.parametrize("layout", [shared_rows, shared_rows_of_one], ids=lambda f: f.__name__)
@pytest.mark.parametrize("batch", [T, 6, 2 * T])
def test_rows_that_all_samples_share(layout, batch):
    x, y = torch.randn(N, T, D), torch.randint(C, (N,))
    check(Net(layout), x, y, batches=list(zip(x.split(batch), y.split(batch), strict=True)))


def test_as_many_positions_as_samples():
    x, y = torch.randn(N, T, D), torch.randint(C, (N,))
    for layout in (sequence_first, channels_last, windows, positions_first_flattened):
        check(Net(layout), x, y, batches=list(zip(x.split(T), y.split(T), strict=True)))


@pytest.mark.parametrize("n", [49, 130])
@pytest.mark.parametrize("layout", [sequence_first, windows, routed_sorted, reversed_samples])
def test_more_samples_than_powers_of_two(layout, n):
    x, y = torch.randn(n, T, D), torch.randint(C, (n,))
    check(Net(layout), x, y, batches=[(x, y)])


def test_samples_mixed_in_a_batch_are_refused():
    def centred(self, x):
        h = self.a(self.emb(x))
        return self.fc(self.b(h - h.mean(0)).mean(1))

    x, y = torch.randn(N, T, D), torch.randint(C, (N,))
    with pytest.raises(InputError, match="change with the rest of its batch"):
        imu.capture(Net(centred), (x, y), layers=["a"])

    def uncut(self, x):
        return centred(self, x.reshape(N, T, D))  # takes no other number of samples

    with pytest.raises(InputError, match="'a': the gradient at a row comes from several samples"):
        imu.capture(Net(uncut), (x, y), layers=["a"])


def test_batch_statistics_in_evaluation_mode_are_refused():
    model = nn.Sequential(nn.Linear(D, H), nn.BatchNorm1d(H, track_running_stats=False))
    for layers in ("head", ["0"]):
        with pytest.raises(InputError, match="'1' normalises by its batch's own statistics"):
            imu.capture(model, (torch.randn(N, D), torch.randint(H, (N,))), layers=layers)


def test_a_batchnorm_in_training_mode_is_evaluated():
    def normed(self, x):
        return self.fc(
            F.relu(self.norm(self.a(self.emb(x)).flatten(0, 1))).view(len(x), -1, H).mean(1)
        )

    model = Net(normed, norm=nn.BatchNorm1d(H)).train()
    check(model, torch.randn(N, T, D), torch.randint(C, (N,)), ("a",))
    assert model.norm.training


def test_transformers_of_torch():
    for batch_first in (False, True):
        encoder = nn.TransformerEncoderLayer(H, 2, 16, dropout=0.0, batch_first=batch_first)

        def mix(self, x, batch_first=batch_first):
            h = self.emb(x)
            h = self.encoder(h if batch_first else h.transpose(0, 1))
            return self.fc(h.mean(1 if batch_first else 0))

        model, x, y = Net(mix, encoder=encoder), torch.randn(N, T, D), torch.randint(C, (N,))
        check(model, x, y, ("emb", "encoder.linear1", "encoder.linear2", "fc"))
        with pytest.raises(InputError, match="'encoder.self_attn.out_proj' never ran as a module"):
            imu.capture(model, (x, y), layers=["encoder.self_attn.out_proj"])


def test_layers_of_some_batches_and_of_none(caplog):
    def sometimes(self, x):
        h = self.emb(x).mean(1)
        return self.fc(self.a(h / 1e3).tanh() if float(x.detach().abs().max()) > 50 else h)

    x, y = torch.randn(N, T, D), torch.randint(C, (N,))
    x[6:] *= 1e3
    found = check(Net(sometimes), x, y, ("a",))
    assert found[0].n == N and len(found[0].empty_samples) == 0
    with pytest.raises(InputError, match="'b' never ran"):
        imu.capture(Net(sometimes), (x, y), layers=["b"])

    def unused(self, x):
        self.b(x[:, :1, :1].expand(-1, 1, H))
        return self.fc(self.emb(x).mean(1))

    with caplog.at_level(logging.WARNING, "imu_fast"):
        factors = imu.capture(Net(unused), (x, y), layers="b")
    assert "'b' does not reach the loss" in caplog.text
    assert float(factors.mean_gradient().abs().max()) == 0


def test_sequences_with_labels_of_tokens():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.a, self.fc = nn.Embedding(11, H), nn.Linear(H, H), nn.Linear(H, 11)

        def forward(self, ids):
            return self.fc(F.gelu(self.a(self.emb(ids).transpose(0, 1))).transpose(0, 1))

    ids = torch.randint(11, (N, T))
    tags = (7 * ids + 3) % 11  # no inputs, which would be those of the next position
    labels = tags.masked_fill(torch.rand(N, T) < 0.3, -100)
    labels[:, 1] = tags[:, 1]
    labels[2] = -100

    def loss(model, sample):
        x, y = sample
        if bool((y == -100).all()):
            return model(x[None]).sum() * 0
        return F.cross_entropy(model(x[None])[0], y, ignore_index=-100)

    def shifted(model, sample):
        x, y = sample
        return loss(model, (x[:-1], y[1:]))

    model = Tagger()
    found = check(model, ids, labels, ("a", "fc"), loss=loss)
    assert found[0].empty_samples.tolist() == [2]
    for names, layers in ((("a.weight", "a.bias"), ["a"]), (("fc.weight", "fc.bias"), "head")):
        gradients = sample_gradients(model, zip(ids, labels, strict=True), names, shifted)
        factors = imu.capture(model, (ids, labels), layers=layers, shift=True)
        assert_scores(imu.influence_scores(factors), scores(gradients))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, x, y = Net(sequence_first), torch.randn(70, T, D).to(dtype), torch.randint(C, (70,))
    model.to(dtype)
    for layers in (["a"], ["a", "b", "emb"]):
        names = [n for n, _ in model.named_parameters() if n.split(".")[0] in layers]
        truth = sample_gradients(model, zip(x, y, strict=True), names, cross_entropy)
        found = imu.influence_scores(model, (x, y), layers=layers)
        assert_scores(found, scores(truth), 0.05)


def test_convolutions_used_as_linear_layers():
    model = nn.Sequential(
        nn.Conv2d(2, H, 1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(H, C),
    )
    batch = torch.randn(N, 2, 3, 3), torch.randint(C, (N,))
    check(model, *batch, ("0",))
    assert isinstance(imu.capture(model, batch, layers="0"), imu.GradientFactors)


def test_checkpointed_layers():
    def checkpointed(self, x):
        def block(h):
            return F.gelu(self.a(h))

        h = torch.utils.checkpoint.checkpoint(block, self.emb(x), use_reentrant=False)
        return self.fc(self.b(h).mean(1))

    check(Net(checkpointed), torch.randn(N, T, D), torch.randint(C, (N,)))


def test_names_that_are_no_linear_layer():
    model, (x, y) = Net(channels_last), (torch.randn(N, T, D), torch.randint(C, (N,)))
    cases = {
        "fcc": "did you mean 'fc'",
        "": "layers=''",
        "position": "is no linear layer",
    }
    for name, message in cases.items():
        with pytest.raises(NoHeadFoundError, match=message):
            imu.capture(model, (x, y), layers=[name])
    with pytest.raises(InputError, match="layers names 'a' twice"):
        imu.capture(model, (x, y), layers=["a", model.a])
    with pytest.raises(NoHeadFoundError, match="belongs to another one"):
        imu.capture(model, (x, y), layers=[Net(channels_last).a])
    with pytest.raises(InputError, match="layers=3 is a int"):
        imu.capture(model, (x, y), layers=[3])
    nested = nn.Sequential(nn.Flatten(), nn.Sequential(nn.LayerNorm(T * D), nn.Linear(T * D, C)))
    with pytest.raises(NoHeadFoundError, match=r"'1' is no linear.* a Sequential.*holds '1\.1'"):
        imu.capture(nested, (x, y), layers=["1"])
    with pytest.raises(NoHeadFoundError, match="a LayerNorm"):
        imu.capture(nested, (x, y), layers=["1.0"])
    shared = nn.Sequential(nn.Flatten(), nn.Linear(T * D, C))
    shared.alias = shared[1]
    with pytest.raises(InputError, match="twice"):
        imu.capture(shared, (x, y), layers=["1", "alias"])


def test_regular_layouts_cost_one_backward_pass(monkeypatch):
    passes = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(1) or grad(*a, **k))
    x, y = torch.randn(4 * 16, T, D), torch.randint(C, (4 * 16,))
    model, batches = Net(sequence_first), list(zip(x.split(4), y.split(4), strict=True))
    imu.capture(model, batches, layers=["a"])
    # Batches 0 to 3 are tested; the weight's whole gradient comes with the first pass.
    assert len(passes) == 16 + 4
    passes.clear()
    imu.capture(Net(routed), list(zip(x.split(4), y.split(4), strict=True)), layers=["a"])
    assert len(passes) == 2 * 16


def sorted_by_the_data(self, x):
    """As a packed sequence: samples in the order of their lengths, put back at the end."""
    h = self.emb(x).mean(1)
    order = h[:, 0].detach().argsort() if float(h.detach()[0, 1]) > 0 else torch.arange(len(x))
    return self.fc(F.gelu(self.a(h[order]))[order.argsort()])


def test_a_layout_that_changes_with_the_data():
    model, x, y = Net(sorted_by_the_data), torch.randn(12 * 8, T, D), torch.randint(C, (12 * 8,))
    batches = list(zip(x.split(8), y.split(8), strict=True))
    first = [float(model.emb(b).detach().mean(1)[0, 1]) for b, _ in batches]
    ordered = [batches[i] for i in torch.tensor(first).argsort()]  # the last ones are sorted
    x, y = torch.cat([b for b, _ in ordered]), torch.cat([b for _, b in ordered])

    def loss(model, sample):  # alone in a batch, a sample is always in order
        return cross_entropy(model, sample)

    check(model, x, y, ("a",), ordered, loss)
    with pytest.raises(InputError, match="'a': its rows belong to the samples in one way in some"):
        imu.capture(model, iter(ordered), layers=["a"])


def test_ownership_goes_by_what_it_has_tested():
    n, weights = 6, torch.randn(6, 2)
    straight = torch.arange(n)[:, None].expand(n, 2)
    turned = torch.arange(n).flip(0)[:, None].expand(n, 2)

    def owned(ownership, owner):
        base = weights[owner]
        return ownership.owners(["x"], [base], lambda w: [base * w[owner][..., None]], n)[0]

    ownership = Ownership()
    for owner in (straight, turned, straight, turned):  # the first batches are all tested
        assert torch.equal(owned(ownership, owner), owner)
    ownership = Ownership()
    for _ in range(8):
        assert torch.equal(owned(ownership, straight), straight)
    with pytest.raises(LayoutChanged):
        owned(ownership, turned)
    ownership = Ownership(always=True)
    for k in range(20):
        owner = turned if k % 5 == 4 else straight
        assert torch.equal(owned(ownership, owner), owner)


def test_few_samples_are_little_evidence():
    """Two experts' rows may lie in the samples' order by chance: then every batch is tested."""
    x, y = torch.randn(60, 1, D), torch.randint(C, (60,))

    def expert(self, x):
        h = self.emb(x[:, 0])
        order = h[:, 0].detach().argsort()
        return self.fc(F.gelu(self.a(h[order]))[order.argsort()])

    check(Net(expert), x, y, ("a",), list(zip(x.split(2), y.split(2), strict=True)))


class Patches(nn.Module):
    """The gradient that comes back to the norm is a slice, turned: its strides are odd."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.token, self.fc = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, C)

    def forward(self, x):
        h = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        return self.fc(torch.cat([self.token.expand(len(x), -1, -1), h], 1).tanh().mean(1))


def test_batch_norm_under_one_sample():
    """torch's own backward is wrong for it alone on some versions: by twice the gradient."""
    model = Patches().eval()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    x, y = torch.randn(6, 4, 5, 5), torch.randint(C, (6,))
    singles = list(zip(x.split(1), y.split(1), strict=True))
    whole, alone = (imu.capture(model, data, layers=["conv"])[0] for data in ((x, y), singles))
    torch.testing.assert_close(alone.mean_gradient(), whole.mean_gradient())
    torch.testing.assert_close(alone.fisher_diagonal(), whole.fisher_diagonal())
    assert not model.norm._forward_hooks


def test_a_layout_that_changes_in_a_batch_that_is_not_due():
    """Rows that come back by numbers are tested whatever was known."""

    def sometimes(self, x):
        h = self.emb(x).mean(1)
        order = x[:, 0, 0].argsort(stable=True)
        return self.fc(F.gelu(self.a(h[order]))[order.argsort()])

    x, y = torch.randn(7 * 8, T, D), torch.randint(C, (7 * 8,))
    x[:, 0, 0] = 0
    x[40:48, 0, 0] = torch.randn(8)
    check(Net(sometimes), x, y, ("a",), list(zip(x.split(8), y.split(8), strict=True)))
