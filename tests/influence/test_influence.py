"""Scores, self-influence, pairwise influence, factors and backends."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cases import CASES, IDS, LargestTensor
from hypothesis import given, settings
from hypothesis import strategies as st

import imu_fast as imu
from imu_fast import reference
from imu_fast.backend import record_backends
from imu_fast.errors import InputError


def make(n=12, c=4, d=5, seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(n, d, generator=g, dtype=torch.float64)
    weight = torch.randn(c, d, generator=g, dtype=torch.float64)
    bias = torch.randn(c, generator=g, dtype=torch.float64)
    labels = torch.randint(c, (n,), generator=g)
    return imu.GradientFactors.from_head(features, weight, bias, labels, **options)


def gradients(f):
    return reference.sample_gradients(f.delta, f.act, f.offsets, f.has_bias)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("mode", ["add", "clamp"])
def test_definitions(case, mode):
    """influence, self-influence and pairwise influence from the dense gradients."""
    p = case.make(torch.float64)
    f = imu.GradientFactors.from_head(p.act, p.weight, p.bias, p.labels, p.offsets)
    g = gradients(f)
    m = reference.damped_diagonal(g.square().mean(0), 0.1, mode)
    options = dict(damping=0.1, damping_mode=mode)
    expected = reference.influence(f.delta, f.act, f.offsets, f.has_bias, g.mean(0) / m)
    torch.testing.assert_close(imu.influence_scores(f, **options), expected)
    torch.testing.assert_close(imu.self_influence(f, **options), (g * g / m).sum((1, 2)))
    pairs = -torch.einsum("icd,jcd->ij", g, g / m)
    found = imu.pairwise_influence(f, f, curvature="fisher_diag", **options)
    torch.testing.assert_close(found, pairs)
    plain = -torch.einsum("icd,cd->i", g, g.mean(0))
    torch.testing.assert_close(imu.influence_scores(f, curvature="identity"), plain)
    torch.testing.assert_close(imu.self_influence(f, curvature="identity"), g.square().sum((1, 2)))


def test_targets():
    f, q = make(), make(n=7, seed=1)
    pairs = imu.pairwise_influence(f, q, curvature="fisher_diag")
    torch.testing.assert_close(imu.influence_scores(f, target=q), pairs.mean(dim=1))
    given_v = imu.influence_scores(f, target=q.mean_gradient())
    torch.testing.assert_close(given_v, pairs.mean(dim=1))


def test_several_layers_add_up():
    a, b = make(), make(d=3, seed=2)
    total = imu.influence_scores(a) + imu.influence_scores(b)
    torch.testing.assert_close(imu.influence_scores([a, b]), total)
    own = imu.self_influence(a) + imu.self_influence(b)
    torch.testing.assert_close(imu.self_influence([a, b]), own)


def test_first_row_is_mean_changes_only_sample_zero():
    f = make()
    g = gradients(f)
    m = g.square().mean(0) + 1e-2
    plain, defect = imu.influence_scores(f), imu.influence_scores(f, first_row_is_mean=True)
    torch.testing.assert_close(defect[1:], plain[1:])
    torch.testing.assert_close(defect[0], -(g.mean(0) ** 2 / m).sum())


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 40),
    c=st.integers(2, 9),
    d=st.integers(1, 9),
    chunk=st.integers(1, 50),
    seed=st.integers(0, 2**31),
)
def test_scores_do_not_depend_on_chunks_or_order(n, c, d, chunk, seed):
    f = make(n, c, d, seed)
    scores = imu.influence_scores(f)
    chunked = imu.influence_scores(make(n, c, d, seed, chunk_size=chunk))
    torch.testing.assert_close(chunked, scores, rtol=1e-9, atol=1e-12)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    permuted = imu.influence_scores(f.select(order))
    torch.testing.assert_close(permuted, scores[order], rtol=1e-9, atol=1e-12)


def test_ignored_labels_and_empty_samples(caplog):
    labels = torch.tensor([1, -100, 2, -100, -100, 0])
    offsets = torch.tensor([0, 3, 5, 6])
    features, weight = torch.randn(6, 4).double(), torch.randn(3, 4).double()
    f = imu.GradientFactors.from_head(features, weight, None, labels, offsets)
    assert f.offsets.tolist() == [0, 2, 2, 3]
    assert f.empty_samples.tolist() == [1]
    keep = torch.tensor([0, 2, 5])
    same = imu.GradientFactors.from_head(
        features[keep], weight, None, labels[keep], torch.tensor([0, 2, 2, 3])
    )
    torch.testing.assert_close(f.delta, same.delta)
    scores = imu.influence_scores(f)
    assert scores[1] == 0
    assert "sample 1" in caplog.text
    expected = torch.nn.functional.cross_entropy(features[[0, 2]] @ weight.T, labels[[0, 2]])
    torch.testing.assert_close(f.losses[0], expected)


def test_chunks_shards_and_selection_cut_the_same_samples():
    p = CASES[7].make(torch.float64)
    f = imu.GradientFactors.from_head(p.act, p.weight, p.bias, p.labels, p.offsets)
    g = gradients(f)
    for parts in (list(f.chunks(4)), [f.shard(r, 3) for r in range(3)]):
        torch.testing.assert_close(torch.cat([gradients(part) for part in parts]), g)
    assert all(part.num_tokens <= 4 or part.n == 1 for part in f.chunks(4))
    order = torch.tensor([4, 0, 0, 2])
    torch.testing.assert_close(gradients(f.select(order)), g[order])
    torch.testing.assert_close(f.select(order).losses, f.losses[order])
    assert f.to(dtype=torch.float32).delta.dtype == torch.float32


def test_save_and_load(tmp_path):
    f, path = make(), tmp_path / "sub" / "factors.safetensors"
    f.save(path)
    g = imu.GradientFactors.load(path)
    assert torch.equal(imu.influence_scores(f), imu.influence_scores(g))
    assert g.has_bias and g.name == "head"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(InputError, match="does not exist"):
        imu.GradientFactors.load(tmp_path / "none")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(InputError, match="no readable safetensors"):
        imu.GradientFactors.load(tmp_path / "text")


def test_backends():
    f = make()
    scores = imu.influence_scores(f)
    with imu.use_backend("reference"), record_backends() as used:
        torch.testing.assert_close(imu.influence_scores(f), scores)
        imu.self_influence(f)
    assert set(used.values()) == {"reference"}


def test_backend_from_the_environment(monkeypatch):
    monkeypatch.setenv("IMU_FAST_BACKEND", "reference")
    with record_backends() as used:
        imu.influence_scores(make())
    assert set(used.values()) == {"reference"}


def test_nothing_of_size_ncd_exists():
    n, c, d = 200, 30, 40
    features, weight = torch.randn(n, d), torch.randn(c, d)
    labels = torch.randint(c, (n,))
    with LargestTensor() as mode:
        f = imu.GradientFactors.from_head(features, weight, torch.zeros(c), labels)
        imu.influence_scores(f)
        imu.self_influence(f)
    assert mode.largest <= n * max(c, d + 1)


MEMORY = """
import resource, torch, imu_fast as imu
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small = imu.GradientFactors.from_head(torch.randn(300, 256), torch.randn(200, 256),
                                      torch.randn(200), torch.randint(200, (300,)))
imu.influence_scores(small)  # loads the libraries
n, d, c = 5000, 2048, 1000
features, weight = torch.randn(n, d), torch.randn(c, d)
bias, labels = torch.randn(c), torch.randint(c, (n,))
inputs = features.nbytes + weight.nbytes + bias.nbytes + labels.nbytes
before = peak()
scores = imu.influence_scores(imu.GradientFactors.from_head(features, weight, bias, labels))
assert scores.isfinite().all()
print((peak() - before + inputs) / inputs)
"""


def test_memory_is_within_three_times_the_inputs():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=300
    )
    assert float(done.stdout) <= 3.0, done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(features=torch.zeros(0, 5)), r"features has shape \(0, 5\).*N >= 1"),
        (dict(weight=torch.zeros(3, 4)), r"weight has shape \(3, 4\)"),
        (dict(bias=torch.zeros(2)), r"bias has shape \(2,\); expected \(3,\)"),
        (dict(labels=torch.zeros(5, dtype=torch.int64)), r"labels has shape \(5,\)"),
        (dict(labels=torch.tensor([0, 1, 3, 0])), r"labels\[2\]=3 is outside \[0, 3\)"),
        (dict(labels=torch.tensor([0, -1, 2, 0])), r"labels\[1\]=-1 .*ignore_index=-100"),
        (dict(labels=torch.zeros(4)), "labels have dtype torch.float32"),
        (dict(chunk_size=0), "chunk_size=0"),
        (dict(offsets=torch.tensor([0, 3])), "offsets must rise from 0 to N=4"),
    ],
)
def test_bad_heads(change, message):
    arguments = dict(
        features=torch.randn(4, 5),
        weight=torch.randn(3, 5),
        bias=torch.randn(3),
        labels=torch.tensor([0, 1, 2, 0]),
    )
    with pytest.raises(InputError, match=message):
        imu.GradientFactors.from_head(**(arguments | change))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_name_the_sample(value):
    features, weight, labels = torch.randn(4, 5), torch.randn(3, 5), torch.tensor([0, 1, 2, 0])
    bad = features.clone()
    bad[2, 1] = value
    with pytest.raises(InputError, match="features is not finite at sample 2"):
        imu.GradientFactors.from_head(bad, weight, None, labels)
    bad = weight.clone()
    bad[1, 0] = value
    with pytest.raises(InputError, match="weight is not finite at class 1"):
        imu.GradientFactors.from_head(features, bad, None, labels)


def test_large_finite_features_are_not_called_infinite():
    features = torch.full((2, 4), 3e38)
    with pytest.raises(InputError, match="logits is not finite at sample 0"):
        imu.GradientFactors.from_head(features, torch.ones(2, 4), None, torch.tensor([0, 1]))


def test_bad_arguments():
    f = make()
    for damping in (0, -1, float("inf"), float("nan"), "much"):
        with pytest.raises(InputError, match="damping="):
            imu.influence_scores(f, damping=damping)
    with pytest.raises(
        InputError, match=r"curvature='hessian' is unknown.*ggn_block, identity, kfac"
    ):
        imu.influence_scores(f, curvature="hessian")
    with pytest.raises(InputError, match="damping_mode='max'"):
        imu.influence_scores(f, damping_mode="max")
    with pytest.raises(InputError, match="expected one"):
        imu.influence_scores(f, target=torch.zeros(2, 2))
    with pytest.raises(InputError, match="target is not finite"):
        imu.influence_scores(f, target=torch.full((4, 6), torch.nan))
    with pytest.raises(InputError, match="capture both from the same model"):
        imu.influence_scores(f, target=make(d=3))
    with pytest.raises(InputError, match="must be GradientFactors"):
        imu.influence_scores([])
    with pytest.raises(InputError, match="data=None"):
        imu.influence_scores(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="data is only used with a model"):
        imu.influence_scores(f, [])
    with pytest.raises(InputError, match="layers disagree"):
        imu.influence_scores([f, make(n=3)])
    with pytest.raises(InputError, match="queries has 2 layers"):
        imu.pairwise_influence(f, [f, f])
    with pytest.raises(InputError, match="rank=3 of world=3"):
        f.shard(3, 3)
    with pytest.raises(InputError, match="both must be float32 or float64"):
        imu.GradientFactors(f.delta, f.act.half(), f.offsets, True)
    with pytest.raises(InputError, match="empty forget set"):
        imu.GradientFactors(f.delta[:0], f.act[:0], torch.tensor([0]), True)
    with pytest.raises(InputError, match="same N"):
        imu.GradientFactors(f.delta[:3], f.act, f.offsets, True)
