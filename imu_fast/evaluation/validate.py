"""Are scores right as influence? Retrain on random subsets, and compare: :func:`validate`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from imu_fast.attribution.similarity import pairwise_similarity
from imu_fast.curvature.base import Curvature
from imu_fast.curvature.gauss_newton import fisher_for
from imu_fast.curvature.named import CURVATURES
from imu_fast.errors import (
    InputError,
    brief,
    check_choice,
    check_count,
    check_finite_rows,
    check_installed,
    check_seed,
)
from imu_fast.evaluation.datamodels import (
    linear_datamodeling_score,
    memorisation,
    random_subsets,
    rank_correlation,
)
from imu_fast.evaluation.statistics import t_interval
from imu_fast.evaluation.trak import check_samples, trak
from imu_fast.influence.scores import pairwise_influence, self_influence
from imu_fast.model.capture import capture
from imu_fast.model.labels import class_labels
from imu_fast.model.outputs import outputs_of
from imu_fast.storage import load_tensors, save_tensors

Samples = tuple[Tensor, Tensor]
# Trains a model on samples (x, y), from a seed, and returns it.
Train = Callable[[Samples, int], nn.Module]
# What attributes: (the model of all samples, models of random halves, data, queries) to [n, m].
Attribute = Callable[[nn.Module, "list[nn.Module]", Samples, Samples], Tensor]
DAMPINGS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
# Samples and queries that every candidate is tried on.
_TRIED = 8
# Models of random halves for TRAK, as its paper uses an ensemble.
_HALVES = 5


@dataclass(frozen=True)
class Candidate:
    """A way to attribute, and one to say how much a sample is memorised, by settings.

    Attributes:
        settings: by name; the best is chosen on development queries, and reported on the others.
        alone: [n] of the model and data, a sample's own; None where there is none.
    """

    settings: Mapping[str, Attribute]
    alone: Mapping[str, Callable[[nn.Module, Samples], Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Validation:
    """What :func:`validate` found.

    Attributes:
        lds: a row per candidate: ``setting`` (chosen on development queries), ``lds``, the mean
            over the other queries, its 95 % interval ``low`` to ``high``, and ``development``.
        grid: every setting's mean over development queries.
        memorisation: a row per candidate: ``setting`` (chosen on half of the samples) and
            ``spearman`` on the others.
        subsets, repeats, queries, samples: how many.
    """

    lds: list[dict[str, Any]]
    grid: list[dict[str, Any]]
    memorisation: list[dict[str, Any]]
    subsets: int
    repeats: int
    queries: int
    samples: int


def _influence(spec: Curvature, layers: str | list[str]) -> Attribute:
    def attribute(
        model: nn.Module, halves: list[nn.Module], data: Samples, queries: Samples
    ) -> Tensor:
        of_data = capture(
            model, data, layers=layers, progress=False, fisher=fisher_for(spec, layers)
        )
        of_queries = capture(model, queries, layers=layers, progress=False)
        return pairwise_influence(of_data, of_queries, curvature=spec)

    return attribute


def _alone(spec: Curvature, layers: str | list[str]) -> Callable[[nn.Module, Samples], Tensor]:
    def score(model: nn.Module, data: Samples) -> Tensor:
        fisher = fisher_for(spec, layers)
        factors = capture(model, data, layers=layers, progress=False, fisher=fisher)
        return self_influence(factors, curvature=spec)

    return score


def _cosine(model: nn.Module, halves: list[nn.Module], data: Samples, queries: Samples) -> Tensor:
    of_data, of_queries = (capture(model, part, progress=False) for part in (data, queries))
    return -pairwise_similarity(of_data, of_queries)


def _trak(model: nn.Module, halves: list[nn.Module], data: Samples, queries: Samples) -> Tensor:
    return trak(halves, data, queries)


def _own_loss(model: nn.Module, halves: list[nn.Module], data: Samples, queries: Samples) -> Tensor:
    """A sample's loss, whatever the query."""
    return outputs_of(model, data).loss[:, None].expand(-1, len(queries[1]))


def _random(model: nn.Module, halves: list[nn.Module], data: Samples, queries: Samples) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(data[1]), len(queries[1]), generator=generator)


def candidates(layers: list[str] | None = None) -> dict[str, Candidate]:
    """Every curvature at the head over ``DAMPINGS``, and what they are compared with.

    Args:
        layers: names of linear layers and convolutions; plain and diagonal influence of them all
            is compared too.
    """
    found: dict[str, Candidate] = {}

    def add(name: str, curvature: str, where: str | list[str]) -> None:
        grid = DAMPINGS if "damping" in CURVATURES[curvature].paths() else (None,)
        named = {
            "" if d is None else f"damping {d:g}": CURVATURES.choose(curvature, damping=d)
            for d in grid
        }
        found[name] = Candidate(
            {k: _influence(spec, where) for k, spec in named.items()},
            {k: _alone(spec, where) for k, spec in named.items()},
        )

    for curvature in CURVATURES:
        add(curvature, curvature, "head")
    for curvature in ("identity", "fisher_diag") if layers else ():
        assert layers is not None
        add(f"{curvature}, all layers", curvature, layers)
    found["gradient cosine"] = Candidate({"": _cosine})
    found["TRAK"] = Candidate({"": _trak})
    found["the sample's loss"] = Candidate(
        {"": _own_loss}, {"": lambda model, data: outputs_of(model, data).loss}
    )
    found["random"] = Candidate({"": _random})
    return found


def _digest(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            found.update(f"{part.dtype}{tuple(part.shape)}".encode())
            found.update(part.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().data)
        else:
            found.update(repr(part).encode())
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class _Retraining:
    """Models of subsets, as far as their losses are kept in a folder."""

    train: Train
    data: Samples
    queries: Samples
    subsets: Tensor
    repeats: int
    seed: int
    folder: Path | None

    def losses(self, progress: bool) -> tuple[Tensor, Tensor]:
        """Of every subset's models, the mean over repeats: of queries [s, m], of samples [s, n]."""
        found = [
            self._of(i)
            for i in tqdm(range(len(self.subsets)), desc="retrain", disable=not progress)
        ]
        of_queries, of_data = zip(*found, strict=True)
        return torch.stack(of_queries), torch.stack(of_data)

    def _of(self, i: int) -> tuple[Tensor, Tensor]:
        subset = self.subsets[i]
        key = _digest(*self.data, *self.queries, subset, self.repeats, self.seed)
        path = None if self.folder is None else self.folder / f"subset-{i:03}-{key}.safetensors"
        if path is not None and path.is_file():
            tensors, metadata = load_tensors(path)
            if metadata.get("key") != key or set(tensors) != {"queries", "samples"}:
                raise InputError(f"folder: {path.name} is another run's; delete it")
            return tensors["queries"], tensors["samples"]
        rest = self.data[0][subset], self.data[1][subset]
        total: list[Tensor] = []
        for repeat in range(self.repeats):
            model = self.train(rest, self.seed + 1 + i * self.repeats + repeat)
            losses = [outputs_of(model, part).loss.double() for part in (self.queries, self.data)]
            for name, loss in zip(("test", "data"), losses, strict=True):
                check_finite_rows(f"the loss on {name} of a model that train() returned", loss)
            total = losses if not total else [a + b for a, b in zip(total, losses, strict=True)]
        of_queries, of_data = (part.cpu() / self.repeats for part in total)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(path, {"queries": of_queries, "samples": of_data}, {"key": key})
        return of_queries, of_data


def validate(
    train: Train,
    data: Samples,
    test: Samples,
    *,
    subsets: int = 50,
    repeats: int = 2,
    fraction: float = 0.5,
    seed: int = 0,
    layers: list[str] | None = None,
    folder: str | Path | None = None,
    extra: Mapping[str, Candidate] | None = None,
    without: Collection[str] = (),
    progress: bool = True,
) -> Validation:
    """Compare every curvature's influence with what retraining on random subsets does.

    Two measures. The linear datamodeling score (Park et al. 2023): do sums of influence over a
    subset order the losses that models retrained on the subsets have on a query? And memorisation
    (Feldman & Zhang 2020): does self-influence order the samples by how much their own loss rises
    when they are left out? Beside the curvatures stand gradient cosine, TRAK, the sample's loss
    alone, and random numbers. Dampings are chosen on one half (of the queries, of the samples) and
    reported on the other.

    Args:
        train: ``train((x, y), seed)`` returns a model trained on these samples.
        data: training samples (x [n, ...], y [n]). test: queries (x [m, ...], y [m]).
        subsets: how many random subsets are retrained, each of ``fraction`` of the samples.
        repeats: models per subset, whose losses are averaged.
        layers: see :func:`candidates`.
        folder: where the retrained models' losses are kept; a later call with the same samples and
            seeds goes on from there. One folder per ``train``. None: they are not kept.
        extra: further candidates by name.
        without: names of candidates that are left out: "TRAK" needs 512 numbers per parameter of
            the model, and a model that ``torch.func.vmap`` takes.

    Raises:
        InputError: a candidate cannot attribute with this model, which is tried before the
            retraining; fewer than four queries or samples, or no tensors with class indices; fewer
            than two subsets, a damaged file in ``folder``, a model that does not give finite
            losses.
    """
    check_installed("validate()", "scipy")
    check_count("repeats", repeats)
    seed = check_seed("seed", seed)
    if check_count("subsets", subsets) < 2:
        raise InputError("subsets=1 orders nothing; pass two or more, 50 say")
    for name, samples in (("data", data), ("test", test)):
        _check_classes(name, samples)
    chosen = random_subsets(len(data[1]), subsets, fraction=fraction, seed=seed)
    where = None if folder is None else Path(folder)
    retraining = _Retraining(train, data, test, chosen, repeats, seed, where)
    every = candidates(layers) | dict(extra or {})
    for name in without:
        check_choice("without", name, tuple(every))
    every = {name: candidate for name, candidate in every.items() if name not in without}
    model = train(data, seed)
    _try(every, model, data, test)
    of_queries, of_data = retraining.losses(progress)
    halves = [
        train((data[0][half], data[1][half]), seed + 10_000 + i)
        for i, half in enumerate(random_subsets(len(data[1]), _HALVES, seed=(seed + 1) % 2**32))
    ]
    lds, grid = _scores(every, model, halves, data, test, chosen, of_queries, progress)
    remembered = memorisation(chosen, of_data)
    return Validation(
        lds,
        grid,
        list(_memorised(every, model, data, remembered)),
        subsets,
        repeats,
        len(test[1]),
        len(data[1]),
    )


def _check_classes(name: str, samples: Samples) -> None:
    """Raise InputError unless these are four or more tensors with class indices."""
    check_samples(name, samples, least=4)
    y = samples[1]
    classes = y.shape[-1] if y.dim() > 1 and y.shape[-1] > 1 else 2  # of soft labels
    try:
        class_labels(y, (len(y), classes))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _try(every: Mapping[str, Candidate], model: nn.Module, data: Samples, queries: Samples) -> None:
    """Every candidate on a few samples, so that what cannot work is known before the retraining.

    Raises:
        InputError: one cannot, by name.
    """
    few = data[0][:_TRIED], data[1][:_TRIED]
    asked = queries[0][:_TRIED], queries[1][:_TRIED]
    for name, candidate in every.items():
        try:
            for attribute in list(candidate.settings.values())[:1]:
                attribute(model, [model], few, asked)
            for score in list(candidate.alone.values())[:1]:
                score(model, few)
        except Exception as error:  # of a candidate that is the user's, or of the model
            raise InputError(
                f"{name!r} cannot attribute with this model ({brief(error)}); leave it out, "
                f"without=({name!r},)"
            ) from error


def _scores(
    every: Mapping[str, Candidate],
    model: nn.Module,
    halves: list[nn.Module],
    data: Samples,
    queries: Samples,
    subsets: Tensor,
    outputs: Tensor,
    progress: bool,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    development = torch.arange(len(queries[1])) % 2 == 0
    rows, grid = [], []
    for name, candidate in tqdm(every.items(), desc="attribute", disable=not progress):
        by_setting: dict[str, np.ndarray] = {}
        for setting, attribute in candidate.settings.items():
            tau = attribute(model, halves, data, queries)
            by_setting[setting] = linear_datamodeling_score(tau, subsets, outputs).numpy()
        means = {k: _mean(v[development.numpy()]) for k, v in by_setting.items()}
        best = _best(means)
        reported = by_setting[best][~development.numpy()]
        reported = reported[~np.isnan(reported)]
        low, high = t_interval(reported)
        rows.append(
            {"candidate": name, "setting": best, "lds": _mean(reported), "low": low, "high": high}
            | {"development": means[best]}
        )
        grid += [{"candidate": name, "setting": k, "development": v} for k, v in means.items()]
    return rows, grid


def _memorised(
    every: Mapping[str, Candidate], model: nn.Module, data: Samples, remembered: Tensor
) -> Iterator[dict[str, Any]]:
    known = ~remembered.isnan()
    development = torch.arange(len(known)) % 2 == 0

    def correlation(scores: Tensor, part: Tensor) -> float:
        rows = known & part
        pair = (v[rows, None].double().cpu().numpy() for v in (scores, remembered))
        return float(rank_correlation(*pair))

    for name, candidate in every.items():
        scores = {k: score(model, data) for k, score in candidate.alone.items()}
        if scores:
            means = {k: correlation(s, development) for k, s in scores.items()}
            best = _best(means)
            found = correlation(scores[best], ~development)
            yield {"candidate": name, "setting": best, "spearman": found}


def _best(means: Mapping[str, float]) -> str:
    """The setting of the largest mean; one whose mean is NaN only if all are."""
    return max(means, key=lambda k: -math.inf if math.isnan(means[k]) else means[k])


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan
