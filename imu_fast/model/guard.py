"""The user's model comes back as it was: modes, flags, buffers, weights, whatever happens."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from imu_fast.ambient import finish, is_data, plain_torch
from imu_fast.errors import InputError, brief, is_dtensor
from imu_fast.factors.joint import joined

P = ParamSpec("P")
R = TypeVar("R")

# Under these names a layer's parameters, or what is made of others in their place.
_MADE = ("weight", "bias")

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_registry = threading.Lock()


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """No other thread's call works on this model, or on one that shares a module with it.

    A model's mode, hooks and buffers are one for all threads, so calls on it take turns; wrappers
    such as DataParallel share the modules, and so the locks, of what they wrap. Reentrant.
    """
    with _registry:
        # One order for all, so that two threads never wait for each other.
        modules = sorted(model.modules(), key=id)
        locks = [_locks.setdefault(module, threading.RLock()) for module in modules]
    with ExitStack() as stack:
        for lock in locks:
            stack.enter_context(lock)
        yield


def door(function: Callable[P, R]) -> Callable[P, R]:
    """For functions whose first argument may be a model: :func:`exclusive` and plain arithmetic.

    Of samples that processes share, an error in one is that of all.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        model = args[0] if args else kwargs.get("model", kwargs.get("source"))
        with ExitStack() as stack:
            if (step := joined(function, args, kwargs)) is not None:
                stack.enter_context(step)
            if isinstance(model, nn.Module):
                check_modes(model)
                check_whole_parameters(model)
                stack.enter_context(exclusive(model))
                stack.enter_context(plain_torch(_devices(model)))
            else:
                stack.enter_context(plain_torch(data=is_data(args) and is_data(kwargs)))
            return function(*args, **kwargs)

    return wrapped


def _devices(model: nn.Module) -> set[torch.device]:
    tensors = [t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values())]
    return {t.device for t in tensors if t is not None}


def _has_own_train(module: nn.Module) -> bool:
    """Whether a module does more at ``train()`` and ``eval()`` than to note the mode."""
    return type(module).train is not nn.Module.train or "train" in vars(module)


def check_modes(model: nn.Module) -> None:
    """Raise InputError for a model that cannot be put into evaluation mode and back."""
    for name, module in model.named_modules():
        where = f"model: {name!r}" if name else "model"
        if not hasattr(module, "training"):
            raise InputError(
                f"{where} is a frozen TorchScript module, which has no training mode any more; "
                "pass the original nn.Module that it was scripted or traced from"
            )
        if not _has_own_train(module):
            continue
        if isinstance(module, torch.fx.GraphModule) and "train" in vars(module):
            try:
                module.train(module.training)
            except NotImplementedError as error:
                raise InputError(
                    f"{where} was made by torch.export, and has no modes ({brief(error)}); pass "
                    "the original nn.Module that it was exported from"
                ) from error
        try:
            inspect.signature(module.train).bind(False)
        except TypeError as error:
            raise InputError(
                f"{where}: {type(module).__name__}.train takes no mode ({error}); define "
                "train(self, mode=True), as torch.nn.Module has it, and return self"
            ) from error
        except ValueError:  # no signature to be had
            continue


def check_whole_parameters(model: nn.Module) -> None:
    """Raise InputError where processes hold a part of each parameter.

    Their forward passes are collective: each process would have to make as many, and how many are
    made here follows from the data.
    """
    if "torch.distributed" not in sys.modules:
        return
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise _sharded("model", "FullyShardedDataParallel")
    for name, parameter in model.named_parameters():
        if is_dtensor(parameter):
            raise _sharded(f"model: {name}", "a DTensor, of fully_shard or tensor parallelism")


def _sharded(what: str, kind: str) -> InputError:
    return InputError(
        f"{what} is {kind}: each process holds a part of the weights, and influence needs them "
        "whole; load the full state (torch.distributed.checkpoint.state_dict.get_model_state_dict "
        "with full_state_dict=True) into a plain model in each process, and share the samples by "
        "group="
    )


Modes = list[tuple[nn.Module, bool]]


def _modes_of(model: nn.Module) -> Modes:
    return [(module, module.training) for module in model.modules()]


def _set_modes(wanted: Modes) -> None:
    """Exactly these modes, by a module's own ``train`` where it has one.

    Adapters merge their weights at ``eval()`` and take them apart at ``train()``; a plain attribute
    would leave them merged.
    """
    for module, training in wanted:  # parents come first, and may set their children
        if module.training != training and _has_own_train(module):
            module.train(training)
    for module, training in wanted:
        if module.training != training:
            module.training = training


@contextmanager
def modes(model: nn.Module, *, batchnorm: str, dropout: str) -> Iterator[None]:
    """The model in evaluation mode, but for the kinds of layers asked for in training mode.

    Args:
        batchnorm, dropout: ``"eval"`` or ``"train"``, for BatchNorm and for all other modules.
    """
    saved = _modes_of(model)
    try:
        norm = nn.modules.batchnorm._BatchNorm
        kinds = [(m, batchnorm if isinstance(m, norm) else dropout) for m, _ in saved]
        if all(kind == "eval" for _, kind in kinds):
            model.eval()
        else:
            _set_modes([(module, kind == "train") for module, kind in kinds])
        yield
    finally:
        finish([functools.partial(_set_modes, saved)])


Kept = list[tuple[Tensor, Tensor]]


def copies_of(tensors: Iterable[Tensor]) -> Kept:
    """``(tensor, copy)`` of each, to be put back by :func:`put_back`."""
    return [(tensor, tensor.detach().clone()) for tensor in tensors]


def put_back(kept: Kept) -> None:
    """Give every tensor the values of its copy; one that has them is not written to.

    A write would make a graph that the user still holds refuse its backward pass.
    """
    for tensor, before in kept:
        # Tensors made under inference mode are written to under inference mode only.
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            if not _equal(tensor, before):
                tensor.copy_(before)


def _equal(first: Tensor, second: Tensor) -> bool:
    try:
        return torch.equal(first, second)
    except (RuntimeError, NotImplementedError):  # sparse, quantised or meta tensors
        return False


def check_trainable(model: nn.Module, training: bool = True) -> None:
    """Raise InputError if parameters have no shape, or (``training``) cannot have gradients."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InputError(
                f"model: {name} is on the meta device, without values; load the model's weights "
                "first (model.to_empty(device=...), then load_state_dict)"
            )
        if is_lazy(parameter):
            raise InputError(
                f"model: {name} has no shape yet (a lazy module); run the model on one batch first"
            )
        if training and parameter.is_inference():
            raise InputError(
                f"model: {name} was made under torch.inference_mode(), so it has no gradient; "
                "build or load the model outside, or pass copy.deepcopy(model)"
            )


class _Snapshot:
    """What a model is, apart from the values of its parameters.

    Args:
        looked_at: the model is only looked at: buffers, and the tensors that a forward pass keeps
            in its modules, go back as well.
    """

    def __init__(self, model: nn.Module, looked_at: bool) -> None:
        check_modes(model)
        modules = list(model.modules())
        self.modes = _modes_of(model)
        parameters = list(model.parameters())
        check_trainable(model, training=not looked_at)
        self.flags = [(p, p.requires_grad, p.grad) for p in parameters]
        plain = [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]
        owned: list[dict[str, Any]] = [m._parameters for m in plain]
        self.attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.values: Kept = []
        # Taking merged weights apart again leaves a rounding error.
        merging = [m for m in modules if _has_own_train(m) and m.training]
        at_risk = {id(p): p for m in merging for p in m.parameters()}
        shortened = [p for m in modules if _shrinks_rows(m) for p in m.parameters()]
        at_risk |= {id(p): p for p in shortened}
        self.values += copies_of(at_risk.values()) if looked_at else []
        self.generators: list[tuple[torch.Generator, Tensor]] = []
        if looked_at:
            owned += [m._buffers for m in plain]
            self.attributes = [(vars(m), _state_of(m)) for m in plain]
            self.values += copies_of(model.buffers())
            self.values += copies_of(t for _, kept in self.attributes for t in kept.values())
            inner = [v for m in plain for v in vars(m).values()]
            found = [v for v in inner if isinstance(v, torch.Generator)]
            self.generators = [(g, g.get_state()) for g in found]
        self.tensors = [(names, dict(names)) for names in owned]

    def restore(self) -> None:
        """Put all of it back; an interrupt in between comes when that is done."""
        finish(
            [
                lambda: _set_modes(self.modes),
                self._tensors,
                self._attributes,
                lambda: put_back(self.values),
                self._flags,
                lambda: [g.set_state(state) for g, state in self.generators],
            ]
        )

    def _attributes(self) -> None:
        for now, before in self.attributes:
            # A tensor that a forward pass leaves behind holds its graph, which cannot be copied.
            kept = {k: t.detach() for k, t in _tensors_in(now).items() if t.grad_fn is not None}
            now.update(kept | before)

    def _tensors(self) -> None:
        for now, before in self.tensors:
            if len(now) != len(before) or any(now.get(k) is not v for k, v in before.items()):
                now.clear()
                now.update(before)

    def _flags(self) -> None:
        for parameter, flag, gradient in self.flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
            if parameter.grad is not gradient:
                parameter.grad = gradient


def _shrinks_rows(module: nn.Module) -> bool:
    """Whether a forward pass writes to the weight: rows that are longer than ``max_norm``."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None


def _state_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that a module keeps, but for those that stand for a layer's parameters.

    A hook or the layer's owner makes these anew before each forward (weight_norm, pruning). Until
    the next they are what they were made of before, as after ``load_state_dict``; so what a forward
    pass has made is left there.
    """
    found = _tensors_in(vars(module))
    layer = isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    if layer or module._forward_pre_hooks:
        return {name: tensor for name, tensor in found.items() if name not in _MADE}
    return found


def _tensors_in(attributes: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in attributes.items() if isinstance(value, Tensor)}


@contextmanager
def preserved(model: nn.Module, *, buffers: bool = True) -> Iterator[None]:
    """Restore a model, always; meanwhile it is this thread's alone.

    Restored are training modes, by a module's own ``train`` where it has one, ``requires_grad``,
    gradients, and which tensors the parameters are. Random states, autocast, inference mode and
    compiled code are set aside inside, see :func:`imu_fast.ambient.plain_torch`.

    Args:
        buffers: the model is only looked at: its buffers, generators and the tensors that its
            modules keep are restored, too, and so are weights that are merged at ``eval()`` and
            those of embeddings with ``max_norm``, which a forward pass shortens.
            Without it the values of parameters and buffers stay as they are left.

    Raises:
        InputError: the model has parameters without a shape.
    """
    with exclusive(model), plain_torch(_devices(model)):
        before = _Snapshot(model, looked_at=buffers)
        try:
            yield
        finally:
            before.restore()


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; tensors of a graph that a forward pass left in a module, detached in it.

    ``weight_norm`` and ``spectral_norm`` of ``torch.nn.utils`` leave such, which torch refuses to
    copy.

    Raises:
        InputError: the model refuses to be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in _tensors_in(vars(module)).values():
            if tensor.grad_fn is not None:
                memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"model: a {type(model).__name__} that copy.deepcopy does not copy "
            f"({type(error).__name__}: {brief(error)}); pass a copy of your own with inplace=True, "
            "or a model that can be copied"
        ) from error


@contextmanager
def rolled_back(model: nn.Module, trained: list[str]) -> Iterator[Kept]:
    """On any exception, Ctrl-C included, put the trained parameters and all buffers back.

    Yields the list of ``(tensor, copy)`` that is put back; whoever changes another tensor adds it
    (:func:`copies_of`) before the change. On success nothing is undone, the drift of BatchNorm
    that ``batchnorm="train"`` asked for included; ``preserved`` restores modes, flags and hooks
    either way.
    """
    parameters = dict(model.named_parameters())
    kept = copies_of(parameters[name] for name in trained)
    if trained:
        kept += copies_of(model.buffers())
    gradients = [(parameter, parameter.grad) for parameter in parameters.values()]

    def restore_gradients() -> None:
        for parameter, gradient in gradients:
            parameter.grad = gradient

    try:
        yield kept
    except BaseException:
        finish([lambda: put_back(kept), restore_gradients])
        raise
    finish([restore_gradients])
