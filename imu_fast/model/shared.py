"""Captures of what each process of a group has, made one set of samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from imu_fast import distributed
from imu_fast.ambient import random_state_kept
from imu_fast.errors import InputError, NoSamplesError
from imu_fast.factors.sharded import ShardedFactors
from imu_fast.factors.source import Factors
from imu_fast.model.batches import ForgetSet, Reread, as_batches
from imu_fast.model.causal import decisions
from imu_fast.model.features import HeadFeatures
from imu_fast.model.forward import innermost
from imu_fast.model.guard import preserved
from imu_fast.model.order import generators_kept, index_batches, places_shared_out
from imu_fast.model.parts import Data
from imu_fast.model.reader import Reader

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
# Elements that are weighed at once, and what the sums of one block after another are taken times.
_BLOCK, _NEXT = 1 << 18, 0x9E3779B97F4A7C15


def check_same_model(model: Any, group: distributed.Group) -> None:
    """Raise InputError where processes have other weights, buffers or settings; compared are the
    bits, summed, and what :func:`settings` names.

    Buffers make features, too: DistributedDataParallel leaves each process the running statistics
    of its own last batch.
    """
    known = settings(model) if isinstance(model, nn.Module) else {}
    sums = checksums(model) | known if isinstance(model, nn.Module) else {}
    digest = hashlib.blake2b(repr(sums).encode(), digest_size=16).hexdigest()
    if len(set(distributed.gather(digest, group))) == 1:
        return
    found = distributed.gather(sums, group)
    names = list(dict.fromkeys(name for one in found for name in one))
    odd = [name for name in names if any(one.get(name) != found[0].get(name) for one in found)]
    way = (
        "load the same state in each, or copy the first one's: "
        "for t in model.state_dict().values(): torch.distributed.broadcast(t, 0)"
    )
    if odd[0] in known:  # a number that a module holds
        way = "set it to the same number in each"
    raise InputError(
        f"model: {odd[0]} (and {len(odd) - 1} more) differs among the processes, which share "
        f"samples of one model; {way}"
    )


def check_each_once(loader: Any, group: distributed.Group) -> None:
    """Raise InputError where a sampler gives a sample to two processes: it would count twice.

    torch's DistributedSampler and accelerate's do, to make the processes' shares equal.
    """
    own = places_shared_out(loader.loader if isinstance(loader, Data) else loader)
    if not any(distributed.gather(own is not None, group)):
        return
    every = distributed.rows_of_all(torch.tensor(own or [], dtype=torch.int64), group)
    places, counts = every.unique(return_counts=True)
    if len(places) == len(every):
        return
    raise InputError(
        f"loader: its sampler gives {len(every) - len(places)} samples twice (first: place "
        f"{int(places[counts > 1][0])} of the data set) to make the processes' shares equal, and "
        "they would count twice; read in each process its own part, by torch.utils.data."
        "Subset(dataset, range(rank, len(dataset), world)), uneven as it is, or leave samples out, "
        "by drop_last=True of the sampler"
    )


def checksums(model: nn.Module) -> dict[str, Any]:
    """Of each parameter and buffer: shape, dtype, and a sum of its bits that weighs each place."""
    inner = innermost(model)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(1 << 62), 1 << 62, (_BLOCK,), generator=generator)
    named = (*inner.named_parameters(), *inner.named_buffers())
    return {name: _checksum(tensor, weights) for name, tensor in named}


def settings(model: nn.Module) -> dict[str, str]:
    """Real numbers that modules hold beside their tensors, by name: a norm's eps, an adapter's
    scaling, a temperature. Of the same weights they make another model."""
    return {
        f"{name}.{key}" if name else key: repr(found)
        for name, module in innermost(model).named_modules()
        for key, value in vars(module).items()
        if not key.startswith("_") and (found := _reals(value)) is not None
    }


def _reals(value: Any) -> Any:
    if isinstance(value, float):
        return float(value)
    if isinstance(value, dict) and value and all(isinstance(v, float) for v in value.values()):
        return sorted((str(k), float(v)) for k, v in value.items())
    if isinstance(value, list | tuple) and value and all(isinstance(v, float) for v in value):
        return list(map(float, value))
    return None


def _checksum(tensor: Tensor, weights: Tensor) -> Any:
    """Modulo 2^64, where a product of 32 bits and a random weight keeps all of them: without
    weights classes that change places, and pairs of changed signs, would add up to the same."""
    kind = (tuple(tensor.shape), str(tensor.dtype))
    flat = tensor.detach()
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        return kind
    flat = torch.view_as_real(flat) if flat.is_complex() else flat
    bits = flat.contiguous().flatten().view(_BITS[flat.itemsize])
    weights, total = weights.to(bits.device), 0
    for start in range(0, len(bits), _BLOCK):
        piece = bits[start : start + _BLOCK].long()
        found = int((piece * weights[: len(piece)]).sum())
        total = (total * _NEXT + found) % (1 << 64)
    return (*kind, total)


def shared_factors(
    model: Any,
    group: distributed.Group,
    capture: Callable[[int], Any],
    count: Callable[[], int] | None = None,
) -> ShardedFactors | list[ShardedFactors]:
    """What ``capture`` gives in each process, or NoSamplesError in some, as one set.

    Args:
        capture: of the place of this process's first sample among those of all, where these are
            counted first; else of 0. count: this process's samples.

    Raises:
        InputError: models, layers or dtypes differ, one process's data is refused, or there is none
            at all, or not what was counted.
    """
    check_same_model(model, group)
    counted = None if count is None else distributed.gather(count(), group)
    first = 0 if counted is None else sum(counted[: distributed.rank_of(group)])
    found: Any = None
    with decisions() as shifts, suppress(NoSamplesError):
        found = capture(first)
    _check_shift(shifts, group)
    several = len(found) if isinstance(found, list) else 0
    counts = distributed.gather(None if found is None else several, group)
    known = {count for count in counts if count is not None}
    if not known:
        raise InputError("loader is empty in every process; pass at least one sample in all")
    if len(known) > 1:
        raise InputError(f"layers: processes capture {counts} of them; name the same in each")
    many = known.pop()
    layers: list[Factors | None] = [None] * max(1, many)
    if found is not None:
        layers = found if many else [found]
    shared = [ShardedFactors(layer, group) for layer in layers]
    if counted not in (None, shared[0].counts):
        raise InputError(
            f"loader: processes gave {shared[0].counts} samples, and {counted} when these were "
            "counted, by which fisher='sampled' tells their draws apart; pass data that give the "
            "same each time"
        )
    return shared if many else shared[0]


def samples_of(model: nn.Module, loader: Any) -> int:
    """How many a loader gives, which is read for that where it does not say.

    Raises:
        InputError: it can be read once only.
    """
    if isinstance(loader, ForgetSet):
        return loader.n
    if isinstance(loader, Reread):
        return sum(part.n for part in loader)
    reader = Reader(loader, model)
    if isinstance(reader.loader, Iterator):
        raise InputError(
            f"loader is a {type(reader.loader).__name__}, which can be read once, and "
            "fisher='sampled' with group counts the samples of each process first: a sample's "
            "draws are by its place among all; pass a list or a DataLoader, or fisher='exact'"
        )
    if reader.whole is not None:
        return reader.whole.n
    batches = [[None] * len(reader.loader)] if reader.is_dataset else index_batches(reader.loader)
    # A function of the user's may make more or fewer samples of a batch's items.
    plain = reader.is_dataset or getattr(reader.loader, "collate_fn", None) is default_collate
    if batches is not None and plain:
        return sum(map(len, batches))
    # The loader runs the user's code.
    with preserved(model), random_state_kept(), generators_kept(reader.loader):
        return sum(part.n for part in reader)


def shared_features(
    model: Any, loader: Any, group: distributed.Group, capture: Callable[[Any], HeadFeatures]
) -> HeadFeatures:
    """The head's inputs of all processes in each of them, in the order of the ranks.

    A process without samples reads one of another's, to find the head, and leaves it out.

    Args:
        capture: of any form of data.

    Raises:
        InputError: as :func:`shared_factors`.
    """
    check_same_model(model, group)
    check_each_once(loader, group)
    loader, first = _lendable(model, loader)
    found: HeadFeatures | None = None
    with decisions() as shifts, suppress(NoSamplesError):
        found = capture(loader)
    _check_shift(shifts, group)
    here = distributed.gather(found is not None, group)
    if not any(here):
        raise InputError("loader is empty in every process; pass at least one sample in all")
    count = 0 if found is None else len(found.offsets) - 1
    if not all(here):
        lends = here.index(True) == distributed.rank_of(group)
        lent = distributed.gather(_one_sample(first(), found) if lends else None, group)
        if found is None:
            found = capture([next(one for one in lent if one is not None)])
    assert found is not None
    return _joined(found, count, group)


def _check_shift(shifts: set[bool], group: distributed.Group) -> None:
    """Raise InputError where labels of one process are the next position's, of another their own.

    Each finds out by its own first batch, as one process with all samples would by one alone.
    """
    each = distributed.gather(shifts, group)
    if len(set().union(*each)) > 1:
        said = "; ".join(
            f"process {rank} shift={', '.join(map(str, sorted(one)))}"
            for rank, one in enumerate(each)
            if one
        )
        raise InputError(
            f"loss: processes find different places for the labels ({said}); say it to all, by "
            "loss=imu.CrossEntropy(shift=True) or shift=False"
        )


def _lendable(model: nn.Module, loader: Any) -> tuple[Any, Callable[[], Any]]:
    """The data to read, and what gives their first batch again, though they be an iterator."""
    if isinstance(model, nn.Module) and not isinstance(loader, ForgetSet | Reread):
        reader = Reader(loader, model)
        if isinstance(reader.loader, Iterator):
            rest = iter(reader)
            first = list(islice(rest, 1))
            return Reread(lambda: chain(first, rest)), lambda: first[0]
    return loader, lambda: next(iter(as_batches(loader, model)))


def _one_sample(batch: Any, found: HeadFeatures | None) -> Any:
    """Of a process's first batch, with a label where any has one."""
    assert found is not None
    labelled = found.offsets.diff()[: batch.n] > 0
    one = batch.taken([int(labelled.int().argmax())])
    return one.mapped(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x)


def _joined(found: HeadFeatures, count: int, group: distributed.Group) -> HeadFeatures:
    said_of = distributed.text_of((found.output, found.loss))
    read = (found.name, found.sequences, said_of)
    said = (read, found.linear, found.between, found.write_back)
    each = distributed.gather(said, group)
    for rank, (other, *_) in enumerate(each):
        if other != each[0][0]:
            raise InputError(
                f"process {rank} reads (head, sequences, output and loss) {other}, process 0 "
                f"{each[0][0]}; pass the same layers, output and loss to all"
            )
    tokens = int(found.offsets[count])

    def rows(x: Tensor, kept: int = tokens) -> Tensor:
        return distributed.rows_of_all(x[:kept], group)

    counts = rows(found.offsets.diff(), count)
    between = dict.fromkeys(between for _, _, between, _ in each if between)
    return replace(
        found,
        features=rows(found.features.detach()),
        labels=rows(found.labels),
        offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        linear=all(linear for _, linear, _, _ in each),
        between=", ".join(between),
    )
