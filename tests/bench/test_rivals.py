"""The page about benchmarks says of plain rivals what was measured."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOUND = json.loads((ROOT / "bench/results/rivals.json").read_text())
ROWS = {r["name"]: r for r in FOUND["rows"]}
PAGE = " ".join((ROOT / "docs/benchmarks.md").read_text().split())


def of(start: str) -> list[float]:
    return [r["ratio"] for name, r in ROWS.items() if name.startswith(start)]


def test_the_page_has_the_ratios_that_were_measured():
    assert f"{len(ROWS)} jobs on one thread of a processor with {FOUND['instructions']}" in PAGE
    scores, pairs, kfac = of("scores"), of("pairs fisher_diag")[1:], of("pairs kfac")[1:]
    assert f"C=10: {scores[1]:.2f})" in PAGE
    assert f"scores {scores[3]:.2f} at n=5,001 and {scores[4]:.1f} at n=50,000" in PAGE
    autograd, closed = of("head autograd"), of("head closed_form")
    assert f"({autograd[0]:.2f} at n=64, beside autograd)" in PAGE
    assert f"{autograd[4]:.2f} and {autograd[6]:.1f} beside autograd" in PAGE
    assert f"{closed[4]:.2f} and {closed[6]:.2f} beside a closed form" in PAGE
    small = of("cholesky float64")[1:]
    assert f"({small[0]:.2f} at order 8, {small[2]:.1f} at 65, {small[-1]:.1f} at 2,001)" in PAGE
    large = of("residual n=5001") + of("residual n=50000")
    assert f"residual {min(large):.1f} to {max(large):.1f}" in PAGE
    many = of("vectors")
    assert f"128 vectors {min(many):.2f} to {max(many):.1f}" in PAGE
    first, *own = of("self ggn")
    own.sort()
    assert f"self-influence {own[0]:.1f} and {own[1]:.1f} ({first:.2f} at n=130)" in PAGE
    rounds = of("iteration")
    assert f"conjugate gradient {min(rounds):.2f} to {max(rounds):.1f}" in PAGE
    assert f"Fisher ({min(pairs):.2f} to {max(pairs):.2f})" in PAGE
    assert f"pairs {min(kfac):.2f} to {max(kfac):.2f}" in PAGE
    for ratio in of("kfac"):
        assert f"{ratio:.2f} (d=" in PAGE
