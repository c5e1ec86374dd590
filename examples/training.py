"""The training loop: batches, steps, validation, checkpoints, timing."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from checkpoint import load_checkpoint, save_checkpoint, write_json
from corpus import Corpus, load_corpus, sample_batch, validation_windows
from interrupt import InterruptGuard
from model import GPT
from optimizers import lr_factor, make_optimizer, optimizer_versions
from plot import draw_folder
from settings import Settings, UserError, first_difference
from tqdm import tqdm

EVAL_BATCH = 64
GRADIENT_CLIP = 1.0


class Interrupted(Exception):
    """The run was stopped by a signal after its checkpoint was written."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class Diverged(Exception):
    """The loss is no longer finite."""


@dataclasses.dataclass
class Progress:
    """What grows during a run and goes into its checkpoint.

    Seconds are those of training steps alone: validation, checkpoints and pictures do not count.
    """

    step: int = 0
    train_seconds: float = 0.0
    optimizer_seconds: float = 0.0
    curve: list[dict[str, float]] = dataclasses.field(default_factory=list)

    @property
    def optimizer_share(self) -> float:
        return self.optimizer_seconds / self.train_seconds if self.train_seconds else 0.0


class Trainer:
    """One run: model, optimizer, sampler and progress.

    Args:
        settings: checked settings.
        corpus: what to train on.

    Raises:
        UserError: the device is missing, dykaf cannot be imported, or the corpus is too short.
    """

    def __init__(self, settings: Settings, corpus: Corpus) -> None:
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: this torch sees no CUDA device")
        shortest = min(corpus.train.numel(), corpus.validation.numel())
        if settings.context >= shortest:
            raise UserError(f"--context must be below {shortest}, got {settings.context}")
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        self.corpus = corpus
        torch.manual_seed(settings.seed)
        model = GPT(settings.dim, settings.layers, settings.heads, settings.context)
        self.model = model.to(settings.device)
        self.optimizer = make_optimizer(settings.optimizer, self.model, settings)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.sampler = torch.Generator().manual_seed(settings.seed)
        windows = validation_windows(corpus.validation, settings.eval_windows, settings.context)
        self.eval_batches = windows.to(settings.device).split(EVAL_BATCH)
        self.progress = Progress()
        self.checkpoint_path = settings.out / f"{settings.run_name}.pt"
        self.json_path = settings.out / f"{settings.run_name}.json"

    def clock(self) -> float:
        """Seconds, after the work that was given to the device is done."""
        if self.settings.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def train_step(self) -> float:
        """One step; returns its training loss.

        Raises:
            Diverged: the loss is not finite; the weights have not been touched then.
        """
        settings, progress = self.settings, self.progress
        start = self.clock()
        windows = sample_batch(
            self.corpus.train, settings.batch, settings.context, self.sampler
        ).to(settings.device)
        loss = self.model.loss(windows)
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(f"loss is {value} at step {progress.step}; try a smaller --lr")
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_CLIP)
        factor = lr_factor(progress.step, settings)
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base_lr * factor
        before = self.clock()
        self.optimizer.step()
        end = self.clock()
        progress.step += 1
        progress.train_seconds += end - start
        progress.optimizer_seconds += end - before
        return value

    @torch.no_grad()
    def validate(self) -> float:
        """Validation loss on the fixed windows, appended to the curve.

        Raises:
            Diverged: the loss is not finite.
        """
        total = sum(self.model.loss(batch).item() * len(batch) for batch in self.eval_batches)
        loss = total / self.settings.eval_windows
        if not math.isfinite(loss):
            raise Diverged(
                f"validation loss is {loss} at step {self.progress.step}; try a smaller --lr"
            )
        self.progress.curve.append(
            {
                "step": self.progress.step,
                "train_seconds": self.progress.train_seconds,
                "val_loss": loss,
            }
        )
        return loss

    def save(self) -> None:
        """Write the checkpoint: all that the rest of the run depends on."""
        save_checkpoint(
            self.checkpoint_path,
            {
                "settings": self.settings.to_json(),
                "corpus_sha256": self.corpus.sha256,
                "versions": versions(),
                "num_threads": torch.get_num_threads(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "sampler": self.sampler.get_state(),
                "global_rng": torch.get_rng_state(),
                "progress": dataclasses.asdict(self.progress),
            },
        )

    def resume(self) -> None:
        """Continue from the run's checkpoint.

        Raises:
            UserError: there is none, it is damaged, or it is of a different run.
        """
        path = self.checkpoint_path
        saved = load_checkpoint(path)
        difference = first_difference(saved["settings"], self.settings)
        if difference is not None:
            raise UserError(f"checkpoint {path} is of another run: {difference}")
        if saved["corpus_sha256"] != self.corpus.sha256:
            raise UserError(f"checkpoint {path} was trained on another corpus (another Python?)")
        try:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.sampler.set_state(saved["sampler"])
            torch.set_rng_state(saved["global_rng"])
            self.progress = Progress(**saved["progress"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"checkpoint {path} does not fit this program: {reason}") from error
        if (saved["versions"], saved["num_threads"]) != (versions(), torch.get_num_threads()):
            tqdm.write("note: other versions or threads than before; the last bits may differ")

    def result(self) -> dict[str, Any]:
        """The run as plain values, for its JSON file."""
        settings, progress, corpus = self.settings, self.progress, self.corpus
        num_tokens = progress.step * settings.batch * settings.context
        return {
            "args": settings.to_json(),
            "finished": progress.step == settings.steps,
            "step": progress.step,
            "val_loss": progress.curve[-1]["val_loss"] if progress.curve else None,
            "train_seconds": progress.train_seconds,
            "optimizer_seconds": progress.optimizer_seconds,
            "optimizer_share": progress.optimizer_share,
            "tokens_per_second": num_tokens / progress.train_seconds if num_tokens else None,
            "num_parameters": sum(p.numel() for p in self.model.parameters()),
            "curve": progress.curve,
            "corpus": {
                "sha256": corpus.sha256,
                "num_files": corpus.num_files,
                "train_bytes": corpus.train.numel(),
                "validation_bytes": corpus.validation.numel(),
            },
            "versions": versions(),
            "machine": machine(settings.device),
        }

    def run(self) -> dict[str, Any]:
        """Train to the last step; the checkpoint, the JSON and the picture are in settings.out.

        Returns:
            What `result` returns.

        Raises:
            Interrupted: by a signal; the step in progress was finished and saved.
            Diverged: the loss is not finite.
        """
        settings, progress = self.settings, self.progress
        with (
            InterruptGuard() as guard,
            tqdm(
                total=settings.steps,
                initial=progress.step,
                desc=settings.optimizer,
                unit="step",
                disable=None,
                dynamic_ncols=True,
            ) as bar,
        ):
            if not progress.curve:
                self._report(bar, self.validate())
            while progress.step < settings.steps and guard.received is None:
                before = progress.train_seconds
                loss = self.train_step()
                speed = settings.batch * settings.context / (progress.train_seconds - before)
                bar.set_postfix_str(
                    f"loss {loss:.3f}, {speed:,.0f} tokens/s, "
                    f"optimizer {progress.optimizer_share:.0%}",
                    refresh=False,
                )
                bar.update()
                is_last = progress.step == settings.steps
                if progress.step % settings.eval_every == 0 or is_last:
                    self._report(bar, self.validate())
                if progress.step % settings.checkpoint_every == 0 and not is_last:
                    self.save()
            self.save()
            write_json(self.json_path, self.result())
            draw_folder(settings.out)
            if progress.step < settings.steps and guard.received is not None:
                raise Interrupted(
                    f"stopped after step {progress.step} of {settings.steps}, saved "
                    f"to {self.checkpoint_path}; the same command with --resume "
                    "continues",
                    guard.received,
                )
        return self.result()

    def _report(self, bar: Any, val_loss: float) -> None:
        bar.write(
            f"step {self.progress.step:>5}  validation {val_loss:.4f} nats/byte  "
            f"{self.progress.train_seconds:7.1f} s"
        )


def train(settings: Settings, *, resume: bool) -> dict[str, Any]:
    """Load the corpus, make or continue a run, and train it to its end.

    Args:
        settings: checked settings.
        resume: continue from the run's checkpoint instead of starting anew.

    Returns:
        The run as plain values, as in its JSON file.

    Raises:
        UserError, Interrupted, Diverged: see Trainer.
    """
    corpus = load_corpus()
    print(
        f"corpus: {corpus.num_files} files, {corpus.train.numel():,} + "
        f"{corpus.validation.numel():,} bytes, sha256 {corpus.sha256[:16]}"
    )
    settings.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(settings, corpus)
    if resume:
        trainer.resume()
        print(f"resumed {trainer.checkpoint_path} at step {trainer.progress.step}")
    else:
        # A picture must not show an older run of this name as if it were the new one.
        trainer.json_path.unlink(missing_ok=True)
    return trainer.run()


def versions() -> dict[str, str | None]:
    """Versions of what the result depends on."""
    return {"python": platform.python_version(), **optimizer_versions()}


def machine(device: str) -> dict[str, str | int | None]:
    """What the seconds depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "platform": platform.platform(),
        "cpu": cpu,
        "cpu_count": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }
