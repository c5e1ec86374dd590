"""Installation: setup.py, wheels, and what import says where another torch runs."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import dykaf
from dykaf import _build, _build_info

ROOT = Path(__file__).resolve().parent.parent


def run_python(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True)


# The torch it was built against -------------------------------------------------------------------


def test_same_torch_is_accepted():
    assert _build.check_torch() is None


OTHER_TORCH = ["9.9.9", torch.__version__.split("+")[0] + "+other"]


@pytest.mark.parametrize("running", OTHER_TORCH)
def test_other_torch_is_refused(monkeypatch, running):
    monkeypatch.setattr(torch, "__version__", running)
    with pytest.raises(ImportError) as caught:
        _build.check_torch()
    message = str(caught.value)
    assert f"built against torch {_build_info.BUILD_INFO['torch']}" in message
    assert f"torch {running} is running" in message
    assert "\n" not in message


def test_other_torch_is_refused_before_the_module_is_loaded():
    code = (
        "import sys, torch; torch.__version__ = '9.9.9'\n"
        "try:\n    import dykaf\n"
        "except ImportError as error:\n    print(error, '| loaded:', 'dykaf._C' in sys.modules)\n"
    )
    result = run_python("-c", code)
    assert "torch 9.9.9 is running" in result.stdout
    assert result.stdout.rstrip().endswith("loaded: False")


PIP = "pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir "
UV = "uv pip install --reinstall --no-deps --no-build-isolation --no-cache "


def test_a_build_in_place_is_built_again_in_place(monkeypatch, tmp_path):
    tree = tmp_path / "a tree"
    (tree / "python" / "dykaf").mkdir(parents=True)
    (tree / "setup.py").write_text("")
    monkeypatch.setattr(_build, "__file__", str(tree / "python" / "dykaf" / "_build.py"))
    expected = f"type: cd '{tree}' && python setup.py build_ext --inplace"
    assert _build.rebuild_command() == expected


@pytest.mark.parametrize(
    ("installer", "direct_url", "expected"),
    [
        ("pip", '{"url": "file://HERE/d%20e", "dir_info": {}}', f"type: {PIP}'HERE/d e'"),
        ("uv", '{"url": "file://HERE/d%20e", "dir_info": {}}', f"type: {UV}'HERE/d e'"),
        ("pip", '{"url": "file://HERE/gone.tar.gz"}', f"in its source tree, type: {PIP}."),
        ("pip", '{"url": "file://HERE/x.whl"}', f"in its source tree, type: {PIP}."),
        ("pip", '{"url": "https://a.b/x.tar.gz"}', f"type: {PIP}https://a.b/x.tar.gz"),
        (
            "pip",
            '{"url": "https://a.b/c", "vcs_info": {"vcs": "git", "commit_id": "12ab"}}',
            f"type: {PIP}git+https://a.b/c@12ab",
        ),
        ("other", None, f"in its source tree, type: {PIP}."),
        (None, None, f"in its source tree, type: {PIP}."),
    ],
)
def test_an_installation_is_built_again_from_its_source(
    monkeypatch, tmp_path, installer, direct_url, expected
):
    """Without a cache, which would give the same module again."""
    site = tmp_path / "lib" / "site-packages"
    info = site / "dykaf-0.1.0.dist-info"
    info.mkdir(parents=True)
    (tmp_path / "d e").mkdir()
    (tmp_path / "x.whl").write_text("")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dykaf\nVersion: 0.1.0\n")
    if installer is not None:
        (info / "INSTALLER").write_text(f"{installer}\n")
    if direct_url is not None:
        (info / "direct_url.json").write_text(direct_url.replace("HERE", str(tmp_path)))
    monkeypatch.setattr(_build, "__file__", str(site / "dykaf" / "_build.py"))
    monkeypatch.setattr(sys, "path", [str(site)])
    assert _build.rebuild_command() == expected.replace("HERE", str(tmp_path))


def test_a_package_without_metadata_is_built_again_from_its_source_tree(monkeypatch, tmp_path):
    monkeypatch.setattr(_build, "__file__", str(tmp_path / "a" / "dykaf" / "_build.py"))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert _build.rebuild_command() == f"in its source tree, type: {PIP}."


def test_missing_build_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "dykaf._build_info", None)
    with pytest.raises(ImportError, match="dykaf was not built"):
        _build.check_torch()


# setup.py -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup_py():
    spec = importlib.util.spec_from_file_location("dykaf_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("command", ["build_ext", "dist_info"])
def test_setup_without_torch_stops_with_one_line(tmp_path, command):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    out = tmp_path / "out"
    out.mkdir()
    target = ["--build-lib" if command == "build_ext" else "--output-dir", str(out)]
    script = str(ROOT / "setup.py")
    result = run_python(script, "--quiet", command, *target, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "no torch here" in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr
    assert list(out.iterdir()) == []


def test_setup_with_torch_does_not_stop(setup_py):
    assert setup_py.require_torch() is None


@pytest.mark.parametrize("version", ["2.5.1", "2.0.0+cu118", "1.13.0+cu117"])
def test_an_old_torch_stops(setup_py, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    expected = f"torch {version} is installed, and 2.6 or later is needed"
    with pytest.raises(SystemExit, match=re.escape(expected)):
        setup_py.require_torch()


@pytest.mark.parametrize("version", ["2.6.0", "2.15.0+cu132", "2.16.0a0+git1234567", "3.0.0"])
def test_a_new_torch_is_tried(setup_py, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    assert setup_py.require_torch() is None


def test_a_failure_with_a_new_torch_says_that_it_is_new(setup_py):
    assert setup_py.hint_of_new("2.6.0") == setup_py.hint_of_new("2.15.1+cu132") == ""
    assert "torch 2.16.0 is newer than 2.15, " in setup_py.hint_of_new("2.16.0")


def test_what_the_metadata_ask_for():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r"^dependencies = (.*)$", text, re.MULTILINE) == ['["torch>=2.6"]']
    assert re.findall(r"^requires-python = (.*)$", text, re.MULTILINE) == ['">=3.10"']


def test_the_nvcc_of_cuda_home_comes_before_that_on_path(setup_py, monkeypatch, tmp_path):
    for name in ("cudacxx", "home", "path"):
        (tmp_path / name / "bin").mkdir(parents=True)
        tool = tmp_path / name / "bin" / "nvcc"
        tool.write_text("#!/bin/sh\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert setup_py.find_nvcc() == str(tmp_path / "path" / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup_py.find_nvcc() == str(tmp_path / "home" / "bin" / "nvcc")
    monkeypatch.setenv("CUDACXX", str(tmp_path / "cudacxx" / "bin" / "nvcc"))
    assert setup_py.find_nvcc() == str(tmp_path / "cudacxx" / "bin" / "nvcc")


@pytest.fixture
def copy(tmp_path):
    """The files of the repository, without what was built there."""
    git = ["git", "-C", str(ROOT), "ls-files", "--cached", "-z"]
    listed = subprocess.run(git, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    copy = tmp_path / "copy"
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():  # not while a file is being removed
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


def test_the_sdist_holds_what_the_repository_holds(tmp_path, copy):
    expected = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    expected = {name for name in expected if not name.startswith((".ci/", ".git", ".pre-commit"))}
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)],
        cwd=copy,
        check=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        found = {name.partition("/")[2] for name in file.getnames()}
    assert expected <= found


# Compiles nothing: writes what build_module would, built for another torch.
FAKE_BUILD = """
import sys, sysconfig, setup

def build_module(version, target):
    target.mkdir(parents=True, exist_ok=True)
    (target / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))).write_text("not a library")
    info = {"version": version, "torch": "2.99.0+other"}
    (target / "_build_info.py").write_text(f"BUILD_INFO = {info}")

setup.build_module = build_module
sys.argv = ["setup.py", "--quiet", "bdist_wheel", "--dist-dir", sys.argv[1]]
setup.main()
"""


def test_a_wheel_names_its_torch_and_stops_with_another(tmp_path, copy):
    built = subprocess.run(
        [sys.executable, "-c", FAKE_BUILD, str(tmp_path)], cwd=copy, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    python_tag = "cp{}{}".format(*sys.version_info)
    torch_tag = "0torch" + torch.__version__.replace("+", "_")
    expected = f"dykaf-{dykaf.__version__}-{torch_tag}-{python_tag}-{python_tag}-linux_"
    assert wheel.name.startswith(expected)
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as file:
        assert {Path(name).parts[0] for name in file.namelist()} == {
            "dykaf",
            f"dykaf-{dykaf.__version__}.dist-info",
        }
        file.extractall(site)
    result = run_python("-c", "import dykaf", PYTHONPATH=str(site))
    assert result.returncode == 1
    running = f"built against torch 2.99.0+other, but torch {torch.__version__} is running"
    assert running in result.stderr.splitlines()[-1]
    assert f"type: {PIP}." in result.stderr.splitlines()[-1]


def test_old_setuptools_stops(setup_py, monkeypatch):
    setup_py.require_setuptools()
    monkeypatch.setattr(setup_py.setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match=r"setuptools 65.5.0 is too old; type: pip install"):
        setup_py.require_setuptools()
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    with pytest.raises(SystemExit, match=r"setuptools 65.5.0 is too old"):
        setup_py.main()


def test_old_setuptools_builds_in_place(setup_py, monkeypatch):
    calls = []
    monkeypatch.setattr(setup_py.setuptools, "__version__", "59.6.0")
    monkeypatch.setattr(setup_py, "build_module", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(sys, "argv", ["setup.py", "--quiet", "build_ext", "--inplace"])
    setup_py.main()
    assert calls == [(dykaf.__version__, ROOT / "python" / "dykaf")]


def test_unknown_dykaf_cuda_stops_with_one_line(tmp_path):
    target = str(tmp_path / "out")
    args = (str(ROOT / "setup.py"), "--quiet", "build_ext", "--build-lib", target)
    result = run_python(*args, DYKAF_CUDA="yes")
    assert result.returncode == 1
    assert result.stderr.splitlines() == ["dykaf: DYKAF_CUDA: expected auto, on or off, got 'yes'"]


CPU_TORCH = ("2.13.0+cpu", None)
CUDA_TORCH = ("2.14.1+cu130", "13.0")


@pytest.mark.parametrize(
    ("torch_build", "num_sources", "nvcc", "reason"),
    [
        (CPU_TORCH, 3, "13.0", "torch 2.13.0+cpu is not a CUDA build"),
        (CUDA_TORCH, 0, "13.0", "no CUDA sources"),
        (CUDA_TORCH, 3, None, "nvcc was not found"),
        (CUDA_TORCH, 3, "12.8", "nvcc is 12.8, but torch 2.14.1+cu130 was built with CUDA 13.0"),
    ],
)
def test_cuda_is_not_built(setup_py, torch_build, num_sources, nvcc, reason):
    with_cuda, line = setup_py.decide_cuda("auto", *torch_build, num_sources, nvcc)
    assert not with_cuda
    assert line.startswith("CUDA is not built: ")
    assert reason in line
    with pytest.raises(SystemExit, match=f"DYKAF_CUDA=on, but .*{re.escape(reason)}"):
        setup_py.decide_cuda("on", *torch_build, num_sources, nvcc)


@pytest.mark.parametrize("nvcc", ["13.0", "13.2"])
def test_cuda_is_built(setup_py, nvcc):
    for mode in ("auto", "on"):
        assert setup_py.decide_cuda(mode, *CUDA_TORCH, 3, nvcc) == (
            True,
            f"CUDA is built: nvcc {nvcc}, torch 2.14.1+cu130",
        )
    assert setup_py.decide_cuda("off", *CUDA_TORCH, 3, nvcc)[0] is False


def test_architectures(setup_py):
    assert setup_py.parse_archs("8.0;9.0+PTX") == "8.0 9.0+PTX"
    assert setup_py.parse_archs(" 9.0a, 10.0 ") == "9.0a 10.0"
    assert setup_py.parse_archs("7.5;8.6;12.0+PTX") == "8.6 12.0+PTX"
    for bad in ("Hopper", "sm_90", "90", "8.0;PTX", "7.0;7.5"):
        with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: expected"):
            setup_py.parse_archs(bad)
