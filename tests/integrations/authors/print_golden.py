"""Print the numbers of ``test_golden.py`` by the authors' own functions.

    git clone https://github.com/goodluckisallyouneed/IMU CHECKOUT
    git -C CHECKOUT checkout 13e4876
    PYTHONPATH=.:tests python tests/integrations/authors/print_golden.py CHECKOUT

Their files are run as they are, on a CPU and in float64, so that every machine prints the same
eight digits; behind each name stands how far their float32 is from it (relative, 2-norm). Stubs
stand for what their files import and these numbers do not need, and for the calls that name a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from integrations.authors.test_golden import ARGS, image_model
from integrations.tiny import Chains, Persons, chains, filled, images, llama, persons, tokens
from torch import nn
from torch.utils.data import DataLoader, default_collate

CLASSIFICATION = ("utils", "imagenet", "pruner", "matplotlib", "matplotlib.pyplot")
MARKOV = ("transformers", "data_generation", "model", "evaluate_utils", "utils", "unlearn_utils")
TOFU = ("trainer", "trainer.unlearn", "trainer.unlearn.base")


class OnCpu:
    """torch, whose every device is the CPU."""

    def __getattr__(self, name):
        return (lambda _: torch.device("cpu")) if name == "device" else getattr(torch, name)


def theirs(folder, name, stubs):
    """Their module, found in ``folder``; what it may import and does not need is a mock."""
    package = ModuleType("unlearn")  # without their __init__, which imports everything
    package.__path__ = [f"{folder}/unlearn"]
    mocks = {stub: mock.MagicMock() for stub in stubs} | {"unlearn": package}
    if "utils" in mocks:
        mocks["utils"].AverageMeter = lambda: SimpleNamespace(avg=0.0, update=lambda *_: None)
    if "trainer.unlearn.base" in mocks:
        mocks["trainer.unlearn.base"].UnlearnTrainer = object
    with mock.patch.dict(sys.modules, mocks), mock.patch.object(sys, "path", [folder, *sys.path]):
        found = importlib.import_module(name)
    found.torch = OnCpu()
    return found


def as_default(value):
    """Floating tensors in the default type, inside lists, tuples and dicts too."""
    if isinstance(value, dict):
        return {key: as_default(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(as_default, value))
    if isinstance(value, nn.Module) or (torch.is_tensor(value) and value.is_floating_point()):
        return value.to(torch.get_default_dtype())
    return value


def classification(root):
    part = theirs(f"{root}/Classification", "unlearn.IMU", CLASSIFICATION)
    model, dataset = as_default(image_model()), as_default(images())
    inverse = part.compute_fisher_matrix_from_dataset(model, dataset, default_collate, 0)
    yield "classification: inverse", inverse
    scores = part.compute_influence_weights(model, inverse, dataset, default_collate)
    yield "classification: scores", scores

    model = as_default(image_model())
    args = SimpleNamespace(**vars(ARGS), gpu=0, print_freq=99, imagenet_arch=False, unlearn="IMU")
    part.IMU({"forget": DataLoader(dataset, batch_size=9)}, model, nn.CrossEntropyLoss(), args)
    yield "classification: fc.weight after IMU", model.fc.weight
    yield "classification: bn.running_var after IMU", model.bn.running_var


def reidentification(root):
    part = theirs(f"{root}/Classification", "unlearn.IMU_REID", CLASSIFICATION)
    model, dataset = as_default(filled(Persons())), as_default(persons())
    loader = DataLoader(dataset, batch_size=7)
    inverse = part.compute_fisher_inv_for_last_layer_datapoint(model, loader, None)
    yield "reidentification: inverse", inverse
    batch, each = default_collate(dataset), nn.CrossEntropyLoss(reduction="none")
    scores = part.compute_batch_influence(model, inverse, batch["img"], batch["pid"], each)
    yield "reidentification: scores", scores


def markov(root):
    part = theirs(f"{root}/synthetic", "unlearn_IMU", MARKOV)
    model, dataset = as_default(filled(Chains())), chains()
    inverse = part.compute_fisher_matrix(model, dataset, "cpu", 5)
    yield "markov: inverse", inverse
    scores = part.compute_influence_weights(model, inverse, dataset, "cpu", 5)
    yield "markov: scores", scores

    subset, weights = part.select_top_negative_influence(dataset, scores, 0.7)
    yield "markov: selected", torch.tensor(subset.indices)
    yield "markov: weights", weights
    weighted = part.InfluenceWeightedDataset(subset, weights)
    batch = as_default(default_collate([weighted[i] for i in range(3)]))
    loss = part.compute_combined_loss(model, batch, None, ARGS, "cpu")
    loss.backward()
    yield "markov: loss", loss
    yield "markov: output_layer.bias.grad", model.output_layer.bias.grad


def tofu(root):
    part = theirs(f"{root}/synthetic", "IMU", TOFU)
    ids, _, labels = tokens()
    for clamp in (0.93, None):
        weights = part.compute_influence_for_batch(
            as_default(llama()), ids, labels, 11, "cpu", clamp
        )
        yield f"tofu: weights, clamp {clamp}", weights
    inverse = part.compute_fisher_diag_batch(as_default(llama()), ids, labels, 11)
    yield "tofu: inverse, sum, least, largest", torch.stack([inverse.sum(), *inverse.aminmax()])


def run(root, dtype):
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    parts = (classification, reidentification, markov, tofu)
    on_cpu = mock.patch.object(torch.Tensor, "cuda", lambda self: self)
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with on_cpu, quiet[0], quiet[1]:
        found = {name: value for part in parts for name, value in part(root)}
    return {name: value.detach().double().flatten() for name, value in found.items()}


if __name__ == "__main__":
    single, double = run(sys.argv[1], torch.float32), run(sys.argv[1], torch.float64)
    for name, numbers in double.items():
        off = float((single[name] - numbers).norm() / numbers.norm())
        print(f"{name} (float32: {off:.0e})", *(f"{x:.8g}" for x in numbers.tolist()), sep="\n    ")
