"""An index of gradients beside computing them anew: ``python bench/index.py [samples]``.

A small Llama of random weights (4 layers, width 128), all 28 linear layers of its blocks, sequences
of 64 tokens, and 8 queries that come later. For each form of the index: seconds to build, bytes of
a sample, and seconds of the queries, their gradients and their scores on all samples, by their
number: they come together, the first time with every file's checksum; under the identity and, of
projections, under their damped Fisher (whose matrix is made before). Beside them, what the same
queries take without an index: all samples captured again. Projections' scores are compared
with the exact ones by the mean over queries of Pearson's correlation.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from torch import Tensor, nn

import imu_fast as imu

WIDTH, BLOCKS, LENGTH, VOCABULARY = 128, 4, 64, 1024
BATCH, QUERIES = 16, 8
LAYERS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
FORMS = {
    "factors": {"dtype": None},
    "factors, bfloat16": {"dtype": torch.bfloat16},
    "projection=64": {"projection": 64},
    "projection=256": {"projection": 256},
}
T = TypeVar("T")


def make() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


def batches(n: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (n, LENGTH), generator=generator)
    return [{"input_ids": part, "labels": part} for part in ids.split(BATCH)]


def timed(call: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def correlation(found: Tensor, exact: Tensor) -> float:
    """Pearson's over samples, the mean of the queries."""
    each = [
        torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(found.T, exact.T, strict=True)
    ]
    return float(torch.stack(each).mean())


def anew(model: nn.Module, data: list, asked: list) -> Tensor:
    """Scores of the queries without an index."""
    queries = imu.capture(model, asked, layers=LAYERS)
    return imu.pairwise_influence(
        imu.capture(model, data, layers=LAYERS), queries, curvature="identity"
    )


def row(form: str, model: nn.Module, data: list, asked: list, exact: Tensor) -> str:
    with tempfile.TemporaryDirectory() as folder:
        building, index = timed(
            lambda: imu.build_index(
                model, data, Path(folder) / "index", layers=LAYERS, chunk_size=64, **FORMS[form]
            )
        )
        index = imu.load_index(index.path)
        capturing, queries = timed(lambda: index.capture(model, asked))
        first, found = timed(lambda: index.scores(queries, curvature="identity"))
        again, _ = timed(lambda: index.scores(queries, curvature="identity"))
        cells = [
            form,
            f"{building:.1f}",
            f"{index.nbytes / index.n:,.0f}",
            f"{(capturing + first) / QUERIES:.3f}",
            f"{(capturing + again) / QUERIES:.3f}",
        ]
        if index.projection is None:
            cells.append("")
        else:
            index.scores(queries)  # makes the matrix
            solving, _ = timed(lambda: index.scores(queries))
            cells.append(f"{(capturing + solving) / QUERIES:.3f}")
        error = float((found - exact).norm() / exact.norm())
        cells += [f"{correlation(found.double(), exact.double()):.4f}", f"{error:.1e}"]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    logging.getLogger("imu_fast").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    model, data, asked = make(), batches(n, 1), batches(QUERIES, 2)
    layers = imu.capture(model, asked, layers=LAYERS)
    size = sum(layer.num_classes * layer.width for layer in layers)
    print(
        f"{n} samples and {QUERIES} queries of {LENGTH} tokens, {len(layers)} layers of "
        f"{sorted({(layer.num_classes, layer.width) for layer in layers})}, {size:,} parameters, "
        f"{model.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, imu_fast {imu.__version__}"
    )
    anew(model, asked, asked)  # first calls
    without, exact = timed(lambda: anew(model, data, asked))
    print(
        "| index | build, s | bytes a sample | query, s | again, s | by Fisher, s | correlation | "
        "error |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    print(f"| none | 0.0 | 0 | {without / QUERIES:.3f} | {without / QUERIES:.3f} | | 1.0000 | 0 |")
    for form in FORMS:
        print(row(form, model, data, asked, exact), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
