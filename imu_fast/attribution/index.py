"""An index on disk of the gradients of a train set: built once, resumed where it was ended."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from imu_fast.attribution.gradient_index import ROWS, GradientIndex
from imu_fast.attribution.index_files import IndexFolder, folder_of
from imu_fast.attribution.index_reading import (
    Samples,
    as_data,
    captured,
    check_way,
    digest_of,
    layer_names,
    reading_text,
    weights_of,
)
from imu_fast.attribution.projection import Projection
from imu_fast.errors import InputError, NoSamplesError, check_count, check_flag, check_seed
from imu_fast.factors.indexed import LayerFacts, kept_on_cpu, layer_tensors, narrowed
from imu_fast.model.batches import empty_message
from imu_fast.model.guard import door
from imu_fast.model.reading import Reading, ReadingOptions

_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@door
def build_index(
    model: nn.Module,
    loader: Any,
    path: str | os.PathLike[str],
    *,
    layers: Any = "head",
    projection: int | None = None,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    chunk_size: int = 512,
    progress: bool = False,
    **reading: Unpack[ReadingOptions],
) -> GradientIndex:
    """Gradients of a train set in a folder, for queries that come later.

    Each finished chunk of samples is a safetensors file of its own, written under a temporary name
    first. A call that was ended goes on, with the same arguments, behind the last of them, and the
    index holds the same numbers as if it had not been. The data are read again from the start,
    compared with those that the chunks were made of, and run through the model from there on.

    Args:
        loader: n samples, in any form that :func:`imu_fast.capture` reads, in a fixed order.
        path: of a folder that is new, or holds an index that was begun with the same arguments.
        layers: whose gradients, as in :func:`imu_fast.capture`; of a weight that something else
            shares, an embedding say, those of the layer's own use of it, as the log says.
        projection: None: gradients as factors, exact, ``N (C + d)`` numbers for the N tokens at a
            layer [C, d]. k: each layer's gradient is projected at random to at most k numbers,
            ``A g B^T`` with A [a, C] and B [b, D] of random signs, ``a b <= k`` (LoGra: Choe et al.
            2024, arXiv 2405.13954). Inner products of projections are unbiased; the relative
            standard deviation of one token's squared norm is at most ``sqrt((1 + 2/a) (1 + 2/b) -
            1)``. A layer of at most k parameters is kept whole.
        seed: of the signs, in [0, 2^32): the same on every machine. None: 0. Refused without
            ``projection``, where nothing is drawn.
        dtype: what signals and inputs, or projections, are held in: ``torch.float64``,
            ``torch.float32`` or ``torch.bfloat16`` (half the bytes, rounded to 8 bits). Nothing is
            widened. None: as captured: float32 or float64, inputs of a half-precision model as they
            are.
        chunk_size: samples of a file, in whole batches: what an end costs at most.
        progress: show a bar.
        reading: ``output``, ``loss`` and its options, as in :func:`imu_fast.capture_features`; what
            a file can say, so no function.

    Returns:
        The index, whose samples stay on the disk.

    Raises:
        InputError: a bad argument; a folder with other files, or with an index of other arguments,
            weights or data (says which); a loader that shuffles; two layers that are one weight;
            and as :func:`imu_fast.capture`.
        WriteError: the file system refuses; finished chunks stay.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    where = folder_of(path)
    check_count("chunk_size", chunk_size)
    check_flag("progress", progress)
    made = Projection(
        1 if projection is None else check_count("projection", projection),
        check_seed("seed", 0 if seed is None else seed),
    )
    if projection is None and seed is not None:
        raise InputError(
            f"seed={seed} with projection=None: nothing is drawn; leave seed out, or pass "
            "projection"
        )
    if dtype is not None and dtype not in _DTYPES:
        raise InputError(
            f"dtype={dtype!r} is none of torch.float64, torch.float32 and torch.bfloat16; choose "
            "one of these, or None (in torch.float16 gradients would underflow)"
        )
    how = Reading.of("build_index()", reading)
    samples = Samples(loader, model, chunk_size)
    settings = {
        "layers": layer_names(model, layers),
        "reading": reading_text(how),
        "projection": projection,
        "seed": None if projection is None else made.seed,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "chunk_size": chunk_size,
        "loader": samples.length,
    }
    folder = IndexFolder.agreed(where, settings, weights_of(model))
    build = _Build(model, folder, how, None if projection is None else made, dtype)
    build.run(samples, progress, empty_message(loader))
    return GradientIndex(folder)


class _Build:
    """Chunk after chunk, behind those that are there."""

    def __init__(
        self,
        model: nn.Module,
        folder: IndexFolder,
        how: Reading,
        projection: Projection | None,
        dtype: torch.dtype | None,
    ) -> None:
        self._model, self._folder, self._how = model, folder, how
        self._projection, self._dtype = projection, dtype

    def run(self, samples: Samples, progress: bool, empty: str) -> None:
        from tqdm.auto import tqdm

        folder, manifest = self._folder, self._folder.manifest
        done, seen = len(manifest.chunks), 0
        for group in tqdm(samples, desc="index", unit="chunk", disable=not progress):
            batches, data = [batch.n for batch in group], digest_of(group)
            if seen < done:
                self._compare(seen, batches, data)
            elif manifest.complete:
                raise self._other("it has more samples than the index")
            else:
                self._add(group, batches, data)
            seen += 1
        if not seen:
            raise NoSamplesError(empty)
        if seen < done:
            raise self._other(f"it has {seen} chunks of samples, the index {done}")
        if not manifest.complete:
            manifest.complete = True
            folder.write()

    def _compare(self, number: int, batches: list[int], data: str) -> None:
        known = self._folder.manifest.chunks[number]
        if known.batches != batches:
            raise self._other(
                f"batches of chunk {number} have {batches} samples, the index's {known.batches}"
            )
        if known.data != data:
            raise self._other(f"the samples of chunk {number} are not those of the index")

    def _other(self, why: str) -> InputError:
        return InputError(
            f"loader: {self._folder.shown} holds an index of other data: {why}; pass the same, or "
            "choose another folder"
        )

    def _add(self, group: list[Any], batches: list[int], data: str) -> None:
        manifest = self._folder.manifest
        found, way = captured(self._model, as_data(group), manifest.settings["layers"], self._how)
        layers = [asdict(LayerFacts.of(layer, self._dtype)) for layer in found]
        if not manifest.layers:
            manifest.layers, manifest.way = layers, way
        number = len(manifest.chunks)
        if manifest.layers != layers:
            raise InputError(
                f"layers: chunk {number} of the samples has {layers}, those before "
                f"{manifest.layers}; name the layers one by one, or index these samples apart"
            )
        check_way(manifest.way, way, f"loader: chunk {number}")
        manifest.way["shift"] = sorted({*manifest.way["shift"], *way["shift"]})
        said = {"n": found[0].n, "batches": batches, "data": data}
        if self._projection is not None:
            rows = narrowed(self._projection.rows(found).cpu(), self._dtype)
            self._folder.add({ROWS: rows}, [], {**said, "tokens": [found[0].n]})
            return
        tensors: dict[str, Tensor] = {}
        texts, tokens = [], []
        for i, layer in enumerate(found):
            kept = kept_on_cpu(layer)
            own, text = layer_tensors(kept, self._dtype)
            tensors |= {f"{i}.{key}": value for key, value in own.items()}
            texts.append(text)
            tokens.append(kept.num_tokens)
        self._folder.add(tensors, texts, {**said, "tokens": tokens})


def load_index(path: str | os.PathLike[str]) -> GradientIndex:
    """The index that :func:`imu_fast.build_index` made at ``path``; its samples stay on the disk.

    Raises:
        InputError: there is none, it is not finished, its manifest is damaged or of another format.
    """
    folder = IndexFolder.opened(folder_of(path))
    if not folder.manifest.complete:
        n = sum(chunk.n for chunk in folder.manifest.chunks)
        raise InputError(
            f"{folder.shown} is not finished: it has the first {n} samples; call "
            "imu_fast.build_index with the same arguments, which goes on from there"
        )
    return GradientIndex(folder)
