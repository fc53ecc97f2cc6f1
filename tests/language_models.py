"""Small language models of random weights, their batches, and the truth about their samples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, LENGTH, LAYERS = 48, 9, 2


@dataclass(frozen=True)
class Kind:
    """One architecture: how it is made, what its batches are, which layers to look at."""

    make: Callable[[Any, bool], nn.Module]
    head: str
    attention: str
    batch: str = "causal"
    tied: bool = True  # whether it can be
    # Gemma2's softmax is in float32, where the float64 mask of padding is -inf, and all masked NaN;
    # rotary positions are relative, so that a sample may as well come without its padding.
    cut: bool = False
    scale: float = 4.0  # of the weights


def _decoder(name: str, **more: Any) -> Callable[[Any, bool], nn.Module]:
    def make(transformers: Any, tied: bool) -> nn.Module:
        sizes = dict(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=tied,
        )
        config = getattr(transformers, f"{name}Config")(**sizes | more)
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return make


def _gpt2(transformers: Any, tied: bool) -> nn.Module:
    sizes = dict(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=LAYERS, n_head=2)
    special = dict(bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **special))


def _opt(transformers: Any, tied: bool) -> nn.Module:
    sizes = dict(vocab_size=VOCABULARY, hidden_size=16, ffn_dim=32, num_hidden_layers=LAYERS)
    more = dict(num_attention_heads=2, max_position_embeddings=32, word_embed_proj_dim=16)
    config = transformers.OPTConfig(**sizes, **more, pad_token_id=0, tie_word_embeddings=tied)
    return transformers.OPTForCausalLM(config)


def _bart(transformers: Any, tied: bool) -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=LAYERS,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
        tie_word_embeddings=tied,
    )
    return transformers.BartForConditionalGeneration(config)


def _t5(transformers: Any, tied: bool) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=LAYERS,
        num_heads=2,
        decoder_start_token_id=0,
        tie_word_embeddings=tied,
    )
    return transformers.T5ForConditionalGeneration(config)


def _bert(name: str) -> Callable[[Any, bool], nn.Module]:
    def make(transformers: Any, tied: bool) -> nn.Module:
        config = transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            max_position_embeddings=32,
            num_labels=5,
            tie_word_embeddings=tied,
        )
        return getattr(transformers, f"BertFor{name}")(config)

    return make


KINDS = {
    "gpt2": Kind(_gpt2, "lm_head", "transformer.h.1.attn.c_attn"),
    "llama": Kind(_decoder("Llama"), "lm_head", "model.layers.1.self_attn.q_proj"),
    "qwen3": Kind(_decoder("Qwen3"), "lm_head", "model.layers.1.self_attn.v_proj"),
    "gemma2": Kind(
        _decoder("Gemma2", final_logit_softcapping=3.0, attn_implementation="eager"),
        "lm_head",
        "model.layers.1.self_attn.o_proj",
        cut=True,
    ),
    "granite": Kind(
        _decoder("Granite", logits_scaling=4.0), "lm_head", "model.layers.0.self_attn.k_proj"
    ),
    "cohere": Kind(_decoder("Cohere", logit_scale=0.5), "lm_head", "model.layers.1.mlp.down_proj"),
    "opt": Kind(_opt, "lm_head", "model.decoder.layers.1.self_attn.q_proj"),
    "bart": Kind(_bart, "lm_head", "model.decoder.layers.1.encoder_attn.k_proj", "seq2seq"),
    "t5": Kind(_t5, "lm_head", "decoder.block.1.layer.0.SelfAttention.q", "seq2seq", scale=1.0),
    "bert tokens": Kind(
        _bert("TokenClassification"),
        "classifier",
        "bert.encoder.layer.1.attention.self.query",
        "tokens",
        tied=False,
    ),
    "bert sequences": Kind(
        _bert("SequenceClassification"),
        "classifier",
        "bert.encoder.layer.1.attention.self.query",
        "sequences",
        tied=False,
    ),
    "bert masked": Kind(
        _bert("MaskedLM"),
        "cls.predictions.decoder",
        "bert.encoder.layer.0.attention.output.dense",
        "masked",
    ),
}


def make(kind: str, tied: bool = False) -> nn.Module:
    """The model in evaluation mode, with weights large enough to have an opinion."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = KINDS[kind].make(transformers, tied).eval()
    if not tied and "lm_head" in dict(model.named_modules()):  # T5 is tied whatever its config
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(KINDS[kind].scale)
    return model


def batch(kind: str, n: int = 6, padding: str = "right", length: int = LENGTH) -> dict[str, Tensor]:
    """A padded batch with labels, -100 where there is none; sample 2 of several has none at all."""
    generator = torch.Generator().manual_seed(n)
    ids = torch.randint(3, VOCABULARY, (n, length), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(n):
        cut = i % 4
        where = slice(length - cut, None) if padding == "right" else slice(0, cut)
        ids[i, where], mask[i, where] = 0, 0
    form = KINDS[kind].batch
    if form == "sequences":
        labels = torch.randint(5, (n,), generator=generator)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if form == "tokens":
        labels = torch.randint(5, ids.shape, generator=generator).masked_fill(mask == 0, -100)
    elif form == "masked":
        labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) > 0.4, -100)
        labels[labels == 0] = -100
        labels[0, 1] = 5
    elif form == "seq2seq":
        labels = torch.randint(3, VOCABULARY, (n, length - 2), generator=generator)
        for i in range(n):
            labels[i, length - 2 - i % 3 :] = -100
    else:
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :2] = -100  # a prompt
        labels[1, 5] = -100
        if padding == "left":  # what padding would have to predict
            labels[torch.arange(n), torch.arange(n) % 4] = -100
    if n > 2:
        labels[2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def samples(data: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """One at a time."""
    n = len(data["labels"])
    return [{key: value[i : i + 1] for key, value in data.items()} for i in range(n)]


def untied(model: nn.Module, head: str) -> nn.Module:
    """The same function in float64, the head's weight its own: what the head alone does to it."""
    model = copy.deepcopy(model).double().eval()
    layer = model.get_submodule(head)
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    return model


def cut(sample: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without its padding."""
    kept = sample["attention_mask"][0] == 1
    return {key: value[:, kept] for key, value in sample.items()}


def gradients(model: nn.Module, kind: str, data: dict[str, Tensor], layer: str) -> Tensor:
    """Of the model's own loss in a layer, one sample at a time: [n, P] float64."""
    truth = untied(model, layer)
    chosen = [p.requires_grad_() for p in truth.get_submodule(layer).parameters()]
    rows = []
    for sample in samples(data):
        empty = bool((sample["labels"] == -100).all())
        loss = truth(**(cut(sample) if KINDS[kind].cut else sample)).loss
        found = torch.autograd.grad(loss, chosen)
        rows.append(torch.cat([(torch.zeros_like(g) if empty else g).flatten() for g in found]))
    return torch.stack(rows)


def head_of(model: nn.Module) -> str:
    """The name of the layer that makes its logits."""
    names = [name for name, _ in model.named_modules()]
    return next(k.head for k in KINDS.values() if k.head in names)
