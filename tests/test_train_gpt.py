"""The example under examples/: exact resume, interrupts, files, and one-line errors.

Models are tiny here; what is tested is the machinery, not the losses.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import checkpoint as checkpoint_module  # noqa: E402
import corpus as corpus_module  # noqa: E402
import demo  # noqa: E402
import optimizers  # noqa: E402
import plot  # noqa: E402
import settings as settings_module  # noqa: E402
import sweep  # noqa: E402
import train_gpt  # noqa: E402
import training  # noqa: E402

HAS_DYKAF = importlib.util.find_spec("dykaf") is not None
NAMES = [
    pytest.param("dykaf", marks=pytest.mark.skipif(not HAS_DYKAF, reason="dykaf is not built")),
    "adamw",
    "muon",
]
ADAMW = ("--optimizer", "adamw", "--lr", "4e-3")
SMALL = {"dim": 16, "layers": 2, "heads": 2, "context": 16, "batch": 2, "eval_windows": 4}


def make_settings(out: Path, optimizer: str, **changes: Any) -> settings_module.Settings:
    values = {
        **SMALL,
        "steps": 24,
        "warmup": 4,
        "lr": 4e-3,
        "eval_every": 8,
        "precondition_frequency": 3,
        **changes,
    }
    return settings_module.Settings(optimizer=optimizer, out=out, **values)


def command_line(out: Path, *extra: str) -> list[str]:
    small = [
        part
        for name, value in SMALL.items()
        for part in ("--" + name.replace("_", "-"), str(value))
    ]
    return ["--out", str(out), *small, *extra]


def run_command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "train_gpt.py"), *args],
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_same_bits(a: Any, b: Any, path: str = "") -> None:
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, path
        same = a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))
        assert same, f"{path}: bits differ"
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same_bits(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{path}/{index}")
    else:
        assert a == b, path


def trajectory_of(path: Path) -> dict[str, Any]:
    """A checkpoint without its seconds and its folder, which are no part of the trajectory."""
    content = checkpoint_module.load_checkpoint(path)
    progress = content["progress"]
    return {
        "state": {key: content[key] for key in ("model", "optimizer", "sampler", "global_rng")},
        "step": progress["step"],
        "curve": [(point["step"], point["val_loss"]) for point in progress["curve"]],
    }


def interrupt_during_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let a real SIGINT arrive inside the optimizer, in the middle of a step."""
    make = optimizers.make_optimizer

    def make_interrupting(*args: Any) -> Any:
        optimizer = make(*args)
        inner, calls = optimizer.step, [0]

        def step_then_signal() -> None:
            calls[0] += 1
            if calls[0] == step:
                os.kill(os.getpid(), signal.SIGINT)
            inner()

        optimizer.step = step_then_signal
        return optimizer

    monkeypatch.setattr(training, "make_optimizer", make_interrupting)


@pytest.mark.parametrize("stop", [1, 10])
@pytest.mark.parametrize("name", NAMES)
def test_interrupt_and_resume_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stop: int
) -> None:
    whole, parts = (make_settings(tmp_path / side, name) for side in ("whole", "parts"))
    result = training.train(whole, resume=False)
    assert result["finished"] and result["step"] == 24
    with monkeypatch.context() as patch:
        interrupt_during_step(patch, stop)
        with pytest.raises(training.Interrupted) as caught:
            training.train(parts, resume=False)
    assert caught.value.signal_number == signal.SIGINT
    file = f"{parts.run_name}.pt"
    assert trajectory_of(parts.out / file)["step"] == stop  # the step was finished, then saved
    torch.manual_seed(987)  # the new process' generators are elsewhere
    resumed = training.train(parts, resume=True)
    assert_same_bits(trajectory_of(whole.out / file), trajectory_of(parts.out / file))
    assert resumed["val_loss"] == result["val_loss"]


def test_handlers_are_restored(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    training.train(make_settings(tmp_path, "adamw", steps=2), resume=False)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("name", NAMES)
def test_loss_falls(tmp_path: Path, name: str) -> None:
    result = training.train(make_settings(tmp_path, name, steps=60), resume=False)
    curve = [point["val_loss"] for point in result["curve"]]
    assert 5.3 < curve[0] < 5.9  # near log(256)
    assert curve[-1] < curve[0] - 0.5


def test_ctrl_c_of_the_command(tmp_path: Path) -> None:
    args = command_line(tmp_path, *ADAMW, "--steps", "100000", "--warmup", "2", "--eval-every", "5")
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "train_gpt.py"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step    10"):
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr and "--resume" in stderr
    content = checkpoint_module.load_checkpoint(tmp_path / "adamw-lr0.004-seed0.pt")
    assert content["progress"]["step"] >= 10
    assert json.loads((tmp_path / "adamw-lr0.004-seed0.json").read_text())["finished"] is False


def test_files_of_a_run(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, "adamw", seed=3)
    training.train(settings, resume=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adamw-lr0.004-seed3.json",
        "adamw-lr0.004-seed3.pt",
        plot.PICTURE,
    ]
    run = json.loads((tmp_path / "adamw-lr0.004-seed3.json").read_text())
    assert [point["step"] for point in run["curve"]] == [0, 8, 16, 24]
    assert run["args"]["seed"] == 3 and len(run["corpus"]["sha256"]) == 64
    assert run["versions"]["torch"] == torch.__version__ and run["machine"]["cpu"]
    assert 0 < run["optimizer_share"] < 1 and run["tokens_per_second"] > 0
    assert (tmp_path / plot.PICTURE).read_bytes().startswith(b"\x89PNG")
    torch.load(tmp_path / "adamw-lr0.004-seed3.pt", weights_only=True)


@pytest.mark.parametrize(
    "args, reason",
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--lr", "-1"], "--lr must be positive and finite"),
        (["--lr", "nan"], "--lr must be positive and finite"),
        (["--optimizer", "sgd"], "invalid choice: 'sgd'"),
        (["--dim", "30", "--heads", "4"], "--dim must be a multiple of 2 * --heads = 8, got 30"),
        (["--warmup", "400"], "--warmup must be at most --steps = 300, got 400"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--optimizer", "adamw", "--resume"], "no checkpoint to resume from"),
        (["--optimizer", "adamw", "--context", "100000000"], "--context must be below"),
    ],
)
def test_bad_arguments_give_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], reason: str
) -> None:
    try:
        code = train_gpt.main(["--out", str(tmp_path / "out"), *args])
    except SystemExit as exit_:
        code = exit_.code
    stderr = capsys.readouterr().err
    assert code == 2
    assert reason in stderr and len(stderr.splitlines()) == 1


def test_out_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert train_gpt.main(["--out", str(tmp_path / "file")]) == 2
    assert "--out must be a folder" in capsys.readouterr().err


def test_damaged_checkpoints_give_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = command_line(tmp_path, *ADAMW, "--steps", "4")
    assert train_gpt.main(args) == 0
    path = tmp_path / "adamw-lr0.004-seed0.pt"
    good = path.read_bytes()
    flips = [len(good) * part // 10 for part in range(10)]
    damaged = [good[: len(good) // 2], b"", b"not a checkpoint"]
    damaged += [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in flips]
    capsys.readouterr()
    num_refused = 0
    for data in damaged:
        path.write_bytes(data)
        code = train_gpt.main([*args, "--resume"])
        stderr = capsys.readouterr().err
        # A flipped bit in the padding between the records of the file changes nothing in it.
        if code == 0:
            continue
        num_refused += 1
        assert code == 2 and "damaged" in stderr, stderr
        assert len(stderr.splitlines()) == 1
    assert num_refused >= 8
    path.write_bytes(good)
    with pytest.raises(TypeError, match="cannot hold a set"):
        checkpoint_module.save_checkpoint(path, {"a": {1}})
    assert path.read_bytes() == good
    torch.save({"other": 1}, path)
    assert train_gpt.main([*args, "--resume"]) == 2
    assert "not of this program" in capsys.readouterr().err


def test_damaged_checkpoint_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "adamw-lr0.004-seed0.pt").write_bytes(b"PK\x03\x04 torn")
    done = run_command(*command_line(tmp_path, *ADAMW, "--steps", "4", "--resume"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_resume_refuses_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = command_line(tmp_path, *ADAMW)
    assert train_gpt.main([*args, "--steps", "4", "--warmup", "1"]) == 0
    assert train_gpt.main([*args, "--steps", "8", "--warmup", "1", "--resume"]) == 2
    assert "is of another run: --steps 4, got 8" in capsys.readouterr().err


def test_divergence_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = command_line(tmp_path, *ADAMW, "--steps", "6", "--checkpoint-every", "2")
    loss, calls = training.GPT.loss, [0]

    def loss_then_nan(self: Any, windows: torch.Tensor) -> torch.Tensor:
        calls[0] += self.training and torch.is_grad_enabled()
        return loss(self, windows) * (float("nan") if calls[0] == 4 else 1.0)

    monkeypatch.setattr(training.GPT, "loss", loss_then_nan)
    assert train_gpt.main(args) == 3
    assert "loss is nan at step 3" in capsys.readouterr().err
    assert trajectory_of(tmp_path / "adamw-lr0.004-seed0.pt")["step"] == 2


def test_write_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "file"
    checkpoint_module.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file: Any) -> None:
        file.write(b"ne")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        checkpoint_module.write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_corpus_is_fixed_and_split_by_file() -> None:
    corpus = corpus_module.load_corpus()
    corpus_module.load_corpus.cache_clear()
    again = corpus_module.load_corpus()
    assert corpus.sha256 == again.sha256 and torch.equal(corpus.train, again.train)
    share = corpus.validation.numel() / (corpus.train.numel() + corpus.validation.numel())
    assert 0.02 < share < 0.3
    windows = corpus_module.validation_windows(corpus.validation, 7, 16)
    assert windows.shape == (7, 17)
    assert windows[0, 0] == corpus.validation[0] and windows[-1, -1] == corpus.validation[-1]


def test_corpus_leaves_out_tests_and_build_files(tmp_path: Path) -> None:
    for name in (
        "a.py",
        "b/c.py",
        "test/d.py",
        "b/tests/e.py",
        "site-packages/f.py",
        "config-3.11/g.py",
        "_sysconfigdata_x.py",
        "h.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert corpus_module.list_files(tmp_path) == ["a.py", "b/c.py"]
    with pytest.raises(settings_module.UserError, match="no Python source"):
        corpus_module.load_corpus(tmp_path / "test" / "nothing")


def test_default_model_has_the_size_that_the_docs_name() -> None:
    base = settings_module.Settings()
    model = training.GPT(base.dim, base.layers, base.heads, base.context)
    assert sum(parameter.numel() for parameter in model.parameters()) == 853_120


def test_model_is_causal() -> None:
    torch.manual_seed(0)
    model = training.GPT(16, 2, 2, 12)
    tokens = torch.randint(256, (1, 12))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 256
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_optimized_once(tmp_path: Path, name: str) -> None:
    settings = make_settings(tmp_path, name)
    model = training.GPT(16, 2, 2, 16)
    groups = optimizers.make_optimizer(name, model, settings).param_groups
    seen = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(seen) == sorted(id(parameter) for parameter in model.parameters())
    for group in groups:
        is_vector = all(parameter.ndim < 2 for parameter in group["params"])
        assert group["weight_decay"] == (0.0 if is_vector else settings.weight_decay)
        to_adamw = name == "dykaf" and group["max_precond_dim"] == 0
        assert group["lr"] == settings.lr * (2 if to_adamw else 1)


@pytest.mark.skipif(not HAS_DYKAF, reason="dykaf is not built")
def test_dykaf_leaves_embedding_and_head_to_adamw(tmp_path: Path) -> None:
    model = training.GPT(16, 2, 2, 16)
    optimizer = optimizers.make_optimizer("dykaf", model, make_settings(tmp_path, "dykaf"))
    to_adamw = {
        id(parameter)
        for group in optimizer.param_groups
        if group["max_precond_dim"] == 0
        for parameter in group["params"]
    }
    matrices = {name: id(weight) for name, weight in model.named_parameters() if weight.ndim == 2}
    assert {name for name, key in matrices.items() if key in to_adamw} == {
        "embedding.weight",
        "head.weight",
    }


def test_lr_schedule() -> None:
    settings = settings_module.Settings(steps=10, warmup=2)
    factors = [optimizers.lr_factor(step, settings) for step in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors == sorted(factors[:2]) + sorted(factors[2:], reverse=True)
    assert 0 < factors[-1] < 0.05
    whole_warmup = dataclasses.replace(settings, warmup=10)
    assert optimizers.lr_factor(9, whole_warmup) == 1.0


def test_sweep_skips_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [
        *command_line(tmp_path, "--steps", "2"),
        "--optimizers",
        "adamw",
        "--lrs",
        "1e-3",
        "2e-3",
        "--jobs",
        "2",
    ]
    assert sweep.main(args) == 0
    first = capsys.readouterr().out
    assert "2 runs, 0 of them done before" in first and first.count("(best)") == 1
    results = tmp_path / "results.jsonl"
    with results.open("a") as file:
        file.write('{"torn')
    assert sweep.main(args) == 0
    second = capsys.readouterr().out
    assert "2 runs, 2 of them done before" in second
    assert second.splitlines()[1:] == first.splitlines()[-len(second.splitlines()) + 1 :]
    assert sweep.main([*args, "--lrs", "0"]) == 2


def test_sweep_table() -> None:
    def record(name: str, lr: float, loss: float | None) -> dict[str, Any]:
        return {
            "optimizer": name,
            "lr": lr,
            "precondition_frequency": 10,
            "val_loss": loss,
            "train_seconds": 1.0,
            "optimizer_share": 0.1,
            "tokens_per_second": 100.0,
        }

    text = sweep.table(
        [
            record("adamw", 0.001, 2.0),
            record("adamw", 0.001, 3.0),
            record("adamw", 0.002, 2.25),
            record("adamw", 0.004, None),
            record("dykaf", 0.001, 1.5),
        ]
    )
    assert "| adamw | 0.001 | 2 | 2.5000 | 0.7071 |" in text
    assert "| adamw | 0.002 | 1 | **2.2500** (best) | - |" in text
    assert "| adamw | 0.004 | 1 | diverged |" in text
    assert "| dykaf, every 10 | 0.001 | 1 | **1.5000** (best) | - |" in text


def test_demo_runs_twice_into_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not HAS_DYKAF:
        monkeypatch.setattr(demo, "DEMO_OPTIMIZERS", ("muon", "adamw"))
    (tmp_path / "adamw-lr9-seed0.json").write_text("{}")  # of an older demo
    args = ["--steps", "2", "--out", str(tmp_path)]
    assert demo.main(args) == 0
    files = sorted(path.name for path in tmp_path.iterdir())
    assert demo.main(args) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert len(files) == 2 * len(demo.DEMO_OPTIMIZERS) + 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"picture: {tmp_path / plot.PICTURE}"
    assert [line.split()[0] for line in lines[-3 - len(demo.DEMO_OPTIMIZERS) : -2]] == [
        "optimizer",
        *demo.DEMO_OPTIMIZERS,
    ]
    assert demo.main(["--steps", "0"]) == 2
