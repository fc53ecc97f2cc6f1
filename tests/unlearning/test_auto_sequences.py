"""``method="auto"`` for sequences: what it takes, how deep, at what rate, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch

import imu_fast as imu
from imu_fast.errors import InputError
from imu_fast.unlearning.auto_sequences import RELATIVE_RATE, rate_of

VOCABULARY, LENGTH, ROWS = 12, 10, 24


class Tiny(torch.nn.Module):
    """The next token by the last three: enough to learn rows by heart."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, 16)
        self.norm = torch.nn.LayerNorm(48)
        self.mix, self.head = torch.nn.Linear(48, 96), torch.nn.Linear(96, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        one = self.embed(input_ids)
        three = torch.cat([one, one.roll(1, dims=1), one.roll(2, dims=1)], dim=-1)
        return self.head(torch.relu(self.mix(self.norm(three))))


def rows(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


@pytest.fixture(scope="module")
def learned():
    torch.manual_seed(0)
    model, (forget, kept) = Tiny(), (rows(0), rows(1))
    x, y = torch.cat([forget[0], kept[0]]), torch.cat([forget[1], kept[1]])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
    return model.eval(), forget, kept


def test_to_the_accuracy_that_is_named(learned):
    model, forget, kept = learned
    assert imu.evaluate(model, forget)["accuracy"] > 0.8, "so that there is something to forget"
    result = imu.unlearn(model, forget, "auto", unseen=0.6, inplace=False)
    assert result.reached and imu.evaluate(result.model, forget)["accuracy"] <= 0.6 + 1e-6
    assert result.settings["method"] == "simnpo" and result.settings["scope"] == "all"
    assert "forget set alone" in result.settings["auto"]
    assert result.settings["lr"] == rate_of(model)
    with_kept = imu.unlearn(model, forget, "auto", unseen=0.6, retain=kept, inplace=False)
    assert with_kept.reached and with_kept.settings["method"] == "uniform"
    assert "data that is to stay" in with_kept.settings["auto"]
    left, stays = (imu.evaluate(r.model, kept)["loss"] for r in (result, with_kept))
    assert stays < left, "what is to stay is looked after"


def test_to_what_unseen_text_has(learned, caplog):
    model, forget, _ = learned
    unseen = rows(2)
    with pytest.warns(UserWarning, match="is not reached"), caplog.at_level("WARNING", "imu_fast"):
        result = imu.unlearn(model, forget, "auto", unseen=unseen, max_steps=1, inplace=False)
    line = imu.evaluate(model, unseen)["accuracy"]
    assert result.settings["unseen_accuracy"] == pytest.approx(line) and line < 0.2
    assert "pass retain=" in caplog.text


def test_the_rate_is_in_units_of_the_weights(learned):
    model = learned[0]
    matrices = torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() > 1])
    assert rate_of(model) == pytest.approx(RELATIVE_RATE * float(matrices.square().mean().sqrt()))
    larger = copy.deepcopy(model)
    with torch.no_grad():
        larger.mix.weight.mul_(100)
    assert rate_of(larger) > 10 * rate_of(model)
    larger.mix.requires_grad_(False)
    assert rate_of(larger) < 2 * rate_of(model), "of what is trained"
    zero = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(zero.weight)
    assert rate_of(zero) == RELATIVE_RATE


def test_options_go_to_what_is_taken(learned):
    model, forget, kept = learned
    options = {"lr": 1e-3, "layers": "mix", "scope": "layers", "retain": kept}
    options["retain_weight"] = 0.5
    result = imu.unlearn(model, forget, "auto", unseen=0.4, inplace=False, **options)
    assert {k: result.settings[k] for k in ("lr", "retain_weight")} == {
        "lr": 1e-3,
        "retain_weight": 0.5,
    }
    assert "with scope, retain_weight as given" in result.settings["auto"]
    own = dict(model.named_parameters())
    moved = {n for n, p in result.model.named_parameters() if not torch.equal(p, own[n])}
    assert moved == {"mix.weight", "mix.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "stop=None with method='auto' for sequences: pass unseen=X"),
        ({"unseen": 0.1, "task": "samples"}, "task= of method='auto' is of samples of one label"),
        ({"unseen": 0.1, "margin": 0.5}, "takes 'simnpo' for sequences, which has no option marg"),
        ({"unseen": 0.1, "curvature": "kfac"}, "'auto' has no option curvature"),
        ({"unseen": 0.1, "stop": imu.StopRule(forget_loss=9.0)}, "unseen= of method='auto' is the"),
    ],
)
def test_refused_before_any_work(learned, options, message):
    model, forget, _ = learned
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        imu.unlearn(model, forget, "auto", **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_rate_is_of_the_weights_in_any_precision(dtype):
    torch.manual_seed(0)
    model = Tiny().to(dtype)
    matrices = torch.cat([p.detach().double().flatten() for p in model.parameters() if p.dim() > 1])
    truth = RELATIVE_RATE * float(matrices.square().mean().sqrt())
    assert rate_of(model) == pytest.approx(truth, rel=1e-5)
