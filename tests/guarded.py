"""Models that a call may leave changed, and what is compared of them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrizations

import imu_fast as imu


class Adapter(nn.Linear):
    """A low-rank adapter that merges at eval() and takes itself apart at train(), as LoRA's."""

    def __init__(self, d, c):
        super().__init__(d, c)
        self.a, self.b = nn.Parameter(torch.randn(c, 2)), nn.Parameter(torch.randn(2, d))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            with torch.no_grad():
                self.weight.add_(self.a @ self.b, alpha=-1 if self.merged else 1)
            self.merged = not self.merged
        return self

    def forward(self, x):
        low_rank = 0 if self.merged else x @ (self.a @ self.b).T
        return super().forward(x) + low_rank


class Replacing(Adapter):
    """Merges into a new Parameter."""

    def train(self, mode=True):
        nn.Linear.train(self, mode)
        if mode == self.merged:
            sign = -1 if self.merged else 1
            self.weight = nn.Parameter(self.weight.detach() + sign * (self.a @ self.b).detach())
            self.merged = not self.merged
        return self


class Around(nn.Module):
    """Merges into a module that it holds, which knows nothing of it."""

    def __init__(self, d, c):
        super().__init__()
        self.base, self.a = nn.Linear(d, c), nn.Parameter(torch.randn(c, d))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            with torch.no_grad():
                self.base.weight.data += (-1 if self.merged else 1) * self.a
            self.merged = not self.merged
        return self

    def forward(self, x):
        return self.base(x) + (0 if self.merged else x @ self.a.T)


class FrozenNorm(nn.Sequential):
    """A backbone whose BatchNorm stays in evaluation mode, as detectors have it."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self


class Counter(nn.Module):
    """A buffer that counts calls, one that is replaced, and a tensor that is none of the two."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(1))
        self.register_buffer("later", None)
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.plain = torch.zeros(())
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x):
        self.calls += 1
        self.plain += 1
        self.last = x.detach().clone()
        self.later = x.detach()
        self.kept = x * 1
        torch.rand(1, generator=self.generator)
        return x


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x)))


class Shortened(nn.Module):
    """An embedding whose rows a forward pass shortens, in evaluation mode others."""

    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(4, width, max_norm=0.5)

    def forward(self, x):
        return self.embedding((x > 0).long() + 2 * (not self.training)).mean(dim=1)


MODELS = {
    "plain": lambda: nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
    ),
    "merging": lambda: nn.Sequential(Adapter(6, 8), nn.ReLU(), nn.Linear(8, 3)),
    "merging, replaced": lambda: nn.Sequential(Replacing(6, 8), nn.ReLU(), nn.Linear(8, 3)),
    "merging, around": lambda: nn.Sequential(Around(6, 8), nn.ReLU(), nn.Linear(8, 3)),
    "merging in merging": lambda: nn.Sequential(
        FrozenNorm(Adapter(6, 8), nn.BatchNorm1d(8)), nn.Linear(8, 3)
    ),
    "frozen norm": lambda: FrozenNorm(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)),
    "spectral norm": lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)
    ),
    "old spectral norm": lambda: nn.Sequential(
        nn.utils.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)
    ),
    "old weight norm": lambda: nn.Sequential(
        nn.utils.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)
    ),
    "buffers": lambda: nn.Sequential(nn.Linear(6, 8), Counter(), nn.ReLU(), nn.Linear(8, 3)),
    "shortened": lambda: nn.Sequential(Shortened(8), nn.ReLU(), nn.Linear(8, 3)),
    "tied": Tied,
}


def data(n=12):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 6, generator=generator), torch.arange(n) % 3


def state(model):
    """All that may be seen of a model."""
    found = {"modes": [m.training for m in model.modules()]}
    for name, p in model.named_parameters(remove_duplicate=False):
        found[name] = (id(p), p.requires_grad, id(p.grad), p.detach().clone())
    for name, b in model.named_buffers(remove_duplicate=False):
        found[name] = (id(b), b.detach().to_dense().clone())
    found["hooks"] = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for m in model.modules()
    ]
    for i, m in enumerate(model.modules()):
        for name, value in vars(m).items():
            if isinstance(value, torch.Tensor) and name != "kept":
                found[f"{i}.{name}"] = value.detach().clone()
            if isinstance(value, bool):
                found[f"{i}.{name}"] = value
            if isinstance(value, torch.Generator):
                found[f"{i}.{name}"] = value.get_state()
        found[f"{i} names"] = [*m._parameters, *m._buffers]
    return found


def same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        pairs = zip(value, second[name], strict=True) if isinstance(value, tuple) else None
        for a, b in pairs or [(value, second[name])]:
            if isinstance(a, torch.Tensor):
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), name
            else:
                assert a == b, name


def in_mixed_modes(name):
    model = MODELS[name]().train()
    first, *rest = (m for m in model.children() if not isinstance(m, nn.ReLU))
    rest[-1].eval()  # by hand, a child of a model in training mode
    for parameter in first.parameters():
        parameter.requires_grad_(False)
        break
    x, y = data()
    nn.functional.cross_entropy(model(x), y).backward()
    for module in model.modules():
        vars(module).pop("kept", None)
    return model


def looked_at(model, x, y):
    imu.influence_scores(model, (x, y))
    linear = [k for k, m in model.named_modules() if type(m) is nn.Linear][-1]
    imu.capture(model, (x, y), layers=[linear])
    imu.evaluate(model, (x, y))
    imu.unlearn(model, (x, y), epochs=1, on_empty="uniform", inplace=False)
