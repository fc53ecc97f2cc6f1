"""Factors in files, chunk after chunk: each is mapped when its turn comes, and then let go."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.implicit_head import ImplicitHead
from imu_fast.factors.operands import narrowed
from imu_fast.factors.packed import packed, unpacked
from imu_fast.factors.samples import Chunks
from imu_fast.factors.unfolded import UnfoldedFactors, Unfolding

Kept = GradientFactors | UnfoldedFactors
_UNFOLDING, _INPUTS = "unfolding", "inputs."


def kept_on_cpu(factors: Any) -> Kept:
    """Captured factors of one layer with their signal stored, in the CPU's memory."""
    if isinstance(factors, UnfoldedFactors):
        return replace(
            factors,
            delta=factors.delta.cpu(),
            places=factors.places.cpu(),
            inputs=[images.cpu() for images in factors.inputs],
        )
    stored = factors.stored() if isinstance(factors, ImplicitHead) else factors
    found: GradientFactors = stored.to("cpu")
    return found


def in_dtype(factors: Kept, dtype: str) -> Kept:
    """With chunks in ``dtype``."""
    wanted = getattr(torch, dtype)
    if isinstance(factors, UnfoldedFactors):
        return replace(factors, delta=factors.delta.to(wanted))
    return factors.to(dtype=wanted)


def read_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in with numbers that a file holds in ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def layer_tensors(
    factors: Kept, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file holds of one layer; :func:`layer_of` is its inverse but for the rounding.

    Args:
        dtype: of signal and inputs, where they are wider; None: as they are.
    """
    if isinstance(factors, UnfoldedFactors):
        tensors = {
            "delta": narrowed(factors.delta, dtype),
            "places": factors.places,
            "offsets": factors.offsets,
        }
        for i, images in enumerate(factors.inputs):
            tensors[f"{_INPUTS}{i}"] = narrowed(images, dtype)
        return tensors, {
            _UNFOLDING: json.dumps(dataclasses.asdict(factors.unfolding)),
            "feature_dim": str(factors.feature_dim),
            "has_bias": str(int(factors.has_bias)),
            "name": factors.name,
        }
    tensors, text = packed(factors)
    return tensors | {k: narrowed(tensors[k], dtype) for k in ("delta", "act")}, text


def layer_of(tensors: Mapping[str, Tensor], text: Mapping[str, str]) -> Kept:
    """The factors of a file, in :func:`read_dtype` of its signal's."""
    wide = read_dtype(tensors["delta"].dtype)
    if _UNFOLDING in text:
        kept = json.loads(text[_UNFOLDING]).items()
        how: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in kept}
        calls = sum(key.startswith(_INPUTS) for key in tensors)
        return UnfoldedFactors(
            delta=tensors["delta"].to(wide),
            places=tensors["places"],
            inputs=[tensors[f"{_INPUTS}{i}"] for i in range(calls)],
            offsets=tensors["offsets"],
            unfolding=Unfolding(**how),
            feature_dim=int(text["feature_dim"]),
            has_bias=text["has_bias"] == "1",
            name=text["name"],
        )
    same = {**tensors, "delta": tensors["delta"].to(wide), "act": tensors["act"].to(wide)}
    return unpacked(GradientFactors, same, text).to(dtype=wide)


@dataclass(frozen=True)
class LayerFacts:
    """What is known of an indexed layer without its samples.

    Attributes:
        name, num_classes, feature_dim, has_bias: of the layer. dtype: of what chunks hold.
    """

    name: str
    num_classes: int
    feature_dim: int
    has_bias: bool
    dtype: str

    @classmethod
    def of(cls, factors: Any, dtype: torch.dtype | None) -> LayerFacts:
        """Of factors that will be held in ``dtype``."""
        held = factors.dtype if dtype is None else min(factors.dtype, dtype, key=_width)
        shown = str(read_dtype(held)).removeprefix("torch.")
        return cls(factors.name, factors.num_classes, factors.feature_dim, factors.has_bias, shown)

    @property
    def width(self) -> int:
        """D."""
        return self.feature_dim + self.has_bias


def _width(dtype: torch.dtype) -> int:
    return dtype.itemsize


class IndexedFactors(Chunks[GradientFactors]):
    """One layer's samples in files.

    Args:
        parts: read one file's samples of the layer.
        n, num_tokens: of all of them.
    """

    device = torch.device("cpu")

    def __init__(
        self, parts: Sequence[Callable[[], Kept]], facts: LayerFacts, n: int, num_tokens: int
    ) -> None:
        self._parts = parts
        self.n = self.n_here = n
        self.num_tokens = num_tokens
        self.num_classes, self.feature_dim = facts.num_classes, facts.feature_dim
        self.width, self.has_bias, self.name = facts.width, facts.has_bias, facts.name
        self.dtype: torch.dtype = getattr(torch, facts.dtype)

    def chunks(self, max_tokens: int | None = None) -> Iterator[GradientFactors]:
        """File after file."""
        for part in self._parts:
            yield from part().chunks(max_tokens)
