"""Means, spreads and paired tests over repeated runs: is a method better, or was it the seed?

A row is one run, a dict with ``arch``, ``seed``, ``task``, ``depth``, ``method`` and numeric
metrics. A metric that is None, NaN or infinite is missing: that run did not reach the depth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from imu_fast.errors import InputError, check_choice, check_installed, check_positive

Row = Mapping[str, Any]
_KEYS = ("arch", "seed", "task", "depth", "method")
_ALTERNATIVES = ("two-sided", "greater", "less")
# What runs may share, and where in (arch, seed) it stands.
_CLUSTERS = {"arch": 0, "seed": 1}
# How far apart numbers may be that are equal but for rounding, of the largest of them. scipy's sign
# flips take the same of their observed mean.
_ROUNDING = 100 * np.finfo(np.float64).eps
# Sign flips that are tried; fewer than this many are all tried.
_FLIPS = 9999


def _checked(given: Iterable[Row], metrics: Iterable[str]) -> list[Row]:
    """The rows, read once.

    Raises:
        InputError: a row does not name a run of its own, or what it has of a metric is no number;
            or no row has one.
    """
    rows = list(given)
    seen = set()
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InputError(f"rows[{i}] is a {type(row).__name__}; pass dicts, one for each run")
        lacking = [key for key in _KEYS if key not in row]
        if lacking:
            raise InputError(f"rows[{i}] has no {', '.join(lacking)}; a row needs {_KEYS}")
        run = tuple(row[key] for key in _KEYS)
        if run in seen:
            raise InputError(f"rows[{i}] repeats the run {run}; pass each run once")
        seen.add(run)
    for metric in metrics:
        if not any(metric in row for row in rows):
            raise InputError(f"metric {metric!r} is in no row; pass rows that have it")
        for i, row in enumerate(rows):
            if not _is_number_or_none(row.get(metric)):
                raise InputError(
                    f"rows[{i}][{metric!r}]={row[metric]!r} is no number; pass float(...) of it, "
                    "or None where the run has none"
                )
    return rows


def _is_number_or_none(value: Any) -> bool:
    if value is None or isinstance(value, str | bytes | complex | np.complexfloating):
        return value is None
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError):  # of tensors
        return False
    return True


def _value(row: Row, metric: str) -> float | None:
    """The row's metric, or None if it is missing."""
    value = row.get(metric)
    return float(value) if value is not None and math.isfinite(value) else None


def _groups(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of these keys, in the order of first appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def summary(rows: Iterable[Row], metrics: Iterable[str]) -> list[dict[str, Any]]:
    """Mean and standard deviation of each method over all architectures and seeds.

    Returns:
        For each (task, depth, method), in order of first appearance: ``n`` runs, and for each
        metric ``<metric>_n`` runs that have it, ``<metric>_mean`` over these (NaN if none) and
        ``<metric>_std`` (ddof 1; NaN for fewer than two).

    Raises:
        InputError: a row lacks a key or repeats a run, or no row has a metric.
    """
    metrics = list(metrics)
    rows = _checked(rows, metrics)
    table = []
    for (task, depth, method), group in _groups(rows, "task", "depth", "method").items():
        line = {"task": task, "depth": depth, "method": method, "n": len(group)}
        for metric in metrics:
            values = [v for row in group if (v := _value(row, metric)) is not None]
            line[f"{metric}_n"] = len(values)
            line[f"{metric}_mean"] = float(np.mean(values)) if values else math.nan
            line[f"{metric}_std"] = float(np.std(values, ddof=1)) if values[1:] else math.nan
        table.append(line)
    return table


@dataclass(frozen=True)
class _Pairs:
    """A method and a baseline on the same runs, [k] each: a number a cluster of them."""

    task: str
    depth: Any
    method: str
    ours: np.ndarray
    theirs: np.ndarray
    runs: int

    @property
    def scale(self) -> float:
        """The largest number, which says how large rounding is."""
        return float(np.abs([self.ours, self.theirs]).max(initial=0.0))

    @property
    def differences(self) -> np.ndarray:
        """Of which those that are equal but for rounding are equal: 0.49 - 0.46, 0.67 - 0.64."""
        return _tied(self.ours - self.theirs, _ROUNDING * self.scale)

    def described(self) -> dict[str, Any]:
        """What every test says of them."""
        k = len(self.ours)
        mean, base = (float(x.mean()) if k else math.nan for x in (self.ours, self.theirs))
        return {
            "task": self.task,
            "depth": self.depth,
            "method": self.method,
            "n_pairs": self.runs,
            "n_clusters": k,
            "mean": mean,
            "baseline_mean": base,
            "difference": mean - base,
        }


def _pairs(rows: Iterable[Row], metric: str, baseline: str, cluster: str | None) -> list[_Pairs]:
    """Runs that both a method and the baseline have, averaged within each cluster."""
    rows = _checked(rows, [metric])
    check_choice("baseline", baseline, dict.fromkeys(row["method"] for row in rows))
    if cluster is not None:
        check_choice("cluster", cluster, _CLUSTERS)
    found = []
    for (task, depth), group in _groups(rows, "task", "depth").items():
        runs = {
            method: {
                (r["arch"], r["seed"]): v for r in of_method if (v := _value(r, metric)) is not None
            }
            for (method,), of_method in _groups(group, "method").items()
        }
        base = runs.pop(baseline, {})
        for method, values in runs.items():
            both = [run for run in values if run in base]
            clusters: dict[Any, list[tuple[str, Any]]] = {}
            for run in both:
                clusters.setdefault(run if cluster is None else run[_CLUSTERS[cluster]], []).append(
                    run
                )
            ours, theirs = (
                np.array([np.mean([of[run] for run in those]) for those in clusters.values()])
                for of in (values, base)
            )
            found.append(_Pairs(task, depth, method, ours, theirs, len(both)))
    return found


def _tied(values: np.ndarray, slack: float) -> np.ndarray:
    """Values of which neighbours in size that are no further apart than slack have one size."""
    order = np.argsort(np.abs(values))
    sizes = np.abs(values)[order]
    first = np.diff(sizes, prepend=0.0) > slack
    tied = np.concatenate([[0.0], sizes[first]])[np.cumsum(first)]
    out = np.empty_like(values)
    out[order] = np.copysign(tied, values[order])
    return out


def t_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of [k] values; NaN for fewer than two.

    Args:
        values: [k], an array; a list or a tensor will do.

    Raises:
        InputError: a level outside (0, 1).
    """
    check_installed("t_interval()", "scipy")
    if not 0 < check_positive("level", level) < 1:
        raise InputError(f"level={level!r} must lie in (0, 1), such as 0.95")
    from scipy.stats import t

    values = np.asarray(values, dtype=np.float64)
    k = len(values)
    if k < 2:
        return math.nan, math.nan
    half = float(t.ppf((1 + level) / 2, k - 1)) * float(np.std(values, ddof=1)) / math.sqrt(k)
    return float(values.mean()) - half, float(values.mean()) + half


def intervals(
    rows: Iterable[Row], metric: str, *, cluster: str | None = None, level: float = 0.95
) -> list[dict[str, Any]]:
    """Mean of each method and Student's interval of it.

    Args:
        cluster: ``"seed"`` or ``"arch"``: runs that share it are averaged first, and the interval
            is over these means. None: every run is independent.

    Returns:
        For each (task, depth, method): ``n`` runs, ``n_clusters``, ``mean``, ``low``, ``high`` (NaN
        for fewer than two clusters).

    Raises:
        InputError: as :func:`summary`; a level outside (0, 1).
    """
    rows = _checked(rows, [metric])
    if cluster is not None:
        check_choice("cluster", cluster, _CLUSTERS)
    table = []
    for (task, depth, method), group in _groups(rows, "task", "depth", "method").items():
        by_cluster = _groups(group, *((cluster,) if cluster else ("arch", "seed"))).values()
        values = [
            [v for r in those if (v := _value(r, metric)) is not None] for those in by_cluster
        ]
        means = np.array([np.mean(those) for those in values if those])
        low, high = t_interval(means, level)
        table.append(
            {
                "task": task,
                "depth": depth,
                "method": method,
                "n": sum(map(len, values)),
                "n_clusters": len(means),
                "mean": float(means.mean()) if len(means) else math.nan,
                "low": low,
                "high": high,
            }
        )
    return table


def _p_values(pairs: _Pairs, alternative: str) -> dict[str, float]:
    """p of the paired t-test, of Wilcoxon's signed-rank test and of exact sign flips.

    NaN for fewer than two pairs.
    """
    check_installed("paired_tests()", "scipy")
    from scipy.stats import permutation_test, ttest_1samp, wilcoxon

    d, scale = pairs.differences, pairs.scale
    if len(d) < 2:
        return {"t_p": math.nan, "wilcoxon_p": math.nan, "sign_flip_p": math.nan}
    if not d.any():  # 0/0 in the statistics; nothing speaks against equality
        return {"t_p": 1.0, "wilcoxon_p": 1.0, "sign_flip_p": 1.0}
    flips = permutation_test(
        (d, np.zeros_like(d)),
        # What is within its rounding of the observed mean is as far up: here within the scale's.
        lambda x, y, axis: 2 * scale + (x - y).mean(axis=axis),
        permutation_type="samples",
        alternative=alternative,
        n_resamples=_FLIPS,  # all of them up to 13 pairs
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return {
        "t_p": float(ttest_1samp(d, 0.0, alternative=alternative).pvalue),
        "wilcoxon_p": float(wilcoxon(d, alternative=alternative).pvalue),
        "sign_flip_p": float(flips.pvalue),
    }


def least_p(k: int, alternative: str = "two-sided") -> float:
    """The least p that Wilcoxon's test or sign flips can give for k pairs."""
    check_choice("alternative", alternative, _ALTERNATIVES)
    return min(1.0, 2.0 ** -(k - (alternative == "two-sided")))


def _holm(p_values: list[float]) -> list[float]:
    """Holm-adjusted p-values; NaN stays NaN and is no test."""
    p = np.array(p_values, dtype=np.float64)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested])]
    # The k-th smallest of m times m - k, never less than a smaller one's.
    adjusted = p[order] * np.arange(len(order), 0, -1)
    p[order] = np.minimum(np.maximum.accumulate(adjusted), 1)
    return p.tolist()


def paired_tests(
    rows: Iterable[Row],
    metric: str,
    baseline: str,
    *,
    alternative: str = "two-sided",
    cluster: str | None = None,
) -> list[dict[str, Any]]:
    """Each method against a baseline method, paired by (arch, seed).

    Pairs are the runs in which both have the metric, and the means are over these alone. With few
    pairs a rank or sign-flip test cannot be significant: ``least_p`` says how small its p can be.

    Args:
        baseline: name of the method that the others are compared with.
        alternative: ``"two-sided"``, ``"greater"`` (the method's metric is) or ``"less"``.
        cluster: ``"seed"`` or ``"arch"``: runs that share it (and with it, say, the training data)
            are not independent; they are averaged first, and the tests are over these means. None:
            every run is independent.

    Returns:
        For each (task, depth) and each other method: ``n_pairs``, ``n_clusters``, ``mean``,
        ``baseline_mean``, ``difference``, its 95 % interval ``low`` to ``high``, ``ratio`` (NaN for
        a baseline mean of 0), ``least_p``, and p of Student's test ``t_p``, ``wilcoxon_p`` and
        ``sign_flip_p`` (exact up to 13 clusters), NaN for fewer than two; each again as
        ``..._holm``, corrected over all tests returned.

    Raises:
        InputError: a row lacks a key or repeats a run, no row has the metric, or none is of the
            baseline; unknown cluster.
    """
    check_choice("alternative", alternative, _ALTERNATIVES)
    table: list[dict[str, Any]] = []
    for pairs in _pairs(rows, metric, baseline, cluster):
        line = pairs.described()
        low, high = t_interval(pairs.differences)
        base = line["baseline_mean"]
        table.append(
            line
            | {"low": low, "high": high, "ratio": line["mean"] / base if base else math.nan}
            | {"least_p": least_p(len(pairs.ours), alternative)}
            | _p_values(pairs, alternative)
        )
    for name in ("t_p", "wilcoxon_p", "sign_flip_p"):
        for line, p in zip(table, _holm([line[name] for line in table]), strict=True):
            line[f"{name}_holm"] = p
    return table


def equivalence_tests(
    rows: Iterable[Row],
    metric: str,
    baseline: str,
    margin: float,
    *,
    cluster: str | None = None,
    level: float = 0.05,
) -> list[dict[str, Any]]:
    """Whether each method equals a baseline method within a margin: two one-sided t-tests.

    That a difference is not significant does not say that there is none. This asks the other way
    round (Schuirmann 1987): the difference is below ``margin`` and above ``-margin``, both at
    ``level``; that is so where its ``1 - 2 level`` interval lies within the margin.

    Args:
        margin: what is too small to matter, in the metric's unit, > 0.
        cluster: as of :func:`paired_tests`.

    Returns:
        As :func:`paired_tests` up to ``difference``; ``equivalence_low`` and ``equivalence_high``,
        the ``1 - 2 level`` interval; ``equivalence_p``, the larger of the two p, NaN for fewer than
        two clusters; ``equivalent``.

    Raises:
        InputError: as :func:`paired_tests`; a margin that is not positive, a level outside
            (0, 0.5).
    """
    check_installed("equivalence_tests()", "scipy")
    from scipy.stats import ttest_1samp

    check_positive("margin", margin)
    if not 0 < check_positive("level", level) < 0.5:
        raise InputError(f"level={level!r} must lie in (0, 0.5)")
    table = []
    for pairs in _pairs(rows, metric, baseline, cluster):
        d = pairs.differences
        low, high = t_interval(d, 1 - 2 * level)
        if len(d) < 2:
            p = math.nan
        elif np.ptp(d) == 0:  # no spread: 0/0 or certain
            p = 0.0 if abs(d[0]) < margin else 1.0
        else:
            above = ttest_1samp(d, -margin, alternative="greater").pvalue
            p = float(max(above, ttest_1samp(d, margin, alternative="less").pvalue))
        table.append(
            pairs.described()
            | {"equivalence_low": low, "equivalence_high": high, "equivalence_p": p}
            | {"equivalent": bool(p < level)}
        )
    return table
