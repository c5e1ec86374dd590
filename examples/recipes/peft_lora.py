"""LoRA adapters of PEFT in a loop of one's own."""

from peft import LoraConfig, get_peft_model
from tiny import counting, language_model

import dykaf


def main() -> list[float]:
    model = get_peft_model(
        language_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    # After get_peft_model: the frozen weights are left out.
    optimizer = dykaf.DyKAF(dykaf.param_groups(model), lr=0.02)
    losses = []
    for tokens in counting(256).split(16) * 4:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print("losses:", *(f"{loss:.2f}" for loss in main()[::9]))
