"""The GPU day's program, with steps that pass, fail and hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/ is not installed

from bench import __main__ as cli
from bench import gpu_day, optimizers
from bench import step as step_bench
from bench.gpu_day import Step


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_day, "GRACE", 1.0)


@pytest.fixture(autouse=True)
def same_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def step(name: str, code: str, limit: float = 60, missing: str = "") -> Step:
    return Step(name, "test", limit, (sys.executable, "-c", code), missing)


def run(out: Path, *steps: Step, budget: float = 60) -> bool:
    return gpu_day.run(steps, out, os.environ, budget, rehearsed=False)


def table(out: Path) -> list[list[str]]:
    """The rows of the table, which must come first in the summary."""
    lines = (out / "summary.md").read_text().splitlines()
    assert lines[:2] == ["| step | part | result | seconds | counts |", "|---|---|---|---:|---|"]
    rows = lines[2 : lines.index("")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


PYTEST = "print('....\\n3 passed, 1 skipped in 0.12s')"


def test_a_step_that_passes(tmp_path: Path) -> None:
    assert run(tmp_path, step("a", PYTEST))
    assert table(tmp_path) == [["a", "test", "passed", "0", "3 passed, 1 skipped"]]
    assert (tmp_path / "a.log").read_text() == "....\n3 passed, 1 skipped in 0.12s\n"


def test_a_step_that_fails_is_in_the_table_and_the_next_runs(tmp_path: Path) -> None:
    failing = "import sys; print('== 1 failed, 2 passed in 0.1s =='); sys.exit('why it failed')"
    assert not run(tmp_path, step("a", failing), step("b", PYTEST))
    assert [row[:3] for row in table(tmp_path)] == [
        ["a", "test", "failed, status 1"],
        ["b", "test", "passed"],
    ]
    assert table(tmp_path)[0][4] == "1 failed, 2 passed"
    assert "why it failed" in (tmp_path / "summary.md").read_text()


def test_a_command_that_is_not_there_fails(tmp_path: Path) -> None:
    assert not run(tmp_path, Step("a", "test", 9, ("no-such-command",)), step("b", PYTEST))
    assert table(tmp_path)[0][2].startswith("failed: ")
    assert table(tmp_path)[1][2] == "passed"


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("ignores", ["", "signal.signal(signal.SIGINT, signal.SIG_IGN);"])
def test_the_limit_ends_a_step_with_its_children_and_the_next_runs(
    tmp_path: Path, ignores: str
) -> None:
    """The child, which ignores interrupts, holds the pipe, too."""
    code = f"import signal, subprocess, time; {ignores}"
    code += "ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN);"
    code += "p = subprocess.Popen(['sleep', '300'], preexec_fn=ignore);"
    code += "print(p.pid, flush=True); time.sleep(300)"
    begin = time.monotonic()
    assert not run(tmp_path, step("a", code, limit=5), step("b", PYTEST))
    assert time.monotonic() - begin < 100
    assert [row[:3] for row in table(tmp_path)] == [
        ["a", "test", "stopped after 5 s"],
        ["b", "test", "passed"],
    ]
    child = int((tmp_path / "a.log").read_text().splitlines()[0])
    for _ in range(100):
        if not is_running(child):
            break
        time.sleep(0.1)
    assert not is_running(child)


@pytest.mark.parametrize("of_shell", [signal.default_int_handler, signal.SIG_IGN])
def test_an_interrupt_comes_before_the_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_shell: Any
) -> None:
    """A benchmark writes its JSON then; a shell's background jobs begin with interrupts ignored."""
    signal.signal(signal.SIGINT, of_shell)
    monkeypatch.setattr(gpu_day, "GRACE", 60.0)
    code = "import json, time\ntry:\n    time.sleep(300)\nexcept KeyboardInterrupt:\n"
    code += f"    json.dump({{'records': [1, 2]}}, open({str(tmp_path / 'a.json')!r}, 'w'))"
    run(tmp_path, step("a", code, limit=5))
    ((_, _, result, _, counts),) = table(tmp_path)
    assert (result, counts) == ("stopped after 5 s", "2 rows")


def test_what_is_missing_and_what_has_no_time_is_said(tmp_path: Path) -> None:
    skipped = step("a", PYTEST, missing="torch sees no GPU")
    hangs = step("b", "import time; time.sleep(300)")
    assert not run(tmp_path, skipped, hangs, step("c", PYTEST), budget=3)
    results = [row[2] for row in table(tmp_path)]
    assert results == [
        "skipped: torch sees no GPU",
        "stopped after 3 s",
        "skipped: no time is left",
    ]


def test_the_summary_is_there_after_every_step(tmp_path: Path) -> None:
    code = f"import sys; text = open({str(tmp_path / 'summary.md')!r}).read()\n"
    code += "sys.exit('| a | test | passed |' not in text)"
    assert run(tmp_path, step("a", PYTEST), step("b", code))


def test_parts_of_several_calls_are_in_one_table(tmp_path: Path) -> None:
    run(tmp_path, step("a", "raise SystemExit(1)"))
    run(tmp_path, step("b", PYTEST))
    assert [row[:3] for row in table(tmp_path)] == [
        ["a", "test", "failed, status 1"],
        ["b", "test", "passed"],
    ]
    run(tmp_path, step("a", PYTEST))
    assert [row[2] for row in table(tmp_path)] == ["passed", "passed"]


def test_each_part_takes_nine_minutes_at_most() -> None:
    steps = gpu_day.make_steps("cuda", "9.0")
    limits = dict.fromkeys(("build", "test", "sanitize", "bench"), 0.0)
    for one in steps:
        limits[one.part] += one.limit + gpu_day.GRACE
    assert max(limits.values()) <= 540
    assert len({one.name for one in steps}) == len(steps)


def test_without_a_gpu_only_the_build_runs(tmp_path: Path) -> None:
    steps = gpu_day.make_steps("cuda", "")
    missing = {one.name: one.missing for one in steps}
    built = {name for name, reason in missing.items() if not reason}
    assert built == {"build", "report"}
    assert missing["step"] == missing["memcheck"] == "torch sees no GPU"
    assert run(tmp_path, *(one for one in steps if one.missing))
    assert {row[2] for row in table(tmp_path)} == {"skipped: torch sees no GPU"}
    assert "#" not in (tmp_path / "summary.md").read_text()


def test_the_build_is_for_this_gpu_alone() -> None:
    env = gpu_day.environment("9.0")
    assert (env["TORCH_CUDA_ARCH_LIST"], env["DYKAF_CUDA"]) == ("9.0", "on")
    assert env["PYTHONPATH"].split(os.pathsep)[0] == str(gpu_day.ROOT / "python")


def test_the_json_of_a_benchmark_goes_to_the_folder(tmp_path: Path) -> None:
    (peaks,) = [one for one in gpu_day.make_steps("cpu", "") if one.name == "peaks"]
    gpu_day.run([peaks], tmp_path, gpu_day.environment(""), 60, rehearsed=True)
    assert table(tmp_path)[0][2:5:2] == ["passed", "4 rows"]
    rows = json.loads((tmp_path / "peaks.json").read_text())["records"]
    for row, amount in zip(rows, [2 * 64**3 / 1e12] * 3 + [2 * (1 << 14) / 1e9], strict=True):
        assert row["best_rate"] == pytest.approx(amount / min(row["times"]))


# What the benchmarks do on a machine with little installed


@pytest.mark.parametrize("command", ["step --steps 1 --optimizers dykaf", "ops --ops grad_max"])
def test_benchmarks_run_without_tqdm_and_matplotlib(tmp_path: Path, command: str) -> None:
    arguments = [*command.split(), "--sets", "small", "--size", "tiny"]
    arguments += ["--json", str(tmp_path / "rows.json")]
    code = "import sys; sys.modules['tqdm'] = sys.modules['matplotlib'] = None\n"
    code += f"from bench.__main__ import main; sys.exit(main({arguments}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=gpu_day.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "rows.json").read_text())["records"]) == 1
    assert "### small" in done.stdout


def test_rows_before_an_error_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = step_bench.SetRun.run

    def fail_later(run: step_bench.SetRun, *arguments: object) -> None:
        if run.workload.name == "lora8":
            raise MemoryError("of the second set")
        measured(run, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(step_bench.SetRun, "run", fail_later)
    arguments = ["step", "--size", "tiny", "--steps", "1", "--optimizers", "adamw"]
    arguments += ["--sets", "small", "lora8", "--json", str(tmp_path / "rows.json")]
    with pytest.raises(MemoryError):
        cli.main(arguments)
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [row["set"] for row in written["records"]] == ["small"]
    assert written["interrupted"] is True


def test_an_old_torch_has_no_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    assert str(optimizers.missing("muon")).startswith("muon: left out, torch ")
