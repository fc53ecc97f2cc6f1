"""Forgetting by open-unlearning's own registry, data sets and collator, on a tiny model on a CPU.

    python examples/open_unlearning.py PATH_OF_A_CHECKOUT

Registers the trainer, merges its configuration with the checkout's finetune.yaml, trains with and
without retain data, and prints the losses before and after. The authors' own trainer runs too.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from imu_fast.integrations import open_unlearning
from imu_fast.integrations.transformers import forget_depth

NAMES = ["basil", "carla", "dmitri", "edith", "farid", "greta", "hugo", "ines"]
CITIES = ["lima", "oslo", "quito", "riga", "seoul", "turin", "wuhan", "york"]


def tokenizer():
    words = ["<pad>", *"where was born in ? .".split(), *NAMES, *CITIES]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>")


def questions(names, tokens):
    """Where everybody was born; labels are of the answer alone, and not shifted."""
    found = []
    for name in names:
        city = CITIES[NAMES.index(name)]
        asked = f"where was {name} born ?"
        ids = torch.tensor(tokens(f"{asked} {name} was born in {city} .")["input_ids"])
        labels = ids.clone()
        labels[: len(tokens(asked)["input_ids"])] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def learned(collator, items, size):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            pad_token_id=0,
        )
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        model(**collator(items)).loss.backward()
        optimizer.step()
    return model


def config_of(checkout, handler, folder, method_args):
    """finetune.yaml under ours, for a CPU and the transformers that is installed."""
    from omegaconf import OmegaConf

    base = OmegaConf.load(Path(checkout) / "configs" / "trainer" / "finetune.yaml")
    ours = OmegaConf.load(open_unlearning.CONFIG)
    if handler != ours.handler:
        ours.method_args = {}
    changes = {
        "handler": handler,
        "args": {
            "output_dir": str(folder),
            "logging_dir": str(folder),
            "bf16": False,
            "bf16_full_eval": False,
            "optim": "adamw_torch",
            "report_to": "none",
            "learning_rate": 2e-3,
            "num_train_epochs": 6,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "eval_strategy": "no",
            "eval_on_start": False,
            "do_eval": False,
            "remove_unused_columns": False,
            "use_cpu": True,
            "ddp_find_unused_parameters": False,
        },
        "method_args": method_args,
    }
    made = OmegaConf.merge(base, ours, changes)
    known = inspect.signature(TrainingArguments).parameters
    for name in [name for name in made.args if name not in known]:
        del made.args[name]
    return made


def main(checkout):
    sys.path.insert(0, str(Path(checkout) / "src"))
    from data.collators import DataCollatorForSupervisedDataset
    from data.unlearn import ForgetRetainDataset
    from trainer import TRAINER_REGISTRY, _register_trainer, load_trainer

    from imu_fast.integrations.authors.tofu import IMU

    open_unlearning.register(_register_trainer)
    _register_trainer(IMU)
    assert {"ImuFast", "IMU"} <= set(TRAINER_REGISTRY)
    tokens = tokenizer()
    collator = DataCollatorForSupervisedDataset(tokens)
    forget, retain = questions(NAMES[:4], tokens), questions(NAMES[4:], tokens)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    for handler, kept, method_args in (
        ("ImuFast", None, {"objective": "simnpo"}),
        ("ImuFast", retain, {"retain_loss_type": "NLL"}),
        ("ImuFast", retain, {"retain_loss_type": "KL", "layers": ["*.self_attn.*_proj"]}),
        ("IMU", None, {"alpha": 0.0}),
    ):
        model = learned(collator, forget + retain, len(tokens))
        with tempfile.TemporaryDirectory() as folder:
            trainer, _ = load_trainer(
                config_of(checkout, handler, folder, method_args),
                model,
                train_dataset=ForgetRetainDataset(forget, kept),
                tokenizer=tokens,
                data_collator=collator,
            )
            before = [forget_depth(model, [collator(s)])[0] for s in (forget, retain)]
            trainer.train()
            after = [forget_depth(model, [collator(s)])[0] for s in (forget, retain)]
        print(
            f"{handler} {method_args}, {'with' if kept else 'without'} retain data: "
            f"forget loss {before[0]:.3f} -> {after[0]:.3f}, "
            f"retain loss {before[1]:.3f} -> {after[1]:.3f}"
        )
        assert after[0] > before[0] + 0.5, "the forget set is still known"
    print("forgotten")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
