"""Models for ``recipes.py``: trained, and trained without what is to be forgotten, kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from imu_fast.model.capture import capture_features
from imu_fast.model.head import find_head
from imu_fast.storage import load_tensors, save_tensors
from imu_fast.study.data.tasks import Dataset, ForgetTask, Samples, load_dataset, make_task, take
from imu_fast.study.networks import resnet, small_network

WEIGHT_DECAY = 5e-4
# Retrained models start from other weights, and see other orders, than the original.
_RETRAINED, _TWIN = 10_000, 20_000
# Raised whenever what an older version kept must not be taken over.
_VERSION = 1
RETAIN = 2000


@dataclass(frozen=True)
class Kind:
    """A data set, its network and how that is trained.

    Attributes:
        count: training images; None: all. half: images are averaged over 2x2 pixels.
    """

    data: str
    count: int | None
    network: Callable[[], nn.Module]
    epochs: int
    lr: float
    half: bool = False


KINDS = {
    "digits": Kind("digits", None, small_network, 20, 0.05),
    "cifar10": Kind("cifar10", 3000, lambda: resnet(3, 10, width=8), 16, 0.1, half=True),
}


def load(name: str, path: Path | None, seed: int) -> Dataset:
    """The images of a seed."""
    kind = KINDS[name]
    data = load_dataset(kind.data, path, kind.count, seed)
    if not kind.half:
        return data
    parts = (data.train, data.validation, data.test)
    halved = ((nn.functional.avg_pool2d(x, 2), y) for x, y in parts)
    return Dataset(*halved, data.classes, data.mirror)


def train(name: str, samples: Samples, mirror: bool, seed: int) -> nn.Module:
    """SGD with a one-cycle learning rate; evaluation mode. The same seed gives the same weights."""
    kind, (x, y) = KINDS[name], samples
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind.network()
        optimizer = torch.optim.SGD(
            model.parameters(), kind.lr, momentum=0.9, weight_decay=WEIGHT_DECAY
        )
        steps = len(x) // 64
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, kind.lr, total_steps=kind.epochs * steps
        )
        for _ in range(kind.epochs):
            for rows in torch.randperm(len(x)).split(64)[:steps]:
                batch = x[rows]
                if mirror:
                    flipped = torch.rand(len(batch), 1, 1, 1) < 0.5
                    batch = torch.where(flipped, batch.flip(3), batch)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(batch), y[rows]).backward()
                optimizer.step()
                schedule.step()
    return model.eval()


class Models:
    """Trained models of a data set, each once: read from ``folder``, or trained into it."""

    def __init__(self, name: str, path: Path | None, folder: Path, seed: int) -> None:
        self.name, self.seed, self._folder = name, seed, folder
        self.data = load(name, path, seed)

    def model(self, what: str, samples: Samples, seed: int) -> nn.Module:
        """The model of these samples; what: says which they are."""
        path = self._folder / f"{self.name}-{self.seed}-{what}.safetensors"
        key = f"{_VERSION} {KINDS[self.name].epochs} {len(samples[1])}"
        if path.exists():
            state, metadata = load_tensors(path)
            if metadata.get("key") == key:
                model = KINDS[self.name].network()
                model.load_state_dict(state)
                return model.eval()
        model = train(self.name, samples, self.data.mirror, seed)
        save_tensors(path, model.state_dict(), {"key": key})
        return model

    def original(self) -> nn.Module:
        """Trained on everything."""
        return self.model("original", self.data.train, self.seed)

    def retrained(self, task: ForgetTask) -> list[nn.Module]:
        """Two models that never saw the forget set."""
        starts = {"retrained": _RETRAINED, "twin": _TWIN}
        return [
            self.model(f"{task.name}-{what}", task.retain, self.seed + start)
            for what, start in starts.items()
        ]

    def task(self, name: str) -> ForgetTask:
        """What is forgotten, by this seed."""
        return make_task(name, self.data, self.seed)


@dataclass(frozen=True)
class Problem:
    """A model and a task: what recipes start from, and what they are compared with.

    Attributes:
        sets: images by name: forget, retain, test, and unseen, which are like the forget set.
        features: the head's inputs of each of them, and of "train"; labels as in sets.
        logits: the retrained model's, and another's, by set.
        unseen_accuracy: the model's, on validation images, which are in no other set.
    """

    models: Models
    task: ForgetTask
    model: nn.Module
    head: nn.Linear
    sets: dict[str, Samples]
    features: dict[str, Tensor]
    retrained: list[dict[str, Tensor]]
    unseen_accuracy: float

    @classmethod
    def of(cls, models: Models, name: str) -> Problem:
        """The task of this name."""
        task, model = models.task(name), models.original()
        rows = torch.randperm(
            len(task.retain[1]), generator=torch.Generator().manual_seed(models.seed)
        )
        sets = {
            "forget": task.forget,
            "retain": take(task.retain, rows[:RETAIN]),
            "test": task.test,
            "unseen": task.unseen_test,
        }
        inputs = {**{k: x for k, (x, _) in sets.items()}, "train": models.data.train[0]}
        features = {k: _features(model, x) for k, x in inputs.items()}
        retrained = models.retrained(task)
        with torch.no_grad():
            logits = [
                {k: torch.cat([m(part) for part in x.split(500)]) for k, (x, _) in sets.items()}
                for m in retrained
            ]
        unseen = models.data.validation
        with torch.no_grad():
            right = model(unseen[0]).argmax(dim=1) == unseen[1]
        accuracy = float(right.double().mean())
        return cls(models, task, model, find_head(model)[1], sets, features, logits, accuracy)


def _features(model: nn.Module, x: Tensor) -> Tensor:
    return capture_features(model, (x, torch.zeros(len(x), dtype=torch.int64))).features
