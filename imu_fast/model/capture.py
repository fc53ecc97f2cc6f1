"""From a model and a loader to gradient factors: hooks, one batched pass, nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from imu_fast.errors import InputError, check_finite_rows
from imu_fast.factors.gradient_factors import IGNORE_INDEX, GradientFactors, check_labels
from imu_fast.model.batches import (
    as_batches,
    device_of,
    empty_message,
    split_batch,
    to_device,
    warn_of_order,
)
from imu_fast.model.guard import check_trainable, door, preserved
from imu_fast.model.head import find_head, linears, no_head
from imu_fast.model.labels import class_labels
from imu_fast.model.outputs import logits_of


@dataclass(frozen=True)
class HeadFeatures:
    """What a linear head saw.

    Attributes:
        name, head: the layer. features: [N, d], its inputs in the model's dtype.
        labels: [N] int64. offsets: [n+1] int64 on the CPU, tokens of each sample.
    """

    name: str
    head: nn.Linear
    features: Tensor
    labels: Tensor
    offsets: Tensor


@contextmanager
def _catching(modules: Mapping[str, nn.Linear]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Collect ``(input, output)`` of each call of these layers; the hooks are always removed."""
    caught: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}
    with ExitStack() as stack:
        for name, module in modules.items():

            def hook(_: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                caught[name].append((args[0], output))

            handle = module.register_forward_hook(hook)
            stack.callback(handle.remove)
        yield caught


def _features_for(logits: Tensor, act: Tensor, output: Tensor) -> Tensor | None:
    """The layer's inputs that made ``logits``, or None if its output is not the logits.

    A sequence classifier scores every token and then picks one: that token's input is returned.
    """
    same_memory = output.data_ptr() == logits.data_ptr() and output.shape == logits.shape
    if same_memory or (output.shape == logits.shape and torch.equal(output, logits)):
        return act
    pooled = output.dim() == 3 and logits.dim() == 2
    if pooled and output.shape[::2] == logits.shape:
        match = (output == logits[:, None]).all(dim=-1)
        if bool(match.any(dim=1).all()):
            return act[torch.arange(len(act), device=act.device), match.int().argmax(dim=1)]
    return None


@door
def capture_features(
    model: nn.Module,
    loader: Any,
    head: Any = "head",
    *,
    ignore_index: int = IGNORE_INDEX,
    progress: bool = False,
    shift_labels: bool = False,
) -> HeadFeatures:
    """The classifier's inputs over a loader, in ONE batched no-grad pass in evaluation mode.

    Args:
        loader: DataLoader, iterable of ``(inputs, labels)`` or dict batches, or tensors (X, y).
        head: ``"head"``: the linear layer whose output is the model's logits, found while the
            first batch runs; or a module, or its name, which must produce the logits.
        shift_labels: logits [B, T, C] at position t predict the label at t + 1 (causal models).

    Raises:
        InputError: empty loader, labels out of range, non-finite features (says which sample).
        NoHeadFoundError: no linear layer, or not the given one, produces the logits.
    """
    warn_of_order(loader)
    device = device_of(model)
    explicit = head if not (isinstance(head, str) and head == "head") else None
    modules = linears(model) if explicit is None else dict([find_head(model, explicit)])
    if not modules:
        raise no_head(model, "no linear head found")
    features: list[Tensor] = []
    labels_seen: list[Tensor] = []
    counts: list[Tensor] = []
    seen = 0
    with preserved(model), torch.no_grad():
        model.eval()
        for batch in tqdm(
            as_batches(loader, model), desc="capture", unit="batch", disable=not progress
        ):
            args, kwargs, labels = to_device(split_batch(batch), device)
            with _catching(modules) as caught:
                logits = logits_of(model(*args, **kwargs))
            found = None
            for name in reversed(list(modules)):
                for act, output in reversed(caught[name]):
                    act_of_logits = _features_for(logits, act, output)
                    if act_of_logits is not None:
                        found = (name, act_of_logits)
                        break
                if found:
                    break
            if found is None:
                raise no_head(model, f"{'/'.join(modules)}: not the producer of the logits")
            name, act = found
            modules = {name: modules[name]}
            labels = class_labels(labels, logits.shape)
            if shift_labels and labels.dim() == 2:
                act, labels = act[:, :-1], labels[:, 1:]
            try:
                check_labels(labels, logits.shape[-1], ignore_index)
            except InputError as error:
                raise InputError(f"samples from {seen} on: {error}") from None
            if labels.dim() == 2:
                valid = labels != ignore_index
                counts.append(valid.sum(dim=1).cpu())
                act, labels = act[valid], labels[valid]
            else:
                counts.append(torch.ones(len(labels), dtype=torch.int64))
            features.append(act.detach().clone())
            labels_seen.append(labels)
            seen += len(counts[-1])
    if seen == 0:
        raise InputError(empty_message(loader))
    name, linear = next(iter(modules.items()))
    act, all_labels = torch.cat(features), torch.cat(labels_seen)
    del features
    check_finite_rows("features", act)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(counts).cumsum(0)])
    if bool((all_labels == ignore_index).any()):
        valid = all_labels != ignore_index
        before = torch.zeros(len(all_labels) + 1, dtype=torch.int64)
        before[1:] = valid.cpu().cumsum(0)
        offsets, act, all_labels = before[offsets], act[valid], all_labels[valid]
    return HeadFeatures(name, linear, act, all_labels, offsets)


def _capture_layers(
    model: nn.Module, loader: Any, modules: Mapping[str, nn.Linear], ignore_index: int, bar: bool
) -> list[GradientFactors]:
    """Factors of any linear layers: one batched forward and backward of the summed losses."""
    device = device_of(model)
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in modules}
    check_trainable(model)
    with preserved(model):
        model.eval()
        for module in modules.values():
            module.weight.requires_grad_()
        for batch in tqdm(as_batches(loader, model), desc="capture", unit="batch", disable=not bar):
            args, kwargs, labels = to_device(split_batch(batch), device)
            with torch.enable_grad(), _catching(modules) as caught:
                logits = logits_of(model(*args, **kwargs))
                labels = class_labels(labels, logits.shape)
                check_labels(labels, logits.shape[-1], ignore_index)
                loss = nn.functional.cross_entropy(
                    logits.flatten(0, -2).float() if logits.dim() == 3 else logits,
                    labels.flatten(),
                    reduction="none",
                    ignore_index=ignore_index,
                ).view(labels.shape)
                if labels.dim() == 2:
                    loss = loss.sum(dim=1) / (labels != ignore_index).sum(dim=1).clamp_min(1)
                calls = [(name, *call) for name in modules for call in caught[name]]
                deltas = torch.autograd.grad(loss.sum(), [out for _, _, out in calls])
            per_layer: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}
            for (name, act, _), delta in zip(calls, deltas, strict=True):
                per_layer[name].append((delta.detach(), act.detach()))
            for name, seen in per_layer.items():
                # [B, positions, .]: positions of one call and of several calls alike.
                delta = torch.cat([d.reshape(len(labels), -1, d.shape[-1]) for d, _ in seen], 1)
                act = torch.cat([a.reshape(len(labels), -1, a.shape[-1]) for _, a in seen], 1)
                count = torch.full((len(labels),), delta.shape[1])
                parts[name].append((delta.flatten(0, 1), act.flatten(0, 1), count))
    out = []
    for name, pieces in parts.items():
        if not pieces:
            raise InputError(empty_message(loader))
        delta, act = (torch.cat([p[i] for p in pieces]) for i in (0, 1))
        dtype = torch.float64 if delta.dtype == torch.float64 else torch.float32
        counts = torch.cat([p[2] for p in pieces])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        check_finite_rows(f"gradient of {name}", delta, "position")
        has_bias = modules[name].bias is not None
        out.append(GradientFactors(delta.to(dtype), act.to(dtype), offsets, has_bias, name=name))
    return out


@door
def capture(
    model: nn.Module,
    loader: Any,
    layers: str | nn.Module | Sequence[str | nn.Module] = "head",
    *,
    ignore_index: int = IGNORE_INDEX,
    progress: bool = False,
    shift_labels: bool = False,
) -> GradientFactors | list[GradientFactors]:
    """Gradient factors of a model's head, or of any of its linear layers (SPEC section 1).

    Args:
        layers: ``"head"``: the classifier, one no-grad forward pass. A name or module: that layer;
            a list: several. These need one batched forward and backward pass.

    Returns:
        GradientFactors; for a list of layers a list, in the order of ``named_parameters``.

    Raises:
        As :func:`capture_features`.
    """
    if isinstance(layers, str) and layers == "head":
        found = capture_features(
            model,
            loader,
            ignore_index=ignore_index,
            progress=progress,
            shift_labels=shift_labels,
        )
        return GradientFactors.from_head(
            found.features,
            found.head.weight,
            found.head.bias,
            found.labels,
            found.offsets,
            ignore_index=ignore_index,
            name=found.name,
        )
    warn_of_order(loader)
    single = isinstance(layers, str | nn.Module)
    wanted = [layers] if single else list(layers)  # type: ignore[arg-type]
    if not wanted:
        raise InputError("layers=[] names no layer; pass 'head' or a list of linear layers")
    chosen = {name for name, _ in (find_head(model, layer) for layer in wanted)}
    modules = {name: module for name, module in linears(model).items() if name in chosen}
    out = _capture_layers(model, loader, modules, ignore_index, progress)
    return out[0] if single else out
