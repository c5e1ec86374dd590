"""The Trainer of transformers: its runs are those of a loop written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_equal, changed, groups_of, weights
from tiny import language_model, token_rows
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

import dykaf
from dykaf.integrations.metrics import summarize
from dykaf.integrations.transformers import DiagnosticsCallback, dykaf_optimizer

LR, WEIGHT_DECAY, STEPS = 0.02, 0.3, 8
Batch = dict[str, Tensor]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {
        "learning_rate": LR,
        "weight_decay": WEIGHT_DECAY,
        "max_steps": STEPS,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def make_trainer(
    args: TrainingArguments, model: nn.Module | None = None, groups: Any = None, **options: Any
) -> Trainer:
    """Whose collator keeps the batches, which are shuffled, in ``trainer.batches``."""
    batches: list[Batch] = []

    def collate(rows: list[dict[str, list[int]]]) -> Batch:
        batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
        batches.append(batch)
        return batch

    trainer = Trainer(
        language_model() if model is None else model,
        args,
        data_collator=collate,
        train_dataset=token_rows(),
        optimizer_cls_and_kwargs=dykaf_optimizer(args, groups=groups, **options),
    )
    trainer.batches = batches
    return trainer


def by_hand(batches: list[Batch], accumulate: int, weight_decay: float, **options: Any) -> Any:
    model = language_model()
    optimizer = dykaf.DyKAF(dykaf.param_groups(model), lr=LR, weight_decay=weight_decay, **options)
    schedule = get_scheduler("linear", optimizer, 2, STEPS)
    for step in range(STEPS):
        some = batches[step * accumulate : (step + 1) * accumulate]
        num_items = sum(batch["labels"][:, 1:].numel() for batch in some)
        for batch in some:
            model(**batch, num_items_in_batch=torch.tensor(num_items)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("accumulate", [1, 2])
def test_equals_a_loop_by_hand(accumulate: int, tmp_path: Path) -> None:
    args = arguments(tmp_path, gradient_accumulation_steps=accumulate)
    trainer = make_trainer(args, sides="both")
    trainer.train()
    assert trainer.state.global_step == STEPS
    expected = by_hand(trainer.batches, accumulate, WEIGHT_DECAY, sides="both")
    assert_equal(weights(trainer.model), weights(expected))
    other_decay = by_hand(trainer.batches, accumulate, 0.0, sides="both")
    other_sides = by_hand(trainer.batches, accumulate, WEIGHT_DECAY, sides="one")
    norms = {name for name in weights(expected) if "norm" in name}
    assert len(norms) == 5
    assert len(changed(weights(expected), weights(other_decay))) > len(norms)
    assert changed(weights(expected), weights(other_sides))


def test_groups_are_those_of_param_groups(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=1, lr_scheduler_type="constant", warmup_steps=0)
    trainer = make_trainer(args, groups={"adam_lr_ratio": 3.0, "adam": ["*.0.mlp.up_proj.weight"]})
    trainer.train()
    expected = dykaf.DyKAF(
        dykaf.param_groups(trainer.model, adam_lr_ratio=3.0, adam=["*.0.mlp.up_proj.weight"]),
        lr=LR,
        weight_decay=WEIGHT_DECAY,
    )
    keys = ("lr", "weight_decay", "max_precond_dim")
    found = groups_of(trainer.optimizer.optimizer, *keys)
    assert found == groups_of(expected, *keys)
    assert [group["lr"] for group in found] == [LR, 3 * LR, 3 * LR]
    assert [group["weight_decay"] for group in found] == [WEIGHT_DECAY, WEIGHT_DECAY, 0.0]
    assert "lm_head.weight" in found[1]["names"]
    assert "model.layers.0.mlp.up_proj.weight" in found[1]["names"]
    assert sum(len(group["names"]) for group in found) == len(weights(trainer.model))


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = make_trainer(arguments(tmp_path / "whole"))
    whole.train()
    saving = arguments(tmp_path / "parts", save_strategy="steps", save_steps=3)
    make_trainer(saving).train()
    resumed = make_trainer(saving, model=language_model(seed=7))
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert len(resumed.state.log_history) > 0
    assert_equal(weights(resumed.model), weights(whole.model))
    states = [trainer.optimizer.state_dict()["state"] for trainer in (resumed, whole)]
    for place, state in states[1].items():
        assert_equal(states[0][place], state)
    assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]


def test_arguments_are_read_when_training_starts(tmp_path: Path) -> None:
    """As a hyperparameter search needs, which changes them after the Trainer is made."""
    args = arguments(tmp_path, max_steps=1)
    trainer = Trainer(
        args=args,
        model_init=lambda: language_model(),
        train_dataset=token_rows(),
        data_collator=lambda rows: {
            key: torch.tensor([row[key] for row in rows]) for key in rows[0]
        },
        optimizer_cls_and_kwargs=dykaf_optimizer(args),
    )
    for learning_rate in (0.5, 0.25):
        trainer.args.learning_rate = learning_rate
        trainer.train()
        assert trainer.optimizer.param_groups[0]["initial_lr"] == learning_rate


class Recorder(TrainerCallback):
    """What diagnostics say after each step."""

    def __init__(self) -> None:
        self.said: dict[int, dict[str, float]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.said[state.global_step] = summarize(kwargs["optimizer"].optimizer.diagnostics())


def test_callback_logs_what_diagnostics_say(tmp_path: Path) -> None:
    trainer = make_trainer(arguments(tmp_path, logging_steps=2))
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.add_callback(DiagnosticsCallback(trainer, every_n_steps=3))
    trainer.train()
    history = trainer.state.log_history
    reports = {log["step"]: log for log in history if "dykaf/staleness_max" in log}
    assert list(reports) == [3, 6]
    for step, report in reports.items():
        assert 0 < report["dykaf/step_time_share"] < 1
        for name, value in recorder.said[step].items():
            assert report[f"dykaf/{name}"] == value
    # Step 6 logs both: a report does not stand in for the loss.
    assert [log["step"] for log in history if "loss" in log] == [2, 4, 6, 8]
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks
