"""Importance of libraries' models."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from importance_truth import C, N, T, check
from torch.nn import functional as F

import imu_fast as imu


def test_libraries_models():
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    tv = pytest.importorskip("torchvision").models
    x, y = torch.randn(N, 3, 32, 32), torch.randint(C, (N,))
    check(tv.resnet18(num_classes=C), x, y)
    check(tv.VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=C), x, y)
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=C, img_size=32, depth=2, init_values=0.1
    )
    check(vit, x, y)
    config = transformers.GPT2Config(
        n_layer=2,
        n_embd=32,
        n_head=2,
        vocab_size=50,
        n_positions=16,
        bos_token_id=1,
        eos_token_id=2,
    )
    ids = torch.randint(50, (N, T))
    check(transformers.GPT2LMHeadModel(config), ids, ids.roll(-1, 1), reading={"shift": False})


ARCHITECTURES = [
    *(
        f"timm/{name}"
        for name in """test_resnet test_vit test_convnext test_efficientnet test_nfnet test_mambaout
        test_vit_relpos lcnet_035 starnet_s050""".split()
    ),
    "torchvision/squeezenet1_1",
    "transformers/ViTForImageClassification",
    *(
        f"transformers/{name}ForSequenceClassification"
        for name in """Albert Bart Bert Bloom ConvBert DebertaV2 FNet Funnel GPT2 Gemma2 Helium
        JetMoe Llama Mistral OPT Qwen3 XLNet""".split()
    ),
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name):
    """In float32 and float64, whether by rules or one sample at a time."""
    pytest.importorskip(name.split("/")[0])
    case = zoo.build(name)
    model = copy.deepcopy(case.model).double().eval().requires_grad_()
    want = {k: torch.zeros_like(p) for k, p in model.named_parameters()}
    for i in range(zoo.SAMPLES):
        inputs = {k: cast(v[i : i + 1], torch.float64) for k, v in case.inputs.items()}
        out = model(inputs["x"]) if "x" in inputs else model(**inputs).logits
        loss = F.cross_entropy(out, case.labels[i : i + 1])
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        for total, g in zip(want.values(), found, strict=True):
            if g is not None:
                total.addcmul_(g, g, value=1 / zoo.SAMPLES)
    largest = max(float(value.norm()) for value in want.values())
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        inputs = {k: cast(v, dtype) for k, v in case.inputs.items()}
        run = zoo.Case(copy.deepcopy(case.model).to(dtype), inputs, case.labels, case.heads)
        found = imu.parameter_importance(
            run.model, [run.batch(slice(3)), run.batch(slice(3, None))]
        )
        assert list(found) == list(want)
        for key, value in want.items():
            error = float((found[key].double() - value).norm())
            assert error < tolerance * max(float(value.norm()), 1e-9 * largest), (key, dtype)


def cast(tensor, dtype):
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
