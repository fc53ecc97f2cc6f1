"""How an operation picks what runs it, once: its body in PyTorch, its kernel, or its definition.

A file of this folder says of each operation what these are, and nothing of how one is picked::

    @operation(kernel=_launch, limits=_limits)
    def gram(delta, act, offsets, has_bias):
        ...  # in PyTorch
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from imu_fast import backend, precision
from imu_fast.ambient import no_autocast
from imu_fast.errors import BackendUnavailableError, InputError

P = ParamSpec("P")
R = TypeVar("R")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRODUCTS = precision.PRECISIONS


def kernel_dtypes(*tensors: Tensor) -> str:
    """Why kernels cannot take tensors of these dtypes; "" where they can."""
    for tensor in tensors:
        if tensor.dtype not in KERNEL_DTYPES:
            return f"{tensor.dtype} is not among float32, bfloat16 and float16"
    return ""


class Operation(Generic[P, R]):
    """A function of tensors that runs as ``IMU_FAST_BACKEND`` or ``use_backend`` says.

    ``auto``: the kernel, for tensors on a CUDA device that it can take, or else PyTorch, and why is
    logged once. ``triton``: the same, but for tensors elsewhere, and without Triton, an error. What
    ran, why not the kernel, and what its matrix products were made in (``use_precision``) is what
    ``record_backends`` finds under the operation's name.

    Raises:
        BackendUnavailableError: ``triton`` was chosen, and no kernel runs where these operands are.
        InputError: an operand requires a gradient, of an operation that has none.
    """

    def __init__(
        self,
        body: Callable[P, R],
        name: str,
        reference: Callable[..., R],
        kernel: Callable[..., R] | None,
        limits: Callable[..., str] | None,
        differentiable: bool,
        products: Sequence[str],
        decide: Callable[..., Sequence[Tensor]] | None,
    ) -> None:
        functools.update_wrapper(self, body)
        self.name, self.body, self.reference = name, body, reference
        self.kernel, self.limits, self.differentiable = kernel, limits, differentiable
        self.products, self.decide = products, decide

    @no_autocast
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self.differentiable and torch.is_grad_enabled():
            # A kernel's result has no graph, so what is in PyTorch must not seem to have one.
            if any(map(_requires_grad, args)) or any(map(_requires_grad, kwargs.values())):
                raise InputError(
                    f"{self.name} has no derivative, and an operand requires a gradient; detach "
                    "it, or call under torch.no_grad()"
                )
        chosen, reason = backend.current_backend(), ""
        if chosen in ("auto", "triton"):
            chosen, reason = self._kernel_or_torch(chosen, args, kwargs)
        if self.products:
            return self._multiply(chosen, reason, args, kwargs)
        backend.record(self.name, chosen, reason)
        if chosen == "torch":
            return self.body(*args, **kwargs)
        if chosen == "triton" and self.kernel is not None:
            return self.kernel(*args, **kwargs)
        return self._define(args, kwargs)

    def _multiply(self, chosen: str, reason: str, args: Any, kwargs: Any) -> R:
        """With its matrix products in the precision that is asked for, or a more exact one."""
        if chosen == "reference":
            backend.record(self.name, chosen, reason, "ieee")
            return self._define(args, kwargs)
        asked = precision.asked_precision()
        if chosen == "torch" and asked == "auto" and not backend.is_recording():
            device = (first_tensor(args) if args else first_tensor(kwargs.values())).device.type
            if device == "cpu":  # as torch is set, and nobody is to be told
                return self.body(*args, **kwargs)
        decide = _deciding if self.decide is None else self.decide
        tensors = decide(*args, **kwargs)
        dtypes, device = [tensor.dtype for tensor in tensors], _device_type(tensors[0])
        of_torch = precision.torch_precision(dtypes, device)
        used = of_torch
        if chosen == "triton":
            used = precision.at_least(precision.precision_of(dtypes), self.products)
            kwargs = {**kwargs, "precision": used}
        backend.record(self.name, chosen, reason, used)
        run = self.kernel if chosen == "triton" and self.kernel is not None else self.body
        if precision.is_torchs_own(of_torch, device):
            return run(*args, **kwargs)
        with precision.torch_multiplies_in(of_torch, device):
            return run(*args, **kwargs)

    def _define(self, args: Any, kwargs: Any) -> R:
        from imu_fast import reference

        return self.reference(reference, *args, **kwargs)

    def __reduce__(self) -> str:
        """Pickled by name, as the function that it is."""
        return self.body.__name__

    def _kernel_or_torch(self, chosen: str, args: Any, kwargs: Any) -> tuple[str, str]:
        """Which of the two runs, and why it is not the kernel: "" where there is none to run."""
        if self.kernel is None:
            return "torch", ""
        tensor = first_tensor(args) if args else first_tensor(kwargs.values())
        if chosen == "auto" and not tensor.is_cuda:
            return "torch", ""
        missing = backend.why_no_triton()
        if chosen == "triton":
            if not (tensor.is_cuda or backend.interpreted()):
                missing = f"its input is on {tensor.device}, not on a CUDA device"
            if missing:
                raise BackendUnavailableError(
                    f"backend='triton' cannot run {self.name}: {missing}; use 'torch' or 'auto'"
                )
        reason = self.limits(*args, **kwargs) if self.limits is not None else ""
        reason = reason or missing
        if reason:
            _log_once(self.name, reason)
        return "torch" if reason else "triton", reason


def operation(
    *,
    name: str = "",
    reference: Callable[..., Any] | None = None,
    kernel: Callable[..., Any] | None = None,
    limits: Callable[..., str] | None = None,
    differentiable: bool = False,
    products: Sequence[str] = (),
    decide: Callable[..., Sequence[Tensor]] | None = None,
) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Make an operation of its body in PyTorch, whose signature and docstring it has.

    Args:
        name: of the definition in ``imu_fast/reference.py``; default: the body's.
        reference: that module and the operands -> the result. Default: its function of this name,
            with the same operands, and the result in the first tensor's dtype.
        kernel: imports and launches the Triton kernel. Without one torch runs in its place.
        limits: why the kernel cannot take these operands; "" where it can.
        differentiable: autograd goes through it; without, operands that require it are refused.
        products: of matrices, that it makes: the precisions that its kernel has, which is told by
            ``precision=`` which of them to use. Without a kernel PRODUCTS too; empty: it has none.
        decide: the operands by whose dtypes a precision is chosen; None: all that are floating.
    """

    def decorate(body: Callable[P, R]) -> Operation[P, R]:
        called = name or body.__name__
        define = reference or _definition(called)
        return Operation(body, called, define, kernel, limits, differentiable, products, decide)

    return decorate


def _definition(name: str) -> Callable[..., Any]:
    def define(reference: ModuleType, *args: Any, **kwargs: Any) -> Any:
        found: Tensor = getattr(reference, name)(*args, **kwargs)
        return found.to(first_tensor((*args, *kwargs.values())).dtype)

    return define


def _requires_grad(operand: Any) -> bool:
    if isinstance(operand, Tensor):
        return operand.requires_grad
    return isinstance(operand, tuple) and any(map(_requires_grad, operand))


def _deciding(*args: Any, **kwargs: Any) -> Sequence[Tensor]:
    return list(_floating((*args, *kwargs.values())))


def _floating(operands: Iterable[Any]) -> Iterator[Tensor]:
    """The floating tensors among operands, some of which may be tuples of tensors."""
    for operand in operands:
        if isinstance(operand, tuple):
            yield from _floating(operand)
        elif isinstance(operand, Tensor) and operand.is_floating_point():
            yield operand


def _device_type(tensor: Tensor) -> str:
    return "cuda" if tensor.is_cuda else tensor.device.type


def first_tensor(operands: Iterable[Any]) -> Tensor:
    """The first tensor among operands, some of which may be tuples of tensors."""
    for operand in operands:
        if isinstance(operand, Tensor):
            return operand
        if isinstance(operand, tuple):
            return first_tensor(operand)
    raise TypeError("an operation takes tensors, and none was given")


@functools.cache
def _log_once(name: str, reason: str) -> None:
    backend.logger.warning("%s runs in PyTorch, not in its Triton kernel: %s", name, reason)
