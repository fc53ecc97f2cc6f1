"""The page about recipes has the tables of what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("tabulate")
import recipes_tables as tables

from imu_fast.study.cells import unpack

RESULTS = json.loads(tables.RESULTS.read_text())
PAGE = (Path(__file__).parents[2] / "docs/recipes.md").read_text()


@pytest.mark.parametrize("data", ["cifar10", "digits"])
def test_the_page_has_the_numbers_that_were_measured(data):
    assert tables.overview(RESULTS, data) in PAGE
    assert tables.differences(RESULTS) in PAGE
    assert tables.differences(RESULTS, "again") in PAGE


def test_what_did_not_come_to_the_depth_has_a_star():
    rows = unpack(RESULTS["rows"])
    short = tables.short_of_depth(rows)
    assert ("cifar10", "random-5", "class means") in short
    assert ("cifar10", "class-2", "newton removal, forget set") in short
    assert ("cifar10", "random-5", "self-distillation, forget set") not in short
    row = next(x for x in PAGE.splitlines() if x.startswith("| class means") and "1.66" in x)
    assert row.count("*") == 3


def test_auto_is_short_of_the_depth_only_where_it_left_a_model_alone():
    rows = [row for row in unpack(RESULTS["rows"]) if row["part"] == "report"]
    by = {(r["data"], r["task"], r["seed"], r["method"]): r for r in rows}
    for (*cell, method), row in by.items():
        if method in tables.AUTO and row["forget"] > row["depth"] + 1e-3:
            nothing = by[(*cell, tables.ORIGINAL)]
            assert {k: v for k, v in row.items() if k != "method"} == {
                k: v for k, v in nothing.items() if k != "method"
            }


def test_means_are_those_of_the_rows_and_no_part_shares_its_seeds():
    rows, means = unpack(RESULTS["rows"]), unpack(RESULTS["means"])
    found = {(m["part"], m["data"], m["task"], m["method"]): m for m in tables.means(rows)}
    assert len(found) == len(means)
    for mean in means:
        again = found[mean["part"], mean["data"], mean["task"], mean["method"]]
        assert mean["gap"] == pytest.approx(again["gap"], rel=1e-3, abs=1e-5)
        assert mean["seeds"] == again["seeds"]
        if mean["gap_to_auto"] is not None:
            assert mean["gap_to_auto"] == pytest.approx(again["gap_to_auto"], rel=1e-2, abs=1e-4)
    parts = RESULTS["about"]["parts"]
    seeds = [seed for part in parts.values() for seed in part[0]]
    assert len(seeds) == len(set(seeds))
    assert not set(parts["report"][1]) & set(parts["development"][1])
    assert tables.RESULTS.stat().st_size < 300_000
