"""What a type checker says of a user's file, with the package as it is installed here."""

from __future__ import annotations

import os
import subprocess
import sys
import typing

import pytest

import imu_fast as imu
from imu_fast.curvature.named import CURVATURES, CurvatureName
from imu_fast.unlearning.ascent import objectives, optimizer, preconditioners, scopes, weights
from imu_fast.unlearning.auto import Auto
from imu_fast.unlearning.named import METHODS, MethodName, MethodOptions

GOOD = """
import torch
import imu_fast as imu

model, data = torch.nn.Linear(3, 2), (torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))
scores: torch.Tensor = imu.influence_scores(model, data, curvature="ggn", damping=1e-3, solver="cg")
indices, kept = imu.influence_weights(scores)
first: imu.UnlearnResult = imu.unlearn(model, data, lr=0.1, layers=[model], objective="margin")
imu.unlearn(model, data, "margin_edit", margin=0.2, callback=lambda record: print(record["step"]))
method = imu.Ascent(
    weights=imu.Influence(curvature=imu.GGN(damping=1e-3), top_fraction=0.5),
    scope=imu.Layers(layers=["fc"], batchnorm="train"),
    optimizer=imu.SGD(lr=0.1),
    objective="npo",
)
imu.unlearn(model, data, method, stop=imu.StopRule(forget_accuracy=0.0))
imu.unlearn(model, data, optimizer=torch.optim.Adam, lr=1e-3)
text: str = first.table()
f: imu.GradientFactors
imu.influence_scores(f, curvature="ggn", damping=1e-3, tolerance=1e-9, solver="cg")
imu.self_influence(f, curvature=imu.FisherDiag(damping_mode="clamp"))
imu.fit("ggn", f, damping=1e-3, preconditioner="kfac").solve(f.delta)
imu.fit(imu.KFAC(damping=1e-3, damping_mode="relative"), f) @ f.delta
imu.load_operator("m").linear_operator(inverse=True)
"""
# A line each, and what is said of it.
BAD = {
    'imu.unlearn(model, data, "imv")': 'Argument 3 to "unlearn" has incompatible type',
    'imu.unlearn(model, data, method="imv")': '"method" to "unlearn" has incompatible type',
    "imu.unlearn(model, data, layers=3)": '"layers" to "unlearn" has incompatible type "int"',
    "imu.unlearn(model, data, tollerance=1)": 'Unexpected keyword argument "tollerance"',
    'imu.unlearn(model, data, curvature="gnn")': '"curvature" to "unlearn" has incompatible type',
    "imu.unlearn(model, data, stop=0.5)": '"stop" to "unlearn" has incompatible type "float"',
    'imu.unlearn(model, data, scope="body")': '"scope" to "unlearn" has incompatible type',
    "imu.influence_scores(model, data, tollerance=1)": 'Unexpected keyword argument "tollerance"',
    'imu.influence_scores(model, data, curvature="gnn")': '"curvature" to "influence_scores"',
    "imu.Ascent(learning_rate=1)": 'Unexpected keyword argument "learning_rate" for "Ascent"',
    'imu.Ascent(weights="imv")': '"weights" to "Ascent" has incompatible type',
    "imu.MarginEdit(lr=1)": 'Unexpected keyword argument "lr" for "MarginEdit"',
    "imu.GGN(tollerance=1)": 'Unexpected keyword argument "tollerance" for "GGN"',
    "imu.GGN(1e-2)": 'Too many positional arguments for "GGN"',
    "imu.GGN().damping = 3": "is read-only",
    'imu.influence_scores(f, curvature="imv")': '"curvature" to "influence_scores"',
    "imu.influence_scores(f, tollerance=1)": 'Unexpected keyword argument "tollerance"',
    'imu.fit("ggn", f, solver="lu")': '"solver" to "fit" has incompatible type',
    'imu.pairwise_influence(f, f, damping="much")': '"damping" to "pairwise_influence"',
    'imu.Identity(damping_mode="add")': 'Unexpected keyword argument "damping_mode" for "Identity"',
    'imu.KFAC(damping_mode="clamp")': '"damping_mode" to "KFAC" has incompatible type',
}


def check(path, text):
    path.write_text(text)
    environment = {k: v for k, v in os.environ.items() if k != "MYPYPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", "--no-incremental", path.name],
        cwd=path.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout


def test_a_users_file_is_checked_where_it_is_right_and_where_it_is_not(tmp_path):
    """With the editable install of a development environment as with a wheel."""
    pytest.importorskip("mypy")
    lines = GOOD.splitlines()
    said = check(tmp_path / "user.py", "\n".join([*lines, *BAD]) + "\n")
    wrong = {}
    for line in said.splitlines():
        if line.startswith("user.py:"):
            wrong.setdefault(int(line.split(":")[1]), []).append(line)
    for number, (code, message) in enumerate(BAD.items(), start=len(lines) + 1):
        assert any(message in line for line in wrong.pop(number, [])), (code, said)
    assert not wrong, said


def test_the_types_name_what_the_tables_hold():
    """A name that only one of the two has could not be written, or not be run."""
    for table, literal in (
        (METHODS, MethodName),
        (CURVATURES, CurvatureName),
        (weights.WEIGHTS, weights.WeightsName),
        (objectives.OBJECTIVES, objectives.ObjectiveName),
        (scopes.SCOPES, scopes.ScopeName),
        (optimizer.OPTIMIZERS, optimizer.OptimizerName),
        (preconditioners.PRECONDITIONERS, preconditioners.PreconditionerName),
    ):
        assert set(table) == set(typing.get_args(literal)), table.kind


def every_option():
    """Flat option -> whether any method, in any of its choices, has it."""
    made = [METHODS[name] for name in METHODS]
    found = set()
    while made:
        method = made.pop()
        found |= set(method.paths()) | set(method.shorthands)
        if isinstance(method, imu.Ascent):
            for kind, table in (
                ("scope", scopes.SCOPES),
                ("weights", weights.WEIGHTS),
                ("objective", objectives.OBJECTIVES),
                ("curvature", CURVATURES),
                ("precondition", preconditioners.PRECONDITIONERS),
            ):
                for name in table:
                    if kind in method.paths():
                        other = method.with_options("", {kind: name})
                        found |= set(other.paths())
            kept = method.with_options("", {"retain": [()]})
            found |= set(kept.paths()) - {"data"}  # by the name of retain
    return found


def test_the_types_hold_every_flat_option():
    internal = set(Auto().paths()) - every_option()
    assert not internal
    assert every_option() == set(typing.get_type_hints(MethodOptions))
