"""The order in which a loader gives its samples, and which of them it leaves out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import data

from imu_fast.ambient import default_device_back, random_state_kept

logger = logging.getLogger("imu_fast")

# Entries of a sampler of unknown kind that are compared between two of its iterations.
_COMPARED = 4096
# Where wrappers of loaders and samplers keep what they wrap.
_WRAPPED = ("batch_sampler", "sampler", "base_dataloader", "base_sampler", "loader", "dataloader")


def samplers_of(loader: Any) -> list[Any]:
    """Every sampler of a loader, the outermost first, inside whatever wraps it."""
    found: list[Any] = []
    waiting, seen = [loader], {id(loader)}
    while waiting:
        outer = waiting.pop(0)
        for name in _WRAPPED:
            inner = getattr(outer, name, None)
            if inner is None or id(inner) in seen or callable(inner):
                continue
            seen.add(id(inner))
            waiting.append(inner)
            if "loader" not in name:
                found.append(inner)
    return found


@contextmanager
def generators_kept(loader: Any) -> Iterator[None]:
    """A loader's own generators as they were, so that its next pass has the same order again."""
    owners = [loader, *samplers_of(loader)]
    found = [getattr(owner, "generator", None) for owner in owners]
    states = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _shuffles(sampler: Any) -> bool:
    known = data.RandomSampler | data.SubsetRandomSampler | data.WeightedRandomSampler
    name = type(sampler).__name__
    if isinstance(sampler, known) or "Random" in name or "Shuffle" in name:
        return True
    return getattr(sampler, "shuffle", None) is True


def _keeps_its_order(sampler: Any) -> bool:
    """Whether a sampler certainly gives the same order each time."""
    plain = data.SequentialSampler, data.BatchSampler, list, tuple, range, Tensor, np.ndarray
    return type(sampler) in plain or isinstance(sampler, Iterator)


def _entries(sampler: Any) -> list[Any]:
    return [
        list(map(int, entry)) if isinstance(entry, list | tuple | Tensor) else entry
        for entry in islice(sampler, _COMPARED)
    ]


def _differs_between_iterations(loader: Any, outermost: Any) -> bool:
    with random_state_kept():
        try:
            # A copy, for a sampler may count its iterations; not of the data, which may be large.
            kept = {id(loader.dataset): loader.dataset} if hasattr(loader, "dataset") else {}
            trial = copy.deepcopy(outermost, kept)
        except Exception:  # whatever a user's sampler holds that cannot be copied
            trial = outermost
        try:
            return _entries(trial) != _entries(trial)
        except (TypeError, ValueError):  # entries that are no numbers: not to be compared
            return False


def shuffling(loader: Any) -> str | None:
    """The name of the sampler because of which a loader's order is not the same each time."""
    samplers = samplers_of(loader)
    if not getattr(loader, "in_order", True) and getattr(loader, "num_workers", None):
        return "in_order=False"
    for sampler in samplers:
        if _shuffles(sampler):
            return type(sampler).__name__
    unknown = [sampler for sampler in samplers if not _keeps_its_order(sampler)]
    if unknown and _differs_between_iterations(loader, samplers[0]):
        return type(unknown[-1]).__name__
    return None


def warn_of_order(loader: Any) -> None:
    """Say, through the log, that a loader shuffles."""
    name = shuffling(loader)
    if name is not None:
        logger.warning(
            "the loader shuffles (%s): scores, indices and weights follow the order of this one "
            "pass, not the dataset's; a loader with shuffle=False keeps it",
            name,
        )


def _shares(sampler: Any) -> int:
    """Among how many processes a sampler shares its samples out."""
    found = getattr(sampler, "num_replicas", getattr(sampler, "num_processes", 1))
    return found if isinstance(found, int) else 1


def places_shared_out(loader: Any) -> list[int] | None:
    """The places in the data set of what a loader gives here that shares it out among processes.

    None: it does not, it draws with replacement, or where samples are is not to be had.
    """
    samplers = samplers_of(loader)
    draws = any(getattr(sampler, "replacement", False) for sampler in samplers)
    if draws or not any(_shares(sampler) > 1 for sampler in samplers):
        return None
    batches = index_batches(loader)
    sampler = getattr(loader, "batch_sampler", None)
    if batches is None and sampler is not None and shuffling(loader) is None:
        batches = [[_index(i) for i in batch] for batch in sampler]  # of accelerate
    if batches is None:
        return None
    found = [place for batch in batches for place in batch]
    return found if all(isinstance(place, int) for place in found) else None


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except (TypeError, NotImplementedError, AttributeError):
        return None


def remarks(loader: Any) -> list[str]:
    """What of its data a loader does not give here, one sentence each."""
    said = []
    for sampler in samplers_of(loader):
        if isinstance(sampler, data.BatchSampler) and sampler.drop_last:
            total = _length(sampler.sampler)
            left_out = 0 if total is None else total % sampler.batch_size
            if left_out:
                said.append(
                    f"the loader has drop_last=True: its last {left_out} of {total} samples are "
                    "left out; drop_last=False keeps them"
                )
        if (shares := _shares(sampler)) > 1:
            rank = getattr(sampler, "rank", getattr(sampler, "process_index", "?"))
            said.append(
                f"the loader is distributed: this process reads share {rank} of {shares}, which "
                "may repeat samples to make the shares equal"
            )
    workers = getattr(loader, "num_workers", 0)
    iterable = isinstance(getattr(loader, "dataset", None), data.IterableDataset)
    if iterable and isinstance(workers, int) and workers > 1:
        said.append(
            f"the loader has {workers} workers over an IterableDataset: samples come {workers} "
            "times unless the dataset shares them out by torch.utils.data.get_worker_info()"
        )
    return said


def say_remarks(loader: Any) -> None:
    """:func:`remarks`, through the log."""
    for text in remarks(loader):
        logger.warning("%s", text)


def index_batches(loader: Any) -> list[list[Any]] | None:
    """The dataset's indices of every batch, in the order of one pass; None: not to be had.

    The sampler is iterated once, its repetitions kept. There are indices where a DataLoader with
    torch's own iteration reads a map-style dataset, so that reading by index gives what iterating
    gives.
    """
    if not isinstance(loader, data.DataLoader) or loader.batch_sampler is None:
        return None
    if isinstance(loader.dataset, data.IterableDataset):
        return None
    if type(loader).__iter__ is not data.DataLoader.__iter__:  # it does more than read
        return None
    with random_state_kept(), generators_kept(loader), default_device_back():
        # The number that torch's own iteration draws before its sampler does: the same order.
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
        batches: Iterable[Any] = loader.batch_sampler
        return [[_index(i) for i in batch] for batch in batches]


def _index(value: Any) -> Any:
    return int(value) if isinstance(value, Tensor | np.integer) else value
