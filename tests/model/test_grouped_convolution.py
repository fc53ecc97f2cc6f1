"""Factors of grouped, depthwise and transposed convolutions, against autograd of each sample."""

from __future__ import annotations

import pytest
import torch
from per_sample import assert_scores, sample_gradients, scores
from torch import nn
from torch.nn import functional as F

import imu_fast as imu
from imu_fast.errors import InputError, NoHeadFoundError
from imu_fast.factors import unfolded
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.unfolded import UnfoldedFactors

N, C, CHANNELS, SIZE = 7, 3, 4, 6

LAYERS = {
    "groups": (2, lambda: nn.Conv2d(4, 6, 3, groups=2)),
    "depthwise": (2, lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4)),
    "depthwise, two each, no bias": (2, lambda: nn.Conv2d(4, 8, 3, 2, groups=4, bias=False)),
    "stride, padding, dilation": (
        2,
        lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (2, 1), groups=2),
    ),
    "same": (2, lambda: nn.Conv2d(4, 4, (2, 4), padding="same", groups=4)),
    "circular": (2, lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular", groups=2)),
    "reflect": (2, lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=4)),
    "one position": (2, lambda: nn.Conv2d(4, 6, 1, groups=2)),
    "whole input": (2, lambda: nn.Conv2d(4, 6, 6, groups=2)),
    "one axis": (1, lambda: nn.Conv1d(4, 6, 3, 2, 2, groups=2)),
    "three axes": (3, lambda: nn.Conv3d(4, 4, (2, 3, 1), (1, 2, 1), (1, 0, 1), groups=4)),
    "transposed": (2, lambda: nn.ConvTranspose2d(4, 6, 3)),
    "transposed, output_padding": (2, lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1)),
    "transposed, gaps, no bias": (2, lambda: nn.ConvTranspose2d(4, 6, (2, 1), 3, bias=False)),
    "transposed, cropped": (2, lambda: nn.ConvTranspose2d(4, 6, (2, 3), 2, (2, 3))),
    "transposed, groups, dilation": (
        2,
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 1), 2, dilation=(1, 2)),
    ),
    "transposed, depthwise": (2, lambda: nn.ConvTranspose2d(4, 4, 4, 2, 1, groups=4)),
    "transposed, one axis": (1, lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2)),
    "transposed, three axes": (3, lambda: nn.ConvTranspose3d(4, 2, (2, 3, 1), (1, 2, 1))),
}
# How a grouped one may be said, whatever is the cheapest: columns in memory, of chunks, or groups.
FORMS = {"in memory": (True, True), "columns": (False, True), "groups": (False, False)}


class Pooled(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.fc = layer, nn.Linear(layer.out_channels, C)

    def forward(self, x):
        return self.fc(torch.tanh(self.layer(x)).flatten(2).mean(2))


def loss(model, sample):
    x, y = sample
    return F.cross_entropy(model(x[None].double()), y[None])


def truth(model, x, y, *layers):
    """[n, P] of the layers' parameters, a layer after another."""
    own = [n for n, _ in model.named_parameters()]
    names = [n for layer in layers for n in own if n.rpartition(".")[0] == layer]
    return sample_gradients(model, zip(x, y, strict=True), names, loss)


def matrices(gradients, layer):
    """[..., P] of one layer as [..., C, D]."""
    shape, outputs = layer.weight.shape, layer.out_channels
    weight = gradients[..., : shape.numel()].unflatten(-1, shape)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        axis = gradients.dim() - 1
        weight = weight.unflatten(axis, (layer.groups, -1)).transpose(axis + 1, axis + 2)
        weight = weight.flatten(axis, axis + 1)
    bias = gradients[..., shape.numel() :, None]
    found = [weight.flatten(gradients.dim())] + ([bias] if layer.bias is not None else [])
    assert found[0].shape[-2] == outputs
    return torch.cat(found, dim=-1)


def batches(x, y):
    return list(zip(x.split([3, 1, 3]), y.split([3, 1, 3]), strict=True))


def said_as(form, monkeypatch):
    if form is not None:
        for name, value in zip(
            ("columns_are_smaller", "_has_fewer_columns"), FORMS[form], strict=True
        ):
            monkeypatch.setattr(UnfoldedFactors, name, value)


def data(axes=2):
    return torch.randn(N, CHANNELS, *[SIZE] * axes), torch.randint(C, (N,))


def assert_close(found, expected, tolerance=1e-5):
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < tolerance, f"relative error {error:.2g}"


@pytest.mark.parametrize("name", LAYERS)
def test_scores(name, monkeypatch):
    axes, make = LAYERS[name]
    model = Pooled(make())
    x, y = data(axes)
    gradients = truth(model, x, y, "layer")
    per_sample = matrices(gradients, model.layer)
    for form in FORMS if model.layer.groups > 1 else [None]:
        with monkeypatch.context() as patched:
            said_as(form, patched)
            factors = imu.capture(model, batches(x, y), layers="layer")
            kind = GradientFactors if form == "in memory" else UnfoldedFactors
            assert isinstance(factors, kind) and factors.n == N
            assert (factors.num_classes, factors.width) == per_sample.shape[1:]
            for elements in (1 << 22, 1):  # all at once, one sample
                patched.setattr(unfolded, "_CHUNK_ELEMENTS", elements)
                for curvature in ("identity", "fisher_diag", "fisher"):
                    found = imu.influence_scores(factors, curvature=curvature)
                    assert_scores(found, scores(gradients, curvature))
                assert_close(factors.mean_gradient(), per_sample.mean(dim=0))
                assert_close(factors.fisher_diagonal(), per_sample.square().mean(dim=0))
            assert sum(chunk.num_tokens for chunk in factors.chunks(5)) == factors.num_tokens
            fitted = imu.fit("fisher_diag", factors)
            squares = per_sample.square()
            expected = (squares / (squares.mean(dim=0) + 1e-2)).sum(dim=(1, 2))
            assert_close(fitted.self_influence(factors), expected)
            shares = [factors.shard(rank, 2) for rank in range(2)]
            total = sum(share.mean_gradient() * share.n for share in shares) / N
            assert_close(total, per_sample.mean(dim=0))


@pytest.mark.parametrize("name", ["groups", "depthwise", "transposed, groups, dilation"])
def test_every_pair(name, monkeypatch):
    """Whatever each of the two sets is said as."""
    model = Pooled(LAYERS[name][1]())
    x, y = data()
    gradients = truth(model, x, y, "layer")
    norms = gradients.norm(dim=1)
    expected = gradients @ gradients.T
    found = []
    for form in FORMS:
        with monkeypatch.context() as patched:
            said_as(form, patched)
            found.append(imu.capture(model, (x, y), layers="layer"))
            assert_close(imu.self_influence(found[-1], curvature="identity"), norms.square())
    for one in found:
        for other in found:
            assert_close(-imu.pairwise_influence(one, other, curvature="identity"), expected)
            cosines = imu.pairwise_similarity(one, other)
            assert_close(cosines, expected / norms[:, None] / norms)
    fisher = gradients.T @ gradients / N + 1e-2 * torch.eye(gradients.shape[1]).double()
    pairs = imu.pairwise_influence(found[0], found[2], curvature="fisher")
    assert_close(-pairs, gradients @ torch.linalg.solve(fisher, gradients.T))


def test_what_is_kept():
    """Of a depthwise convolution its gradients; inputs, as they are, where these are smaller."""
    x, y = data()
    depthwise = imu.capture(Pooled(nn.Conv2d(4, 4, 3, groups=4)), (x, y), layers="layer")
    assert isinstance(depthwise, GradientFactors) and depthwise.num_tokens == 10 * N
    model = Pooled(nn.Conv2d(4, 64, 3, groups=2))
    grouped = imu.capture(model, (x, y), layers="layer")
    assert isinstance(grouped, UnfoldedFactors) and grouped.num_tokens == 19 * N
    assert sum(kept.nbytes for kept in grouped.inputs) == x.nbytes
    few = imu.capture(Pooled(nn.Conv2d(4, 64, 5, groups=2)), (x, y), layers="layer")
    assert isinstance(few, UnfoldedFactors) and few.num_tokens == 2 * 4 * N


def test_the_bias_of_large_inputs_keeps_its_digits():
    """Whose own gradient is small beside the sum of the columns of the weight's."""
    model = Pooled(nn.Conv2d(4, 4, 3, groups=4))
    x, y = data()
    x = 300 + x
    with torch.no_grad():
        model.layer.weight.sub_(model.layer.weight.mean(dim=(1, 2, 3), keepdim=True))
    per_sample = matrices(truth(model, x, y, "layer"), model.layer)
    factors = imu.capture(model, (x, y), layers="layer")
    assert_close(factors.mean_gradient()[:, -1], per_sample.mean(dim=0)[:, -1])
    diagonal = per_sample.square().mean(dim=0)
    assert_close(factors.fisher_diagonal()[:, -1], diagonal[:, -1])


class Several(nn.Module):
    """A layer that runs twice, one whose output's size is chosen, and images without a batch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 4, 3, 2, 1, groups=2)
        self.fc = nn.Linear(4, C)

    def forward(self, x):
        h = self.conv(torch.tanh(self.conv(x)))
        h = torch.stack([self.up(one, output_size=[12, 11]) for one in h])
        return self.fc(torch.tanh(self.up(h)).mean((2, 3)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_several_calls(layout):
    model, (x, y) = Several(), data()
    # Plain, as torch (2.14) misreads the strides of one image alone where channels are last.
    gradients = truth(model, x, y, "conv", "up")
    model, x = model.to(memory_format=layout), x.contiguous(memory_format=layout)
    for form in ("identity", "fisher_diag"):
        found = imu.influence_scores(model, batches(x, y), layers=["conv", "up"], curvature=form)
        assert_scores(found, scores(gradients, form))


def mobile():
    def block(inputs, inner, outputs, stride):
        return nn.Sequential(
            *(nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            *(nn.BatchNorm2d(inner), nn.Hardswish()),
            *(nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )

    stem = (nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, C))
    return nn.Sequential(*stem, block(6, 12, 6, 1), block(6, 12, 8, 2), *head)


class Next(nn.Module):
    """A ConvNeXt block: a depthwise convolution, and a norm and a perceptron of channels last."""

    def __init__(self):
        super().__init__()
        self.stem, self.up = nn.Conv2d(4, 6, 2, 2), nn.ConvTranspose2d(6, 6, 2, 2, groups=6)
        self.mix = nn.Conv2d(6, 6, 5, padding=2, groups=6)
        self.norm, self.one, self.two = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.gamma, self.fc = nn.Parameter(torch.full((6,), 0.5)), nn.Linear(6, C)

    def forward(self, x):
        x = self.up(self.stem(x))
        h = self.norm(self.mix(x).permute(0, 2, 3, 1))
        h = self.gamma * self.two(F.gelu(self.one(h)))
        return self.fc((x + h.permute(0, 3, 1, 2)).mean((2, 3)))


@pytest.mark.parametrize("make", [mobile, Next])
def test_networks(make):
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x, y = data()
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    found = imu.capture(model, batches(x, y), layers="*")
    assert [factors.name for factors in found] == names
    for factors, name in zip(found, names, strict=True):
        gradients = truth(model, x, y, name)
        for curvature in ("identity", "fisher_diag"):
            assert_scores(
                imu.influence_scores(factors, curvature=curvature), scores(gradients, curvature)
            )
    total = sum(scores(truth(model, x, y, name)) for name in names)
    assert_scores(imu.influence_scores(model, batches(x, y), layers=names), total)
    squares = imu.parameter_importance(model, batches(x, y))
    for factors, name in zip(found, names, strict=True):
        layer = model.get_submodule(name)
        if isinstance(layer, nn.modules.conv._ConvNd):
            own = [squares[f"{name}.{key}"].flatten() for key, _ in layer.named_parameters()]
            flat = torch.cat(own)
            assert_close(factors.fisher_diagonal(), matrices(flat, layer).double())


def test_unlearning_weighs_samples_by_every_layer_that_is_trained():
    model = Next().eval()
    x, y = data()
    names = ["mix", "up", "fc"]
    weights = imu.influence_weights(imu.influence_scores(model, (x, y), layers=names))
    options = {"scope": "layers", "layers": names, "max_steps": 1, "lr": 0.1}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    imu.unlearn(model, (x, y), **options, weights="influence", scored="trained")
    other = Next().eval()
    other.load_state_dict(before)
    indices, weight = weights
    losses = F.cross_entropy(other(x), y, reduction="none")[indices]
    chosen = [p for name in names for p in other.get_submodule(name).parameters()]
    steps = torch.autograd.grad((losses * weight).sum() / weight.sum(), chosen)
    with torch.no_grad():
        for p, step in zip(chosen, steps, strict=True):
            p += 0.1 * step
    for name, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_a_file_has_what_is_in_memory(tmp_path):
    model = Pooled(nn.Conv2d(4, 4, 3, groups=4))
    factors = imu.capture(model, data(), layers="layer")
    factors.save(tmp_path / "factors.safetensors")
    found = GradientFactors.load(tmp_path / "factors.safetensors")
    assert torch.equal(imu.influence_scores(found), imu.influence_scores(factors))


@pytest.mark.parametrize("name", ["depthwise", "groups", "transposed"])
def test_samples_without_a_gradient(name):
    """And a layer that the loss does not depend on."""
    model = Pooled(LAYERS[name][1]())
    x, y = data()
    y[2] = -100
    found = imu.influence_scores(model, (x, y), layers="layer")
    kept = torch.arange(N) != 2
    gradients = torch.zeros(N, sum(p.numel() for p in model.layer.parameters())).double()
    gradients[kept] = truth(model, x[kept], y[kept], "layer")
    assert found[2] == 0
    assert_scores(found, scores(gradients))

    detached = nn.Sequential(model.layer, _Detached(), _Head(model))
    factors = imu.capture(detached, (x, y), layers="0")
    assert not imu.influence_scores(factors).any() and not factors.mean_gradient().any()


class _Detached(nn.Module):
    def forward(self, x):
        return x.detach()


class _Head(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.fc = model.fc

    def forward(self, x):
        return self.fc(x.flatten(2).mean(2))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_refusals(kind):
    x, y = data()
    model = Pooled(kind(4, 4, 3, groups=2))
    factors = imu.capture(model, (x, y), layers="layer")
    for curvature in ("ggn", "ggn_block", "kfac", "ekfac"):
        with pytest.raises(InputError, match="'layer'"):
            imu.influence_scores(factors, curvature=curvature)

    class Scaled(kind):
        def forward(self, x):
            out = super().forward(x)
            return torch.cat([out[:, :3], 1.01 * out[:, 3:]], dim=1)

    with pytest.raises(NoHeadFoundError, match=r"whose output is not act W\^T"):
        imu.capture(Pooled(Scaled(4, 4, 3, groups=2)), (x, y), layers="layer")

    class Elsewhere(Pooled):
        def forward(self, x):
            return super().forward(x) * self.layer.weight.sum()

    with pytest.raises(InputError, match="outside of the layer"):
        imu.capture(Elsewhere(kind(4, 4, 3, groups=2)), (x, y), layers="layer")
    x[3] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        imu.capture(model, (x, y), layers="layer")
