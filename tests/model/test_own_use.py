"""Parameters of a scored layer that the model's code uses beside the layer: refused, not missed."""

from __future__ import annotations

from collections.abc import Callable

import per_sample
import pytest
import torch
from torch import Tensor, nn

import imu_fast as imu


class Model(nn.Module):
    """Features of ``before``, the head of them, and what ``after`` makes of its output."""

    def __init__(
        self,
        before: Callable[[Model, Tensor], Tensor] = lambda self, a: a,
        after: Callable[[Model, Tensor], Tensor] = lambda self, z: z,
    ) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(5, 6), nn.Linear(6, 4)
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self, self.fc(self.before(self, self.body(x).tanh())))


def _data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(9, 5).double(), torch.arange(9) % 4


AT_THE_HEAD = {
    "weight, before": Model(before=lambda m, a: a + (a @ m.fc.weight.T).tanh() @ m.fc.weight),
    "weight's norm, before": Model(before=lambda m, a: a / m.fc.weight.norm()),
    "bias, before": Model(before=lambda m, a: a * m.fc.bias.sum()),
    "weight, after": Model(after=lambda m, z: z / m.fc.weight.norm(dim=1)),
    "bias, after": Model(after=lambda m, z: 2 * z - m.fc.bias.abs()),
    "one entry of the bias, after": Model(after=lambda m, z: z - m.fc.bias[0]),
}
INSIDE = {
    "weight": Model(before=lambda m, a: a * m.body.weight.norm()),
    "bias": Model(before=lambda m, a: a + m.body.bias.square()),
}


@pytest.mark.parametrize("model", AT_THE_HEAD.values(), ids=AT_THE_HEAD)
def test_a_heads_parameters_that_the_code_uses_too_are_refused(model: Model) -> None:
    with pytest.raises(imu.InputError, match="uses it outside of the layer"):
        imu.influence_scores(model.double(), _data())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("model", INSIDE.values(), ids=INSIDE)
def test_an_inner_layers_parameters_that_the_code_uses_too_are_refused(model: Model) -> None:
    with pytest.raises(imu.InputError, match="outside of the layer too"):
        imu.capture(model.double(), _data(), layers="body")


@pytest.mark.parametrize(
    "model",
    [
        Model(before=lambda m, a: a / m.fc.weight.detach().norm()),
        Model(after=lambda m, z: 2 * z - m.fc.bias.detach().abs()),
        Model(before=lambda m, a: a * m.body.weight.norm()),  # of another layer
    ],
    ids=["detached before", "detached after", "another layer's"],
)
def test_what_has_no_gradient_is_scored_as_autograd_does(model: Model) -> None:
    x, y = _data()
    model = model.double()
    truth = per_sample.sample_gradients(
        model,
        zip(x[:, None], y[:, None], strict=True),
        ["fc.weight", "fc.bias"],
        lambda m, sample: nn.functional.cross_entropy(m(sample[0]), sample[1]),
    )
    per_sample.assert_scores(imu.influence_scores(model, (x, y)), per_sample.scores(truth), 1e-12)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(3, 3), nn.Linear(3, 3)
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        return self.fc((scores.softmax(dim=-1) @ x).mean(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bias_whose_gradient_cancels_is_not_taken_for_used_twice(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Attention().to(dtype), torch.randn(40, 20, 3).to(dtype)
    factors = imu.capture(model, (x, torch.arange(40) % 4), layers=["q", "k"])
    assert [f.n for f in factors] == [40, 40]
