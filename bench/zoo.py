"""Classifiers of timm, torchvision and transformers, scored through the one public call.

Every model has random weights and a small input; the truth is autograd of the model's own loss in
float64, one sample at a time, in the parameters of the layer that the model's library calls its
head. No score may be wrong, and at most one model in fifty may be refused.

    python bench/zoo.py            prints a table; exits with 1 on a wrong score
    python bench/zoo.py vit swin   only models whose name has one of these in it
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES, SAMPLES, DAMPING = 5, 5, 1e-2
# float32 features through deep networks of random weights: their own rounding is 1e-7 to 1e-5.
TOLERANCE = 1e-4
MOST_REFUSED = 0.02

TIMM = """
    halonet_h1 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 test_convnext
    cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny
    deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 densenet121 dla46x_c dpn48b
    edgenext_xx_small efficientformer_l1 efficientformerv2_s0 test_efficientnet efficientvim_m1
    efficientvit_b0 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8
    focalnet_tiny_srf gcvit_xxtiny ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224
    sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto inception_v3 lcnetv2_small
    levit_128s lowformer_b0 test_mambaout test_coatnet poolformerv2_s12 gmlp_ti16_224 lcnet_035
    mobilevit_xxs mvitv2_tiny nest_tiny test_nfnet pit_ti_224 pvt_v2_b0 rdnet_tiny regnetx_002
    repghostnet_050 repvit_m1 res2next50 resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42
    legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs
    swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224
    tnt_s_legacy_patch16_224 tresnet_m twins_svt_small visformer_tiny test_vit
    vit_tiny_r_s16_p8_224 test_vit_relpos vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw
    xcit_nano_12_p8_224 resnetv2_50x1_bit
""".split()
SIZES = {
    "halonet_h1": 256,
    "crossvit_tiny_240": 240,
    "efficientformer_l1": 224,
    "inception_v3": 96,
    "googlenet": 96,
}

# Name of the head's layer, by model.
TORCHVISION = {
    "alexnet": "classifier.6",
    "convnext_tiny": "classifier.2",
    "densenet121": "classifier",
    "efficientnet_b0": "classifier.1",
    "efficientnet_v2_s": "classifier.1",
    "googlenet": "fc",
    "inception_v3": "fc",
    "mnasnet0_5": "classifier.1",
    "mobilenet_v2": "classifier.1",
    "mobilenet_v3_small": "classifier.3",
    "regnet_x_400mf": "fc",
    "regnet_y_400mf": "fc",
    "resnet18": "fc",
    "resnet50": "fc",
    "shufflenet_v2_x0_5": "fc",
    "squeezenet1_0": "classifier.1",
    "squeezenet1_1": "classifier.1",
    "swin_t": "head",
    "swin_v2_t": "head",
    "wide_resnet50_2": "fc",
}
SIZES |= {"torchvision/alexnet": 64, "torchvision/inception_v3": 96}

IMAGES = {
    "classifier": """Beit ConvNext ConvNextV2 Cvt Data2VecVision DeiT Dinov2 Dinov2WithRegisters
        FocalNet IJepa MobileNetV1 MobileNetV2 MobileViT MobileViTV2 PoolFormer Pvt PvtV2 Segformer
        Swinv2 ViT ViTMSN""",
    "classifier.1": "Bit RegNet ResNet",
    "classifier.linear": "Levit",
    "fc": "HGNetV2 TextNet",
    "head+dist_head": "SwiftFormer",
    "cls_classifier+distillation_classifier": "DeiT...WithTeacher",
    "classifier.linear+classifier_distill.linear": "Levit...WithTeacher",
}
TEXTS = {
    "classifier": """Albert Bert CTRL Deberta DebertaV2 DistilBert Ernie EuroBert FNet Gte LayoutLM
        MegatronBert MobileBert ModernBert ModernBertDecoder NomicBert RemBert SqueezeBert Tapas
        Ultrabert""",
    "classifier.out_proj": """BigBird Camembert ConvBert Data2VecText Electra Esm IBert MPNet
        Nystromformer RoFormer Roberta RobertaPreLayerNorm XLMRoberta XLMRobertaXL Yoso""",
    "classification_head.out_proj": "Bart BigBirdPegasus MBart MT5 Mvp PLBart UMT5",
    "score": """Arcee BioGpt Bloom DiffLlama Doge Falcon GPT2 GPTBigCode GPTJ GPTNeoX Gemma Gemma2
        Glm Glm4 Helium JetMoe Llama Mistral Mpt Nemotron OPT Olmo Olmo2 OpenAIGPT Persimmon Phi
        Phi3 Qwen2 Qwen3 SmolLM3 StableLm Starcoder2""",
    "classifier.linear_out": "Funnel",
    "sequence_summary.summary": "Flaubert XLM",
    "logits_proj": "XLNet",
}
# Fields of configurations, where a configuration has them.
_WIDE = "hidden_size n_embd dim emb_dim d_model word_embed_proj_dim embedding_size"
_DEEP = """num_hidden_layers n_layer n_layers encoder_layers decoder_layers num_layers
    num_attention_heads num_key_value_heads n_head n_heads num_heads encoder_attention_heads
    decoder_attention_heads num_experts_per_tok"""
_INNER = """intermediate_size hidden_dim encoder_ffn_dim decoder_ffn_dim d_ff ffn_dim dff d_inner
    max_position_embeddings n_positions n_ctx"""
_HEADS = "head_dim d_kv d_head kv_channels"
TINY = {
    **dict.fromkeys(_WIDE.split(), 32),
    **dict.fromkeys(_DEEP.split(), 2),
    **dict.fromkeys(_INNER.split(), 64),
    **dict.fromkeys(_HEADS.split(), 16),
    **{"vocab_size": 100, "rotary_dim": 8, "num_local_experts": 4, "image_size": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0},
}


@dataclass(frozen=True)
class Case:
    """A model with a batch of its inputs, and the layers that its library calls the head."""

    model: nn.Module
    inputs: dict[str, Tensor]
    labels: Tensor
    heads: tuple[str, ...]

    def batch(self, rows: slice) -> Any:
        """As a data loader would give it."""
        if "x" in self.inputs:
            return self.inputs["x"][rows], self.labels[rows]
        return {k: v[rows] for k, v in self.inputs.items()} | {"labels": self.labels[rows]}


def names() -> list[str]:
    """Every model of the zoo as ``library/name``."""

    def of(table: dict[str, str], end: str) -> Iterator[str]:
        for models in table.values():
            for name in models.split():
                yield f"transformers/{name.replace('...', end) if '...' in name else name + end}"

    return [
        *(f"timm/{name}" for name in TIMM),
        *(f"torchvision/{name}" for name in TORCHVISION),
        *of(IMAGES, "ForImageClassification"),
        *of(TEXTS, "ForSequenceClassification"),
    ]


def build(name: str) -> Case:
    """The model of this name with random weights and small sizes, and its batch."""
    torch.manual_seed(0)
    library, model_name = name.split("/")
    make = {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers}[library]
    model, inputs, heads = make(model_name)
    with torch.no_grad():  # heads that start at zero would make every score alike
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return Case(model, inputs, torch.randint(CLASSES, (SAMPLES,)), tuple(heads))


def _timm(name: str) -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    import timm

    size = SIZES.get(name, 64)
    try:
        model = timm.create_model(name, pretrained=False, num_classes=CLASSES, img_size=size)
    except TypeError:  # a network for images of any size
        model = timm.create_model(name, pretrained=False, num_classes=CLASSES)
    found = model.get_classifier()
    heads = []
    for part in found if isinstance(found, tuple | list | nn.ModuleList) else [found]:
        inside = set(part.modules())
        linear = (nn.Linear, nn.Conv2d)
        heads += [k for k, m in model.named_modules() if m in inside and isinstance(m, linear)][-1:]
    return model, {"x": torch.randn(SAMPLES, 3, size, size)}, heads


def _torchvision(name: str) -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    from torchvision import models

    more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    size = SIZES.get(f"torchvision/{name}", SIZES.get(name, 64))
    model = models.get_model(name, weights=None, num_classes=CLASSES, **more)
    return model, {"x": torch.randn(SAMPLES, 3, size, size)}, [TORCHVISION[name]]


def _transformers(name: str) -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    import transformers

    transformers.logging.set_verbosity_error()
    short = name.replace("ForImageClassification", "...")
    short = short.replace("ForSequenceClassification", "")
    short = short[:-3] if short.endswith("...") else short
    image = "ForImage" in name
    table = IMAGES if image else TEXTS
    heads = next(head for head, models in table.items() if short in models.split()).split("+")
    cls = getattr(transformers, name)
    model = _tiny(cls, image)
    if image:
        size, channels = (
            getattr(model.config, "image_size", 64),
            getattr(model.config, "num_channels", 3),
        )
        size = size if isinstance(size, int) else 64
        return model, {"pixel_values": torch.randn(SAMPLES, channels, size, size)}, heads
    ids = torch.randint(3, 90, (SAMPLES, 12))
    ids[:, 9:] = 0
    if model.config.is_encoder_decoder:  # sequences end alike, as the model's own code wants it
        ids[:, 8] = 2
    else:
        ids[0, 7:] = 0
    inputs = {"input_ids": ids}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        inputs["attention_mask"] = (ids != 0).long()
    return model, inputs, heads


def _tiny(cls: Any, image: bool) -> nn.Module:
    """A model of a small configuration; fields that do not fit together are left out."""
    config_class = cls.config_class
    known = set(inspect.signature(config_class).parameters)
    for base in config_class.__mro__:
        known |= set(getattr(base, "__annotations__", {}))
    fields = {k: v for k, v in TINY.items() if k in known}
    if image:
        default = config_class()
        plain = isinstance(getattr(default, "hidden_size", None), int) and isinstance(
            getattr(default, "num_attention_heads", None), int
        )
        kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        fields = {k: v for k, v in fields.items() if k == "image_size" or (plain and k in kept)}
    error: Exception | None = None
    for left_out in ((), ("head_dim",), ("max_position_embeddings",)):
        try:
            config = config_class(**{k: v for k, v in fields.items() if k not in left_out})
            config.num_labels = CLASSES
            return cls(config)
        except Exception as failure:  # a configuration that its library refuses
            error = failure
    assert error is not None
    raise error


def truth(case: Case, dtype: torch.dtype = torch.float64) -> Tensor:
    """``- g_i^T (diag(mean g^2) + damping)^-1 mean g`` of the model's own loss, by autograd."""
    model = copy.deepcopy(case.model).to(dtype).eval().requires_grad_(False)
    modules = dict(model.named_modules())
    parameters = [p.requires_grad_() for head in case.heads for p in modules[head].parameters()]
    rows = []
    for i in range(SAMPLES):
        inputs = {
            k: v[i : i + 1].to(dtype) if v.is_floating_point() else v[i : i + 1]
            for k, v in case.inputs.items()
        }
        out = model(inputs["x"]) if "x" in inputs else model(**inputs).logits
        loss = F.cross_entropy(out, case.labels[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    g = torch.stack(rows).double()
    mean = g.mean(dim=0)
    return -(g @ (mean / (g.square().mean(dim=0) + DAMPING)))


@dataclass(frozen=True)
class Row:
    """One model's outcome; ``error`` is relative, NaN where it was refused."""

    name: str
    outcome: str
    error: float
    said: str
    seconds: float


def score(name: str) -> Row:
    """Score one model and compare."""
    import imu_fast as imu
    from imu_fast.errors import InputError, brief

    try:
        case = build(name)
        want = truth(case)
        if not bool(want.isfinite().all()):
            raise ValueError("its own loss has no finite gradient in float64")
    except Exception as failure:  # of the library, in this version of it
        return Row(name, "no truth", float("nan"), brief(failure, 80), 0.0)
    started = time.perf_counter()
    try:
        found = imu.influence_scores(case.model, [case.batch(slice(3)), case.batch(slice(3, None))])
    except InputError as refusal:
        return Row(name, "refused", float("nan"), str(refusal), time.perf_counter() - started)
    seconds = time.perf_counter() - started
    error = float((found.double() - want).norm() / want.norm())
    outcome = "right" if error < TOLERANCE else "WRONG"
    return Row(name, outcome, error, "+".join(case.heads), seconds)


def _quiet() -> None:
    """One worker among several, of which only the table is wanted."""
    warnings.filterwarnings("ignore")
    logging.getLogger("imu_fast").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def exit_code(rows: Sequence[Row]) -> int:
    """0 if no score is wrong and nearly every model was scored."""
    wrong = any(row.outcome == "WRONG" for row in rows)
    right = sum(row.outcome == "right" for row in rows)
    return int(wrong or right < (1 - MOST_REFUSED) * len(rows))


def report(rows: Sequence[Row]) -> str:
    """The table, and a line that sums it up."""
    lines = [f"{'model':58} {'outcome':8} {'rel. error':>10} {'seconds':>8}  head, or reason"]
    for r in rows:
        lines.append(f"{r.name:58} {r.outcome:8} {r.error:10.1e} {r.seconds:8.2f}  {r.said}")
    counts = {
        kind: sum(r.outcome == kind for r in rows)
        for kind in ("right", "WRONG", "refused", "no truth")
    }
    worst = max((r.error for r in rows if r.error == r.error), default=0.0)
    lines.append(
        f"{len(rows)} models: {counts['right']} right (largest relative error {worst:.1e}), "
        f"{counts['WRONG']} wrong, {counts['refused']} refused, {counts['no truth']} without truth"
    )
    return "\n".join(lines)


def main(wanted: Sequence[str]) -> int:
    """Run the zoo, print its table and return :func:`exit_code`."""
    chosen = [n for n in names() if not wanted or any(w.lower() in n.lower() for w in wanted)]
    workers = min(4, os.cpu_count() or 1)
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_quiet) as pool:
        rows = list(pool.map(score, chosen))
    print(report(rows))
    return exit_code(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
