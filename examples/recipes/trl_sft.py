"""SFTTrainer of TRL, with adapters that it adds itself."""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import language_model, token_rows, tokenizer
from trl import SFTConfig, SFTTrainer

from dykaf.integrations.transformers import dykaf_optimizer


def main() -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder,
            learning_rate=0.02,
            max_steps=60,
            bf16=torch.cuda.is_available(),
            per_device_train_batch_size=16,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        )
        trainer = SFTTrainer(
            language_model(),
            args,
            train_dataset=Dataset.from_list(token_rows()),
            processing_class=tokenizer(),
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
            optimizer_cls_and_kwargs=dykaf_optimizer(args),
        )
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    print("losses:", *(f"{loss:.2f}" for loss in main()))
