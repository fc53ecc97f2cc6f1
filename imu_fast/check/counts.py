"""Bytes and FLOPs that every operation must spend, and the time that a device allows for them.

Bytes are those that must move between memory and the chip: each operand once, each result once;
tiles that are read again come from a cache. ``kind`` is the arithmetic of the matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

SIZE = {"fp16": 2, "bf16": 2, "tf32": 4, "fp32": 4, "fp64": 8}
# Of a result: half precision gives float32.
OUT = {kind: max(4, size) for kind, size in SIZE.items()}


@dataclass(frozen=True)
class Ceilings:
    """What a device can do: bytes and, per arithmetic, FLOPs of a matrix product, per second."""

    bytes_per_second: float
    flops_per_second: dict[str, float]


@dataclass(frozen=True)
class Cost:
    """What one launch must do: bytes to move, and FLOPs by the arithmetic they are done in."""

    bytes: float
    work: dict[str, float]

    def __add__(self, other: Cost) -> Cost:
        kinds = {**self.work, **other.work}
        work = {kind: self.work.get(kind, 0) + other.work.get(kind, 0) for kind in kinds}
        return Cost(self.bytes + other.bytes, work)

    @property
    def flops(self) -> float:
        return sum(self.work.values())

    def _seconds(self, device: Ceilings) -> tuple[float, float]:
        """What the bytes alone take, and the FLOPs alone."""
        compute = sum(flops / device.flops_per_second[kind] for kind, flops in self.work.items())
        return self.bytes / device.bytes_per_second, compute

    def seconds_on(self, device: Ceilings) -> float:
        """The roofline's bound on the time of one launch."""
        return max(self._seconds(device))

    def bound_on(self, device: Ceilings) -> str:
        """Which of the two it is: "bytes" or "FLOPs"."""
        moving, computing = self._seconds(device)
        return "bytes" if moving > computing else "FLOPs"


def cost_of(moved: float, flops: float, kind: str) -> Cost:
    """Bytes, and FLOPs in the arithmetic ``kind``, a key of SIZE."""
    return Cost(moved, {kind: flops})


# N tokens, n samples, C classes, d features, D = d + 1, m vectors; outputs as OUT has them.
def softmax_residual(kind: str, N: int, C: int) -> Cost:
    """z read, delta written; labels, scale and loss per row. An exp counts as one FLOP, twice."""
    arithmetic = "fp64" if kind == "fp64" else "fp32"
    return cost_of(N * C * (SIZE[kind] + OUT[kind]) + 16 * N, 8 * N * C, arithmetic)


def fisher_diagonal(kind: str, N: int, C: int, d: int, n: int | None = None) -> Cost:
    """One product; with n ragged samples, also a square and a sum per sample and entry."""
    flops = 2 * N * C * (d + 1) + (0 if n is None else 2 * n * C * (d + 1))
    return cost_of(N * (C + d) * SIZE[kind] + OUT[kind] * C * (d + 1), flops, kind)


def mean_gradient(kind: str, N: int, C: int, d: int) -> Cost:
    """The matrix product that is torch's own."""
    return cost_of(N * (C + d) * SIZE[kind] + OUT[kind] * C * (d + 1), 2 * N * C * (d + 1), kind)


def bilinear_scores(kind: str, N: int, C: int, d: int, m: int = 1, block_k: int = 128) -> Cost:
    """One product per X; partial scores written and read once per tile of columns."""
    tiles = -(-(d + 1) // block_k)
    moved = (N * (C + d) + m * C * (d + 1)) * SIZE[kind] + 2 * OUT[kind] * m * N * tiles
    return cost_of(moved, 2 * m * N * C * (d + 1), kind)


def gram(kind: str, N: int, C: int, d: int, n: int | None = None) -> Cost:
    """Both Gram matrices of the N tokens, lower half; K [n, n] written whole."""
    n = N if n is None else n
    return cost_of(N * (C + d) * SIZE[kind] + OUT[kind] * n * n, N * (N + 1) * (C + d), kind)


def ggn_product(kind: str, N: int, C: int, d: int, m: int = 1) -> Cost:
    """Two products per V; p and act read by both stages, p*u in L2."""
    moved = 2 * N * (C + d) * SIZE[kind] + 2 * m * C * (d + 1) * OUT[kind]
    return cost_of(moved, 4 * m * N * C * (d + 1), kind)


def conjugate_gradient(kind: str, C: int, d: int, m: int = 1, preconditioned: int = 0) -> Cost:
    """An iteration's vectors, without products: p.Mp, then x, r and p; r.z if preconditioned."""
    entries = m * C * (d + 1)
    dots = 2 + preconditioned
    moved = (2 + 6 + 3 + 2 * preconditioned) * OUT[kind] * entries
    return cost_of(moved, (2 * dots + 6) * entries, kind)


def head_ascent(kind: str, N: int, C: int, d: int) -> Cost:
    """A step on N samples: the logits' product, the residual, and the gradient with its update.

    theta is read for the logits, theta and its momentum read and written at the end; logits and
    delta stay in L2. Half-precision features are multiplied in TF32.
    """
    products = 4 * N * C * (d + 1)
    moved = 2 * N * d * SIZE[kind] + 5 * OUT[kind] * C * (d + 1)
    update = cost_of(0, 9 * C * (d + 1) + 10 * N * C, "fp64" if kind == "fp64" else "fp32")
    return cost_of(moved, products, kind if kind in ("fp32", "fp64") else "tf32") + update


def normaliser(kind: str, N: int, C: int, d: int) -> Cost:
    """linear_softmax's first sweep: one product whose result stays in tiles."""
    return cost_of((N + C) * d * SIZE[kind] + (3 * OUT[kind] + 12) * N, 2 * N * C * d, kind)


def residual(kind: str, N: int, C: int, d: int) -> Cost:
    """linear_softmax's second sweep: the product again, delta written in float32."""
    return cost_of((N + C) * d * SIZE[kind] + OUT[kind] * N * C, 2 * N * C * d, kind)


def linear_softmax_scores(kind: str, N: int, C: int, d: int, slab: int = 4096) -> Cost:
    """Both sweeps and three products on each slab of delta, which is float32, as features are not.

    Of half precision the mean gradient's, which is torch's own product, is in TF32.
    """
    slabs, torchs = -(-C // slab), "tf32" if SIZE[kind] == 2 else kind
    moved = slabs * (4 * (3 * N * slab + 3 * slab * (d + 1)) + 3 * N * d * SIZE[kind])
    products = cost_of(moved, 4 * N * C * (d + 1), kind) + cost_of(0, 2 * N * C * (d + 1), torchs)
    return normaliser(kind, N, C, d) + residual(kind, N, C, d) + products


def scoring(kind: str, N: int, C: int, d: int) -> Cost:
    """Scores of images from factors under the diagonal Fisher: three products."""
    return (fisher_diagonal(kind, N, C, d) + mean_gradient(kind, N, C, d)) + bilinear_scores(
        kind, N, C, d
    )


def gradient_norms(kind: str, N: int, C: int, d: int) -> Cost:
    """Both operands read once; a square and a sum of each entry."""
    return cost_of(N * (C + d) * SIZE[kind] + OUT[kind] * N, 2 * N * (C + d), kind)


def cross_gram(kind: str, N: int, C: int, d: int) -> Cost:
    """Two sets of N samples: both products in full."""
    moved = 2 * N * (C + d) * SIZE[kind] + OUT[kind] * N * N
    return cost_of(moved, 2 * N * N * (C + d), kind)


def objective(kind: str, N: int, C: int) -> Cost:
    """z read, a number per row written. An exp counts as one FLOP."""
    return cost_of(N * C * SIZE[kind] + 16 * N, 4 * N * C, kind)


def head_ascent_gradient(kind: str, N: int, C: int, d: int) -> Cost:
    """The logits' product and the gradient's; logits and delta stay in a cache."""
    moved = 2 * N * d * SIZE[kind] + 2 * OUT[kind] * C * (d + 1)
    products = 4 * N * C * (d + 1)
    return cost_of(moved, products, kind if kind in ("fp32", "fp64") else "tf32")


def damped_cholesky_solve(kind: str, P: int, m: int) -> Cost:
    """A triangle read, m columns read and written; a factor, and two triangular solves."""
    moved = SIZE[kind] * (P * P / 2 + 2 * P * m)
    return cost_of(moved, P**3 / 3 + 2 * P * P * m, kind)
