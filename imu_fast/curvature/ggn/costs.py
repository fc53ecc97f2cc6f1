"""What the GGN's solvers cost, and which is chosen."""

from __future__ import annotations

import math

# Beyond this order the dense matrix is not an option: 8,192^2 float64 is 537 MB.
MAX_DENSE_ORDER = 8192
# What conjugate gradient is assumed to take at a stiffness of _USUAL, and how it grows: fitted to
# 50 heads of bench/solver_choice.py (theory has at most the square root; eigenvalues fall fast).
ASSUMED_ITERATIONS = 60
_USUAL, _GROWTH = 1e4, 0.2
# With K-FAC, however stiff; and without, before it is made.
_KFAC_ITERATIONS, _FIRST_ITERATIONS = 40, 8
# Products that the eigendecompositions of K-FAC may take the time of: an ill-conditioned system
# takes hundreds, and for several right-hand sides each as many.
_AFFORDABLE = 300
# FLOPs that the dozens of small operations of an iteration take the time of: some 0.15 ms.
_ITERATION = 4_000_000


def dense_orders(
    tokens: int, classes: int, width: int, form: str = "softmax"
) -> dict[str, tuple[int, int]]:
    """How many blocks each dense matrix has, and of which order.

    Of a softmax the GGN has rank at most C - 1 over the classes; where outputs do not meet in the
    loss ("diagonal") it falls into one block for each.
    """
    if form == "diagonal":
        return {"primal": (classes, width), "dual": (classes, tokens)}
    rank = classes - 1 if form == "softmax" else classes
    return {"primal": (1, rank * width), "dual": (1, tokens * classes)}


def assumed_iterations(stiffness: float) -> float:
    """Of conjugate gradient without a preconditioner; stiffness: trace of M, undamped, over lam.

    It bounds the condition: ``1 + largest eigenvalue / lam``.
    """
    return max(1.0, ASSUMED_ITERATIONS * (stiffness / _USUAL) ** _GROWTH)


def solver_costs(
    tokens: int,
    classes: int,
    width: int,
    solves: int = 1,
    form: str = "softmax",
    stiffness: float = _USUAL,
) -> dict[str, float]:
    """FLOPs of each exact solver; what cannot be held (MAX_DENSE_ORDER) is left out.

    ``primal``: k blocks of order P (one of (C - 1) D for a softmax), building takes ``N k P^2`` (at
    half the rate of a plain matrix product, so twice that is counted), factoring ``k P^3 / 3`` and
    each solve ``2 k P^2``. ``dual``: k blocks of order Q (one of N C for a softmax), building takes
    ``2 C k Q^2``, factoring ``k Q^3 / 3`` and each solve ``2 k Q^2`` and two products of
    ``2 N C D``. ``cg``: each solve takes :func:`assumed_iterations` of a product of ``4 N C D``,
    and all in step the time of ``_ITERATION`` FLOPs for small operations; or some of these, K-FAC,
    and the iterations that it leaves, where it is an option and that is less.
    """
    product = 4 * tokens * classes * width
    iterations, each = assumed_iterations(stiffness), solves * product + _ITERATION
    costs = {"cg": iterations * each}
    if choose_preconditioner(tokens, classes, width) == "kfac":
        applied = solves * product * kfac_applied(tokens, classes, width) + _ITERATION
        made = _FIRST_ITERATIONS * each + product * kfac_cost(tokens, classes, width)
        costs["cg"] = min(costs["cg"], made + min(iterations, _KFAC_ITERATIONS) * applied)
    orders = dense_orders(tokens, classes, width, form)
    for solver, (blocks, order) in orders.items():
        held = blocks * order**2
        if held > MAX_DENSE_ORDER**2:
            continue
        build = 2 * tokens if solver == "primal" else 2 * classes
        back = 0 if solver == "primal" else product
        costs[solver] = build * held + held * order / 3 + solves * (2 * held + back)
    return costs


def dense_instead(
    tokens: int, classes: int, width: int, solves: int = 1, form: str = "softmax"
) -> tuple[str, float]:
    """The cheapest dense solver, and how many iterations of conjugate gradient take its time.

    Where none can be held: ``"cg"``, and infinitely many.
    """
    costs = solver_costs(tokens, classes, width, solves, form)
    del costs["cg"]
    if not costs:
        return "cg", math.inf
    best = min(costs, key=lambda name: costs[name])
    return best, costs[best] / (solves * 4 * tokens * classes * width + _ITERATION)


def choose_solver(
    tokens: int,
    classes: int,
    width: int,
    solves: int = 1,
    *,
    dual: bool = True,
    form: str = "softmax",
    stiffness: float = _USUAL,
) -> str:
    """The cheapest of :func:`solver_costs`; without ``dual`` that is left out."""
    costs = solver_costs(tokens, classes, width, solves, form, stiffness)
    if not dual:
        costs.pop("dual", None)
    return min(costs, key=lambda name: costs[name])


def choose_preconditioner(tokens: int, classes: int, width: int) -> str:
    """``"kfac"`` where it costs little beside the products it saves, else ``"none"``.

    Of fewer samples than features it saves next to none: its second moment has no full rank then.
    Its two eigendecompositions take about ``10 (C^3 + D^3)`` FLOPs, which must not exceed
    ``_AFFORDABLE`` products of ``4 N C D``. This only allows it: conjugate gradient begins without,
    and the rate of its first iterations says whether K-FAC is made (:func:`kfac_applied`). What it
    saves is measured in bench/preconditioners.py.
    """
    product = 4 * tokens * classes * width
    affordable = 10 * (classes**3 + width**3) <= _AFFORDABLE * product
    return "kfac" if affordable and tokens >= width else "none"


def kfac_applied(tokens: int, classes: int, width: int) -> float:
    """What an iteration with K-FAC costs, in GGN products: ``4 (C + D) C D`` FLOPs beside it."""
    return 1 + (classes + width) / tokens


def kfac_cost(tokens: int, classes: int, width: int) -> int:
    """What making K-FAC costs, in GGN products, both in float32.

    Its factors take ``2 N (C^2 + D^2)`` FLOPs and its eigendecompositions about ``10 (C^3 + D^3)``
    (of 2,000 tokens 9 by this count and 7 measured at C=10, D=129; 6 and 7 at C=100, D=513).
    """
    flops = 2 * tokens * (classes**2 + width**2) + 10 * (classes**3 + width**3)
    return flops // (4 * tokens * classes * width)
