"""All that a GPU machine should tell, in pieces under time limits, with the interpreter at hand.

    python bench/gpu_day.py --out FOLDER [--parts build test sanitize bench] [--rehearse]

Needs torch with CUDA, nvcc, g++, cmake, ninja, numpy, pytest and hypothesis; no network. FOLDER
gets the log of every step as it is written, the JSON of the benchmarks, and summary.md after each.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("build", "test", "sanitize", "bench")
GPU_TESTS = tuple((ROOT / "tests" / "gpu_tests.txt").read_text(encoding="utf-8").split())
GRACE = 10.0  # seconds between the interrupt, after which a benchmark writes its JSON, and the kill
SHOWN = ("peaks", "step", "ops")  # whose logs are Markdown, and whole in the summary
TAIL = 15  # lines of the log of a step that did not pass, in the summary
SANITIZED_TESTS = "trajectory or stack"  # of tests/test_gpu.py: a step of every kernel


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: Names its log, too.
        part: The piece it belongs to.
        limit: Seconds after which it is stopped.
        command: What runs in the root of the repository; {out} stands for the folder.
        missing: Why it cannot run here; empty if it can.
    """

    name: str
    part: str
    limit: float
    command: Sequence[str]
    missing: str = ""


@dataclass(frozen=True)
class Result:
    """What became of a step; counts is what its log or its JSON says."""

    step: str
    part: str
    result: str
    seconds: float
    counts: str


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def make_steps(device: str, arch: str) -> list[Step]:
    """Returns all steps, each part within nine minutes.

    Args:
        device: "cuda", or "cpu" for a rehearsal with small sizes.
        arch: The compute capability of the GPU; empty if torch sees none.
    """
    is_gpu = device == "cuda"
    no_gpu = "" if arch or not is_gpu else "torch sees no GPU"
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    sanitizer = shutil.which("compute-sanitizer", path=places)
    pytest = python("-m", "pytest", "-q", "-p", "no:cacheprovider")
    sanitized = [*pytest, "--backend", "cuda", "tests/test_gpu.py", "-k", SANITIZED_TESTS]
    size = [] if is_gpu else ["--size", "tiny"]

    def bench(name: str, limit: float, *arguments: str) -> Step:
        output = ["--device", device, *size, "--json", f"{{out}}/{name}.json"]
        return Step(name, "bench", limit, python("-m", "bench", *arguments, *output), no_gpu)

    def tests(name: str, limit: float, backend: str) -> Step:
        return Step(name, "test", limit, [*pytest, "--backend", backend, *GPU_TESTS], no_gpu)

    def sanitize(tool: str) -> Step:
        command = [str(sanitizer), "--tool", tool, "--error-exitcode", "1", *sanitized]
        missing = no_gpu or ("" if is_gpu else "needs a GPU")
        missing = missing or ("" if sanitizer else "compute-sanitizer is not installed")
        return Step(tool, "sanitize", 260, command, missing)

    peers = ["dykaf", "dykaf-aten", "textbook-dykaf", "textbook-soap", "muon", "adamw"]
    ops = ["--sets", "gpt2", "lora8", "--precisions", "highest", "high", "--seconds", "0.3"]
    tune = ["--shapes", "768x3072", "2048x2048", "4096x4096", "--matrices", "2", "--rounds", "7"]
    tune = python("-m", "bench.tune", "--out", "{out}/products.txt", *tune)
    return [  # what should not be missed comes first
        Step("build", "build", 490, python("setup.py", "build_ext", "--inplace")),
        Step("report", "build", 20, python("-m", "dykaf")),
        bench("peaks", 40, "peaks"),
        tests("test-native", 320, "cuda" if is_gpu else "cpu"),
        bench("step", 240, "step", "--sets", "gpt2", "lora8", "resnet50", "--optimizers", *peers),
        sanitize("memcheck"),
        tests("test-aten", 200, "aten-cuda" if is_gpu else "aten"),
        bench("ops", 230, "ops", *ops),
        sanitize("racecheck"),
        Step("tune", "bench", 26, tune, no_gpu or ("" if is_gpu else "needs a GPU")),
    ]


def find_arch() -> str:
    """Asks torch, in a process of its own, for the capability of the GPU, such as 9.0."""
    code = "from torch import cuda\nif cuda.is_available(): "
    code += "print(*cuda.get_device_capability(), sep='.')"
    return subprocess.run(python("-c", code), stdout=subprocess.PIPE, text=True).stdout.strip()


def environment(arch: str) -> dict[str, str]:
    """Returns what the steps run with: this tree's package, and a build for this GPU alone."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "DYKAF_CUDA": "on" if arch else "off",
        "TORCH_CUDA_ARCH_LIST": arch,
    }


def copy_output(source: int, log: Path) -> None:
    """Copies a pipe to the log and the screen as it comes."""
    with log.open("wb") as file:
        while data := os.read(source, 1 << 16):
            file.write(data)
            file.flush()
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()


def run_step(step: Step, out: Path, env: Mapping[str, str], limit: float) -> Result:
    """Runs one command for at most `limit` seconds, its output to a log of its own."""
    log = out / f"{step.name}.log"
    print(f"==> {step.name}: at most {limit:.0f} s, {log}", flush=True)
    begin = time.monotonic()
    command = [word.replace("{out}", str(out)) for word in step.command]
    try:
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **output)
    except OSError as error:
        log.write_text(f"{error}\n", encoding="utf-8")
        return Result(step.name, step.part, f"failed: {error}", 0.0, "")
    assert process.stdout is not None
    reader = threading.Thread(target=copy_output, args=(process.stdout.fileno(), log), daemon=True)
    reader.start()
    result = ""
    for deadline, kind in ((limit, signal.SIGINT), (GRACE, signal.SIGKILL)):
        try:
            process.wait(timeout=deadline)
            break
        except subprocess.TimeoutExpired:
            result = f"stopped after {limit:.0f} s"
            os.killpg(process.pid, kind)
    status = process.wait()
    with suppress(ProcessLookupError):  # its children, if any are left
        os.killpg(process.pid, signal.SIGKILL)
    reader.join(timeout=5)
    seconds = time.monotonic() - begin
    if not result:
        result = "passed" if status == 0 else f"failed, status {status}"
    return Result(step.name, step.part, result, seconds, count(out, step.name))


def read(path: Path) -> str:
    """Returns the text of a file; nothing if there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def count(out: Path, name: str) -> str:
    """Returns what pytest counted in the log, or the number of rows in the JSON."""
    counts = re.findall(r"(?m)^\W*(\d+ [a-z].*) in [\d.]+s", read(out / f"{name}.log"))
    if counts:
        return str(counts[-1])
    rows = read(out / f"{name}.json")
    return f"{len(json.loads(rows)['records'])} rows" if rows else ""


def write_summary(out: Path, results: Sequence[Result], rehearsed: bool) -> None:
    """Writes summary.md: the table first, then what the logs of single steps say."""
    lines = ["| step | part | result | seconds | counts |", "|---|---|---|---:|---|"]
    for r in results:
        lines.append(f"| {r.step} | {r.part} | {r.result} | {r.seconds:.0f} | {r.counts} |")
    lines += ["", f"Python {sys.version.split()[0]}, {time.strftime('%Y-%m-%d %H:%M')}."]
    lines += ["A rehearsal on the CPU with small sizes: the times mean nothing."] * rehearsed
    for r in results:
        text = read(out / f"{r.step}.log").strip()
        if r.step in SHOWN and text:
            lines += ["", f"## {r.step}", "", text]
        elif r.result.startswith(("failed", "stopped")):
            lines += ["", f"## {r.step}, the end of its log", "", "```"]
            lines += [*text.splitlines()[-TAIL:], "```"]
    (out / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(
    steps: Sequence[Step], out: Path, env: Mapping[str, str], budget: float, rehearsed: bool
) -> bool:
    """Runs the steps in turn and writes the summary after each.

    Returns:
        Whether none failed or was stopped; one that cannot run here does not count.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of `&` and nohup ignores it
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"  # of earlier calls, for other parts
    results = {r["step"]: Result(**r) for r in json.loads(read(file) or "[]")}
    end = time.monotonic() + budget
    for step in steps:
        left = end - time.monotonic()
        if step.missing or left < 1:
            reason = step.missing or "no time is left"
            print(f"==> {step.name}: skipped, {reason}", flush=True)
            result = Result(step.name, step.part, f"skipped: {reason}", 0.0, "")
        else:
            result = run_step(step, out, env, min(step.limit, left))
            print(f"==> {step.name}: {result.result} {result.counts}", flush=True)
        results[step.name] = result
        file.write_text(json.dumps([asdict(r) for r in results.values()], indent=1))
        write_summary(out, list(results.values()), rehearsed)
    print(f"==> {out / 'summary.md'}")
    ran = [results[step.name].result for step in steps]
    return not any(result.startswith(("failed", "stopped")) for result in ran)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--minutes", type=float, default=20, help="for all parts together")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small sizes")
    options = parser.parse_args()
    arch = "" if options.rehearse else find_arch()
    device, out = "cpu" if options.rehearse else "cuda", options.out.resolve()
    chosen = [step for step in make_steps(device, arch) if step.part in options.parts]
    return 0 if run(chosen, out, environment(arch), 60 * options.minutes, options.rehearse) else 1


if __name__ == "__main__":
    sys.exit(main())
