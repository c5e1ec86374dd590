"""What a release must pass: versions that agree, a clean tree with a tag, wheels that install.

    python release/check.py [--torch 2.13.0 ...] [--untagged]

Of the commit, not of the working tree, it makes the sdist, and from that a wheel for each version
of torch that docs/install.md names, with the Python named there. Each wheel is installed into an
environment that has torch alone, runs smoke.py, and then a part of the sdist's own tests. dist/
gets what passed, build/release/ the logs. A wheel takes some minutes of one core. It needs git,
what docs/install.md says that a build needs, and a network for pip.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "release"
DIST = ROOT / "dist"
BUILD_TOOLS = ("setuptools>=77", "cmake", "ninja")
TEST_TOOLS = ("pytest", "hypothesis", "numpy")  # in the versions of requirements-dev.txt
TESTS = ("adamw", "presets", "errors", "param_groups", "state_dict")

# Where the version is written: file -> the pattern whose first group it is.
VERSION_PATTERNS = {
    "pyproject.toml": r'^version = "([^"]+)"',
    "CITATION.cff": r"^version: (\S+)$",
    "CHANGELOG.md": r"^## (.+)$",  # the heading on top
}


class Failed(Exception):
    """A check did not pass; the message says why, in one line."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    passed: bool
    detail: str


# ---- Versions, tree and tag ----------------------------------------------------------------------


def written_versions(root: Path) -> dict[str, str]:
    """The version in each file that names it; "none" where it is not found."""
    versions = {}
    for name, pattern in VERSION_PATTERNS.items():
        path = root / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        match = re.search(pattern, text, re.MULTILINE)
        versions[name] = match[1] if match else "none"
    return versions


def agreed_version(versions: Mapping[str, str]) -> str:
    """The version that all places name.

    Raises:
        Failed: if they differ or one is no release's, such as "0.2.0, unreleased".
    """
    said = ", ".join(f"{place}: {version}" for place, version in versions.items())
    if len(set(versions.values())) != 1:
        raise Failed(said)
    version = next(iter(versions.values()))
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise Failed(f"expected three numbers, got {version}")
    return version


def check_clean(status: str) -> str:
    """Takes what `git status --porcelain` says."""
    if status.strip():
        raise Failed(f"not committed: {', '.join(line[3:] for line in status.splitlines())}")
    return "nothing to commit"


def check_tag(tags: str, version: str) -> str:
    """Takes what `git tag --points-at HEAD` says."""
    if f"v{version}" not in tags.split():
        raise Failed(f"HEAD has no tag v{version}; it has: {' '.join(tags.split()) or 'none'}")
    return f"v{version}"


def tested_versions(text: str) -> dict[str, str]:
    """The table in docs/install.md, torch -> Python."""
    found = re.findall(r"^\| (\d+\.\d+\.\d+) \| (\d+\.\d+\.\d+) \|", text, re.MULTILINE)
    if not found:
        raise Failed("docs/install.md: its table of torch and Python was not found")
    return dict(found)


# ---- Building and installing ---------------------------------------------------------------------


def git(*args: str) -> str:
    """What a git command prints."""
    return subprocess.run(
        ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True
    ).stdout


def run(log: Path, *command: str | Path, cwd: Path = WORK) -> str:
    """Runs a command outside of the tree, appends what it prints to log, and returns that.

    Raises:
        Failed: with its last line, if it ends with an error.
    """
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(map(str, command))}\n{done.stdout}\n")
    if done.returncode != 0:
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        raise Failed(f"{last} ({log.relative_to(ROOT)})")
    return done.stdout


def new_environment(folder: Path, log: Path, python: str, *packages: str) -> Path:
    """The interpreter of a new environment that has nothing but some packages."""
    shutil.rmtree(folder, ignore_errors=True)
    interpreter = shutil.which(f"python{python.rpartition('.')[0]}")
    if interpreter is None:
        raise Failed(f"no python{python.rpartition('.')[0]} on PATH")
    run(log, interpreter, "-m", "venv", folder)
    run(log, folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages)
    return folder / "bin" / "python"


def make_sdist(python: Path, log: Path) -> Path:
    """The sdist of the commit, by an interpreter with the tools of a build."""
    source = WORK / "source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    run(log, "git", "-C", ROOT, "archive", "--output", WORK / "source.tar", "HEAD")
    run(log, "tar", "-xf", WORK / "source.tar", "-C", source)
    run(log, python, "setup.py", "--quiet", "sdist", "--dist-dir", DIST, cwd=source)
    return newest(DIST, "*.tar.gz")


def newest(folder: Path, pattern: str) -> Path:
    """The file that was written last."""
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)


def check_torch(torch: str, python: str, version: str, sdist: Path | None) -> tuple[str, Path]:
    """Builds, installs and tries the wheel for one torch.

    Args:
        torch: its version, such as 2.13.0.
        python: the interpreter's.
        version: that the wheel must have.
        sdist: what the wheel is built from; None makes it.

    Returns:
        what was seen, in one line, and the sdist.

    Raises:
        Failed: at the first step that does not pass.
    """
    begin = time.monotonic()
    log, wheels = WORK / f"torch-{torch}.log", WORK / f"wheels-{torch}"
    log.unlink(missing_ok=True)
    shutil.rmtree(wheels, ignore_errors=True)
    folder = WORK / f"environment-{torch}"
    builder = new_environment(folder, log, python, f"torch=={torch}", *BUILD_TOOLS)
    sdist = sdist or make_sdist(builder, log)
    pip = ("-m", "pip", "--no-cache-dir")
    options = ("--no-build-isolation", "--no-deps", "--wheel-dir", wheels)
    run(log, builder, *pip, "wheel", "-v", *options, sdist)
    wheel = newest(wheels, "*.whl")

    # Empty but for torch, which the wheel must leave as it is.
    user = new_environment(folder, log, python, f"torch=={torch}")
    run(log, user, *pip, "install", "--quiet", wheel)
    tests = unpacked(sdist, log)
    said = run(log, user, tests / "release" / "smoke.py").strip().splitlines()[-1]
    check_smoke(said, version, torch)
    run(log, user, "-m", "dykaf")
    constraint = tests / "requirements-dev.txt"
    run(log, user, "-m", "pip", "install", "--quiet", *TEST_TOOLS, "--constraint", constraint)
    chosen = [f"tests/test_{name}.py" for name in TESTS]
    result = run(log, user, "-m", "pytest", "-q", *chosen, cwd=tests).strip().splitlines()[-1]
    shutil.copy2(wheel, DIST)
    shutil.rmtree(folder)
    seconds = time.monotonic() - begin
    return f"{wheel.name}; {said}; {result}; {seconds:.0f} s in all", sdist


def unpacked(sdist: Path, log: Path) -> Path:
    """The files of the sdist, without a built package beside the installed one."""
    folder = WORK / "sdist"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    run(log, "tar", "-xf", sdist, "-C", folder, "--strip-components=1")
    return folder


def check_smoke(said: str, version: str, torch: str) -> None:
    """Takes the line that smoke.py prints: the installed dykaf and torch are those meant."""
    expected = rf"dykaf {re.escape(version)}, torch {re.escape(torch)}(\+\S+)?, loss .*"
    if not re.fullmatch(expected, said):
        raise Failed(f"expected dykaf {version} with torch {torch}, got: {said}")


# ---- The table -----------------------------------------------------------------------------------


def row_of(name: str, check: Callable[[], str]) -> Row:
    """The line of a check, which returns what it saw or raises Failed."""
    try:
        return Row(name, True, check())
    except Failed as failure:
        return Row(name, False, str(failure))


def table(rows: Sequence[Row]) -> str:
    """One line per check."""
    width = max(len(row.name) for row in rows)
    words = {True: "passed", False: "FAILED"}
    return "\n".join(f"{row.name:{width}}  {words[row.passed]}  {row.detail}" for row in rows)


def main() -> int:
    """Runs all checks, prints a line for each and returns 1 if one failed."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", nargs="+", help="versions of torch (default: all tested ones)")
    parser.add_argument("--untagged", action="store_true", help="before the tag is made")
    args = parser.parse_args()

    WORK.mkdir(parents=True, exist_ok=True)
    DIST.mkdir(exist_ok=True)
    version = written_versions(ROOT)["pyproject.toml"]
    tested = tested_versions((ROOT / "docs" / "install.md").read_text(encoding="utf-8"))
    unknown = set(args.torch or ()) - set(tested)
    if unknown:
        parser.error(f"--torch: expected versions of docs/install.md, got {' '.join(unknown)}")

    rows: list[Row] = []

    def add(name: str, check: Callable[[], str]) -> None:
        rows.append(row_of(name, check))
        print(table(rows[-1:]), flush=True)

    add("versions", lambda: agreed_version(written_versions(ROOT)))
    add("clean tree", lambda: check_clean(git("status", "--porcelain")))
    if not args.untagged:
        add("tag", lambda: check_tag(git("tag", "--points-at", "HEAD"), version))

    sdist: Path | None = None
    for torch in args.torch or tested:

        def check_one(torch: str = torch) -> str:
            nonlocal sdist
            detail, sdist = check_torch(torch, tested[torch], version, sdist)
            return detail

        add(f"torch {torch}", check_one)
    print(f"\n{table(rows)}")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
