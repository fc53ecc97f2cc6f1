"""The contract of open-unlearning's trainers, and nothing more: for where there is no checkout."""

from __future__ import annotations

import torch
from transformers import Trainer

TRAINER_REGISTRY: dict[str, type] = {}


def _register_trainer(trainer_class):
    TRAINER_REGISTRY[trainer_class.__name__] = trainer_class


class FinetuneTrainer(Trainer):
    """Two more keywords than a Trainer's; evaluates by its evaluators, where it has some."""

    def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", trial=None):
        if self.evaluators:
            metrics = {}
            for evaluator in self.evaluators.values():
                metrics.update(evaluator.evaluate(model=self.model))
            self.log(metrics)
            return metrics
        if eval_dataset is None:
            return {}
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)


class UnlearnTrainer(FinetuneTrainer):
    """What unlearning trainers override is ``compute_loss``; predictions are the base's."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return loss.mean().detach(), None if prediction_loss_only else outputs.logits, None


class ForgetRetainDataset(torch.utils.data.Dataset):
    """A forget item, and a retain one drawn at random where there are any."""

    def __init__(self, forget, retain, anchor="forget"):
        assert anchor == "forget"
        self.forget, self.retain = forget, retain

    def __len__(self):
        return len(self.forget)

    def __getitem__(self, index):
        item = {"forget": self.forget[index]}
        if self.retain:
            item["retain"] = self.retain[int(torch.randint(0, len(self.retain), (1,)))]
        return item


def collate(instances, pad=0):
    """Padded on the right, for each of the sets; the mask is boolean, labels are not shifted."""
    if "input_ids" not in instances[0]:
        return {key: collate([item[key] for item in instances], pad) for key in instances[0]}

    def padded(key, value):
        rows = [item[key] for item in instances]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    ids = padded("input_ids", pad)
    batch = {"input_ids": ids, "attention_mask": ids.ne(pad), "labels": padded("labels", -100)}
    if "index" in instances[0]:
        batch["index"] = torch.tensor([item["index"] for item in instances])
    return batch
