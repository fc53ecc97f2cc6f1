"""A summary's layers before the head, and that it is made chunk by chunk."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import imu_fast as imu
from imu_fast.errors import InputError
from imu_fast.unlearning.summary import inner, saving
from imu_fast.unlearning.summary.hessian import HESSIANS


def network(classes=3):
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 2, 2, groups=2), nn.Flatten()]
    body += [nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, classes)]
    return nn.Sequential(*body).double()


def samples(n=23, classes=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.arange(n) % classes


def tensors_of(summary):
    found = {f"hessian.{k}": x for k, x in summary.hessian.tensors().items()}
    for name, hessian in summary.inner.items():
        found |= {f"{name}.{k}": x for k, x in hessian.tensors().items()}
    moments = ("second_moment", "class_means", "class_counts")
    return found | {name: getattr(summary, name) for name in moments}


@pytest.mark.parametrize("kind", HESSIANS)
def test_chunks_give_the_sums_of_all_and_no_more_than_a_chunk_is_held(kind, tmp_path, monkeypatch):
    model, (x, y) = network(), samples()
    whole = imu.save_summary(model, (x, y), tmp_path / "a", kind=kind)
    assert list(whole.inner) == ["0", "4", "6"], "a grouped convolution cannot be stepped"
    seen = {"features": [], "layers": []}
    plain, layers = saving.capture_features, inner.capture

    def features(model, chunk, *args, **options):
        seen["features"].append(sum(batch.n for batch in chunk))
        return plain(model, chunk, *args, **options)

    def captured(model, chunk, *args, **options):
        seen["layers"].append(sum(batch.n for batch in chunk))
        return layers(model, chunk, *args, **options)

    monkeypatch.setattr(saving, "capture_features", features)
    monkeypatch.setattr(inner, "capture", captured)
    monkeypatch.setattr(saving, "_SAMPLES", 8)
    monkeypatch.setattr(inner, "_SAMPLES", 4)
    batches = ((x[i : i + 2], y[i : i + 2]) for i in range(0, 23, 2))  # a generator, read once
    pieces = imu.save_summary(model, batches, tmp_path / "b", kind=kind)
    assert seen == {"features": [8, 8, 7], "layers": [2, 2, 2, 4, 4, 4, 4, 4, 3]}
    assert pieces.n == 23 and repr(pieces) == repr(whole)
    for name, truth in tensors_of(whole).items():
        torch.testing.assert_close(tensors_of(pieces)[name], truth, rtol=0, atol=1e-12, msg=name)


def test_layers_are_in_the_file_and_said(tmp_path):
    model, data = network(), samples()
    saved = imu.save_summary(model, data, tmp_path / "s", inner_layers=["6", "0"])
    found = imu.load_summary(tmp_path / "s")
    assert list(found.inner) == ["0", "6"] and "K-FAC of '0', '6'" in repr(found) == repr(saved)
    assert found.nbytes == saved.nbytes and found.inner_fingerprints == saved.inner_fingerprints
    for name, tensor in tensors_of(saved).items():
        assert torch.equal(tensors_of(found)[name], tensor)
    none = imu.save_summary(model, data, tmp_path / "s", inner_layers=None)
    assert none.inner == {} and "K-FAC of no layer before it" in repr(none)
    sizes = [layer.nbytes for layer in saved.inner.values()]
    assert sizes == [8 * (4 + 25), 8 * (16 + 36)] and saved.nbytes == none.nbytes + sum(sizes)


def test_auto_takes_what_fits_and_explicit_names_are_refused(tmp_path, monkeypatch):
    model, data = network(), samples()
    monkeypatch.setattr(inner, "INNER_BYTES", 8 * (16 + 36) + 8 * (25 + 81))
    assert list(imu.save_summary(model, data, tmp_path / "s").inner) == ["4", "6"]
    monkeypatch.setattr(inner, "INNER_BYTES", 10)
    assert not imu.save_summary(model, data, tmp_path / "s").inner
    for names, message in (
        (["2"], "layer '2' is a grouped or transposed Conv2d"),
        (["nonsense"], "nonsense"),
    ):
        with pytest.raises((InputError, imu.ImuFastError), match=message):
            imu.save_summary(model, data, tmp_path / "new", inner_layers=names)
    assert not (tmp_path / "new").exists()


class Unused(nn.Module):
    """Of two layers before the head one never runs."""

    def __init__(self):
        super().__init__()
        self.body, self.spare, self.head = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def test_layers_that_cannot_be_had_are_left_out_and_said_or_refused(tmp_path, caplog):
    data, model = (torch.randn(20, 5), torch.arange(20) % 3), Unused()
    with caplog.at_level(logging.WARNING, logger="imu_fast"):
        found = imu.save_summary(model, data, tmp_path / "s")
    assert list(found.inner) == ["body"] and "layer 'spare' is left out" in caplog.text
    with pytest.raises(InputError, match="'spare' never ran"):
        imu.save_summary(model, data, tmp_path / "s", inner_layers=["spare"])
    with torch.no_grad():
        model.head.weight.zero_()  # then no loss depends on the body either
    assert not imu.save_summary(model, data, tmp_path / "s").inner
    with pytest.raises(InputError, match="'body', on which no sample's loss depends"):
        imu.save_summary(model, data, tmp_path / "s", inner_layers=["body"])


def test_errors_say_which_samples_of_a_long_loader(tmp_path, monkeypatch):
    model, (x, y) = network(), samples()
    monkeypatch.setattr(saving, "_SAMPLES", 8)
    wrong = y.clone()
    wrong[20] = 7
    batches = [(x[i : i + 4], wrong[i : i + 4]) for i in range(0, 23, 4)]
    with pytest.raises(InputError, match="samples from 16 on"):
        imu.save_summary(model, batches, tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("size", [1, 3, 40])
def test_a_sample_without_a_signal_at_a_convolution_has_an_input_of_zeros(
    size, tmp_path, monkeypatch
):
    """However samples are batched: none has the input of another."""
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)]
    model = nn.Sequential(*body).double()
    model[0].weight.data.abs_()
    model[0].bias.data.zero_()
    x = samples(40)[0][:, :, :3, :3].abs()
    x[::2] *= -1  # dead behind the ReLU
    monkeypatch.setattr(inner, "_SAMPLES", size)
    batches = [(x[i : i + size], torch.arange(40)[i : i + size] % 3) for i in range(0, 40, size)]
    found = imu.save_summary(model, batches, tmp_path / "s").inner["0"].inputs
    seen = nn.functional.unfold(x[1::2], 2)
    seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
    truth = torch.einsum("nip,njp->ij", seen, seen) / seen.shape[2]
    truth[-1, -1] += 20  # the ones of the dead samples' biases
    assert torch.allclose(found, truth, rtol=1e-13)


@pytest.mark.parametrize("wanted", [3, True, 2.5])
def test_what_is_no_layer_is_refused(wanted, tmp_path):
    with pytest.raises(InputError, match="is no layer; pass a name, a module, or several"):
        imu.save_summary(network(), samples(), tmp_path / "s", inner_layers=wanted)


def test_the_head_alone_is_no_inner_layer(tmp_path):
    with pytest.raises(InputError, match=r"inner_layers='8' is the head '8'"):
        imu.save_summary(network(), samples(), tmp_path / "s", inner_layers="8")


def test_forget_samples_are_taken_from_a_summary_of_other_draws(tmp_path):
    """Beyond 32 classes signals are of drawn labels, and a sample's differ with its place."""
    torch.manual_seed(0)
    body = [nn.Flatten(), nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 40)]
    model, (x, y) = nn.Sequential(*body).double(), samples(60, 40)
    kept = imu.save_summary(model, (x, y), tmp_path / "s")
    forget = x[30:], model(x[30:]).argmax(1)
    rule = imu.StopRule(forget_accuracy=0.5)
    result = imu.unlearn(model, forget, "self_distillation", summary=kept, stop=rule)
    assert result.reached
