"""The trainers in open-unlearning's contract: a stand-in of it, and the package where there is one.

``make integration OPEN_UNLEARNING=path`` runs the last test against a checkout.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
import yaml
from integrations import stand_in
from integrations.tiny import llama, tokens
from per_sample import assert_scores, sample_gradients
from per_sample import scores as scores_of
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import TrainerCallback, TrainingArguments

import imu_fast as imu
from imu_fast.integrations import open_unlearning
from imu_fast.integrations._forgetting import accepted
from imu_fast.integrations.authors import tofu

ROOT = Path(__file__).resolve().parents[2]


def items(n, first=0):
    """Question and answer, ragged; labels of the question are -100."""
    found = []
    for i in range(first, first + n):
        ids = torch.tensor([(3 * t * t + i * t + i) % 10 + 1 for t in range(5 + i % 3)])
        labels = ids.clone()
        labels[:2] = -100
        found.append({"input_ids": ids, "labels": labels, "index": i})
    return found


def arguments(folder, **options):
    given = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 0.05,
        "report_to": [],
        "remove_unused_columns": False,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        **options,
    }
    return TrainingArguments(**given)


@pytest.fixture
def make(tmp_path):
    def made(retain=True, cls=None, training=None, model=None, **options):
        cls = cls or open_unlearning.trainer_class(stand_in.UnlearnTrainer)
        dataset = stand_in.ForgetRetainDataset(items(8), items(5, first=20) if retain else None)
        return cls(
            model=llama(3) if model is None else model,
            args=arguments(tmp_path, **(training or {})),
            train_dataset=dataset,
            data_collator=stand_in.collate,
            evaluators=None,
            template_args=None,
            **options,
        )

    return made


def sequence_loss(model, item):
    logits = model(input_ids=item["input_ids"][None]).logits[0]
    return cross_entropy(logits[:-1], item["labels"][1:], ignore_index=-100)


def weights_by_hand(model, samples, names):
    roots = scores_of(sample_gradients(model, samples, names, sequence_loss))
    roots = roots.clamp(max=0).neg().sqrt()
    return roots.clamp(max=float(torch.quantile(roots[roots > 0], 0.93)))


def by_hand(model, samples, names, of_sample):
    weights = weights_by_hand(model, samples, names)
    model = copy.deepcopy(model).double()
    values = torch.stack([of_sample(model, item) for item in samples])
    loss = -(weights * values).sum() / weights.sum()
    loss.backward()
    return loss, model


def test_registered_under_the_name_of_its_configuration():
    made = open_unlearning.register(stand_in._register_trainer, stand_in.UnlearnTrainer)
    config = yaml.safe_load(open_unlearning.CONFIG.read_text())
    assert stand_in.TRAINER_REGISTRY[config["handler"]] is made
    assert issubclass(made, stand_in.UnlearnTrainer)
    assert config["defaults"] == ["finetune"]


def test_the_configuration_is_what_the_trainer_takes(make, tmp_path):
    (tmp_path / "configs" / "trainer").mkdir(parents=True)
    config = yaml.safe_load(open_unlearning.install_config(tmp_path).read_text())
    trainer = make(**config["method_args"])
    assert trainer.forgetting == open_unlearning.Forgetting()
    with pytest.raises(imu.InputError, match="has no folder configs/trainer"):
        open_unlearning.install_config(tmp_path / "configs")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["lm_head.weight"]),
        (
            {"layers": ["*layers.[12].self_attn.q_proj", "lm_head"]},
            [
                "model.layers.1.self_attn.q_proj.weight",
                "model.layers.2.self_attn.q_proj.weight",
                "lm_head.weight",
            ],
        ),
    ],
)
def test_the_loss_without_retain_data(make, options, names):
    trainer = make(retain=False, **options)
    model, samples = trainer.model.train(), items(5)
    batch = {"forget": stand_in.collate(samples)}
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True, num_items_in_batch=7)
    hand, twin = by_hand(model, samples, names, sequence_loss)
    assert outputs.logits.shape[:2] == batch["forget"]["input_ids"].shape
    assert_scores(trainer.weights, weights_by_hand(model, samples, names))
    assert abs(float(loss.detach() - hand.detach())) < 1e-5
    loss.backward()
    for p, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad.double(), other.grad, atol=1e-6)
    assert model.training


def npo(beta, original):
    def f(model, item):
        count = (item["labels"][1:] != -100).sum()
        with torch.no_grad():
            before = sequence_loss(original, item) * count
        ratio = before - sequence_loss(model, item) * count
        return 2 / beta * logsigmoid(-beta * ratio)

    return f


def simnpo(beta):
    return lambda model, item: 2 / beta * logsigmoid(beta * sequence_loss(model, item))


def log1mp(model, item):
    logits = model(input_ids=item["input_ids"][None]).logits[0, :-1]
    y = item["labels"][1:]
    p = logits.softmax(1).gather(1, y.clamp_min(0)[:, None])[:, 0]
    return (1 - p[y != -100]).log().mean()


@pytest.mark.parametrize("objective", ["npo", "simnpo", "log1mp"])
def test_other_objectives(make, objective):
    model, samples = llama(2), items(5)
    beta = {} if objective == "log1mp" else {"beta": 0.7}
    trainer = make(retain=False, model=model, objective=objective, **beta)
    original = copy.deepcopy(model).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.3)
    loss = trainer.compute_loss(model.train(), {"forget": stand_in.collate(samples)})
    f = {"npo": npo(0.7, original), "simnpo": simnpo(0.7), "log1mp": log1mp}[objective]
    hand, _ = by_hand(model, samples, ["lm_head.weight"], f)
    assert abs(float(loss.detach() - hand.detach())) < 1e-5


@pytest.mark.parametrize("kind", ["NLL", "KL"])
def test_the_retain_set_has_a_term_of_its_own(make, kind):
    model = llama(2)
    trainer = make(model=model, alpha=3.0, gamma=0.5, l1=0.01, retain_loss_type=kind)
    original = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.3)
    forget, retain = stand_in.collate(items(4)), stand_in.collate(items(3, first=20))
    both = float(trainer.compute_loss(model.train(), {"forget": forget, "retain": retain}).detach())
    alone = float(trainer.compute_loss(model, {"forget": forget}).detach())
    del retain["index"]
    with torch.no_grad():
        if kind == "NLL":
            term = float(model(**retain).loss)
        else:
            terms = []
            for item in items(3, first=20):
                p, q = (
                    m(input_ids=item["input_ids"][None]).logits[0, :-1].log_softmax(1)
                    for m in (model, original)
                )
                apart = (q.exp() * (q - p)).sum(1)
                terms.append(apart[item["labels"][1:] != -100].mean())
            term = float(torch.stack(terms).mean())
    assert term > 1e-3 and abs(both - alone - 3 * term) < 1e-4
    trainer.forgetting = open_unlearning.Forgetting(gamma=0.5)
    plain = float(trainer.compute_loss(model, {"forget": forget}).detach())
    norm = sum(float(p.detach().abs().sum()) for p in model.parameters())
    assert abs(alone - plain - 0.01 * norm) < 1e-3


def as_tuple(batch):
    return batch["input_ids"], batch["labels"], batch["attention_mask"]


def test_batches_of_other_code(make):
    trainer, forget = make(), stand_in.collate(items(4))
    retain = stand_in.collate(items(3, first=20))
    model = trainer.model.train()
    found = [
        float(trainer.compute_loss(model, batch).detach())
        for batch in (
            {"forget": forget, "retain": retain},
            (as_tuple(forget), as_tuple(retain)),
            (forget, retain),
        )
    ]
    assert found[0] == found[1] == found[2]
    assert float(trainer.compute_loss(model, forget).detach()) == float(
        trainer.compute_loss(model, (forget, None)).detach()
    )
    with pytest.raises(imu.InputError, match="no labels"):
        trainer.compute_loss(model, {"forget": {"input_ids": forget["input_ids"]}})
    with pytest.raises(imu.InputError, match="a batch is a Tensor"):
        trainer.compute_loss(model, {"forget": torch.ones(3)})


@pytest.mark.parametrize("retain", [False, True])
def test_training_forgets(make, retain):
    trainer = make(retain=retain, training={"num_train_epochs": 3, "learning_rate": 0.5})
    before = copy.deepcopy(trainer.model)
    trainer.train()
    after = trainer.model
    with torch.no_grad():
        was, now = (
            torch.stack([sequence_loss(m, item) for item in items(8)]).mean()
            for m in (before, after)
        )
    assert float(now) > float(was) + 0.1


def test_accumulated_steps_are_one_step_of_the_mean(make, monkeypatch):
    samples = items(8)
    moved = []
    for size, steps in ((4, 2), (4, 1)):
        training = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = make(retain=False, training={**training, "max_steps": 1})
        batches = [stand_in.collate(samples[:4]), stand_in.collate(samples[4:])]
        monkeypatch.setattr(trainer, "get_train_dataloader", lambda b=batches: Fixed(b))
        start = trainer.model.lm_head.weight.detach().clone()
        trainer.train()
        moved.append(trainer.model.lm_head.weight.detach() - start)
        if steps == 2:
            fresh = llama(3).train()
            for batch in batches:
                (trainer.compute_loss(fresh, {"forget": batch}) / 2).backward()
            assert torch.allclose(moved[0], -0.05 * fresh.lm_head.weight.grad, atol=1e-6)
    assert not torch.allclose(*moved)


class Fixed(list):
    """Batches as a loader."""

    batch_size = 4
    dataset = ()


def test_only_the_layers_change_and_flags_come_back(make):
    trainer = make(layers=["model.layers.1.mlp.up_proj"], trained="layers")
    trainer.model.model.embed_tokens.weight.requires_grad_(False)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    changed = [k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == ["model.layers.1.mlp.up_proj.weight"]
    frozen = [k for k, p in trainer.model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]


def test_evaluation_is_the_base_s(make):
    trainer = make()
    samples = [{k: v for k, v in item.items() if k != "index"} for item in items(4)]
    found = trainer.evaluate(samples)["eval_loss"]
    with torch.no_grad():
        whole = float(trainer.model(**stand_in.collate(samples)).loss)
    assert abs(found - whole) < 1e-5
    plain = trainer.compute_loss(trainer.model, stand_in.collate(samples))
    assert abs(float(plain.detach()) - whole) < 1e-5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objective": "dpo"}, "objective='dpo' is unknown"),
        ({"beta": 0.1}, "beta=0.1 is of 'npo' and 'simnpo'"),
        ({"gamma": -1.0}, "gamma=-1.0"),
        ({"layers": ["nothing*"]}, r"layers='nothing\*' matches none"),
        ({"layers": "no_such"}, "no linear layer"),
        ({"trained": "layers"}, "name the layers"),
        ({"curvature": "fisher_diag", "solver": "cg"}, "no option solver"),
        ({"shift_labels": "yes"}, "shift_labels='yes'"),
        ({"retain_loss_type": "MSE"}, "retain_loss_type='MSE' is unknown"),
    ],
)
def test_what_cannot_be_is_refused_before_training(make, options, said):
    with pytest.raises(imu.InputError, match=said):
        make(**options)
    with pytest.raises(TypeError, match="gama"):
        make(gama=1.0)


@pytest.mark.parametrize("ours", [True, False])
def test_a_tokenizer_goes_by_its_present_name(make, ours):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a"))
    )
    cls = None if ours else tofu.imu_trainer(stand_in.UnlearnTrainer)
    trainer = make(cls=cls, tokenizer=tokenizer)
    assert trainer.tokenizer is trainer.processing_class is tokenizer


def test_what_the_model_s_forward_does_not_name_is_left_out():
    class Plain(torch.nn.Module):
        def forward(self, input_ids, labels=None):
            return input_ids

    batch = {"input_ids": 1, "labels": 2, "index": 3}
    assert accepted(Plain(), batch) == {"input_ids": 1, "labels": 2}


def test_a_curvature_with_its_options(make):
    trainer = make(curvature="fisher", damping=0.5)
    assert trainer.forgetting.curvature == imu.Fisher(damping=0.5)
    batch = {"forget": stand_in.collate(items(4))}
    trainer.compute_loss(trainer.model.train(), batch)
    found = imu.batch_weights(
        trainer.model,
        {k: v for k, v in batch["forget"].items() if k != "index"},
        curvature="fisher",
        damping=0.5,
        shift=True,
    )
    assert torch.allclose(trainer.weights, found)


def test_open_unlearning_is_asked_for_where_it_is_needed():
    with pytest.raises(imu.InputError, match="'src' folder is not on the path"):
        open_unlearning.trainer_class()
    with pytest.raises(ImportError, match="'src' folder has to be on the path"):
        _ = tofu.IMU
    with pytest.raises(AttributeError):
        _ = tofu.IMUU


PROJECTIONS = [f"model.layers.{k}.self_attn.{p}_proj.weight" for k in range(3) for p in "qkvo"]


@pytest.mark.parametrize(("shift", "left"), [(True, False), (False, False), (True, True)])
def test_the_authors_trainer(make, shift, left):
    trainer = make(cls=tofu.imu_trainer(stand_in.UnlearnTrainer), shift_labels=shift, alpha=0.05)
    assert type(trainer).__name__ == "IMU" and trainer.state_size == 11
    model, batch = trainer.model.train(), tokens()
    ids, mask, labels = (t.flip(1) for t in batch) if left else batch

    def loss(model, i):
        given = {"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]}
        z, y = model(**given).logits[0], labels[i]
        if shift:
            z, y = z[:-1], y[1:]
        return cross_entropy(z, y, ignore_index=-100)

    truth = sample_gradients(model, range(5), PROJECTIONS, loss)
    roots = scores_of(truth).clamp(max=0).neg().sqrt()
    weights = roots.clamp(max=float(torch.quantile(roots, 0.93)))
    twin = copy.deepcopy(model).double()
    values = torch.stack([loss(twin, i) for i in range(5)])
    norm = sum(p.abs().sum() for n, p in twin.named_parameters() if n in PROJECTIONS)
    hand = -(weights * values).sum() / weights.sum() + 0.05 * norm
    hand.backward()
    inputs = {"forget": {"input_ids": ids, "attention_mask": mask, "labels": labels}}
    found, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
    assert outputs.logits.shape == (5, 7, 11)
    assert abs(float(found.detach() - hand.detach())) < 1e-5
    found.backward()
    other = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        if name in PROJECTIONS:
            assert torch.allclose(p.grad.double(), other[name].grad, atol=1e-6)
        else:
            assert p.grad is None and p.requires_grad


def test_the_authors_trainer_and_a_batch_without_a_label(make, caplog):
    """The penalty alone is left, in the model's own precision."""
    ids, mask, labels = tokens()
    nothing = {"input_ids": ids, "attention_mask": mask, "labels": labels * 0 - 100}
    trainer = make(cls=tofu.imu_trainer(stand_in.UnlearnTrainer), alpha=0.05)
    model = trainer.model.double().train()
    norm = sum(p.abs().sum() for n, p in model.named_parameters() if n in PROJECTIONS)
    for rows in (slice(0, 5), slice(0, 1)):  # several samples, and one
        inputs = {"forget": {k: v[rows] for k, v in nothing.items()}}
        loss = trainer.compute_loss(model, inputs)
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, 0.05 * norm, rtol=1e-12, atol=0)
    assert "have no label: their gradients are zero" in caplog.text


def test_the_authors_trainer_refuses_what_its_loss_would_ignore(make):
    with pytest.raises(imu.InputError, match=r"label_smoothing_factor=0\.2"):
        make(
            cls=tofu.imu_trainer(stand_in.UnlearnTrainer), training={"label_smoothing_factor": 0.2}
        )


def test_the_authors_trainer_refuses_inputs_that_it_would_not_pass_on(make):
    ids, mask, labels = tokens()
    trainer = make(cls=tofu.imu_trainer(stand_in.UnlearnTrainer))
    forget = {"input_ids": ids, "attention_mask": mask, "labels": labels, "index": labels[:, 0]}
    trainer.compute_loss(trainer.model.train(), {"forget": forget})
    forget["position_ids"] = torch.arange(ids.shape[1]).expand_as(ids)
    with pytest.raises(imu.InputError, match="'position_ids'.*reads input_ids, attention_mask"):
        trainer.compute_loss(trainer.model, {"forget": forget})


def test_the_authors_penalty_without_a_gradient(make):
    gradients = []
    ids, mask, labels = tokens()
    inputs = {"forget": {"input_ids": ids, "attention_mask": mask, "labels": labels}}
    for given in ({"alpha": 0.0}, {"alpha": 9.0, "l1_gradient": False}, {"alpha": 9.0}):
        trainer = make(cls=tofu.imu_trainer(stand_in.UnlearnTrainer), **given)
        trainer.compute_loss(trainer.model.train(), inputs).backward()
        gradients.append(tofu.get_last_params(trainer.model)[0].grad)
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2])


def test_the_authors_trainer_trains_their_parameters_alone(make):
    class Watches(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            trained.append([k for k, p in model.named_parameters() if p.requires_grad])

    trained = []
    trainer = make(cls=tofu.imu_trainer(stand_in.UnlearnTrainer))
    trainer.add_callback(Watches())
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert trained == [PROJECTIONS, PROJECTIONS]
    changed = [k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == PROJECTIONS
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_the_real_package():
    checkout = os.environ.get("OPEN_UNLEARNING")
    if not checkout:
        pytest.skip("no checkout of open-unlearning; make integration OPEN_UNLEARNING=path")
    python = os.environ.get("OPEN_UNLEARNING_PYTHON", sys.executable)
    done = subprocess.run(
        [python, str(ROOT / "examples" / "open_unlearning.py"), checkout],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        timeout=900,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "forgotten" in done.stdout
