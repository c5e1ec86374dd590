"""The example on many ranks: the losses of one process, also after a stop and on other ranks.

The ranks are those of ranks.py with the environment that torchrun makes, which is quicker than a
torchrun for each mode; the command itself runs under it once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ranks
from ranks import Ranks

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
if importlib.util.find_spec("dykaf") is None:
    pytest.skip("dykaf is not built", allow_module_level=True)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo_distributed  # noqa: E402
import train_gpt  # noqa: E402
from settings import PARALLEL  # noqa: E402

STEPS = 8
MODEL = "--dim 16 --layers 1 --heads 2 --context 16 --batch 8 --eval-windows 16 --seed 1"
COMMAND = f"{MODEL} --steps {STEPS} --eval-every 2 --lr 4e-3 --precondition-frequency 3".split()
WORLDS = {"ddp": 2, "ddp-sharded": 2, "fsdp": 2, "hsdp": 4, "fsdp-tp": 4}
RUN = "dykaf-every3-lr0.004-seed1"
# Nats per byte. Other sums of 128 float32 terms are off by about 128^(1/2) 2^-24 of a gradient, and
# three Newton-Schulz steps make that up to 3.4445^3 = 41 times as much of an update: 3e-5. The root
# mean square of an update is at most 0.24 lr, so 8 steps move the 11,312 weights apart by
# 8 * 0.24 * 4e-3 * 11312^(1/2) * 3e-5 = 2e-5, and a loss by that times its gradient's norm, here
# below 2.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def together() -> Iterator[Ranks]:
    yield from ranks.started()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of one process."""
    out = tmp_path_factory.mktemp("alone")
    assert train_gpt.main([*COMMAND, "--out", str(out)]) == 0
    return losses(out)


def losses(out: Path) -> dict[int, float]:
    run = json.loads((out / f"{RUN}.json").read_text())
    return {point["step"]: point["val_loss"] for point in run["curve"]}


def distance(a: dict[int, float], b: dict[int, float]) -> float:
    assert list(a) == list(b) == list(range(0, STEPS + 1, 2))
    return max(abs(a[step] - b[step]) for step in a)


def command_on_rank(args: list[str], stop: int | None) -> tuple[int, str, str]:
    """The exit code and what is said; a signal comes to the last rank alone, within a step."""
    import torch.distributed as dist

    sys.path.insert(0, str(EXAMPLES))
    import train_gpt
    import training

    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    make = training.make_optimizer

    def make_interrupting(*given: Any) -> Any:
        optimizer = make(*given)
        calls = [0]

        def note(*_: Any) -> None:
            calls[0] += 1
            if calls[0] == stop and dist.get_rank() == dist.get_world_size() - 1:
                os.kill(os.getpid(), signal.SIGINT)

        optimizer.register_step_pre_hook(note)
        return optimizer

    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "TORCHELASTIC_RUN_ID": "test",
    }
    said, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(training, "make_optimizer", make_interrupting),
        # Its group is that of the rank.
        mock.patch.object(dist, "init_process_group"),
        mock.patch.object(dist, "destroy_process_group"),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(errors),
    ):
        code = train_gpt.main(args)
    return code, said.getvalue(), errors.getvalue()


def run(
    together: Ranks, out: Path, mode: str, *extra: str, world: int = 0, stop: int | None = None
) -> list[tuple[int, str, str]]:
    args = [*COMMAND, "--out", str(out), "--parallel", mode, *extra]
    return together.run(command_on_rank, args, stop, world=world or WORLDS[mode])


@pytest.mark.parametrize("mode", WORLDS)
def test_losses_are_those_of_one_process(
    together: Ranks, tmp_path: Path, alone: dict[int, float], mode: str
) -> None:
    """Without a stop and with one, to the same bits."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    found = run(together, whole, mode)
    assert [code for code, _, _ in found] == [0] * WORLDS[mode], found
    assert distance(losses(whole), alone) < TOLERANCE
    assert [said for _, said, _ in found[1:]] == [""] * (WORLDS[mode] - 1)
    assert len(re.findall(f"^{mode} on ", found[0][1], re.MULTILINE)) == 1
    found = run(together, parts, mode, stop=3)
    assert [code for code, _, _ in found] == [130] * WORLDS[mode], found
    assert "stopped after step 3 of 8" in found[0][2]
    found = run(together, parts, mode, "--resume")
    assert [code for code, _, _ in found] == [0] * WORLDS[mode], found
    assert losses(parts) == losses(whole)
    assert sorted(path.name for path in (parts / f"{RUN}.dcp").iterdir()) == ["step-8"]


def test_a_run_goes_on_in_another_mode_on_other_ranks(
    together: Ranks, tmp_path: Path, alone: dict[int, float]
) -> None:
    run(together, tmp_path, "fsdp-tp", stop=2)
    run(together, tmp_path, "ddp-sharded", "--resume", world=2, stop=3)
    found = run(together, tmp_path, "fsdp", "--resume", world=4)
    assert [code for code, _, _ in found] == [0] * 4, found
    assert "other versions, threads or ranks" in found[0][1]
    assert distance(losses(tmp_path), alone) < TOLERANCE


def test_adamw_on_two_meshes(together: Ranks, tmp_path: Path) -> None:
    adamw = ["--optimizer", "adamw"]
    assert train_gpt.main([*COMMAND, "--out", str(tmp_path / "alone"), *adamw]) == 0
    found = run(together, tmp_path / "ranks", "fsdp-tp", *adamw)
    assert [code for code, _, _ in found] == [0] * 4, found
    name = "adamw-lr0.004-seed1.json"
    ours, theirs = (
        json.loads((tmp_path / side / name).read_text())["val_loss"] for side in ("ranks", "alone")
    )
    assert abs(ours - theirs) < TOLERANCE


def test_the_losses_tell_a_wrong_batch(
    together: Ranks, tmp_path: Path, alone: dict[int, float]
) -> None:
    """Half of each batch, on one rank, is farther off than the tolerance by much."""
    found = run(together, tmp_path, "fsdp", "--batch", "4")
    assert [code for code, _, _ in found] == [0, 0], found
    assert distance(losses(tmp_path), alone) > 50 * TOLERANCE


def test_damaged_folders_give_one_line(together: Ranks, tmp_path: Path) -> None:
    found = run(together, tmp_path, "fsdp", "--resume")
    assert [code for code, _, _ in found] == [2, 2]
    assert "no checkpoint to resume from" in found[0][2]
    run(together, tmp_path, "fsdp", stop=2)
    (folder,) = (tmp_path / f"{RUN}.dcp").iterdir()
    for name in ("run.json", "__1_0.distcp"):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(good[: len(good) // 2])
        for code, _, errors in run(together, tmp_path, "fsdp", "--resume"):
            assert code == 2 and "is damaged" in errors and len(errors.splitlines()) == 1
        (folder / name).write_bytes(good)
    found = run(together, tmp_path, "fsdp", "--resume", "--weight-decay", "0.5")
    assert "is of another run: --weight-decay 0.01, got 0.5" in found[0][2]
    assert [code for code, _, _ in run(together, tmp_path, "fsdp", "--resume")] == [0, 0]


def torchrun(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, str(EXAMPLES / "train_gpt.py"), *COMMAND, *args],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_under_torchrun(tmp_path: Path, alone: dict[int, float]) -> None:
    done = torchrun("--out", str(tmp_path), "--parallel", "fsdp")
    assert done.returncode == 0, done.stderr
    assert len(re.findall("^fsdp on 2 ranks: 9 parameters", done.stdout, re.MULTILINE)) == 1
    assert len(re.findall("^step     8", done.stdout, re.MULTILINE)) == 1
    assert distance(losses(tmp_path), alone) < TOLERANCE


def test_a_refusal_under_torchrun(tmp_path: Path) -> None:
    done = torchrun("--out", str(tmp_path), "--parallel", "fsdp", "--batch", "3")
    assert done.returncode == 1 and "exitcode  : 2" in done.stderr
    assert "--parallel fsdp on 2 ranks needs --batch to be a multiple of 2, got 3" in done.stderr
    assert "Traceback" not in done.stderr.partition("train_gpt.py: error")[0]


@pytest.mark.parametrize(
    ("ranks_of", "args", "reason"),
    [
        (None, "fsdp", "needs torchrun: torchrun --nproc-per-node 2 examples/train_gpt.py "),
        (2, "none", "--parallel none is for one process, got 2 of torchrun"),
        (3, "hsdp", "--parallel hsdp needs a multiple of 2 ranks, got 3"),
        (3, "fsdp-tp", "--parallel fsdp-tp needs a multiple of 2 ranks, got 3"),
        (2, "fsdp-tp --context 15", "needs --context to be a multiple of 2, got 15"),
        (3, "ddp", "--parallel ddp on 3 ranks needs --batch to be a multiple of 3, got 8"),
        (8, "ddp --eval-windows 4", "needs --eval-windows to be a multiple of 8, got 4"),
        (2, "ddp --optimizer muon", "is for --optimizer dykaf and adamw, got muon"),
        (2, "ddp-sharded --optimizer adamw", "is for --optimizer dykaf, got adamw"),
        (2, "zero", "invalid choice: 'zero'"),
    ],
)
def test_bad_arguments_give_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    ranks_of: int | None,
    args: str,
    reason: str,
) -> None:
    if ranks_of is not None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
        monkeypatch.setenv("WORLD_SIZE", str(ranks_of))
    try:
        code = train_gpt.main([*COMMAND, "--out", str(tmp_path), "--parallel", *args.split()])
    except SystemExit as exit_:
        code = exit_.code
    stderr = capsys.readouterr().err
    assert code == 2
    assert reason in stderr and len(stderr.splitlines()) == 1


def test_the_demo_compares_from_the_checkpoint_on(capsys: pytest.CaptureFixture[str]) -> None:
    together, alone = {0: 9.0, 2: 3.0, 4: 2.0}, {0: 5.0, 2: 3.25, 4: 1.5}
    assert demo_distributed.compare(together, alone, 2) == 0.5
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split() for row in rows] == [
        ["2", "3.000000", "3.250000", "2.5e-01"],
        ["4", "2.000000", "1.500000", "5.0e-01"],
    ]
    found = demo_distributed.compare(together, {**alone, 2: float("nan")}, 2)
    assert not found <= demo_distributed.TOLERANCE


def test_every_mode_is_tested() -> None:
    assert {"none", *WORLDS} == set(PARALLEL)
