"""Tables and tests over repeated runs, against values computed by hand."""

from __future__ import annotations

import math

import pytest

from imu_fast.errors import InputError
from imu_fast.evaluation.statistics import paired_tests, summary

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
