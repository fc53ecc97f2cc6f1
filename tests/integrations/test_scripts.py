"""The examples run as they are."""

from __future__ import annotations

import importlib.util
import io
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def runs(name, *arguments):
    """What an example prints. In this process: a new one would spend its time on imports."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as said:
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return said.getvalue()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("attribution.py", "of the 10 wrong labels"),
        ("authors.py", "after:  forget 0.00"),
        ("forget_class.py", "forget accuracy 0.00"),
        ("forget_samples.py", "saved to"),
        ("language_lora.py", "retained sentences"),
        ("plain_loop.py", "InfluenceWeightedLoss: forget accuracy"),
        ("transformers_trainer.py", "stopped after"),
    ],
)
def test_an_example_runs(name, said):
    assert said in runs(name)


def test_the_example_of_shared_samples_runs():
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(EXAMPLES / "torchrun_scores.py")),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"process {rank}: ggn" in done.stdout for rank in range(2))


def test_the_example_of_supreme_runs():
    if importlib.util.find_spec("supreme") is None:
        pytest.skip("supreme-unlearning is not installed")
    assert "forget accuracy 0.00" in runs("supreme_method.py")


def test_the_example_of_open_unlearning_says_what_it_needs():
    pytest.importorskip("transformers")
    with pytest.raises(SystemExit, match="PATH_OF_A_CHECKOUT"):
        runs("open_unlearning.py")
