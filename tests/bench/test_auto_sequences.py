"""The page about language models has what chose, and what became of, ``auto`` for sequences."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("tabulate")
pytest.importorskip("scipy")
pytest.importorskip("transformers")
import auto_sequences as bench

from imu_fast.unlearning import auto_sequences as auto

ROOT = Path(__file__).parents[2]
RESULTS = json.loads((ROOT / "bench/results/auto_sequences.json").read_text())
PAGE = (ROOT / "docs/language-study.md").read_text()


@pytest.mark.parametrize("name", ["development", "markov", "tofu"])
def test_the_page_has_the_tables_that_were_measured(name):
    made = bench.development(RESULTS) if name == "development" else bench.page(RESULTS, name)
    (shown,) = re.findall(f"<!-- auto {name} -->\n(.*?)\n<!-- end -->", PAGE, re.DOTALL)
    assert shown == made


def test_what_is_taken_is_what_was_chosen_of_the_candidates():
    chains, questions = (
        {r["method"]: r for r in RESULTS[name]["development"]} for name in bench.SHOWN
    )
    alone = [f"{method}, lr {lr:g}" for method, lr, *_ in bench.ALONE]
    nearest = min(
        (m for m in alone if chains[m]["reached"]), key=lambda m: chains[m]["kl_retrained"]
    )
    assert nearest.startswith("simnpo")
    taken = f"uniform + {auto.RETAIN_WEIGHT:g} x kl of kept data, lr 0.0003"
    both = [m for m in chains if m in questions and " of kept data" in m]
    both = [m for m in both if chains[m]["reached"] and questions[m]["reached"]]
    assert taken == min(both, key=lambda m: chains[m]["kl_retrained"])
    assert questions[taken]["gap"] < 0.5 * questions[bench.ORIGINAL]["gap"]
