"""The rules of the house, each a function of a tree: what breaks it, a line each, with both files.

A tree is a folder with ``imu_fast/`` in it, and what else a rule reads. test_architecture.py holds
this repository to them, and each rule to small trees that keep it and that break it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = "imu_fast"
# From the top of the house to its foundations: a file imports its own floor or lower ones.
FLOORS = (
    ("__main__", "cli", "study", "integrations", "check"),
    ("attribution", "evaluation", "unlearning"),
    ("importance", "influence"),
    ("curvature", "model"),
    ("factors",),
    ("losses", "solvers", "ops"),
    ("kernels", "_C", "_C_cuda"),
    (
        *("ambient", "backend", "distributed", "errors", "options", "precision", "setting"),
        *("reference", "reference_ggn", "storage"),
    ),
)
FLOOR = {room: depth for depth, rooms in enumerate(FLOORS) for room in rooms}
BOTTOM = len(FLOORS) - 1
# Files that a door reads: of the bottom they may import, and be imported by the top alone.
LEAF = "data"
# (importing room, imported room): why it goes up, or past a door, all the same.
STATED = {
    ("backend", "_C"): "asks whether it loads",
    ("backend", "_C_cuda"): "asks whether it loads",
}
ORACLE = {
    "ops": "an operation's definition, when use_backend('reference') asks for it",
    "check": "compares this machine with it",
}
# Module or room: why it asks about backends, or names one.
ASKS = {
    "imu_fast": "the public names backends and use_backend",
    "imu_fast.ops": "picks what runs",
    "imu_fast.check": "runs each backend in turn, by name",
    "imu_fast.cli.doctor": "says what there is",
    "imu_fast.unlearning.unlearn": "reports what ran",
    "imu_fast.solvers.cholesky": "whether its extension loads, and products of torch's own",
}
ROOT = "the root re-exports everything, lazily: only the top floor imports it"
LIBRARIES = {"torch", "triton"}
MAX_PARAMETERS, MAX_LINES = 15, 400


@dataclass(frozen=True)
class Import:
    """One file's import of a module of ours."""

    importer: str
    imported: str
    line: int


def files(tree: Path) -> dict[str, Path]:
    """Module -> its file; the folder kernels/ is installed as imu_fast.kernels."""
    found = {}
    for folder, name in ((tree / PACKAGE, PACKAGE), (tree / "kernels", f"{PACKAGE}.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((name, *parts))] = path
    return found


def shown(tree: Path, module: str) -> str:
    """A module as its file."""
    path = files(tree).get(module)
    return str(path.relative_to(tree)) if path else module


@cache
def _parsed(path: Path, stamp: int) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def parsed(path: Path) -> ast.Module:
    return _parsed(path, path.stat().st_mtime_ns)


def named_in(node: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What one statement imports: a module, and names of it (which may be modules too)."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, ()) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = module.split(".")
            parts = parts[: len(parts) - node.level + is_package]
            base = ".".join([*parts, *([base] if base else [])])
        yield base, tuple(alias.name for alias in node.names)
    elif isinstance(node, ast.Call) and node.args:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
        called = called.id if isinstance(called, ast.Name) else called
        first = node.args[0]
        if called in ("import_module", "__import__"):
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value, ()
            elif isinstance(first, ast.JoinedStr) and isinstance(first.values[0], ast.Constant):
                # f"imu_fast.ops.{name}" may be any of them.
                yield f"{first.values[0].value.rpartition('.')[0]}.", ()


def imports(tree: Path) -> list[Import]:
    """Every import among the files of the package: in functions and for types too."""
    known = files(tree)
    found = []
    for module, path in known.items():
        for node in ast.walk(parsed(path)):
            for base, names in named_in(node, module, path.stem == "__init__"):
                found += [
                    Import(module, target, node.lineno)
                    for target in _targets(base, names, known)
                    if target != module
                ]
    return found


def _targets(base: str, names: tuple[str, ...], known: dict[str, Path]) -> set[str]:
    """Modules of ours that an import of these names loads: none if it is another library's."""
    if base.partition(".")[0] != PACKAGE:
        return set()
    if base.endswith("."):
        return {module for module in known if module.startswith(base)}
    modules = {f"{base}.{name}" for name in names}
    found = {m for m in modules if m in known or m in (f"{PACKAGE}._C", f"{PACKAGE}._C_cuda")}
    # A name that is no module is of the base itself: its file, or its __init__.
    return found if found and len(found) == len(names) else {*found, base}


def room(module: str) -> str:
    """The first folder or file under the package; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def outside_floors(tree: Path) -> list[str]:
    """Rooms of which nobody has said on which floor they are."""
    rooms = {room(module) for module in files(tree)} - {"", LEAF} - set(FLOOR)
    return [
        f"{PACKAGE}/{name}: say on which floor of tests/house.py it is" for name in sorted(rooms)
    ]


def upward_imports(tree: Path) -> list[str]:
    """Imports that run up the list of floors, or past a door that is stated."""
    broken = []
    for one in imports(tree):
        where, wanted = room(one.importer), room(one.imported)
        if where == wanted or not where or (where, wanted) in STATED:
            continue
        why = _why_not(where, wanted, one.imported)
        if why:
            broken.append(_line(tree, one, why))
    return broken


def _why_not(where: str, wanted: str, imported: str) -> str:
    top = where in FLOORS[0]
    if not wanted:
        return "" if top else ROOT
    if wanted.startswith("reference"):
        return "" if where in (*ORACLE, "reference") else "only ops/ reads the oracle"
    if wanted == LEAF:
        return "" if top else f"{LEAF}/ is read by cli/ and study/ alone"
    if wanted not in FLOOR:
        return f"{imported} is no room of ours"
    if FLOOR[wanted] < (BOTTOM if where == LEAF else FLOOR.get(where, BOTTOM)):
        return f"{wanted} is above {where}"
    return ""


def _line(tree: Path, one: Import, why: str) -> str:
    return f"{shown(tree, one.importer)}:{one.line} imports {shown(tree, one.imported)}: {why}"


def circles(tree: Path) -> list[str]:
    """Circles among what lies in one folder: its files and, each as one, the folders in it.

    A circle of modules is one of these wherever its files lie. What is imported runs the
    ``__init__`` of every folder that it lies in.
    """
    known = files(tree)
    edges: dict[str, dict[tuple[str, str], Import]] = {}
    for one in imports(tree):
        if PACKAGE in (one.importer, one.imported):
            continue  # re-exports everything, lazily
        folder, a, b = _siblings(one.importer, one.imported, known)
        edges.setdefault(folder, {}).setdefault((a, b), one)
    for package, path in known.items():
        if path.stem == "__init__" and package != PACKAGE:
            for a, b in list(edges.get(package, {})):
                for child in (a, b):
                    if child != package:
                        implied = Import(f"{package}.{child}", package, 1)
                        edges[package].setdefault((child, package), implied)
    return [
        f"a circle in {shown_folder(folder)}: "
        + "; ".join(
            f"{shown(tree, one.importer)}:{one.line} imports {shown(tree, one.imported)}"
            for pair, one in sorted(pairs.items())
            if set(pair) <= group
        )
        for folder, pairs in sorted(edges.items())
        for group in strongly_connected(set(pairs))
    ]


def shown_folder(package: str) -> str:
    return package.replace(".", "/") + "/"


def _siblings(importer: str, imported: str, known: dict[str, Path]) -> tuple[str, str, str]:
    """The innermost folder that holds both, and what of it each is in; its __init__ is itself."""
    a, b = _where(importer, known), _where(imported, known)
    shared = 0
    while shared < min(len(a), len(b)) - 1 and a[shared] == b[shared]:
        shared += 1
    folder = ".".join(a[:shared])
    return folder, a[shared] or folder, b[shared] or folder


def _where(module: str, known: dict[str, Path]) -> tuple[str, ...]:
    """Folders and file; a folder's __init__ is a file without a name in it."""
    parts = tuple(module.split("."))
    is_package = module in known and known[module].stem == "__init__"
    return (*parts, "") if is_package else parts


def strongly_connected(edges: set[tuple[str, str]]) -> list[set[str]]:
    """Groups of two or more nodes that all reach each other."""
    ahead: dict[str, set[str]] = {}
    for a, b in edges:
        ahead.setdefault(a, set()).add(b)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = ahead.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    reach = {node: reached(node) for node in ahead}
    groups: list[set[str]] = []
    for node in sorted(ahead):
        if node in reach[node] and not any(node in group for group in groups):
            groups.append({other for other in reach[node] if node in reach.get(other, set())})
    return groups


def kernel_imports(tree: Path) -> list[str]:
    """What kernels/ imports beside torch, triton, the standard library and each other."""
    broken = []
    for module, path in files(tree).items():
        if room(module) != "kernels":
            continue
        for node in ast.walk(parsed(path)):
            for base, _ in named_in(node, module, path.stem == "__init__"):
                top = base.partition(".")[0]
                fine = top in LIBRARIES or top in sys.stdlib_module_names
                if not fine and not f"{base}.".startswith(f"{PACKAGE}.kernels."):
                    broken.append(
                        f"{shown(tree, module)}:{node.lineno} imports {shown(tree, base)}: kernels "
                        "import torch, triton, the standard library and each other"
                    )
    return broken


def backend_users(tree: Path) -> list[str]:
    """Files that ask about backends, which ops/ alone is to do, and those that are stated."""
    return [
        _line(tree, one, "only ops/ knows about backends, and who is stated in tests/house.py")
        for one in imports(tree)
        if room(one.imported) == "backend" and _stated(one.importer) is None
    ]


def _stated(importer: str) -> str | None:
    within = (m for m in ASKS if f"{importer}.".startswith(f"{m}.") and m != PACKAGE)
    return importer if importer == PACKAGE else next(within, None)


def unused_exceptions(tree: Path) -> list[str]:
    """Exceptions that nothing needs any more."""
    found = imports(tree)
    pairs = {(room(one.importer), room(one.imported)) for one in found}
    asking = {_stated(one.importer) for one in found if room(one.imported) == "backend"}
    unused = [f"{a} imports {b}" for a, b in STATED if (a, b) not in pairs]
    unused += [f"{module} imports backend" for module in ASKS if module not in asking]
    here = {room(module) for module in files(tree)}
    unused += [
        f"{name} imports reference"
        for name in ORACLE
        if name in here and (name, "reference") not in pairs
    ]
    return [f"nothing needs the exception that {line}: take it out" for line in unused]


def long_signatures(tree: Path) -> list[str]:
    """Functions of more than 15 parameters, outside the command line.

    ``*args`` and ``**kwargs`` count, a method's own object does not. Kernels of triton.jit have
    none to count: each pointer and stride is one by the language.
    """
    broken = []
    for module, path in files(tree).items():
        if room(module) == "cli":
            continue
        methods = {
            item
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.ClassDef)
            for item in node.body
            if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))
        }
        for node in ast.walk(parsed(path)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            named = [ast.unparse(d) for d in getattr(node, "decorator_list", [])]
            if any(d.startswith("triton.jit") for d in named):
                continue
            a = node.args
            count = len([*a.posonlyargs, *a.args, *a.kwonlyargs])
            count += sum(x is not None for x in (a.vararg, a.kwarg))
            count -= node in methods and "staticmethod" not in named
            if count > MAX_PARAMETERS:
                name = getattr(node, "name", "a lambda")
                broken.append(
                    f"{shown(tree, module)}:{node.lineno} {name} has {count} parameters, more than "
                    f"{MAX_PARAMETERS}"
                )
    return broken


def long_files(tree: Path) -> list[str]:
    """Files of imu_fast/ and kernels/ of more than 400 lines."""
    return [
        f"{path.relative_to(tree)} has {lines} lines, more than {MAX_LINES}"
        for path in files(tree).values()
        if (lines := len(path.read_text().splitlines())) > MAX_LINES
    ]


def spec_citations(tree: Path) -> list[str]:
    """Citations of a document that no reader has."""
    places = ["README.md", *(("imu_fast", "kernels", "csrc", "bench", "docs", "examples"))]
    text = {".py", ".pyi", ".md", ".h", ".cpp", ".cu", ".sh", ".toml", ".j2", ".yaml", ".yml"}
    broken = []
    for place in places:
        root = tree / place
        for path in sorted([root] if root.is_file() else root.rglob("*")):
            if path.suffix not in text or not path.is_file() or path.is_symlink():
                continue
            for number, line in enumerate(path.read_text().splitlines(), start=1):
                if re.search(r"\bSPEC\b", line):
                    broken.append(f"{path.relative_to(tree)}:{number} cites SPEC: {line.strip()}")
    return broken


def packages_of_tests(tree: Path) -> list[str]:
    """An ``__init__.py`` among the tests, with which a wheel would be tested against the source."""
    return [
        f"{path.relative_to(tree)}: tests are no package"
        for path in sorted((tree / "tests").rglob("__init__.py"))
    ]


RULES = (
    outside_floors,
    upward_imports,
    circles,
    kernel_imports,
    backend_users,
    long_signatures,
    long_files,
    spec_citations,
    packages_of_tests,
)
