"""In what products are made: who decides, what is recorded, and what half precision keeps."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import imu_fast as imu
from imu_fast import precision
from imu_fast.backend import record_backends
from imu_fast.errors import InputError
from imu_fast.ops.mean_gradient import mean_gradient
from imu_fast.precision import PRECISIONS, ROUNDING, asked_precision, at_least, precision_of

# Before 2.9 torch has one setting for CUDA, which is on or off, and none for the CPU.
by_name = pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9"
)
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _as_torch_comes(monkeypatch):
    monkeypatch.delenv("IMU_FAST_PRECISION", raising=False)
    monkeypatch.delenv("IMU_FAST_BACKEND", raising=False)


@pytest.fixture
def tf32():
    with precision.torch_multiplies_in("tf32"):
        yield


def test_the_argument_is_over_the_environment_over_torch_over_the_dtypes(monkeypatch, tf32):
    assert asked_precision() == "auto" and precision_of([F32]) == "tf32"
    monkeypatch.setenv("IMU_FAST_PRECISION", "tf32x3")
    assert asked_precision() == precision_of([F32]) == precision_of([F32, BF16]) == "tf32x3"
    with imu.use_precision("ieee"):
        assert precision_of([F32]) == precision_of([F32, F16]) == "ieee"
        with imu.use_precision("auto"):
            assert precision_of([F32]) == "tf32"
        assert asked_precision() == "ieee"
    with pytest.raises(ZeroDivisionError), imu.use_precision("bf16"):
        raise ZeroDivisionError
    assert asked_precision() == "tf32x3"


DEFAULTS = [
    ([F32], "ieee"),
    ([F64], "ieee"),
    ([F32, F64], "ieee"),
    ([F32, BF16], "bf16"),
    ([BF16, BF16], "bf16"),
    ([F32, F16], "tf32"),
    ([BF16, F16], "tf32"),
]


@pytest.mark.parametrize("dtypes, expected", DEFAULTS)
def test_the_default_of_each_dtype(dtypes, expected):
    assert precision_of(dtypes) == expected


@pytest.mark.parametrize("asked", PRECISIONS)
def test_float64_is_float64(asked):
    with imu.use_precision(asked):
        assert precision_of([F64, F32]) == "ieee"


@pytest.mark.parametrize("name", ["fp32", "", "TF32"])
def test_an_unknown_name_lists_those_that_are_known(name, monkeypatch):
    known = "is unknown; choose one of auto, ieee, tf32x3, tf32, bf16"
    with pytest.raises(InputError, match=f"^precision='{name}' {known}$"):
        with imu.use_precision(name):
            raise AssertionError
    monkeypatch.setenv("IMU_FAST_PRECISION", name)
    with pytest.raises(InputError, match=f"^IMU_FAST_PRECISION='{name}' {known}$"):
        mean_gradient(torch.ones(2, 3), torch.ones(2, 4), torch.arange(3), True)


def test_a_precision_is_never_lowered():
    order = [ROUNDING[name] for name in PRECISIONS]
    assert order == sorted(order)
    for wanted in PRECISIONS:
        for there in (("ieee",), ("ieee", "tf32"), ("ieee", "tf32x3", "tf32"), PRECISIONS):
            found = at_least(wanted, there)
            assert found in there and ROUNDING[found] <= ROUNDING[wanted]
            assert all(
                ROUNDING[one] > ROUNDING[wanted] or ROUNDING[one] <= ROUNDING[found]
                for one in there
            )


@by_name
@pytest.mark.parametrize("setting, expected", [("tf32", "tf32"), ("ieee", "ieee")])
def test_it_follows_either_of_torchs_settings(setting, expected):
    """The newer one makes the older one's getter raise, even where both would agree."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        torch.set_float32_matmul_precision("high" if setting == "tf32" else "highest")
        assert precision_of([F32]) == expected
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = setting
        assert precision_of([F32]) == expected
    finally:
        matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def test_a_choice_is_of_its_context_and_the_environment_of_every_thread(monkeypatch):
    found = []

    def look():
        found.append(asked_precision())

    with imu.use_precision("bf16"):
        for value in (None, "tf32"):
            if value is not None:
                monkeypatch.setenv("IMU_FAST_PRECISION", value)
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
    assert found == ["auto", "tf32"]


# Torch's settings while an operation runs

torch.manual_seed(0)
OPERANDS = (torch.randn(9, 3), torch.randn(9, 4), torch.arange(10), True)


def on_the_cpu(setting):
    """oneDNN's setting, where this torch has it."""
    if not hasattr(torch.backends.mkldnn.matmul, "fp32_precision"):
        pytest.skip("torch before 2.9")
    return precision.torch_multiplies_in(setting, "cpu")


@by_name
@pytest.mark.parametrize("asked", PRECISIONS)
def test_on_the_cpu_products_are_as_exact_as_there_is(asked):
    """And no less than was asked for, however torch is set."""
    expected = mean_gradient(*OPERANDS)
    with on_the_cpu("bf16"), imu.use_precision(asked), record_backends() as ran:
        assert torch.equal(mean_gradient(*OPERANDS), expected)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert ran.precisions == {"mean_gradient": "ieee"}


@by_name
def test_without_a_choice_the_cpu_multiplies_as_torch_is_set_and_says_so():
    with on_the_cpu("bf16"), record_backends() as ran:
        mean_gradient(*OPERANDS)
        mean_gradient(*(x.double() if x is not OPERANDS[2] else x for x in OPERANDS[:3]), True)
    assert ran.precisions == {"mean_gradient": "bf16, ieee"}


class OnDevice(torch.Tensor):
    """A tensor that says it is on a CUDA device."""

    is_cuda = property(lambda self: True)


@by_name
@pytest.mark.parametrize("of_torch", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("asked", ["auto", *PRECISIONS])
@pytest.mark.parametrize("half", [False, True])
def test_on_a_gpu_pytorch_has_two_of_them(of_torch, asked, half, monkeypatch):
    """The next more exact one; put back whatever happens."""
    seen = []

    def body(delta, act, *_):
        seen.append(precision.float32_products())
        raise ZeroDivisionError

    monkeypatch.setattr(mean_gradient, "body", body)
    delta, act = (x.as_subclass(OnDevice) for x in OPERANDS[:2])
    act = act.bfloat16() if half else act
    own = "tf32" if of_torch == "tf32" else "ieee"
    expected = {"auto": "tf32" if half else own, "tf32": "tf32", "bf16": "tf32"}.get(asked, "ieee")
    with precision.torch_multiplies_in(of_torch), imu.use_precision(asked):
        with record_backends() as ran, pytest.raises(ZeroDivisionError):
            mean_gradient(delta, act, *OPERANDS[2:])
        assert precision.float32_products() == of_torch
    assert ran.precisions == {"mean_gradient": expected}
    assert ("tf32" if seen == ["tf32"] else "ieee") == expected


def test_unlearning_says_in_what_it_multiplied():
    model, data = nn.Linear(4, 3), (torch.randn(6, 4), torch.arange(6) % 3)
    result = imu.unlearn(model, data, "imu", epochs=1)
    assert result.precisions["head_ascent"] == result.precisions["bilinear_scores"] == "ieee"
    assert set(result.precisions) <= set(result.backends)
    assert "softmax_residual" not in result.precisions, "which multiplies no matrices"
