"""An index on disk gives what all factors in memory give, and autograd in float64."""

from __future__ import annotations

import copy

import language_models as lm
import per_sample
import pytest
import torch
from torch import nn

import imu_fast as imu
from imu_fast.errors import InputError

WHOLE = 10**6  # of projections: every layer is kept as it is


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.Flatten(),
        nn.Linear(24, 3, bias=False),
    )


def problem(make, n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (5,) if make is mlp else (4, 5, 5)
    return torch.randn(n, *shape, generator=generator), torch.arange(n) % 3


def batched(data, size):
    return [tuple(part[i : i + size] for part in data) for i in range(0, len(data[1]), size)]


def autograd(model, data, layers):
    names = [name for name, _ in model.named_parameters() if name.split(".")[0] in layers]

    def loss(m, sample):
        return nn.functional.cross_entropy(m(sample[0].double()[None]), sample[1][None])

    return per_sample.sample_gradients(model, list(zip(*data, strict=True)), names, loss)


MODELS = {"mlp": (mlp, ["0", "2"]), "convolutions": (convolutional, ["0", "2", "4"])}


@pytest.mark.parametrize("projection", [None, WHOLE], ids=["factors", "whole projections"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("head", [True, False], ids=["head", "layers"])
def test_against_autograd(name, projection, head, tmp_path):
    """23 samples in batches of 4 and chunks of 8: the last of both is not full."""
    make, layers = MODELS[name]
    layers = layers[-1:] if head else layers
    model, data, asked = make(), problem(make, 23), problem(make, 4, seed=2)
    index = imu.build_index(
        model,
        batched(data, 4),
        tmp_path / "index",
        layers="head" if head else layers,
        projection=projection,
        chunk_size=8,
    )
    assert len(index) == index.n == 23 and index.layers == layers
    assert len(list(index.path.glob("*.safetensors"))) == 3
    index = imu.load_index(index.path)
    queries = index.capture(model, asked)
    g, h = autograd(model, data, layers), autograd(model, asked, layers)
    found = index.scores(queries, curvature="identity")
    assert found.shape == (23, 4)
    per_sample.assert_scores(found, -g @ h.T)
    per_sample.assert_scores(index.self_influence(curvature="identity"), g.square().sum(1))
    values, indices = index.top(queries, 3, curvature="identity")
    assert torch.equal(indices, found.T.argsort(dim=1, stable=True)[:, :3])
    assert torch.equal(values, found.T.gather(1, indices))


@pytest.mark.parametrize("projection", [None, WHOLE], ids=["factors", "whole projections"])
@pytest.mark.parametrize("name", MODELS)
def test_the_fisher_is_that_of_all_samples(name, projection, tmp_path):
    """``G^T G / n + lam I`` of each layer, by its definition."""
    make, layers = MODELS[name]
    model, data, asked = make(), problem(make, 23), problem(make, 4, seed=2)
    index = imu.build_index(
        model, data, tmp_path, layers=layers, projection=projection, chunk_size=8
    )
    queries, expected, own = index.capture(model, asked), 0, 0
    for layer in layers:
        g, h = autograd(model, data, [layer]), autograd(model, asked, [layer])
        m = g.T @ g / 23
        lam = 0.1 * m.diagonal().mean()
        m = m + lam * torch.eye(len(m)).double()
        expected = expected - g @ torch.linalg.solve(m, h.T)
        own = own + (g * torch.linalg.solve(m, g.T).T).sum(1)
    spec = imu.Fisher(damping=0.1, damping_mode="relative")
    per_sample.assert_scores(index.scores(queries, curvature=spec), expected, 1e-4)
    per_sample.assert_scores(index.self_influence(curvature=spec), own, 1e-4)
    if projection is not None:  # its default
        assert torch.equal(index.scores(queries), index.scores(queries, curvature=spec))
        assert torch.equal(index.self_influence(), index.self_influence(curvature=spec))
        lowest = index.scores(queries).T.argsort(dim=1, stable=True)[:, :2]
        assert torch.equal(index.top(queries, 2)[1], lowest)


@pytest.mark.parametrize("curvature", [*imu.curvatures(), None])
@pytest.mark.parametrize("layers", ["head", ["0", "2"]], ids=str)
def test_every_curvature_streams_as_in_memory(curvature, layers, tmp_path):
    model, data, asked = mlp(), problem(mlp, 23), problem(mlp, 4, seed=2)
    if layers != "head" and curvature in ("ekfac", "kfac", "ggn", "ggn_block"):
        curvature = {"ekfac": imu.EKFAC, "kfac": imu.KFAC, "ggn": imu.GGN}.get(
            curvature, imu.GGNBlock
        )(fisher="empirical")
    index = imu.build_index(model, data, tmp_path, layers=layers, chunk_size=8)
    factors = imu.capture(model, data, layers=layers)
    queries = index.capture(model, asked)
    found = index.scores(queries, curvature=curvature)
    truth = imu.pairwise_influence(factors, queries, curvature=curvature)
    torch.testing.assert_close(found, truth, rtol=2e-3, atol=2e-4 * float(truth.abs().max()))
    plain = imu.capture(model, asked, layers=layers)
    assert torch.equal(index.scores(plain, curvature=curvature), found)
    if curvature is not None:
        own = imu.self_influence(factors, curvature=curvature)
        torch.testing.assert_close(
            index.self_influence(curvature=curvature), own, rtol=2e-3, atol=1e-5
        )


@pytest.mark.parametrize("projection", [None, WHOLE], ids=["factors", "whole projections"])
def test_a_causal_language_model(projection, tmp_path):
    """Padded sequences, one of them without a label."""
    model, kind = lm.make("llama"), lm.KINDS["llama"]
    layers = [kind.attention, "model.layers.0.mlp.down_proj", kind.head]
    data, asked = lm.batch("llama"), lm.batch("llama", n=3)
    index = imu.build_index(
        model, [data], tmp_path, layers=layers, projection=projection, chunk_size=2
    )
    g, h = (
        torch.cat([lm.gradients(model, "llama", d, layer) for layer in index.layers], dim=1)
        for d in (data, asked)
    )
    found = index.scores(index.capture(model, [asked]), curvature="identity")
    per_sample.assert_scores(found, -g @ h.T)
    per_sample.assert_scores(index.self_influence(curvature="identity"), g.square().sum(1))


@pytest.mark.parametrize("projection", [None, 16])
def test_one_sample(projection, tmp_path):
    model, data = mlp(), problem(mlp, 1)
    index = imu.build_index(model, data, tmp_path, layers=["0", "2"], projection=projection)
    queries = index.capture(model, data)
    found = index.scores(queries, curvature="identity")
    assert found.shape == (1, 1)
    torch.testing.assert_close(found[0], -index.self_influence(curvature="identity"))
    assert index.top(queries, 1)[1].tolist() == [[0]]


def test_what_bfloat16_holds(tmp_path):
    """A bfloat16 model's factors, and those of a float32 model rounded to 8 bits."""
    data, asked = problem(mlp, 23), problem(mlp, 4, seed=2)
    half = mlp().bfloat16()
    inputs = (data[0].bfloat16(), data[1]), (asked[0].bfloat16(), asked[1])
    index = imu.build_index(half, inputs[0], tmp_path / "half", layers=["0", "2"])
    factors = imu.capture(half, inputs[0], layers=["0", "2"])
    queries = index.capture(half, inputs[1])
    found = index.scores(queries, curvature="identity")
    truth = imu.pairwise_influence(factors, queries, curvature="identity")
    torch.testing.assert_close(found, truth)
    model = mlp()
    g, h = autograd(model, data, ["0", "2"]), autograd(model, asked, ["0", "2"])
    sizes = {}
    for name, dtype, projection in (
        ("wide", None, None),
        ("narrow", torch.bfloat16, None),
        ("rows", torch.bfloat16, WHOLE),
    ):
        path = tmp_path / name
        index = imu.build_index(
            model, data, path, layers=["0", "2"], dtype=dtype, projection=projection
        )
        sizes[name] = index.nbytes
        found = index.scores(index.capture(model, asked), curvature="identity")
        error = (found + g @ h.T).abs()
        # A rounding of signal and of input, of 8 bits each.
        eps = torch.finfo(torch.bfloat16).eps if dtype else 1e-5
        assert (error <= 2 * eps * (g.abs() @ h.abs().T)).all()
    assert sizes["narrow"] < 0.85 * sizes["wide"]  # headers and offsets are no smaller


def test_float64_stays_and_is_narrowed_where_asked(tmp_path):
    model = mlp().double()
    data = problem(mlp, 9)
    data = data[0].double(), data[1]
    wide = imu.build_index(model, data, tmp_path / "wide")
    assert wide.scores(wide.capture(model, data), curvature="identity").dtype == torch.float64
    narrow = imu.build_index(model, data, tmp_path / "narrow", dtype=torch.float32)
    found = narrow.scores(narrow.capture(model, data), curvature="identity")
    assert found.dtype == torch.float32
    g = autograd(model, data, ["2"])
    per_sample.assert_scores(found, -g @ g.T)
    with pytest.raises(InputError, match="dtype=torch.float32 cannot hold"):
        huge = (data[0] * 1e200, data[1])
        model[1] = nn.Identity()
        imu.build_index(model, huge, tmp_path / "huge", layers="2", dtype=torch.float32)


def test_its_factors_are_factors(tmp_path):
    """Whatever takes factors takes those that are read from the disk."""
    model, data = mlp(), problem(mlp, 23)
    index = imu.build_index(model, data, tmp_path, chunk_size=8)
    (layer,) = index.factors()
    whole = imu.capture(model, data)
    for verb in (imu.influence_scores, imu.similarity_scores):
        torch.testing.assert_close(verb(layer), verb(whole), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(imu.fit("kfac", layer).diagonal(), imu.fit("kfac", whole).diagonal())


def test_the_model_comes_back_as_it_was(tmp_path):
    model = mlp().train()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    index = imu.build_index(model, problem(mlp, 9), tmp_path, layers=["0", "2"], projection=4)
    index.capture(model, problem(mlp, 2))
    assert model.training and not model[0].weight.requires_grad and model[2].weight.requires_grad
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


class Tied(nn.Module):
    """Two linear layers of one weight, and a third."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_two_layers_of_one_weight_are_refused(tmp_path):
    model, data = Tied(), problem(mlp, 9)
    with pytest.raises(InputError, match="'a' and 'b' share one parameter"):
        imu.build_index(model, data, tmp_path, layers=["a", "b", "c"])
    assert imu.build_index(model, data, tmp_path, layers=["a", "c"]).n == 9
