"""Every public function with arguments that it takes: what the walk and the fuzzer start from."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import imu_fast as imu
from imu_fast import reference
from imu_fast.evaluation import metrics, shallowness
from imu_fast.model.outputs import Outputs

N, D, C = 6, 4, 3


@dataclass(frozen=True)
class Door:
    """A public function, and tensors that it takes, by argument."""

    call: Callable[..., Any]
    tensors: Callable[[], dict[str, Tensor]]
    others: dict[str, Any] = field(default_factory=dict)
    # Arguments that may be None, and those whose values are marks for the function to read.
    optional: tuple[str, ...] = ()


def features(seed: int = 0, n: int = N) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(n: int = N) -> Tensor:
    return torch.arange(n) % C


def head(seed: int = 1) -> Tensor:
    return torch.randn(C, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@functools.cache
def factors(seed: int = 0) -> imu.GradientFactors:
    """One and the same for all cases: a call that changed them would fail the next ones."""
    return imu.GradientFactors.from_head(
        features(seed), head(), torch.zeros(C).double(), labels(), implicit=False
    )


def model() -> nn.Module:
    torch.default_generator.manual_seed(0)  # torch.manual_seed formats a stack, a third of a case
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, C)).double()


def outputs(logits: Tensor, labels: Tensor) -> Outputs:
    return Outputs(logits, labels)


def of_head() -> dict[str, Tensor]:
    return {
        "features": features(),
        "weight": head(),
        "bias": torch.zeros(C, dtype=torch.float64),
        "labels": labels(),
        "offsets": torch.tensor([0, 2, 3, 6]),
    }


def of_factors() -> dict[str, Tensor]:
    made = factors()
    return {
        "delta": made.delta.clone(),
        "act": made.act.clone(),
        "offsets": torch.tensor([0, 2, 3, 6]),
    }


def data() -> dict[str, Tensor]:
    return {"inputs": features(), "labels": labels()}


def _gradients(made: imu.GradientFactors) -> Tensor:
    """The mean and each sample's: where these cancel, what the mean is as exact as."""
    own = reference.sample_gradients(made.delta, made.act, made.offsets, made.has_bias)
    return torch.cat([made.mean_gradient()[None].double(), own])


def _fitted(curvature: str) -> imu.Fitted:
    return imu.fit(curvature, factors(), damping=0.1)


def _of_factors(then: Callable[[imu.GradientFactors], Any]) -> Callable[..., Any]:
    def call(delta: Tensor, act: Tensor, offsets: Tensor, labels: Any = None) -> Any:
        return then(imu.GradientFactors(delta, act, offsets, True, labels=labels))

    return call


def _saved(delta: Tensor, act: Tensor, offsets: Tensor) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        imu.fit("fisher_diag", imu.GradientFactors(delta, act, offsets, True)).save(path)
        return imu.load_operator(path).diagonal()


def _indexed(**options: Any) -> Callable[[nn.Module, Any], Any]:
    def call(model: nn.Module, data: Any) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            imu.build_index(model, data, Path(folder) / "index", chunk_size=4, **options)
            index = imu.load_index(Path(folder) / "index")
            return index.scores(index.capture(model, data), curvature="identity")

    return call


def _live_call(logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits that the model has made, as they are or moved to what was passed."""
    made = model()
    with imu.live_weights(made, ["0"]) as weigh:
        own = made(features())
    plain = isinstance(logits, Tensor) and logits.layout == own.layout and not logits.is_nested
    plain = plain and not logits.is_meta and logits.dtype == own.dtype
    return weigh(own + 0 * logits if plain and logits.shape == own.shape else logits, labels)


def _weighted(features: Tensor, labels: Tensor) -> Tensor:
    made = model()[0]
    if isinstance(features, Tensor) and features.dtype in (torch.half, torch.bfloat16, torch.float):
        made = made.to(features.dtype)  # what a head says of another dtype is its own
    return imu.InfluenceWeightedLoss(made)(features, labels)


def _model_and_data(then: Callable[[nn.Module, Any], Any]) -> Callable[..., Any]:
    return lambda inputs, labels: then(model(), (inputs, labels))


DOORS: dict[str, Door] = {
    "GradientFactors.from_head": Door(
        lambda **k: _gradients(imu.GradientFactors.from_head(**k, implicit=False)),
        of_head,
        optional=("bias", "offsets"),
    ),
    "ImplicitHead": Door(
        lambda **k: imu.GradientFactors.from_head(**k, implicit=True).mean_gradient(),
        of_head,
        optional=("bias", "offsets"),
    ),
    "BinaryCrossEntropy": Door(
        lambda **k: imu.GradientFactors.from_head(
            **k, loss=imu.BinaryCrossEntropy()
        ).mean_gradient(),
        lambda: {
            "features": features(),
            "weight": head(),
            "labels": (features()[:, :C] > 0).double(),
        },
        {"bias": None},
    ),
    "SquaredError": Door(
        lambda **k: imu.GradientFactors.from_head(**k, loss=imu.SquaredError()).mean_gradient(),
        lambda: {"features": features(), "weight": head(), "labels": features(3)[:, :C]},
        {"bias": None},
    ),
    **{
        f"influence_scores({name})": Door(
            _of_factors(
                lambda f, name=name: imu.influence_scores(
                    f, curvature=name, **({} if name == "identity" else {"damping": 0.1})
                )
            ),
            lambda: of_factors() | {"labels": labels()},
            optional=("labels",),
        )
        for name in imu.curvatures()
    },
    "influence_scores(target)": Door(
        lambda target: imu.influence_scores(factors(), target=target),
        lambda: {"target": torch.randn(C, D + 1).double()},
        optional=("target",),
    ),
    "similarity_scores": Door(
        lambda target: imu.similarity_scores(factors(), target=target),
        lambda: {"target": torch.randn(C, D + 1).double()},
        optional=("target",),
    ),
    "self_influence": Door(_of_factors(imu.self_influence), of_factors),
    "pairwise_influence": Door(
        _of_factors(lambda f: imu.pairwise_influence(factors(), f)), of_factors
    ),
    "pairwise_similarity": Door(
        _of_factors(lambda f: imu.pairwise_similarity(factors(), f)), of_factors
    ),
    "top_influences": Door(
        _of_factors(lambda f: imu.top_influences(factors(), f, k=2)), of_factors
    ),
    "load_operator": Door(_saved, of_factors),
    **{
        f"Fitted.{verb}({name})": Door(
            lambda v, verb=verb, name=name: getattr(_fitted(name), verb)(v),
            lambda: {"v": torch.randn(C, D + 1).double()},
        )
        for name in ("fisher_diag", "kfac", "ggn", "fisher", "ggn_block")
        for verb in ("product", "solve")
    },
    "Fitted.self_influence": Door(
        _of_factors(lambda f: _fitted("fisher_diag").self_influence(f)), of_factors
    ),
    "OutputCurvature.diagonal_of": Door(
        lambda h: imu.OutputCurvature.diagonal_of(h).diagonal(), lambda: {"h": features().abs()}
    ),
    "OutputCurvature.softmax": Door(
        lambda p, weight: imu.OutputCurvature.softmax(p, weight).diagonal(),
        lambda: {"p": features().softmax(1), "weight": torch.ones(N).double()},
        optional=("weight",),
    ),
    "OutputCurvature.dense": Door(
        lambda b: imu.OutputCurvature.dense(b).diagonal(),
        lambda: {"b": torch.eye(C).double().expand(N, C, C).clone()},
    ),
    "influence_weights": Door(
        lambda scores: imu.influence_weights(scores, on_empty="uniform"),
        lambda: {"scores": torch.tensor([-1.0, 2.0, -3.0, 0.5]).double()},
    ),
    "batch_weights": Door(
        lambda **k: imu.batch_weights(imu.GradientFactors.from_head(**k), on_empty="uniform"),
        lambda: {k: v for k, v in of_head().items() if k != "offsets"},
        optional=("bias",),
    ),
    "InfluenceWeightedLoss": Door(_weighted, lambda: {"features": features(), "labels": labels()}),
    "live_weights": Door(_live_call, lambda: {"logits": features()[:, :C], "labels": labels()}),
    "damped_cholesky_solve": Door(
        lambda a, b, damping: imu.damped_cholesky_solve(a, b, damping),
        lambda: {
            "a": 2 * torch.eye(4).double() + 0.1,
            "b": torch.ones(4, 1).double(),
            "damping": torch.tensor(0.5).double(),
        },
    ),
    "matrix_to_vector": Door(
        lambda matrix: imu.matrix_to_vector(matrix, True), lambda: {"matrix": features()}
    ),
    "vector_to_matrix": Door(
        lambda vector: imu.vector_to_matrix(vector, 2, True), lambda: {"vector": features()[:, :4]}
    ),
    "capture": Door(_model_and_data(lambda m, x: imu.capture(m, x).mean_gradient()), data),
    "capture_features": Door(
        _model_and_data(lambda m, x: imu.capture_features(m, x).features), data
    ),
    "influence_scores(model)": Door(_model_and_data(imu.influence_scores), data),
    "parameter_importance": Door(_model_and_data(imu.parameter_importance), data),
    "evaluate": Door(_model_and_data(imu.evaluate), data),
    "unlearn": Door(_model_and_data(lambda m, x: imu.unlearn(m, x, epochs=1).model), data),
    "tracin": Door(
        _model_and_data(
            lambda m, x: imu.tracin(m, x, x, checkpoints=[m.state_dict()], learning_rates=0.1)
        ),
        data,
    ),
    "tracin_self_influence": Door(
        _model_and_data(
            lambda m, x: imu.tracin_self_influence(
                m, x, checkpoints=[m.state_dict()], learning_rates=0.1
            )
        ),
        data,
    ),
    "build_index": Door(_model_and_data(_indexed()), data),
    "build_index(projection)": Door(
        _model_and_data(_indexed(layers=["0", "2"], projection=8)), data
    ),
    "capture(layers)": Door(
        _model_and_data(
            lambda m, x: [f.mean_gradient() for f in imu.capture(m, x, layers=["0", "2"])]
        ),
        data,
    ),
    "unlearn(margin_edit)": Door(
        _model_and_data(lambda m, x: imu.unlearn(m, x, "margin_edit").model), data
    ),
    "unlearn(all)": Door(
        _model_and_data(lambda m, x: imu.unlearn(m, x, "uniform", scope="all", epochs=1).model),
        data,
    ),
    "unlearn_in_turn": Door(
        _model_and_data(
            lambda m, x: [r.model for r in imu.unlearn_in_turn(m, [x], epochs=1).values()]
        ),
        data,
    ),
    "batch_weights(model)": Door(
        _model_and_data(lambda m, x: imu.batch_weights(m, x, on_empty="uniform")), data
    ),
    "split": Door(lambda inputs, labels: imu.split((inputs, labels), classes=1), data),
    "leave_one_out": Door(
        _model_and_data(
            lambda m, x: imu.leave_one_out(m, x, weight_decay=0.1, refit=True).parameters([0])
        ),
        data,
    ),
    "roc_auc": Door(
        metrics.roc_auc, lambda: {"positive": torch.rand(5), "negative": torch.rand(5)}
    ),
    "membership_accuracy": Door(
        metrics.membership_accuracy,
        lambda: {k: torch.rand(5).double() for k in ("retain", "test", "forget")},
    ),
    "Outputs": Door(
        lambda logits, labels: metrics.distance(Outputs(logits, labels), Outputs(logits, labels)),
        lambda: {"logits": features()[:, :C], "labels": labels()},
    ),
    "linear_probe": Door(
        shallowness.linear_probe,
        lambda: {"features": features(n=60), "labels": labels(60), "forget_mask": labels(60) == 1},
    ),
}
