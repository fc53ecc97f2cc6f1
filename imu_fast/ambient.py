"""What surrounds a call, autocast, inference mode, random states, set aside for its duration."""

from __future__ import annotations

import functools
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils.checkpoint import checkpoint

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
_DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")


_DATA = {type(None), bool, int, float, str, torch.dtype, torch.device, torch.Tensor}
_OURS = f"{__package__}."
# Values in one object, and objects in each other, beyond which nobody looks.
_FEW, _DEEP = 64, 6


def is_data(value: object, deep: int = _DEEP) -> bool:
    """Whether it is numbers, or holds nothing else and is of this package: no code of others.

    Of what would take long to look through it is False.
    """
    kind = type(value)
    if kind in _DATA:
        return True
    inner: Any = value
    if kind is dict:
        inner = inner.values()
    elif kind is not tuple and kind is not list:
        if not kind.__module__.startswith(_OURS) or not hasattr(value, "__dict__"):
            return False
        inner = vars(value).values()
    return deep > 0 and len(inner) <= _FEW and all(is_data(one, deep - 1) for one in inner)


@contextmanager
def torch_state_kept() -> Iterator[None]:
    """The global random state of torch on the CPU, as it was."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def random_state_kept(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """The global random states of torch, numpy and Python, as they were."""
    cuda = sorted({d.index or 0 for d in devices if d.type == "cuda"})
    numbers, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            random.setstate(numbers)
            np.random.set_state(arrays)


def random_states() -> Callable[[], AbstractContextManager[None]]:
    """What puts torch's, numpy's and Python's random states back to those of now, for a while."""
    state, arrays, numbers = torch.get_rng_state(), np.random.get_state(), random.getstate()

    @contextmanager
    def again() -> Iterator[None]:
        with random_state_kept():
            torch.set_rng_state(state)
            np.random.set_state(arrays)
            random.setstate(numbers)
            yield

    return again


def no_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """For functions of tensors: the user's autocast and default device are set aside."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _is_autocast() and _default_device() is None:
            return function(*args, **kwargs)
        with ExitStack() as stack:
            _leave_autocast(stack)
            _leave_default_device(stack)
            return function(*args, **kwargs)

    return wrapped


def _any_autocast() -> bool:
    return any(map(torch.is_autocast_enabled, _available()))


# One question instead of one for each type of device, where torch has it.
_is_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", _any_autocast)


@functools.cache
def _available() -> tuple[str, ...]:
    """Device types that this build of torch has an autocast of."""
    return tuple(filter(torch.amp.is_autocast_available, _DEVICE_TYPES))


def _leave_autocast(stack: ExitStack) -> None:
    for kind in filter(torch.is_autocast_enabled, _available()):
        stack.enter_context(torch.autocast(kind, enabled=False))


# No forward and no loader runs with constants on such a device.
_WITHOUT_VALUES = ("meta",)
# The default device of the user's call, where it has one and it is set aside; of each thread.
_called_under: ContextVar[torch.device | None] = ContextVar("called_under", default=None)


def _default_device() -> torch.device | None:
    """That of ``with torch.device(...)`` or ``torch.set_default_device``, but for the CPU."""
    if not torch._C._len_torch_function_stack():  # asked by every operation
        return None
    for mode in reversed(_get_current_function_mode_stack()):
        if isinstance(mode, DeviceContext):
            return None if mode.device.type == "cpu" else mode.device
    return None


@contextmanager
def _default_device_as(device: torch.device, called_under: torch.device | None) -> Iterator[None]:
    token = _called_under.set(called_under)
    try:
        with device:
            yield
    finally:
        _called_under.reset(token)


def _leave_default_device(stack: ExitStack) -> None:
    if (device := _default_device()) is not None:
        back = None if device.type in _WITHOUT_VALUES else device
        stack.enter_context(_default_device_as(torch.device("cpu"), back))


def default_device_back() -> AbstractContextManager[None]:
    """For the user's own code, a forward or a dataset: the default device of the user's call."""
    device = _called_under.get()
    return nullcontext() if device is None else _default_device_as(device, None)


def as_called(items: Iterable[T]) -> Iterator[T]:
    """What the user's iterable gives, made under the default device of the user's call."""
    with default_device_back():
        iterator = iter(items)
    while True:
        with default_device_back():
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


@contextmanager
def plain_torch(devices: Iterable[torch.device] = (), *, data: bool = False) -> Iterator[None]:
    """Full precision, ordinary tensors on the CPU and eager modules inside; as it was afterwards.

    Autocast would round our sums to half precision; what is made under ``torch.inference_mode()``
    has no gradient; compiled modules do not run the hooks that are set after they were compiled;
    reentrant checkpoints have no gradients here (:func:`checkpoints_not_reentrant`);
    a default device, ``meta`` say, is not that of our constants (:func:`default_device_back`).
    Random numbers drawn inside leave the caller's streams where they were.

    Args:
        devices: whose random states are kept, besides the CPU's.
        data: whether no code of others runs inside (:func:`is_data`), as which alone draws from
            Python's and numpy's random numbers: keeping numpy's takes longer than a small call.
    """
    dtype = torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            torch.set_grad_enabled(False)
        _leave_autocast(stack)
        _leave_default_device(stack)
        stack.enter_context(torch_state_kept() if data else random_state_kept(devices))
        stack.enter_context(not_compiled())
        stack.enter_context(checkpoints_not_reentrant())
        inner_grad = torch.is_grad_enabled()
        try:
            yield
        finally:
            # Whatever the user's forward, or an exception in it, has left behind.
            torch.set_grad_enabled(inner_grad)
            if torch.get_default_dtype() != dtype:
                torch.set_default_dtype(dtype)
            now = torch.are_deterministic_algorithms_enabled()
            if (now, torch.is_deterministic_algorithms_warn_only_enabled()) != (
                deterministic,
                warn_only,
            ):
                torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


class _Switch:
    """A setting of the whole process, on as long as any thread's call needs it.

    Args:
        setting: makes what turns it on, and off again.
    """

    def __init__(self, setting: Callable[[], AbstractContextManager[object]]) -> None:
        self._setting, self._lock = setting, threading.Lock()
        self._count, self._stack = 0, ExitStack()

    @contextmanager
    def on(self) -> Iterator[None]:
        with self._lock:
            if self._count == 0:
                self._stack.enter_context(self._setting())
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                if self._count == 0:
                    self._stack.close()


class _NotReentrant:
    """In the place of torch's CheckpointFunction, which takes no part in ``autograd.grad``.

    It also cuts the graph where nothing that it is given asks for a gradient, whatever the
    parameters inside do: their gradients would be zero without a word. The other kind saves the
    same memory, and has the gradients of the model as it is without checkpoints.
    """

    @staticmethod
    def apply(function: Callable[..., object], preserve: bool, *args: object) -> object:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


@contextmanager
def _without_reentrant() -> Iterator[None]:
    own = torch.utils.checkpoint.CheckpointFunction
    torch.utils.checkpoint.CheckpointFunction = _NotReentrant  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.utils.checkpoint.CheckpointFunction = own  # type: ignore[misc]


_eager = _Switch(lambda: torch.compiler.set_stance("force_eager"))
_no_reentrant = _Switch(_without_reentrant)


def not_compiled() -> AbstractContextManager[None]:
    """Compiled modules run as they were before: they do not run hooks that are set afterwards."""
    # Where dynamo is not loaded, nothing has been compiled.
    return _eager.on() if "torch._dynamo" in sys.modules else nullcontext()


def checkpoints_not_reentrant() -> AbstractContextManager[None]:
    """``torch.utils.checkpoint`` inside is never reentrant; see :class:`_NotReentrant`."""
    return _no_reentrant.on()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the end; it arrives in the main thread only, so nothing to do elsewhere.

    Raises:
        KeyboardInterrupt: afterwards, if it came.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler is None:
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def finish(steps: Iterable[Callable[[], object]]) -> None:
    """Run every step, whatever any of them raises; each is tried twice, so it must bear that.

    Raises:
        BaseException: the first one that came, once all steps have run.
    """
    first: BaseException | None = None
    with uninterrupted():
        for step in steps:
            for _ in range(2):
                try:
                    step()
                    break
                except BaseException as error:
                    first = first or error
        if first is not None:
            raise first
