"""Processes side by side, or none at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import torch
from tqdm.auto import tqdm


class _Here(Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def process_pool(workers: int) -> Executor:
    """Processes that share the cores among them; one is this one."""
    if workers == 1:
        return _Here()
    threads = max(1, (os.cpu_count() or 1) // workers)
    return ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    )


def all_done(futures: Iterable[Future[Any]], bar: tqdm) -> None:
    """Wait for all of them; the first error is raised."""
    for future in as_completed(list(futures)):
        future.result()
        bar.update()
