"""What capturing costs beside the model's own forward: memory of the first batch, passes."""

from __future__ import annotations

import pytest
import torch
from memory import peak
from torch import nn
from torch.nn import functional as F

import imu_fast as imu


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):
        shape = (len(x), x.shape[1], 3, 4, -1)
        q, k, v = self.qkv(self.norm1(x)).view(shape).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.proj(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A vision transformer; ``after(z, other)`` makes the logits."""

    def __init__(self, after=None, d=64, depth=6):
        super().__init__()
        self.blocks = nn.Sequential(*[Block(d) for _ in range(depth)])
        self.head, self.other, self.after = nn.Linear(d, 10), nn.Linear(d, 10), after

    def forward(self, x):
        x = self.blocks(x)
        if self.after is None:
            return self.head(x[:, 0])
        return self.after(self.head(x[:, 0]), self.other(x[:, 1]))


STEPS = {
    "nothing": None,
    "two heads": lambda z, other: (z + other) / 2,
    "temperature in place": lambda z, other: z.div_(0.3),
    "softmax": lambda z, other: z.softmax(1),
}


@pytest.mark.parametrize("step", STEPS)
def test_memory_of_the_first_batch(step):
    model = Transformer(STEPS[step]).eval()
    x, y = torch.randn(16, 50, 64), torch.randint(10, (16,))

    def bare():
        with torch.no_grad():
            model(x)

    assert peak(lambda: imu.capture(model, [(x, y)])) < 1.2 * peak(bare)


def test_a_vocabulary_is_not_copied():
    """The logits are most of a language model's memory, and are the layer's output itself."""

    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.lm_head = nn.Embedding(20_000, 16), nn.Linear(16, 20_000, bias=False)

        def forward(self, ids):
            return self.lm_head(self.emb(ids))

    model, ids = Language(), torch.randint(20_000, (4, 64))

    def bare():
        with torch.no_grad():
            model(ids)

    assert peak(lambda: imu.capture_features(model, [(ids, ids)])) < 2.2 * peak(bare)


@pytest.mark.parametrize(
    ("step", "runs"),
    [("nothing", 5), ("softmax", 6), ("two heads", 7), ("temperature in place", 6)],
)
def test_forward_passes(step, runs):
    """One a batch; another of the first where something follows the head, or two are joined.

    And one of a single sample, which the model's own hooks do not see.
    """
    model, ran = Transformer(STEPS[step], depth=1), []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    x, y, rows = torch.randn(20, 5, 64), torch.randint(10, (20,)), []
    next(model.children()).register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
    imu.capture(model, list(zip(x.split(4), y.split(4), strict=True)))
    assert len(ran) == runs and rows.count(1) == 1
