"""supreme-unlearning's registry with our method in it; its package where it is installed."""

from __future__ import annotations

import copy
import importlib
import sys
import types

import pytest
import torch
from integrations.tiny import Images, filled, images
from torch.utils.data import DataLoader

import imu_fast as imu
from imu_fast.integrations import supreme as ours


class Fabric:
    """Of the handle only what a method may ask."""

    world_size = 1


class Wrapped(torch.nn.Module):
    """As Fabric wraps a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        raise AssertionError("the strategy's forward is for training loops")


class FabricLoader:
    """As Fabric wraps a loader: it has the attributes, and is no DataLoader."""

    def __init__(self, loader):
        self.__dict__.update(loader.__dict__)
        self._loader = loader

    def __len__(self):
        return len(self._loader)

    def __iter__(self):
        return iter(self._loader)


def loader_of(found, subclass=lambda i: torch.empty(0), **options):
    """Batches as of supreme's data sets: images, subclasses (or an empty tensor), classes."""
    items = [(x, subclass(i), y) for i, (x, y) in enumerate(found)]
    return FabricLoader(DataLoader(items, batch_size=4, **options))


def given(model, **more):
    """What its pipeline passes to a method that it does not know."""
    loader = loader_of([item for item in images(12) if item[1] == 1])
    handles = dict.fromkeys(sorted(ours._HANDLES))
    return {
        "fabric": Fabric(),
        "num_gpus": 0,
        "model": model,
        "forget_train_dataloader": loader,
        **handles,
        **more,
    }


def accuracy(model):
    x, y = torch.utils.data.default_collate([item for item in images(12) if item[1] == 1])
    return float((model(x).argmax(1) == y).float().mean())


@pytest.fixture
def registry(monkeypatch):
    """The package's own, or a stand-in with its one function."""
    try:
        return importlib.import_module("supreme.registry").resolve_method_location
    except ImportError:
        methods = {}
        package = types.ModuleType("supreme")
        package.register_unlearning_method = methods.__setitem__
        monkeypatch.setitem(sys.modules, "supreme", package)
        return lambda name: methods[name].split(":")


def test_the_pipeline_finds_and_runs_it(registry):
    ours.register()
    module, name = registry("imu_fast")
    method = getattr(importlib.import_module(module), name)
    model = filled(Images(), 0.8)
    wrapped = Wrapped(model)
    before = copy.deepcopy(model)
    with torch.no_grad():
        model.fc.bias[1] += 5
    assert accuracy(model) == 1
    assert method(**given(wrapped, type_of_unlearning_strategy="fullclass")) is wrapped
    assert accuracy(model) == 0
    assert torch.equal(model.conv.weight, before.conv.weight)


@pytest.mark.parametrize("strategy", ["random_", "subclass"])
def test_samples_are_forgotten_as_deep_as_test_data(strategy):
    model = filled(Images(), 0.8)
    with torch.no_grad():
        model.fc.bias[1] += 5
    before = copy.deepcopy(model.state_dict())
    unseen = loader_of(images(60))  # as many as tell the forget set from it
    line = imu.evaluate(model, imu.Data(unseen, inputs=0, labels=2))["accuracy"]
    assert line < accuracy(model)
    ours.imu_fast(**given(model, type_of_unlearning_strategy=strategy, test_dataloader=unseen))
    assert 0 < accuracy(model) <= line
    model.load_state_dict(before)
    with pytest.warns(UserWarning, match="Name the depth"):
        ours.imu_fast(**given(model, type_of_unlearning_strategy=strategy))


SUBCLASSES = {
    "none": lambda i: torch.empty(0),
    "more than classes": lambda i: 17 - i,
    "as if classes": lambda i: i % 3,
}


@pytest.mark.parametrize("subclass", SUBCLASSES.values(), ids=SUBCLASSES)
def test_labels_are_the_classes_whatever_subclasses_there_are(subclass):
    """In each of supreme's loaders that is passed, shuffled ones too."""
    forget, test = [item for item in images(12) if item[1] == 1], images(30)
    x, y = torch.utils.data.default_collate(test)
    found = {}
    for name, plain in (("pairs", True), ("triples", False)):
        model = filled(Images(), 0.8)
        with torch.no_grad():
            model.fc.bias[1] += 5
        if plain:
            unseen = DataLoader(test, batch_size=4)
            options = {"retain": unseen, "watch": {"test": unseen}, "lr": 0.01, "epochs": 3}
            result = imu.unlearn(model, DataLoader(forget, batch_size=4), "uniform", **options)
            assert result.trajectory[-1]["test_accuracy"] == pytest.approx(
                float((model(x).argmax(1) == y).float().mean())
            )
        else:
            loaders = {
                "forget_train_dataloader": loader_of(forget, subclass),
                "test_dataloader": loader_of(test, subclass),
            }
            unseen = loaders["test_dataloader"]
            options = {"retain": unseen, "watch": {"test": unseen}, "lr": 0.01, "epochs": 3}
            ours.imu_fast(**given(model, method="uniform", **loaders, **options))
        found[name] = model.fc.weight.detach()
    assert torch.equal(found["pairs"], found["triples"])
    model = filled(Images(), 0.8)
    with torch.no_grad():
        model.fc.bias[1] += 5
    shuffled = loader_of(forget, subclass, shuffle=True)
    options = {"type_of_unlearning_strategy": "fullclass", "forget_train_dataloader": shuffled}
    ours.imu_fast(**given(model, **options))
    assert accuracy(model) == 0


def test_options_are_those_of_unlearn():
    model = filled(Images(), 0.8)
    ours.imu_fast(**given(model, method="uniform", epochs=1, lr=1e-3))
    with pytest.raises(imu.InputError, match="no option learning_rate"):
        ours.imu_fast(**given(model, learning_rate=0.1))


def test_several_processes_are_refused():
    model = filled(Images())
    arguments = given(model)
    arguments["fabric"].world_size = 2
    with pytest.raises(imu.InputError, match="fabric has 2 processes"):
        ours.imu_fast(**arguments)


def test_the_package_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "supreme", None)
    with pytest.raises(imu.InputError, match="supreme-unlearning does not load"):
        ours.register()
