"""Which parameters are ascended: the head on cached features, some layers, or the network."""

from __future__ import annotations

import fnmatch
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imu_fast.distributed import several
from imu_fast.errors import InputError, check_choice
from imu_fast.model.capture import head_of
from imu_fast.model.forward import innermost
from imu_fast.model.head import WHOLE_MODEL, check_not_frozen, find_head, linears
from imu_fast.options import Choice, Options, Table, option, options
from imu_fast.unlearning.ascent.head import HeadSteps
from imu_fast.unlearning.ascent.network import NetworkSteps
from imu_fast.unlearning.ascent.preconditioners import (
    PRECONDITIONERS,
    Preconditioner,
    PreconditionerName,
)
from imu_fast.unlearning.ascent.step import Rule, Steps
from imu_fast.unlearning.method import Job
from imu_fast.unlearning.subject import HeadSubject, NetworkSubject, check_head_layer

logger = logging.getLogger("imu_fast")

# The layers that the authors' code scores and trains.
PAPER_LAYERS = "*fc*"
Layer = str | nn.Module
Mode = Literal["eval", "train"]


def _check_mode(name: str, value: str) -> None:
    check_choice(name, value, ("eval", "train"))


def _check_evaluation(name: str, value: str) -> None:
    if check_choice(name, value, ("eval", "train")) == "train":
        raise InputError(
            f"{name}='train' with scope='head': the head is trained on features captured once, in "
            "evaluation mode; use scope='layers' (default: the head)"
        )


def _check_rows(name: str, value: str) -> None:
    check_choice(name, value, ("all", "forgotten"))


class Scope(Options, ABC):
    """Which parameters change, and in which mode the model runs meanwhile."""

    def bind(self, model: nn.Module) -> Scope:
        """This scope with the model's layers by name, all of them there.

        Raises:
            InputError: a layer that the model does not have.
        """
        return self

    @abstractmethod
    def steps(self, job: Job, rule: Rule) -> Steps:
        """What makes the steps; everything that they change is kept in ``job``."""


@options
class Head(Scope):
    """The classifier alone, on features captured once: no backbone, no autograd, milliseconds.

    Args:
        layer: the linear layer that produces the logits, by name or as a module; None: found.
        rows: ``"forgotten"``: only the rows of the forget set's classes change.
        precondition: see ``imu_fast.unlearning.ascent.preconditioners``.
        batchnorm, dropout: ``"eval"``, in which features are captured; here they have no choice.
    """

    name = "head"
    layer: Layer | None = option(default=None, check=check_head_layer, also="layers")
    rows: Literal["all", "forgotten"] = option(default="all", check=_check_rows)
    precondition: Choice[Preconditioner, PreconditionerName] = Choice(PRECONDITIONERS, "none")
    batchnorm: Literal["eval"] = option(default="eval", check=_check_evaluation)
    dropout: Literal["eval"] = option(default="eval", check=_check_evaluation)

    def bind(self, model: nn.Module) -> Scope:
        if self.layer is None:
            return self
        return replace(self, layer=find_head(model, self.layer)[0])

    def steps(self, job: Job, rule: Rule) -> Steps:
        subject = HeadSubject(job.model, self.layer, job.sets, job.progress, job.reading)
        if subject.tied:
            return self._through_the_network(job, rule, subject)
        job.keep([*subject.tensors(), *job.model.buffers()])
        chosen: Tensor | None = None
        if self.rows == "forgotten":
            chosen = torch.zeros(len(subject.theta), dtype=torch.bool)
            chosen[subject.sets["forget"][1].cpu().unique()] = True
        apply = self.precondition.fit(subject.factors()[0]) if self._preconditioned else None
        return HeadSteps(subject, rule, rows=chosen, preconditioner=apply)

    def _through_the_network(self, job: Job, rule: Rule, head: HeadSubject) -> Steps:
        """A weight that features depend on: its gradient goes through the network as well."""
        shared = ", ".join(head.tied)
        on_features = [f"rows={self.rows!r}"] if self.rows != "all" else []
        if self._preconditioned:
            on_features.append(f"precondition={self.precondition.name or self.precondition!r}")
        if on_features:
            raise InputError(
                f"{', '.join(on_features)}: the head {head.name!r} shares its weight with "
                f"{shared}, so its features change with it, and this works on cached features; use "
                "method='imu' or 'margin_edit', which can do without, or untie the weight"
            )
        logger.info("the head %r shares its weight with %s: autograd", head.name, shared)
        own = {id(p) for layer in head.layers for p in layer.parameters()}
        return _network(job, rule, own, batchnorm="eval", dropout="eval")

    @property
    def _preconditioned(self) -> bool:
        return self.precondition.name != "none"


class _Autograd(Scope):
    """Parameters in place, with autograd.

    Attributes:
        batchnorm: mode of BatchNorm during ascent: ``"train"`` lets running statistics drift on
            forget data alone, which changes every prediction, whatever the ascent does.
        dropout: mode of every other layer.
    """

    batchnorm: Mode
    dropout: Mode

    @abstractmethod
    def _trained(self, job: Job) -> set[int]:
        """The ids of the trained parameters."""

    def steps(self, job: Job, rule: Rule) -> Steps:
        trained = self._trained(job)
        if self.batchnorm == "train":
            _check_alone(job.model)
        return _network(job, rule, trained, batchnorm=self.batchnorm, dropout=self.dropout)


def _check_alone(model: nn.Module) -> None:
    """Raise InputError for norms that would wait for other processes' batches."""
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and several():
            raise InputError(
                f"batchnorm='train': {name!r} is a SyncBatchNorm, whose statistics are of all "
                "processes' batches, and each process unlearns alone; use batchnorm='eval', or a "
                "model with BatchNorm"
            )


def _network(job: Job, rule: Rule, trained: set[int], *, batchnorm: str, dropout: str) -> Steps:
    # By identity: a shared parameter has its name at another layer.
    names = [name for name, p in job.model.named_parameters() if id(p) in trained]
    job.keep(p for p in job.model.parameters() if id(p) in trained)
    job.keep(job.model.buffers())
    subject = NetworkSubject(job.model, job.sets, names, job.reading)
    copies = {id(tensor): copy for tensor, copy in job.kept}
    original = {name: copies[id(p)] for name, p in subject.parameters.items()}
    # Copies of their own: a forward pass may write into them.
    original |= {name: b.detach().clone() for name, b in job.model.named_buffers()}
    return NetworkSteps(subject, rule, batchnorm=batchnorm, dropout=dropout, original=original)


@options
class Layers(_Autograd):
    """Some modules of the network.

    Args:
        layers: names or modules; a pattern such as ``"*fc*"`` stands for the linear layers whose
            names it matches. None: the head, found while the first batch runs. Of a module that
            holds others, what is frozen in these (``requires_grad=False``) stays, unless all is.
    """

    name = "layers"
    layers: Layer | Sequence[Layer] | None = option(default=None)
    batchnorm: Mode = option(default="eval", check=_check_mode)
    dropout: Mode = option(default="eval", check=_check_mode)

    def check(self) -> None:
        if self.layers is None or isinstance(self.layers, str | nn.Module):
            return
        given = list(self.layers) if isinstance(self.layers, Sequence) else [self.layers]
        if not given or not all(isinstance(layer, str | nn.Module) for layer in given):
            raise InputError(
                f"layers={self.layers!r}; pass names or modules, such as layers=['fc1', 'fc2']"
            )

    def bind(self, model: nn.Module) -> Scope:
        modules = dict(model.named_modules())
        if self.layers is None:
            return self
        one = isinstance(self.layers, str | nn.Module)
        wanted = [self.layers] if one else self.layers
        names = [n for layer in wanted for n in _names(layer, modules, model)]  # type: ignore[union-attr]
        return replace(self, layers=list(dict.fromkeys(names)))

    def _trained(self, job: Job) -> set[int]:
        model, names = job.model, self.layers
        if named := names is not None:
            assert isinstance(names, list)  # bound
        else:
            names, _ = head_of(model, job.forget, job.reading)
        modules = [model if n == WHOLE_MODEL else model.get_submodule(n) for n in names]
        if not named:
            check_not_frozen(model, "+".join(names), modules)
        found = {id(p) for module in modules for p in _asked_for(module)}
        if not found:
            raise InputError(f"layers={names} have no parameters to train; name other layers")
        return found


def _asked_for(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that was named, but for those that are frozen deeper in it.

    Of one that is frozen as a whole, all.
    """
    every, own = list(module.parameters()), {id(p) for p in module.parameters(recurse=False)}
    if not any(p.requires_grad for p in every):
        return every
    return [p for p in every if p.requires_grad or id(p) in own]


def _names(layer: Any, modules: dict[str, nn.Module], model: nn.Module) -> list[str]:
    """The module names that one entry of ``layers`` stands for."""
    named = (f"is no module of the model; its linear layers are {list(linears(model))}",)
    if isinstance(layer, nn.Module):
        found = [name or WHOLE_MODEL for name, module in modules.items() if module is layer]
    elif any(sign in layer for sign in "*?["):
        found = [name for name in linears(model) if fnmatch.fnmatchcase(name, layer)]
        if not found:
            short = " (which preset='paper' is short for)" if layer == PAPER_LAYERS else ""
            raise InputError(
                f"layers={layer!r}{short} matches none of the model's linear layers, which are "
                f"{list(linears(model))}; name the layers with layers=[...]"
            )
    else:
        known = layer in modules or layer == WHOLE_MODEL
        # Names of the model inside a wrapper are good too.
        inner = None if known else dict(innermost(model).named_modules()).get(layer)
        found = [layer] if known else [n for n, m in modules.items() if m is inner]
    if not found or not found[0]:
        raise InputError(f"layers has {layer!r}, which {named[0]}")
    return found[:1] if isinstance(layer, nn.Module) else found


@options
class Network(_Autograd):
    """Every parameter that is not frozen (``requires_grad=False``)."""

    name = "all"
    batchnorm: Mode = option(default="eval", check=_check_mode)
    dropout: Mode = option(default="eval", check=_check_mode)

    def _trained(self, job: Job) -> set[int]:
        found = {id(p) for p in job.model.parameters() if p.requires_grad}
        if not found:
            raise InputError(
                "scope='all' trains the parameters that are not frozen, and all of this model's "
                "have requires_grad=False; set it on those to train, or name layers=[...] with "
                "scope='layers'"
            )
        return found


ScopeName = Literal["head", "layers", "all"]
SCOPES: Table[Scope] = Table(
    "scope",
    Scope,  # type: ignore[type-abstract]
    {"head": Head, "layers": Layers, "all": Network},
)
