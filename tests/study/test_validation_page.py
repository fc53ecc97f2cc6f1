"""The page about scores and retraining says what its results hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
from imu_fast.study.validation import markdown

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "bench" / "results"
RESULTS = FOLDER / "validate-digits"


@pytest.mark.parametrize(("data", "mark"), [("digits", "table"), ("cifar10", "table cifar10")])
def test_the_table_is_that_of_the_results(data, mark):
    folder = FOLDER / f"validate-{data}"
    results = json.loads((folder / "results.json").read_text())
    page = (ROOT / "docs" / "validation.md").read_text()
    (table,) = re.findall(f"<!-- {mark} -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert table == markdown(results) == (folder / "table.md").read_text()
    assert results["data"] == data and not results["quick"]


def test_the_words_about_cifar10_follow_from_the_numbers():
    results = json.loads((FOLDER / "validate-cifar10" / "results.json").read_text())
    lds = {row["candidate"]: row for row in results["lds"]}
    coupled = [lds[name] for name in ("ggn", "ggn_block", "kfac", "ekfac", "fisher")]
    others = [lds[name] for name in ("gradient cosine", "fisher_diag", "identity")]
    assert all(max(row["lds"] for row in others) < one["lds"] for one in coupled)
    assert max(row["low"] for row in coupled) < min(row["high"] for row in others)
    assert all(one["lds"] < lds["TRAK"]["low"] < one["high"] for one in coupled)
    assert all(float(one["setting"].split()[1]) in (1e-3, 1e-2) for one in coupled)
    grid = {
        row["setting"]: row["development"] for row in results["grid"] if row["candidate"] == "ggn"
    }
    assert grid["damping 1e-06"] < 0.55 * max(grid.values())
    for blind in ("the sample's loss", "random"):
        assert lds[blind]["low"] < 0 < lds[blind]["high"]
    alone = {row["candidate"]: row["spearman"] for row in results["memorisation"]}
    loss = alone["the sample's loss"]
    assert f"{max(alone.values()):.2f} at the most against {loss:.2f}" in " ".join(
        (ROOT / "docs" / "validation.md").read_text().split()
    )


def test_its_words_follow_from_the_numbers():
    results = json.loads((RESULTS / "results.json").read_text())
    lds = {row["candidate"]: row for row in results["lds"]}
    for exact in ("ggn", "ggn_block", "kfac", "ekfac"):
        assert lds[exact]["low"] > max(lds[n]["lds"] for n in ("fisher_diag", "identity"))
        assert float(lds[exact]["setting"].split()[1]) <= 1e-5
        assert lds[exact]["lds"] > lds["gradient cosine"]["lds"] > lds["fisher_diag"]["lds"]
    ahead = [lds[n] for n in ("ggn", "ggn_block", "kfac", "ekfac")]
    assert max(row["low"] for row in ahead) < min(row["high"] for row in ahead)
    for blind in ("the sample's loss", "random"):
        assert lds[blind]["low"] < 0 < lds[blind]["high"]
    for layers in ("identity", "fisher_diag"):
        assert lds[f"{layers}, all layers"]["lds"] < lds[layers]["lds"]
    assert lds["TRAK"]["lds"] < lds["ggn"]["low"]
    alone = {row["candidate"]: row["spearman"] for row in results["memorisation"]}
    assert max(alone.values()) - alone["the sample's loss"] < 0.02
