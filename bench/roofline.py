"""Predicted time of every kernel on an H200, from counted bytes and FLOPs: ``make roofline``.

A prediction is ``max(bytes / bandwidth, FLOPs / rate)``: what the card's limits allow, not what a
kernel reached. A run on a GPU confirms or refutes it. Bytes are those that must move between memory
and the chip: each operand once, each result once; tiles that are read again come from L2.
"""

from __future__ import annotations

from dataclasses import dataclass

SIZE = {"bf16": 2, "tf32": 4, "fp32": 4}


@dataclass(frozen=True)
class Ceilings:
    """What a device can do: bytes and, per arithmetic, FLOPs of a matrix product, per second."""

    bytes_per_second: float
    flops_per_second: dict[str, float]


# Measured: device copy (read plus written), bf16 matrix product on random data. Assumed from the
# data sheet's ratios: TF32 at half the bf16 rate, float32 at 67 TFLOP/s.
H200 = Ceilings(4.3e12, {"bf16": 790e12, "tf32": 395e12, "fp32": 67e12})


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

    @property
    def seconds(self) -> float:
        """On an H200."""
        return self.seconds_on(H200)

    @property
    def bound(self) -> str:
        moving, computing = self._seconds(H200)
        return "bytes" if moving > computing else "FLOPs"


def cost_of(moved: float, flops: float, kind: str) -> Cost:
    """Bytes, and FLOPs in the arithmetic ``kind``: "bf16", "tf32" or "fp32"."""
    return Cost(moved, {kind: flops})


# N tokens, n samples, C classes, d features, D = d + 1, m vectors; outputs are float32.
def softmax_residual(kind: str, N: int, C: int) -> Cost:
    """z read, delta written; labels, scale and loss per row. An exp counts as one FLOP, twice."""
    return cost_of(N * C * (SIZE[kind] + 4) + 16 * N, 8 * N * C, "fp32")


def fisher_diagonal(kind: str, N: int, C: int, d: int, n: int | None = None) -> Cost:
    """One product; with n ragged samples, also a square and a sum per sample and entry."""
    flops = 2 * N * C * (d + 1) + (0 if n is None else 2 * n * C * (d + 1))
    return cost_of(N * (C + d) * SIZE[kind] + 4 * C * (d + 1), flops, kind)


def mean_gradient(kind: str, N: int, C: int, d: int) -> Cost:
    """The matrix product that is torch's own."""
    return cost_of(N * (C + d) * SIZE[kind] + 4 * C * (d + 1), 2 * N * C * (d + 1), kind)


def bilinear_scores(kind: str, N: int, C: int, d: int, m: int = 1, block_k: int = 128) -> Cost:
    """One product per X; partial scores written and read once per tile of columns."""
    tiles = -(-(d + 1) // block_k)
    moved = (N * (C + d) + m * C * (d + 1)) * SIZE[kind] + 8 * m * N * tiles
    return cost_of(moved, 2 * m * N * C * (d + 1), kind)


def gram(kind: str, N: int, C: int, d: int, n: int | None = None) -> Cost:
    """Both Gram matrices of the N tokens, lower half; K [n, n] written whole."""
    n = N if n is None else n
    return cost_of(N * (C + d) * SIZE[kind] + 4 * n * n, N * (N + 1) * (C + d), kind)


def ggn_product(kind: str, N: int, C: int, d: int, m: int = 1) -> Cost:
    """Two products per V; p and act read by both stages, p*u in L2."""
    moved = 2 * N * (C + d) * SIZE[kind] + 2 * m * C * (d + 1) * 4
    return cost_of(moved, 4 * m * N * C * (d + 1), kind)


def conjugate_gradient(kind: str, C: int, d: int, m: int = 1, preconditioned: int = 0) -> Cost:
    """An iteration's vectors, without products: p.Mp, then x, r and p; r.z if preconditioned."""
    entries = m * C * (d + 1)
    dots = 2 + preconditioned
    return cost_of((8 + 24 + 12 + 8 * preconditioned) * entries, (2 * dots + 6) * entries, kind)


def head_ascent(kind: str, N: int, C: int, d: int) -> Cost:
    """A step on N samples: the logits' product, the residual, and the gradient with its update.

    theta is read for the logits, theta and its momentum read and written at the end; logits and
    delta stay in L2. Half-precision features are multiplied in TF32.
    """
    products = 4 * N * C * (d + 1)
    moved = 2 * N * d * SIZE[kind] + 5 * 4 * C * (d + 1)
    update = cost_of(0, 9 * C * (d + 1) + 10 * N * C, "fp32")
    return cost_of(moved, products, "fp32" if kind == "fp32" else "tf32") + update


def normaliser(kind: str, N: int, C: int, d: int) -> Cost:
    """linear_softmax's first sweep: one product whose result stays in tiles."""
    return cost_of((N + C) * d * SIZE[kind] + 24 * N, 2 * N * C * d, kind)


def residual(kind: str, N: int, C: int, d: int) -> Cost:
    """linear_softmax's second sweep: the product again, delta written in float32."""
    return cost_of((N + C) * d * SIZE[kind] + 4 * N * C, 2 * N * C * d, kind)


def linear_softmax_scores(kind: str, N: int, C: int, d: int, slab: int = 4096) -> Cost:
    """Both sweeps in ``kind``; three products on each slab of delta, which is float32: in TF32."""
    slabs, wide = -(-C // slab), "fp32" if kind == "fp32" else "tf32"
    moved = 4 * slabs * (3 * N * slab + 3 * N * d + 3 * slab * (d + 1))
    products = cost_of(moved, 6 * N * C * (d + 1), wide)
    return normaliser(kind, N, C, d) + residual(kind, N, C, d) + products


def scoring(kind: str, N: int, C: int, d: int) -> Cost:
    """Scores of images from factors under the diagonal Fisher: three products."""
    return (fisher_diagonal(kind, N, C, d) + mean_gradient(kind, N, C, d)) + bilinear_scores(
        kind, N, C, d
    )


IMAGES = {"N": 50_000, "C": 1_000, "d": 2_048}
TOKENS = {"N": 32_768, "C": 1_000, "d": 1_024}
PROBLEMS = [
    (softmax_residual, "bf16", {"N": 50_000, "C": 1_000}),
    (softmax_residual, "bf16", {"N": 4_096, "C": 128_256}),
    (fisher_diagonal, "bf16", IMAGES),
    (fisher_diagonal, "tf32", IMAGES),
    (fisher_diagonal, "fp32", IMAGES),
    (fisher_diagonal, "bf16", {**TOKENS, "n": 512}),
    (bilinear_scores, "bf16", IMAGES),
    (bilinear_scores, "tf32", IMAGES),
    (bilinear_scores, "fp32", IMAGES),
    (bilinear_scores, "bf16", {**IMAGES, "m": 8}),
    (gram, "bf16", {"N": 16_384, "C": 1_000, "d": 2_048}),
    (gram, "bf16", {**TOKENS, "n": 512}),
    (ggn_product, "tf32", IMAGES),
    (ggn_product, "fp32", IMAGES),
    (ggn_product, "tf32", {**IMAGES, "m": 8}),
    (conjugate_gradient, "fp32", {"C": 1_000, "d": 2_048}),
    (conjugate_gradient, "fp32", {"C": 1_000, "d": 2_048, "m": 8, "preconditioned": 1}),
    (head_ascent, "tf32", {"N": 256, "C": 1_000, "d": 2_048}),
    (head_ascent, "fp32", {"N": 256, "C": 1_000, "d": 2_048}),
    (head_ascent, "bf16", {"N": 4_096, "C": 1_000, "d": 2_048}),
    (scoring, "bf16", IMAGES),
    (normaliser, "bf16", {"N": 8_192, "C": 128_256, "d": 4_096}),
    (residual, "bf16", {"N": 8_192, "C": 4_096, "d": 4_096}),
    (linear_softmax_scores, "bf16", {"N": 8_192, "C": 128_256, "d": 4_096}),
    (linear_softmax_scores, "tf32", {"N": 8_192, "C": 128_256, "d": 4_096}),
]


def table() -> list[list[str]]:
    """One row per kernel and problem: sizes, arithmetic, GB, TFLOP, bound, predicted ms."""
    rows = []
    for count, kind, sizes in PROBLEMS:
        cost = count(kind, **sizes)
        shape = " ".join(f"{name}={size:,}" for name, size in sizes.items())
        amounts = f"{cost.bytes / 1e9:.3f}", f"{cost.flops / 1e12:.3f}"
        rows.append(
            [count.__name__, kind, shape, *amounts, cost.bound, f"{1e3 * cost.seconds:.3f}"]
        )
    return rows


def main() -> None:
    from tabulate import tabulate

    print("Predicted, not measured: the roofline of an H200 (4.3 TB/s, 790 TFLOP/s bf16).")
    names = ["kernel", "dots in", "sizes", "GB", "TFLOP", "bound by", "ms"]
    print(tabulate(table(), names, disable_numparse=True, colalign=("left",) * 3))


if __name__ == "__main__":
    main()
