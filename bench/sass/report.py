"""The tables."""

from pathlib import Path

from bench.sass.kernels import Kernel

BEGIN, END = "<!-- sass: begin -->", "<!-- sass: end -->"

GEMM_HEAD = """\
| kernel | registers | shared KiB | threads | blocks/SM (limit) | HMMA | LDSM | LDS | LDGSTS | \
instructions | bound | limit |
|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|---|
"""
OTHERS_HEAD = """\
| kernel | registers | shared bytes | threads | blocks/SM (limit) | global accesses | of 16 bytes |
|---|---:|---:|---:|---|---:|---:|
"""


def gemm_row(kernel: Kernel) -> str:
    loop = kernel.loop
    assert loop is not None
    counts = [loop.mix.get(u, 0) for u in ("HMMA", "LDSM", "LDS", "LDGSTS128")]
    cells = [
        kernel.name.removeprefix("gemm "),
        kernel.resources.registers,
        f"{kernel.shared_bytes / 1024:.0f}",
        kernel.threads,
        f"{kernel.blocks} ({kernel.limit})",
        *(f"{c:.0f}" for c in counts),
        f"{loop.issued:.0f}",
        f"{loop.bound:.0%}",
        loop.limit,
    ]
    return "| " + " | ".join(map(str, cells)) + " |\n"


def other_row(kernel: Kernel) -> str:
    total = kernel.wide + kernel.narrow
    cells = [
        kernel.name,
        kernel.resources.registers,
        kernel.shared_bytes,
        kernel.threads,
        f"{kernel.blocks} ({kernel.limit})",
        total,
        kernel.wide,
    ]
    return "| " + " | ".join(map(str, cells)) + " |\n"


def tables(kernels: list[Kernel]) -> str:
    """Returns Markdown: matrix multiplications and the other kernels, per architecture."""
    text = ""
    for arch in sorted({k.arch for k in kernels}):
        here = sorted((k for k in kernels if k.arch == arch), key=lambda k: k.name)
        gemms = [k for k in here if k.loop is not None]
        text += f"\n### sm_{arch}, matrix multiplications\n\n" + GEMM_HEAD
        text += "".join(map(gemm_row, gemms))
        text += f"\n### sm_{arch}, other kernels\n\n" + OTHERS_HEAD
        text += "".join(other_row(k) for k in here if k.loop is None)
    return text


def defects(kernels: list[Kernel]) -> list[str]:
    """Returns one line for each stack frame, spill or access to local memory."""
    lines = []
    for kernel in kernels:
        found = kernel.resources.defects
        if kernel.local:
            found = [*found, f"{kernel.local} accesses to local memory"]
        lines += [f"sm_{kernel.arch} {kernel.name}: {defect}" for defect in found]
    return lines


def put_between_markers(path: Path, begin: str, end: str, text: str) -> None:
    """Replaces what stands between two marker lines of a file."""
    before, found_begin, rest = path.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"{path} has no lines {begin} and {end}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")
