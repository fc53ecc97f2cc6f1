"""The code of README and docs runs as it stands, and errs as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import imu_fast as imu

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def blocks(page):
    """The Python of a page, block by block."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def statements(block):
    """``(code, message)``: code up to a line that says how it errs, or to the block's end."""
    code = []
    for line in block.splitlines():
        said = re.match(r"# (\w+Error): (.*?)( \.\.\.)?$", line)
        if said:
            before, last = code[:-1], code[-1:]
            if before:
                yield "\n".join(before), None
            yield "\n".join(last), said[2].split(" ...")[0]
            code = []
        else:
            code.append(line)
    yield "\n".join(code), None


@pytest.fixture
def names():
    """What the pages take for granted: a trained model and a forget set."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    y = torch.arange(80) % 4
    x = 2 * torch.randn(4, 8)[y] + torch.randn(80, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    forget = TensorDataset(x[y == 1], y[y == 1])
    loader = DataLoader(forget, batch_size=16)
    return {"model": model.eval(), "forget_loader": loader, "forget": loader, "imu": imu}


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_code_of_a_page_runs(page, names):
    if "import transformers" in page.read_text():
        pytest.importorskip("transformers")
    for block in blocks(page):
        for code, message in statements(block):
            if message is None:
                exec(compile(code, str(page), "exec"), names)
            else:
                with pytest.raises(imu.ImuFastError, match=re.escape(message)):
                    exec(compile(code, str(page), "exec"), names)


def test_links_of_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} -> {target}"
