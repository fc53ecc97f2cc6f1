"""Sums over the processes of torch.distributed, and how these keep in step.

Nothing here looks for a process group by itself: a group that happens to exist belongs to the
user's own training. Only factors that say that they are shared among processes call this.

Every exchange of numbers begins with an exchange of four integers: whether a process has failed,
and what each is about to do. So a process that raises takes the others with it, and processes that
do different things hear of it instead of waiting for each other.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from imu_fast.errors import InputError, ProcessError, brief

T = TypeVar("T")
Group = Any
"""A ``torch.distributed.ProcessGroup``, or None for all processes."""

# An attribute of errors that all processes have been told of.
_TOLD = "_imu_fast_told"
# Of the cosines that weigh a row's elements where rows are compared; elements at a time.
_TURNS, _AT_ONCE = (0.7, 1.3, 1.9, 2.6), 1 << 20


def text_of(value: Any) -> str:
    """A value as text that is the same in every process: without addresses and devices.

    Of a tensor or an array it has all numbers, by a digest: repr leaves out most of a long one, and
    of each the last digits.
    """
    if isinstance(value, np.ndarray):
        return f"array {value.dtype} {list(value.shape)} {_hash(value.tobytes())}"
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
        return f"tensor {value.dtype} {list(value.shape)} {_bits(value)}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(text_of, value))})"
    return re.sub(r" at 0x[0-9a-fA-F]+|, device='[^']*'", "", repr(value))


def _hash(found: bytes) -> str:
    return hashlib.blake2b(found, digest_size=16).hexdigest()


def _bits(tensor: Tensor) -> str:
    """A digest of the numbers."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return _hash(flat.view(torch.uint8).numpy().tobytes())


def check_group(group: Group) -> None:
    """Raise InputError unless there are processes to sum over."""
    if not dist.is_available() or not dist.is_initialized():
        raise InputError(
            "there is no process group to share factors among; start with torchrun and call "
            "torch.distributed.init_process_group() first, or use the factors as they are"
        )
    outside = group is dist.GroupMember.NON_GROUP_MEMBER  # what new_group() gives in the others
    if group is not None and not outside and not isinstance(group, dist.ProcessGroup):
        raise InputError(
            f"group={group!r} is a {type(group).__name__}; pass a torch.distributed process group, "
            "such as torch.distributed.group.WORLD"
        )
    if outside or dist.get_rank(group) < 0:
        raise InputError(
            "group: this process does not belong to it; make the call in the processes that do"
        )


def rank_of(group: Group = None) -> int:
    """Of this process in the group."""
    return dist.get_rank(group)


def size_of(group: Group = None) -> int:
    """How many processes the group has."""
    return dist.get_world_size(group)


def several() -> bool:
    """Whether this process is one of several: for callers that know that all of them call."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def same_processes(one: Group, other: Group) -> bool:
    """Whether two groups are of the same processes, in one order."""
    groups = (dist.group.WORLD if group is None else group for group in (one, other))
    first, second = map(dist.get_process_group_ranks, groups)
    return bool(first == second)


def home_of(group: Group = None) -> torch.device:
    """Where what these processes exchange has to be: their GPU with NCCL, else the CPU."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@contextmanager
def _answered() -> Iterator[None]:
    """What torch raises where another process is gone, or too late."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        gone = ProcessError(
            "another process of the group has ended, or has not answered within the group's "
            f"timeout ({brief(error, 160)}); its own output says why"
        )
        raise _told(gone) from error


def is_told(error: BaseException) -> bool:
    """Whether all processes have raised this error, or heard of it."""
    return hasattr(error, _TOLD)


def _told(error: Exception) -> Exception:
    setattr(error, _TOLD, True)
    return error


def in_step(doing: str, group: Group = None, failure: Exception | None = None) -> None:
    """All processes are about to do the same, or all of them raise.

    Each of them has to call this, in the same order.

    Args:
        doing: what, in words that are the same in every process.
        failure: why this one cannot; the caller raises it.

    Raises:
        InputError: processes do different things, or another one refuses what it was given.
        ProcessError: another one has failed, has ended, or does not answer.
    """
    tag = int.from_bytes(hashlib.blake2b(doing.encode(), digest_size=7).digest(), "big")
    head = torch.tensor([failure is not None, tag, -tag], dtype=torch.int64, device=home_of(group))
    with _answered():
        dist.all_reduce(head, dist.ReduceOp.MAX, group=group)
    failed, largest, smallest = head.tolist()
    if not failed and largest == -smallest:
        return
    said = None if failure is None else (isinstance(failure, InputError), _text(failure))
    found = _gathered((doing, said), group)
    if failure is not None:
        _told(failure)
        return
    for place, (_, why) in enumerate(found):
        if why is not None:
            kind = InputError if why[0] else ProcessError
            raise _told(kind(f"process {place} of {len(found)}: {why[1]}"))
    each = "; ".join(f"process {place}: {what}" for place, (what, _) in enumerate(found))
    raise _told(
        InputError(f"processes that share samples have to make the same calls, and do not: {each}")
    )


def _text(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _ready(doing: str, group: Group, make: Callable[[], T]) -> T:
    """What an exchange needs, made here, and then all begin it, or all of them raise.

    Raises:
        As :func:`in_step`; what ``make`` raises.
    """
    try:
        made = make()
    except Exception as error:
        if not hasattr(error, _TOLD):
            in_step(doing, group, error)
        raise
    in_step(doing, group)
    return made


@contextmanager
def together(doing: str, group: Group = None) -> Iterator[None]:
    """The body's failure in one process is that of all; they begin and end it in step.

    Raises:
        As :func:`in_step`; what the body raises.
    """
    in_step(doing, group)
    try:
        yield
    except Exception as error:
        if not hasattr(error, _TOLD):
            in_step(doing, group, error)
        raise
    in_step(f"the end of {doing}", group)


def _sent(tensor: Tensor, group: Group) -> Tensor:
    """The tensor, or a copy, as the group's backend takes it."""
    home = home_of(group)
    return (tensor.to(home) if home.type == "cuda" else tensor).contiguous()


def _sum(whole: Tensor, group: Group) -> None:
    """The sum over all processes, in place; every process gets the same bits."""
    with _answered():
        dist.all_reduce(whole, group=group)


def largest_(tensor: Tensor, group: Group = None) -> Tensor:
    """The largest over all processes, in place; every process gets the same bits."""
    doing = f"the largest of {tensor.dtype} {list(tensor.shape)}"
    whole = _ready(doing, group, lambda: _sent(tensor, group))
    with _answered():
        dist.all_reduce(whole, dist.ReduceOp.MAX, group=group)
    return tensor if whole is tensor else tensor.copy_(whole)


def summed_over(make: Callable[[], Any], group: Group = None) -> Any:
    """What ``make`` gives in every process, a tensor or a tuple of them, added up in place.

    Raises:
        As :func:`in_step`: shapes or dtypes differ.
    """
    try:
        found = make()
        tensors = (found,) if isinstance(found, Tensor) else found
        wholes = [_sent(tensor, group) for tensor in tensors]
    except Exception as error:
        if not hasattr(error, _TOLD):
            in_step("a sum", group, error)
        raise
    kinds = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors)
    in_step(f"a sum of {kinds}", group)
    for tensor, whole in zip(tensors, wholes, strict=True):
        _sum(whole, group)
        if whole is not tensor:
            tensor.copy_(whole)
    return found


def gather(value: T, group: Group = None) -> list[T]:
    """What each process passed, in the order of their ranks; for small Python values.

    Raises:
        InputError: a value holds what cannot be sent.
    """
    packed = _ready("a gathering", group, lambda: _packed(value))
    return [pickle.loads(one) for one in _gathered(packed, group)]


def _packed(value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        raise InputError(
            f"data or loss hold what cannot be sent to another process ({brief(error)}), as one "
            "that has no samples needs; give each process a sample, or define classes and "
            "functions at the top of a module"
        ) from error


def _gathered(value: T, group: Group) -> list[T]:
    found: list[Any] = [None] * dist.get_world_size(group)
    with _answered():
        dist.all_gather_object(found, value, group=group)
    return found


def rows_of_all(rows: Tensor, group: Group = None) -> Tensor:
    """The rows of all processes in the order of their ranks, however many each has.

    Args:
        rows: [k, ...], of one dtype and the same further axes everywhere.
    """
    in_step(f"a gathering of rows of {rows.dtype} {list(rows.shape[1:])}", group)
    counts = _gathered(len(rows), group)
    out = _ready("rows", group, lambda: _room(rows, sum(counts), group))
    first = 0
    for rank, count in enumerate(counts):
        part = out[first : first + count]
        first += count
        if not part.numel():
            continue
        if rank == dist.get_rank(group):
            part.copy_(rows)
        _broadcast(part, group, rank)
    return out.to(rows.device)


def _room(rows: Tensor, count: int, group: Group) -> Tensor:
    return rows.new_empty(count, *rows.shape[1:], device=_sent(rows[:0], group).device)


def from_first(tensor: Tensor, group: Group = None) -> Tensor:
    """The tensor of the first process, in place in all of them."""
    doing = f"a copy of {tensor.dtype} {list(tensor.shape)}"
    whole = _ready(doing, group, lambda: _sent(tensor, group))
    _broadcast(whole, group, 0)
    return tensor if whole is tensor else tensor.copy_(whole)


def _broadcast(whole: Tensor, group: Group, rank: int) -> None:
    source = rank if group is None else dist.get_global_rank(group, rank)
    with _answered():
        dist.broadcast(whole, source, group=group)


def alike(tensor: Tensor, group: Group = None) -> bool:
    """Whether all processes have the same numbers: integers to the bit, others to rounding.

    Compared are sums of every row that weigh each element differently. A row may differ as its own
    elements are rounded, and as sums in float32 or better are, relative to the rows' root mean
    square: what is relative to the sum of all elements would hide that some of them are others.
    """
    in_step("a comparison", group)
    kind = (tuple(tensor.shape), str(tensor.dtype))
    if any(other != kind for other in _gathered(kind, group)):
        return False
    if not tensor.is_floating_point():  # to the bit
        found = _ready("a comparison", group, lambda: _bits(tensor))
        return len(set(_gathered(found, group))) == 1
    if not tensor.numel():
        return True
    rows = tensor.detach()
    rows = rows.flatten(0, -2) if rows.dim() > 1 else rows.reshape(-1, 1)
    places = torch.arange(rows.shape[1], dtype=torch.float64, device=rows.device)[:, None]
    weights = (places * places.new_tensor(_TURNS)).cos()
    step = max(1, _AT_ONCE // rows.shape[1])
    sums = [_weighed(piece.double(), weights) for piece in rows.split(step)]
    largest = largest_(torch.cat(sums), group)
    highest, lowest, norm = largest.split([len(_TURNS), len(_TURNS), 1], dim=1)
    summed = torch.promote_types(tensor.dtype, torch.float32)
    bound = 4 * torch.finfo(tensor.dtype).eps * norm
    bound = bound + 64 * torch.finfo(summed).eps * norm.square().mean().sqrt()
    return bool((highest + lowest <= bound).all())


def _weighed(rows: Tensor, weights: Tensor) -> Tensor:
    """Of each row its weighed sums, these times -1, and its norm: finite."""
    sums = (rows @ weights).nan_to_num()
    norm = rows.norm(dim=1, keepdim=True).nan_to_num(0.0, 0.0)
    return torch.cat([sums, -sums, norm], dim=1)
