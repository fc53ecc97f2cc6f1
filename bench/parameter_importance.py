"""Mean squared gradients of all parameters: imu.parameter_importance against vmap(grad).

    python bench/parameter_importance.py [--threads 2] [--batch 32]

Both take the same batch in the same run: the best of three times for the door (the first batch of a
call, which is also verified, and one of several in a row), two for vmap in chunks of as many
samples as fit in 1 GB. The rise is of the process's peak memory, each side in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import imu_fast as imu

CLASSES = 10


def resnet(size: int) -> tuple[nn.Module, tuple[int, ...]]:
    import torchvision

    return torchvision.models.resnet18(num_classes=CLASSES), (3, size, size)


def vit() -> tuple[nn.Module, tuple[int, ...]]:
    import torchvision

    model = torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=4,
        num_layers=6,
        num_heads=4,
        hidden_dim=192,
        mlp_dim=768,
        num_classes=CLASSES,
    )
    nn.init.normal_(model.heads.head.weight, std=0.05)  # zero as made
    return model, (3, 32, 32)


def gpt2() -> tuple[nn.Module, tuple[int, ...]]:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=5000,
        n_embd=256,
        n_layer=6,
        n_head=4,
        n_positions=64,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config), (64,)


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "ResNet-18, 32x32": lambda: resnet(32),
    "ResNet-18, 64x64": lambda: resnet(64),
    "ViT, 6 x 192, 65 tokens": vit,
    "GPT-2, 6 x 256, vocabulary 5000, 64 tokens": gpt2,
}


def problem(
    name: str, batch: int, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model, shape = MODELS[name]()
    if len(shape) == 1:
        x = torch.randint(5000, (batch, *shape))
        return model.eval().to(dtype), x, x
    return (
        model.eval().to(dtype),
        torch.randn(batch, *shape, dtype=dtype),
        torch.randint(CLASSES, (batch,)),
    )


def by_vmap(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What people write today: every sample's gradient, squared, in chunks that fit in 1 GB."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    size = sum(p.numel() * p.element_size() for p in parameters.values())

    def loss(given: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        if y.dim() == 1:
            out = torch.func.functional_call(model, (given, buffers), (one[None],))
            return cross_entropy(out, label[None])
        out = torch.func.functional_call(
            model, (given, buffers), (one[None],), {"use_cache": False}
        ).logits
        return cross_entropy(out[0, :-1], label[1:])

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    out = {name: torch.zeros_like(p) for name, p in parameters.items()}
    step = max(1, (1 << 30) // size)
    for start in range(0, len(y), step):
        found = per_sample(parameters, x[start : start + step], y[start : start + step])
        for name, gradient in found.items():
            out[name] += gradient.square_().sum(dim=0)
    return {name: total / len(y) for name, total in out.items()}


def by_imu(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return imu.parameter_importance(model, batches, shift=batches[0][1].dim() > 1)


def seconds(function: Callable[[], object], times: int) -> float:
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def error(name: str, batch: int) -> float:
    """The largest relative error of a parameter, by norm, against vmap(grad) in float64."""
    found = by_imu(*_pair(problem(name, batch)))
    model, x, y = problem(name, batch, torch.float32)
    x = x.double() if x.is_floating_point() else x
    expected = by_vmap(model.double(), x, y)
    errors = [(found[k].double() - v).norm() / v.norm() for k, v in expected.items() if v.any()]
    return float(max(errors))


def _pair(made: tuple[nn.Module, Tensor, Tensor]) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    model, x, y = made
    return model, [(x, y)]


def _rise(name: str, batch: int, threads: int, side: str, pipe: object) -> None:
    torch.set_num_threads(threads)
    model, x, y = problem(name, batch)
    with torch.no_grad():
        model(x[:1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    by_vmap(model, x, y) if side == "vmap" else by_imu(model, [(x, y)])
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)  # type: ignore[attr-defined]


def rise(name: str, batch: int, threads: int, side: str) -> float:
    """MB by which the peak rises in a new process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_rise, args=(name, batch, threads, side, there))
    process.start()
    value = here.recv()
    process.join()
    return float(value) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.models:
        print(json.dumps(measured(name, given.batch, given.threads)), flush=True)


def measured(name: str, batch: int, threads: int) -> dict[str, object]:
    model, x, y = problem(name, batch)
    first = seconds(lambda: by_imu(model, [(x, y)]), 3)
    later = (seconds(lambda: by_imu(model, [(x, y)] * 4), 2) - first) / 3
    vmap = seconds(lambda: by_vmap(model, x, y), 2)
    size = sum(p.numel() for p in model.parameters())
    return {
        "model": name,
        "parameters": size,
        "vmap_s": round(vmap, 2),
        "first_batch_s": round(first, 2),
        "later_batch_s": round(later, 2),
        "ratio_first": round(vmap / first, 1),
        "ratio_later": round(vmap / later, 1),
        "largest_relative_error": float(f"{error(name, batch):.1e}"),
        "rise_mb": round(rise(name, batch, threads, "imu")),
        "vmap_rise_mb": round(rise(name, batch, threads, "vmap")),
        "batch_by_parameters_mb": round(batch * size * 4 / 1e6),
    }


if __name__ == "__main__":
    main()
