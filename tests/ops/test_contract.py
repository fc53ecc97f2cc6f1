"""What every operation keeps, whichever backend runs it.

A new file in ``imu_fast/ops`` is here by existing: it needs a definition in ``reference.py`` and
operands in its own ``test_parity_*.py``.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, Case, assert_close

from imu_fast import reference
from imu_fast.backend import backends, interpreted, record_backends, use_backend
from imu_fast.errors import BackendUnavailableError, InputError
from imu_fast.ops import tokens
from imu_fast.ops.named import operations

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OPERATIONS = operations()
LARGE = Case("larger than a tile on every axis", (1,) * 150, 140, 139)
ALL = [*CASES, LARGE]
SHORT = [case for case in ALL if len(case.lengths) < 1000]
TRITON = backends()["triton"].available
FILES = {path.stem.removeprefix("test_parity_"): path for path in HERE.glob("test_parity_*.py")}


def operands():
    """Operation -> what its operands are called -> (case, dtype) -> Call, or None: not of these."""
    found = {}
    for name, path in FILES.items():
        spec = importlib.util.spec_from_file_location(f"operands_of_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found |= module.OPERANDS
    return found


OPERANDS = operands()
VARIANTS = [(name, variant) for name in OPERATIONS for variant in OPERANDS.get(name, {})]
every_operation = pytest.mark.parametrize("name", OPERATIONS)
every_variant = pytest.mark.parametrize("name, variant", VARIANTS)


def tensors(value):
    """The tensors in a result or an operand, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for part in value for tensor in tensors(part)]
    return []


def made(name, variant, case, dtype):
    torch.manual_seed(0)
    call = OPERANDS[name][variant](case, dtype)
    if call is None:
        pytest.skip("not of this case")
    return call


def run(name, call, backend):
    """The results, then the operands that are changed, and what is said to have run."""
    with use_backend(backend), record_backends() as used:
        found = OPERATIONS[name](*call.args, **call.named)
    return [*tensors(found), *tensors(tuple(call.args[i] for i in call.changes))], used


def check(name, variant, case, dtype, backend):
    """Against the definition in float64 of the same numbers; nothing else is changed."""
    call = made(name, variant, case, dtype)
    before = copy.deepcopy([call.args, call.named])
    found, used = run(name, call, backend)
    truth, _ = run(name, made(name, variant, case, dtype), "reference")
    kernel = OPERATIONS[name].kernel is not None
    assert used[name] == (backend if kernel else "torch")
    assert len(found) == len(truth)
    device = tensors(call.args)[0].device
    sizes = call.sizes if len(call.sizes) > 1 else [*call.sizes] * len(found)
    for i, (a, b) in enumerate(zip(found, truth, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape and a.device == device
        assert_close(a, b, call.length, sizes[i])
    for i, (value, old) in enumerate(zip(call.args, before[0], strict=True)):
        for a, b in zip(tensors(value), tensors(old), strict=True):
            assert i in call.changes or torch.equal(a, b), f"operand {i} was changed"


@every_variant
@pytest.mark.parametrize(
    ("dtype", "case"),
    # Rows in chunks are the same lines in either dtype, and a thousand rows the definition's time.
    [(torch.float32, case) for case in ALL] + [(torch.float64, case) for case in SHORT],
    ids=lambda value: getattr(value, "why", str(value)),
)
def test_pytorch_agrees_with_the_definition(name, variant, case, dtype):
    check(name, variant, case, dtype, "torch")


@pytest.mark.parametrize(
    "name, variant", [v for v in VARIANTS if TRITON and OPERATIONS[v[0]].kernel]
)
@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.why)
def test_kernels_agree_with_the_definition(name, variant, case):
    """On a GPU, and where test_kernels_interpreted.py runs this without one."""
    with torch.device("cpu" if interpreted() else "cuda"):
        call = made(name, variant, case, torch.float32)
        if OPERATIONS[name].limits(*call.args, **call.named):
            pytest.skip("no kernel for such operands")
        check(name, variant, case, torch.float32, "triton")


HALF = {"softmax_residual", "linear_softmax_normaliser", "linear_softmax_residual"}
HALF |= {"head_ascent", "head_ascent_gradient"}


# Whose inputs alone may be: those of a half-precision model's factors.
ACT = {"mean_gradient", "fisher_diagonal", "bilinear_scores", "quadratic_scores"}
ACT |= {"gradient_norms", "gram", "cross_gram", "ggn_product"}


def narrow_inputs(name, args, half):
    """A call's operands with act in half precision, and the same numbers in float32."""
    names = list(inspect.signature(OPERATIONS[name]).parameters)

    def cast(args, widen):
        def one(act):
            return act.to(half).float() if widen else act.to(half)

        def operand(what, value):
            if isinstance(value, tuple):
                return value[0], one(value[1]), value[2]
            return one(value) if what == "act" else value

        return [operand(what, value) for what, value in zip(names, args, strict=False)]

    return cast(args, False), cast(args, True)


@pytest.mark.parametrize("name, variant", [v for v in VARIANTS if v[0] in ACT])
@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.why)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_inputs_may_be_narrower_than_the_signal(name, variant, case, half, monkeypatch):
    """Some tokens at a time, which changes rounding alone."""
    monkeypatch.setattr(tokens, "WIDENED_TOKENS", 40)
    call = made(name, variant, case, torch.float32)
    narrow, wide = narrow_inputs(name, call.args, half)
    found, truth = (
        run(name, type(call)(args, call.length, call.sizes, call.named), backend)[0][0]
        for args, backend in ((narrow, "torch"), (wide, "reference"))
    )
    assert found.dtype == torch.float32
    sizes = call.sizes[0]
    # float16 and bfloat16 change numbers a little, and so the size of sums.
    assert_close(found, truth, call.length, None if sizes is None else 1.02 * sizes)


@pytest.mark.parametrize("name, variant", [v for v in VARIANTS if v[0] in HALF])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(name, variant, dtype):
    """Of the operations that may meet it in all of their operands."""
    check(name, variant, CASES[1], dtype, "torch")


@every_variant
def test_the_reference_is_computed_in_float64(name, variant):
    """Of float32 operands as of the same numbers in float64, but for the last rounding."""
    call = made(name, variant, CASES[1], torch.float32)

    def wide(value):
        if isinstance(value, tuple):
            parts = [wide(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if floating else value

    exact = made(name, variant, CASES[1], torch.float32)
    exact = type(exact)(wide(exact.args), exact.length, exact.sizes, exact.named, exact.changes)
    found, used = run(name, call, "reference")
    truth, _ = run(name, exact, "reference")
    assert used[name] == "reference"
    for a, b in zip(found, truth, strict=True):
        assert b.dtype in (torch.float64, a.dtype)
        eps = torch.finfo(a.dtype).eps
        # A preconditioner is the caller's, in its own dtype.
        torch.testing.assert_close(a, b.to(a.dtype), rtol=2 * eps, atol=2 * eps)


@every_operation
def test_the_definition_is_what_the_reference_runs(name, monkeypatch):
    def called(*args, **named):
        raise ZeroDivisionError

    variant = next(iter(OPERANDS[name]))
    call = made(name, variant, CASES[1], torch.float64)
    assert inspect.getdoc(getattr(reference, name))
    monkeypatch.setattr(reference, name, called)
    with use_backend("reference"), pytest.raises(ZeroDivisionError):
        OPERATIONS[name](*call.args, **call.named)
    run(name, call, "torch")


@pytest.mark.skipif(TRITON, reason="kernels run here")
@every_operation
def test_a_kernel_that_cannot_run_is_refused_by_name(name, monkeypatch):
    """And what has none is in PyTorch under every backend but the reference."""
    monkeypatch.setenv("IMU_FAST_BACKEND", "triton")
    call = made(name, next(iter(OPERANDS[name])), CASES[1], torch.float32)
    operation = OPERATIONS[name]
    if operation.kernel is None:
        calls = []
        monkeypatch.setattr(operation, "body", lambda *args, **named: calls.append(args))
        with record_backends() as used:
            operation(*call.args, **call.named)
        assert used == {name: "torch"} and len(calls) == 1
        return
    message = (
        f"^backend='triton' cannot run {name}: its input is on cpu, not on a CUDA device; use "
        "'torch' or 'auto'$"
    )
    with pytest.raises(BackendUnavailableError, match=message):
        operation(*call.args, **call.named)


KERNELS = [name for name in OPERATIONS if OPERATIONS[name].kernel is not None]


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_take_no_float64(name):
    """Whichever operand it is: one at a time among those of a dtype that they take."""
    for variant in OPERANDS[name]:
        call = made(name, variant, CASES[1], torch.float32)
        assert OPERATIONS[name].limits(*call.args, **call.named) == ""
        wide = made(name, variant, CASES[1], torch.float64)
        said = OPERATIONS[name].limits(*wide.args, **wide.named)
        assert "torch.float64" in said


@every_operation
def test_operands_by_name_are_those_in_order(name):
    call = made(name, next(iter(OPERANDS[name])), CASES[1], torch.float64)
    again = made(name, next(iter(OPERANDS[name])), CASES[1], torch.float64)
    signature = inspect.signature(OPERATIONS[name])
    by_name = signature.bind(*again.args, **again.named).arguments
    by_name = type(call)((), call.length, call.sizes, by_name)
    for backend in ("torch", "reference"):
        found, _ = run(name, call, backend)
        named, _ = run(name, by_name, backend)
        for a, b in zip(found, named, strict=False):
            assert torch.equal(a, b)


@every_operation
def test_an_operation_is_the_function_of_its_name(name):
    operation = OPERATIONS[name]
    assert inspect.getdoc(operation) == inspect.getdoc(operation.body)
    assert pickle.loads(pickle.dumps(operation)) is operation


@every_variant
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_an_operand_that_requires_a_gradient_has_one_or_is_refused(name, variant, backend):
    """Whichever operand it is, by its place or its name; without autograd it is taken."""
    call = made(name, variant, CASES[1], torch.float64)
    signature = inspect.signature(OPERATIONS[name])

    def require(value):
        if isinstance(value, tuple):
            parts = [require(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.clone().requires_grad_() if floating else value

    asked = 0
    for i, operand in enumerate(call.args):
        args = [*call.args[:i], require(operand), *call.args[i + 1 :]]
        if not any(tensor.requires_grad for tensor in tensors(args[i])):
            continue
        asked += 1
        by_name = signature.bind(*args, **call.named)
        with use_backend(backend):
            if OPERATIONS[name].differentiable:
                assert OPERATIONS[name](*args, **call.named).requires_grad or i
                continue
            message = f"^{name} has no derivative, and an operand requires a gradient; detach it"
            with pytest.raises(InputError, match=message):
                OPERATIONS[name](*args, **call.named)
            with pytest.raises(InputError, match=message):
                OPERATIONS[name](**by_name.arguments)
            if i not in call.changes:
                with torch.no_grad():
                    OPERATIONS[name](*copy.deepcopy(args), **call.named)
    assert asked


PAGE = (ROOT / "docs" / "ops.md").read_text()


def rows_of_the_page():
    rows = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows}


def test_every_operation_is_on_its_page_and_nothing_else():
    assert set(rows_of_the_page()) == {*OPERATIONS, "damped_cholesky_solve"}


@every_operation
def test_the_page_says_what_the_operation_is(name):
    operation = OPERATIONS[name]
    where, result, kernel, half, derivative = rows_of_the_page()[name]
    assert f"imu_fast.{where.strip('`')}" == operation.body.__module__
    assert kernel == ("triton" if operation.kernel is not None else "")
    assert half == ("half" if name in HALF else "act" if name in ACT else "")
    assert (derivative == "refused") != operation.differentiable
    assert result
    section = PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    code = "\n".join(section.split("```python\n")[1:])
    assert f"{operation.body.__name__}(" in code, f"no code that calls {name}"


@every_operation
def test_its_docstring_says_what_it_takes_and_returns(name):
    text = inspect.getdoc(OPERATIONS[name])
    assert "\nArgs:\n" in text and "\nReturns:\n" in text
    takes = text.partition("\nArgs:\n")[2].partition("\nReturns:\n")[0]
    for parameter in inspect.signature(OPERATIONS[name]).parameters:
        assert re.search(rf"\b{parameter}\b", takes), f"{name}: nothing is said of {parameter}"


# Why an operation's file, by its name, is not in a place.
NO_KERNEL = {
    "mean_gradient": "one product of matrices, which is the library's",
    "objective": "elementwise after one softmax, fused where it counts: kernels/head_ascent.py",
}
NO_BENCHMARK = {"objective": "a part of every step that bench/test_head_ascent.py times"}


def test_every_operation_has_operands():
    assert set(OPERANDS) == set(OPERATIONS)


@every_operation
def test_one_operation_one_name_four_places(name):
    file = OPERATIONS[name].body.__module__.removeprefix("imu_fast.ops.")
    assert callable(getattr(reference, name)), "no definition in imu_fast/reference.py"
    assert (ROOT / "imu_fast" / "ops" / f"{file}.py").is_file()
    assert name in FILES_OF[file], f"tests/ops/test_parity_{file}.py has no operands of {name}"
    for folder, stem, reasons in (
        ("kernels", file, NO_KERNEL),
        ("bench", f"test_{file}", NO_BENCHMARK),
    ):
        there = (ROOT / folder / f"{stem}.py").is_file()
        assert there != (file in reasons), f"{folder}/{stem}.py, or a reason why there is none"
    if OPERATIONS[name].kernel is not None:
        assert file not in NO_KERNEL


FILES_OF = {
    file: {k for k, op in OPERATIONS.items() if op.body.__module__ == f"imu_fast.ops.{file}"}
    for file in FILES
}


def test_every_place_is_of_an_operation():
    files = {operation.body.__module__.rpartition(".")[2] for operation in OPERATIONS.values()}
    assert set(FILES) == files
    kernels = {path.stem for path in (ROOT / "kernels").glob("*.py")}
    assert kernels - {"__init__", "specialisation"} == files - set(NO_KERNEL)
    for file in files - set(NO_KERNEL):
        assert any(op.kernel for n, op in OPERATIONS.items() if n in FILES_OF[file]), file


LAZY = """
import sys
import torch
from imu_fast.ops import tokens
from imu_fast.ops.named import operations
from imu_fast.ops.mean_gradient import mean_gradient
operations()
mean_gradient(torch.ones(2, 3), torch.ones(2, 4), torch.arange(3), True)
late = ("imu_fast.reference", "imu_fast.kernels", "triton")
assert not (loaded := [m for m in sys.modules if m.startswith(late)]), loaded
"""


def test_neither_the_reference_nor_kernels_are_loaded_before_they_run():
    subprocess.run([sys.executable, "-c", LAZY], check=True, timeout=120)
