"""Heads whose signal is made where it is needed, against stored factors and per-sample autograd."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, every_dtype
from memory import peak
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

import imu_fast as imu
from imu_fast.curvature.named import CURVATURES
from imu_fast.errors import InputError
from imu_fast.factors import implicit_head
from imu_fast.factors.implicit_head import ImplicitHead
from imu_fast.factors.outputs import at_outputs, cuts_of_outputs
from imu_fast.factors.source import in_memory, is_factors
from imu_fast.factors.statistics import mean_gradient, second_moment, trace

every_curvature = pytest.mark.parametrize("name", imu.curvatures())
SEPARATE = ["fisher_diag", "identity"]
from_head = imu.GradientFactors.from_head


# One token at a time, a thousand take a thousand turns: this case is cut where cuts are as long.
FEW = [case for case in CASES if len(case.lengths) < 99]
CUT = [(3, case) for case in FEW]
CUT += [(slab, case) for slab in (1, 1000) for case in (CASES[1], CASES[8])]
cut_cases = pytest.mark.parametrize(
    ("slab", "case"), CUT, ids=[f"{slab}-{case.why}" for slab, case in CUT], indirect=["slab"]
)
# Of every curvature: one token a sample, several, none; without bias, of one class, saturated.
SOME = [(slab, case) for slab, case in CUT if case in [CASES[i] for i in (1, 2, 3, 5, 8, 11)]]
SOME = [(slab, case) for slab, case in SOME if slab == 3 or case is CASES[8]]
some_cases = pytest.mark.parametrize(
    ("slab", "case"), SOME, ids=[f"{slab}-{case.why}" for slab, case in SOME], indirect=["slab"]
)


@pytest.fixture(params=[1, 3, 1000])
def slab(request, monkeypatch):
    """Classes at a time, of which some divide no number of classes."""
    monkeypatch.setattr(implicit_head, "_FEWEST_CLASSES", request.param)
    monkeypatch.setattr(implicit_head, "_TILE_BYTES", 1)  # one token at a time elsewhere
    monkeypatch.setattr(implicit_head, "TOKENS", 2)
    monkeypatch.setattr(implicit_head, "SLAB", 2)
    if request.param == 3:  # some classes' signal is not stored either
        monkeypatch.setattr(implicit_head, "IMPLICIT_BYTES", 0)
    return request.param


def both(case, dtype=torch.float64):
    p = case.make(dtype)
    operands = p.act, p.weight, p.bias, p.labels, p.offsets
    return from_head(*operands, implicit=True), from_head(*operands, implicit=False)


def tolerance(dtype, f):
    return 64 * (f.num_tokens + f.num_classes + f.width) * torch.finfo(dtype).eps


def close(found, truth, bound):
    assert found.shape == truth.shape and found.dtype == truth.dtype
    size = float(truth.abs().max()) if truth.numel() else 0.0
    torch.testing.assert_close(found, truth, rtol=bound, atol=bound * size + 1e-300)


def test_it_is_factors_of_the_same_sizes(slab):
    head, stored = both(CASES[8])
    assert isinstance(head, ImplicitHead) and is_factors(head)
    names = "n n_here num_tokens num_classes feature_dim width has_bias name device dtype is_flat"
    for name in names.split():
        assert getattr(head, name) == getattr(stored, name), name
    assert torch.equal(head.empty_samples, stored.empty_samples)
    assert next(c.stop - c.start for c in cuts_of_outputs(head)) == min(slab, head.num_classes)


@cut_cases
@every_dtype
def test_chunks_are_those_of_stored_factors(case, dtype, slab):
    head, stored = both(case, dtype)
    bound = tolerance(dtype, stored) * (1 + float(case.scale))
    for tokens in (None, 1, 3, 1000):
        whole = in_memory(head, "this") if tokens is None else None
        chunks = [whole] if whole is not None else list(head.chunks(tokens))
        expected = [stored] if tokens is None else list(stored.chunks(tokens))
        for found, truth in zip(chunks, expected, strict=True):
            torch.testing.assert_close(found.delta, truth.delta, rtol=bound, atol=bound)
            torch.testing.assert_close(found.losses, truth.losses, rtol=bound, atol=bound)
            for name in ("act", "offsets", "labels"):
                assert torch.equal(getattr(found, name), getattr(truth, name))
            assert (found.loss, found.name, found.has_bias) == (
                truth.loss,
                truth.name,
                truth.has_bias,
            )
    for at in (head.samples(1, head.n), head.select(torch.arange(head.n).flip(0))) * (head.n > 1):
        of = (
            stored.samples(1, head.n)
            if at.n < head.n
            else stored.select(torch.arange(head.n).flip(0))
        )
        torch.testing.assert_close(mean_gradient(at), of.mean_gradient(), rtol=bound, atol=bound)


@every_curvature
@some_cases
def test_every_curvature_scores_as_with_stored_factors(name, case, slab):
    head, stored = both(case)
    if case.scale > 1 and name in ("ggn", "ggn_block", "kfac", "ekfac", "fisher"):
        bound = 1e-6
    else:
        bound = 1e-8
    wanted = {"damping": 0.1, "tolerance": 1e-12}
    spec = CURVATURES.choose(
        name, **{k: wanted[k] for k in wanted if k in CURVATURES[name].paths()}
    )
    queries, of = head.samples(0, 1), stored.samples(0, 1)
    given = torch.randn(stored.num_classes, stored.width, dtype=torch.float64)
    for target, other in ((None, None), (given, given), (queries, of), (of, of)):
        found = imu.influence_scores(head, curvature=spec, target=target)
        close(found, imu.influence_scores(stored, curvature=spec, target=other), bound)
    close(
        imu.influence_scores(stored, curvature=spec, target=queries),
        imu.influence_scores(stored, curvature=spec, target=of),
        bound,
    )
    first = imu.influence_scores(head, curvature=spec, first_row_is_mean=True)
    close(first, imu.influence_scores(stored, curvature=spec, first_row_is_mean=True), bound)
    close(
        imu.self_influence(head, curvature=spec), imu.self_influence(stored, curvature=spec), bound
    )
    pairs = imu.pairwise_influence(stored, of, curvature=spec)
    for samples in ((head, queries), (head, of), (stored, queries)):
        close(imu.pairwise_influence(*samples, curvature=spec), pairs, bound)
    fitted, truth = imu.fit(spec, head), imu.fit(spec, stored)
    close(fitted @ given, truth @ given, bound)
    close(fitted.self_influence(head), truth.self_influence(stored), bound)


@cut_cases
def test_statistics(case, slab):
    statistics_are_equal(case)


def test_statistics_of_more_samples_than_a_chunk():
    statistics_are_equal(CASES[4])


def statistics_are_equal(case):
    head, stored = both(case)
    close(mean_gradient(head), stored.mean_gradient(), 1e-9)
    close(head.mean_gradient(), stored.mean_gradient(), 1e-9)
    close(head.fisher_diagonal(), stored.fisher_diagonal(), 1e-9)
    close(second_moment(head), second_moment(stored), 1e-12)
    assert trace(head) == pytest.approx(trace(stored), rel=1e-8, abs=1e-12)
    close(head.losses, stored.losses, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_against_autograd_one_sample_at_a_time(dtype, slab):
    """Of the rounded numbers: half precision loses nothing more."""
    torch.manual_seed(1)
    counts = torch.tensor([3, 0, 1, 5, 2, 0])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    features, labels = torch.randn(11, 6).to(dtype), torch.randint(37, (11,))
    weight, bias = torch.randn(37, 6).to(dtype), torch.randn(37).to(dtype)
    w, b = weight.double().requires_grad_(), bias.double().requires_grad_()
    rows = []
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        a, y = features[first:last].double(), labels[first:last]
        loss = cross_entropy(linear(a, w, b), y) if last > first else 0 * (w.sum() + b.sum())
        gradient = torch.autograd.grad(loss, (w, b))
        rows.append(torch.cat([gradient[0], gradient[1][:, None]], dim=1).flatten())
    g = torch.stack(rows)
    m = g.square().mean(dim=0) + 1e-2
    head = from_head(features, weight, bias, labels, offsets, implicit=True)
    assert head.features.dtype == dtype and head.features.data_ptr() == features.data_ptr()
    bound = 1e-10 if dtype == torch.float64 else 1e-5
    for found, truth in (
        (imu.influence_scores(head, damping=1e-2), -(g @ (g.mean(dim=0) / m))),
        (imu.self_influence(head, damping=1e-2), (g.square() / m).sum(dim=1)),
        (
            imu.pairwise_influence(head, head.samples(2, 5), curvature="fisher_diag"),
            -(g @ (g[2:5] / m).T),
        ),
        (imu.influence_scores(head, curvature="identity"), -(g @ g.mean(dim=0))),
    ):
        assert float((found.double() - truth).norm() / truth.norm()) < bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lengths", [[1] * 9, [4, 0, 1, 7, 0, 3], [2, 2, 2]], ids=str)
def test_means_of_padded_sequences(dtype, bias, lengths, slab):
    """Padded tokens have the label that is ignored, a sample of nothing else has gradient 0."""
    torch.manual_seed(2)
    classes, padded, n = 29, max(lengths) + 1, len(lengths)
    features = torch.randn(n * padded, 5).to(dtype)
    labels = torch.randint(classes, (n, padded))
    labels[torch.arange(padded) >= torch.tensor(lengths)[:, None]] = -100
    weight = torch.randn(classes, 5).to(dtype)
    offset = torch.randn(classes).to(dtype) if bias else None
    operands = features, weight, offset, labels.flatten(), torch.arange(n + 1) * padded
    head, stored = (from_head(*operands, implicit=implicit) for implicit in (True, False))
    assert head.num_tokens == sum(lengths)
    w = weight.double().requires_grad_()
    b = torch.zeros(classes, dtype=torch.float64) if offset is None else offset.double()
    b.requires_grad_()
    rows = []
    for i, length in enumerate(lengths):
        z = linear(features.view(n, padded, 5)[i, :length].double(), w, b)
        loss = cross_entropy(z, labels[i, :length]) if length else 0 * (w.sum() + b.sum())
        of_w, of_b = torch.autograd.grad(loss, (w, b))
        rows.append(torch.cat([of_w, of_b[:, None]], dim=1) if bias else of_w)
    g = torch.stack(rows)
    bound = 1e-10 if dtype == torch.float64 else 1e-5
    for name, truth in (("mean_gradient", g.mean(dim=0)), ("fisher_diagonal", g.square().mean(0))):
        found = getattr(head, name)()
        assert found.dtype == head.dtype and found.shape == truth.shape
        close(found.double(), truth, bound)
        close(found, getattr(stored, name)(), bound)


class LargestNew(TorchDispatchMode):
    """The largest number of elements of memory that was not there before."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.largest = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            storage = out.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.largest = max(self.largest, storage.nbytes() // out.itemsize)
        return out


@pytest.mark.parametrize("name", SEPARATE)
@pytest.mark.parametrize("offsets", [None, torch.tensor([0, 3, 50, 50, 120, 200])], ids=str)
def test_nothing_of_the_size_of_the_signal_or_the_weight_exists(name, offsets, monkeypatch):
    tokens, classes, d, step = 200, 4000, 64, 128
    monkeypatch.setattr(implicit_head, "_FEWEST_CLASSES", step)
    monkeypatch.setattr(implicit_head, "_TILE_BYTES", 1)
    monkeypatch.setattr(implicit_head, "TOKENS", 50)
    monkeypatch.setattr(implicit_head, "SLAB", step)
    monkeypatch.setattr("imu_fast.ops.linear_softmax.normaliser.body.__defaults__", (step,))
    features, labels = torch.randn(tokens, d), torch.randint(classes, (tokens,))
    weight = torch.randn(classes, d)
    with LargestNew(features, weight, labels) as mode:
        head = from_head(features, weight, None, labels, offsets, implicit=True)
        imu.influence_scores(head, curvature=name)
        imu.influence_scores(head, curvature=name, target=head.samples(0, 2))
        imu.self_influence(head, curvature=name)
        imu.pairwise_influence(head, head.samples(0, 2), curvature=name)
    assert mode.largest <= 4 * step * max(tokens, d)


MANY = {
    "scores": lambda head: imu.influence_scores(head),
    "scores of one target": lambda head: imu.influence_scores(head, target=head.samples(0, 2)),
    "self-influence": lambda head: imu.self_influence(head),
    "pairs against a few queries": lambda head: imu.pairwise_influence(head, head.samples(0, 3)),
    "mean gradient": lambda head: head.mean_gradient(),
    "Fisher diagonal": lambda head: head.fisher_diagonal(),
}


@pytest.mark.parametrize("call", MANY)
@pytest.mark.parametrize(
    ("dtype", "of_samples"), [(torch.float32, 8), (torch.bfloat16, 1)], ids=str
)
def test_peak_memory_of_a_vocabulary(call, of_samples, dtype):
    """Logits would take 320 MB; the call chooses by itself to have none."""
    tokens, classes, d = 800, 100_000, 8
    features, labels = torch.randn(tokens, d).to(dtype), torch.randint(classes, (tokens,))
    weight = torch.randn(classes, d).to(dtype)
    offsets = torch.arange(0, tokens + 1, of_samples)
    stored = tokens * classes * 4
    assert stored > implicit_head.IMPLICIT_BYTES
    made = []

    def work():
        head = from_head(features, weight, None, labels, offsets)
        assert isinstance(head, ImplicitHead)
        made.append(MANY[call](head))

    most = peak(work)
    # Three tiles of 32 MB, results [classes, d] of curvature, target and solution.
    assert most < 3 * implicit_head._TILE_BYTES + 3 * classes * d * 4 + made[0].nbytes
    assert most < stored / 2


def test_signals_beyond_a_size_are_implicit_and_no_others(monkeypatch):
    features, weight = torch.randn(10, 3), torch.randn(7, 3)
    labels = torch.randint(7, (10,))
    monkeypatch.setattr(implicit_head, "IMPLICIT_BYTES", 10 * 7 * 4)
    monkeypatch.setattr("imu_fast.factors.gradient_factors.IMPLICIT_BYTES", 10 * 7 * 4)
    operands = weight, None, labels
    assert isinstance(from_head(features, *operands), ImplicitHead)
    assert isinstance(from_head(features, *operands, implicit=False), imu.GradientFactors)
    labels[3] = -100  # nine tokens are left
    assert isinstance(from_head(features, *operands), imu.GradientFactors)
    head = from_head(features, *operands, implicit=True)
    assert head.num_tokens == 9 and head.empty_samples.tolist() == [3]
    assert imu.influence_scores(head)[3] == 0


def test_what_would_be_silently_wrong_is_refused():
    features, weight = torch.randn(10, 3), torch.randn(7, 3)
    labels = torch.randint(7, (10,))
    head = from_head(features, weight, None, labels, implicit=True)
    imu.influence_scores(head)
    weight.mul_(2.0)
    for call in (imu.influence_scores, imu.self_influence, lambda f: imu.fit("kfac", f)):
        with pytest.raises(InputError, match=r"'head'.*changed in place since"):
            call(head)
    features[4, 1] = torch.inf
    with pytest.raises(InputError, match="features is not finite at sample 4"):
        from_head(features, weight, None, labels, implicit=True)
    with pytest.raises(InputError, match="logits is not finite at sample 0"):
        from_head(torch.full((2, 3), 3e38), torch.ones(7, 3), None, labels[:2], implicit=True)


def test_stored_moved_and_saved(tmp_path):
    head, stored = both(CASES[8], torch.float32)
    close(head.stored().delta, stored.delta, 1e-5)
    head.save(tmp_path / "factors")
    loaded = imu.GradientFactors.load(tmp_path / "factors")
    close(loaded.delta, stored.delta, 1e-5)
    assert loaded.loss == stored.loss and torch.equal(loaded.labels, stored.labels)
    wide = head.to(dtype=torch.float64)
    assert isinstance(wide, ImplicitHead) and wide.dtype == torch.float64
    close(wide.losses, stored.losses.double(), 1e-5)


def test_kfac_is_refused_by_name_where_its_matrix_does_not_fit():
    features, labels = torch.randn(4, 2), torch.randint(30_000, (4,))
    head = from_head(features, torch.randn(30_000, 2), None, labels, implicit=True)
    for name in ("kfac", "ekfac"):
        with pytest.raises(InputError, match=r"'kfac' and 'ekfac'.*30000 takes 7 GB"):
            imu.influence_scores(head, curvature=name)


def test_shares_cut_alike(slab):
    """What the processes of a group sum is of the same outputs."""
    head, stored = both(CASES[7])
    parts = [head.shard(rank, 2) for rank in range(2)]
    some = slice(2, 5)
    total = sum(at_outputs(part, some).sums(lambda c: c.mean_gradient() * c.n) for part in parts)
    close(total / stored.n, stored.mean_gradient()[some], 1e-9)
    for name in ("mean_gradient", "fisher_diagonal"):
        total = sum(getattr(part, name)() * part.n for part in parts)
        close(total / stored.n, getattr(stored, name)(), 1e-9)
    with pytest.raises(InputError, match="rank=2 of world=2"):
        head.shard(2, 2)
