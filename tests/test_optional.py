"""What is optional is asked for before the work, by name, and never bites in the middle of it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from imu_fast.errors import InputError, check_installed

ROOT = Path(__file__).resolve().parents[1] / "imu_fast"
OPTIONAL = {
    "jinja2",
    "matplotlib",
    "peft",
    "PIL",
    "pyarrow",
    "scipy",
    "sklearn",
    "timm",
    "torchvision",
    "transformers",
    "yaml",
}


def optional_imports(tree):
    """``(function, module)`` of every import of something optional, and whether it is asked for."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        calls = [n for n in ast.walk(function) if isinstance(n, ast.Call)]
        asked = {
            str(argument.value).split(".")[0]
            for call in calls
            if isinstance(call.func, ast.Name) and call.func.id == "check_installed"
            for argument in call.args[1:]
            if isinstance(argument, ast.Constant)
        }
        tried = {
            id(node)
            for block in ast.walk(function)
            if isinstance(block, ast.Try)
            and "ImportError" in ast.dump(ast.Module(block.handlers, []))
            for statement in block.body
            for node in ast.walk(statement)
        }
        for node in ast.walk(function):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                module = name.split(".")[0]
                if module in OPTIONAL:
                    yield function.name, module, module in asked or id(node) in tried


def test_every_optional_import_is_asked_for():
    seen = 0
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in tree.body:  # at the top of a file it would be needed by everyone
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert not OPTIONAL & {name.split(".")[0] for name in names}, path
        for function, module, asked in optional_imports(tree):
            seen += 1
            if path.name == "lapack.py":  # its caller tries it, and goes on without
                continue
            assert asked, f"{path.relative_to(ROOT)}: {function} imports {module} unasked"
    assert seen > 10
    bad = ast.parse("def f():\n    import yaml\n    check_installed('f', 'scipy')")
    assert [asked for *_, asked in optional_imports(bad)] == [False]


def test_the_message_names_what_to_install():
    with pytest.raises(InputError, match=r"scores needs scikit-learn, which does not load.*demo"):
        sys.modules["sklearn.nothing"] = None
        try:
            check_installed("scores", "sklearn.nothing")
        finally:
            del sys.modules["sklearn.nothing"]
    check_installed("this", "torch", "json")


WITHOUT = """
import sys
for name in ("sklearn", "scipy", "matplotlib", "pyarrow", "torchvision", "PIL"):
    sys.modules[name] = None
import torch, imu_fast as imu
from torch import nn
torch.manual_seed(0)
x, y = torch.randn(60, 6), torch.randint(0, 3, (60,))
model = nn.Linear(6, 3)
imu.unlearn(model, (x, y), method="uniform", lr=0.5, epochs=300,
            stop=imu.StopRule(membership_auc=0.5, unseen=(torch.randn(60, 6), y)))
for call in (
    lambda: imu.evaluation.metrics.membership_accuracy(y.float(), y.float(), y.float()),
    lambda: __import__("imu_fast.evaluation.shallowness").evaluation.shallowness.linear_probe(
        x, y, y == 0),
):
    import imu_fast.evaluation.metrics
    try:
        call()
    except imu.errors.InputError as error:
        assert "needs scikit-learn" in str(error), error
    else:
        raise AssertionError
"""


def test_a_stop_by_membership_needs_nothing_optional():
    subprocess.run([sys.executable, "-c", WITHOUT], check=True, timeout=120)
