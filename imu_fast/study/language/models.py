"""Small causal models that are trained here, and kept on disk so that none is trained twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError, check_installed
from imu_fast.storage import load_tensors, save_tensors
from imu_fast.study.cells import Json
from imu_fast.study.language.sequences import Sequences

ARCHITECTURE = "gpt2"
# Of the steps, those in which the learning rate rises.
_WARM_UP = 0.1
_WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Network:
    """A GPT-2 of random weights, and how it is trained.

    The head has a weight of its own (it is not tied to the embedding), so that methods on cached
    features are possible; there is no dropout, so that a run follows from its seed.

    Attributes:
        vocabulary: tokens. length: the longest row. layers, width, heads: its size.
        epochs, lr, batch_size: of AdamW, the rate rising over the first tenth of the steps and then
            falling to zero along a cosine.
    """

    vocabulary: int
    length: int
    layers: int = 2
    width: int = 64
    heads: int = 4
    epochs: int = 10
    lr: float = 3e-3
    batch_size: int = 64

    def made(self, seed: int) -> nn.Module:
        """The model with the weights of a seed, in evaluation mode."""
        check_installed("a language experiment", "transformers", install="'imu_fast[text]'")
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=self.vocabulary,
            n_positions=self.length,
            n_embd=self.width,
            n_layer=self.layers,
            n_head=self.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=False,
            use_cache=False,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = GPT2LMHeadModel(config)
        model.loss_type = "ForCausalLM"  # or transformers warns that it does not know its own
        return model.eval()

    def trained(self, data: Sequences, seed: int) -> nn.Module:
        """The model of a seed, trained on these rows."""
        model = self.made(seed)
        rows = minibatches(len(data), self.batch_size, seed)
        steps = self.epochs * math.ceil(len(data) / self.batch_size)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=_WEIGHT_DECAY)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * _rate(step / steps)
            descend(model, optimizer, data.batch(next(rows)))
        return model

    def settings(self) -> Json:
        return asdict(self)


def _rate(done: float) -> float:
    """The learning rate as a fraction of the largest, when a fraction of the steps is made."""
    if done < _WARM_UP:
        return (done + 1e-2) / (_WARM_UP + 1e-2)
    return 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))


def minibatches(n: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices of one minibatch after another, without end; each epoch in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n, generator=generator).split(size)


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    """One step on the model's own loss."""
    optimizer.zero_grad()
    with torch.enable_grad():
        model(**batch).loss.backward()
    optimizer.step()


def log_probabilities(
    model: nn.Module, batch: dict[str, Tensor], rows: Tensor | None = None
) -> Tensor:
    """Of what follows each position but the last: [b, T - 1, V] float64.

    Args:
        rows: a mask [b, T - 1] of the positions that are wanted, for [N, V]; None: all.
    """
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits = logits[:, :-1] if rows is None else logits[:, :-1][rows]
    found: Tensor = logits.double().log_softmax(dim=-1)
    return found


def stored(path: Path, key: str, network: Network, make: Callable[[], nn.Module]) -> nn.Module:
    """The model that a file holds, or what ``make`` returns, which then is there.

    Args:
        key: of all that the weights depend on.

    Raises:
        InputError: the file is damaged, or another model's.
    """
    if path.is_file():
        state, metadata = load_tensors(path)
        model = network.made(0)
        shapes: list[dict[str, Any]] = [
            {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            for tensors in (model.state_dict(), state)
        ]
        if metadata.get("key") != key or shapes[0] != shapes[1]:
            raise InputError(f"path={str(path)!r} is the entry of another model; delete it")
        model.load_state_dict(state)
        return model.eval()
    model = make()
    save_tensors(path, model.state_dict(), {"key": key})
    return model
