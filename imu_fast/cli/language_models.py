"""A user's language model or text classifier: a folder of transformers, or of a PEFT adapter."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imu_fast.data.text import Task
from imu_fast.errors import InputError, brief, check_choice, check_installed

DTYPES = ("float64", "float32", "bfloat16", "float16")
_ADAPTER = "adapter_config.json"
# Task -> the class that loads it, and the table of those it loads.
_AUTO: dict[Task, tuple[str, str]] = {
    "classifier": (
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    "seq2seq": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
}
# What classes are called that transformers does not know.
_SUFFIXES: dict[str, Task] = {
    "ForSequenceClassification": "classifier",
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
}
# Models that count positions from behind their padding token.
_BEHIND_PADDING = ("roberta", "camembert", "longformer", "data2vec-text", "ibert", "mpnet")


@dataclass(frozen=True)
class Source:
    """What a user named as the model.

    Args:
        model: a folder with ``config.json`` and safetensors, or of a PEFT adapter.
        base: what an adapter is of; None: as its own config says.
        tokenizer: a folder; None: the model's, or else the base's.
        merge: an adapter into its base, so that there is none.
        dtype: of the weights; None: as stored.
        trust_remote_code: run the code that a folder brings.
    """

    model: Path
    base: Path | None = None
    tokenizer: Path | None = None
    merge: bool = False
    dtype: str | None = None
    trust_remote_code: bool = False
    device: str | torch.device = "cpu"


@dataclass
class LanguageModel:
    """A model as loaded.

    Attributes:
        task: what it does. adapter: whether it is a PEFT adapter on its base.
        described: one line.
    """

    model: nn.Module
    tokenizer: Any
    task: Task
    adapter: bool
    described: str

    @property
    def config(self) -> Any:
        """Of transformers."""
        return self.model.config

    @property
    def positions(self) -> int | None:
        """How long a text the model takes; None: nothing says."""
        config = self.config.get_text_config()
        if hasattr(config, "relative_attention_num_buckets"):  # T5, whose n_positions bind nothing
            return None
        for name in ("max_position_embeddings", "n_positions"):
            value = getattr(config, name, None)
            if isinstance(value, int) and value > 0:
                behind = any(kind in str(config.model_type) for kind in _BEHIND_PADDING)
                return value - (int(config.pad_token_id or 0) + 1 if behind else 0)
        return None


def _transformers() -> Any:
    check_installed("a model of text", "transformers", install="'imu_fast[text]'")
    import transformers

    return transformers


def _peft() -> Any:
    check_installed("an adapter", "peft", install="'imu_fast[text]'")
    import peft

    return peft


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without progress bars and hints; as it was afterwards."""
    said = _transformers().utils.logging
    bars, level = said.is_progress_bar_enabled(), said.get_verbosity()
    said.disable_progress_bar()
    said.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        said.set_verbosity(level)
        if bars:
            said.enable_progress_bar()


def is_adapter(folder: Path) -> bool:
    """Whether it holds a PEFT adapter; what else is there is not read."""
    return (folder / _ADAPTER).is_file()


def load(source: Source, *, trained: bool = False) -> LanguageModel:
    """Load a model and its tokenizer, without the network.

    Args:
        trained: whether an adapter is to be trained.

    Raises:
        InputError: it is no such folder, or what is in it cannot be loaded.
    """
    check_installed(f"model={str(source.model)!r}", "transformers", install="'imu_fast[text]'")
    if source.dtype is not None:
        check_choice("dtype", source.dtype, DTYPES)
    folder, shown = source.model, f"model={str(source.model)!r}"
    _check_folder(folder, shown)
    adapter = is_adapter(folder)
    if not adapter and (source.base is not None or source.merge):
        given = f"base={str(source.base)!r}" if source.base is not None else "merge"
        raise InputError(f"{given} is for a PEFT adapter, which {shown} is not; leave it out")
    base = folder
    if adapter:
        check_installed(f"{shown} is a PEFT adapter, which", "peft", install="'imu_fast[text]'")
        base = _base_of(source)
    with _quiet():
        model, task = _loaded(base, source, "base" if adapter else "model")
        if adapter:
            model = _with_adapter(model, source, trained)
        tokenizer = _tokenizer(source, base)
    model = model.to(source.device).eval()
    held = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    stored = "as stored" if source.dtype is None else "as asked"
    name = type(getattr(model, "get_base_model", lambda: model)()).__name__
    with_adapter = f" with the adapter {folder.name}" if adapter and not source.merge else ""
    count = sum(p.numel() for p in model.parameters())
    described = (
        f"model: {name}{with_adapter}, {count:,} parameters, {', '.join(held)} ({stored}), read "
        f"by transformers.{_AUTO[task][0]}"
    )
    return LanguageModel(model, tokenizer, task, adapter and not source.merge, described)


def _check_folder(folder: Path, shown: str) -> None:
    if not folder.is_dir():
        raise InputError(
            f"{shown} is no folder; nothing is downloaded here: save the model with "
            "save_pretrained(folder) and name that"
        )
    if not any((folder / name).is_file() for name in ("config.json", _ADAPTER)):
        raise InputError(f"{shown} has neither config.json nor {_ADAPTER}; name a saved model")


def _base_of(source: Source) -> Path:
    if source.base is not None:
        _check_folder(source.base, f"base={str(source.base)!r}")
        return source.base
    shown = f"model={str(source.model)!r}"
    try:
        found = json.loads((source.model / _ADAPTER).read_text("utf-8"))
        named = found["base_model_name_or_path"]
        wanted = [Path(named), source.model / named]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{shown}: {_ADAPTER} does not say its base ({brief(error, 100)}); pass --base FOLDER"
        ) from error
    there = [path for path in wanted if (path / "config.json").is_file()]
    if not there:
        raise InputError(
            f"{shown} is an adapter of {named!r}, which is no folder here; pass --base FOLDER"
        )
    return there[0]


def _loaded(folder: Path, source: Source, argument: str) -> tuple[nn.Module, Task]:
    transformers = _transformers()
    shown = f"{argument}={str(folder)!r}"
    if is_adapter(folder):  # which transformers would put on the model without a word
        raise InputError(f"{shown} holds an adapter itself ({_ADAPTER}); name the model alone")
    path = str(folder.resolve())  # which an adapter's config will name
    common = {"local_files_only": True, "trust_remote_code": source.trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(path, **common)
        task = _task_of(config, shown)
        dtype = "auto" if source.dtype is None else getattr(torch, source.dtype)
        model, report = getattr(transformers, _AUTO[task][0]).from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
            **common,
        )
    except InputError:
        raise
    except Exception as error:  # what the library, or the code that it runs, makes of the folder
        raise InputError(f"{shown} cannot be loaded: {_remedied(error)}") from error
    lost = {
        kind: sorted(map(str, report.get(kind, ())))[:3]
        for kind in ("missing_keys", "mismatched_keys", "error_msgs")
        if report.get(kind)
    }
    if lost:
        raise InputError(
            f"{shown}: the weights do not fit the config, and would be random: {lost}; save the "
            "whole model with save_pretrained"
        )
    return model, task


def _remedied(error: Exception) -> str:
    text = brief(error)
    if "trust_remote_code" in text or "custom code" in text:
        return (
            "it brings code of its own, which is not run unless you trust it: "
            "--trust-remote-code runs it"
        )
    if "safetensors" in text and isinstance(error, OSError):
        return f"{text} (weights are read from safetensors alone: save_pretrained writes them)"
    return text if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}"


def _task_of(config: Any, shown: str) -> Task:
    tables = _transformers().models.auto.modeling_auto
    named = list(getattr(config, "architectures", None) or [])
    for task, (_, table) in _AUTO.items():
        if set(named) & set(getattr(tables, table).values()):
            return task
    for suffix, task in _SUFFIXES.items():
        if any(name.endswith(suffix) for name in named):
            return task
    raise InputError(
        f"{shown}: config.json has architectures={named}, which is no causal or seq2seq language "
        "model and no sequence classifier; save the model that has its head"
    )


def _with_adapter(model: nn.Module, source: Source, trained: bool) -> nn.Module:
    try:
        made = _peft().PeftModel.from_pretrained(
            model,
            str(source.model),
            is_trainable=trained and not source.merge,
            autocast_adapter_dtype=False,
            local_files_only=True,
        )
        if not any(config.is_prompt_learning for config in made.peft_config.values()):
            return _merged(made) if source.merge else made
    except Exception as error:  # what the library makes of the folder
        raise InputError(
            f"model={str(source.model)!r}: the adapter does not load onto its base: {brief(error)}"
        ) from error
    raise InputError(
        f"model={str(source.model)!r}: an adapter of prompts, which puts own tokens before a "
        "text; pass one that changes layers, such as LoRA"
    )


def _merged(made: Any) -> nn.Module:
    """A model like any other, whose weights peft leaves frozen."""
    model: nn.Module = made.merge_and_unload()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model


def _tokenizer(source: Source, base: Path) -> Any:
    folders = [source.tokenizer] if source.tokenizer is not None else [source.model, base]
    files = ("tokenizer_config.json", "tokenizer.json", "vocab.txt", "spiece.model")
    there = [path for path in folders if any((path / name).is_file() for name in files)]
    if not there:
        argument = "model" if source.tokenizer is None else "tokenizer"
        raise InputError(
            f"{argument}={str(folders[0])!r} has no tokenizer (no tokenizer_config.json); pass "
            "--tokenizer FOLDER"
        )
    try:
        return _transformers().AutoTokenizer.from_pretrained(
            str(there[0]), local_files_only=True, trust_remote_code=source.trust_remote_code
        )
    except Exception as error:  # what the library makes of the folder
        raise InputError(
            f"the tokenizer of {str(there[0])!r} cannot be loaded: {_remedied(error)}; pass "
            "--tokenizer FOLDER"
        ) from error


def check_vocabulary(model: nn.Module, largest: int) -> None:
    """Raise InputError where the tokenizer has tokens that the model has not."""
    rows = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if largest >= rows:
        raise InputError(
            f"the tokenizer gives token {largest}, the model has {rows}; it is another model's: "
            "pass --tokenizer FOLDER"
        )


def save(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """``save_pretrained`` of both; of an adapter that alone."""
    with _quiet():
        model.save_pretrained(str(folder))  # type: ignore[operator]
        tokenizer.save_pretrained(str(folder))
