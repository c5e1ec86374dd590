"""Launches, bytes, flops and memory of a step on paper, and the times that they allow on a GPU.

    python -m bench.cuda_bounds                        # tables for the screen
    python -m bench.cuda_bounds --markdown             # the same for a document
    python -m bench.cuda_bounds --write docs/cuda.md   # between the markers of that file

Nothing of this package was measured on a GPU. Launches, bytes, flops, operations and memory are
counted (bench/cuda_costs.py, cuda_refresh.py, cuda_others.py). Times are bounds and estimates
(bench/cuda_times.py); every rate stands with its source in bench/cuda_rates.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import cuda_others as others
from bench.cuda_costs import passes_of
from bench.cuda_models import PRICED, shape_set
from bench.cuda_rates import (
    DEVICES,
    LARGE,
    MEDIUM,
    PRECISIONS,
    TALL,
    WIDE,
    Device,
    figure_rows,
)
from bench.cuda_refresh import first_step_of
from bench.cuda_times import Step, Times, plain_times, refreshes, rows_of, step_of
from bench.sass.report import put_between_markers
from bench.shapes import SHAPE_SETS

BEGIN, END = "<!-- bounds: begin -->", "<!-- bounds: end -->"


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


Table = list[list[str]]


def times_table(step: Step) -> Table:
    columns = [(device, q) for device in DEVICES.values() for q in PRECISIONS]
    head = ["ms: bound / estimate", "host"] + [f"{d.name} {q}" for d, q in columns]
    by_column = [list(rows_of(step, device, precision)) for device, precision in columns]
    rows = [head]
    for cells in zip(*by_column, strict=True):
        name, first = cells[0]
        row = [name, number(1e3 * first.host)]
        for (device, _), (_, times) in zip(columns, cells, strict=True):
            row.append(cell_of(name, times, device))
        rows.append(row)
    return rows


def cell_of(name: str, times: Times, device: Device) -> str:
    if name.startswith("plain, "):
        return "-" if "wgmma" in name and not device.wgmma else number(1e3 * times.estimate)
    return f"{number(1e3 * times.bound)} / {number(1e3 * times.estimate)}"


def launch_table(steps: Sequence[Step]) -> Table:
    device = DEVICES["H100"]
    head = ["", "matrices", "vectors", "passes", "kernels", "at high, of these cuBLAS"]
    head += ["copies", "torch operations"]
    head += ["of refreshes, mean", "in the slowest step", "of the first step", "TFLOP", "GB"]
    rows = [head]
    for step in steps:
        found = refreshes(step, device)
        vectors = sum(p.is_adamw for p in step.matrices)
        first = first_step_of(step.matrices, device)
        counts = [len(step.matrices) - vectors, vectors, step.num_passes, step.kernels()]
        cells = [f"{count:,}" for count in counts]
        calls = step.library_calls(device.arch, "high")
        cells.append(f"{step.kernels(device.arch, 'high'):,}, {calls:,}")
        cells += [f"{step.copies}", f"{step.operations}"]
        cells.append(number(sum(r.mean.operations for r in found)))
        cells.append(f"{sum(r.most.operations for r in found):,.0f}")
        cells.append(f"{first.operations:,.0f}")
        cells += [number(step.flops / 1e12), number(step.bytes / 1e9)]
        rows.append([step.model.name, *cells])
    return rows


def memory_table(steps: Sequence[Step]) -> Table:
    rows = [["GB", "weights", "gradients", "state", "workspace", "together", "of 80 GB"]]
    for step in steps:
        weights = sum(p.param_bytes * p.size for p in step.matrices)
        state = sum(p.state_bytes for p in step.matrices)
        workspace = max(
            (sum(p.workspace for p in part) for g in step.groups for part in passes_of(g)),
            default=0,
        )
        parts = [weights + step.model.frozen_bytes, weights, state, workspace]
        verdict = "fits" if sum(parts) < DEVICES["H100"].memory else "does not fit"
        cells = [f"{x / 1e9:.2f}" for x in (*parts, sum(parts))]
        rows.append([step.model.name, *cells, verdict])
    return rows


def first_step_table(steps: Sequence[Step]) -> Table:
    head = ["seconds at least"]
    for device in DEVICES.values():
        head += [f"{device.name}: this", f"{device.name}: SOAP, research code"]
    rows = [head]
    for step in steps:
        row = [step.model.name]
        for device in DEVICES.values():
            first = first_step_of(step.matrices, device)
            row.append(number(max(first.bound, first.host)))
            matrices = [p for p in step.matrices if not p.is_adamw]
            row.append(number(sum(others.eager_first_step(p, device) for p in matrices)))
        rows.append(row)
    return rows


def kernel_table(step: Step) -> Table:
    """The launches of the largest pass that move anything, and what bounds each."""
    device, precision = DEVICES["H100"], "high"
    plans = step.passes(device.arch, precision)
    plan = max(plans, key=lambda launches: sum(launch.bytes for launch in launches))
    rows = [["launch", "blocks", "GFLOP", "MB", "bound us", "of it"]]
    for launch in plan:
        is_later_step = launch.site[0].isdigit() and not launch.site.startswith("1")
        if is_later_step or not launch.bytes:
            continue
        seconds = launch.seconds(device, precision, reached=False)
        limit = "memory"
        if launch.tile and seconds > launch.bytes / device.dram.value:
            ceilings = device.ceilings(launch.precision(precision), launch.tile)
            limit = min(ceilings, key=ceilings.__getitem__)
        name = f"{launch.site} {launch.tile.name}" if launch.tile else launch.site
        cells = [number(launch.flops / 1e9), number(launch.bytes / 1e6), number(1e6 * seconds)]
        rows.append([name, str(launch.blocks or ""), *cells, limit])
    return rows


def set_table() -> Table:
    device = DEVICES["H100"]
    head = ["set", "matrices", "kernels", "GB", "TFLOP"]
    rows = [
        [
            *head,
            "plain ms: bound / estimate",
            "mean with refreshes",
            "without cuBLAS",
            "split k",
            "Muon",
        ]
    ]
    for name in SHAPE_SETS:
        step = step_of(shape_set(name))
        named = dict(rows_of(step, device, "high"))
        row = [name, f"{len(step.matrices):,}", str(step.kernels())]
        row += [number(step.bytes / 1e9), number(step.flops / 1e12)]
        for key in ("a plain step", "mean with refreshes"):
            row.append(cell_of(key, named[key], device))
        for how in ("kernels", "split"):
            row.append(number(1e3 * plain_times(step, device, "high", how).likely))
        row.append(number(1e3 * named["Muon (torch.optim)"].estimate))
        rows.append(row)
    return rows


def rate_table() -> Table:
    rows = [["TFLOP/s, at most", *(f"{d.name} {q}" for d in DEVICES.values() for q in PRECISIONS)]]
    for tile in (LARGE, MEDIUM, WIDE):
        row = [tile.name if tile is not WIDE else f"{WIDE.name}, {TALL.name}"]
        for device in DEVICES.values():
            for precision in PRECISIONS:
                ceilings = device.ceilings(precision, tile)
                limit = min(ceilings, key=ceilings.__getitem__)
                row.append(f"{ceilings[limit] / 1e12:.0f} ({limit})")
        rows.append(row)
    return rows


def lines(table: Table, with_padding: bool) -> Iterator[str]:
    widths = [max(map(len, column)) * with_padding for column in zip(*table, strict=True)]
    for idx, (first, *rest) in enumerate(table):
        cells = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        yield "| " + " | ".join([first.ljust(widths[0]), *cells]) + " |"
        if idx == 0:
            yield "|---" + "|---:" * len(rest) + "|"


def sections(in_document: bool) -> Iterator[tuple[str, str, Table]]:
    """Title, what to know, table."""
    steps = [step_of(make()) for make in PRICED]
    yield "Counted: launches and operations", COUNTED, launch_table(steps)
    yield "Counted: memory", "Without what a refresh takes for a moment.", memory_table(steps)
    yield "What a product of csrc/cuda can reach at most", CEILINGS, rate_table()
    for idx, step in enumerate(steps):
        note = "" if idx else MILLISECONDS
        yield f"Milliseconds per step: {step.model.name}", note, times_table(step)
    yield "The first step", FIRST_STEP, first_step_table(steps)
    if not in_document:
        title = 'GPT-2 small\'s largest pass on an H100 at "high", kernel by kernel'
        yield title, "Bounds. Of three Newton-Schulz steps the first.", kernel_table(steps[0])
        yield "Other sets of shapes, H100, high", OTHER_SETS, set_table()
    yield "Every number that is not counted", "", figure_rows()


COUNTED = (
    'Kernels: the plan\'s, and two per parameter group for max|G|; then those at "high" on an '
    "H100, with cuBLAS's calls. Operations of torch: for what is not finite; those of refreshes "
    "and of the first step come on top. TFLOP and GB of a plain step without cuBLAS: whole blocks; "
    "each kernel reads and writes its arrays once."
)
CEILINGS = (
    "The least of three: the instruction, L2 and shared memory by the block's flops per byte."
)
MILLISECONDS = (
    "Bound / estimate; of the rows with other products the estimate. cuBLAS has what the package's "
    'rules give it: large sides on an H100 at "high" and "medium".'
)
FIRST_STEP = (
    "Eigenvectors one matrix after the other; here of sides up to 1,024, longer ones start from "
    "orthogonal iterations."
)
OTHER_SETS = (
    "The sets of bench/shapes.py in their own sizes, float32; milliseconds. Without cuBLAS, and "
    "with symmetric products split along k at no cost: of a plain step, on the device alone."
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cuda_bounds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--markdown", action="store_true", help="cells without padding")
    parser.add_argument("--write", type=Path, help="put the tables between the file's markers")
    options = parser.parse_args(arguments)
    text = ""
    for title, note, table in sections(in_document=bool(options.write)):
        text += f"\n### {title}\n\n" + (f"{note}\n\n" if note else "")
        padded = not (options.markdown or options.write)
        text += "\n".join(lines(table, padded)) + "\n"
    if options.write:
        put_between_markers(options.write, BEGIN, END, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
