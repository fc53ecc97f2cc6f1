"""How an index reads a model and its data: samples, and queries that come later, alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.distributed import text_of
from imu_fast.errors import InputError
from imu_fast.factors.unfolded import UnfoldedFactors
from imu_fast.influence.scores import as_layers
from imu_fast.model.batches import ForgetSet, Parts, Reread, as_batches
from imu_fast.model.capture import capture
from imu_fast.model.causal import decisions
from imu_fast.model.loss import NoLabelsError
from imu_fast.model.order import shuffling
from imu_fast.model.reader import Reader
from imu_fast.model.reading import Reading
from imu_fast.model.selection import selected
from imu_fast.model.shared import checksums, settings


def weights_of(model: nn.Module) -> dict[str, str]:
    """Checksums of all parameters and buffers, and the modules' settings, as text by name."""
    return {name: repr(found) for name, found in checksums(model).items()} | settings(model)


def layer_names(model: nn.Module, layers: Any) -> str | list[str]:
    """``"head"``, or the names of the layers that ``layers=`` stands for.

    Raises:
        InputError: two of them are one weight, whose gradient is the sum of both uses.
    """
    if isinstance(layers, str) and layers == "head":
        return layers
    chosen, _ = selected(model, layers)
    whose: dict[int, str] = {}
    for layer in chosen:
        for parameter in layer.module.parameters(recurse=False):
            other = whose.setdefault(id(parameter), layer.name)
            if other != layer.name:
                raise InputError(
                    f"layers: {other!r} and {layer.name!r} share one parameter, whose gradient is "
                    "the sum over both of its uses, which no inner product of either has; leave "
                    "one of the two layers out"
                )
    return [layer.name for layer in chosen]


def reading_text(how: Reading) -> dict[str, Any]:
    """As a manifest keeps it; :func:`reading_of` is its inverse.

    Raises:
        InputError: it holds a function, or a loss that has no name.
    """
    try:
        kept: dict[str, Any] = json.loads(json.dumps(how.flat()))
        same = text_of(reading_of(kept)) == text_of(how)
    except (TypeError, ValueError):
        same = False
    if not same:
        raise InputError(
            f"output={how.output!r}, loss={how.loss!r}: the index's folder has to say how its "
            "model is read, and no file can hold these; pass output= as a key, an attribute, an "
            "index or a path of them, and a loss of imu_fast"
        )
    return kept


def reading_of(kept: Mapping[str, Any]) -> Reading:
    """How a model is read, out of a manifest."""
    output = kept["output"]
    path = tuple(output) if isinstance(output, list) else output
    return Reading.of("index", {**kept, "output": path})


def captured(
    model: nn.Module, loader: Any, layers: str | list[str], how: Reading, progress: bool = False
) -> tuple[list[Any], dict[str, Any]]:
    """Factors of the layers, and the way that the model was read where that showed in the data."""
    more: Any = how.given()
    with decisions() as shifts:
        found = as_layers(
            capture(model, loader, layers=layers, progress=progress, **more), "layers"
        )
    losses = [text_of(getattr(layer, "loss", None)) for layer in found]
    return found, {"losses": losses, "shift": sorted(shifts)}


def captured_beside(
    group: list[Parts], labelled: list[Parts] | None, capture: Callable[[Reread], Any]
) -> Any:
    """Of a group's samples what :func:`captured` has; no label at all is no gradient, as of one.

    A group of such samples has a place in the index, and is run beside another one that has labels.

    Args:
        labelled: other batches; None: there are none yet. capture: of batches.

    Raises:
        NoLabelsError: the group has no label, and there are no others.
    """
    try:
        return capture(as_data(group))
    except NoLabelsError:
        if labelled is None:
            raise
    found, way = capture(as_data([*group, *labelled]))
    n = sum(batch.n for batch in group)
    return [_without_inputs(layer.samples(0, n)) for layer in found], way


def _without_inputs(layer: Any) -> Any:
    """Samples without tokens need no images of others."""
    return replace(layer, inputs=[]) if isinstance(layer, UnfoldedFactors) else layer


def check_way(known: dict[str, Any], found: dict[str, Any], what: str) -> None:
    """Raise InputError where some samples were read in another way than others.

    Args:
        what: holds the others, as the message begins.
    """
    shifts = set(known["shift"]) | set(found["shift"])
    if known["losses"] != found["losses"] or len(shifts) > 1:
        raise InputError(
            f"{what} is read in another way than the index's first samples: losses "
            f"{found['losses']}, shift={found['shift']} here, {known['losses']}, "
            f"shift={known['shift']} there; say it when building, by "
            "loss=imu.CrossEntropy(shift=True) or shift=False"
        )


class Samples:
    """Data in the order of one pass, in groups of whole batches.

    Args:
        chunk_size: samples of a group, or of one larger batch.

    Attributes:
        length: how many there are, in words, where the data say; else None.

    Raises:
        InputError: this is no data, or its order is not the same each time.
    """

    def __init__(self, loader: Any, model: nn.Module, chunk_size: int) -> None:
        self._loader, self._model, self._size = loader, model, chunk_size
        self.length: str | None = None
        if not isinstance(loader, ForgetSet | Reread):
            reader = Reader(loader, model)
            self.length = _length(reader)
            if (sampler := shuffling(reader.loader)) is not None:
                raise InputError(
                    f"loader shuffles ({sampler}), so that samples of an index have no place of "
                    "their own; pass a loader with shuffle=False"
                )

    def __iter__(self) -> Iterator[list[Parts]]:
        group: list[Parts] = []
        for batch in as_batches(self._loader, self._model):
            if group and sum(part.n for part in group) + batch.n > self._size:
                yield group
                group = []
            group.append(batch)
        if group:
            yield group


def _length(reader: Reader) -> str | None:
    if reader.whole is not None:
        return f"{reader.whole.n} samples"
    data: Any = getattr(reader.loader, "dataset", None)
    for value, unit in ((data, "samples"), (reader.loader, "items")):
        try:
            return f"{len(value)} {unit}"
        except (TypeError, NotImplementedError, AttributeError):
            continue
    return None


def as_data(group: list[Parts]) -> Reread:
    """The batches of a group, to be read any number of times."""
    return Reread(lambda: iter(group))


def digest_of(group: list[Parts]) -> str:
    """What says that batches hold the same numbers in the same places."""
    found = hashlib.blake2b(digest_size=16)

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            found.update(f"{value.dtype} {value.layout}".encode())
            odd = value.is_nested or value.is_quantized or value.is_meta
            if odd or value.layout != torch.strided:  # no bytes in rows, which models may take
                return value
            kept = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
            found.update(repr(tuple(kept.shape)).encode())
            if kept.numel():
                found.update(kept.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, bool | int | float | str | None):
            found.update(repr(value).encode())
        return value

    for batch in group:
        found.update(repr((len(batch.args), sorted(batch.kwargs))).encode())
        batch.mapped(leaf)
    return found.hexdigest()
