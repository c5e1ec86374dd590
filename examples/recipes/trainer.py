"""The Trainer of transformers."""

import tempfile

from tiny import language_model, token_rows
from transformers import Trainer, TrainingArguments

from dykaf.integrations.transformers import DiagnosticsCallback, dykaf_optimizer


def main() -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            learning_rate=0.01,
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            max_steps=60,
            per_device_train_batch_size=16,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        )
        trainer = Trainer(
            language_model(),
            args,
            train_dataset=token_rows(),
            optimizer_cls_and_kwargs=dykaf_optimizer(args),
        )
        trainer.add_callback(DiagnosticsCallback(trainer, every_n_steps=20))
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    print("losses:", *(f"{loss:.2f}" for loss in main()))
