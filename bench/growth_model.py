"""What scoring and an ascent run at a head take: counted FLOPs and bytes over measured rates.

FLOPs and bytes of the operations are the package's own counts (imu_fast/check/counts.py), and what
is chosen by size is chosen by the package's own functions: whether the signal ``delta`` is stored,
how many classes or tokens are dealt with at once. Here is only what one job does with them: which
operations, how often, which tensors live beside one another, and what processes exchange.

A job goes phase by phase, each bound by bytes or by FLOPs, and phases add up. Arithmetic is
float32, and float64 where the package takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from imu_fast.check import counts
from imu_fast.check.counts import Ceilings, Cost, cost_of
from imu_fast.curvature.ggn.costs import ASSUMED_ITERATIONS
from imu_fast.factors.gradient_factors import LOGITS_AT_ONCE
from imu_fast.factors.implicit_head import (
    IMPLICIT_BYTES,
    TOKENS,
    classes_at_once,
    is_kept,
    tokens_at_once,
)
from imu_fast.factors.source import MAX_GATHERED
from imu_fast.ops.fisher_diagonal import CHUNK_TOKENS
from imu_fast.ops.ggn_product import CHUNK_BYTES
from imu_fast.ops.linear_softmax import SLAB

METHODS = ("fisher_diag", "kfac", "ggn", "ascent")
# Features beyond a quarter of this stay in a file, as ``imu.capture(max_memory=)`` has it.
MAX_MEMORY = 3 << 29
EPOCHS, BATCH = 10, 256
# Columns of a product that is measured beside one of squares.
NARROW = 10
# Products in float64 that confirm a solve; more where float32 does not reach what is asked for.
_ROUNDS = 1
# Entries in float64 that K-FAC's sums convert at once.
_ELEMENTS = 1 << 18
# Of each token beside features and delta: label and offset (8 each), log-sum-exp, others, loss and
# score (4 each), and a few numbers that are made of offsets and dropped.
_KEPT_OF_A_TOKEN, _MADE_OF_A_TOKEN = 32, 24


@dataclass(frozen=True)
class Rates:
    """What this machine does, one thread, measured.

    Attributes:
        ceilings: bytes a second of a copy, FLOPs a second of products in "fp32" and "fp64",
            exponentials ("exp") and, counted as ``10 m^3``, eigendecompositions ("eigh").
        disk: bytes a second out of a mapped file that is in no cache.
        memory: bytes that a device has.
        link: bytes a second into and out of each device.
        fixed: seconds of a job with next to nothing to do, by method; "iteration" of conjugate
            gradient and "step" of an ascent, each.
        narrow: what share of the rate of "fp32" products with NARROW columns reach.
    """

    ceilings: Ceilings
    disk: float
    memory: float
    link: float
    fixed: dict[str, float]
    narrow: float = 1.0

    def for_classes(self, classes: int) -> Ceilings:
        """Each class costs its FLOPs at full speed, and a product what is lost beside the last."""
        known = self.ceilings
        lost = min(1.0, NARROW / classes) * (1 / self.narrow - 1)
        flops = {**known.flops_per_second, "fp32": known.flops_per_second["fp32"] / (1 + lost)}
        return Ceilings(known.bytes_per_second, flops)


@dataclass(frozen=True)
class Job:
    """n samples of one label at a head of d features with a bias, shared among devices."""

    method: str
    n: int
    classes: int
    d: int
    devices: int = 1

    @property
    def tokens(self) -> int:
        """Of one device: of an ascent all, as every process makes all steps."""
        return self.n if self.method == "ascent" else -(-self.n // self.devices)

    @property
    def width(self) -> int:
        return self.d + 1

    @property
    def features(self) -> int:
        """Bytes of one device's features."""
        return 4 * self.tokens * self.d

    @property
    def head(self) -> int:
        """Bytes of a matrix [C, D]."""
        return 4 * self.classes * self.width

    @property
    def mapped(self) -> bool:
        """Whether features stay in a file; ascent holds them in memory."""
        return self.method != "ascent" and 4 * self.features > MAX_MEMORY

    @property
    def implicit(self) -> bool:
        """Whether delta is made where it is needed."""
        return 4 * self.tokens * self.classes >= IMPLICIT_BYTES


@dataclass
class Estimate:
    """Of one device.

    Attributes:
        phases: one after the other. sweeps: how often all features are read.
        exchanged: bytes that each device sums over, or gets of, the others.
        units: iterations or steps, whose small operations take a time of their own.
        held: bytes that live to the end. made: bytes that live beside them, phase by phase.
        refused: why the package does not do it; then all else is empty.
    """

    phases: list[Cost] = field(default_factory=list)
    sweeps: float = 0
    exchanged: float = 0
    units: int = 0
    held: float = 0
    made: list[float] = field(default_factory=list)
    refused: str = ""

    @property
    def memory(self) -> float:
        """The most bytes at once."""
        return self.held + max(self.made, default=0)

    def add(self, *phases: Cost, times: float = 1) -> None:
        for one in phases:
            work = {kind: times * flops for kind, flops in one.work.items()}
            self.phases.append(Cost(times * one.bytes, work))


def seconds(job: Job, found: Estimate, rates: Rates, waits: bool = True) -> float:
    """Of the job.

    Args:
        waits: for a disk, which is read once where memory holds the file, else at each sweep.
    """
    ceilings = rates.for_classes(job.classes)
    total = sum(phase.seconds_on(ceilings) for phase in found.phases)
    total += rates.fixed[job.method]
    unit = {"ggn": "iteration", "ascent": "step"}.get(job.method)
    total += found.units * rates.fixed[unit] if unit else 0
    if job.mapped and waits:
        fits = job.features + found.memory < rates.memory
        total += (1 if fits else found.sweeps) * job.features / rates.disk
    if job.devices > 1:
        # Of a ring each device sends and gets 2 (w - 1) / w of what is summed; of a gathering
        # (w - 1) / w.
        both = 1 if job.method == "ascent" else 2
        total += both * (job.devices - 1) / job.devices * found.exchanged / rates.link
    return total


def _elementwise(entries: float, bytes_each: float, exponentials: float = 0) -> Cost:
    return cost_of(entries * bytes_each, exponentials, "exp")


def _wide(flops: float, moved: float = 0) -> Cost:
    return cost_of(moved, flops, "fp64")


def _signal(e: Estimate, job: Job, tokens: float, classes: int, times: float = 1) -> None:
    """delta of some classes made anew: a product, started from a bias, and exponentials."""
    entries = tokens * classes
    e.add(counts.residual("fp32", tokens, classes, job.d), times=times)
    # Bias and log-sum-exp written, exponentials in place, tiles put together.
    e.add(_elementwise(entries, 4 + 8 + 8, entries), times=times)


def _factors(e: Estimate, job: Job) -> None:
    """``GradientFactors.from_head``: features looked through, then delta, or one sweep for it."""
    n, c, d = job.tokens, job.classes, job.d
    e.add(cost_of(job.features + job.head, 0, "fp32"))
    e.sweeps += 2
    e.held += job.head + (0 if job.mapped else job.features) + _KEPT_OF_A_TOKEN * n
    e.made.append(_MADE_OF_A_TOKEN * n)
    if job.implicit:
        rows = min(n, TOKENS)
        e.add(counts.normaliser("fp32", n, c, d), cost_of(n / rows * job.head, 0, "fp32"))
        e.add(_elementwise(n * c, 4 + 8 + 8 + 4, n * c))
        e.made.append(4 * rows * min(c, SLAB) + _MADE_OF_A_TOKEN * n)
        return
    rows = min(n, LOGITS_AT_ONCE)
    e.add(counts.residual("fp32", n, c, d))
    # Softmax, the likeliest logit, the likeliest p, the label's entry, the sum, the copy, a look.
    e.add(_elementwise(n * c, 8 + 4 + 4 + 4 + 8 + 4, n * c))
    e.held += 4 * n * c
    e.made.append(8 * rows * c)


def _separate(e: Estimate, job: Job, passes: list[Callable[[float, int], Cost]]) -> None:
    """Passes over delta, of as many classes at a time as the package deals with."""
    n, c = job.tokens, job.classes
    if not job.implicit:
        for one in passes:
            e.add(one(n, c))
        e.sweeps += len(passes)
        return
    step = classes_at_once(n, c, job.width)
    pieces = -(-c // step)
    kept = pieces > 1 and is_kept(n, step)
    made = 1 if kept else len(passes)
    _signal(e, job, n, c, made)
    for one in passes:
        e.add(one(n, c))
    e.add(cost_of((pieces - 1) * (made + len(passes)) * job.features, 0, "fp32"))
    e.sweeps += pieces * (made + (len(passes) if kept else 0))


def _at_once(job: Job) -> tuple[float, float]:
    """Bytes of delta that exist at once where it is made anew, and of a matrix [classes, D]."""
    n, c = job.tokens, job.classes
    if not job.implicit:
        return 0, job.head
    step = classes_at_once(n, c, job.width)
    if step == c:
        return 4 * min(n, tokens_at_once(c)) * c, job.head
    return 4 * (n if is_kept(n, step) else min(n, TOKENS)) * step, 4 * step * job.width


def _chunks(tokens: int, entries: float) -> float:
    """Bytes of a chunk of tokens, while the one before still lives."""
    return 4 * min(tokens, 2 * CHUNK_TOKENS) * entries


def _mean_gradient(job: Job) -> Callable[[float, int], Cost]:
    return lambda n, c: counts.mean_gradient("fp32", n, c, job.d)


def _forms(job: Job) -> Callable[[float, int], Cost]:
    def cost(n: float, c: int) -> Cost:
        again = cost_of(4 * c * job.width * n / CHUNK_TOKENS, 0, "fp32")
        return counts.bilinear_scores("fp32", n, c, job.d) + again

    return cost


def _scores(e: Estimate, job: Job) -> None:
    """``<g_i, X>``: a product, and what is summed of it."""
    _separate(e, job, [_forms(job)])
    e.add(_elementwise(job.tokens * job.width, 4 + 12 + 4))


def fisher_diag(job: Job) -> Estimate:
    """Three products with delta; of a diagonal no class needs another."""
    e = Estimate(exchanged=2 * job.head)
    _factors(e, job)

    def squares(n: float, c: int) -> Cost:
        again = cost_of(8 * c * job.width * n / CHUNK_TOKENS, 0, "fp32")
        return counts.fisher_diagonal("fp32", n, c, job.d) + again

    _separate(e, job, [_mean_gradient(job), squares, _forms(job)])
    e.add(_elementwise(job.tokens * (job.classes + job.d), 8))
    e.add(_elementwise(job.tokens * job.width, 4 + 12 + 4))
    e.add(_elementwise(job.classes * job.width, 4 + 8 + 12))
    delta, matrix = _at_once(job)
    classes = matrix / (4 * job.width)
    e.made.append(delta + 2 * matrix + _chunks(job.tokens, max(classes + job.d, job.width)))
    return e


def _probabilities(e: Estimate, job: Job, times: float = 1) -> None:
    """p in float64 out of delta: converted, divided, cut off at zero, summed, normalised."""
    e.add(_elementwise(job.tokens * job.classes, 12 + 16 + 16 + 8 + 16), times=times)


def kfac(job: Job) -> Estimate:
    """Two second moments, their eigenvectors, and two products with each: in float64."""
    n, c, width = job.tokens, job.classes, job.width
    if 8 * c**2 > MAX_GATHERED:
        return Estimate(refused=f"C x C takes {8 * c**2 / 1e9:.0f} GB")
    e = Estimate(exchanged=job.head + 8 * (c**2 + width**2))
    _factors(e, job)
    delta, _ = _at_once(job)
    _separate(e, job, [_mean_gradient(job)])
    rows = min(n, tokens_at_once(c)) if job.implicit else n
    if job.implicit:
        _signal(e, job, n, c)
    _probabilities(e, job)
    e.sweeps += 1
    # p, weighted; its diagonal by the sum of the others; the features, converted and weighted.
    e.add(_elementwise(n * c, 16 + 8 + 16 + 8 + 8 + 24), _wide(2 * n * c**2, 8 * n * c))
    e.add(_elementwise(n * width, 12 + 16 + 16), _wide(2 * n * width**2, 8 * n * width))
    e.add(cost_of(0, 10 * (c**3 + width**3), "eigh"))
    e.add(_wide(2 * 4 * c * width * (c + width), 8 * 20 * c * width))
    _scores(e, job)
    moments, spectrum = 8 * (c**2 + width**2), 8 * (c**2 + width**2 + c * width)
    own = 4 * rows * c if job.implicit else 0
    pieces = [8 * min(rows * k, _ELEMENTS) for k in (c, width)]
    e.held += job.head
    e.made += [
        own + 16 * rows * c,
        own + 8 * rows * c + 3 * pieces[0] + moments,
        own + 2 * pieces[1] + moments,
        # LAPACK's divide and conquer: the matrix, its vectors, and two of workspace.
        moments + 8 * 3 * max(c, width) ** 2,
        spectrum + 8 * 4 * c * width,
        4 * c * width + delta + _chunks(n, width),
    ]
    return e


def ggn(job: Job, iterations: int = ASSUMED_ITERATIONS) -> Estimate:
    """Conjugate gradient without a preconditioner, refined in float64."""
    n, c, d, size = job.tokens, job.classes, job.d, job.classes * job.width
    e = Estimate(units=iterations)
    e.exchanged = job.head + iterations * job.head + _ROUNDS * 8 * size
    _factors(e, job)
    delta, _ = _at_once(job)
    _separate(e, job, [_mean_gradient(job)])
    products = iterations + _ROUNDS
    rows = min(n, tokens_at_once(c)) if job.implicit else n
    chunks = n / rows
    if job.implicit:
        _signal(e, job, n, c, products)
        # The weight for each chunk's delta; V, and what is made, for each product of some tokens.
        e.add(cost_of(chunks * job.head, 0, "fp32"), times=products)
    made = products if job.implicit and chunks > 1 else 1
    _probabilities(e, job, made)
    e.add(_elementwise(n * c, 8 + 12 + 8), times=made)  # in float32, class by class; the likeliest
    e.sweeps += products * (2 if job.implicit else 1)
    pieces = n / max(1, min(rows, CHUNK_BYTES // (4 * max(c, d))))
    vectors = counts.conjugate_gradient("fp32", c, d)
    again = cost_of(pieces * 3 * job.head, 0, "fp32")
    # u, relative to the likeliest class, times p, less its mean, times the scale.
    between = _elementwise(n * c, 4 + 8 + 12 + 4 + 12 + 8)
    e.add(counts.ggn_product("fp32", n, c, d), again, between, vectors, times=iterations)
    both = _wide(4 * n * size, 8 * n * (c + d) + 2 * pieces * 3 * 8 * size)
    e.add(both, between, between, _elementwise(n * d, 12), times=_ROUNDS)
    e.add(_elementwise(size, 8 * 20), times=_ROUNDS)
    _scores(e, job)
    p, own = 12 * rows * c + 12 * rows, 4 * rows * c if job.implicit else 0
    # Of the chunk before, until this one's are made: delta, and p in float32.
    before = 8 * rows * c if rows < n else 0
    narrow, wide = (min(rows, CHUNK_BYTES // (k * max(c, d))) for k in (4, 8))
    alive = 2 if rows > narrow else 1  # what the chunk before was, until it is replaced
    e.held += job.head
    e.made += [
        before + own + 16 * rows * c,
        # Of refinement v, x, the residual and its copy, float64; of the iteration r, x, its result,
        # the direction and its product, float32.
        own + p + (4 * 8 + 6 * 4) * size + 4 * narrow * c * alive,
        own + p + 6 * 8 * size + 8 * wide * (c + d) * alive,
        delta + 4 * size + _chunks(n, job.width),
    ]
    return e


def ascent(job: Job) -> Estimate:
    """EPOCHS of plain ascent by SGD in batches of BATCH, measured before, after each, and at the
    end by the model itself; features captured once."""
    n, c, d, size = job.n, job.classes, job.d, job.classes * job.width
    batch = min(n, BATCH)
    batches = -(-n // batch)
    e = Estimate(units=EPOCHS * batches, exchanged=job.features)
    logits = counts.residual("fp32", n, c, d)
    row_losses = _elementwise(n * c, 4 + 8 + 4, n * c)
    again = cost_of(n / BATCH * job.head, 0, "fp32")
    # Captured: the model's own forward pass, and features put together.
    e.add(logits, again, _elementwise(n * d, 8))
    e.add(logits, row_losses, times=EPOCHS + 3)
    step = counts.head_ascent("fp32", batch, c, d)
    # theta and what is added to it, several passes; a batch copied; logits to residual.
    between = _elementwise(batch * c, 8 + 4 + 4 + 4 + 8 + 4, batch * c)
    moved = _elementwise(size, 3 * 12 + 8), _elementwise(batch * d, 8)
    e.add(step, between, *moved, times=EPOCHS * batches)
    # Given, and captured, batch by batch before they are put together.
    e.held += 2 * job.features + 16 * n
    # The head, as it was (twice), trained, its momentum, its gradient and what is added to that.
    e.made += [job.features + job.head, 7 * job.head + 8 * min(n, 4096) * c]
    return e


ESTIMATES: dict[str, Callable[[Job], Estimate]] = {
    "fisher_diag": fisher_diag,
    "kfac": kfac,
    "ggn": ggn,
    "ascent": ascent,
}


def estimate(job: Job, iterations: int | None = None) -> Estimate:
    """What the job takes; ``iterations`` of conjugate gradient, where they are known."""
    if job.method == "ggn" and iterations is not None:
        return ggn(job, iterations)
    return ESTIMATES[job.method](job)
