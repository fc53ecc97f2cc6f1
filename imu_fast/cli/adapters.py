"""LoRA: an adapter that is trained in the place of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from imu_fast.cli.language_models import LanguageModel
from imu_fast.errors import InputError, brief, check_count, check_installed, check_positive

_TYPES = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classifier": None}
_WRITE = "write r=8,alpha=16,target=q_proj|v_proj, each optional, or default"


@dataclass(frozen=True)
class Lora:
    """What ``--lora`` says.

    Args:
        r: rank. alpha: the adapter's output counts alpha / r. target: ends of layers' names; None:
            peft's own for this architecture, or else all linear layers but the head.
    """

    r: int = 8
    alpha: float = 16.0
    target: tuple[str, ...] | None = None

    @classmethod
    def of(cls, text: str) -> Lora:
        """Out of ``r=8,alpha=16,target=q_proj|v_proj``, or ``default``.

        Raises:
            InputError: it is not that, or peft is missing.
        """
        check_installed(f"lora={text!r}", "peft", install="'imu_fast[text]'")
        found: dict[str, Any] = {}
        for entry in [] if text.strip() == "default" else text.split(","):
            name, equals, value = (part.strip() for part in entry.partition("="))
            if not equals or name not in ("r", "alpha", "target") or name in found or not value:
                raise InputError(f"lora={text!r}: {entry.strip()!r} is unknown or twice; {_WRITE}")
            if name == "target":
                found[name] = tuple(part.strip() for part in value.split("|"))
                continue
            try:
                found[name] = int(value) if name == "r" else float(value)
            except ValueError:
                raise InputError(
                    f"lora={text!r}: {name}={value!r} is no number; {_WRITE}"
                ) from None
        made = cls(**found)
        check_count("lora: r", made.r)
        check_positive("lora: alpha", made.alpha)
        return made

    def put_on(self, made: LanguageModel, layers: list[str] | None, seed: int) -> None:
        """Wrap the model; only the adapter is trained from then on.

        Args:
            layers: names of linear layers, in the place of ``target``.
            seed: of its first factor (the second is zero, so the model is as it was).

        Raises:
            InputError: a target that no linear layer is, or peft has none for this model.
        """
        check_installed("lora", "peft", install="'imu_fast[text]'")
        import peft

        modules = dict(made.model.named_modules())
        there = [name for name, module in modules.items() if _adaptable(module)]
        for target in self.target or ():
            if not any(name == target or name.endswith(f".{target}") for name in there):
                raise InputError(
                    f"lora: target={target!r} ends no linear layer's name; one is {there[-1]!r}"
                )
        wanted: Any = layers if layers is not None else self.target
        if wanted is None:
            known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
            wanted = known.get(made.config.model_type, "all-linear")
        config = peft.LoraConfig(
            task_type=_TYPES[made.task],
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # a fraction is fine
            target_modules=wanted if isinstance(wanted, str) else list(wanted),
            fan_in_fan_out=any(type(modules[name]).__name__ == "Conv1D" for name in there),
            base_model_name_or_path=str(getattr(made.config, "_name_or_path", "")) or None,
        )
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                made.model = peft.get_peft_model(
                    made.model, config, autocast_adapter_dtype=False
                ).eval()
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise InputError(f"lora: {brief(error)}; name layers by target=") from error
        made.adapter = True


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
