"""What the evidence suite makes of its records (made-up ones); who gets which weights and data."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.evidence import optimizers
from bench.evidence.fisher_report import settled_step
from bench.evidence.grid import Run, load_grid
from bench.evidence.optimizers import DYKAF_BASE, make_adamw, make_optimizer
from bench.evidence.summary import summarise
from bench.evidence.tasks import lora, vision

needs_muon = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon"
)
needs_dykaf = pytest.mark.skipif(
    importlib.util.find_spec("dykaf") is None, reason="dykaf is not built"
)

SETTINGS = {"steps": 3}
GRID: dict[str, Any] = {
    "tuning_seed": 9,
    "baselines": ["base"],
    "contenders": {"base": {"kind": "adamw"}, "ours": {"kind": "muon"}, "wild": {"kind": "dykaf"}},
    "tasks": {
        "vision": {
            "quick": {
                "lrs": [0.1, 0.2, 0.4],
                "warmups": [0, 5],
                "seeds": [0, 1, 2],
                "settings": SETTINGS,
            }
        }
    },
}


def record(
    contender: str, role: str, lr: float, warmup: int, seed: int, loss: float | None
) -> dict[str, Any]:
    return {
        "task": "vision",
        "contender": contender,
        "options": GRID["contenders"].get(contender),
        "settings": SETTINGS,
        "data_sha256": "data",
        "role": role,
        "lr": lr,
        "warmup": warmup,
        "seed": seed,
        "diverged": loss is None,
        "final": None if loss is None else {"loss": loss},
        "cpu_seconds": 4.0,
        "optimizer_cpu_seconds": 1.0,
        "environment": {"dykaf_sha256": "a", "cpu": "b", "torch": "c"},
    }


def records_of(
    contender: str, lr: float, warmup: int, losses: list[float | None]
) -> list[dict[str, Any]]:
    """The point is the best of all in tuning; a report per seed."""
    tuning = [
        record(contender, "tune", rate, steps, 9, 1.0 + (rate != lr) + (steps != warmup))
        for rate in (0.1, 0.2, 0.4)
        for steps in (0, 5)
    ]
    reports = [record(contender, "report", lr, warmup, *pair) for pair in enumerate(losses)]
    return tuning + reports


def rows_of(records: list[dict[str, Any]]) -> tuple[dict[str, list[str]], list[str]]:
    """Cells of the table by contender, and the notes."""
    pytest.importorskip("matplotlib")
    from bench.evidence.report import result_table

    summary = summarise("vision", "quick", records, GRID)
    cells = [line.strip("| ").split(" | ") for line in result_table(summary)[2:]]
    return {row[0]: row for row in cells}, summary.notes


def test_the_result_table() -> None:
    records = records_of("base", 0.2, 0, [2.0, 2.5, 3.0])
    records += records_of("ours", 0.4, 5, [1.0, 1.6, 2.0])
    rows, notes = rows_of(records)
    tail = ["0 of 6, 0 of 3", "4.0", "25%"]
    assert rows["base"] == ["base", "0.2", "0", "3", "2.5000", "0.5000", "", *tail]
    # Differences -1, -0.9, -1: mean -29/30, deviation sqrt(1/300), t = 4.30265 for 2 degrees.
    half = 4.30265 * (1 / 300) ** 0.5 / 3**0.5
    difference = f"**-0.9667 ± {half:.4f}**"
    edges = ["0.4 (edge)", "5 (edge)"]
    assert rows["ours"] == ["ours", *edges, "3", "1.5333", "0.5033", difference, *tail]
    assert notes == []


def test_a_diverged_report_leaves_means_and_pairs() -> None:
    records = records_of("base", 0.2, 0, [2.0, 2.5, 3.0])
    records += records_of("ours", 0.2, 0, [1.0, None, 3.5])
    records += records_of("wild", 0.2, 0, [None, None, None])
    records += [record("base", "report", 0.2, 0, 7, 0.1)]
    rows, _ = rows_of(records)
    # -1 and +0.5: t = 12.7062 for one degree of freedom, deviation 1.5 / sqrt(2).
    assert rows["ours"][4:7] == ["2.2500", "1.7678", f"-0.2500 ± {12.7062 * 0.75:.4f} (2 pairs)"]
    assert rows["ours"][7] == "0 of 6, 1 of 3"
    assert rows["wild"][4:8] == ["", "", "", "0 of 6, 3 of 3"]


def test_runs_that_the_grid_does_not_ask_for_count_for_nothing() -> None:
    records = records_of("base", 0.2, 0, [2.0, 2.5, 3.0])
    strays = [
        record("base", "tune", 9.0, 0, 9, 0.0),  # a rate tried by hand
        record("base", "tune", 0.2, 3, 9, 0.0),
        record("base", "tune", 0.2, 0, 8, 0.0),
        record("base", "report", 0.2, 0, 77, 0.0),
        {**record("base", "report", 0.2, 0, 0, 0.0), "options": {"kind": "muon"}},
        {**record("gone", "tune", 0.2, 0, 9, 0.0), "options": {"kind": "adamw"}},
    ]
    expected, _ = rows_of(records)
    rows, notes = rows_of(records + strays)
    assert rows == expected
    assert notes == ["6 records of another grid file or other data are left out."]


def test_mixed_environments_are_told() -> None:
    records = records_of("base", 0.2, 0, [2.0, 2.5, 3.0])
    records[-1]["environment"] = {"dykaf_sha256": "a", "cpu": "other", "torch": "d"}
    assert rows_of(records)[1] == [
        "The records come from 2 versions of torch: c, d.",
        "The records come from 2 CPUs: b, other.",
    ]


def test_settled_step() -> None:
    def points(*errors: float | None) -> dict[str, Any]:
        other = {"method": "other", "target": "in-sample", "own": 1.0, "step": 0}
        return {
            "points": [other]
            + [
                {"method": "ksl", "target": "in-sample", "own": own, "step": step}
                for step, own in enumerate(errors, 1)
            ]
        }

    assert settled_step(points(1.5, 1.005, 1.2, 1.01, 1.002), "ksl") == 4
    assert settled_step(points(1.005, 1.2), "ksl") is None
    assert settled_step(points(1.0, None, 1.0), "ksl") == 3


# ---- Axes ----------------------------------------------------------------------------------------


def test_the_page_of_the_axes(tmp_path: Path) -> None:
    """Two sizes with records and one without; a contender that one of them does not have."""
    pytest.importorskip("matplotlib")
    from bench.evidence.records import append_record, results_path
    from bench.evidence.report import write_report

    table = GRID["tasks"]["vision"]["quick"]
    sizes = {
        "batch1": table | {"settings": {"steps": 3, "batch": 1, "clip": 2.0}},
        "batch4": table | {"settings": {"steps": 3, "batch": 4, "clip": 2.0}},
        "batch9": table,
        "other": table,
    }
    members = ["vision/batch1", "vision/batch4", "vision/batch9"]
    axes = {"batch": members, "lonely": ["vision/batch1", "vision/batch9"]}
    grid = GRID | {"tasks": {"vision": sizes}, "axes": axes}
    results = {
        "batch1": {"base": (0.2, [2.0, 2.5, 3.0]), "ours": (0.2, [1.0, 1.6, 2.0])},
        "batch4": {"base": (0.4, [2.0, 2.5, 3.0]), "wild": (0.1, [None, None, None])},
        "other": {"base": (0.2, [2.0, 2.5, 3.0])},
    }
    for size, contenders in results.items():
        for contender, (lr, losses) in contenders.items():
            for entry in records_of(contender, lr, 0, losses):
                own = {"settings": sizes[size]["settings"], "curve": []}
                key = f"{contender} {entry['role']} {entry['lr']} {entry['warmup']} {entry['seed']}"
                append_record(results_path(tmp_path, "vision", size), entry | own | {"key": key})
    assert write_report(tmp_path, tmp_path, grid, ["vision"], ["other"]) == 0
    assert not (tmp_path / "axes.md").exists()  # none of its sizes was written
    assert write_report(tmp_path, tmp_path, grid, ["vision"], ["batch*"]) == 0
    text = (tmp_path / "axes.md").read_text()
    assert "- [vision/batch1](vision-batch1.md): batch 1\n" in text
    assert "## Batch\n" in text and "Lonely" not in text and "batch9" not in text
    tables = [[row.strip("| ") for row in part.splitlines()[2:]] for part in tables_of(text)]
    rates, losses, differences = tables
    assert rates == ["ours | 0.2", "base | 0.2 | 0.4 (edge)", "wild |  | 0.1 (edge)"]
    assert losses == [
        "ours | 1.5333 ± 0.5033",
        "base | 2.5000 ± 0.5000 | 2.5000 ± 0.5000",
        "wild",
    ]
    half = 4.30265 * (1 / 300) ** 0.5 / 3**0.5  # as in the result table
    assert differences == [f"ours | **-0.9667 ± {half:.4f}**", "base", "wild"]
    assert (tmp_path / "axes.png").exists()
    assert "[Along an axis" in (tmp_path / "README.md").read_text()


def tables_of(text: str) -> list[str]:
    return [part for part in text.split("\n\n") if part.startswith("|")]


# ---- Who gets what -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rest_lr"),
    [({}, 0.5), ({"rest_lr": 0.25}, 0.25), ({"rest_ratio": 4.0}, 2.0)],
    ids=["one lr", "rest_lr", "rest_ratio"],
)
@pytest.mark.parametrize(
    "kind",
    [
        "adamw",
        pytest.param("muon", marks=needs_muon),
        "kronecker",
        pytest.param("dykaf", marks=needs_dykaf),
    ],
)
def test_hidden_weights_go_to_the_optimizer_under_test(
    kind: str, options: dict[str, Any], rest_lr: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "REST_BETAS", (0.25, 0.5))
    model = vision.ConvNet([3, 4])
    named = dict(model.named_parameters())
    parts = make_optimizer({"kind": kind, **options}, model, ["convs.1.weight"], 0.5, 0.125)
    matrix, rest = parts.optimizers
    (group,) = matrix.param_groups
    assert (
        type(matrix).__name__
        == {
            "adamw": "AdamW",
            "muon": "Muon",
            "kronecker": "KroneckerOptimizer",
            "dykaf": "DyKAF",
        }[kind]
    )
    (weight,) = group["params"]
    assert weight.data_ptr() == named["convs.1.weight"].data_ptr()
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.125)
    assert isinstance(rest, torch.optim.AdamW)
    others = {id(p) for name, p in named.items() if name != "convs.1.weight"}
    assert {id(p) for group in rest.param_groups for p in group["params"]} == others
    for part in rest.param_groups:
        is_vector = part["params"][0].ndim < 2
        assert (part["lr"], part["weight_decay"]) == (rest_lr, 0.0 if is_vector else 0.125)
        assert part["betas"] == (0.25, 0.5) != group.get("betas")
    parts.scale_lr(0.5)
    assert [part["lr"] for part in rest.param_groups] == [rest_lr / 2] * len(rest.param_groups)
    assert group["lr"] == 0.25


def test_adamw_in_two_parts_is_adamw() -> None:
    torch.manual_seed(0)
    ours = vision.ConvNet([3, 4])
    whole = copy.deepcopy(ours)
    parts = make_optimizer({"kind": "adamw"}, ours, ["convs.1.weight"], 0.5, 0.125)
    adamw = make_adamw(list(whole.parameters()), 0.5, 0.125)
    for _ in range(3):
        images = torch.randn(4, 1, 8, 8)
        for model, optimizer in ((ours, parts), (whole, adamw)):
            model.zero_grad()
            model(images).square().sum().backward()
            optimizer.step()
    for ours_p, whole_p in zip(ours.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours_p, whole_p)


@needs_dykaf
def test_the_contender_dykaf_is_the_package_at_its_defaults() -> None:
    from dykaf import DyKAF

    options = {**DYKAF_BASE, **load_grid()["contenders"]["dykaf"]}
    defaults = DyKAF([torch.zeros(2)]).defaults
    assert options.pop("kind") == "dykaf"
    options["betas"] = tuple(options["betas"])
    assert options == {name: defaults[name] for name in options}


def make_run(role: str, settings: dict[str, Any]) -> Run:
    return Run("vision", "quick", "base", {}, 0.1, 0, 0, role, settings, "data")


def test_images_of_training_tuning_and_report_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.arange(60.0).reshape(60, 1, 1, 1)
    monkeypatch.setattr(vision, "load", lambda: (images, torch.zeros(60, dtype=torch.long), ""))
    tune, report = (vision.Vision(make_run(role, {"channels": [2]})) for role in ("tune", "report"))
    parts = [tune.eval_images, report.eval_images, tune.images]
    assert [len(part) for part in parts] == [6, 6, 48]
    assert torch.equal(torch.cat(parts).flatten().sort().values, images.flatten())
    assert torch.equal(tune.images, report.images)


def test_snippets_of_training_tuning_and_report_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(idx % lora.FOLDS, idx % 2, [idx]) for idx in range(60)]
    monkeypatch.setattr(lora, "load", lambda max_tokens: rows)
    model = torch.nn.Module()
    model.adapters = {}
    monkeypatch.setattr(lora, "LoraMiniLM", lambda *args, **kwargs: model)
    settings = {"max_tokens": 1, "eval_snippets": 60, "rank": 1, "alpha": 1.0}
    tune, report = (lora.Lora(make_run(role, settings)) for role in ("tune", "report"))
    parts = [tune.held_out, report.held_out, tune.train]
    assert [len(part) for part in parts] == [6, 6, 48]
    assert sorted(row[2][0] for part in parts for row in part) == list(range(60))
    assert tune.train == report.train


@needs_dykaf
def test_the_factors_of_the_fisher_table_are_turned_back() -> None:
    """Two gradients; at power 0 the factors are averages that can be written down."""
    from bench.evidence.tasks.fisher import DykafFactors

    first, second = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(6)).double()
    tracker = DykafFactors(first.shape, 0.9, {"integrator": "diagonal"})
    for G in (first, second):
        tracker.update(G)
    # The prior has the weight of the first gradient: 0.1 mean(G^2) I, in both.
    start = 0.1 * first.square().mean()
    for found, G, H in zip(tracker.factors(), (first, first.T), (second, second.T), strict=True):
        identity = torch.eye(len(G), dtype=torch.float64)
        average = start * identity + 0.1 * G @ G.T / G.shape[1]
        average = 0.9 * average + 0.1 * H @ H.T / H.shape[1]
        error = found / found.norm() - average / average.norm()
        assert float(error.norm()) <= 1e-12
