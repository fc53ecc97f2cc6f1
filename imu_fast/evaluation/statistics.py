"""Means, spreads and paired tests over repeated runs: is a method better, or was it the seed?

A row is one run, a dict with ``arch``, ``seed``, ``task``, ``depth``, ``method`` and numeric
metrics. A metric that is None, NaN or infinite is missing: that run did not reach the depth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from imu_fast.errors import InputError, check_choice, check_installed

Row = Mapping[str, Any]
_KEYS = ("arch", "seed", "task", "depth", "method")
_ALTERNATIVES = ("two-sided", "greater", "less")


def _check_rows(rows: Sequence[Row], metrics: Iterable[str]) -> None:
    """Raise InputError unless each row names a run of its own, and some row has each metric."""
    seen = set()
    for i, row in enumerate(rows):
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


def summary(rows: Sequence[Row], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Mean and standard deviation of each method over all architectures and seeds.

    Returns:
        For each (task, depth, method), in order of first appearance: ``n`` runs, and for each
        metric ``<metric>_n`` runs that have it, ``<metric>_mean`` over these (NaN if none) and
        ``<metric>_std`` (ddof 1; NaN for fewer than two).

    Raises:
        InputError: a row lacks a key or repeats a run, or no row has a metric.
    """
    _check_rows(rows, metrics)
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


def _p_values(ours: list[float], baseline: list[float], alternative: str) -> tuple[float, float]:
    """p of the paired t-test and of Wilcoxon's signed-rank test; NaN for fewer than two pairs."""
    check_installed("paired_tests()", "scipy")
    from scipy.stats import ttest_rel, wilcoxon

    if len(ours) < 2:
        return math.nan, math.nan
    if ours == baseline:  # 0/0 in both statistics; nothing speaks against equality
        return 1.0, 1.0
    t = ttest_rel(ours, baseline, alternative=alternative).pvalue
    return float(t), float(wilcoxon(ours, baseline, alternative=alternative).pvalue)


def _holm(p_values: list[float]) -> list[float]:
    """Holm-adjusted p-values; NaN stays NaN and is no test."""
    check_installed("paired_tests()", "statsmodels")
    from statsmodels.stats.multitest import multipletests

    p = np.array(p_values)
    tested = ~np.isnan(p)
    if tested.any():
        p[tested] = multipletests(p[tested], method="holm")[1]
    return p.tolist()


def paired_tests(
    rows: Sequence[Row], metric: str, baseline: str, *, alternative: str = "two-sided"
) -> list[dict[str, Any]]:
    """Each method against a baseline method, paired by (arch, seed).

    Pairs are the runs in which both have the metric, and the means are over these alone. With few
    pairs Wilcoxon's test cannot be significant: n pairs give p >= 2^(1-n), two-sided.

    Args:
        baseline: name of the method that the others are compared with.
        alternative: ``"two-sided"``, ``"greater"`` (the method's metric is) or ``"less"``.

    Returns:
        For each (task, depth) and each other method: ``n_pairs``, ``mean``, ``baseline_mean``,
        ``difference``, ``ratio`` (NaN for a baseline mean of 0), ``t_p``, ``wilcoxon_p`` (NaN for
        fewer than two pairs), and ``t_p_holm``, ``wilcoxon_p_holm``, each corrected over all
        tests returned.

    Raises:
        InputError: a row lacks a key or repeats a run, no row has the metric, or none is of the
            baseline.
    """
    check_choice("alternative", alternative, _ALTERNATIVES)
    _check_rows(rows, [metric])
    check_choice("baseline", baseline, dict.fromkeys(row["method"] for row in rows))
    table: list[dict[str, Any]] = []
    for (task, depth), group in _groups(rows, "task", "depth").items():
        runs = {
            method: {
                (r["arch"], r["seed"]): v for r in of_method if (v := _value(r, metric)) is not None
            }
            for (method,), of_method in _groups(group, "method").items()
        }
        base = runs.pop(baseline, {})
        for method, values in runs.items():
            pairs = [(values[run], base[run]) for run in values if run in base]
            ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
            mean = float(np.mean(ours)) if pairs else math.nan
            base_mean = float(np.mean(theirs)) if pairs else math.nan
            t_p, wilcoxon_p = _p_values(ours, theirs, alternative)
            table.append(
                {
                    "task": task,
                    "depth": depth,
                    "method": method,
                    "n_pairs": len(pairs),
                    "mean": mean,
                    "baseline_mean": base_mean,
                    "difference": mean - base_mean,
                    "ratio": mean / base_mean if base_mean else math.nan,
                    "t_p": t_p,
                    "wilcoxon_p": wilcoxon_p,
                }
            )
    for name in ("t_p", "wilcoxon_p"):
        for line, p in zip(table, _holm([line[name] for line in table]), strict=True):
            line[f"{name}_holm"] = p
    return table
