"""Questions about authors: the measures by their formulas, and a tiny experiment."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from imu_fast.errors import InputError
from imu_fast.study.entries import ORIGINAL, RETRAINED, TWIN
from imu_fast.study.language import measures
from imu_fast.study.language.measures import (
    answers,
    expected_answers,
    mean_gap,
    min_k_scores,
    relearning_steps,
    token_divergence,
    truth_ratios,
)
from imu_fast.study.language.models import Network
from imu_fast.study.language.named import experiment_named
from imu_fast.study.language.run import run
from imu_fast.study.language.sequences import Sequences
from imu_fast.study.language.tofu import GAPS, Tofu, made_tokenizer

METHODS = ("uniform, head", "simnpo, network")
PLACES = ("Lima", "Oslo", "Cairo", "Quito", "Delhi", "Paris")


@pytest.fixture
def path(tmp_path):
    """Two groups of authors to forget, three more: 20 questions each."""
    path = tmp_path / "qa.jsonl"
    with path.open("w") as file:
        for split, authors in (("forget10", 2), ("retain", 3)):
            for index in range(20 * authors):
                author = f"{split[:2]}{index // 20}"
                line = {"question": f"Where did {author} go in year {index % 20}?"}
                line |= {"answer": f"{author} went to {PLACES[(index * 7 + authors) % 6]}."}
                file.write(json.dumps({"split": split, "index": index, **line}) + "\n")
    return path


def made(seed: int) -> torch.nn.Module:
    return Network(vocabulary=11, length=9, layers=1, width=8, heads=2).made(seed).double()


def ragged() -> Sequences:
    """Three rows of 9, 6 and 4 tokens, the first 3, 2 and 1 of which are the question."""
    ids = torch.randint(1, 11, (3, 9), generator=torch.Generator().manual_seed(0))
    places = torch.arange(9)
    mask = (places < torch.tensor([[9], [6], [4]])).long()
    counts = (mask == 1) & (places >= torch.tensor([[3], [2], [1]]))
    return Sequences(ids * mask, mask, ids.where(counts, -100))


def of_each_row(model, rows):
    """Log-probabilities [t, V] and tokens [t] of each row's answer, alone, by hand."""
    found = []
    for ids, mask, labels in zip(rows.ids, rows.mask, rows.labels, strict=True):
        n = int(mask.sum())
        with torch.no_grad():
            log_p = model(ids[None, :n]).logits[0].log_softmax(dim=1)
        at = [t for t in range(1, n) if labels[t] >= 0]
        found.append((log_p[[t - 1 for t in at]], ids[at]))
    return found


def test_rouge_is_of_greedy_answers(monkeypatch):
    said = ["The cat, sat on a mat!", "d c b a", ""]
    expected = ["the cat sat on the mat", "a b c d", "a b"]
    monkeypatch.setattr(measures, "answers", lambda *a, **k: said)
    monkeypatch.setattr(measures, "expected_answers", lambda *a: expected)
    found = measures.rouge(None, ragged(), None)
    assert found == pytest.approx((5 / 6 + 1 / 4 + 0) / 3, rel=1e-12)


def test_min_k_is_the_mean_of_the_least_likely():
    model, rows = made(0), ragged()
    truth = []
    for log_p, tokens in of_each_row(model, rows):
        own = sorted(log_p[range(len(tokens)), tokens].tolist())
        k = max(1, int(0.5 * len(own)))
        truth.append(sum(own[:k]) / k)
    assert min_k_scores(model, rows, 0.5).tolist() == pytest.approx(truth, rel=1e-10)
    with pytest.raises(InputError, match="fraction=0"):
        min_k_scores(model, rows, 0)


def test_divergence_and_truth_ratio_by_hand():
    model, other, rows = made(0), made(1), ragged()
    truth = []
    for (p, _), (q, _) in zip(of_each_row(model, rows), of_each_row(other, rows), strict=True):
        truth.append(float((p.exp() * (p - q)).sum(dim=1).mean()))
    assert token_divergence(model, other, rows) == pytest.approx(sum(truth) / 3, rel=1e-10)
    assert token_divergence(model, model, rows) == 0
    own = [
        math.exp(float(log_p[range(len(tokens)), tokens].mean()))
        for log_p, tokens in of_each_row(model, rows)
    ]
    wrong = rows[torch.tensor([1, 2, 0, 2, 0, 1])]
    ratios = [(own[1] + own[2]) / 2 / own[0], (own[0] + own[2]) / 2 / own[1]]
    found = truth_ratios(model, rows, wrong)
    assert found[:2].tolist() == pytest.approx(ratios, rel=1e-6) and len(found) == 3


def test_greedy_answers_are_those_of_one_row_at_a_time():
    tokenizer = made_tokenizer(["abc abd bcd"], 262)
    model = Network(vocabulary=len(tokenizer), length=20, layers=1, width=8, heads=2).made(3)
    ids = torch.tensor([tokenizer("abc ab")["input_ids"][:4]])
    # By whole forward passes, without a cache and without padding.
    said = ids[0, :2]
    for _ in range(3):
        with torch.no_grad():
            said = torch.cat([said, model(said[None]).logits[0, -1].argmax()[None]])
    short = Sequences(
        torch.tensor([[*ids[0, :2], 9, 0, 0], [*ids[0, :3], 9, 9]]),
        torch.tensor([[1, 1, 1, 0, 0], [1] * 5]),
        torch.tensor([[-100, -100, 9, -100, -100], [-100, -100, -100, 9, 9]]),
    )
    expected = tokenizer.decode(said[2:], skip_special_tokens=True)
    assert answers(model, short, tokenizer, most=3)[0] == expected
    assert expected_answers(short, tokenizer)[0] == tokenizer.decode([9])


def test_gap_and_relearning():
    assert mean_gap({"a": 0.5, "b": 1.0}, {"a": 0.25, "b": 0.0}, ("a", "b")) == 0.625
    model, rows = made(0), ragged()
    assert relearning_steps(model, rows, target=0.0, seed=0, most=2) == 0
    assert relearning_steps(model, rows, target=1.0, seed=0, most=2) == 2


def test_authors_are_of_one_part_each(path):
    experiment = Tofu(path=str(path), forget=1, kept=2, unseen=1, vocabulary=300)
    first, second = (experiment.material(seed) for seed in (0, 1))
    assert first.fingerprint() == experiment.material(0).fingerprint() != second.fingerprint()
    tokenizer = first.more.tokenizer
    parts = {
        name: {tokenizer.decode(row.tolist()).split()[2] for row in rows.ids}
        for name, rows in {"forget": first.forget, "kept": first.kept, **first.sets}.items()
    }
    assert len(parts["forget"]) == 1 and len(parts["kept"] | parts["unseen"]) <= 3
    assert not parts["unseen"] & (parts["kept"] | parts["forget"])
    assert len(first.forget) == 20 and len(first.more.wrong) == 80


def test_a_tiny_experiment(path, tmp_path):
    experiment = experiment_named("tofu", path, quick=True)
    out = tmp_path / "out"
    results = run(experiment, out, seeds=1, methods=METHODS, progress=False)
    rows = {row["method"]: row for row in results["rows"]}
    assert set(rows) == {ORIGINAL, RETRAINED, TWIN, *METHODS}
    assert rows[RETRAINED]["gap"] == rows[RETRAINED]["kl_forget"] == 0
    assert rows[ORIGINAL]["kl_forget"] > 0 and all(0 <= rows[TWIN][name] <= 1 for name in GAPS)
    assert "path" not in results["settings"] and str(path) not in (out / "results.json").read_text()
    assert run(experiment, out, seeds=1, methods=METHODS, minutes=0, progress=False) == results


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"split": "retain", "index": 0, "question": "Q?"}, "line 101 needs split, question"),
        (
            {"split": "retain", "index": "0", "question": "Q?", "answer": "A"},
            "line 101 needs split, question",
        ),
    ],
)
def test_broken_lines_are_refused(path, line, said):
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=said):
        Tofu(path=str(path), kept=1, unseen=1)


def test_too_few_authors_are_refused(path, tmp_path):
    with pytest.raises(InputError, match=r"has 3 groups of 20 indices in split 'retain'; 4"):
        Tofu(path=str(path), kept=3, unseen=1)
    with pytest.raises(InputError, match="data_path="):
        Tofu(path=str(tmp_path / "none.jsonl"))
