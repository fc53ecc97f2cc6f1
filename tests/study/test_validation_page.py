"""The page about scores and retraining says what its results hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
from imu_fast.study.validation import markdown

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "validate-digits"


def test_the_table_is_that_of_the_results():
    results = json.loads((RESULTS / "results.json").read_text())
    page = (ROOT / "docs" / "validation.md").read_text()
    (table,) = re.findall("<!-- table -->\n(.*)<!-- end -->", page, re.DOTALL)
    assert table == markdown(results) == (RESULTS / "table.md").read_text()
    assert not results["quick"]


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
