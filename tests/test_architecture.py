"""The rooms: who may import whom, and what importing the package costs.

Each rule of house.py holds here, and is shown to fail on a small tree that breaks it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import house
import pytest

ROOT = Path(__file__).resolve().parents[1]
by_name = {"ids": lambda value: getattr(value, "__name__", None)}


@pytest.mark.parametrize("rule", [*house.RULES, house.unused_exceptions], **by_name)
def test_the_house_keeps(rule):
    broken = rule(ROOT)
    assert not broken, "\n".join(broken)


def build(tmp_path: Path, texts: dict[str, str]) -> Path:
    """A tree of these files; every folder of the package has its __init__."""
    for name, text in {"imu_fast/__init__.py": "", **texts}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if path.suffix == ".py" and name.split("/")[0] in ("imu_fast", "kernels"):
            for folder in path.relative_to(tmp_path).parents[:-1]:
                init = tmp_path / folder / "__init__.py"
                init.touch()
    return tmp_path


EMPTY = {"imu_fast/errors.py": "class InputError(ValueError): ...\n"}
OPS = {"imu_fast/ops/gram.py": "from imu_fast.errors import InputError\n", **EMPTY}
LONG = ", ".join(f"a{i}" for i in range(15))

KEPT = {
    "down, and along one's own floor": (
        house.upward_imports,
        {
            **OPS,
            "imu_fast/solvers/cg.py": "from imu_fast.ops.gram import gram\n",
            "imu_fast/curvature/fisher.py": "from imu_fast.solvers import cg\nimport torch\n",
            "imu_fast/cli/app.py": "import imu_fast\nfrom imu_fast.data import files\n",
            "imu_fast/data/files.py": "from imu_fast.errors import InputError\n",
        },
    ),
    "the oracle, read by operations": (
        house.upward_imports,
        {
            "imu_fast/ops/gram.py": "def f():\n    from imu_fast import reference\n",
            "imu_fast/reference.py": "import torch\n",
        },
    ),
    "whether the extension loads": (
        house.upward_imports,
        {"imu_fast/backend.py": "def f():\n    from imu_fast import _C\n"},
    ),
    "the root, which re-exports what is above all": (
        house.upward_imports,
        {"imu_fast/__init__.py": "from imu_fast.cli.app import f\n", "imu_fast/cli/app.py": ""},
    ),
    "every room has its floor": (house.outside_floors, {**OPS, "imu_fast/data/files.py": ""}),
    "a folder used by a file and using others": (
        house.circles,
        {
            "imu_fast/unlearning/method.py": "",
            "imu_fast/unlearning/ascent/ascent.py": "from imu_fast.unlearning.method import M\n",
            "imu_fast/unlearning/named.py": "from imu_fast.unlearning.ascent.ascent import A\n",
        },
    ),
    "the root re-exports": (
        house.circles,
        {
            "imu_fast/__init__.py": "from imu_fast.cli import app\n",
            "imu_fast/cli/app.py": "import imu_fast\n",
        },
    ),
    "kernels and their libraries": (
        house.kernel_imports,
        {
            "kernels/tiles.py": "import math\nimport torch\nimport triton.language as tl\n",
            "kernels/gram.py": "from imu_fast.kernels.tiles import t\nfrom . import tiles\n",
            "imu_fast/ops/gram.py": "import numpy\n",
        },
    ),
    "who asks": (
        house.backend_users,
        {
            "imu_fast/ops/operation.py": "from imu_fast import backend\n",
            "imu_fast/unlearning/unlearn.py": "from imu_fast.backend import record_backends\n",
        },
    ),
    "fifteen parameters": (
        house.long_signatures,
        {
            "imu_fast/ops/gram.py": f"def f({LONG}): ...\nclass A:\n    def m(self, {LONG}): ...\n",
            "imu_fast/cli/app.py": f"def f({LONG}, more): ...\n",
            "kernels/gram.py": f"@triton.jit\ndef k({LONG}, more): ...\n",
        },
    ),
    "four hundred lines": (house.long_files, {"imu_fast/ops/gram.py": "x = 1\n" * 400}),
    "a specification by another name": (
        house.spec_citations,
        {"README.md": "SPECIAL, a specification, spec\n", "tests/test_a.py": "# SPEC section 1\n"},
    ),
    "tests without a package": (
        house.packages_of_tests,
        {"tests/test_a.py": "", "imu_fast/tests_of_mine/__init__.py": ""},
    ),
}
HIGH = {"imu_fast/curvature/fisher.py": "", "imu_fast/influence/scores.py": ""}


def up(text: str, path: str = "imu_fast/ops/gram.py"):
    return (
        house.upward_imports,
        {**HIGH, path: text},
        [path, "imu_fast/influence/scores.py", "above"],
    )


BROKEN = {
    "up": up("from imu_fast.influence.scores import f\n"),
    "up, a module": up("import imu_fast.influence.scores\n"),
    "up, a module out of its folder": up("from imu_fast.influence import scores\n"),
    "up, in a function": up("def f():\n    from imu_fast.influence.scores import f\n"),
    "up, for types": up(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
        "    from imu_fast.influence.scores import f\n"
    ),
    "up, by a string": up(
        'import importlib\nimportlib.import_module("imu_fast.influence.scores")\n'
    ),
    "up, by a string's function": up(
        'from importlib import import_module\nimport_module("imu_fast.influence.scores")\n'
    ),
    "up, by a built-in": up('__import__("imu_fast.influence.scores")\n'),
    "up, by a pattern": up('import_module(f"imu_fast.influence.{name}")\n'),
    "up, relatively": up("from ..influence.scores import f\n"),
    "up, relatively, a module": up("from ..influence import scores\n"),
    "up, relatively, from a folder": up(
        "from ..influence.scores import f\n", "imu_fast/ops/__init__.py"
    ),
    "up, from a folder": up("import imu_fast.influence.scores\n", "imu_fast/ops/__init__.py"),
    "up, from a kernel": up("import imu_fast.influence.scores\n", "kernels/gram.py"),
    "up, from the bottom": up("from imu_fast.influence.scores import f\n", "imu_fast/options.py"),
    "up, a folder itself": (
        house.upward_imports,
        {**HIGH, "imu_fast/ops/gram.py": "from imu_fast.influence import f\n"},
        ["imu_fast/ops/gram.py", "imu_fast/influence/__init__.py"],
    ),
    "up, to the root": (
        house.upward_imports,
        {"imu_fast/study/a.py": "import imu_fast\n", "imu_fast/ops/gram.py": "import imu_fast\n"},
        ["imu_fast/ops/gram.py:1 imports imu_fast/__init__.py", "only the top floor"],
    ),
    "up, a name of the root": (
        house.upward_imports,
        {"imu_fast/ops/gram.py": "from imu_fast import capture\n"},
        ["imu_fast/ops/gram.py:1 imports imu_fast/__init__.py"],
    ),
    "one of several names is the root's": (
        house.upward_imports,
        {"imu_fast/ops/gram.py": "from imu_fast import errors, capture\n", **EMPTY},
        ["imu_fast/ops/gram.py:1 imports imu_fast/__init__.py"],
    ),
    "one of several names is above": (
        house.upward_imports,
        {**OPS, **HIGH, "imu_fast/ops/b.py": "from imu_fast import errors, influence\n"},
        ["imu_fast/ops/b.py:1 imports imu_fast/influence/__init__.py"],
    ),
    "the oracle, outside operations": (
        house.upward_imports,
        {
            "imu_fast/solvers/cg.py": "def f():\n    from imu_fast import reference\n",
            "imu_fast/reference.py": "",
        },
        ["imu_fast/solvers/cg.py:2 imports imu_fast/reference.py", "oracle"],
    ),
    "the extension, from the bottom": (
        house.upward_imports,
        {"imu_fast/storage.py": "from imu_fast import _C\n"},
        ["imu_fast/storage.py:1 imports imu_fast._C", "_C is above storage"],
    ),
    "a leaf that imports the house": (
        house.upward_imports,
        {**OPS, "imu_fast/data/files.py": "from imu_fast.ops import gram\n"},
        ["imu_fast/data/files.py:1 imports imu_fast/ops/gram.py", "above data"],
    ),
    "a leaf read below the top": (
        house.upward_imports,
        {"imu_fast/data/files.py": "", "imu_fast/model/a.py": "from imu_fast.data import files\n"},
        ["imu_fast/model/a.py:1 imports imu_fast/data/files.py", "cli/ and study/ alone"],
    ),
    "a room on no floor": (
        house.outside_floors,
        {"imu_fast/attic/a.py": "", "imu_fast/cellar.py": ""},
        ["imu_fast/attic", "imu_fast/cellar"],
    ),
    "a room on no floor, imported": (
        house.upward_imports,
        {"imu_fast/attic/a.py": "", "imu_fast/ops/b.py": "from imu_fast.attic import a\n"},
        ["imu_fast/ops/b.py:1 imports imu_fast/attic/a.py", "no room of ours"],
    ),
    "two files": (
        house.circles,
        {
            "imu_fast/ops/a.py": "from imu_fast.ops.b import f\n",
            "imu_fast/ops/b.py": "def f():\n    from imu_fast.ops import a\n",
        },
        [
            "imu_fast/ops/a.py:1 imports imu_fast/ops/b.py",
            "imu_fast/ops/b.py:2 imports imu_fast/ops/a",
        ],
    ),
    "two files, for types": (
        house.circles,
        {
            "imu_fast/ops/a.py": "if TYPE_CHECKING:\n    from imu_fast.ops.b import f\n",
            "imu_fast/ops/b.py": "from . import a\n",
        },
        [
            "imu_fast/ops/a.py:2 imports imu_fast/ops/b.py",
            "imu_fast/ops/b.py:1 imports imu_fast/ops/a",
        ],
    ),
    "three files": (
        house.circles,
        {
            "imu_fast/ops/a.py": "import imu_fast.ops.b\n",
            "imu_fast/ops/b.py": "import imu_fast.ops.c\n",
            "imu_fast/ops/c.py": "import imu_fast.ops.a\n",
            "imu_fast/ops/d.py": "import imu_fast.ops.a\n",
        },
        [f"ops/{a}.py:1 imports imu_fast/ops/{b}.py" for a, b in ("ab", "bc", "ca")],
    ),
    "two rooms, though no two files": (
        house.circles,
        {
            "imu_fast/ops/a.py": "import imu_fast.solvers.x\n",
            "imu_fast/ops/b.py": "",
            "imu_fast/solvers/x.py": "",
            "imu_fast/solvers/y.py": "import imu_fast.ops.b\n",
        },
        [
            "imu_fast/ops/a.py:1 imports imu_fast/solvers/x.py",
            "imu_fast/solvers/y.py:1 imports imu_fast/ops/b.py",
        ],
    ),
    "a folder and a file beside it": (
        house.circles,
        {
            "imu_fast/unlearning/subject.py": "from imu_fast.unlearning.ascent.graph import G\n",
            "imu_fast/unlearning/ascent/graph.py": "",
            "imu_fast/unlearning/ascent/head.py": "from imu_fast.unlearning.subject import S\n",
        },
        [
            "imu_fast/unlearning/subject.py:1 imports imu_fast/unlearning/ascent/graph.py",
            "imu_fast/unlearning/ascent/head.py:1 imports imu_fast/unlearning/subject.py",
        ],
    ),
    "a folder's __init__ and a file of it": (
        house.circles,
        {"imu_fast/ops/__init__.py": "from imu_fast.ops.a import f\n", "imu_fast/ops/a.py": ""},
        [
            "imu_fast/ops/__init__.py:1 imports imu_fast/ops/a.py",
            "imports imu_fast/ops/__init__.py",
        ],
    ),
    "through a folder's __init__": (
        house.circles,
        {
            "imu_fast/ops/__init__.py": "import imu_fast.solvers.x\n",
            "imu_fast/ops/a.py": "",
            "imu_fast/solvers/x.py": "import imu_fast.ops.a\n",
        },
        [
            "imu_fast/ops/__init__.py:1 imports imu_fast/solvers/x.py",
            "imu_fast/solvers/x.py:1 imports imu_fast/ops/a.py",
        ],
    ),
    "a listing of files that list it": (
        house.circles,
        {
            "imu_fast/ops/every.py": 'import_module(f"imu_fast.ops.{name}")\n',
            "imu_fast/ops/a.py": "from imu_fast.ops.every import f\n",
        },
        ["imu_fast/ops/every.py:1 imports imu_fast/ops/a.py", "imu_fast/ops/a.py:1 imports"],
    ),
    "a kernel that imports ours": (
        house.kernel_imports,
        {"kernels/gram.py": "def f():\n    from imu_fast.errors import E\n", **EMPTY},
        ["kernels/gram.py:2 imports imu_fast/errors.py"],
    ),
    "a kernel that imports ours, relatively": (
        house.kernel_imports,
        {"kernels/gram.py": "from .. import errors\n", **EMPTY},
        ["kernels/gram.py:1 imports imu_fast/__init__.py"],
    ),
    "a kernel that imports another library": (
        house.kernel_imports,
        {"kernels/gram.py": "import numpy as np\n"},
        ["kernels/gram.py:1 imports numpy"],
    ),
    "a kernel that imports what is named alike": (
        house.kernel_imports,
        {"kernels/gram.py": "import imu_fast.kernels_of_mine\n"},
        ["kernels/gram.py:1 imports imu_fast.kernels_of_mine"],
    ),
    "who is not to ask": (
        house.backend_users,
        {
            "imu_fast/backend.py": "",
            "imu_fast/factors/a.py": "def f():\n    from imu_fast import backend\n",
            "imu_fast/unlearning/depth.py": "from imu_fast.backend import record_backends\n",
        },
        [
            "imu_fast/factors/a.py:2 imports imu_fast/backend.py",
            "imu_fast/unlearning/depth.py:1 imports imu_fast/backend.py",
        ],
    ),
    "sixteen parameters": (
        house.long_signatures,
        {"imu_fast/ops/gram.py": f"def f({LONG}, *, more): ...\n"},
        ["imu_fast/ops/gram.py:1 f has 16 parameters"],
    ),
    "sixteen, of which one takes many": (
        house.long_signatures,
        {
            "imu_fast/ops/a.py": f"def f({LONG}, **more): ...\n",
            "imu_fast/ops/b.py": f"def f({LONG}, *more): ...\n",
            "imu_fast/ops/c.py": f"f = lambda {LONG}, /, more: 0\n",
        },
        [
            f"imu_fast/ops/{n}.py:1 {f} has 16"
            for n, f in (("a", "f"), ("b", "f"), ("c", "a lambda"))
        ],
    ),
    "sixteen, of a method": (
        house.long_signatures,
        {
            "imu_fast/ops/a.py": f"class A:\n    async def m(self, {LONG}, b): ...\n",
            "imu_fast/ops/b.py": f"class A:\n    @staticmethod\n    def m({LONG}, b): ...\n",
            "imu_fast/ops/c.py": f"class A:\n    def m(self):\n        def g({LONG}, b): ...\n",
        },
        [f"imu_fast/ops/{name}.py" for name in "abc"],
    ),
    "sixteen, beside a kernel": (
        house.long_signatures,
        {"kernels/gram.py": f"def launch({LONG}, more): ...\n"},
        ["kernels/gram.py:1 launch has 16"],
    ),
    "four hundred lines and one": (
        house.long_files,
        {"imu_fast/ops/gram.py": "x = 1\n" * 401, "kernels/gram.py": "x = 1\n" * 401},
        ["imu_fast/ops/gram.py has 401 lines", "kernels/gram.py has 401 lines"],
    ),
    "a citation": (
        house.spec_citations,
        {
            name: "\nSee SPEC section 2.\n"
            for name in (
                "README.md",
                "imu_fast/a.py",
                "kernels/b.py",
                "csrc/c.h",
                "bench/d.sh",
                "docs/e.md",
            )
        },
        [
            "README.md:2",
            "imu_fast/a.py:2",
            "kernels/b.py:2",
            "csrc/c.h:2",
            "bench/d.sh:2",
            "docs/e.md:2",
        ],
    ),
    "tests that are a package": (
        house.packages_of_tests,
        {"tests/ops/__init__.py": ""},
        ["tests/ops/__init__.py"],
    ),
    "an exception that nobody needs": (
        house.unused_exceptions,
        {"imu_fast/backend.py": "from imu_fast import _C\n", "imu_fast/ops/a.py": ""},
        ["backend imports _C_cuda", "imu_fast.ops imports backend", "ops imports reference"],
    ),
}


@pytest.mark.parametrize("rule, texts", KEPT.values(), ids=KEPT)
def test_a_rule_lets_pass(rule, texts, tmp_path):
    assert rule(build(tmp_path, texts)) == []


@pytest.mark.parametrize("rule, texts, said", BROKEN.values(), ids=BROKEN)
def test_a_rule_can_fail(rule, texts, said, tmp_path):
    lines = "\n".join(rule(build(tmp_path, texts)))
    assert all(part in lines for part in said), lines


def test_a_circle_is_named_by_its_own_files_alone(tmp_path):
    """One imports the circle, another is imported by it."""
    texts = {
        "imu_fast/ops/before.py": "import imu_fast.ops.a\n",
        "imu_fast/ops/a.py": "import imu_fast.ops.b\nimport imu_fast.ops.after\n",
        "imu_fast/ops/b.py": "import imu_fast.ops.a\n",
        "imu_fast/ops/after.py": "",
    }
    assert house.circles(build(tmp_path, texts)) == [
        "a circle in imu_fast/ops/: imu_fast/ops/a.py:1 imports imu_fast/ops/b.py; "
        "imu_fast/ops/b.py:1 imports imu_fast/ops/a.py"
    ]


def test_every_rule_is_shown_to_pass_and_to_fail():
    rules = {*house.RULES, house.unused_exceptions}
    assert {rule for rule, _, _ in BROKEN.values()} == rules
    assert {rule for rule, _ in KEPT.values()} | {house.unused_exceptions} == rules


def test_every_import_is_seen_where_it_is():
    """The files of this repository, under the names that they are imported by."""
    found = house.files(ROOT)
    assert {"imu_fast", "imu_fast.ops", "imu_fast.ops.gram", "imu_fast.kernels.gram"} <= set(found)
    assert found["imu_fast.ops"].name == "__init__.py"
    assert found["imu_fast.kernels.gram"] == ROOT / "kernels" / "gram.py"
    seen = {(one.importer, one.imported) for one in house.imports(ROOT)}
    assert ("imu_fast.ops.operation", "imu_fast.reference") in seen, "in a function"
    assert ("imu_fast.ops.gram", "imu_fast.kernels.gram") in seen, "of a kernel"
    assert ("imu_fast.backend", "imu_fast._C") in seen, "compiled"
    assert ("imu_fast", "imu_fast.unlearning.unlearn") in seen, "by the root"


BLOCKED = """
import sys
sys.modules["triton"] = None
sys.modules["imu_fast._C"] = sys.modules["imu_fast._C_cuda"] = None
import imu_fast as imu
loaded = [m for m in sys.modules if m.startswith("imu_fast.") and sys.modules[m]]
assert not loaded, "importing is lazy"
assert "torch" not in sys.modules
import torch
assert not imu.backends()["extension"].available and not imu.backends()["triton"].available
x = imu.damped_cholesky_solve(torch.eye(2), torch.ones(2), 1.0)
assert torch.allclose(x, torch.tensor([0.5, 0.5]))
"""


def test_works_without_triton_and_without_the_extension():
    subprocess.run([sys.executable, "-c", BLOCKED], check=True, timeout=120)


def test_functions_are_not_hidden_by_their_modules():
    code = (
        "import imu_fast.unlearning.unlearn, imu_fast.model.capture, imu_fast as imu;"
        "assert callable(imu.unlearn) and callable(imu.capture);"
        "assert all(hasattr(imu, name) for name in dir(imu))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
