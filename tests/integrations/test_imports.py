"""What is imported when."""

from __future__ import annotations

import subprocess
import sys

import pytest

TOOLS = ["accelerate", "lightning", "peft", "timm", "torchtitan", "transformers", "trl"]


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_dykaf_imports_no_tool() -> None:
    code = f"import dykaf, sys; print([name for name in {TOOLS} if name in sys.modules])"
    assert run_python(code) == "[]"
    code = "import dykaf, sys; print([name for name in sys.modules if 'integrations' in name])"
    assert run_python(code) == "[]"


def test_metrics_need_no_tool() -> None:
    code = (
        "import dykaf.integrations.metrics, sys; "
        f"print([name for name in {TOOLS} if name in sys.modules])"
    )
    assert run_python(code) == "[]"


@pytest.mark.parametrize("tool", ["lightning", "timm", "torchtitan", "transformers"])
def test_a_missing_tool_is_named(tool: str) -> None:
    code = (
        "import importlib.util as util, dykaf\n"
        "find = util.find_spec\n"
        f"util.find_spec = lambda name, *args: None if name == {tool!r} else find(name, *args)\n"
        "try:\n"
        f"    import dykaf.integrations.{tool}\n"
        "except ImportError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    expected = f"dykaf.integrations.{tool} needs {tool}: pip install {tool}"
    assert run_python(code) == f"ImportError {expected}"
