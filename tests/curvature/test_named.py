"""Curvatures by name and as objects: what is used, what refused, here and by type checkers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

import imu_fast as imu
from imu_fast.curvature.named import CURVATURES, CurvatureName, CurvatureOptions
from imu_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def factors():
    labels = torch.randint(3, (9,))
    return imu.GradientFactors.from_head(torch.randn(9, 4), torch.randn(3, 4), None, labels)


def test_the_static_names_are_the_tables():
    assert sorted(get_args(CurvatureName)) == sorted(CURVATURES) == imu.curvatures()
    assert all(CURVATURES[name].name == name for name in CURVATURES)
    of_some = {option for name in CURVATURES for option in CURVATURES[name].paths()}
    assert of_some == set(CurvatureOptions.__annotations__)


def test_unknown_names_and_what_is_no_layers_factors(factors):
    with pytest.raises(InputError, match="is unknown.*did you mean fisher_diag"):
        imu.fit("fisher_diagonal", factors)
    with pytest.raises(InputError, match="curvature is the class GGN; pass an object"):
        imu.fit(imu.GGN, factors)
    with pytest.raises(InputError, match="a list of 2 layers; .* fit each"):
        imu.fit("ggn", [factors, factors])
    with pytest.raises(InputError, match="factors is a model .Linear.; capture it first"):
        imu.fit("ggn", torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="factors is a Tensor; pass GradientFactors"):
        imu.fit("ggn", torch.ones(3))


RIGHT = """
import imu_fast as imu
f: imu.GradientFactors
imu.influence_scores(f, curvature="ggn", damping=1e-3, tolerance=1e-9, solver="cg")
imu.self_influence(f, curvature=imu.FisherDiag(damping_mode="clamp"))
imu.fit("ggn", f, damping=1e-3, preconditioner="kfac").solve(f.delta)
imu.fit(imu.KFAC(damping=1e-3, damping_mode="relative"), f) @ f.delta
imu.load_operator("m").linear_operator(inverse=True)
"""
WRONG = (
    'imu.influence_scores(f, curvature="imv")',
    "imu.influence_scores(f, tollerance=1)",
    'imu.fit("ggn", f, solver="lu")',
    'imu.pairwise_influence(f, f, curvature="ggn", damping="much")',
    "imu.GGN(1e-3)",
    'imu.Identity(damping_mode="add")',
    'imu.KFAC(damping_mode="clamp")',
)


def test_a_type_checker_finds_what_would_be_refused(tmp_path):
    pytest.importorskip("mypy")
    source = tmp_path / "user.py"
    source.write_text(RIGHT + "\n".join(WRONG) + "\n")
    options = ["--follow-imports=silent", "--ignore-missing-imports", "--no-error-summary"]
    command = [sys.executable, "-m", "mypy", *options, f"--cache-dir={tmp_path}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    first = RIGHT.count("\n") + 1
    found = sorted(
        {int(line.split(":")[1]) for line in done.stdout.splitlines() if "error" in line}
    )
    assert found == list(range(first, first + len(WRONG))), done.stdout + done.stderr
