"""What the authors' published code gives, to 1e-5.

The numbers were printed by their functions (github goodluckisallyouneed/IMU, commit 13e4876), run
on a CPU on the models and data of ``tests/integrations/tiny.py``, which hold no random number.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from integrations.tiny import (
    Chains,
    Images,
    Persons,
    chains,
    filled,
    images,
    llama,
    persons,
    tokens,
)
from torch import nn
from torch.utils.data import DataLoader, default_collate

from imu_fast.integrations.authors import classification, markov, reidentification, tofu

ARGS = SimpleNamespace(
    alpha=0.02,
    unlearn_lr=0.05,
    unlearn_epochs=5,
    momentum=0.9,
    weight_decay=5e-4,
    batch_size=9,
    top_data=0.9,
    decreasing_lr="2,3",
    warmup=0,
    rewind_epoch=0,
)


def close(found, golden):
    golden = torch.tensor(golden, dtype=torch.float64)
    error = (found.detach().double().flatten().cpu() - golden).norm() / golden.norm()
    assert float(error) < 1e-5


def image_model():
    model = filled(Images())
    model.bn.running_mean.fill_(0.1)
    return model


def test_classification():
    model, dataset = image_model(), images()
    inverse = classification.compute_fisher_matrix_from_dataset(model, dataset, default_collate)
    close(
        inverse,
        [
            *(23.346323, 100.0, 29.919277, 24.595236, 100.0, 18.873375, 100.0, 34.215897),
            *(27.977058, 100.0, 29.310396, 100.0, 46.425285, 39.230503, 100.0),
            *(3.2307599, 3.6509247, 6.0036068),
        ],
    )
    scores = classification.compute_influence_weights(
        model, inverse, dataset, default_collate, first_row_is_mean=True
    )
    golden = [-3.6221285, -3.2236063, -3.1066303, -4.1656241, -3.8837976, -3.3710356, -3.7861972]
    close(scores, golden)
    repaired = classification.compute_influence_weights(model, inverse, dataset, default_collate)
    close(repaired[1:], golden[1:])
    assert abs(float(repaired[0]) - golden[0]) > 1e-3


def test_classification_unlearns_to_their_weights_and_statistics():
    model = image_model()
    loaders = {"forget": DataLoader(images(), batch_size=9)}
    done = classification.IMU(loaders, model, nn.CrossEntropyLoss(), ARGS, first_row_is_mean=True)
    assert done is None
    close(
        model.fc.weight,
        [
            *(-0.30597597, -0.21696173, 0.37666023, -0.12108508, -0.2709116),
            *(0.3864994, -0.18640892, -0.15100317, 0.37249115, -0.34732357),
            *(0.1151301, 0.19105665, -0.36546305, 0.38331437, -0.16356583),
        ],
    )
    close(model.bn.running_var, [3.238754, 0.82282901, 0.83912331, 0.75660563, 0.5232296])


def test_reidentification():
    model, dataset = filled(Persons()), persons()
    loader = DataLoader(dataset, batch_size=7)
    inverse = reidentification.compute_fisher_inv_for_last_layer_datapoint(model, loader, None)
    close(
        inverse,
        [
            *(3.1504347, 17.587948, 93.241455, 21.148373, 30.738314),
            *(1.9532789, 11.356604, 100.0, 18.699968, 19.163429),
            *(12.439227, 50.073154, 100.0, 66.739037, 84.624718),
            *(3.8235171, 2.7128663, 11.39992),
        ],
    )
    batch = default_collate(dataset)
    scores = reidentification.compute_batch_influence(
        model, inverse, batch["img"], batch["pid"], nn.CrossEntropyLoss(reduction="none")
    )
    close(
        scores,
        [-3.5952272, -9.0457087, -9.4321795, -3.2080159, -9.4858809, -10.778656, -3.828618],
    )


CHAIN_SCORES = [-2.3786433, -3.919775, -1.3422054, -4.171638, 0.37408215, -1.7968794, -4.8057723]


def test_markov():
    model, dataset = filled(Chains()), chains()
    inverse = markov.compute_fisher_matrix(model, dataset, "cpu", 5)
    close(
        inverse,
        [
            *(55.479797, 94.137749, 66.069443, 68.843231, 92.417503, 72.091629, 50.402908),
            *(89.719337, 69.051048, 64.583443, 86.201103, 64.953918, 54.298458, 63.0751),
            *(59.898579, 43.924984, 65.183861, 88.487267, 38.474186, 96.647179, 49.83532),
            *(51.571304, 85.62207, 64.466103, 75.205872, 93.780098, 85.367828, 78.862579),
            *(93.534286, 87.986412, 22.89613, 17.801487, 16.189613, 14.946926, 35.386303),
        ],
    )
    scores = markov.compute_influence_weights(
        model, inverse, dataset, "cpu", 5, first_row_is_mean=True
    )
    close(scores, CHAIN_SCORES)


def test_markov_selects_and_steps():
    model, dataset = filled(Chains()), chains()
    subset, weights = markov.select_top_negative_influence(dataset, torch.tensor(CHAIN_SCORES), 0.7)
    assert list(subset.indices) == [6, 3, 1, 0]
    close(weights, [2.1607599, 2.0424588, 1.9798422, 1.5422851])
    weighted = markov.InfluenceWeightedDataset(subset, weights)
    batch = default_collate([weighted[i] for i in range(3)])
    loss = markov.compute_combined_loss(model, batch, None, ARGS, "cpu", gradient_twice=True)
    loss.backward()
    close(loss.detach(), [-1.5053012])
    close(
        model.output_layer.bias.grad,
        [-0.40385407, 0.065307468, 0.61907399, -0.33249593, -0.0080316626],
    )


@pytest.mark.parametrize(
    ("clamp", "golden"),
    [
        (0.93, [2.5816255, 1.1414078, 0.0, 2.5305233, 1.396108]),
        (None, [2.6014984, 1.1414078, 0.0, 2.5305233, 1.396108]),
    ],
)
def test_tofu(clamp, golden):
    ids, _, labels = tokens()
    close(tofu.compute_influence_for_batch(llama(), ids, labels, 11, "cpu", clamp), golden)


def test_tofu_inverse():
    ids, _, labels = tokens()
    inverse = tofu.compute_fisher_diag_batch(llama(), ids, labels, 11)
    close(
        torch.stack([inverse.double().sum(), inverse.min().double(), inverse.max().double()]),
        [56645.339, 68.844147, 100.0],
    )
