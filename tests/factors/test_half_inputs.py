"""Factors whose inputs are half precision: every number as of the same inputs in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import imu_fast as imu
from imu_fast.attribution.projection import Projection
from imu_fast.errors import InputError
from imu_fast.factors.chunked import pack_chunks, unpack_chunks
from imu_fast.factors.indexed import layer_of, layer_tensors
from imu_fast.factors.source import in_memory
from imu_fast.ops import tokens as tokens_module

HALVES = [torch.bfloat16, torch.float16]
every_half = pytest.mark.parametrize("half", HALVES, ids=str)
LENGTHS = {"one token each": (1,) * 23, "ragged": (3, 1, 0, 7, 2, 3, 5), "equal": (2,) * 9}
every_length = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """So that several pieces are converted."""
    monkeypatch.setattr(tokens_module, "WIDENED_TOKENS", 5)


def head(half, lengths, has_bias=True, seed=0, **options):
    """A head's factors, and the same of its features in float32."""
    generator = torch.Generator().manual_seed(seed)
    tokens, (classes, d) = sum(lengths), (6, 5)
    features = torch.randn(tokens, d, generator=generator).to(half)
    weight = torch.randn(classes, d, generator=generator).to(half).float()
    bias = torch.randn(classes, generator=generator) if has_bias else None
    labels = torch.randint(classes, (tokens,), generator=generator)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return [
        imu.GradientFactors.from_head(x, weight, bias, labels, offsets, **options)
        for x in (features, features.float())
    ]


def close(found, expected):
    """Sums of the same numbers in float32, in another order."""
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6 * max(size, 1e-30))
    assert found.dtype == expected.dtype == torch.float32


@every_half
@every_length
def test_inputs_are_kept_as_they_came(half, lengths):
    narrow, wide = head(half, lengths)
    assert narrow.act.dtype == half and narrow.delta.dtype == narrow.dtype == torch.float32
    assert 2 * narrow.act.nbytes == wide.act.nbytes
    assert torch.equal(narrow.delta, wide.delta) and torch.equal(narrow.losses, wide.losses)
    close(narrow.mean_gradient(), wide.mean_gradient())
    close(narrow.fisher_diagonal(), wide.fisher_diagonal())


@every_half
@every_length
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("curvature", imu.curvatures())
def test_every_curvature(half, lengths, has_bias, curvature):
    """Scores, self-influence, pairs, a solve and a product."""
    narrow, wide = head(half, lengths, has_bias)
    others = head(half, lengths[::-1], has_bias, seed=1)
    found, expected = imu.fit(curvature, narrow), imu.fit(curvature, wide)
    v = wide.mean_gradient()
    torch.testing.assert_close(found.solve(v), expected.solve(v), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found @ v, expected @ v, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.diagonal(), expected.diagonal(), rtol=1e-4, atol=1e-7)
    options = dict(curvature=curvature)
    for call in (imu.influence_scores, imu.self_influence):
        one, other = call(narrow, **options), call(wide, **options)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    one, other = (
        imu.pairwise_influence(a, b, **options) for a, b in zip((narrow, wide), others, strict=True)
    )
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@every_length
@pytest.mark.parametrize("half", HALVES[:1], ids=str)
def test_inputs_of_either_side_alone(half, lengths):
    narrow, wide = head(half, lengths)
    for metric in ("cosine", "product"):
        expected = imu.pairwise_similarity(wide, wide, metric=metric)
        close(imu.pairwise_similarity(narrow, wide, metric=metric), expected)
        close(imu.pairwise_similarity(wide, narrow, metric=metric), expected)


@every_half
def test_a_head_whose_signal_is_not_stored(half):
    narrow, wide = head(half, (3, 1, 7, 2), implicit=True)
    assert next(iter(narrow.chunks())).act.dtype == half
    for call in (imu.influence_scores, imu.self_influence):
        close(call(narrow), call(wide))
    close(narrow.stored().mean_gradient(), wide.mean_gradient())


@every_half
def test_files_chunks_samples_and_casts(half, tmp_path):
    narrow, wide = head(half, (3, 1, 0, 7, 2))
    narrow.save(tmp_path / "f")
    loaded = imu.GradientFactors.load(tmp_path / "f")
    tensors, known = pack_chunks(narrow, "it")
    unpacked = unpack_chunks(tensors, known, torch.device("cpu"))
    again = [loaded, unpacked, narrow.select(torch.arange(5)), narrow.samples(0, 5)]
    again.append(wide.to(dtype=half))
    for same in again:
        assert same.act.dtype == half and torch.equal(same.act, narrow.act)
        assert torch.equal(same.delta, narrow.delta) and same.losses.dtype == torch.float32
    back = narrow.to(dtype=torch.float32)
    assert back.act.dtype == torch.float32 and torch.equal(back.act, wide.act)
    assert narrow.to(dtype=torch.float64).act.dtype == torch.float64
    assert narrow.to("cpu").act.dtype == half
    chunks = list(narrow.chunks(4))
    assert len(chunks) > 1 and all(chunk.act.dtype == half for chunk in chunks)
    indexed = layer_of(*layer_tensors(narrow, None))
    assert torch.equal(in_memory(indexed, "it").act.float(), wide.act)


def test_what_half_precision_cannot_hold_is_refused():
    one = imu.GradientFactors(torch.ones(2, 3), torch.full((2, 4), 1e6), torch.arange(3), True)
    with pytest.raises(InputError, match="dtype=torch.float16 cannot hold"):
        one.to(dtype=torch.float16)
    assert one.to(dtype=torch.bfloat16).act.dtype == torch.bfloat16


@pytest.mark.parametrize("implicit", [False, True])
def test_a_cast_keeps_the_digits_or_is_refused(implicit):
    """What is beyond the range of a dtype, below it, or no floating-point dtype at all."""
    x, y = torch.linspace(1, 2, 12).double().view(4, 3), torch.arange(4) % 3

    def scaled(size, weight=1.0):
        w = weight * torch.eye(3).double()
        return imu.GradientFactors.from_head(x * size, w, None, y, implicit=implicit)

    for size in (1e-60, 1e60):
        with pytest.raises(InputError, match=r"dtype=torch.float32 cannot hold .*token 0"):
            scaled(size, 1 / size).to(dtype=torch.float32)
    for source in (torch.float64, torch.float32, torch.bfloat16):
        for size, why in ((1e-9, "loses their digits"), (1e9, "beyond its range")):
            factors = scaled(size, 1e-9).to(dtype=source)
            with pytest.raises(InputError, match=f"{why}; pass dtype=torch.bfloat16"):
                factors.to(dtype=torch.float16)
    one = scaled(1.0, 1e-6)  # of a weight so small nothing is lost
    assert one.to(dtype=torch.float16).to(dtype=torch.float32).n == 4
    for dtype in (torch.int32, torch.float8_e5m2, "float32"):
        with pytest.raises(InputError, match="is none of torch.float64"):
            one.to(dtype=dtype)
    with pytest.raises(InputError, match="device='nowhere' cannot be used here"):
        one.to("nowhere")


@pytest.mark.parametrize(
    "delta, act",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
    ],
)
def test_other_pairs_are_refused(delta, act):
    message = f"delta is {delta} and act is {act}; both must be float32 or float64, or act bfloat16"
    with pytest.raises(InputError, match=message):
        imu.GradientFactors(
            torch.ones(2, 3, dtype=delta), torch.ones(2, 4, dtype=act), torch.arange(3), True
        )


@every_half
def test_projections(half):
    narrow, wide = head(half, (3, 1, 7, 2))
    close(Projection(9, 0).rows([narrow]), Projection(9, 0).rows([wide]))


# Captured


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.hidden = nn.Linear(16, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        x = torch.relu(self.grouped(torch.relu(self.conv(x)))).mean(dim=(2, 3), keepdim=True)
        x = x.expand(-1, -1, 2, 2).flatten(1)
        return self.head(torch.relu(self.hidden(x)))


@every_half
def test_captured_layers_keep_the_models_dtype(half):
    torch.manual_seed(0)
    model = Small().to(half).eval()
    data = (torch.randn(8, 3, 6, 6).to(half), torch.arange(8) % 3)
    layers = [model.conv, model.grouped, model.hidden, model.head]
    found = imu.capture(model, data, layers=layers)
    for one in found:
        wide = copy.copy(in_memory(one, "it")).to(dtype=torch.float32)
        assert one.dtype == torch.float32
        if isinstance(one, imu.GradientFactors):
            assert one.act.dtype in (half, torch.float32)
        close(one.mean_gradient(), wide.mean_gradient())
        close(one.fisher_diagonal(), wide.fisher_diagonal())
        close(imu.self_influence(one), imu.self_influence(wide))
    assert found[2].act.dtype == found[3].act.dtype == half
    assert next(iter(found[0].chunks())).act.dtype == half
    assert imu.capture(model, data).act.dtype == half


def test_inputs_are_never_converted_as_a_whole():
    """Memory at the peak of a mean gradient, beside that of a conversion."""
    from memory import peak

    delta, act = torch.randn(40_000, 2), torch.randn(40_000, 64).bfloat16()
    ends = torch.arange(40_001)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "WIDENED_TOKENS", 2048)
        factors = imu.GradientFactors(delta, act, ends, True)
        for call in (factors.mean_gradient, factors.fisher_diagonal):
            assert peak(call) < 4 * act.numel() / 4
