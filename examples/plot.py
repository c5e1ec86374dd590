"""Draw the validation loss of all runs of a folder, over training time and over steps.

python examples/plot.py runs/gpt
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
from checkpoint import write_atomically
from matplotlib.figure import Figure

matplotlib.use("agg")

PICTURE = "val_loss.png"
COLORS = {"dykaf": "#0072B2", "adamw": "#D55E00", "muon": "#009E73"}
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = ("", "o", "s", "^")  # the next one when an optimizer has used up the line styles
# A loss starts at log(256) = 5.5; what matters is near the end.
SHOWN_RANGE = 1.2


def load_runs(folder: Path) -> list[dict[str, Any]]:
    """The runs whose JSON files lie in a folder, in order of their names; other files are left."""
    runs = []
    for path in sorted(folder.glob("*.json")):
        try:
            run = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(run, dict) and run.get("curve") and "optimizer" in run.get("args", {}):
            runs.append(run)
    return runs


def label_of(args: dict[str, Any]) -> str:
    """Legend entry of a run; runs that differ only in their seed share it."""
    refresh = f", every {args['precondition_frequency']}" if args["optimizer"] == "dykaf" else ""
    return f"{args['optimizer']}, lr {args['lr']:g}{refresh}"


def draw_folder(folder: Path) -> Path | None:
    """Draw folder/val_loss.png.

    Returns:
        Its path; None if the folder holds no runs.
    """
    runs = load_runs(folder)
    if not runs:
        return None
    by_label: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run["args"]["optimizer"], run["args"]["lr"])):
        by_label[label_of(run["args"])].append(run)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    num_seen: dict[str, int] = defaultdict(int)
    for label, group in by_label.items():
        name = group[0]["args"]["optimizer"]
        style = LINE_STYLES[num_seen[name] % len(LINE_STYLES)]
        marker = MARKERS[num_seen[name] // len(LINE_STYLES) % len(MARKERS)]
        num_seen[name] += 1
        title = label if len(group) == 1 else f"{label} ({len(group)} seeds)"
        for run_idx, run in enumerate(group):
            losses = [point["val_loss"] for point in run["curve"]]
            for axis, key in zip(axes, ("train_seconds", "step"), strict=True):
                axis.plot(
                    [point[key] for point in run["curve"]],
                    losses,
                    style,
                    linewidth=1.4,
                    marker=marker,
                    markersize=3,
                    color=COLORS.get(name, "#555555"),
                    label=title if run_idx == 0 else None,
                )
    best = min(point["val_loss"] for run in runs for point in run["curve"])
    axes[0].set_ylim(best - 0.05, best + SHOWN_RANGE)
    axes[0].set_ylabel("validation loss (nats per byte)")
    axes[0].set_xlabel("training time (seconds, validation not counted)")
    axes[1].set_xlabel("steps")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
    # Below the panels: many runs would cover the curves.
    handles, titles = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        titles,
        loc="outside lower center",
        ncols=min(4, len(titles)),
        frameon=False,
        fontsize=9,
    )
    path = folder / PICTURE
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130))
    return path


def main() -> int:
    """Draw the folder named on the command line."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print("usage: python examples/plot.py FOLDER", file=sys.stderr)
        return 2
    path = draw_folder(Path(sys.argv[1]))
    if path is None:
        print(f"plot.py: error: no runs in {sys.argv[1]}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
