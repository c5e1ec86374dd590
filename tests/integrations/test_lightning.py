"""Lightning: the Trainer with mixed precision, scaler and clipping, its callbacks, and Fabric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import MixedPrecision
from runs import assert_equal, changed, weights
from tiny import blobs, classifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dykaf
from dykaf.integrations.lightning import DiagnosticsCallback
from dykaf.integrations.metrics import Monitor, summarize

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

LR, CLIP, STEPS = 0.01, 0.05, 8
POINTS, LABEL = blobs(8 * STEPS)
BATCHES = list(zip(POINTS.split(8), LABEL.split(8), strict=True))


class Classifier(LightningModule):
    def __init__(self, amp_scaling: bool = False) -> None:
        super().__init__()
        self.model = classifier()
        self.amp_scaling = amp_scaling

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = dykaf.DyKAF(dykaf.param_groups(self.model), lr=LR)
        optimizer.amp_scaling = self.amp_scaling
        return optimizer


class Recorder(Logger):
    """What is logged at which step."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.logged.append((step, metrics))


def fit(
    module: LightningModule,
    folder: Path,
    data: Any = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(default_root_dir=folder, **{**defaults, **options})
    data = TensorDataset(POINTS, LABEL) if data is None else data
    trainer.fit(module, DataLoader(data, batch_size=8), ckpt_path=ckpt_path)
    return trainer


def scaler_plugin() -> MixedPrecision:
    """On a CPU Lightning makes bf16-mixed of "16-mixed"; a plugin of one's own is taken."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    return MixedPrecision("16-mixed", "cpu", scaler)


def by_hand(
    batches: list[tuple[Tensor, Tensor]] = BATCHES,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> nn.Module:
    model = classifier()
    optimizer = dykaf.DyKAF(dykaf.param_groups(model), lr=LR)
    scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
    for points, label in batches:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = nn.functional.cross_entropy(model(points), label)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        # In the optimizer's order, as Lightning sums the squares.
        params = [param for group in optimizer.param_groups for param in group["params"]]
        norm = nn.utils.clip_grad_norm_(params, CLIP)
        assert not norm <= CLIP
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_equals_a_loop_by_hand(precision: str, tmp_path: Path) -> None:
    """With clipping. "16-mixed" on a CPU is bf16-mixed, as Lightning says."""
    module = Classifier()
    fit(module, tmp_path, precision=precision, gradient_clip_val=CLIP)
    dtype = None if precision == "32-true" else torch.bfloat16
    assert_equal(weights(module.model), weights(by_hand(dtype=dtype)))


def test_scaler_with_clipping_equals_a_loop_by_hand(tmp_path: Path) -> None:
    """One batch overflows, which costs its step alone."""
    points = POINTS.clone()
    points[16] = 1e30
    module = Classifier()
    plugin = scaler_plugin()
    data = TensorDataset(points, LABEL)
    fit(module, tmp_path, data, plugins=[plugin], gradient_clip_val=CLIP)
    batches = list(zip(points.split(8), LABEL.split(8), strict=True))
    scaler = scaler_plugin().scaler
    assert_equal(weights(module.model), weights(by_hand(batches, torch.float16, scaler)))
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == 1024.0  # halved once, doubled once


def test_amp_scaling_is_refused_with_clipping_and_right_without(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(Classifier(True), tmp_path, plugins=[scaler_plugin()], gradient_clip_val=CLIP)
    finals = []
    for amp_scaling in (True, False):
        module = Classifier(amp_scaling)
        fit(module, tmp_path, plugins=[scaler_plugin()])
        finals.append(weights(module.model))
    assert_equal(*finals)
    assert changed(finals[0], weights(classifier())) == set(finals[0])


def test_checkpoint_goes_on_as_an_uninterrupted_run(tmp_path: Path) -> None:
    whole = Classifier()
    fit(whole, tmp_path, max_epochs=3)
    part = Classifier()
    trainer = fit(part, tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    resumed = Classifier()
    fit(resumed, tmp_path, max_epochs=3, ckpt_path=tmp_path / "part.ckpt")
    assert_equal(weights(resumed), weights(whole))


# ---- Callbacks -----------------------------------------------------------------------------------


class Listener(Callback):
    """What diagnostics say after each batch."""

    def __init__(self) -> None:
        self.said: dict[int, list[dict[str, float]]] = {}

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.said[trainer.global_step] = [
            summarize(optimizer.diagnostics())
            for optimizer in trainer.optimizers
            if isinstance(optimizer, dykaf.DyKAF)
        ]


@pytest.mark.parametrize(("accumulate", "due"), [(1, [3, 6]), (2, [3])])
def test_callback_logs_what_diagnostics_say(
    accumulate: int, due: list[int], tmp_path: Path
) -> None:
    loggers = [Recorder(), Recorder()]
    listener = Listener()
    module = Classifier()
    trainer = fit(
        module,
        tmp_path,
        logger=loggers,
        accumulate_grad_batches=accumulate,
        callbacks=[DiagnosticsCallback(every_n_steps=3), listener],
    )
    assert trainer.global_step == STEPS // accumulate
    for logger in loggers:
        logged = [(step, dict(report)) for step, report in logger.logged]
        assert [step for step, _ in logged] == due
        for step, report in logged:
            assert 0 < report.pop("dykaf/step_time_share") < 1
            assert report == {f"dykaf/{key}": x for key, x in listener.said[step][0].items()}
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


class TwoOptimizers(Classifier):
    """One of the first layer, one of the others, and one that is not DyKAF, in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.manual_backward(super().training_step(batch, _))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.SGD(self.model[5].parameters(), lr=0.1),
            dykaf.DyKAF(self.model[0].parameters()),
            dykaf.DyKAF(self.model[3].parameters()),
        ]


def test_callback_with_several_optimizers(tmp_path: Path) -> None:
    logger, listener = Recorder(), Listener()
    fit(TwoOptimizers(), tmp_path, logger=logger, callbacks=[DiagnosticsCallback(7), listener])
    # Three steps a batch: the first multiples of 7 are passed at 9, 15, 21, and 24 is the last.
    assert [step for step, _ in logger.logged] == [9, 9, 15, 15, 21, 21]
    for idx, (step, report) in enumerate(logger.logged):
        prefix = ("dykaf", "dykaf-1")[idx % 2]
        said = listener.said[step][idx % 2]
        assert report[f"{prefix}/update_rms_max"] == said["update_rms_max"]
        assert report[f"{prefix}/condition_max"] == said["condition_max"]


class Backbone(LightningModule):
    """As BackboneFinetuning wants it."""

    def __init__(self, is_named: bool) -> None:
        super().__init__()
        self.is_named = is_named
        layers = classifier()
        self.backbone, self.head = layers[:5], layers[5]

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = dykaf.param_groups(self)
        if not self.is_named:
            for group in groups:
                group["params"] = [param for _, param in group["params"]]
        return dykaf.DyKAF(groups, lr=LR)


@pytest.mark.parametrize("is_named", [False, True])
def test_backbone_finetuning(is_named: bool, tmp_path: Path) -> None:
    """It adds the backbone, without names, to an optimizer of the head after an epoch."""
    before = weights(Backbone(is_named))
    head = {"head.weight", "head.bias"}
    for num_epochs, expected in ((1, head), (2, set(before))):
        module = Backbone(is_named)
        finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
        trainer = fit(module, tmp_path, max_epochs=num_epochs, callbacks=[finetuning])
        assert changed(before, weights(module)) == expected
    state = trainer.optimizers[0].state
    assert {param for param in state if state[param]} == set(module.parameters())


# ---- Fabric --------------------------------------------------------------------------------------


def fabric_run(fabric: Fabric, steps: range, folder: Path, load: bool = False) -> Any:
    model = classifier()
    optimizer = dykaf.DyKAF(dykaf.param_groups(model), lr=LR)
    model, optimizer = fabric.setup(model, optimizer)
    saved = {"model": model, "optimizer": optimizer}
    if load:
        fabric.load(folder / "part.ckpt", saved)
    monitor = Monitor(optimizer)
    for step in steps:
        points, label = BATCHES[step]
        fabric.backward(nn.functional.cross_entropy(model(points), label))
        fabric.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()
    fabric.save(folder / "part.ckpt", saved)
    report = monitor.report()
    assert 0 < report.pop("dykaf/step_time_share") < 1
    assert report == {f"dykaf/{key}": x for key, x in summarize(optimizer.diagnostics()).items()}
    return model.module


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric_equals_a_loop_by_hand_and_goes_on(precision: str, tmp_path: Path) -> None:
    dtype = None if precision == "32-true" else torch.bfloat16
    expected = weights(by_hand(dtype=dtype))
    fabric = Fabric(accelerator="cpu", precision=precision)
    assert_equal(weights(fabric_run(fabric, range(STEPS), tmp_path)), expected)
    fabric_run(fabric, range(3), tmp_path)
    assert_equal(weights(fabric_run(fabric, range(3, STEPS), tmp_path, load=True)), expected)
