"""Markov chains whose transition matrices are known, some of them to be forgotten.

The chains are those of the synthetic experiment of IMU (arXiv 2508.01620): 10 states, a block of 3
for each of 3 chains; inside its block a chain stays there with probability 0.8, spread evenly, and
from any other state it goes anywhere. Chain 0 is kept, the others are to be forgotten, and here the
original has been trained on all of them. Which chain a row is of is not said; what is best then, a
mixture by the posterior, is known exactly, and stands among the references.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError, check_count
from imu_fast.evaluation.evaluate import evaluate
from imu_fast.study.cells import Json
from imu_fast.study.language.experiment import Experiment, Material, Measure
from imu_fast.study.language.models import Network, log_probabilities
from imu_fast.study.language.sequences import Sequences
from imu_fast.study.report.blocks import Metric
from imu_fast.unlearning.depth import StopRule

BEST_OF_ALL, BEST_OF_KEPT = "best possible, all chains", "best possible, the kept chain"
_KEPT, _FORGOTTEN = "kept", "forgotten {}"


def transition_matrices(states: int, block: int, chains: int, stay: float) -> Tensor:
    """Row-stochastic matrices [chains, states, states] float64, as the module says.

    Args:
        block: states of a chain's own. stay: probability to remain among them.

    Raises:
        InputError: the blocks do not fit, or leave no state outside.
    """
    if block * chains > states or block >= states:
        raise InputError(f"{chains} blocks of {block} do not fit into {states} states")
    found = torch.full((chains, states, states), 1 / states, dtype=torch.float64)
    for chain in range(chains):
        own = slice(chain * block, (chain + 1) * block)
        found[chain, own] = (1 - stay) / (states - block)
        found[chain, own, own] = stay / block
    return found


def draw(matrix: Tensor, n: int, length: int, generator: torch.Generator) -> Tensor:
    """n rows of a chain [n, length] int64, the first state uniform."""
    rows = [torch.randint(len(matrix), (n,), generator=generator)]
    for _ in range(length - 1):
        rows.append(torch.multinomial(matrix[rows[-1]], 1, generator=generator)[:, 0])
    return torch.stack(rows, dim=1)


def best_prediction(ids: Tensor, matrices: Tensor, prior: Tensor) -> Tensor:
    """Log-probabilities [n, T - 1, S] of the next state, where a row is of a chain drawn by prior.

    ``p(s' | s_0 .. s_t) = sum_k p(k | s_0 .. s_t) P_k[s_t, s']``; no predictor of such rows has a
    smaller expected loss.

    Args:
        ids: [n, T]. matrices: [K, S, S]. prior: [K].
    """
    now, after = ids[:, :-1], ids[:, 1:]
    seen = matrices[:, now, after].log()  # [K, n, T - 1]
    # Of a position what has happened before it, not what it is to predict.
    evidence = seen.cumsum(dim=2) - seen
    posterior = (evidence + prior.log()[:, None, None]).softmax(dim=0)
    return torch.einsum("knt,knts->nts", posterior, matrices[:, now]).log()


def divergence(reference: Tensor, ours: Tensor) -> float:
    """Mean over positions of ``KL(reference || ours)`` in nats, of log-probabilities [n, T, S]."""
    return float((reference.exp() * (reference - ours)).sum(dim=-1).mean())


@dataclass(frozen=True)
class Markov(Experiment):
    """The experiment, and its sizes: rows of each kind.

    Attributes:
        kept, forget: training rows, of the kept chain and of each forgotten one. test: of each.
    """

    name: ClassVar[str] = "markov"
    title: ClassVar[str] = "Markov chains, two of three forgotten"
    depth: ClassVar[str] = (
        "mean loss on the forget set as high as that of the retrained model, which a user does not "
        "know: all methods are given the same"
    )
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "kl_retrained",
            "KL to retrained",
            4,
            "divergence in nats from the retrained model's predictions, mean of the next two",
        ),
        Metric("kl_retrained_forget", "on forgotten", 4, "on test rows of the forgotten chains"),
        Metric("kl_retrained_kept", "on kept", 4, "on test rows of the kept chain"),
        Metric("kl_true_kept", "KL to truth, kept", 4, "from the kept chain's transition matrix"),
        Metric("kl_true_forget_1", "forgotten 1", 4, "from the first forgotten chain's"),
        Metric("kl_true_forget_2", "forgotten 2", 4, "from the second forgotten chain's"),
        Metric("forget_loss", "forget loss", 3, "mean cross-entropy on the forget set"),
        Metric("kept_loss", "kept loss", 3, "mean cross-entropy on test rows of the kept chain"),
    )
    margins: ClassVar[dict[str, float]] = {
        "kl_retrained": 0.005,
        "kl_true_kept": 0.005,
    }

    states: int = 10
    block: int = 3
    chains: int = 3
    stay: float = 0.8
    length: int = 20
    kept: int = 2000
    forget: int = 500
    test: int = 500
    layers: int = 2
    width: int = 64
    epochs: int = 12
    lr: float = 3e-3
    matrices: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("kept", "forget", "test", "layers", "width", "epochs"):
            check_count(name, getattr(self, name))
        check_count("chains", self.chains, minimum=3)
        made = transition_matrices(self.states, self.block, self.chains, self.stay)
        object.__setattr__(self, "matrices", made)

    def settings(self) -> Json:
        return {k: v for k, v in asdict(self).items() if k != "matrices"}

    def material(self, seed: int) -> Material:
        generator = torch.Generator().manual_seed(seed)

        def rows(chain: int, n: int) -> Sequences:
            return Sequences.of(draw(self.matrices[chain], n, self.length, generator))

        forgotten = range(1, self.chains)
        sets = {_KEPT: rows(0, self.test)}
        sets |= {_FORGOTTEN.format(chain): rows(chain, self.test) for chain in forgotten}
        network = Network(
            vocabulary=self.states,
            length=self.length,
            layers=self.layers,
            width=self.width,
            epochs=self.epochs,
            lr=self.lr,
        )
        return Material(
            forget=Sequences.joined([rows(chain, self.forget) for chain in forgotten]),
            kept=rows(0, self.kept),
            validation=rows(0, self.test),
            sets=sets,
            network=network,
        )

    def stop(self, retrained: Callable[[], nn.Module], material: Material) -> StopRule:
        return StopRule(forget_loss=evaluate(retrained(), material.forget.batches())["loss"])

    def measure(
        self, material: Material, original: nn.Module, retrained: nn.Module, seed: int
    ) -> Measure:
        reference = {name: _of(retrained, rows) for name, rows in material.sets.items()}

        def measured(model: nn.Module) -> Json:
            row = self._distances(material, reference, lambda rows: _of(model, rows))
            row["forget_loss"] = evaluate(model, material.forget.batches())["loss"]
            return row | {"kept_loss": evaluate(model, material.sets[_KEPT].batches())["loss"]}

        return measured

    def references(self, material: Material, measure: Measure) -> dict[str, Json]:
        """What is best for rows of all chains, and for rows of the kept one: its own matrix."""
        weights = [self.kept] + [self.forget] * (self.chains - 1)
        prior = torch.tensor(weights, dtype=torch.float64)
        alone = torch.zeros_like(prior)
        alone[0] = 1
        # To the retrained model they have no distance that says anything: it is no such mixture.
        found = {}
        for name, chances in ((BEST_OF_ALL, prior / prior.sum()), (BEST_OF_KEPT, alone)):

            def of(rows: Sequences, chances: Tensor = chances) -> Tensor:
                return best_prediction(rows.ids, self.matrices, chances)

            found[name] = self._distances(material, {}, of)
            for key, rows in (("forget", material.forget), ("kept", material.sets[_KEPT])):
                loss = nn.functional.nll_loss(of(rows).flatten(0, 1), rows.targets.flatten())
                found[name][f"{key}_loss"] = float(loss)
        return found

    def _distances(
        self,
        material: Material,
        reference: dict[str, Tensor],
        predict: Callable[[Sequences], Tensor],
    ) -> Json:
        """From the truth, and from reference predictions by set where there are any."""
        ours = {name: predict(rows) for name, rows in material.sets.items()}
        row: Json = {}
        for chain, (name, rows) in enumerate(material.sets.items()):
            truth = self.matrices[chain][rows.ids[:, :-1]].log()
            row["kl_true_kept" if chain == 0 else f"kl_true_forget_{chain}"] = divergence(
                truth, ours[name]
            )
        if reference:
            far = [divergence(reference[name], ours[name]) for name in material.sets]
            kept, forget = far[0], math.fsum(far[1:]) / len(far[1:])
            row |= {"kl_retrained_kept": kept, "kl_retrained_forget": forget}
            row["kl_retrained"] = (kept + forget) / 2
        return row


def _of(model: nn.Module, rows: Sequences) -> Tensor:
    return torch.cat([log_probabilities(model, batch) for batch in rows.batches()])
