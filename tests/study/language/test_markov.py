"""Chains with known matrices: what is drawn, what is best, and a tiny experiment."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("scipy")
from typer.testing import CliRunner

from imu_fast.cli.app import app
from imu_fast.errors import InputError
from imu_fast.storage import save_tensors
from imu_fast.study.entries import ORIGINAL, RETRAINED, TWIN
from imu_fast.study.language.markov import (
    BEST_OF_ALL,
    BEST_OF_KEPT,
    best_prediction,
    divergence,
    draw,
    transition_matrices,
)
from imu_fast.study.language.methods import ENTRIES, QUESTIONS, entries_named
from imu_fast.study.language.named import experiment_named
from imu_fast.study.language.report import markdown
from imu_fast.study.language.run import Seed, Sitting, run


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


METHODS = ("uniform, head", "imu, head", "permuted, head", "simnpo, network")


def test_matrices_are_those_of_the_paper():
    matrices = transition_matrices(10, 3, 3, 0.8)
    assert torch.allclose(matrices.sum(dim=2), torch.ones(3, 10, dtype=torch.float64))
    assert torch.allclose(matrices[1, 4, 3:6], torch.full((3,), 0.8 / 3, dtype=torch.float64))
    assert torch.allclose(matrices[1, 4, :3], torch.full((3,), 0.2 / 7, dtype=torch.float64))
    assert torch.allclose(matrices[1, 0], torch.full((10,), 0.1, dtype=torch.float64))
    with pytest.raises(InputError, match="4 blocks of 3 do not fit into 10"):
        transition_matrices(10, 3, 4, 0.8)


def test_rows_are_drawn_by_their_matrix():
    matrix = transition_matrices(5, 2, 2, 0.7)[0]
    rows = draw(matrix, 20_000, 3, torch.Generator().manual_seed(0))
    pairs = rows[:, 1] * 5 + rows[:, 2]
    counts = torch.bincount(pairs, minlength=25).view(5, 5).double()
    spread = (matrix * (1 - matrix) / counts.sum(dim=1, keepdim=True)).sqrt()
    assert ((counts / counts.sum(dim=1, keepdim=True) - matrix).abs() < 5 * spread).all()


def test_the_best_prediction_is_the_conditional_of_the_joint():
    """By enumeration: p(s_t+1 | s_0 .. s_t) of a chain drawn by the prior."""
    matrices = transition_matrices(4, 1, 3, 0.6)
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

    def joint(states):
        paths = [
            math.prod([float(matrix[a, b]) for a, b in itertools.pairwise(states)])
            for matrix in matrices
        ]
        return sum(float(p) * path for p, path in zip(prior, paths, strict=True)) / 4

    ids = torch.tensor([[0, 0, 1, 2], [3, 1, 1, 0]])
    found = best_prediction(ids, matrices, prior).exp()
    for row, states in zip(found, ids.tolist(), strict=True):
        for t in range(3):
            seen = states[: t + 1]
            expected = [joint([*seen, s]) / joint(seen) for s in range(4)]
            assert row[t].tolist() == pytest.approx(expected, rel=1e-12)


def test_divergence_is_that_of_the_formula():
    p, q = torch.tensor([[[0.5, 0.5]], [[0.9, 0.1]]]), torch.tensor([[[0.25, 0.75]], [[0.9, 0.1]]])
    expected = (0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert divergence(p.log(), q.log()) == pytest.approx(expected)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("markov")
    experiment = experiment_named("markov", quick=True)
    return experiment, out, run(experiment, out, seeds=2, methods=METHODS, progress=False)


def test_every_seed_has_every_row(tiny):
    _, out, results = tiny
    names = {ORIGINAL, RETRAINED, TWIN, BEST_OF_ALL, BEST_OF_KEPT, *METHODS}
    assert {(r["seed"], r["method"]) for r in results["rows"]} == set(
        itertools.product((0, 1), names)
    )
    by = {(r["seed"], r["method"]): r for r in results["rows"]}
    assert by[0, RETRAINED]["kl_retrained"] == 0 < by[0, TWIN]["kl_retrained"]
    assert by[0, BEST_OF_KEPT]["kl_true_kept"] == 0 < by[0, BEST_OF_ALL]["kl_true_kept"]
    # All that came to the depth are at the retrained model's loss.
    reached = [r for r in results["rows"] if r["method"] in METHODS and r["reached"]]
    assert reached
    for row in reached:
        assert row["forget_loss"] == pytest.approx(
            by[row["seed"], RETRAINED]["forget_loss"], rel=1e-2
        )
    assert results == json.loads((out / "results.json").read_text())
    assert (out / "table.md").read_text() == markdown(results)
    assert all(f"| {name} |" in markdown(results) for name in names)


def test_a_second_run_measures_nothing_and_says_the_same(tiny, monkeypatch):
    experiment, out, results = tiny
    monkeypatch.setattr(Seed, "run", lambda *_: pytest.fail("run again"))
    monkeypatch.setattr(Seed, "_model", lambda *_: pytest.fail("trained again"))
    again = run(experiment, out, seeds=2, methods=METHODS, minutes=0, progress=False)
    assert again == results


def test_a_run_goes_on_where_a_cell_lacks_a_method(tiny):
    experiment, out, results = tiny
    seed = Seed(Sitting(experiment, METHODS, out), 0)
    text = seed.cell.path.read_text()
    lines = [line for line in text.splitlines() if not line.startswith('"imu, head"')]
    seed.cell.path.write_text("\n".join(lines))
    again = run(experiment, out, seeds=2, methods=METHODS, progress=False)

    def told(found):
        return [{k: v for k, v in r.items() if k != "seconds"} for r in found["rows"]]

    assert told(again) == told(results)


def test_cells_of_other_models_are_refused(tiny):
    experiment, out, _ = tiny
    seed = Seed(Sitting(experiment, METHODS, out), 0)
    for path in (out / "cache").glob("markov-0-*"):
        path.unlink()
    network = seed.material.network
    for which in ("original", "retrained"):
        path = out / "cache" / f"markov-0-{which}-{seed.cell.key[:6]}.safetensors"
        key = f"{seed.cell.key} {ORIGINAL if which == 'original' else RETRAINED}"
        save_tensors(path, network.made(7).state_dict(), {"key": key})
    with pytest.raises(InputError, match="measured on other models"):
        _ = seed.retrained


def test_without_time_nothing_is_measured(tmp_path):
    with pytest.raises(InputError, match="more minutes"):
        run(experiment_named("markov", quick=True), tmp_path, seeds=1, minutes=0, progress=False)


def test_entries_and_questions():
    assert set(entries_named(("all",))) == set(ENTRIES)
    for question in QUESTIONS.values():
        for name in (question.baseline, *question.methods):
            assert name in ENTRIES or name in (ORIGINAL, TWIN)
    with pytest.raises(InputError, match="methods='margin_edit'"):
        entries_named(("margin_edit",))


def test_the_command(tmp_path):
    done = call(
        *("compare-language", "--quick", "--seeds", 1, "--methods", "uniform, head"),
        *("--out", tmp_path / "out"),
    )
    assert done.exit_code == 0, done.output
    assert "table.md are in" in done.output
    assert json.loads((tmp_path / "out" / "results.json").read_text())["seeds"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--data", "poems"), "data='poems'"),
        (("--data", "tofu"), "data_path=None"),
        (("--data-path", "x.jsonl"), "goes with data='tofu'"),
        (("--seeds", 0), "seeds=0"),
        (("--methods", "margin_edit"), "methods='margin_edit'"),
    ],
)
def test_mistakes_are_a_line(tmp_path, arguments, said):
    done = call("compare-language", "--quick", "--out", tmp_path / "out", *arguments)
    assert done.exit_code == 2 and said in done.output
    assert not (tmp_path / "out").exists()
