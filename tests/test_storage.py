"""Files are whole, verified, and tried before the work."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import sys

import pytest
import torch
from damage import damaged

from imu_fast.errors import ImuFastError, InputError, WriteError
from imu_fast.storage import load_tensors, replacing, save_tensors, writable, writable_folder

TENSORS = {
    "weight": torch.randn(7, 5),
    "half": torch.randn(3).to(torch.bfloat16),
    "eighth": torch.randn(4).to(torch.float8_e4m3fn),
    "double": torch.randn(2, 2, dtype=torch.float64),
    "flags": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(7),
    "complex": torch.randn(2, dtype=torch.complex64),
}
METADATA = {"name": "größe", "run": '{"steps": 3}'}


def equal(found):
    tensors, metadata = found
    assert metadata == METADATA and tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(
            tensors[name].view(torch.uint8) if tensor.dtype.itemsize == 1 else tensors[name],
            tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor,
        ), name


def test_what_is_saved_is_what_is_read_by_anyone(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "a" / "b.safetensors"
    save_tensors(path, TENSORS, METADATA)
    equal(load_tensors(path))
    assert torch.equal(safetensors.load_file(path)["weight"], TENSORS["weight"])
    safetensors.save_file({"x": torch.ones(2)}, tmp_path / "plain", {"format": "pt"})
    assert load_tensors(tmp_path / "plain")[1] == {"format": "pt"}
    tied = torch.ones(3)
    save_tensors(path, {"a": tied, "b": tied, "c": tied[1:], "d": tied[::2]}, {})
    assert torch.equal(load_tensors(path)[0]["d"], torch.ones(2))


def test_damage_of_any_kind_is_refused_by_name(tmp_path):
    path = tmp_path / "file.safetensors"
    save_tensors(path, TENSORS, METADATA)
    content, rng = path.read_bytes(), random.Random(0)
    for _ in range(600):
        path.write_bytes(damaged(content, rng))
        with pytest.raises(InputError, match=r"file.safetensors' is (damaged|no readable)"):
            load_tensors(path)
    for at in range(8 * len(content)):  # every single bit
        if at % 7:
            continue
        raw = bytearray(content)
        raw[at // 8] ^= 1 << at % 8
        path.write_bytes(raw)
        with pytest.raises(InputError, match="file.safetensors' is"):
            load_tensors(path)


def test_of_another_version_or_missing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    with monkeypatch.context() as patch:
        patch.setattr("imu_fast.storage.FORMAT", 2)
        save_tensors(path, TENSORS, {})
    with pytest.raises(InputError, match="has the format 2, this version reads 1; upgrade"):
        load_tensors(path)
    with pytest.raises(InputError, match="does not exist"):
        load_tensors(tmp_path / "nothing")
    with pytest.raises(InputError, match="is no file"):
        load_tensors(tmp_path)


def write(path, text="new"):
    with replacing(path) as temporary:
        temporary.write_text(text)


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    real, link, loose = tmp_path / "real" / "f", tmp_path / "link", tmp_path / "loose"
    real.write_text("old")
    link.symlink_to(real)
    loose.symlink_to(tmp_path / "real" / "not yet")
    for name in (link, loose):
        writable(name)
        write(name)
        assert name.is_symlink() and name.read_text() == "new"
    assert real.read_text() == "new" and (tmp_path / "real" / "not yet").read_text() == "new"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["f", "link", "loose", "not yet", "real"]


def test_modes_are_those_of_the_file_or_of_the_umask(tmp_path):
    path = tmp_path / "f"
    before = os.umask(0o027)
    try:
        write(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        write(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f"]


FULL = """
import resource, sys, torch
from imu_fast.errors import WriteError
from imu_fast.storage import save_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save_tensors(sys.argv[1], {"a": torch.zeros(100_000)}, {})
except WriteError as error:
    assert isinstance(error, OSError)
    print(error)
"""


def test_a_disk_that_fills_leaves_the_old_file(tmp_path):
    path = tmp_path / "f.safetensors"
    save_tensors(path, TENSORS, METADATA)
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, timeout=120
    )
    assert "f.safetensors' cannot be written" in done.stdout, done.stderr
    assert "what was there is untouched" in done.stdout
    equal(load_tensors(path))
    assert [p.name for p in tmp_path.iterdir()] == ["f.safetensors"]


def test_a_full_disk_at_the_last_moment(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(WriteError, match="No space left.*untouched") as caught:
        write(path)
    assert isinstance(caught.value, ImuFastError)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_targets_are_tried_before_the_work(tmp_path, monkeypatch):
    for bad, message in (
        (tmp_path, "is a folder; add a file name"),
        ("/dev/null", "a device or a pipe"),
        (tmp_path / "file" / "new", "is no folder"),
    ):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match=f"out='{bad}'.*{message}"):
            writable(bad, "out")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for bad in (tmp_path / ("x" * 300), tmp_path / ("x" * 300) / "f", "a\0b", tmp_path / "circle"):
        with pytest.raises(InputError, match="^out=.*no file can have this name.*choose another"):
            writable(bad, "out")
        with pytest.raises(InputError, match="^here: no file can have this name.*choose another"):
            writable_folder(bad, "here")
        with pytest.raises(InputError, match="^path=.*no file can have this name.*choose another"):
            save_tensors(bad, {}, {})
    (tmp_path / "circle").unlink()
    writable(tmp_path / "new" / "deep" / "f", "out")
    writable(tmp_path / "file", "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
    with pytest.raises(InputError, match="MB are free there, 8796093022208 MB are needed"):
        writable(tmp_path / "f", size=2**63)
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: os.path.isdir(path))  # root may write
        with pytest.raises(InputError, match="is read-only"):
            writable(tmp_path / "file", "out")
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
        with pytest.raises(InputError, match="cannot be written to; choose"):
            writable_folder(tmp_path / "new", "out")

    def refuses(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuses)
    with pytest.raises(InputError, match="cannot be written to .*Read-only file system"):
        writable(tmp_path / "f", "out")
