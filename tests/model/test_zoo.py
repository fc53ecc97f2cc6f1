"""A few models of bench/zoo.py, which has two hundred: heads of every kind that libraries have."""

from __future__ import annotations

import pytest
import zoo

SOME = [
    "timm/test_vit",
    "timm/test_resnet",
    "timm/deit_tiny_distilled_patch16_224",  # the mean of two heads
    "timm/levit_128s",  # the same, each behind a normalisation
    "timm/efficientvim_m1",  # a weighted sum of four
    "timm/volo_d1_224",  # a head, and what patches say is added
    "timm/resnetv2_50x1_bit",  # a 1x1 convolution on pooled features
    "torchvision/squeezenet1_1",  # a 1x1 convolution, rectified and pooled after it
    "torchvision/mobilenet_v3_small",
    "transformers/GPT2ForSequenceClassification",  # every token is scored, one is picked
    "transformers/BartForSequenceClassification",
    "transformers/BertForSequenceClassification",
    "transformers/DeiTForImageClassificationWithTeacher",
    "transformers/XLNetForSequenceClassification",
]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.filterwarnings("ignore")
def test_scores_of_real_architectures(name):
    pytest.importorskip(name.split("/")[0])
    row = zoo.score(name)
    assert row.outcome == "right", row


def test_the_zoo_fails_on_a_wrong_score():
    def rows(*outcomes):
        return [zoo.Row("m", outcome, 0.1, "fc", 0.0) for outcome in outcomes]

    assert zoo.exit_code(rows(*["right"] * 99, "refused")) == 0
    assert zoo.exit_code(rows(*["right"] * 99, "WRONG")) == 1
    assert zoo.exit_code(rows(*["right"] * 9, "refused")) == 1
    assert "98 right" in zoo.report(rows(*["right"] * 98, "WRONG", "refused"))
    assert len(zoo.names()) == len(set(zoo.names())) >= 150
