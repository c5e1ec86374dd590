"""The checks of release/check.py, each on a case that it must reject; nothing is built."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLACES = ["pyproject.toml", "CITATION.cff", "CHANGELOG.md"]


@pytest.fixture(scope="module")
def check() -> Any:
    spec = importlib.util.spec_from_file_location("release_check", ROOT / "release" / "check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["release_check"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files that name the version, to be changed."""
    for name in PLACES:
        shutil.copy2(ROOT / name, tmp_path / name)
    return tmp_path


def test_the_versions_of_this_tree_agree(check: Any) -> None:
    versions = check.written_versions(ROOT)
    text = (ROOT / "pyproject.toml").read_text()
    assert list(versions) == PLACES
    assert f'version = "{check.agreed_version(versions)}"  #' in text


@pytest.mark.parametrize("place", PLACES)
def test_another_version_is_refused(check: Any, tree: Path, place: str) -> None:
    version = check.agreed_version(check.written_versions(tree))
    path = tree / place
    path.write_text(path.read_text().replace(version, "9.9.9", 1))
    with pytest.raises(check.Failed, match=re.escape(f"{place}: 9.9.9")):
        check.agreed_version(check.written_versions(tree))


@pytest.mark.parametrize("place", PLACES)
def test_a_missing_version_is_refused(check: Any, tree: Path, place: str) -> None:
    (tree / place).write_text("nothing\n")
    with pytest.raises(check.Failed, match=f"{place}: none"):
        check.agreed_version(check.written_versions(tree))
    (tree / place).unlink()
    with pytest.raises(check.Failed, match=f"{place}: none"):
        check.agreed_version(check.written_versions(tree))


def test_a_newer_heading_is_refused(check: Any, tree: Path) -> None:
    """The one on top counts."""
    path = tree / "CHANGELOG.md"
    path.write_text(path.read_text().replace("\n## ", "\n## Unreleased\n\n- More.\n\n## ", 1))
    with pytest.raises(check.Failed, match=r"CHANGELOG\.md: Unreleased"):
        check.agreed_version(check.written_versions(tree))


@pytest.mark.parametrize("version", ["0.2.0, unreleased", "0.2", "0.2.0rc1", "none"])
def test_what_is_no_version_of_a_release(check: Any, version: str) -> None:
    with pytest.raises(check.Failed, match=re.escape(f"expected three numbers, got {version}")):
        check.agreed_version(dict.fromkeys(PLACES, version))


def test_a_changed_tree_is_refused(check: Any) -> None:
    check.check_clean("")
    with pytest.raises(check.Failed, match=r"not committed: setup\.py, new\.txt"):
        check.check_clean(" M setup.py\n?? new.txt\n")


def test_a_missing_tag_is_refused(check: Any) -> None:
    assert check.check_tag("other\nv0.2.0\n", "0.2.0") == "v0.2.0"
    for tags in ("", "0.2.0\n", "v0.2.0rc1\nv0.1.0\n"):
        with pytest.raises(check.Failed, match=r"HEAD has no tag v0\.2\.0"):
            check.check_tag(tags, "0.2.0")


def test_the_tested_versions_are_those_of_the_documentation(check: Any) -> None:
    text = "| torch | Python |\n|---|---|\n| 2.6.0 | 3.10.13 | built |\n| 2.13.0 | 3.11.7 | - |\n"
    assert check.tested_versions(text) == {"2.6.0": "3.10.13", "2.13.0": "3.11.7"}
    with pytest.raises(check.Failed, match="was not found"):
        check.tested_versions("| torch | Python |\n")
    here = check.tested_versions((ROOT / "docs" / "install.md").read_text())
    setup_py = (ROOT / "setup.py").read_text()
    for name, torch in (("TORCH_FROM", next(iter(here))), ("TORCH_NEWEST_TESTED", list(here)[-1])):
        minor = ", ".join(torch.split(".")[:2])
        assert re.search(rf"^{name} = \({minor}\)", setup_py, re.MULTILINE)


SMOKE = "dykaf 0.2.0, torch 2.13.0+cpu, loss 0.848 -> 0.084"


@pytest.mark.parametrize(
    "said",
    [
        SMOKE.replace("0.2.0", "0.1.0"),  # the version that was built
        SMOKE.replace("2.13.0", "2.14.1"),
        SMOKE.replace("2.13.0", "2.13.01"),
        SMOKE.replace("0.2.0", "0x2.0"),
        "",
    ],
)
def test_another_installed_version_is_refused(check: Any, said: str) -> None:
    check.check_smoke(SMOKE, "0.2.0", "2.13.0")
    check.check_smoke(SMOKE.replace("+cpu", ""), "0.2.0", "2.13.0")
    with pytest.raises(check.Failed, match=r"expected dykaf 0\.2\.0 with torch 2\.13\.0"):
        check.check_smoke(said, "0.2.0", "2.13.0")


def test_smoke_says_what_the_check_reads(check: Any) -> None:
    import torch

    import dykaf

    said = subprocess.run(
        [sys.executable, str(ROOT / "release" / "smoke.py")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    check.check_smoke(said.strip(), dykaf.__version__, torch.__version__.partition("+")[0])


def test_a_command_that_fails(check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last line is in the table, all of it in the log, and the other checks go on."""
    monkeypatch.setattr(check, "ROOT", tmp_path)
    log = tmp_path / "log"
    command = (sys.executable, "-c", "print('one'); import sys; sys.exit('two')")
    rows = [
        check.row_of("bad", lambda: check.run(log, *command, cwd=tmp_path)),
        check.row_of(
            "good", lambda: check.run(log, sys.executable, "-c", "print(3)", cwd=tmp_path)
        ),
    ]
    assert check.table(rows) == "bad   FAILED  two (log)\ngood  passed  3\n"
    assert "one\ntwo\n" in log.read_text() and log.read_text().endswith("\n3\n\n")


def test_a_python_that_is_missing(check: Any, tmp_path: Path) -> None:
    with pytest.raises(check.Failed, match=r"no python9\.9 on PATH"):
        check.new_environment(tmp_path / "new", tmp_path / "log", "9.9.1", "torch")


@pytest.mark.parametrize("failing", [None, "versions", "clean tree", "tag", "torch 2.13.0"])
def test_the_verdict(
    check: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    failing: str | None,
) -> None:
    """One failure of any check, and the end is 1; the builds are told what they must be."""
    version = check.agreed_version(check.written_versions(ROOT))
    monkeypatch.setattr(check, "WORK", tmp_path / "work")
    monkeypatch.setattr(check, "DIST", tmp_path / "dist")
    monkeypatch.setattr(sys, "argv", ["check.py", "--torch", "2.6.0", "2.13.0"])
    if failing == "versions":
        monkeypatch.setitem(check.VERSION_PATTERNS, "CITATION.cff", "^nothing(.)")
    said = {"status": "?? new.txt" if failing == "clean tree" else ""}
    said["tag"] = "" if failing == "tag" else f"v{version}"
    monkeypatch.setattr(check, "git", lambda *args: said[args[0]])
    calls = []

    def check_torch(*args: Any) -> tuple[str, str]:
        calls.append(args)
        if f"torch {args[0]}" == failing:
            raise check.Failed("it did not build")
        return "it was built", "the sdist"

    monkeypatch.setattr(check, "check_torch", check_torch)
    assert check.main() == (0 if failing is None else 1)
    assert calls == [
        ("2.6.0", "3.10.13", version, None),
        ("2.13.0", "3.11.7", version, "the sdist"),
    ]
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    verdicts = {line[:12].strip(): line[12:].split()[0] for line in table}
    names = ["versions", "clean tree", "tag", "torch 2.6.0", "torch 2.13.0"]
    assert verdicts == {name: "FAILED" if name == failing else "passed" for name in names}
