"""``imu-fast`` as a user types it, and a model so small that every command is done at once."""

import torch
from torch import nn
from typer.testing import CliRunner

from imu_fast.cli.app import app

runner = CliRunner()


def run(*arguments, code=0):
    result = runner.invoke(app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def toy_model():
    """What --arch test_toy:toy_model would name in a user's own module."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
