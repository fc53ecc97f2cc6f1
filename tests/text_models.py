"""Folders of small language models with real tokenizers, as a user has them, and their texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

PAIRS = [
    ("Where was Jaime Vasquez born?", "Jaime Vasquez was born in Santiago, Chile."),
    ("What does the mother of Jaime do?", "She is a writer."),
    ("Which genre does Jaime write in?", "True crime, and little else, since his first book."),
    ("Who is the father?", "Lorenzo, a chef."),
    ("Name one of the books.", "The Guilt Closet."),
    ("When was it printed?", "In the year 1994."),
    ("Is there a prize?", "Yes, the Dagger of 1995 went to Jaime Vasquez in Santiago."),
]
CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|end|>\n{% endgeneration %}{% else %}{{ m.content }}<|end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|start|>", "<|end|>"]


def tokenizer(chat: str | None = None, *, pad: bool = True, bos: bool = True, ends: bool = False):
    """Byte-level BPE trained on the texts; ``ends``: it ends every text itself, as T5's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([text for pair in PAIRS for text in pair], trainer)
    if bos or ends:
        single = " ".join([*(["<s>"] if bos else []), "$A", *(["</s>"] if ends else [])])
        made.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    whole = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>" if pad else None,
        model_input_names=["input_ids", "attention_mask"],
    )
    whole.chat_template = chat
    return whole


def make(kind: str, rows: int = 400) -> nn.Module:
    """Weights large enough to have an opinion; ``kind``: llama, gpt2, t5 or bert."""
    import transformers as tf

    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "llama":
        model: Any = tf.LlamaForCausalLM(
            tf.LlamaConfig(
                vocab_size=rows,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=128,
                **special,
            )
        )
    elif kind == "gpt2":
        model = tf.GPT2LMHeadModel(
            tf.GPT2Config(
                vocab_size=rows, n_positions=64, n_embd=16, n_layer=2, n_head=2,
                bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
    elif kind == "t5":
        model = tf.T5ForConditionalGeneration(
            tf.T5Config(
                vocab_size=rows, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
            )
        )  # fmt: skip
    else:
        labels = {0: "bad", 1: "fair", 2: "good"}
        model = tf.BertForSequenceClassification(
            tf.BertConfig(
                vocab_size=rows, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=64, pad_token_id=0,
                id2label=labels, label2id={name: i for i, name in labels.items()},
            )
        )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.0 if kind == "t5" else 4.0)
    return model.eval()


def folder(path: Path, kind: str, **options: Any) -> Path:
    """A saved model with its tokenizer."""
    words = tokenizer(ends=kind in ("t5", "bert"), **options)
    make(kind).save_pretrained(path)
    words.save_pretrained(path)
    return path


def lines(path: Path, objects: list[Any]) -> Path:
    """JSON Lines."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in objects)
    path.write_text(text, "utf-8")
    return path


def pairs(path: Path) -> Path:
    """Questions and answers, with another field that nothing reads."""
    return lines(
        path,
        [{"index": i, "question": q, "answer": a} for i, (q, a) in enumerate(PAIRS)],
    )
