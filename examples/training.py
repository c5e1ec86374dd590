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
from checkpoint import write_json
from corpus import Corpus, load_corpus, sample_batch, validation_windows
from interrupt import InterruptGuard
from model import GPT
from optimizers import lr_factor, make_optimizer, optimizer_versions
from parallel import Alone, started
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
        parallel: how this process takes part.

    Raises:
        UserError: the device is missing, dykaf cannot be imported, or the corpus is too short.
    """

    def __init__(self, settings: Settings, corpus: Corpus, parallel: Alone) -> None:
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: this torch sees no CUDA device")
        shortest = min(corpus.train.numel(), corpus.validation.numel())
        if settings.context >= shortest:
            raise UserError(f"--context must be below {shortest}, got {settings.context}")
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        self.corpus = corpus
        self.parallel = parallel
        torch.manual_seed(settings.seed)
        model = GPT(settings.dim, settings.layers, settings.heads, settings.context)
        self.model = model.to(settings.device)
        self.network = parallel.wrap(self.model)
        self.optimizer = make_optimizer(
            settings.optimizer, self.model, settings, parallel.process_group
        )
        parallel.ready(self.optimizer)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.sampler = torch.Generator().manual_seed(settings.seed)
        windows = validation_windows(corpus.validation, settings.eval_windows, settings.context)
        self.eval_batches = parallel.part_of(windows).to(settings.device).split(EVAL_BATCH)
        self.progress = Progress()
        self.checkpoint_path = settings.out / f"{settings.run_name}.{parallel.suffix}"
        self.json_path = settings.out / f"{settings.run_name}.json"

    def clock(self) -> float:
        """Seconds, after the work that was given to the device is done."""
        if self.settings.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        """The model's loss, by way of what wraps it."""
        return GPT.loss(self.network, windows)

    def train_step(self) -> float:
        """One step; returns its training loss.

        Raises:
            Diverged: the loss is not finite; the weights have not been touched then.
        """
        settings, progress = self.settings, self.progress
        start = self.clock()
        # Drawn as a whole on each rank, so that the batch does not hang on their number.
        windows = sample_batch(self.corpus.train, settings.batch, settings.context, self.sampler)
        loss = self.loss(self.parallel.part_of(windows).to(settings.device))
        value = self.parallel.mean(loss.item())
        if not math.isfinite(value):
            raise Diverged(f"loss is {value} at step {progress.step}; try a smaller --lr")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_CLIP)
        factor = lr_factor(progress.step, settings)
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base_lr * factor
        before = self.clock()
        self.optimizer.step()
        end = self.clock()
        # Not between a forward and a backward pass, where FSDP2 has put whole parameters, without
        # these gradients, in the model.
        self.model.zero_grad(set_to_none=True)
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
        total = sum(self.loss(batch).item() * len(batch) for batch in self.eval_batches)
        loss = self.parallel.mean(total / sum(len(batch) for batch in self.eval_batches))
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
        facts = {
            "settings": self.settings.to_json(),
            "corpus_sha256": self.corpus.sha256,
            "versions": versions(),
            "num_threads": torch.get_num_threads(),
            "num_ranks": self.parallel.num_ranks,
            "progress": dataclasses.asdict(self.progress),
        }
        self.parallel.save(
            self.checkpoint_path, facts, self._random_states(), self.model, self.optimizer
        )

    def _random_states(self) -> dict[str, torch.Tensor]:
        return {"sampler": self.sampler.get_state(), "global_rng": torch.get_rng_state()}

    def resume(self) -> None:
        """Continue from the run's checkpoint.

        Raises:
            UserError: there is none, it is damaged, or it is of a different run.
        """
        path = self.checkpoint_path
        saved = self.parallel.read(path)
        difference = first_difference(saved["settings"], self.settings)
        if difference is not None:
            raise UserError(f"checkpoint {path} is of another run: {difference}")
        if saved["corpus_sha256"] != self.corpus.sha256:
            raise UserError(f"checkpoint {path} was trained on another corpus (another Python?)")
        try:
            states = self.parallel.restore(saved, self._random_states(), self.model, self.optimizer)
            self.sampler.set_state(states["sampler"])
            torch.set_rng_state(states["global_rng"])
            self.progress = Progress(**saved["progress"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"checkpoint {path} does not fit this program: {reason}") from error
        before = (saved["versions"], saved["num_threads"], saved.get("num_ranks", 1))
        if before != (versions(), torch.get_num_threads(), self.parallel.num_ranks):
            tqdm.write(
                "note: other versions, threads or ranks than before; the last bits may differ"
            )

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
            "machine": {**machine(settings.device), "num_ranks": self.parallel.num_ranks},
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
                disable=None if self.parallel.is_first else True,
                dynamic_ncols=True,
            ) as bar,
        ):
            if not progress.curve:
                self._report(bar, self.validate())
            received = self.parallel.agreed(guard.received)
            while progress.step < settings.steps and received is None:
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
                received = self.parallel.agreed(guard.received)
            self.save()
            if self.parallel.is_first:
                write_json(self.json_path, self.result())
                draw_folder(settings.out)
            if progress.step < settings.steps and received is not None:
                raise Interrupted(
                    f"stopped after step {progress.step} of {settings.steps}, saved "
                    f"to {self.checkpoint_path}; the same command with --resume "
                    "continues",
                    received,
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
    with started(settings) as parallel:
        corpus = load_corpus()
        print(
            f"corpus: {corpus.num_files} files, {corpus.train.numel():,} + "
            f"{corpus.validation.numel():,} bytes, sha256 {corpus.sha256[:16]}"
        )
        settings.out.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(settings, corpus, parallel)
        if resume:
            trainer.resume()
            print(f"resumed {trainer.checkpoint_path} at step {trainer.progress.step}")
        elif parallel.is_first:
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
