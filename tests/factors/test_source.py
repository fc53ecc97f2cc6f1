"""The one seam: sums over chunks, over what is not in memory, and over processes."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, LargestTensor, Pieces, every_case, head_factors

import imu_fast as imu
from imu_fast import reference
from imu_fast.curvature.named import CURVATURES
from imu_fast.errors import InputError
from imu_fast.factors.probabilities import probabilities
from imu_fast.factors.source import in_memory, is_factors
from imu_fast.factors.statistics import mean_gradient, second_moment, trace

close = torch.testing.assert_close


@every_case
@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_statistics_of_pieces(case, tokens):
    f = head_factors(case)
    pieces = Pieces(f, tokens)
    arguments = f.delta, f.act, f.offsets, f.has_bias
    p, scale = probabilities(f)
    a = reference.augment(f.act, f.has_bias)
    matrix = reference.ggn_matrix(p, scale, f.act, f.n, 0.0, f.has_bias)
    for source in (f, pieces):
        close(mean_gradient(source), reference.mean_gradient(*arguments))
        close(second_moment(source), a.T @ a / len(a))
        assert trace(source) == pytest.approx(float(matrix.trace()), rel=1e-9, abs=1e-12)


def test_in_memory_chunks_are_the_thing_itself():
    """So that nothing is copied, and what is made of it is made once."""
    f = head_factors(CASES[8])
    assert [*f.chunks()] == [f] and next(iter(f.chunks())) is f
    assert f.sums(lambda chunk: chunk.delta) is f.delta
    assert f.each(lambda chunk: chunk.losses) is f.losses
    assert (f.n, f.n_here, f.device, f.dtype) == (5, 5, f.delta.device, torch.float64)
    assert is_factors(f) and is_factors(Pieces(f, 1)) and not is_factors([f])


def test_what_a_model_gives_is_detached():
    """Operations have no derivative, and would refuse what a backward pass left a graph on."""
    f = head_factors(CASES[8])
    operands = [t.clone().requires_grad_() for t in (f.delta, f.act)]
    b = torch.ones(f.num_tokens, f.num_classes, dtype=torch.float64, requires_grad=True)
    found = imu.GradientFactors(*operands, f.offsets, f.has_bias, curvature=b)
    assert found.delta.data_ptr() == operands[0].data_ptr() and operands[0].requires_grad
    close(found.mean_gradient(), f.mean_gradient())
    fitted = imu.fit("ggn", found, damping=0.1)
    assert not (fitted @ torch.ones(f.num_classes, f.width, dtype=torch.float64)).requires_grad


def test_sums_of_tuples_in_order():
    f = head_factors(CASES[1])
    seen = []

    def both(chunk):
        seen.append(chunk.n)
        return chunk.delta.sum(dim=0), chunk.act.sum(dim=0)

    delta, act = Pieces(f, 5).sums(both)
    assert seen == [5, 5, 3]
    close(delta, f.delta.sum(dim=0))
    close(act, f.act.sum(dim=0))


def test_pieces_are_gathered_where_all_are_needed(monkeypatch):
    f = head_factors(CASES[8])
    found = in_memory(Pieces(f, 2), "this")
    for name in ("delta", "act", "offsets", "labels", "losses"):
        assert torch.equal(getattr(found, name), getattr(f, name))
    assert (found.name, found.has_bias, found.loss) == (f.name, f.has_bias, f.loss)
    assert in_memory(f, "this") is f
    monkeypatch.setattr("imu_fast.factors.source.MAX_GATHERED", 8 * f.num_tokens * 11 - 1)
    with pytest.raises(InputError, match=r"curvature='fisher' needs all factors in memory.*'kfac'"):
        imu.fit("fisher", Pieces(f, 2))


@pytest.mark.parametrize("name", imu.curvatures())
def test_nothing_of_the_size_of_all_tokens_exists(name):
    """But for the Gram matrix, whose curvature says so."""
    n, d, classes = 3000, 8, 3
    labels = torch.randint(classes, (n,))
    f = imu.GradientFactors.from_head(torch.randn(n, d), torch.randn(classes, d), None, labels)
    pieces = Pieces(f, 50)
    spec = CURVATURES.choose(name, solver="primal" if name == "ggn" else None)
    with LargestTensor() as mode:
        x = imu.fit(spec, pieces).solve(mean_gradient(pieces))
    assert x.isfinite().all()
    assert mode.largest >= n * n if name == "fisher" else mode.largest < n


def test_conjugate_gradient_reads_the_pieces_once_per_product():
    f = head_factors(CASES[1])
    pieces = Pieces(f, 4)
    fitted = imu.fit("ggn", pieces, solver="cg", preconditioner="none")
    v, before = mean_gradient(pieces), pieces.passes
    fitted.solve(v)
    rounds = 4  # the certificate of each round of refinement
    assert fitted.iterations <= pieces.passes - before <= fitted.iterations + rounds


def test_what_is_no_factors_is_refused():
    for bad in (5, "factors", torch.ones(3), None, [], [torch.ones(2)]):
        with pytest.raises(InputError, match="source must be GradientFactors, or a list"):
            imu.influence_scores(bad)
