"""One batch, in whatever form: what goes into the model, and the labels.

A batch becomes :class:`Parts`, what goes into the model and the labels. Where that follows from
the batch and from the model's signature it is taken from there; where two readings are possible
the model is asked, by running both on the first batch; where both run it is an error that names
:class:`Data`, which says it. It is never a guess.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from imu_fast.ambient import default_device_back
from imu_fast.errors import InputError, brief
from imu_fast.model.forward import LABEL_NAMES, forward_of, innermost
from imu_fast.model.guard import preserved
from imu_fast.model.labels import as_labels, labels_fit
from imu_fast.model.nested import (
    as_tensor,
    copied,
    fields_of,
    form_of,
    is_array,
    is_text,
    leaves,
    mapped,
    shown,
    tensors_in,
)
from imu_fast.model.parts import Data, Parts, device_of, pick, to_device
from imu_fast.model.rule import (
    REFUSALS,
    Rule,
    like_a_mask,
    masked_tokens,
    needs_labels,
    several_in_a_row,
)

logger = logging.getLogger("imu_fast")

Inputs = tuple[list[Any], dict[str, Any]]


_WAY_OUT = (
    "say which is which: imu_fast.Data(loader, inputs=..., labels=...), by index, key or a "
    "function of the batch"
)


class Splitter:
    """Batches into :class:`Parts`, for one model and one set of data.

    How a batch is read is decided at the first of its form, and kept; what is left out of it is
    said once, through the log.
    """

    def __init__(self, model: nn.Module, data: Data | None = None) -> None:
        self.model, self.data, self.forward = model, data, forward_of(model)
        floats = (p.dtype for p in innermost(model).parameters() if p.is_floating_point())
        self.floating = next(floats, torch.get_default_dtype())
        self._rules: dict[Any, Rule] = {}
        self._fed: dict[Any, bool] = {}
        self._said: set[str] = set()

    def __call__(self, batch: Any) -> Parts:
        """Raises InputError: no labels, or two ways to read the batch."""
        if isinstance(batch, Parts):
            return batch
        picked, form = self.data.pick(batch) if self.data is not None else None, None
        if picked is None:
            form = form_of(batch)
            if form not in self._rules:
                self._rules[form] = self._choose(self._readings(batch), batch)
            picked = self._rules[form].read(batch)
        parts = self._with_labels(self._parts(picked), form)
        if several_in_a_row(parts):
            self._say(
                "batches have several sequences in a row (position_ids begin anew): a sample is a "
                "whole row; to tell them apart, give each a row of its own"
            )
        return parts

    def _with_labels(self, parts: Parts, form: Any) -> Parts:
        """With the labels among the inputs, where the model makes its outputs from them."""
        name, place = self.forward.labels, self.forward.place_of_labels
        if name is None or name in parts.kwargs or place < len(parts.args) or not parts.n:
            return parts
        if form not in self._fed:
            self._fed[form] = needs_labels(self.model, parts, name)
        return (
            parts._replace(kwargs={**parts.kwargs, name: parts.labels})
            if self._fed[form]
            else parts
        )

    def _parts(self, picked: tuple[list[Any], dict[str, Any], Any]) -> Parts:
        args, kwargs, labels = picked
        indices = as_labels(labels)

        def leaf(value: Any) -> Any:
            if value is labels:  # of a model that computes its own loss
                return indices
            return as_tensor(value, self.floating) if is_array(value) else value

        inputs = [mapped(value, leaf) for value in args]
        return Parts(inputs, {k: mapped(v, leaf) for k, v in kwargs.items()}, indices)

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning("%s", text)

    def _choose(self, rules: list[Rule], batch: Any) -> Rule:
        """The one rule, or the one that the model takes and whose labels fit its outputs."""
        if len(rules) == 1 and rules[0].certain:
            return self._announced(rules[0], batch)
        outcomes = [self._tried(rule, batch) for rule in rules]
        fitting = [rule for rule, refusal in zip(rules, outcomes, strict=True) if refusal is None]
        if len(fitting) == 1:
            return self._announced(fitting[0], batch)
        if fitting:
            raise InputError(
                f"a batch ({shown(batch)}) can be read in {len(fitting)} ways: which part of it "
                f"is an input and which the labels? {_WAY_OUT}"
            )
        raise InputError(
            f"a batch ({shown(batch)}) fits the model in none of {len(rules)} ways to read it "
            f"({'; '.join(str(outcome) for outcome in outcomes)}); {_WAY_OUT}"
        )

    def _announced(self, rule: Rule, batch: Any) -> Rule:
        """The rule, after saying what it does not use.

        Raises:
            InputError: that may well be an input, such as an attention mask.
        """
        if not rule.unused:
            return rule
        args = [as_tensor(value) for value in rule.read(batch)[0] if is_array(value)]
        for part in rule.unused:
            value = as_tensor(batch[part]) if is_array(batch[part]) else None
            if value is not None and any(like_a_mask(value, arg) for arg in args):
                raise InputError(
                    f"a batch ({shown(batch)}) has its labels in part {rule.labels_at} (counted "
                    f"from 0), and part {part}, of its inputs' shape, may be a mask, which the "
                    f"model should have; {_WAY_OUT}"
                )
        self._say(
            f"a batch has {len(batch)} parts: part {rule.labels_at} (counted from 0) is taken for "
            f"the labels, what stands before it for inputs, and not used is: "
            f"{', '.join(map(str, rule.unused))}; if that is wrong, {_WAY_OUT}"
        )
        return rule

    def _tried(self, rule: Rule, batch: Any) -> str | None:
        """Why a rule cannot be right, after running the model; None: it may be."""
        try:
            parts = self._parts(rule.read(batch))
            args, kwargs, labels = to_device(parts, device_of(self.model))
            with preserved(self.model), torch.no_grad(), default_device_back():
                self.model.eval()
                outputs = tensors_in(innermost(self.model)(*copied(args), **copied(kwargs)))
        except REFUSALS as error:
            return brief(error, 100)
        if any(labels_fit(labels, output) for output in outputs):
            return None
        shapes = [tuple(output.shape) for output in outputs]
        most = f" up to {int(labels.max())}" if labels.numel() else ""
        return f"labels {tuple(labels.shape)}{most} do not fit outputs {shapes}"

    def _readings(self, batch: Any) -> list[Rule]:
        fields = fields_of(batch)
        told = self.data.labels if self.data is not None else None
        if told is not None:
            pick(batch, told, "labels")  # an error where it is not there
        if isinstance(told, str):
            return self._named(batch, fields or {}, told)
        if isinstance(told, int):
            return self._told(batch, told % len(batch))
        if fields is not None:
            label = self._label_in(fields)
            if label is not None:
                return self._named(batch, fields, label)
            if not isinstance(batch, tuple):
                raise InputError(
                    f"batch has keys {sorted(map(str, fields))}; one must be 'labels' or 'label' "
                    f"(or {', '.join(LABEL_NAMES[2:])}), or {_WAY_OUT}"
                )
        if isinstance(batch, list | tuple) and len(batch) >= 2:
            if len(batch) == 2:
                return self._pair(batch)
            return self._several(list(batch))
        raise InputError(
            f"batch is a {type(batch).__name__}; pass (inputs, labels) or a dict with 'labels', "
            f"or {_WAY_OUT}"
        )

    def _told(self, batch: Sequence[Any], place: int) -> list[Rule]:
        """The labels are part ``place``; what stands before them goes in."""
        forward = self.forward
        if not 1 <= place <= forward.most or forward.fewest > place + forward.takes_labels_at(
            place
        ):
            raise InputError(
                f"labels={place}: {place} parts of a batch stand before the labels, the model's "
                f"forward takes {', '.join(forward.positional)}; say inputs= as well"
            )
        kept = list(range(len(batch)))
        ways = self._inputs(batch[0], more=forward.takes_labels_at(1)) if place == 1 else [None]
        rules = [self._placed(len(batch), kept, place, way) for way in ways]
        return [replace(rule, certain=True, unused=()) for rule in rules]

    def _label_in(self, fields: Mapping[str, Any]) -> str | None:
        found = [name for name in LABEL_NAMES if fields.get(name) is not None]
        # What the model must have may be an input that only bears the name of labels.
        found = [name for name in found if name not in self.forward.required] or found
        if len(found) > 1:
            raise InputError(
                f"batch has {' and '.join(map(repr, found))}, either of which may be the labels; "
                "say which: imu_fast.Data(loader, labels=...)"
            )
        return found[0] if found else None

    def _keywords(self, fields: Mapping[str, Any], label: str | None) -> list[str] | None:
        """Which fields the forward takes by keyword, if that is how it takes them."""
        forward = self.forward
        taken = [name for name in fields if name in forward.names and name != label]
        anything = forward.any_keyword and not forward.names
        if not (anything or (taken and forward.required - {label} <= set(taken))):
            return None
        if forward.any_keyword:
            extra = (k for k, v in fields.items() if k not in taken and k != label)
            taken += [name for name in extra if not is_text(fields[name])]
        return taken

    def _named(self, batch: Any, fields: dict[str, Any], label: str) -> list[Rule]:
        forward = self.forward
        rest = [name for name in fields if name != label]
        keywords = self._keywords(fields, label)
        if keywords is not None:
            self._left_out(set(rest) - set(keywords))
            if label in forward.required:  # the model computes its own loss
                keywords = [*keywords, label]

            def by_keyword(batch: Any) -> tuple[list[Any], dict[str, Any], Any]:
                found = fields_of(batch) or {}
                return [], {k: found[k] for k in keywords if k in found}, found[label]

            return [Rule(by_keyword)]
        arrays = [name for name in rest if any(is_array(leaf) for leaf in leaves(fields[name]))]
        rules: list[Rule] = []
        # The order of several fields says nothing, but in a namedtuple.
        ordered = len(arrays) == 1 or isinstance(batch, tuple)
        if ordered and arrays and forward.fewest <= len(arrays) <= forward.most:

            def by_position(batch: Any) -> tuple[list[Any], dict[str, Any], Any]:
                found = fields_of(batch) or {}
                return [found[name] for name in arrays], {}, found[label]

            rules.append(Rule(by_position, certain=False))
        if forward.fewest <= 1 <= forward.most:

            def whole(batch: Any) -> tuple[list[Any], dict[str, Any], Any]:
                found = fields_of(batch) or {}
                rest = {k: v for k, v in found.items() if k != label}
                return [rest if isinstance(batch, Mapping) else batch], {}, found[label]

            rules.append(Rule(whole, certain=False))
        if not rules:
            raise InputError(
                f"batch has keys {rest} besides {label!r}, the model's forward takes "
                f"{list(forward.positional)}; rename them, or {_WAY_OUT}"
            )
        return rules

    def _left_out(self, names: set[str]) -> None:
        if names:
            self._say(
                f"the model's forward takes no {', '.join(sorted(map(str, names)))}: not used of "
                "the batches"
            )

    def _inputs(self, first: Any, more: int = 0) -> list[Callable[[Any], Inputs]]:
        """How the first part of ``(inputs, labels)`` may go in; ``more`` follow it by position."""
        forward, need = self.forward, self.forward.fewest - more
        alone: list[Callable[[Any], Inputs]] = [lambda value: ([value], {})]
        fields = fields_of(first)
        if fields is not None and not isinstance(first, tuple):
            keywords = self._keywords(fields, None)
            if keywords is None:
                return alone
            self._left_out(set(fields) - set(keywords))
            return (
                [lambda value: ([], {k: v for k, v in value.items() if k in keywords})]
                if (isinstance(first, Mapping))
                else [lambda value: ([], {k: (fields_of(value) or {})[k] for k in keywords})]
            )
        ways = alone if need <= 1 else []
        if isinstance(first, list | tuple) and not is_array(first) and not is_text(first):
            if 1 < len(first) <= forward.most and need <= len(first):
                ways = [*ways, lambda value: (list(value), {})]
        if not ways:
            raise InputError(
                f"the model's forward takes {need} inputs ({', '.join(forward.positional)}), a "
                f"batch has 1 before its labels; {_WAY_OUT}"
            )
        return ways

    def _pair(self, batch: Sequence[Any]) -> list[Rule]:
        """``(inputs, labels)``."""
        fields, label = fields_of(batch[1]), ""
        if fields is not None:
            label = self._label_in(fields) or ""
            if not label:
                raise InputError(
                    f"the second part of a batch has keys {sorted(map(str, fields))}; one must be "
                    f"'labels' or 'label', or {_WAY_OUT}"
                )
            beside = [k for k in fields if k != label and k in self.forward.names]
            self._left_out(set(fields) - {label, *beside})
        takes_labels = fields is None and self.forward.takes_labels_at(1)

        def rule(way: Callable[[Any], Inputs]) -> Rule:
            def read(batch: Any) -> tuple[list[Any], dict[str, Any], Any]:
                args, kwargs = way(batch[0])
                if fields is not None:
                    found = fields_of(batch[1]) or {}
                    kwargs = kwargs | {k: found[k] for k in beside}
                    return args, kwargs, found[label]
                return [*args, batch[1]] if takes_labels else args, kwargs, batch[1]

            return Rule(read)

        more = len(beside) if fields is not None else 0
        if not takes_labels:
            return [rule(way) for way in self._inputs(batch[0], more)]
        # Or its last input has a name of labels, and is one of several in the first part.
        rules = [rule(way) for way in self._inputs(batch[0], 1)]
        first = batch[0]
        listed = isinstance(first, list | tuple) and not is_array(first) and not is_text(first)
        if listed and len(first) == self.forward.fewest:
            rules.append(Rule(lambda batch: (list(batch[0]), {}, batch[1])))
        return rules

    def _several(self, items: list[Any]) -> list[Rule]:
        """``(input, ..., labels, ...)``: where the labels are follows from the signature."""
        forward = self.forward
        if (rule := masked_tokens(items, forward)) is not None:
            return [rule]
        kept = list(range(len(items)))
        places = self._label_places(items, kept)
        if not places and any(is_text(item) for item in items):
            kept = [i for i in kept if not is_text(items[i])]
            places = self._label_places(items, kept)
        if not places:
            raise InputError(
                f"a batch has {len(items)} parts ({shown(items)}), the model's forward takes "
                f"{', '.join(forward.positional) or 'any inputs'}: none of them can be the labels "
                f"after the inputs; {_WAY_OUT}"
            )
        rules: list[Rule] = []
        for place in places:
            more = forward.takes_labels_at(1)
            ways = self._inputs(items[kept[0]], more) if place == 1 else [None]
            rules += [self._placed(len(items), kept, place, way) for way in ways]
        return rules

    def _label_places(self, items: list[Any], kept: list[int]) -> list[int]:
        forward = self.forward
        return [
            place
            for place in range(1, len(kept))
            if (forward.fewest <= place or forward.takes_labels_at(place))
            and place <= forward.most
            and is_array(items[kept[place]])
        ]

    def _placed(
        self, parts: int, kept: list[int], place: int, way: Callable[[Any], Inputs] | None
    ) -> Rule:
        takes_labels = self.forward.takes_labels_at(place)

        def read(batch: Any) -> tuple[list[Any], dict[str, Any], Any]:
            args: list[Any] = [batch[i] for i in kept[:place]]
            kwargs: dict[str, Any] = {}
            if way is not None:
                args, kwargs = way(batch[kept[0]])
            labels = batch[kept[place]]
            return [*args, labels] if takes_labels else args, kwargs, labels

        unused = tuple(i for i in range(parts) if i not in kept[: place + 1])
        return Rule(read, not unused, kept[place], unused)
