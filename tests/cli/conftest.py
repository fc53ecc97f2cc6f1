import numpy as np
import pytest
import text_models as tm
import torch
from toy_command import toy_model


@pytest.fixture
def toy(tmp_path, monkeypatch):
    module = tmp_path / "toy_arch.py"
    module.write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.save(toy_model().state_dict(), tmp_path / "weights.pt")
    x, y = torch.randn(20, 3, 2, 2), torch.arange(20) % 3
    np.savez(tmp_path / "forget.npz", x=x.numpy(), y=y.numpy())
    options = ["--arch", "toy_arch:make", "--weights", tmp_path / "weights.pt"]
    return tmp_path, [*options, "--data", tmp_path / "forget.npz"], (x, y)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder of each kind of language model; made once, read by all."""
    from text_command import AUTO

    root = tmp_path_factory.mktemp("models")
    for kind in AUTO:
        tm.folder(root / kind, kind)
    return root


@pytest.fixture
def data(tmp_path):
    """Questions and answers."""
    return tm.pairs(tmp_path / "qa.jsonl")
