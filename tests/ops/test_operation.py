"""How an operation picks what runs it, by operations made here."""

from __future__ import annotations

import logging
import types

import pytest
import torch

from imu_fast import backend, reference
from imu_fast.errors import BackendUnavailableError
from imu_fast.ops import operation as module
from imu_fast.ops.named import operations
from imu_fast.ops.operation import first_tensor, kernel_dtypes, operation


class OnDevice(torch.Tensor):
    """A tensor that says it is on a CUDA device."""

    is_cuda = property(lambda self: True)


def on_device(*values):
    return torch.tensor(values).as_subclass(OnDevice)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("IMU_FAST_BACKEND", raising=False)
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    monkeypatch.setattr(backend, "why_no_triton", lambda: "")
    module._log_once.cache_clear()


def double(x, limit=""):
    """Twice x."""
    return "torch"


def define(given, x, limit=""):
    assert given is reference
    return "reference"


@pytest.fixture
def fast():
    return operation(
        reference=define, kernel=lambda x, limit="": "triton", limits=lambda x, limit="": limit
    )(double)


@pytest.fixture
def plain():
    return operation(reference=define)(double)


def used(call, *args, **named):
    with backend.record_backends() as found:
        result = call(*args, **named)
    assert found == {"double": result}
    return result


def test_automatic_is_the_kernel_on_its_device_alone(fast, plain):
    x, there = torch.ones(2), on_device(1.0)
    assert used(fast, x) == "torch" and used(fast, there) == "triton"
    assert used(fast, x=there) == "triton" and used(fast, (there, x)) == "triton"
    assert used(plain, x) == used(plain, there) == "torch"


def test_automatic_falls_back_and_says_why_once(fast, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING, "imu_fast"):
        for _ in range(3):
            assert used(fast, on_device(1.0), "it is Tuesday") == "torch"
        assert used(fast, torch.ones(1), "it is Wednesday") == "torch"
    message = "double runs in PyTorch, not in its Triton kernel: it is Tuesday"
    assert [record.message for record in caplog.records] == [message]
    monkeypatch.setattr(backend, "why_no_triton", lambda: "triton does not import")
    assert used(fast, on_device(1.0)) == "torch"
    assert caplog.records[-1].message.endswith("kernel: triton does not import")
    assert len(caplog.records) == 2


def test_limits_are_not_asked_for_elsewhere():
    def never(x):
        raise AssertionError

    made = operation(reference=define, kernel=never, limits=never)(double)
    assert made(torch.ones(1)) == "torch"
    with backend.use_backend("torch"):
        assert made(on_device(1.0)) == "torch"
    with backend.use_backend("reference"):
        assert made(on_device(1.0)) == "reference"


@pytest.mark.parametrize("chosen", ["torch", "reference"])
def test_a_choice_by_name_is_kept_on_every_device(fast, plain, chosen):
    with backend.use_backend(chosen):
        for call in (fast, plain):
            assert used(call, torch.ones(1)) == used(call, on_device(1.0)) == chosen
            assert used(call, on_device(1.0), "it is Tuesday") == chosen


def test_a_kernel_by_name_or_why_not(fast, plain, monkeypatch, caplog):
    monkeypatch.setenv("IMU_FAST_BACKEND", "triton")
    assert used(fast, on_device(1.0)) == "triton"
    assert used(plain, on_device(1.0)) == used(plain, torch.ones(1)) == "torch"
    # What the kernel has no form for is in PyTorch, said and recorded.
    with backend.record_backends() as found, caplog.at_level(logging.WARNING, "imu_fast"):
        assert fast(on_device(1.0), "it is Tuesday") == "torch"
        assert found == {"double": "torch"} and found.reasons == {"double": "it is Tuesday"}
        assert fast(on_device(1.0)) == "triton"
    assert found == {"double": "torch, triton"}
    message = "double runs in PyTorch, not in its Triton kernel: it is Tuesday"
    assert [record.message for record in caplog.records] == [message]
    # A device without kernels is refused, whatever the kernel thinks of the operands.
    start = "^backend='triton' cannot run double: {}; use 'torch' or 'auto'$"
    elsewhere = "its input is on cpu, not on a CUDA device"
    with pytest.raises(BackendUnavailableError, match=start.format(elsewhere)):
        fast(torch.ones(1), "it is Tuesday")
    monkeypatch.setattr(backend, "why_no_triton", lambda: "triton does not import")
    with pytest.raises(BackendUnavailableError, match=start.format("triton does not import")):
        fast(on_device(1.0), "it is Tuesday")


def test_interpreted_kernels_take_tensors_of_the_cpu(fast, monkeypatch):
    monkeypatch.setenv("IMU_FAST_BACKEND", "triton")
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    assert used(fast, torch.ones(1)) == "triton"
    assert used(fast, torch.ones(1), "it is Tuesday") == "torch"
    monkeypatch.setenv("IMU_FAST_BACKEND", "auto")
    assert used(fast, torch.ones(1)) == "torch", "slow, so not taken by itself"


def test_a_definition_is_the_references_of_the_name(monkeypatch):
    def triple(state, power=1):
        """Thrice."""

    monkeypatch.setattr(
        reference, "thrice", lambda s, power=1: 3 * s[0].double() ** power, raising=False
    )
    made = operation(name="thrice")(triple)
    assert made.name == "thrice" and made.__doc__ == "Thrice."
    state = (torch.tensor([1.0, 2.0]), torch.tensor([7.0]).double())
    with backend.use_backend("reference"), backend.record_backends() as found:
        result = made(state, power=2)
    assert found == {"thrice": "reference"}
    assert result.dtype == torch.float32 and result.tolist() == [3, 12]


def test_a_kernel_without_limits_takes_everything():
    made = operation(reference=define, kernel=lambda x: "triton")(double)
    assert made(on_device(1.0)) == "triton"


def test_the_first_tensor_decides():
    a, b = torch.ones(1), torch.ones(2)
    assert first_tensor([3, "x", None, (a, b)]) is a and first_tensor((b, a)) is b
    with pytest.raises(TypeError, match="takes tensors, and none was given"):
        first_tensor([3, None])


def test_dtypes_of_kernels():
    good = [torch.ones(1, dtype=t) for t in (torch.float32, torch.float16, torch.bfloat16)]
    assert kernel_dtypes(*good) == ""
    assert kernel_dtypes(good[0], torch.ones(1).double()) == (
        "torch.float64 is not among float32, bfloat16 and float16"
    )


def test_operations_are_those_of_the_folder():
    found = operations()
    assert {"gram", "conjugate_gradient_iteration", "linear_softmax_residual"} <= set(found)
    assert all(isinstance(op, module.Operation) and op.name == k for k, op in found.items())
    assert not any(isinstance(op, types.FunctionType) for op in found.values())
