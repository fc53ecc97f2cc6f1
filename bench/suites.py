"""What the suites of single operations share: problem, correctness gate, interleaved timing, floor.

Each ``bench/test_<operation>.py`` describes one operation as a :class:`Suite` and its sizes as
:class:`Problem`; a test per problem and role calls :func:`measure`. Roles: ``imu_fast``, what
"auto" runs on this device; ``torch``, the vectorised PyTorch path, where that is another;
``torch.compile`` of the plain formula; ``naive``, what a user would write. Without a GPU all are
the CPU paths.

The floor of a problem is its roofline bound. On a GPU it is from counted bytes and FLOPs and from
ceilings measured in this run; on a CPU it is the time of the bare matrix products, or of a copy of
as many bytes. The bare work runs before every round of every role, so that both see the same
machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import pytest
import roofline
import torch
from torch import Tensor

from imu_fast import use_backend

ROLES = ("imu_fast", "torch", "torch.compile", "naive")
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
# Largest relative error of one operand in each arithmetic.
ROUNDOFF = {"bf16": 2**-8, "tf32": 2**-11, "fp32": 2**-24}
CUDA = torch.cuda.is_available()
# Seconds of rounds per role; rounds are at least ROUNDS[0] and at most ROUNDS[1].
BUDGET, ROUNDS = (0.5, (10, 50)) if CUDA else (1.5, (8, 30))

# Where the vectorised CPU path must run at 80% or more of a bare matrix product of its shapes.
GOAL = {"N": 5_000, "C": 1_000, "d": 2_048}

Operands = tuple


@dataclass(frozen=True)
class Problem:
    """Sizes of one benchmark and the arithmetic of its products: "bf16", "tf32" or "fp32"."""

    kind: str
    sizes: dict[str, int]
    device: str = "cuda" if CUDA else "cpu"

    @property
    def shapes(self) -> str:
        return " ".join(f"{name}={size:,}" for name, size in self.sizes.items())

    def __str__(self) -> str:
        return f"{self.kind} {self.shapes}"


@dataclass(frozen=True)
class Suite:
    """One operation, its baselines, and what it costs; functions take the operands of ``make``.

    Attributes:
        make: ``(problem) -> operands``; on its device, in its dtype.
        ours, reference, formula, naive: from operands to results; ``formula`` is compiled.
        bare: ``(*operands) -> work``, the floor's, with its results allocated beforehand.
        cost: of :mod:`roofline`; called with the kind and the sizes.
        small: sizes at which the reference is affordable.
        few: sizes of ``naive`` where it would not fit; none where it does.
        samples: results that one call gives; a time per sample compares ``few`` with all.
        in_place: whether a call changes its operands, which then are made anew every round.
        calls: calls per round on a GPU, where one alone would be the launch's latency.
    """

    operation: str
    make: Callable[[Problem], Operands]
    ours: Callable
    reference: Callable
    formula: Callable
    naive: Callable
    bare: Callable[..., Callable[[], object]]
    cost: Callable[..., roofline.Cost]
    small: dict[str, int]
    few: dict[str, int] = field(default_factory=dict)
    samples: Callable[[dict[str, int]], int] = lambda sizes: sizes["N"]
    in_place: bool = False
    calls: int = 1

    def resized(self, problem: Problem, sizes: dict[str, int]) -> Problem:
        return Problem(problem.kind, {**problem.sizes, **sizes}, problem.device)


def problems(cpu: Sequence[dict[str, int]], cuda: Sequence[tuple[str, dict[str, int]]]):
    """The decorator that runs a test on every problem of this device in every role."""
    found = [Problem(*p) for p in cuda] if CUDA else [Problem("fp32", sizes) for sizes in cpu]

    def decorate(test: Callable) -> Callable:
        test = pytest.mark.parametrize("role", ROLES)(test)
        return pytest.mark.parametrize("problem", found, ids=str)(test)

    return decorate


def randn(problem: Problem, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Normal numbers in the problem's dtype, or another, the same ones every time."""
    generator = torch.Generator(problem.device).manual_seed(sum(shape))
    x = torch.randn(*shape, generator=generator, device=problem.device)
    return x.to(DTYPES[problem.kind] if dtype is None else dtype)


def labels(problem: Problem, count: int, classes: int) -> Tensor:
    generator = torch.Generator(problem.device).manual_seed(0)
    return torch.randint(classes, (count,), generator=generator, device=problem.device)


def cut(tokens: int, samples: int) -> Tensor:
    """Offsets [samples + 1] that cut ``tokens`` into samples of random length, at least 1."""
    generator = torch.Generator().manual_seed(0)
    cuts = 1 + torch.randperm(tokens - 1, generator=generator)[: samples - 1].sort().values
    return torch.cat([torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([tokens])])


def image_factors(problem: Problem) -> tuple[Tensor, Tensor, Tensor, bool]:
    """delta [N, C] and act [N, d] of samples of one token each, their offsets, and the bias."""
    n, classes, d = (problem.sizes[name] for name in ("N", "C", "d"))
    return randn(problem, n, classes), randn(problem, n, d), torch.arange(n + 1), True


def gradient_product(delta: Tensor, act: Tensor, *_: object) -> Callable[[], object]:
    """The bare ``delta^T @ act``."""
    out = delta.new_empty(delta.shape[1], act.shape[1])
    return lambda: torch.matmul(delta.T, act, out=out)


def copy_of(moved: float, device: str) -> Callable[[], object]:
    """A copy that reads and writes ``moved`` bytes together."""
    source = torch.zeros(int(moved / 8), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds until the device has done the work."""
    synchronize()
    before = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - before


@cache
def ceilings() -> roofline.Ceilings:
    """This GPU's: a copy of 1 GiB, and bare matrix products of 8,192^3 on random numbers."""
    copy = copy_of(2**31, "cuda")
    rates = {}
    for kind, dtype in DTYPES.items():
        left, right = (torch.randn(2, 8192, 8192, device="cuda").to(dtype)).unbind()
        out = torch.empty_like(left)

        def product(a: Tensor = left, b: Tensor = right, out: Tensor = out) -> Tensor:
            return torch.matmul(a, b, out=out)

        with precision(kind):
            rates[kind] = 2 * 8192**3 / min(seconds(product) for _ in range(8))
    return roofline.Ceilings(2**31 / min(seconds(copy) for _ in range(8)), rates)


@contextmanager
def precision(kind: str):
    """TF32 on request only: torch's own switch, which our kernels obey."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if kind == "fp32" else "high")
    yield
    torch.set_float32_matmul_precision(before)


def tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def copied(operands: Operands, device: str | None = None) -> Operands:
    """Operands whose tensors are copies, on ``device`` if that is given."""
    return tuple(
        x.detach().clone().to(device or x.device) if isinstance(x, Tensor) else x for x in operands
    )


def check(problem: Problem, name: str, found: object, truth: object) -> None:
    """No timing on a red gate: the norm of the error over that of the truth, of every result.

    A few roundings of the operands, and of a float32 sum as long as the longest axis; errors of
    random sign add up as its square root.
    """
    length = max(problem.sizes.values())
    bound = 8 * (ROUNDOFF[problem.kind] + length**0.5 * ROUNDOFF["fp32"])
    for a, b in zip(tensors(found), tensors(truth), strict=True):
        assert a.shape == b.shape, f"{name}: {tuple(a.shape)} is not {tuple(b.shape)}"
        b = b.to(a.device).float()
        error = float((a.float() - b).norm() / b.norm().clamp_min(1e-30))
        assert error <= bound, f"{name} on {problem}: relative error {error:.2g} > {bound:.2g}"


def _function(suite: Suite, role: str) -> Callable:
    if role == "torch.compile":
        return torch.compile(suite.formula, dynamic=False)
    if role == "naive":
        return suite.naive
    return suite.ours


def _gate(suite: Suite, problem: Problem, role: str, function: Callable) -> None:
    """Against reference.py at the small size; against the vectorised path at the real one."""
    small = suite.resized(problem, suite.small)
    operands = suite.make(small)
    truth = suite.reference(*copied(operands, "cpu"))
    # Not the compiled function: it would be compiled for these sizes too.
    tried = suite.formula if role == "torch.compile" else function
    check(small, f"{suite.operation}, {role}", tried(*copied(operands)), truth)
    if role == "naive" or (role == "imu_fast" and not CUDA):
        return
    operands = suite.make(problem)
    with use_backend("torch"):
        truth = suite.ours(*copied(operands))
    check(problem, f"{suite.operation}, {role}", function(*operands), truth)


def _peak(work: Callable[[], object]) -> int:
    """Bytes allocated on the GPU beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def measure(benchmark, suite: Suite, problem: Problem, role: str) -> None:
    """Time one role on one problem, after its gate, with the bare work before every round."""
    if role == "torch" and not CUDA:
        pytest.skip("on a CPU the vectorised path is what imu_fast runs")
    benchmark.group = f"{suite.operation}, {problem}"
    if CUDA:
        torch.cuda.empty_cache()  # of the problem before, whose sizes fit nothing here
    if role == "naive":
        problem = suite.resized(problem, suite.few)
    with precision(problem.kind), use_backend("torch" if role == "torch" else "auto"):
        _time(benchmark, suite, problem, role)


def _time(benchmark, suite: Suite, problem: Problem, role: str) -> None:
    function = _function(suite, role)
    _gate(suite, problem, role, function)
    operands = suite.make(problem)
    bare = suite.bare(*operands)
    bare()
    calls, bare_times = suite.calls if CUDA else 1, []

    def setup():
        bare_times.append(seconds(bare))
        fresh = copied(operands) if suite.in_place else operands
        synchronize()
        return fresh, {}

    def timed(*args):
        for _ in range(calls):
            function(*args)
        synchronize()

    args, _ = setup()
    timed(*args)  # compiles, tunes, fills caches
    once = seconds(lambda: timed(*args)) + bare_times[-1]
    least, most = ROUNDS
    rounds = int(min(most, max(least, BUDGET / once)))
    if CUDA:
        args, _ = setup()
        benchmark.extra_info["peak_bytes"] = _peak(lambda: function(*args))
    bare_times.clear()
    benchmark.pedantic(timed, setup=setup, rounds=rounds, iterations=1)

    cost = suite.cost(problem.kind, **problem.sizes)
    floor = cost.seconds_on(ceilings()) if CUDA else min(bare_times)
    benchmark.extra_info.update(
        operation=suite.operation,
        role=role,
        shapes=problem.shapes,
        dtype=problem.kind,
        device=problem.device,
        samples=calls * suite.samples(problem.sizes),
        calls=calls,
        bytes=cost.bytes,
        flops=cost.flops,
        floor_s=calls * floor,
        floor="roofline" if CUDA else "bare",
        bare_s=min(bare_times),
    )
