"""A transformers.Trainer that forgets, down to a depth, with retain data beside it.

python examples/transformers_trainer.py
"""

from __future__ import annotations

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from imu_fast.integrations.transformers import StopAtDepth, UnlearningTrainer, forget_depth


def sentences(first: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Runs of numbers, as a causal model's collator gives them: labels are the inputs."""
    rows = [(torch.arange(10) * (k + 1) + 3 * k) % 31 for k in range(first, first + count)]
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def stack(items):
    """A batch; of pairs a batch of each set."""
    if "input_ids" in items[0]:
        return {key: torch.stack([item[key] for item in items]) for key in items[0]}
    return {name: stack([item[name] for item in items]) for name in items[0]}


def main() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=31, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    )
    forget, retain = sentences(0, 4), sentences(4, 12)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(**stack(forget + retain)).loss.backward()
        optimizer.step()

    pairs = [{"forget": forget[k % 4], "retain": retain[k]} for k in range(12)]
    stop = StopAtDepth([stack(forget)], forget_loss=2.0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = UnlearningTrainer(
            model=model,
            args=TrainingArguments(
                folder,
                per_device_train_batch_size=4,
                num_train_epochs=50,
                learning_rate=1e-3,
                remove_unused_columns=False,
                report_to=[],
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=pairs,
            data_collator=stack,
            callbacks=[stop],
            objective="simnpo",
            layers=["lm_head"],
        )
        trainer.train()
    for name, items in (("forget", forget), ("retain", retain)):
        loss, accuracy = forget_depth(model, [stack(items)])
        print(f"{name}: loss {loss:.3f}, accuracy {accuracy:.2f}")
    print(
        f"stopped after {stop.records[-1][0]} steps, weights of the last batch: {trainer.weights}"
    )
    assert stop.reached


if __name__ == "__main__":
    main()
