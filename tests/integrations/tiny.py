"""Models and data of the authors' shapes, small, and made without a random number."""

from __future__ import annotations

import torch
from torch import nn


def wave(*shape: int, phase: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """Float32 numbers that look random and are the same on every machine.

    They are float64 until the end: a power and a sine in float32 depend on the instructions of the
    processor, by up to 1e-4 where the sine's argument is large.
    """
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (scale * torch.sin(1.7 * count**1.1 + phase)).view(shape).float()


def filled(model: nn.Module, scale: float = 0.4) -> nn.Module:
    """The model with :func:`wave` in its parameters, in evaluation mode."""
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.copy_(wave(*p.shape, phase=k, scale=scale))
    return model.eval()


class Images(nn.Module):
    """``fc`` behind a convolution and a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


class Persons(nn.Module):
    """Features in evaluation mode, logits in training mode, as torchreid's models."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.classifier = nn.Conv2d(2, 5, 3), nn.Linear(5, 3)

    def forward(self, x):
        v = torch.relu(self.conv(x)).mean((2, 3))
        return self.classifier(v) if self.training else v


class Chains(nn.Module):
    """States in, logits of the next state out; causal by a running mean."""

    def __init__(self, states: int = 5, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(states, width)
        self.mix, self.output_layer = nn.Linear(width, width), nn.Linear(width, states)

    def forward(self, ids):
        h = self.embedding(ids)
        h = h.cumsum(1) / torch.arange(1, h.shape[1] + 1, device=h.device)[:, None]
        return self.output_layer(torch.tanh(self.mix(h)))


def images(n: int = 7):
    """``(image, label)`` items."""
    return [(wave(2, 5, 5, phase=i), i * i % 3) for i in range(n)]


def persons(n: int = 7):
    """Items with ``img`` and ``pid``."""
    return [{"img": x, "pid": y} for x, y in images(n)]


def chains(n: int = 7, states: int = 5, length: int = 6):
    """Items with ``input_ids`` and shifted ``labels``, -100 behind the end of a chain."""
    found = []
    for i in range(n):
        chain = torch.tensor([(3 * t * t + 2 * i * t + i) % states for t in range(length + 1)])
        ids, labels = chain[:-1].clone(), chain[1:].clone()
        ids[length - i % 4 :], labels[length - i % 4 :] = 0, -100
        found.append({"input_ids": ids, "labels": labels, "label": 0})
    return found


def llama(layers: int = 22, scale: float = 0.5, **options):
    """A causal language model with so many layers; vocabulary 11, width 8."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        **options,
    )
    return filled(LlamaForCausalLM(config), scale)


def tokens(n: int = 5, length: int = 7):
    """Ids [n, length], mask and labels: padded on the right, the first three not to be learned."""
    ids = (torch.arange(n * length).view(n, length) ** 2 * 3 + 1) % 10 + 1
    mask = torch.arange(length) < (length - torch.arange(n) % 3)[:, None]
    ids = ids * mask
    labels = ids.masked_fill(~mask, -100)
    labels[:, :3] = -100
    return ids, mask, labels
