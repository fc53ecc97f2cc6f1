"""Random inputs of every public function: the number of float64, or an InputError.

``python tests/fuzz/fuzz.py 2000`` (``make fuzz CASES=2000``) runs so many for each function, or for
those that are named after the number, and prints what came of them. A case that fails is made
smaller, and printed, by hypothesis.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from dense_curvatures import MATRIX, gradients
from fuzz_doors import DOORS
from hostile_values import ODD, WRONG
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import imu_fast as imu
from imu_fast.curvature.named import CURVATURES
from imu_fast.errors import ImuFastError
from imu_fast.factors.operands import HALF

# What is drawn is kept nowhere: a run with the same number of cases is the same run.
_SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
RIGHT, REFUSED, TOLD = "right", "refused", "told"
Case = Callable[[st.DataObject], str]


def finite(found: Any) -> bool:
    """Whether every number in it is."""
    if isinstance(found, Tensor):
        return not found.is_floating_point() or bool(torch.isfinite(found).all())
    if isinstance(found, dict):
        return all(map(finite, found.values()))
    if isinstance(found, tuple | list):
        return all(map(finite, found))
    return not isinstance(found, float) or found == found


def numbers(found: Any) -> Iterator[Tensor]:
    """The floating-point ones, as tensors."""
    if isinstance(found, Tensor) and found.is_floating_point():
        yield found.double()
    elif isinstance(found, float):
        yield torch.tensor(found, dtype=torch.float64)
    elif isinstance(found, dict | tuple | list):
        for item in found.values() if isinstance(found, dict) else found:
            yield from numbers(item)


def assert_close(found: Tensor, truth: Tensor, bound: Tensor) -> None:
    """Finite, and within the bound of the truth."""
    assert torch.isfinite(found).all(), found
    assert bool(((found.double() - truth).abs() <= bound).all()), (found, truth, bound)


@contextmanager
def told() -> Iterator[list[str]]:
    """What the library says beside its result: that a residual is above its tolerance."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("imu_fast")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


# Of whose numbers a rounding may make others: runs of optimizers, and what they are measured by;
# roots of scores that cancel; a softmax of logits in float32, up to 1e16 here.
_UNSTABLE = (
    *("unlearn", "unlearn(all)", "unlearn(margin_edit)", "unlearn_in_turn", "leave_one_out"),
    *("linear_probe", "membership_accuracy", "top_influences", "ImplicitHead"),
    *("batch_weights", "batch_weights(model)", "live_weights", "InfluenceWeightedLoss"),
)
# Whose condition magnifies rounding: 1e16 in squares of 1e8. "dense" has a bound for them.
_COUPLED = ("(fisher)", "(ggn", "kfac)")
# These only move numbers about, whatever they are.
MOVES = ("matrix_to_vector", "vector_to_matrix", "split")


def door(name: str) -> Case:
    """A public function with its tensors scaled and mixed, and any one of them hostile."""
    made = DOORS[name]
    arguments, kinds = list(made.tensors()), {"": lambda t: t} | WRONG | ODD

    def case(data: st.DataObject) -> str:
        tensors: dict[str, Any] = made.tensors()
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
        single, far = data.draw(st.booleans(), "float32"), False
        for argument, t in tensors.items():
            if t.is_floating_point():
                exponent = data.draw(st.sampled_from([0, 0, 0, 0, -2, 2, -8, 8]), argument)
                far, scale = far or abs(exponent) > 2, 10.0**exponent
                mixed = argument not in ("p", "a", "b", "labels")
                factor = torch.rand(t.shape, generator=generator).double() + 0.5 if mixed else 1.0
                t = (t.double() * factor).mul(scale).to(torch.float32 if single else t.dtype)
            elif argument == "labels":
                t = t[torch.randperm(len(t), generator=generator)]
            tensors[argument] = t
        victim = data.draw(st.sampled_from(arguments), "victim")
        kind = data.draw(st.sampled_from(list(kinds)), "kind")
        try:
            tensors[victim] = kinds[kind](tensors[victim])
        except (RuntimeError, NotImplementedError, IndexError, TypeError):
            return REFUSED  # torch makes no such tensor of this one
        try:
            with told() as said:
                found = made.call(**tensors, **made.others)
        except ImuFastError:
            return REFUSED
        assert name in MOVES or finite(found), "not finite"
        if any("tolerance" in line for line in said):
            return TOLD
        magnified = far and any(kind in name for kind in _COUPLED)
        if single and not magnified and name not in (*_UNSTABLE, *MOVES):
            wide = {
                k: v.double() if isinstance(v, Tensor) and v.dtype == torch.float32 else v
                for k, v in tensors.items()
            }
            try:
                truth = made.call(**wide, **made.others)
            except ImuFastError:
                return RIGHT
            for a, b in zip(numbers(found), numbers(truth), strict=True):
                if b.numel():
                    assert_close(a, b, 1e-2 * b.abs().max().clamp_min(1e-30))
        return RIGHT

    return case


@st.composite
def any_factors(draw: st.DrawFn) -> imu.GradientFactors:
    """Of no loss, of any magnitude."""
    n, d, c = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.integers(-35, 35))
    x = torch.randn(n, d, generator=generator, dtype=torch.float64).mul(scale).to(dtype)
    delta = torch.randn(n, c, generator=generator, dtype=torch.float64)
    delta = delta.mul(10.0 ** draw(st.integers(-30, 3))).to(dtype)
    if dtype == torch.float32 and draw(st.booleans()):
        x = x.bfloat16()
    return imu.GradientFactors(delta, x, torch.arange(n + 1), draw(st.booleans()))


def elementwise(curvature: str) -> Case:
    """Curvatures whose rounding is that of their sums; damping from 1e-30 to 1e30."""

    def case(data: st.DataObject) -> str:
        f, exponent = data.draw(any_factors()), data.draw(st.integers(-30, 30))
        options = {} if curvature == "identity" else {"damping": 10.0**exponent}
        g = gradients(f)
        diagonal = torch.ones_like(g[0]) if not options else g.square().mean(0) + 10.0**exponent
        try:
            found = imu.influence_scores(f, curvature=curvature, **options)
            own = imu.self_influence(f, curvature=curvature, **options)
        except ImuFastError:
            if f.dtype == torch.float64:
                raise  # 1e35 squared is far from float64's end
            return REFUSED
        # A product of two that underflows is off by tiny, which its other factors magnify.
        tiny, terms, least = torch.finfo(f.dtype).tiny, f.n + len(g[0]), diagonal.min()
        eps = (terms + 8) * torch.finfo(f.dtype).eps
        largest = 1 + f.act.abs().max().double() + f.delta.abs().max().double()
        # Of the diagonal, relative: what squares lose, up to rounding; from there on they must not.
        off = (tiny * largest.square() / least).clamp_max(eps) + tiny * terms / least
        size = (g.abs() / diagonal) @ g.abs().mean(0)
        lost = off * size + tiny * terms * (g.abs().max() * (1 + 1 / least) + largest)
        assert_close(found, -(g / diagonal) @ g.mean(0), eps * size + lost)
        truth = (g.square() / diagonal).sum(1)
        assert_close(own, truth, eps * truth + off * (truth + terms) + tiny)
        return RIGHT

    return case


@st.composite
def softmax_factors(draw: st.DrawFn) -> imu.GradientFactors:
    """Of a head under cross-entropy, images or sequences, from undecided to certain."""
    n, d, c = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(2, 4))
    counts = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    if not int(offsets[-1]):
        offsets = torch.arange(n + 1)
    rows, dtype = int(offsets[-1]), draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = torch.randn(rows, d, generator=generator).mul(10.0 ** draw(st.integers(-3, 2))).to(dtype)
    w = torch.randn(c, d, generator=generator).mul(10.0 ** draw(st.integers(-2, 1))).to(dtype)
    bias = torch.randn(c, generator=generator).to(dtype) if draw(st.booleans()) else None
    if dtype == torch.float32 and (half := draw(st.sampled_from([None, *HALF]))):
        x = x.to(half)
    labels = torch.randint(c, (rows,), generator=generator)
    return imu.GradientFactors.from_head(x, w, bias, labels, offsets, implicit=False)


def coupled(curvature: str) -> Case:
    """Every curvature against its dense definition; damping from 1e-6 to 1e3."""

    def case(data: st.DataObject) -> str:
        f, lam = data.draw(softmax_factors()), 10.0 ** data.draw(st.integers(-6, 3))
        options = {} if curvature == "identity" else {"damping": lam}
        lam = 1.0 if curvature == "identity" else lam
        spec = CURVATURES.choose(curvature, **options)
        try:
            with told() as said:
                fitted = imu.fit(spec, f)
                found = imu.influence_scores(f, curvature=spec)
                own = imu.self_influence(f, curvature=spec)
        except ImuFastError:
            return REFUSED
        if any("tolerance" in line for line in said):
            return TOLD
        g, m = gradients(f), MATRIX[curvature](f, lam, fitted)
        solved = torch.linalg.solve(m, torch.cat([g.mean(0)[None], g]).T).T
        eps, wide = torch.finfo(f.dtype).eps, torch.finfo(torch.float64).eps
        # Sums, not roots of squares: those of a confident sample's 1e-200 are zero.
        norms, terms = g.abs().sum(1), 16 + f.num_tokens + 4 * g.shape[1]
        tolerance = getattr(spec, "tolerance", 0.0)
        # Rounding of v and of the products in the factors' dtype; of M, and of the solve, in
        # float64 (where M is diagonal: in the factors'), magnified by the condition of M.
        condition = 1 + m.abs().sum(1).max() / lam
        magnified = eps if curvature in ("identity", "fisher_diag") else wide * condition
        for x, v, result, truth in (
            (solved[0], g.abs().mean(0).sum(), found, -(g @ solved[0])),
            (solved[1:], norms, own, (g * solved[1:]).sum(1)),
        ):
            size = x.abs().sum(-1)
            bound = norms * (size * terms * (eps + magnified) + v * (terms * eps + tolerance) / lam)
            assert_close(result, truth, bound + torch.finfo(f.dtype).tiny)
        return RIGHT

    return case


def weights(data: st.DataObject) -> str:
    """Of scores of any magnitude."""
    scores = data.draw(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=9))
    made = torch.tensor(scores, dtype=torch.float64)
    indices, found = imu.influence_weights(made, data.draw(st.floats(1e-3, 1)), on_empty="uniform")
    assert torch.isfinite(found).all() and (found >= 0).all()
    assert len(indices) == len(found) >= 1
    return RIGHT


def cholesky(data: st.DataObject) -> str:
    """Backward stable: the residual is rounding of what is multiplied."""
    order, exponent = data.draw(st.integers(1, 8)), data.draw(st.integers(-30, 30))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    root = torch.randn(order, order, generator=generator, dtype=torch.float64)
    a, b = root @ root.T, torch.randn(order, generator=generator, dtype=torch.float64)
    lam = 10.0**exponent
    try:
        x = imu.damped_cholesky_solve(a, b, lam)
    except ImuFastError:
        return REFUSED
    assert torch.isfinite(x).all()
    size = (a.norm() + lam) * x.norm() + b.norm()
    assert (a @ x + lam * x - b).norm() <= 1e3 * order * torch.finfo(a.dtype).eps * size
    return RIGHT


FUNCTIONS: dict[str, Case] = {
    **{f"elementwise {name}": elementwise(name) for name in ("identity", "fisher_diag")},
    **{f"dense {name}": coupled(name) for name in imu.curvatures()},
    "weights of any size": weights,
    "solves of any damping": cholesky,
    **{name: door(name) for name in DOORS},
}


def fuzz(name: str, cases: int) -> Counter[str]:
    """What came of so many cases of a function.

    Raises:
        AssertionError: a number that is wrong or not finite; an error that is none of ours passes
            as it is.
    """
    found, case = Counter[str](), FUNCTIONS[name]

    @settings(max_examples=cases, derandomize=True, **_SETTINGS)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[case(data)] += 1

    check()
    return found


def main() -> int:
    cases = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    names, failed = sys.argv[2:] or list(FUNCTIONS), 0
    if unknown := [name for name in names if name not in FUNCTIONS]:
        sys.exit(f"no function is called {', '.join(unknown)}; there are {', '.join(FUNCTIONS)}")
    print(f"{'function':32} {'cases':>7} {'right':>7} {'refused':>8} {'told':>5} {'seconds':>8}")
    for name in names:
        start = time.perf_counter()
        try:
            found = fuzz(name, cases)
        except Exception as error:
            failed += 1
            print(f"{name:32} FAILED: {type(error).__name__}: {str(error)[:600]}", flush=True)
            for note in getattr(error, "__notes__", ()):
                print(f"    {note}")
            continue
        counts = f"{found[RIGHT]:7} {found[REFUSED]:8} {found[TOLD]:5}"
        seconds = time.perf_counter() - start
        print(f"{name:32} {sum(found.values()):7} {counts} {seconds:8.1f}", flush=True)
    print(f"{len(names) - failed} of {len(names)}: no other error, no wrong number")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
