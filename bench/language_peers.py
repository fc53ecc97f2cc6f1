"""Inner products of per-sample gradients of a language model, by public libraries:
``python bench/language_peers.py [--width 256] [--length 64] [--layers four inner all]``.

The same layers of the same small random Llama; 48 training sequences against 16 queries (GradDot:
minus the influence under the identity), each sample's loss the mean over its tokens. bergson
(collectors in memory, whose gradients are multiplied), dattri_llm (TracInAttributor, live) and ours
(``capture`` and ``pairwise_influence``), each in a process of its own: time is the CPU's, the
fastest of the repeats after a first run, memory the rise of the peak resident memory over what it
was with model and data at hand, "differ" relative to one backward pass per sample in float64. Then
the gradients themselves [48, P]. What is not installed is skipped, and said.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

LAYERS, VOCABULARY, TRAIN, QUERIES, BATCH = 4, 1_000, 48, 16, 16
ATTENTION = [f"self_attn.{k}_proj" for k in "qkvo"]
MLP = [f"mlp.{k}_proj" for k in ("gate", "up", "down")]
CHOSEN = {
    "head": ["lm_head"],
    "four": [f"model.layers.3.{name}" for name in ATTENTION],
    "attention": [f"model.layers.{i}.{name}" for i in (1, 2, 3) for name in ATTENTION],
    "inner": [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in (*ATTENTION, *MLP)],
}
CHOSEN["all"] = [*CHOSEN["inner"], "lm_head"]
WHAT = ("products", "gradients")
Work = Callable[[], Tensor]


def llama(width: int) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


def ours(model: nn.Module, ids: Tensor, layers: list[str]) -> dict[str, Work]:
    import imu_fast as imu
    from imu_fast.curvature.gradients import gradients

    def captured(some: Tensor) -> list[imu.GradientFactors]:
        batches = [{"input_ids": x, "labels": x} for x in some.split(BATCH)]
        return imu.capture(model, batches, layers=layers, shift=True)

    def products() -> Tensor:
        train, queries = captured(ids[:TRAIN]), captured(ids[TRAIN:])
        return -imu.pairwise_influence(train, queries, curvature="identity")

    def rows() -> Tensor:
        return torch.cat([gradients(layer).flatten(1) for layer in captured(ids[:TRAIN])], dim=1)

    return {"products": products, "gradients": rows}


def bergson(model: nn.Module, ids: Tensor, layers: list[str]) -> dict[str, Work]:
    from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector
    from datasets import Dataset

    folder = tempfile.mkdtemp()
    config = IndexConfig(run_path=folder, loss_reduction="mean")
    Path(config.partial_run_path).mkdir(parents=True, exist_ok=True)

    def collected(some: Tensor) -> Tensor:
        data = Dataset.from_dict(
            {"input_ids": some.tolist(), "length": [some.shape[1]] * len(some)}
        )
        collector = InMemoryCollector(
            model=model,
            cfg=config,
            data=data,
            processor=GradientProcessor(),
            target_modules=set(layers),
        )
        batches = [list(range(i, i + BATCH)) for i in range(0, len(some), BATCH)]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            CollectorComputer(
                model, data, collector=collector, batches=batches, cfg=config
            ).run_with_collector_hooks("")
        return torch.cat([collector.gradients[name] for name in layers], dim=1)

    return {
        "products": lambda: collected(ids[:TRAIN]) @ collected(ids[TRAIN:]).T,
        "gradients": lambda: collected(ids[:TRAIN]),
    }


def dattri_llm(model: nn.Module, ids: Tensor, layers: list[str]) -> dict[str, Work]:
    from dattri_llm import (
        AttributionArguments,
        AttributionTask,
        CaptureCallback,
        HookManager,
        HookManagerConfig,
        TracInAttributor,
    )

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        # A sum over samples, whose means a batch's own loss averages.
        return model(**batch).loss * len(batch["input_ids"])

    config = HookManagerConfig(hook_types=dict.fromkeys(layers, "linear_io"))
    arguments = AttributionArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        use_cpu=True,
    )

    def products() -> Tensor:
        task = AttributionTask(loss_func=loss, model=model)
        train, queries = ([{"input_ids": x, "labels": x} for x in part] for part in parts)
        score = TracInAttributor(arguments, task=task).attribute(train, queries, hook_config=config)
        return score.agnostic_matrix()[1]

    def rows() -> Tensor:
        seen, found = CaptureCallback(), []
        manager = HookManager(model, config=config, callbacks=[seen])
        with manager.collect(deregister_on_exit=True):
            for x in parts[0].split(BATCH):
                loss(model, {"input_ids": x, "labels": x}).backward()
                data = seen.record.gradient.materialize().data
                found.append(torch.cat([data[name].flatten(1) for name in layers], dim=1))
        model.zero_grad()
        return torch.cat(found)

    parts = ids[:TRAIN], ids[TRAIN:]
    return {"products": products, "gradients": rows}


TOOLS = {"imu_fast": ours, "bergson": bergson, "dattri_llm": dattri_llm}


def truth(model: nn.Module, ids: Tensor, layers: list[str]) -> Tensor:
    """Gradients of every sample, one backward pass each, in float64: [n, P]."""
    model = model.double()
    weights = [model.get_submodule(name).weight for name in layers]
    rows = []
    for x in ids:
        loss = model(input_ids=x[None], labels=x[None]).loss
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    return torch.stack(rows)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(tool: str, what: str, kind: str, width: int, length: int, repeats: int, path: str) -> None:
    """In a process of its own: prints seconds and MB, and leaves the result in a file."""
    logging.disable(logging.WARNING)
    model = llama(width)
    ids = torch.randint(VOCABULARY, (TRAIN + QUERIES, length))
    with torch.no_grad():
        model(ids[:1])
    work = TOOLS[tool](model, ids, CHOSEN[kind])[what]
    before, seconds = peak(), float("inf")
    found = work()
    memory = peak() - before
    for _ in range(repeats):
        start = time.process_time()
        found = work()
        seconds = min(seconds, time.process_time() - start)
    exact = truth(model, ids, CHOSEN[kind])
    exact = exact[:TRAIN] @ exact[TRAIN:].T if what == "products" else exact[:TRAIN]
    differ = float((found.double() - exact).norm() / exact.norm())
    Path(path).write_text(json.dumps({"seconds": seconds, "memory": memory, "differ": differ}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", nargs="+", choices=CHOSEN, default=list(CHOSEN))
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--one", nargs=4, metavar=("TOOL", "WHAT", "LAYERS", "FILE"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = options.width, options.length, options.repeats
    if options.one:
        tool, what, kind, path = options.one
        one(tool, what, kind, *sizes, path)
        return 0
    there = {tool: importlib.util.find_spec(tool) is not None for tool in TOOLS}
    for tool in (t for t, is_there in there.items() if not is_there):
        print(f"{tool} is not installed: skipped")
    print(f"width {sizes[0]}, length {sizes[1]}, float32, CPU, 1 thread, torch {torch.__version__}")
    print(f"{'layers':10} {'quantity':10} {'':11} {'ms':>8} {'of ours':>8} {'MB':>7} {'differ':>8}")
    for kind in options.layers:
        for what in options.what:
            least = 0.0
            for tool in (t for t, is_there in there.items() if is_there):
                with tempfile.TemporaryDirectory() as folder:
                    path = str(Path(folder) / "found.json")
                    command = [sys.executable, __file__, "--one", tool, what, kind, path]
                    command += ["--width", str(sizes[0]), "--length", str(sizes[1])]
                    command += ["--repeats", str(sizes[2])]
                    ran = subprocess.run(command, capture_output=True, text=True, check=False)
                    if ran.returncode:
                        last = ran.stderr.strip().splitlines()[-1:]
                        print(f"{kind:10} {what:10} {tool:11} failed: {''.join(last)[:90]}")
                        continue
                    found = json.loads(Path(path).read_text())
                least = least or found["seconds"]
                print(
                    f"{kind:10} {what:10} {tool:11} {1e3 * found['seconds']:8.1f} "
                    f"{found['seconds'] / least:8.2f} {found['memory']:7.1f} "
                    f"{found['differ']:8.0e}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
