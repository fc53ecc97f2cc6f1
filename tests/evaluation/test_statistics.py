"""Tables and tests over repeated runs, against values computed by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from imu_fast.errors import InputError
from imu_fast.evaluation.statistics import (
    equivalence_tests,
    intervals,
    least_p,
    paired_tests,
    summary,
)

nan = math.nan


def rows_of(values, *, task="class", depth=0.0, archs=("a",), metric="retain"):
    """One row per method, architecture and seed; values[method] in that order."""
    return [
        {
            "arch": archs[i % len(archs)],
            "seed": i // len(archs),
            "task": task,
            "depth": depth,
            "method": method,
            metric: value,
        }
        for method, of_method in values.items()
        for i, value in enumerate(of_method)
    ]


def only(table):
    (line,) = table
    return line


def test_summary_by_hand():
    rows = rows_of({"ours": [1.0, 2.0, 3.0, 6.0], "uniform": [5.0]}, archs=("a", "b"))
    rows += rows_of({"ours": [0.5, 0.5]}, depth=0.5)
    first, second, third = summary(rows, ["retain"])
    assert first == {
        "task": "class",
        "depth": 0.0,
        "method": "ours",
        "n": 4,
        "retain_n": 4,
        "retain_mean": 3.0,
        "retain_std": pytest.approx(math.sqrt(14 / 3)),
    }
    assert second["retain_mean"] == 5 and math.isnan(second["retain_std"])
    assert (third["depth"], third["retain_mean"], third["retain_std"]) == (0.5, 0.5, 0)


def test_summary_counts_the_runs_that_did_not_reach_the_depth():
    rows = rows_of({"ours": [1.0, None, nan, 3.0, math.inf], "never": [None, nan]})
    del rows[1]["retain"]
    ours, never = summary(rows, ["retain"])
    assert (ours["n"], ours["retain_n"], ours["retain_mean"]) == (5, 2, 2)
    assert (never["n"], never["retain_n"]) == (2, 0)
    assert math.isnan(never["retain_mean"]) and math.isnan(never["retain_std"])


def test_paired_by_hand():
    # Differences 1, 2, 3: t = 2 sqrt(3) with 2 degrees of freedom, of which the distribution
    # function is (1 + t / sqrt(2 + t^2)) / 2. Of the 8 signings one is as far up.
    rows = rows_of({"uniform": [1.0, 1.0, 1.0], "ours": [2.0, 3.0, 4.0]})
    upper = (1 - 2 * math.sqrt(3 / 14)) / 2
    line = only(paired_tests(rows, "retain", "uniform"))
    half = 4.302652729911275 / math.sqrt(3)  # Student's 97.5 % quantile at 2 degrees of freedom
    assert line == {
        "task": "class",
        "depth": 0.0,
        "method": "ours",
        "n_pairs": 3,
        "n_clusters": 3,
        "mean": 3,
        "baseline_mean": 1,
        "difference": 2,
        "low": pytest.approx(2 - half),
        "high": pytest.approx(2 + half),
        "ratio": 3,
        "least_p": 0.25,
        "t_p": pytest.approx(2 * upper),
        "wilcoxon_p": pytest.approx(0.25),
        "sign_flip_p": pytest.approx(0.25),
        "t_p_holm": pytest.approx(2 * upper),
        "wilcoxon_p_holm": pytest.approx(0.25),
        "sign_flip_p_holm": pytest.approx(0.25),
    }
    greater = only(paired_tests(rows, "retain", "uniform", alternative="greater"))
    assert greater["t_p"] == pytest.approx(upper) and greater["wilcoxon_p"] == 0.125
    less = only(paired_tests(rows, "retain", "uniform", alternative="less"))
    assert less["t_p"] == pytest.approx(1 - upper) and less["wilcoxon_p"] == 1


def test_runs_are_paired_by_architecture_and_seed_whatever_their_order():
    rows = rows_of(
        {"uniform": [1.0, 5.0, 2.0, 9.0], "ours": [1.5, 5.25, 2.75, 9.5]}, archs=("a", "b")
    )
    line = only(paired_tests(rows, "retain", "uniform"))
    assert line == only(paired_tests(rows[::-1], "retain", "uniform"))
    assert line["n_pairs"] == 4 and line["difference"] == 0.5


def test_only_complete_pairs_count():
    rows = rows_of({"uniform": [1.0, 2.0, None, 4.0, nan], "ours": [3.0, 5.0, 100.0, None, nan]})
    line = only(paired_tests(rows, "retain", "uniform"))
    assert (line["n_pairs"], line["mean"], line["baseline_mean"]) == (2, 4, 1.5)


def test_holm_over_every_test_returned():
    # Two p-values per family in the call: the smaller is doubled, the larger stays (or is raised
    # to it); a pair too few takes no part.
    rows = rows_of({"uniform": [0.0] * 6, "ours": [3.0, 4, 5, 3.5, 4.5, 4.2], "other": [1, -2, 3]})
    rows += rows_of({"uniform": [1.0, 2.0], "ours": [2.0, None]}, task="random")
    ours, other, alone = paired_tests(rows, "retain", "uniform")
    assert ours["t_p"] < other["t_p"] and ours["wilcoxon_p"] == pytest.approx(2 / 2**6)
    assert ours["t_p_holm"] == pytest.approx(2 * ours["t_p"])
    assert ours["wilcoxon_p_holm"] == pytest.approx(2 * ours["wilcoxon_p"])
    assert other["t_p_holm"] == pytest.approx(other["t_p"])
    assert alone["n_pairs"] == 1 and alone["difference"] == 1 and alone["ratio"] == 2
    for name in ("t_p", "wilcoxon_p", "t_p_holm", "wilcoxon_p_holm"):
        assert math.isnan(alone[name])


def test_no_pairs_and_no_baseline_at_one_depth():
    rows = rows_of({"uniform": [None, nan], "ours": [1.0, 2.0]})
    rows += rows_of({"ours": [1.0, 2.0]}, depth=0.5)
    for line in paired_tests(rows, "retain", "uniform"):
        assert line["n_pairs"] == 0
        assert all(math.isnan(line[k]) for k in ("mean", "difference", "ratio", "t_p_holm"))


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_identical_methods_do_not_differ(alternative):
    rows = rows_of({"uniform": [0.0, 0.0, 0.0], "ours": [0.0, 0.0, 0.0]})
    line = only(paired_tests(rows, "retain", "uniform", alternative=alternative))
    assert (line["t_p"], line["wilcoxon_p"], line["wilcoxon_p_holm"]) == (1, 1, 1)
    assert line["difference"] == 0 and math.isnan(line["ratio"])


def test_arguments():
    rows = rows_of({"uniform": [1.0], "ours": [1.0]})
    with pytest.raises(InputError, match="metric 'retian' is in no row"):
        summary(rows, ["retain", "retian"])
    with pytest.raises(InputError, match="baseline='unifrom' is unknown; choose one of uniform, o"):
        paired_tests(rows, "retain", "unifrom")
    with pytest.raises(InputError, match="alternative='more' is unknown"):
        paired_tests(rows, "retain", "uniform", alternative="more")
    with pytest.raises(InputError, match=r"rows\[2\] repeats the run"):
        summary([*rows, rows[0]], ["retain"])
    with pytest.raises(InputError, match=r"rows\[0\] has no arch, seed, depth; a row needs"):
        paired_tests([{"task": "a", "method": "b"}], "retain", "b")
    assert summary([], []) == []


def shared(seeds, shift=0.0):
    """Two architectures a seed, so that runs of a seed are alike."""
    rng = np.random.default_rng(0)
    base = [rng.normal(0.5, 0.1) for _ in range(2 * seeds)]
    ours = [b + shift + 0.01 * rng.normal() for b in base]
    return rows_of({"uniform": base, "ours": ours}, archs=("a", "b"))


def clusters(rows, cluster):
    """Differences by loops, averaged within each cluster."""
    values = {(r["arch"], r["seed"], r["method"]): r["retain"] for r in rows}
    found = {}
    for (arch, seed, method), value in values.items():
        if method == "ours":
            key = {None: (arch, seed), "seed": seed, "arch": arch}[cluster]
            found.setdefault(key, []).append(value - values[arch, seed, "uniform"])
    return np.array([np.mean(those) for those in found.values()])


@pytest.mark.parametrize("cluster", [None, "seed", "arch"])
@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_paired_over_clusters(cluster, alternative):
    rows = shared(4, shift=0.004)
    d = clusters(rows, cluster)
    k = len(d)
    line = only(paired_tests(rows, "retain", "uniform", alternative=alternative, cluster=cluster))
    assert (line["n_clusters"], line["n_pairs"]) == (k, 8)
    assert line["t_p"] == pytest.approx(stats.ttest_1samp(d, 0, alternative=alternative).pvalue)
    assert line["wilcoxon_p"] == pytest.approx(stats.wilcoxon(d, alternative=alternative).pvalue)
    flips = np.array(list(itertools.product([1, -1], repeat=k))) @ d / k
    up, down = np.mean(flips >= d.mean() - 1e-14), np.mean(flips <= d.mean() + 1e-14)
    expected = {"greater": up, "less": down, "two-sided": min(1, 2 * min(up, down))}
    assert line["sign_flip_p"] == pytest.approx(expected[alternative])
    bounds = stats.t.interval(0.95, k - 1, d.mean(), stats.sem(d))
    assert (line["low"], line["high"]) == pytest.approx(bounds)


@pytest.mark.parametrize("cluster", [None, "seed"])
@pytest.mark.parametrize("shift", [0, 0.015, -0.03])
def test_equivalence_is_two_one_sided_tests(cluster, shift):
    margin, rows = 0.02, shared(5, shift=shift)
    d = clusters(rows, cluster)
    line = only(equivalence_tests(rows, "retain", "uniform", margin, cluster=cluster))
    error, free = stats.sem(d), len(d) - 1
    below, above = (d.mean() - margin) / error, (d.mean() + margin) / error
    p = max(stats.t.sf(above, free), stats.t.cdf(below, free))
    assert line["equivalence_p"] == pytest.approx(p) and line["equivalent"] == (p < 0.05)
    low, high = line["equivalence_low"], line["equivalence_high"]
    assert (low, high) == pytest.approx(stats.t.interval(0.9, free, d.mean(), error))
    assert line["equivalent"] == (-margin < low and high < margin)


def test_equivalence_of_what_does_not_vary_or_is_alone():
    rows = rows_of({"uniform": [0.5] * 3, "ours": [0.51] * 3, "far": [0.6] * 3})
    ours, far = equivalence_tests(rows, "retain", "uniform", 0.02)
    assert ours["equivalent"] and not far["equivalent"]
    one = only(
        equivalence_tests(rows_of({"uniform": [1.0], "ours": [1.0]}), "retain", "uniform", 1)
    )
    assert not one["equivalent"] and math.isnan(one["equivalence_p"])
    for bad in (dict(margin=0.0), dict(margin=nan), dict(margin=0.1, level=0.5)):
        with pytest.raises(InputError, match="margin|level"):
            equivalence_tests(rows, "retain", "uniform", **bad)
    with pytest.raises(InputError, match="cluster='task' is unknown"):
        paired_tests(rows, "retain", "uniform", cluster="task")


def test_the_least_p_is_reached():
    for k in range(2, 8):
        rows = rows_of({"uniform": [0.0] * k, "ours": [1 + i / 7 for i in range(k)]})
        line = only(paired_tests(rows, "retain", "uniform"))
        assert line["least_p"] == least_p(k) == 2.0 ** (1 - k)
        assert line["sign_flip_p"] == pytest.approx(least_p(k)) == pytest.approx(line["wilcoxon_p"])


@pytest.mark.parametrize("cluster", [None, "seed"])
def test_intervals_are_students_over_clusters(cluster):
    rows = shared(5)
    for line in intervals(rows, "retain", cluster=cluster):
        of = [r for r in rows if r["method"] == line["method"]]
        by = {}
        for r in of:
            by.setdefault(r["seed"] if cluster else id(r), []).append(r["retain"])
        means = np.array([np.mean(those) for those in by.values()])
        bounds = stats.t.interval(0.95, len(means) - 1, means.mean(), stats.sem(means))
        assert (line["n"], line["n_clusters"]) == (10, len(means))
        assert (line["low"], line["high"]) == pytest.approx(bounds)


@pytest.mark.parametrize("level", [95, 1, 0, -0.5])
def test_a_level_is_a_probability(level):
    with pytest.raises(InputError, match=f"level={level}"):
        intervals(shared(5), "retain", level=level)


def test_holm_by_hand():
    values = {
        "uniform": [0.0] * 4,
        "a": [1.0, 2, 3, 4],
        "b": [1.0, -2, 3, 4],
        "c": [1.0, 1.1, 1.2, 1],
    }
    lines = paired_tests(rows_of(values), "retain", "uniform")
    ordered = sorted(lines, key=lambda line: line["t_p"])
    first = 3 * ordered[0]["t_p"]
    second = max(first, 2 * ordered[1]["t_p"])
    expected = [first, second, max(second, ordered[2]["t_p"])]
    assert [line["t_p_holm"] for line in ordered] == pytest.approx(expected)


def by_flips(differences):
    """p of exact sign flips of whole numbers, both ways."""
    signs = itertools.product((1, -1), repeat=len(differences))
    sums = np.array([np.dot(sign, differences) for sign in signs])
    seen = sum(differences)
    return min(1.0, 2 * min((sums >= seen).mean(), (sums <= seen).mean()))


@pytest.mark.parametrize("seed", range(12))
def test_fractions_are_ranked_as_the_counts_that_they_are_of(seed):
    """0.49 - 0.46 and 0.67 - 0.64 are not the same number, and must not be ranked by that."""
    rng = np.random.default_rng(seed)
    n = int(rng.choice([30, 100, 1024]))
    counts = rng.integers(n // 3, n - 9, int(rng.integers(4, 9)))
    gains = rng.integers(-3, 5, len(counts))
    gains[0] = 1
    lines = [
        only(
            paired_tests(
                rows_of(
                    {"uniform": (counts / k).tolist(), "ours": ((counts + gains) / k).tolist()}
                ),
                "retain",
                "uniform",
            )
        )
        for k in (n, 1)
    ]
    for name in ("t_p", "wilcoxon_p", "sign_flip_p"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-9)
    assert lines[0]["wilcoxon_p"] == pytest.approx(stats.wilcoxon(gains).pvalue)
    assert lines[0]["sign_flip_p"] == pytest.approx(by_flips(gains.tolist()))


def test_what_is_equal_but_for_rounding_does_not_differ():
    rows = rows_of({"uniform": [0.3, 0.8, 0.6], "ours": [0.1 + 0.2, 0.7 + 0.1, 0.2 * 3]})
    line = only(paired_tests(rows, "retain", "uniform"))
    assert (line["t_p"], line["wilcoxon_p"], line["sign_flip_p"]) == (1, 1, 1)
    assert (line["low"], line["high"]) == (0, 0)


def test_rows_are_read_once_and_hold_numbers():
    rows = rows_of({"uniform": [1.0, 1.0, 2.0], "ours": [2.0, 3.0, 4.0]})
    for table in (
        lambda given: summary(given, iter(["retain"])),
        lambda given: intervals(given, "retain"),
        lambda given: paired_tests(given, "retain", "uniform"),
        lambda given: equivalence_tests(given, "retain", "uniform", 0.1),
    ):
        assert table(iter(rows)) == table(rows) != [], "of a generator nothing would be left"
    plain = [np.float32(2.0), np.int64(3), torch.tensor(4.0)]
    assert summary(rows_of({"ours": plain}), ["retain"])[0]["retain_mean"] == 3.0
    for bad in ("0.5", 1j, [0.5], torch.ones(2), np.complex64(1)):
        with pytest.raises(InputError, match=r"rows\[1\]\['retain'\]=.* is no number"):
            summary(rows_of({"ours": [0.5, bad]}), ["retain"])
    with pytest.raises(InputError, match=r"rows\[0\] is a str"):
        summary(["arch seed task depth method"], ["retain"])
