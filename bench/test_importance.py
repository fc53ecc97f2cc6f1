"""Mean squared gradients of all parameters, batches of 32, two threads: ours, and vmap(grad).

``vmap(grad)`` is what a careful user of torch.func writes: one call for a batch, its squares summed
over the samples; with plain attention instead of vmap's fallback for the fused kernel it takes as
long. ``backward`` is a plain forward and backward pass of the batch's mean loss, the FLOPs that any
way needs: forward, gradients of activations, products of weights. So vmap(grad) / backward bounds
the speed-up of any exact way, before a single square is taken; it is printed beside the speed-up.
Peaks are of resident memory above what there was before, in MB; ``matrix`` is the [32, P] that ours
never holds.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import imu_fast as imu

pytestmark = pytest.mark.usefixtures("two_threads")

BATCH, BATCHES, CLASSES = 32, 8, 10  # of eight batches one is tested for how samples lie
ROLES = ("imu_fast", "vmap(grad)", "backward")


def resnet18(size):
    models = pytest.importorskip("torchvision").models
    x = torch.randn(BATCH * BATCHES, 3, size, size)
    return models.resnet18(num_classes=CLASSES), x, torch.randint(CLASSES, (len(x),))


def vit(name, size):
    timm = pytest.importorskip("timm")
    x = torch.randn(BATCH * BATCHES, 3, size, size)
    model = timm.create_model(name, num_classes=CLASSES, img_size=size)
    return model, x, torch.randint(CLASSES, (len(x),))


def gpt2(layers, width, vocabulary, length):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=width // 64,
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
        use_cache=False,
    )
    x = torch.randint(vocabulary, (BATCH * BATCHES, length))
    return transformers.GPT2LMHeadModel(config), x, x.roll(-1, 1)


PROBLEMS = {
    "ResNet-18 64x64": lambda: resnet18(64),
    "ViT-Ti/16 64x64": lambda: vit("vit_tiny_patch16_224", 64),
    "ViT-S/16 64x64": lambda: vit("vit_small_patch16_224", 64),
    "GPT-2 4x256 V=20,000 T=16": lambda: gpt2(4, 256, 20_000, 16),
    "GPT-2 small T=8": lambda: gpt2(12, 768, 50_257, 8),
}
# The matrix alone takes 16 GB: the baseline goes in chunks of samples.
CHUNKS = {"GPT-2 small T=8": 4}
SECONDS: dict[str, dict[str, float]] = {}  # of a batch, by problem and role


def vmap_grad(model, x, y, chunk=None):
    """``torch.func.vmap(grad)``, squared and averaged: one batch, in chunks where given."""
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters, x, y):
        out = functional_call(model, (parameters, buffers), (x[None],))
        return F.cross_entropy(getattr(out, "logits", out).flatten(0, -2), y.reshape(-1))

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))
    total = None
    for rows, labels in zip(x.split(chunk or len(x)), y.split(chunk or len(y)), strict=True):
        squares = {
            k: g.square().sum(dim=0) for k, g in per_sample(parameters, rows, labels).items()
        }
        total = squares if total is None else {k: total[k] + g for k, g in squares.items()}
    return {k: g / len(x) for k, g in total.items()}


def ours(model, x, y):
    more = {"shift": False} if y.dim() > 1 else {}
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    return imu.parameter_importance(model, batches, **more)


def backward(model, x, y):
    out = model(x)
    F.cross_entropy(getattr(out, "logits", out).flatten(0, -2), y.flatten()).backward()
    model.zero_grad()


def peak_of(function):
    """Bytes of resident memory that a call takes at most, beyond what was there."""

    def resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what calls before left to the allocator would be used
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


@pytest.fixture(scope="module", params=PROBLEMS)
def problem(request):
    torch.manual_seed(0)
    model, x, y = PROBLEMS[request.param]()
    model.eval()
    first, want = x[:BATCH], vmap_grad(model, x[:BATCH], y[:BATCH], CHUNKS.get(request.param))
    found = ours(model, first, y[:BATCH])  # no timing on a red gate
    for name, value in want.items():
        error = float((found[name] - value).norm() / value.norm().clamp_min(1e-20))
        assert error < 1e-5, f"{name}: relative error {error:.1g}"
    return request.param, model, x, y


@pytest.mark.parametrize("role", ROLES)
def test_importance(benchmark, problem, role):
    name, model, x, y = problem
    first = x[:BATCH], y[:BATCH]
    call = {
        "imu_fast": lambda: ours(model, x, y),
        "vmap(grad)": lambda: vmap_grad(model, *first, CHUNKS.get(name)),
        "backward": lambda: backward(model, *first),
    }[role]
    parameters = sum(p.numel() for p in model.parameters())
    benchmark.group = f"importance of all parameters, {name}, batches of {BATCH}, two threads"
    benchmark.extra_info.update(
        role=role,
        samples=len(x) if role == "imu_fast" else BATCH,
        threads=2,
        dtype="float32",
        shapes=f"{name}: P={parameters:,}",
        peak_bytes=peak_of(call),
        matrix_bytes=4 * BATCH * parameters,
    )
    benchmark.pedantic(call, rounds=3, iterations=1, warmup_rounds=0)
    if benchmark.enabled:
        peak, matrix = (benchmark.extra_info[k] >> 20 for k in ("peak_bytes", "matrix_bytes"))
        print(f"\n{name}, {role}: peak {peak:,} MB; the matrix {matrix:,} MB")
        seconds = SECONDS.setdefault(name, {})
        seconds[role] = benchmark.stats.stats.min / (BATCHES if role == "imu_fast" else 1)
        if len(seconds) == len(ROLES):
            mine, theirs, floor = (seconds[role] for role in ROLES)
            print(
                f"{name}: {1e3 * mine:.0f} ms a batch, {theirs / mine:.1f} times as fast as "
                f"vmap(grad); no exact way is more than {theirs / floor:.1f} times, the time of a "
                f"forward and backward pass, and this one takes {mine / floor:.2f} times as long"
            )
