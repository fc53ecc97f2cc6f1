"""Inner products of per-sample gradients of a language model, by public libraries:
``python bench/language_peers.py [--width 128 256 512] [--length 64] [--layers four inner all]``.

The same layers of the same small random Llama; 64 training sequences against 16 queries (GradDot:
minus the influence under the identity), each sample's loss the mean over its tokens. bergson
(collectors in memory, whose gradients are multiplied), dattri_llm (TracInAttributor, live) and ours
(``capture`` and ``pairwise_influence``), each in a process of its own; and the gradients
themselves [n, P], of all training sequences, or of as many as fit into 2 GB.

The processes take turns, one call at a time. Seconds are the CPU's, the least of the repeats after
a first call; "of ours" is the median over the turns of the ratio to our call of the same turn; MB
the rise of the peak resident memory in the first call over what it was with model and data at
hand; "differ" the relative difference of some samples' rows from one backward pass per sample in
float64. What is not installed is skipped, and said.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LAYERS, VOCABULARY, TRAIN, QUERIES, BATCH = 4, 2_000, 64, 16, 16
# Bytes of gradients that are held at once, and samples whose rows are compared with autograd's.
HELD, COMPARED = 2 << 30, 8
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
Parts = tuple[Tensor, Tensor]
"""Token ids of the training sequences [n, T] and of the queries [m, T]."""


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


def ours(model: nn.Module, parts: Parts, layers: list[str]) -> dict[str, Work]:
    import imu_fast as imu
    from imu_fast.curvature.gradients import gradients

    def captured(some: Tensor) -> list[imu.GradientFactors]:
        batches = [{"input_ids": x, "labels": x} for x in some.split(BATCH)]
        return imu.capture(model, batches, layers=layers, shift=True)

    def products() -> Tensor:
        train, queries = map(captured, parts)
        return -imu.pairwise_influence(train, queries, curvature="identity")

    def rows() -> Tensor:
        train = captured(parts[0])
        sizes = [layer.num_classes * layer.width for layer in train]
        out = torch.empty(len(parts[0]), sum(sizes))
        for layer, own in zip(train, out.split(sizes, dim=1), strict=True):
            gradients(layer, out=own.unflatten(1, (layer.num_classes, layer.width)))
        return out

    return {"products": products, "gradients": rows}


def bergson(model: nn.Module, parts: Parts, layers: list[str]) -> dict[str, Work]:
    from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector
    from datasets import Dataset
    from datasets.table import InMemoryTable

    folder = tempfile.mkdtemp()
    config = IndexConfig(run_path=folder, loss_reduction="mean")
    Path(config.partial_run_path).mkdir(parents=True, exist_ok=True)

    def collected(some: Tensor) -> Tensor:
        columns = {"input_ids": some.tolist(), "length": [some.shape[1]] * len(some)}
        data = Dataset(InMemoryTable.from_pydict(columns), fingerprint="language_peers")
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
        "products": lambda: collected(parts[0]) @ collected(parts[1]).T,
        "gradients": lambda: collected(parts[0]),
    }


def dattri_llm(model: nn.Module, parts: Parts, layers: list[str]) -> dict[str, Work]:
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

    return {"products": products, "gradients": rows}


TOOLS = {"imu_fast": ours, "bergson": bergson, "dattri_llm": dattri_llm}


def truth(model: nn.Module, ids: Tensor, layers: list[str]) -> Tensor:
    """Gradients of every sample, one backward pass each, in float64: [n, P]."""
    weights = [model.get_submodule(name).weight for name in layers]
    rows = []
    for x in ids:
        loss = model(input_ids=x[None], labels=x[None]).loss
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    return torch.stack(rows)


def difference(found: Tensor, model: nn.Module, parts: Parts, layers: list[str]) -> float:
    """Relative, of some samples' rows of products [n, m] or gradients [n, P] from the truth."""
    train, queries = parts
    rows = torch.arange(0, len(train), max(1, len(train) // COMPARED))
    model = model.double()
    exact = truth(model, train[rows], layers)
    if found.shape[1] == len(queries):
        exact = torch.stack([exact @ truth(model, q[None], layers)[0] for q in queries], dim=1)
    off, size = 0.0, 0.0
    for i, row in zip(rows, exact, strict=True):
        off += float((found[i] - row).square().sum())
        size += float(row.square().sum())
    return (off / size) ** 0.5


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(tool: str, what: str, kind: str, width: int, length: int) -> None:
    """In a process of its own: for each line of standard input a line with what was measured."""
    logging.disable(logging.WARNING)
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints
    model, layers = llama(width), CHOSEN[kind]
    size = 4 * sum(model.get_submodule(name).weight.numel() for name in layers)
    n = TRAIN if what == "products" else min(TRAIN, max(1, HELD // size // BATCH) * BATCH)
    ids = torch.randint(VOCABULARY, (n + QUERIES, length))
    with torch.no_grad():
        model(ids[:1])
    parts = ids[:n], ids[n:]
    work = TOOLS[tool](model, parts, layers)[what]
    before = peak()
    for order in map(str.strip, sys.stdin):
        said: dict[str, float] = {}
        if order == "compare":
            said["differ"] = difference(work(), model, parts, layers)
        else:
            start = time.process_time()
            work()
            said["seconds"] = time.process_time() - start
            said["memory"], said["samples"] = peak() - before, n
        print(json.dumps(said), file=answers, flush=True)


class Worker:
    """A tool's process."""

    def __init__(self, tool: str, what: str, kind: str, width: int, length: int) -> None:
        self.tool, self.seconds, self.first = tool, list[float](), dict[str, float]()
        command = [sys.executable, __file__, "--serve", tool, what, kind]
        command += ["--width", str(width), "--length", str(length)]
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def ask(self, order: str) -> dict[str, float]:
        """One call; raises RuntimeError with the last line that a failed process has said."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(order, file=self._process.stdin, flush=True)
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._log.seek(0)
        last = "".join(self._log.read().strip().splitlines()[-1:])
        if (code := self._process.wait()) < 0:  # it had no time for a last line of its own
            last = f"killed by {signal.Signals(-code).name}, as where memory runs out"
        raise RuntimeError(last)

    def close(self) -> None:
        self._process.communicate()


Row = dict[str, Any]


def compared(
    tools: list[str], what: str, kind: str, width: int, length: int, repeats: int
) -> list[Row]:
    """A row for each tool, ours first."""
    workers, failed = [Worker(tool, what, kind, width, length) for tool in tools], []
    try:
        for turn in range(repeats + 1):
            for worker in list(workers):
                try:
                    said = worker.ask("run")
                except RuntimeError as error:
                    failed.append({"tool": worker.tool, "failed": str(error)[:200]})
                    workers.remove(worker)
                    continue
                if turn:
                    worker.seconds.append(said["seconds"])
                else:
                    worker.first = said
        rows = []
        for worker in workers:
            ratios = [s / ours for s, ours in zip(worker.seconds, workers[0].seconds, strict=True)]
            rows.append(
                {
                    "tool": worker.tool,
                    "milliseconds": round(1e3 * min(worker.seconds), 2),
                    "of_ours": round(statistics.median(ratios), 3),
                    "first_milliseconds": round(1e3 * worker.first["seconds"], 1),
                    "megabytes": round(worker.first["memory"], 1),
                    "samples": int(worker.first["samples"]),
                    "differ": float(f"{worker.ask('compare')['differ']:.1e}"),
                }
            )
    finally:
        for worker in workers:
            worker.close()
    settings = {"width": width, "length": length, "layers": kind, "quantity": what}
    return [{**settings, **row} for row in rows + failed]


def line(row: Row) -> str:
    begin = f"{row['width']:5} {row['layers']:10} {row['quantity']:10} {row['tool']:11}"
    if "failed" in row:
        return f"{begin} failed: {row['failed']}"
    return (
        f"{begin} {row['milliseconds']:9.1f} {row['of_ours']:8.2f} "
        f"{row['first_milliseconds']:9.1f} {row['megabytes']:8.1f} {row['differ']:8.0e}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, nargs="+", default=[256])
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", nargs="+", choices=CHOSEN, default=list(CHOSEN))
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--out", type=Path, help="a file for the rows, as JSON")
    parser.add_argument("--serve", nargs=3, metavar=("TOOL", "WHAT", "LAYERS"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.serve:
        serve(*options.serve, options.width[0], options.length)
        return 0
    there = {tool: importlib.util.find_spec(tool) is not None for tool in TOOLS}
    for tool in (t for t, is_there in there.items() if not is_there):
        print(f"{tool} is not installed: skipped")
    tools = [tool for tool, is_there in there.items() if is_there]
    print(f"length {options.length}, float32, CPU, 1 thread, torch {torch.__version__}")
    print(
        f"{'width':5} {'layers':10} {'quantity':10} {'':11} {'ms':>9} {'of ours':>8} "
        f"{'first ms':>9} {'MB':>8} {'differ':>8}"
    )
    versions = {t: importlib.metadata.version(t) for t in tools if t != "imu_fast"}
    rows: list[Row] = []
    for width, kind, what in itertools.product(options.width, options.layers, options.what):
        found = compared(tools, what, kind, width, options.length, options.repeats)
        rows += found
        print("\n".join(map(line, found)), flush=True)
        if options.out:
            said = {"torch": torch.__version__, **versions, "rows": rows}
            options.out.write_text(json.dumps(said, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
