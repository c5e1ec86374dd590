"""Every command and every Python snippet of the pages is run by a test, or says why it is not.

A page may say so itself, in the line before a block: ``<!-- run by: tests/FILE -->`` or
``<!-- not run: REASON -->``. For commands the tables here say it, too.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from docs_helpers import ROOT, SHELL, Block, blocks, commands, pages
from optim_helpers import parameter, run

import dykaf
from dykaf import plot

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

# The tests that run these, as they stand or smaller; or the line of .ci/run.
RUN_BY = {
    "integrations/test_recipes.py::test_the_loss_falls": ["python examples/recipes/*.py"],
    "test_bench.py::test_distributed": ["python -m bench distributed*"],
    "test_bench.py::test_ops": ["python -m bench ops*"],
    "test_bench.py::test_scale": ["python -m bench scale*"],
    "test_bench.py::test_step": ["*python -m bench step*"],
    "test_evidence.py::test_the_command_resumes_and_reports": [
        "python -m bench.evidence --task*",
        "python -m bench.evidence report*",
    ],
    "test_gpu_day.py::test_without_a_gpu_only_the_build_runs": ["make gpu-day*"],
    "test_install.py::test_a_wheel_names_its_torch_and_stops_with_another": [
        "pip install --no-build-isolation*"
    ],
    "test_train_gpt.py::test_demo_runs_twice_into_the_same_folder": ["make demo"],
    "test_train_gpt.py::test_files_of_a_run": ["python examples/train_gpt.py --optimizer*"],
    "test_train_gpt.py::test_sweep_skips_what_is_done": ["python examples/sweep.py*"],
    "test_train_gpt_parallel.py::test_under_torchrun": ["torchrun*--parallel fsdp"],
    "test_train_gpt_parallel.py::test_a_run_goes_on_in_another_mode_on_other_ranks": [
        "torchrun*--parallel fsdp-tp --resume"
    ],
    "integrations/test_experts.py::test_a_run": ["python -m bench.experts"],
    "test_tune.py::test_it_writes_rules_that_decide": ["python -m bench.tune --out products.txt"],
    "test_cuda_bounds_tables.py::test_the_document_has_the_tables_as_printed": [
        "python -m bench.cuda_bounds"
    ],
    "make mutate": ["python tests/simt/mutate.py*"],
    "make test-integrations": ["make test-integrations"],
    "make test": ["make test", "python -m pytest tests/test_ops.py*"],
    "make test-simt": ["g++*test_executor"],
}
# By test_it_runs, as they stand.
RUN_HERE = [
    "python -m bench memory",
    "python -m bench memory --size full",
    "python -m bench.evidence plan",
    "python -m dykaf.plot run.jsonl --out run.png",
    "python examples/train_gpt.py --help",
]
NOT_RUN = {
    "make demo-distributed": "takes a minute; tests/test_train_gpt_parallel.py runs its parts",
    'pip install "setuptools>=77"*': "needs a network",
    "*python -m bench host": "measures the machine; tests/test_bench_host.py runs it small",
    "python -m bench peaks": "measures the machine; tests/test_bench.py takes peaks for given",
    "python -m bench.distributed_costs*": "takes minutes; test_distributed_costs.py has parts",
    "python -m bench.evidence --quick": "needs a network and a quarter of an hour",
    'F="*': "sets a variable",
    "g++*file.cu": "a form: file.cu is any file",
}
PATTERNS = [*(pattern for each in RUN_BY.values() for pattern in each), *RUN_HERE, *NOT_RUN]


def is_marked(block: Block) -> bool:
    """Whether the page says what runs the block, or why nothing does."""
    reason = re.fullmatch(r"not run: (.+)", block.comment)
    test = re.fullmatch(r"run by: (\S+)", block.comment)
    if test and not (ROOT / test[1]).is_file():
        raise AssertionError(f"{block.place}: no file {test[1]}")
    return bool(reason or test)


BLOCKS = [block for page in pages() for block in blocks(page)]
COMMANDS = {
    command: block.place
    for block in BLOCKS
    if block.language in SHELL and not is_marked(block)
    for command in commands(block)
}


def test_every_command_is_in_a_table() -> None:
    assert len(COMMANDS) > 40
    unknown = [
        f"{place}: {command}"
        for command, place in COMMANDS.items()
        if not any(fnmatchcase(command, pattern) for pattern in PATTERNS)
    ]
    assert not unknown, "in none of the tables of this file: " + "; ".join(unknown)


def test_every_entry_is_on_a_page() -> None:
    recipes = "python examples/recipes/*.py"
    for pattern in PATTERNS:
        assert pattern == recipes or any(fnmatchcase(command, pattern) for command in COMMANDS), (
            f"{pattern} is on no page any more"
        )


@pytest.mark.parametrize("name", RUN_BY)
def test_what_runs_it_is_there(name: str) -> None:
    if name.startswith("make "):
        lines = (ROOT / ".ci/run").read_text().splitlines()
        assert any(f"{line} ".startswith(f"{name} ") for line in lines)
        return
    file, _, test = name.partition("::")
    if file.startswith("integrations/") and not (ROOT / "tests" / file).exists():
        pytest.skip("no recipes yet")
    assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_the_makefile_has_the_target(command: str) -> None:
    target = command.split()[1]
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE)


class Accepted(Exception):
    """The arguments of a command were."""


def arguments_of(command: str) -> list[str]:
    words = shlex.split(command)
    while "=" in words[0]:
        words.pop(0)
    if words[0] == "torchrun":
        return words[words.index("examples/train_gpt.py") :]
    return words[1:]


@pytest.mark.filterwarnings("ignore:.*in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    "command",
    [c for c in COMMANDS if re.search(r"\b(python|torchrun) (?!-m pytest|examples/recipes/)", c)],
)
def test_its_arguments_are_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a command that is not run: its program reads the arguments, and no more happens."""
    read = argparse.ArgumentParser.parse_known_args

    def read_alone(self: argparse.ArgumentParser, *args: object, **options: object) -> None:
        _, rest = read(self, *args, **options)  # type: ignore[arg-type]
        raise Accepted(rest)

    program, *arguments = arguments_of(command)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", read_alone)
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), str(ROOT / "tests/simt"), *sys.path])
    if program == "-m":
        program, *arguments = arguments
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises((Accepted, SystemExit)) as raised:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    if raised.type is SystemExit:
        assert "--help" in arguments and raised.value.code == 0
    elif not program.endswith("sweep.py"):  # which hands the rest on
        assert raised.value.args == ([],)


@pytest.mark.parametrize("command", RUN_HERE)
def test_it_runs(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    here = ROOT
    if "dykaf.plot" in command:
        here = tmp_path
        optimizer = dykaf.DyKAF([parameter(6, 4)])
        run(optimizer, range(3))
        plot.record(optimizer, tmp_path / "run.jsonl", 3)
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=here, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


SNIPPETS = [block for block in BLOCKS if block.language == "python"]


@pytest.mark.parametrize("block", SNIPPETS, ids=[block.place for block in SNIPPETS])
def test_snippet(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by itself, in an empty folder."""
    if is_marked(block):
        pytest.skip(block.comment)
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})
