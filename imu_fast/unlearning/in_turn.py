"""Several requests to forget, one after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from imu_fast.errors import InputError
from imu_fast.model.batches import rereadable
from imu_fast.model.guard import copied, copies_of, door, rolled_back
from imu_fast.unlearning.method import Method
from imu_fast.unlearning.named import MethodName
from imu_fast.unlearning.result import UnlearnResult
from imu_fast.unlearning.unlearn import check_names, unlearn


@door
def unlearn_in_turn(
    model: nn.Module,
    requests: Mapping[str, Any] | Sequence[Any],
    method: MethodName | Method = "imu",
    *,
    watch: Mapping[str, Any] | None = None,
    inplace: bool = True,
    **arguments: Any,
) -> dict[str, UnlearnResult]:
    """Forget one request after another, each from the model that the one before has left.

    Every request is measured in every run, under its name: each trajectory ends with how deep all
    of them are by then, those of before and those still to come.

    Args:
        requests: forget sets by name; of a list the names are "request 0", "request 1", ...
        method, watch, inplace, arguments: as of :func:`imu_fast.unlearn`; of each run.

    Returns:
        The result of each request, by name; ``result.scores`` are by the model at its turn.

    Raises:
        InputError: no request, a name that is taken, or ``checkpoint``, which one file cannot be
            for several runs. On any exception the model is as it was before the first.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    if not isinstance(requests, Mapping):
        if isinstance(requests, str) or not isinstance(requests, Sequence):
            raise InputError(
                f"requests is a {type(requests).__name__}; pass a list of forget sets, or a dict"
            )
        requests = {f"request {i}": data for i, data in enumerate(requests)}
    check_names("requests", requests)
    check_names("watch", watch)
    if not requests:
        raise InputError("requests is empty; pass at least one forget set")
    if taken := sorted({"forget", "unseen", *(watch or {})} & requests.keys()):
        raise InputError(f"requests has {taken[0]!r}, which is taken; choose another name")
    if arguments.get("checkpoint") is not None:
        raise InputError(
            "checkpoint is one file, and every request a run of its own; call imu_fast.unlearn for "
            "each, with a checkpoint of its own"
        )
    target = model if inplace else copied(model)
    sets = {name: rereadable(data, target) for name, data in requests.items()}
    results = {}
    with rolled_back(target, []) as kept:
        kept += copies_of([*target.parameters(), *target.buffers()])
        for name, data in requests.items():
            others = {key: other for key, other in sets.items() if key != name}
            own = sets[name] if isinstance(data, Iterator) else data
            results[name] = unlearn(
                target, own, method, watch={**(watch or {}), **others}, **arguments
            )
    return results
