"""The folder of an index: resumed after an end, and refused where it is another's or damaged."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import imu_fast as imu
from imu_fast.attribution import index
from imu_fast.errors import InputError
from imu_fast.storage import load_tensors

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))
X, Y = torch.randn(23, 5), torch.arange(23) % 3
DATA = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 23, 4)]
WAYS = {"factors": {}, "projections": {"projection": 6}}


class Ended(Exception):
    """What a test ends a build with."""


def ending(after):
    """Batches of which so many come."""
    yield from DATA[:after]
    raise Ended


def build(path, data=None, model=MODEL, **options):
    given = {"layers": ["0", "3"], "chunk_size": 8, **options}
    return imu.build_index(model, DATA if data is None else data, path, **given)


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def assert_same(path, other):
    """The same numbers in the same files; safetensors writes metadata in any order."""
    found, wanted = (json.loads((p / "index.json").read_text()) for p in (path, other))
    for manifest in (found, wanted):
        del manifest["sha256"]
        for chunk in manifest["chunks"]:
            del chunk["sha256"]
    assert found == wanted
    names = {file.name for file in path.iterdir()}
    assert names == {file.name for file in other.iterdir()}
    for name in names - {"index.json"}:
        (tensors, text), (same, other_text) = (load_tensors(p / name) for p in (path, other))
        assert text == other_text and tensors.keys() == same.keys()
        assert all(torch.equal(tensor, same[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("after", range(7))
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_an_ended_build_goes_on_to_the_same_index(after, options, tmp_path):
    whole = build(tmp_path / "whole", iter(DATA), **options)
    path = tmp_path / "ended"
    with pytest.raises(Ended):
        build(path, ending(after), **options)
    if after:
        with pytest.raises(InputError, match=r"is not finished.*call imu_fast\.build_index"):
            imu.load_index(path)
    done = {file: file.stat().st_mtime_ns for file in path.glob("chunk-*")}
    assert len(done) == max(0, (after - 1) // 2)
    (path / ".0123456789ab.tmp.safetensors").write_bytes(b"what an end left behind")
    made = build(path, iter(DATA), **options)
    (path / ".0123456789ab.tmp.safetensors").unlink()
    assert_same(path, whole.path)
    before = contents(path)
    assert all(file.stat().st_mtime_ns == time for file, time in done.items())
    again = build(path, iter(DATA), **options)  # nothing is left to do
    assert again.n == made.n == 23 and contents(path) == before


def test_a_killed_build_goes_on(tmp_path):
    """By the system, between two chunks of a process of its own."""
    script = tmp_path / "build.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path[:0] = {[os.path.dirname(__file__)]!r}\n"
        "import test_index_files as t\n"
        "def batches():\n"
        "    yield from t.DATA[:5]\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"t.build({str(tmp_path / 'killed')!r}, batches())\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    killed = tmp_path / "killed"
    assert len(list(killed.glob("chunk-*"))) == 2
    build(killed, iter(DATA))
    assert_same(killed, build(tmp_path / "whole", iter(DATA)).path)


def other_model():
    model = copy.deepcopy(MODEL)
    model[3].bias.data[1] += 1e-3
    return model


def other_buffers():
    model = copy.deepcopy(MODEL)
    model[1].running_mean[2] += 1e-3
    return model


def other_settings():
    model = copy.deepcopy(MODEL)
    model[1].eps = 0.5
    return model


REFUSED = {
    "settings": (dict(model=other_settings()), "other weights: '1.eps'"),
    "weights": (dict(model=other_model()), "model: .* holds gradients of other weights: '3.bias'"),
    "buffers": (dict(model=other_buffers()), "other weights: '1.running_mean'"),
    "layers": (dict(layers=["3"]), r"layers: .* with layers=\['0', '3'\], this call has \['3'\]"),
    "projection": (dict(projection=4), "projection: .* projection=None, this call has 4"),
    "dtype": (dict(dtype=torch.bfloat16), "dtype: .* with dtype=None, this call has 'bfloat16'"),
    "chunk_size": (dict(chunk_size=4), "chunk_size: .* with chunk_size=8, this call has 4"),
    "loss": (dict(label_smoothing=0.1), "reading: "),
    "length": (dict(data=DATA[:-1]), "loader: .* with loader='6 items', this call has '5 items'"),
    "batches": (
        dict(data=[*DATA[:2], *[(X[i : i + 5], Y[i : i + 5]) for i in range(8, 23, 4)]]),
        r"loader: .* batches of chunk 1 have \[5\] samples, the index's \[4, 4\]",
    ),
    "samples": (
        dict(data=[(X[i : i + 4] + (i == 12), Y[i : i + 4]) for i in range(0, 23, 4)]),
        "loader: .* the samples of chunk 1 are not those of the index",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("complete", [True, False])
def test_a_build_of_something_else_is_refused(name, complete, tmp_path, monkeypatch):
    path = tmp_path / "index"
    if complete:
        build(path)
    else:
        captured, left = index.captured, [1, 1]

        def ended(*args, **kwargs):
            if not left:
                raise Ended
            left.pop()
            return captured(*args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(Ended):
            patch.setattr(index, "captured", ended)
            build(path)
    before = contents(path)
    options, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        build(path, **options)
    assert contents(path) == before


@pytest.mark.parametrize("count", [4, 7])
def test_iterators_that_give_more_or_less_are_refused(count, tmp_path):
    build(tmp_path, iter(DATA))
    data = iter([*DATA, DATA[0]][:count])
    with pytest.raises(InputError, match="loader: .* holds an index of other data"):
        build(tmp_path, data)


def test_seeds_differ(tmp_path):
    build(tmp_path, projection=6)
    with pytest.raises(InputError, match="seed: .* with seed=0, this call has 1"):
        build(tmp_path, projection=6, seed=1)
    assert build(tmp_path / "factors").seed is None


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_queries_of_another_model_are_refused(options, tmp_path):
    made = build(tmp_path, **options)
    for model in (other_model(), other_buffers(), other_settings()):
        with pytest.raises(InputError, match="pass the model that the index was built with"):
            made.capture(model, DATA)
    with pytest.raises(InputError, match="model is a str"):
        made.capture("model", DATA)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_a_damaged_chunk_is_refused_by_its_name(options, tmp_path):
    made = build(tmp_path, **options)
    queries = made.capture(MODEL, DATA)
    file = sorted(tmp_path.glob("chunk-*"))[1]
    kept = file.read_bytes()
    for content in (kept[:-1], kept[:200] + bytes([kept[200] ^ 1]) + kept[201:], b""):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"chunk-000001\.safetensors' is damaged"):
            imu.load_index(tmp_path).scores(queries, curvature="identity")
    file.unlink()
    with pytest.raises(InputError, match=r"chunk-000001\.safetensors' cannot be read"):
        imu.load_index(tmp_path).self_influence(curvature="identity")
    file.write_bytes(sorted(tmp_path.glob("chunk-*"))[0].read_bytes())  # whole, and another
    with pytest.raises(InputError, match=r"chunk-000001\.safetensors' is damaged"):
        imu.load_index(tmp_path).scores(queries)


def test_a_damaged_manifest_is_refused(tmp_path):
    build(tmp_path)
    file = tmp_path / "index.json"
    found = json.loads(file.read_text())
    for content in ("{", "[]", "{}", json.dumps(found | {"complete": False})):
        file.write_text(content)
        for call in (imu.load_index, build):
            with pytest.raises(InputError, match=r"index\.json' is damaged"):
                call(tmp_path)


def test_folders_that_are_no_index(tmp_path):
    with pytest.raises(InputError, match="holds no index"):
        imu.load_index(tmp_path)
    with pytest.raises(InputError, match="holds no index"):
        imu.load_index(tmp_path / "nowhere")
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(InputError, match="a folder with other files"):
        build(tmp_path)
    with pytest.raises(InputError, match="is no folder"):
        build(tmp_path / "thesis.txt")
    for path in (3, None):
        for call in (imu.load_index, build):
            with pytest.raises(InputError, match="path is a "):
                call(path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


BAD = {
    "projection": (dict(projection=0), "projection=0"),
    "projection, no integer": (dict(projection=2.5), "projection=2.5"),
    "seed": (dict(projection=6, seed=-1), "seed=-1"),
    "seed of nothing": (dict(seed=3), "seed=3 with projection=None"),
    "dtype": (dict(dtype=torch.float16), "dtype=torch.float16 is none of"),
    "dtype, a name": (dict(dtype="float32"), "dtype='float32' is none of"),
    "chunk_size": (dict(chunk_size=0), "chunk_size=0"),
    "progress": (dict(progress=1), "progress=1"),
    "layers": (dict(layers=["nowhere"]), "nowhere"),
    "a function": (dict(output=lambda out: out), "no file can hold"),
    "option": (dict(shuffle=True), "shuffle"),
    "model": (dict(model="model"), "model is a str"),
    "empty": (dict(data=[]), "loader"),
    "order": (
        dict(data=DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)),
        "loader shuffles",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, tmp_path):
    options, message = BAD[name]
    with pytest.raises(InputError, match=message):
        build(tmp_path / "index", **options)
    assert build(tmp_path / "index").n == 23  # what was refused spoils nothing


def test_forms_of_data(tmp_path):
    """A DataLoader, tensors and a dataset give what a list of batches gives."""
    forms = {
        "loader": DataLoader(TensorDataset(X, Y), batch_size=4),
        "tensors": (X, Y),
        "dataset": TensorDataset(X, Y),
        "generator": iter(DATA),
    }
    queries = imu.capture(MODEL, (X[:2], Y[:2]), layers=["0", "3"])
    found = [
        build(tmp_path / name, data).scores(queries, curvature="identity")
        for name, data in forms.items()
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def unlabelled(rows):
    y = Y.clone()
    y[rows] = -100
    return [(X[i : i + 4], y[i : i + 4]) for i in range(0, 23, 4)], y != -100


@pytest.mark.parametrize("options", [{}, {"projection": 10**6}], ids=["factors", "projections"])
@pytest.mark.parametrize("rows", [range(8), range(8, 16), range(16, 23), range(1, 22)], ids=str)
def test_a_chunk_whose_samples_have_no_label(rows, options, tmp_path):
    """Each has a zero gradient and its place, wherever it is, and whenever the build was ended."""
    data, has = unlabelled(list(rows))
    whole = build(tmp_path / "whole", data, **options)
    assert whole.n == 23
    asked = (X[:3] + 0.1, Y[:3])
    found = whole.scores(whole.capture(MODEL, asked), curvature="identity")
    plain = build(tmp_path / "plain", **options)
    truth = plain.scores(plain.capture(MODEL, asked), curvature="identity") * has[:, None]
    torch.testing.assert_close(found, truth)
    for after in range(1, 6):
        path = tmp_path / f"ended-{after}"

        def ending(after=after):
            yield from data[:after]
            raise Ended

        with pytest.raises(Ended):
            build(path, ending(), **options)
        build(path, iter(data), **options)
        again = imu.load_index(path)
        assert torch.equal(again.scores(again.capture(MODEL, asked), curvature="identity"), found)


def test_no_label_at_all_is_refused(tmp_path):
    with pytest.raises(InputError, match="none of 23 samples has a label"):
        build(tmp_path / "index", unlabelled(list(range(23)))[0])


def test_images_of_a_chunk_without_labels(tmp_path):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randn(6, 2, 3, 3), torch.tensor([0, 1, -100, -100, 2, 0])
    data = [(x[i : i + 2], y[i : i + 2]) for i in (0, 2, 4)]
    index = imu.build_index(model, data, tmp_path / "index", layers=["0"], chunk_size=2)
    found = index.self_influence(curvature="identity")
    truth = imu.self_influence(imu.capture(model, data, layers=["0"]), curvature="identity")
    torch.testing.assert_close(found, truth)
    assert found[2:4].eq(0).all() and found[:2].gt(0).all()


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_layers_of_a_wrapped_model_have_the_names_of_its_own(wrap, tmp_path):
    index = build(tmp_path / "index", model=wrap(MODEL))
    assert index.layers == ["0", "3"]
    queries = index.capture(MODEL, DATA[:1])
    other = index.capture(wrap(MODEL), DATA[:1])
    assert all(torch.equal(a.delta, b.delta) for a, b in zip(queries, other, strict=True))


def test_the_current_directory_may_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build("index")
    index = imu.load_index("index")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert index.self_influence(curvature="identity").shape == (23,)
    assert index.path == tmp_path / "index"


def test_a_name_that_no_chunk_can_be_read_under(tmp_path):
    with pytest.raises(InputError, match=r"udcff' is not UTF-8, under which"):
        build(os.path.join(tmp_path, "a\udcff"))
    assert not list(tmp_path.iterdir())


def test_errors_of_a_later_chunk_say_of_which_samples(tmp_path):
    y = Y.clone()
    y[17] = 9
    data = [(X[i : i + 4], y[i : i + 4]) for i in range(0, 23, 4)]
    with pytest.raises(
        InputError, match=r"loader: samples 16 to 22, counted anew .* labels\[1\]=9"
    ):
        build(tmp_path / "index", data)
