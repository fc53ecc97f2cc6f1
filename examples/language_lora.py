"""A causal language model forgets sequences by a LoRA adapter; its own weights stay.

python examples/language_lora.py
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import imu_fast as imu


def sentences(first: int, count: int) -> list[dict[str, torch.Tensor]]:
    """A batch of runs of numbers; the first four of each are the question."""
    rows = [(torch.arange(12) * (k + 1) + 3 * k) % 31 for k in range(first, first + count)]
    ids = torch.stack(rows)
    labels = ids.clone()
    labels[:, :4] = -100
    return [{"input_ids": ids, "labels": labels}]


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=31, num_attention_heads=2, **sizes))
    forget, retain = sentences(0, 4), sentences(4, 8)
    optimizer = torch.optim.Adam(llm.parameters(), lr=5e-3)
    for _ in range(120):
        for batch in (*forget, *retain):
            optimizer.zero_grad()
            llm(**batch).loss.backward()
            optimizer.step()
    print("scores:", imu.influence_scores(llm, forget))

    targets = ["q_proj", "v_proj"]
    adapted = get_peft_model(llm, LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))
    own = {name: p.detach().clone() for name, p in adapted.named_parameters() if "lora" not in name}
    before = imu.evaluate(adapted, retain)["accuracy"]
    stop = imu.StopRule(forget_loss=2.0)
    options = {"scope": "all", "optimizer": torch.optim.Adam, "lr": 1e-2, "retain": retain}
    result = imu.unlearn(adapted, forget, "npo", stop=stop, epochs=100, **options)
    after = imu.evaluate(adapted, retain)["accuracy"]
    print(result)
    print(f"retained sentences: accuracy {before:.2f} -> {after:.2f}")
    assert result.reached
    assert all(torch.equal(p, own[n]) for n, p in adapted.named_parameters() if n in own)
    # adapted.save_pretrained(folder) writes the adapter.


if __name__ == "__main__":
    main()
