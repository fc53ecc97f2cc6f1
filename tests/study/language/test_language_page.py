"""The page about language models says what the results hold."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("transformers")
from imu_fast.study.entries import ORIGINAL, RETRAINED, TWIN
from imu_fast.study.language.markov import BEST_OF_ALL
from imu_fast.study.language.named import experiment_named
from imu_fast.study.language.report import language_table, markdown
from imu_fast.study.language.run import Seed, Sitting

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "language-study.md").read_text()
RESULTS = ROOT / "bench" / "results"
HERE = sorted(
    path.parent.name.removeprefix("language-") for path in RESULTS.glob("language-*/*.md")
)


def results_of(name: str) -> dict:
    return json.loads((RESULTS / f"language-{name}" / "results.json").read_text())


@pytest.mark.parametrize("name", HERE)
def test_the_table_is_that_of_the_results(name):
    results = results_of(name)
    (table,) = re.findall(f"<!-- {name} -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
    assert table == markdown(results) == (RESULTS / f"language-{name}" / "table.md").read_text()


@pytest.mark.parametrize("name", HERE)
def test_results_are_of_their_cells_and_small(name):
    results, folder = results_of(name), RESULTS / f"language-{name}"
    assert sum(p.stat().st_size for p in folder.glob("*.*")) < 300_000
    measured = {}
    for path in (folder / "cells").glob("*.json"):
        seed = int(path.name.split("-")[1])
        for method, entry in json.loads(path.read_text())["entries"].items():
            rows = entry["value"].get("rows", [{"method": method, **entry["value"]}])
            measured |= {(seed, row["method"]): row for row in rows}
    for row in results["rows"]:
        there = measured[row["seed"], row["method"]]
        assert {k: v for k, v in row.items() if k in there} == there


def test_the_chains_of_the_page_are_those_of_the_command():
    """So that the command goes on from the cells that are kept."""
    folder = RESULTS / "language-markov"
    seed = Seed(Sitting(experiment_named("markov"), ("all",), folder), 0)
    assert seed.cell.path.is_file() and "references" in seed.cell.read()


def test_its_words_about_chains_follow_from_the_numbers():
    results = results_of("markov")
    lines = {line["method"]: line for line in results["summary"]}
    far = {name: line["kl_retrained_mean"] for name, line in lines.items()}
    tests = {(t["question"], t["method"], t["metric"]): t for t in results["tests"]}
    for chain in (1, 2):
        key = f"kl_true_forget_{chain}_mean"
        assert lines[BEST_OF_ALL][key] < lines[ORIGINAL][key] < lines[TWIN][key] / 3
    network = [n for n in results["methods"] if "network" in n and far[n] is not None]
    assert set(results["methods"]) - {n for n, v in far.items() if v is not None} == {
        "simnpo + kept data, network"
    }
    assert all(far[TWIN] * 5 < far[n] < far[ORIGINAL] / 2.9 for n in network)
    for name in ("uniform", "imu", "permuted", "npo"):
        test = tests["nothing", f"{name}, head", "kl_retrained"]
        assert test["difference"] > 0 and test["t_p_holm"] < 0.01
    assert tests["nothing", "simnpo, head", "kl_retrained"]["t_p_holm"] > 0.05
    for question in ("weights", "weights, network"):
        for name in ("imu", "permuted"):
            place = "network" if "network" in question else "head"
            assert tests[question, f"{name}, {place}", "kl_retrained"]["t_p_holm"] > 0.05
    shuffled = tests["weights, shuffled, network", "imu, network", "kl_retrained"]
    assert shuffled["difference"] > 0 and shuffled["t_p_holm"] < 0.05


def test_its_words_about_questions_follow_from_the_numbers():
    results = results_of("tofu")
    lines = {line["method"]: line for line in results["summary"]}
    original, retrained = lines[ORIGINAL], lines[RETRAINED]
    assert original["forget_probability_mean"] > 0.85 and original["forget_rouge_mean"] > 0.95
    assert retrained["forget_probability_mean"] < 0.01 and retrained["kept_probability_mean"] > 0.75
    there = {n: line for n, line in lines.items() if line["gap_mean"] is not None}
    assert set(results["methods"]) - set(there) == {"simnpo, head", "simnpo + kept data, network"}
    methods = {n: there[n] for n in results["methods"] if n in there}
    for name, line in methods.items():
        if "kept data" not in name:
            assert line["kept_probability_mean"] < 0.03
        if name.endswith("network"):
            assert line["min_k_mean"] > 0.9 and 4.5 < line["relearn_mean"] < 8
    ascents = {n: methods[f"{n}, head"] for n in ("uniform", "imu", "permuted")}
    network = min(
        m["gap_mean"] for n, m in methods.items() if n.endswith(", network") and "+" not in n
    )
    assert all(m["gap_mean"] < network and m["kl_kept_mean"] > 20 for m in ascents.values())
    for test in results["tests"]:
        if test["question"].startswith("weights"):
            assert test["t_p_holm"] is None or test["t_p_holm"] > 0.05, test
    assert lines[TWIN]["kl_forget_mean"] > 2 and lines[TWIN]["kl_unseen_mean"] > 2


@pytest.mark.parametrize("name", HERE)
def test_the_terminals_table_has_whole_names_and_numbers(name):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(language_table(results_of(name)))
    text = console.export_text()
    assert "…" not in text
    assert all(method in text for method in results_of(name)["methods"])
