"""What an index answers: influence of its samples on queries, samples read chunk after chunk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from imu_fast.attribution.index_files import IndexFolder
from imu_fast.attribution.index_reading import captured, check_way, reading_of, weights_of
from imu_fast.attribution.projected import (
    DAMPING,
    ProjectedFisher,
    as_factors,
    blocks_of,
    second_moments,
)
from imu_fast.attribution.projection import Projection
from imu_fast.curvature.base import Curvature
from imu_fast.curvature.fisher import Fisher
from imu_fast.curvature.identity import Identity
from imu_fast.curvature.named import CURVATURES, CurvatureName, OwnOptions
from imu_fast.errors import InputError, check_count
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.indexed import (
    IndexedFactors,
    Kept,
    LayerFacts,
    in_dtype,
    kept_on_cpu,
    layer_of,
)
from imu_fast.factors.source import Factors
from imu_fast.influence.scores import (
    Layers,
    curvature_of_pairs,
    pairwise_influence,
    self_influence,
)
from imu_fast.influence.top import By, top_influences
from imu_fast.model.forward import innermost
from imu_fast.model.guard import door

# What projections are called in a chunk's file.
ROWS = "rows"


def known_layers(folder: IndexFolder) -> list[LayerFacts]:
    """The layers that a manifest speaks of."""
    return [LayerFacts(**layer) for layer in folder.manifest.layers]


class GradientIndex:
    """Gradients of n samples on the disk; :func:`imu_fast.build_index` makes it.

    Samples are on the CPU, one chunk of them in memory at a time; each chunk's bytes are compared
    with their checksum when they are first read. Over several layers influence adds up, and M is
    block diagonal.

    Attributes:
        path: of the folder. n: samples. layers: their names, in the order of the model's.
        projection: k, or None. seed: of the projection.
    """

    def __init__(self, folder: IndexFolder) -> None:
        self._folder, self._facts = folder, known_layers(folder)
        settings = folder.manifest.settings
        self.path: Path = folder.path
        self.n: int = sum(chunk.n for chunk in folder.manifest.chunks)
        self.layers = [layer.name for layer in self._facts]
        self.projection: int | None = settings["projection"]
        self.seed: int | None = settings["seed"]
        self._moments: list[Tensor] | None = None

    def __repr__(self) -> str:
        how = "factors" if self.projection is None else f"projection={self.projection}"
        return f"GradientIndex({str(self.path)!r}, n={self.n}, {len(self.layers)} layers, {how})"

    def __len__(self) -> int:
        return self.n

    @property
    def nbytes(self) -> int:
        """Bytes of the chunks' files."""
        chunks = self._folder.manifest.chunks
        return sum((self.path / chunk.file).stat().st_size for chunk in chunks)

    @property
    def _projection(self) -> Projection | None:
        if self.projection is None or self.seed is None:
            return None
        return Projection(self.projection, self.seed)

    @property
    def _name(self) -> str:
        """Of projections that may be compared, whichever samples they are of."""
        return f"projection {self._folder.manifest.digest()}"

    def factors(self) -> list[Factors]:
        """The samples as factors that are read from the disk at each pass, one per layer.

        Whatever takes factors takes them. Of projections one, in float64, of a layer with one
        output: ``act`` [n, K] are the projections.
        """
        chunks = self._folder.manifest.chunks
        if (projection := self._projection) is not None:
            widths = sum(projection.widths(self._facts))
            facts = LayerFacts(self._name, 1, widths, False, "float64")
            read: list[Callable[[], Kept]] = [partial(self._rows, i) for i in range(len(chunks))]
            return [IndexedFactors(read, facts, self.n, self.n)]
        return [
            IndexedFactors(
                [partial(self._layer, i, k) for i in range(len(chunks))],
                facts,
                self.n,
                sum(chunk.tokens[k] for chunk in chunks),
            )
            for k, facts in enumerate(self._facts)
        ]

    def _rows(self, chunk: int) -> GradientFactors:
        return as_factors(self._folder.read(chunk)[0][ROWS], self._name)

    def _layer(self, chunk: int, layer: int) -> Kept:
        tensors, texts = self._folder.read(chunk, f"{layer}.")
        return layer_of(tensors, texts[layer])

    def capture(self, model: nn.Module, loader: Any, *, progress: bool = False) -> Layers:
        """Queries in the index's form: read, and projected, as its samples were.

        Args:
            model: with the weights and buffers that the index was built with.
            loader: m queries, in any form that :func:`imu_fast.capture` reads.

        Returns:
            Factors of each layer; of a projected index one, whose ``act`` [m, K] are projections.

        Raises:
            InputError: a model with other weights; and as :func:`imu_fast.capture`.
        """
        return _captured(model, self, loader, progress)

    def scores(
        self,
        queries: Layers,
        *,
        curvature: CurvatureName | Curvature | None = None,
        damping: float | None = None,
        **options: Unpack[OwnOptions],
    ) -> Tensor:
        """``- g_i^T M^-1 h_j`` of every sample on every query: [n, m].

        As :func:`imu_fast.pairwise_influence` on the factors, or projections, of all samples; M is
        made of these.

        Args:
            queries: :meth:`capture` gives them; of an index that is not projected, any factors of
                its layers on the CPU.
            curvature, damping, options: of factors: any, as in :func:`imu_fast.pairwise_influence`,
                default included. Those of them that need all factors in memory refuse more than 4
                GB; signals of the model's own predictions (``capture(..., fisher=)``) are not kept,
                so ``kfac``, ``ekfac``, ``ggn`` and ``ggn_block`` of layers other than the head take
                ``fisher="empirical"``. Of projections: ``"identity"``, or ``"fisher"``:
                ``G^T G / n + lam I`` [k, k] of each layer (Park et al. 2023; Choe et al. 2024); by
                default ``imu.Fisher(damping=0.1, damping_mode="relative")``.

        Returns:
            In the factors' dtype; of projections in float64.

        Raises:
            InputError: queries that are not the index's; a curvature that it cannot have; a chunk
                that is damaged (names the file).
        """
        source, asked, spec = self._prepared(queries, curvature, damping, options)
        return pairwise_influence(source, asked, curvature=spec)

    def top(
        self,
        queries: Layers,
        k: int,
        *,
        by: By = "helpful",
        curvature: CurvatureName | Curvature | None = None,
        damping: float | None = None,
        **options: Unpack[OwnOptions],
    ) -> tuple[Tensor, Tensor]:
        """The k samples of largest influence on every query, as :func:`imu_fast.top_influences`.

        Other arguments and errors as in :meth:`scores`.

        Returns:
            values [m, k] and indices [m, k] int64.
        """
        if check_count("k", k) > self.n:
            raise InputError(f"k={k} is more than the {self.n} samples of the index; pass fewer")
        source, asked, spec = self._prepared(queries, curvature, damping, options)
        return top_influences(source, asked, k, by=by, curvature=spec)

    def self_influence(
        self,
        *,
        curvature: CurvatureName | Curvature | None = None,
        damping: float | None = None,
        **options: Unpack[OwnOptions],
    ) -> Tensor:
        """``g_i^T M^-1 g_i`` of every sample: [n].

        Arguments, the default and errors as in :meth:`scores`.
        """
        source = self.factors()
        spec = self._curvature(source, curvature, {"damping": damping, **options})
        if self.projection is not None and isinstance(spec, Fisher):
            return ProjectedFisher(self._second_moments(source), spec).self_influence(source[0])
        return self_influence(source, curvature=spec)

    def _prepared(
        self,
        queries: Layers,
        curvature: CurvatureName | Curvature | None,
        damping: float | None,
        options: Any,
    ) -> tuple[list[Factors], Layers, Curvature]:
        """Of projections the queries are solved for, and the rest is inner products."""
        source = self.factors()
        spec = self._curvature(source, curvature, {"damping": damping, **options})
        if self.projection is None:
            return source, queries, spec
        if not isinstance(queries, GradientFactors) or queries.name != self._name:
            raise InputError(
                "queries are no projections of this index's (layers, seed and weights); "
                "index.capture(model, loader) makes them"
            )
        if isinstance(spec, Fisher):
            queries = ProjectedFisher(self._second_moments(source), spec).solved(queries)
        return source, queries, Identity()

    def _curvature(
        self,
        source: list[Factors],
        curvature: CurvatureName | Curvature | None,
        given: dict[str, Any],
    ) -> Curvature:
        if self.projection is None:
            return curvature_of_pairs(source, curvature, given)
        named = [f"{name}={value!r}" for name, value in given.items() if value is not None]
        if curvature is None and not named:
            return Fisher(damping=DAMPING, damping_mode="relative")
        spec = CURVATURES.choose("fisher" if curvature is None else curvature, **given)
        if isinstance(spec, Fisher | Identity):
            return spec
        raise InputError(
            f"curvature={spec.name!r} is of a layer's outputs and inputs, which projections no "
            "longer have; use 'fisher' or 'identity', or an index with projection=None"
        )

    def _second_moments(self, source: list[Factors]) -> list[Tensor]:
        """``G^T G / n`` of each layer; made once."""
        projection = self._projection
        assert projection is not None
        if self._moments is None:
            blocks = blocks_of(projection.widths(self._facts))
            self._moments = second_moments(source[0], blocks)
        return self._moments


@door
def _captured(model: nn.Module, index: GradientIndex, loader: Any, progress: bool) -> Layers:
    """:meth:`GradientIndex.capture`, by the door whose first argument is the model."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    model, folder, facts = innermost(model), index._folder, index._facts
    folder.check_weights(weights_of(model))
    settings = folder.manifest.settings
    how = reading_of(settings["reading"])
    found, way = captured(model, loader, settings["layers"], how, progress)
    check_way(folder.manifest.way, way, "loader")
    if (projection := index._projection) is not None:
        return as_factors(projection.rows(found).cpu(), index._name)
    return [
        in_dtype(kept_on_cpu(layer), one.dtype) for layer, one in zip(found, facts, strict=True)
    ]
