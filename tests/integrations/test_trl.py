"""TRL and PEFT: the adapters are trained, the base is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from runs import assert_equal, changed, weights
from tiny import counting, language_model, token_rows, tokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import dykaf
from dykaf.integrations.transformers import dykaf_optimizer

LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
OPTIONS: dict[str, Any] = {
    "learning_rate": 0.02,
    "weight_decay": 0.1,
    "max_steps": 6,
    "per_device_train_batch_size": 8,
    "report_to": "none",
    "disable_tqdm": True,
    "bf16": False,
    "use_cpu": True,
}


def sft(folder: Path, **options: Any) -> SFTTrainer:
    torch.manual_seed(0)  # of the adapters
    args = SFTConfig(str(folder), **{**OPTIONS, **options})
    return SFTTrainer(
        language_model(),
        args,
        train_dataset=Dataset.from_list(token_rows()),
        processing_class=tokenizer(),
        peft_config=LoraConfig(**LORA),
        optimizer_cls_and_kwargs=dykaf_optimizer(args),
    )


def assert_adapters_alone_changed(before: Any, after: Any) -> None:
    adapters = {name for name in before if "lora_" in name}
    assert len(adapters) == 28  # 7 linear layers in each of 2 blocks, two matrices each
    assert changed(before, after) == adapters


def test_sft_trains_the_adapters_that_trl_adds(tmp_path: Path) -> None:
    trainer = sft(tmp_path, save_strategy="no")
    before = weights(trainer.model)
    trainer.train()
    assert_adapters_alone_changed(before, weights(trainer.model))
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is dykaf.DyKAF
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert set(names) == {name for name in before if "lora_" in name}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}


def test_an_optimizer_made_before_the_adapters_trains_nothing(tmp_path: Path) -> None:
    """Why the recipe has the Trainer make it."""
    model = language_model()
    trainer = SFTTrainer(
        model,
        SFTConfig(str(tmp_path), **OPTIONS, save_strategy="no"),
        train_dataset=Dataset.from_list(token_rows()),
        processing_class=tokenizer(),
        peft_config=LoraConfig(**LORA),
        optimizers=(dykaf.DyKAF(dykaf.param_groups(model), lr=0.02), None),
    )
    before = weights(trainer.model)
    trainer.train()
    assert changed(before, weights(trainer.model)) == set()


def test_resumed_sft_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = sft(tmp_path / "whole", save_strategy="no")
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 2}
    sft(tmp_path / "parts", **saving).train()
    resumed = sft(tmp_path / "parts", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert_equal(weights(resumed.model), weights(whole.model))


def test_a_trainer_that_takes_no_such_argument(tmp_path: Path) -> None:
    """DPOTrainer, as GRPOTrainer: the attribute does."""
    args = DPOConfig(str(tmp_path), **OPTIONS, save_strategy="no")
    rows = [
        {"prompt": "w1 w2 w3", "chosen": f"w4 w{5 + idx % 3}", "rejected": f"w9 w{idx % 7}"}
        for idx in range(48)
    ]
    torch.manual_seed(0)
    trainer = DPOTrainer(
        language_model(),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=LoraConfig(**LORA),
    )
    trainer.optimizer_cls_and_kwargs = dykaf_optimizer(args)
    before = weights(trainer.model)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is dykaf.DyKAF
    assert_adapters_alone_changed(before, weights(trainer.model))


def test_peft_in_a_loop(tmp_path: Path) -> None:
    """Adapters and optimizer are saved and go on, to the bits of an uninterrupted run."""

    def make() -> tuple[Any, dykaf.DyKAF]:
        torch.manual_seed(0)
        model = get_peft_model(language_model(), LoraConfig(**LORA))
        return model, dykaf.DyKAF(dykaf.param_groups(model), lr=0.02)

    def train(model: Any, optimizer: dykaf.DyKAF, steps: range) -> None:
        for step in steps:
            tokens = counting(8, seed=step)
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, optimizer = make()
    before = weights(whole)
    train(whole, optimizer, range(8))
    assert_adapters_alone_changed(before, weights(whole))

    part, optimizer = make()
    train(part, optimizer, range(4))
    part.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    resumed, optimizer = make()
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    assert_equal(get_peft_model_state_dict(resumed), get_peft_model_state_dict(part))
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(resumed, optimizer, range(4, 8))
    assert_equal(weights(resumed), weights(whole))
