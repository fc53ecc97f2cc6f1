"""Labels that are numbers, and lists of samples, in every form of the data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from per_sample import assert_scores, sample_gradients, scores
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import imu_fast as imu

N, D = 10, 4

# y is float64, as numpy and Python have numbers.
FORMS = {
    "arrays": lambda x, y: (x.double().numpy(), y.numpy()),
    "lists": lambda x, y: (x, y.tolist()),
    "a dict of arrays": lambda x, y: {"input": x, "labels": y.numpy()},
    "samples": lambda x, y: list(zip(x, y[:, 0].numpy(), strict=True)),
    "samples of numbers": lambda x, y: list(zip(x, y[:, 0].tolist(), strict=True)),
    "batches": lambda x, y: [(x, y.numpy())],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_labels_keep_their_digits(form: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(D, 1).to(dtype), torch.randn(N, D).to(dtype)
    y = 1e3 + torch.rand(N, 1, dtype=torch.float64)
    expected = imu.capture(model, (x, y), loss="squared_error")
    found = imu.capture(model, FORMS[form](x, y), loss="squared_error")
    assert torch.equal(found.delta, expected.delta)
    assert torch.equal(found.losses, expected.losses)


def test_samples_are_in_the_dtype_of_the_model() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(D, 3).double(), torch.randn(N, D).double(), torch.arange(N) % 3
    expected = imu.influence_scores(model, (x, y))
    for rows in (x.numpy(), x.tolist()):
        found = imu.influence_scores(model, list(zip(rows, y.tolist(), strict=True)))
        assert torch.equal(found, expected)
    assert isinstance(x.numpy(), np.ndarray)


class Bags(nn.Module):
    """A label for each bag of instances, of which bags have different numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(D, 6), nn.Linear(6, 3)

    def forward(self, bags: list[Tensor]) -> Tensor:
        return self.fc(torch.stack([self.body(bag).relu().mean(0) for bag in bags]))


@pytest.mark.parametrize("sizes", [(3, 1, 4, 2), (5, 5, 5, 5), (3, 3, 3, 1)])
def test_a_list_with_an_item_for_each_sample(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, y = Bags(), torch.arange(2 * len(sizes)) % 3
    bags = [torch.randn(k, D) for k in 2 * sizes]
    batches = [(bags[i : i + 4], y[i : i + 4]) for i in (0, 4)]

    def loss(model: nn.Module, sample: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model([sample[0].double()]), sample[1][None])

    for name, layers in (("fc", "head"), ("body", ["body"])):
        names = [f"{name}.weight", f"{name}.bias"]
        truth = scores(sample_gradients(model, zip(bags, y, strict=True), names, loss))
        assert_scores(imu.influence_scores(model, batches, layers=layers), truth)
    one = imu.unlearn(model, batches, "imu", scope="all", epochs=1, batch_size=3, inplace=False)
    assert_scores(one.scores, imu.influence_scores(model, batches).double())


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
)
def test_hooks_of_a_wrapper_are_not_passed_over(wrap) -> None:
    """What runs is the module inside."""
    model = wrap(nn.Linear(D, 3))
    model.register_forward_hook(lambda m, args, z: 0.2 * z)
    with pytest.raises(imu.InputError, match="with hooks of its own.*register them on that"):
        imu.influence_scores(model, (torch.randn(N, D), torch.arange(N) % 3))
