"""Tuning in the evidence suite: stages, ratios of the rest, points that another size selects."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence_helpers import InProcess

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.evidence import EvidenceError
from bench.evidence.grid import Plan, Run, load_grid
from bench.evidence.records import read_records
from bench.evidence.search import Point, axes_of, edges, point_of, search, select
from bench.evidence.summary import summarise

LRS, WARMUPS, RATIOS = [0.1, 0.2, 0.4], [0, 5], [1.0, 0.5, 0.25]
TABLE: dict[str, Any] = {
    "lrs": LRS,
    "warmups": WARMUPS,
    "rest_ratios": RATIOS,
    "search": [["lrs"], ["rest_ratios"], ["warmups"], ["lrs"]],
    "seeds": [0, 1],
    "settings": {"steps": 3},
}
# The best rate is the middle one, but for the middle ratio, whose best is the last.
BEST = Point(0.4, 5, 0.5)


def loss_of(point: Point) -> float:
    lr, warmup, ratio = (
        values.index(value)
        for values, value in zip((LRS, WARMUPS, RATIOS), dataclasses.astuple(point), strict=True)
    )
    at_best = 2 if ratio == 1 else 1
    return 1.0 + 0.1 * abs(lr - at_best) + 0.3 * abs(ratio - 1) - 0.2 * warmup


def tuning_record(
    loss: float | None, lr: float, warmup: int = 0, ratio: float | None = None
) -> dict[str, Any]:
    final = None if loss is None else {"loss": loss}
    options = {} if ratio is None else {"rest_ratio": ratio}
    outcome = {"diverged": loss is None, "final": final}
    return {"lr": lr, "warmup": warmup, "options": options, **outcome}


def test_selection_rule() -> None:
    records = [
        tuning_record(2.0, 0.1),
        tuning_record(1.5, 0.2, 30),
        tuning_record(1.5, 0.2, 10, 0.5),
        tuning_record(1.5, 0.2, 10, 1.0),
        tuning_record(1.5, 0.4),
        tuning_record(None, 0.01),
    ]
    for order in itertools.permutations(records):
        assert select(order) == Point(0.2, 10, 0.5)
    assert select([tuning_record(None, 0.1)]) is None
    # Several seeds: their mean, where all of them ended.
    seeds = [(3.0, 0.1), (1.0, 0.1), (1.5, 0.2), (2.0, 0.2), (0.5, 0.4), (None, 0.4)]
    assert select([tuning_record(*pair) for pair in seeds]) == Point(0.2, 0)


def test_edges() -> None:
    def found(point: Point, *lists: list[Any]) -> list[str]:
        return edges(point, dict(zip(("lrs", "warmups", "rest_ratios"), lists, strict=True)))

    assert found(Point(0.1, 0), [0.1, 0.2], [0], [None]) == ["lr"]
    assert found(Point(0.2, 30), [0.1, 0.2, 0.4], [10, 30], [None]) == ["warmup"]
    assert found(Point(0.2, 10), [0.1, 0.2, 0.4], [10, 30], [None]) == []
    assert found(Point(0.4, 0), [0.1, 0.2, 0.4], [0, 30], [None]) == ["lr"]
    for ratio, expected in ((1.0, ["rest_ratio"]), (0.5, []), (0.25, ["rest_ratio"])):
        assert found(Point(0.2, 0, ratio), [0.1, 0.2, 0.4], [0, 30], RATIOS) == expected
    assert found(Point(0.2, 0, 1.0), [0.1, 0.2, 0.4], [0, 30], [1.0]) == []


def run_search(table: dict[str, Any], options: dict[str, Any] | None = None) -> list[list[Any]]:
    """Answer what is asked, stage by stage; the new pairs of each stage, then the best."""
    done: dict[Any, dict[str, Any]] = {}
    stages: list[list[Any]] = []
    while True:
        found = search(table, options or {}, [8, 9], lambda *pair: done.get(pair))
        new = [pair for pair in found.asked if pair not in done]
        if not new:
            assert found.is_complete and found.num_later == 0
            assert found.records == [done[pair] for pair in found.asked]
            return [*stages, [found.best]]
        assert not found.is_complete and found.best is None
        stages.append(new)
        for point, seed in new:
            values = dataclasses.astuple(point)
            done[point, seed] = tuning_record(loss_of(point) + 0.5 * (seed == 9), *values)


def both_seeds(*points: Point) -> list[Any]:
    return [(point, seed) for point in points for seed in (8, 9)]


def test_how_much_can_come_later() -> None:
    found = search(TABLE, {}, [8, 9], lambda *pair: None)
    assert len(found.asked) == 2 * 3 and found.num_later == 2 * (2 + 1 + 2)


def test_each_stage_stands_at_the_best_point_so_far() -> None:
    assert run_search(TABLE) == [
        both_seeds(*(Point(lr, 0, 1.0) for lr in LRS)),
        both_seeds(Point(0.2, 0, 0.5), Point(0.2, 0, 0.25)),
        both_seeds(Point(0.2, 5, 0.5)),
        both_seeds(Point(0.1, 5, 0.5), Point(0.4, 5, 0.5)),
        [BEST],
    ]


def test_without_stages_all_points_are_asked_for_at_once() -> None:
    table = {name: value for name, value in TABLE.items() if name != "search"}
    every = [Point(*values) for values in itertools.product(LRS, WARMUPS, RATIOS)]
    assert run_search(table) == [both_seeds(*every), [BEST]]
    joint = table | {"search": [["lrs", "rest_ratios"], ["warmups"]]}
    first = both_seeds(*(Point(lr, 0, ratio) for lr in LRS for ratio in RATIOS))
    assert run_search(joint) == [first, both_seeds(Point(0.4, 5, 0.5)), [BEST]]


def test_a_ratio_or_rate_of_its_own_is_kept() -> None:
    own = run_search(TABLE, {"rest_ratio": 0.5})
    assert own[0] == both_seeds(*(Point(lr, 0, 0.5) for lr in LRS))
    assert own[-1] == [BEST] and len(own) == 4
    assert axes_of(TABLE, {"rest_lr": 0.1})["rest_ratios"] == [None]
    assert Point(0.1, 0, 0.5).options({"rest_ratio": 0.5, "k": 1}) == {"rest_ratio": 0.5, "k": 1}
    assert Point(0.1, 0).options({"rest_lr": 0.1}) == {"rest_lr": 0.1}


def test_a_stage_that_diverges_ends_the_search() -> None:
    def find(point: Point, seed: int) -> dict[str, Any]:
        return tuning_record(None, *dataclasses.astuple(point))

    found = search(TABLE, {}, [9], find)
    assert found.is_complete and found.best is None and found.num_later == 0
    assert found.asked == [(Point(lr, 0, 1.0), 9) for lr in LRS]


# ---- Plans ---------------------------------------------------------------------------------------

CONTENDERS: dict[str, Any] = {"a": {"kind": "adamw"}, "b": {"kind": "muon", "rest_ratio": 0.25}}


def make_plan(**changes: Any) -> Plan:
    return dataclasses.replace(
        Plan("vision", "quick", TABLE, CONTENDERS, [9], "data"),
        **changes,
    )


def fake_record(run: Run, loss: float | None = None) -> dict[str, Any]:
    value = loss_of(point_of(dataclasses.asdict(run))) if loss is None else loss
    environment = {"dykaf_sha256": None, "cpu": "some", "torch": "2"}
    outcome = {"final": {"loss": value}, "diverged": False, "environment": environment}
    seconds = {"cpu_seconds": 4.0, "optimizer_cpu_seconds": 1.0, "curve": []}
    return {"key": run.key, **dataclasses.asdict(run), **outcome, **seconds}


def run_all(plan: Plan, done: dict[str, Any]) -> list[Run]:
    order = []
    while runs := plan.runnable(done):
        order.append(runs[0])
        before = plan.total(done)
        done[runs[0].key] = fake_record(runs[0])
        assert plan.total(done) <= before
    assert plan.total(done) == len(plan.asked(done))
    return order


def test_a_plan_in_stages() -> None:
    plan, done = make_plan(), {}
    # a: 3 rates, 2 more ratios, 1 more warm-up, 2 more rates at most; b: no ratios; 2 seeds each.
    assert plan.total({}) == (3 + 2 + 1 + 2) + (3 + 1 + 2) + 2 * 2
    order = run_all(plan, done)
    tuned = [run for run in order if run.role == "tune"]
    assert [run.contender for run in tuned] == ["a"] * 8 + ["b"] * 6
    assert [run.contender for run in order[14:]] == ["a", "b", "a", "b"]
    points = {run.contender: point_of(dataclasses.asdict(run)) for run in order[14:]}
    assert points == {"a": BEST, "b": Point(0.2, 5, 0.25)}
    assert all(run.options == CONTENDERS["b"] for run in order if run.contender == "b")
    assert order[-2].options == {"kind": "adamw", "rest_ratio": 0.5}


def test_a_plan_that_another_tunes() -> None:
    tuner, done = make_plan(task="digits"), {}
    own = {"tuned_by": "digits/quick", "seeds": [4, 5], "settings": {"steps": 7}}
    plan = make_plan(table=own, tuner=tuner)
    assert plan.runnable({}) == [] and plan.total({}) == 4
    run_all(tuner, done)
    order = run_all(plan, done)
    assert [(run.role, run.contender, run.lr, run.seed) for run in order] == [
        *(("report", "a", 0.4, 4), ("report", "b", 0.2, 4)),
        *(("report", "a", 0.4, 5), ("report", "b", 0.2, 5)),
    ]
    assert all(run.task == "vision" and run.settings == {"steps": 7} for run in order)


def test_a_plan_whose_tuner_found_nothing_is_done() -> None:
    tuner = make_plan(contenders={"a": CONTENDERS["a"]})
    runs = tuner.runnable({})
    done = {run.key: fake_record(run) | {"diverged": True, "final": None} for run in runs}
    assert tuner.runnable(done) == [] and tuner.total(done) == len(runs) == 3


def test_one_command_tunes_on_one_text_and_runs_on_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, on made-up texts and a tiny model."""
    pytest.importorskip("tqdm")
    from bench.evidence import command, runner
    from bench.evidence.tasks import byte_lm

    text = torch.arange(600, dtype=torch.int32) % 7
    monkeypatch.setattr(byte_lm, "load", lambda task: (text.byte(), text.byte(), task))
    monkeypatch.setattr(runner, "ProcessPoolExecutor", InProcess)
    settings = (
        "seconds = 1\nsettings = { dim = 8, layers = 1, heads = 1, context = 8, batch = 2, "
        "steps = 2, eval_every = 2, curve_windows = 2, eval_windows = 4, clip = 0.0, "
        "weight_decay = 0.0 }\n"
    )
    grid = tmp_path / "grid.toml"
    grid.write_text(
        "tuning_seed = 9\nbaselines = ['a']\n[contenders]\na = { kind = 'adamw' }\n"
        "[tasks.shakespeare.full]\nlrs = [1e-3, 1e-2]\nwarmups = [0]\nrest_ratios = [1.0, 0.5]\n"
        f"search = [['lrs', 'warmups'], ['rest_ratios'], ['lrs']]\nseeds = [0]\n"
        f"contenders = ['a']\n{settings}"
        f"[tasks.bible.full]\ntuned_by = 'shakespeare/full'\nseeds = [0, 1]\n"
        f"contenders = ['a']\n{settings}"
    )
    args = ["--grid", str(grid), "--out", str(tmp_path), "--jobs", "1", "--task"]
    assert command.main([*args, "bible"]) == 0
    assert "not tuned yet in shakespeare/full: a" in capsys.readouterr().out
    assert not (tmp_path / "bible-full.jsonl").exists()
    assert command.main([*args, "shakespeare", "bible"]) == 0
    assert "data sha256 shakespeare, up to 5 runs, 0 done" in capsys.readouterr().out
    tuned = read_records(tmp_path / "shakespeare-full.jsonl")
    records = read_records(tmp_path / "bible-full.jsonl")
    assert [record["role"] for record in tuned][-1] == "report" and len(tuned) in (4, 5)
    assert {point_of(record) for record in records} == {point_of(tuned[-1])}
    assert [(record["seed"], record["data_sha256"]) for record in records] == [
        (0, "bible"),
        (1, "bible"),
    ]
    assert command.main([*args, "shakespeare", "bible"]) == 0
    out = capsys.readouterr().out
    assert f"up to {len(tuned)} runs, {len(tuned)} done before" in out
    assert "2 runs, 2 done before" in out and "Ctrl-C" not in out
    assert command.main([*args, "bible"]) == 0
    assert "2 runs, 2 done before" in capsys.readouterr().out


# ---- What a report makes of it -------------------------------------------------------------------


def grid_of(**tables: Any) -> dict[str, Any]:
    tasks = {"vision": tables}
    return {"tuning_seed": 9, "baselines": ["b"], "contenders": CONTENDERS, "tasks": tasks}


def test_a_record_that_was_not_asked_for_selects_nothing() -> None:
    plan, done = make_plan(), {}
    run_all(plan, done)
    records, grid = list(done.values()), grid_of(quick=TABLE)
    # On the lists, but at none of the stages.
    stray = plan.run("a", Point(0.1, 0, 0.25), 9, "tune")
    assert stray.key not in done
    records.append(fake_record(stray, loss=-9.0))
    records.append(fake_record(plan.run("a", Point(0.4, 0, 0.5), 0, "report"), loss=-9.0))
    unlisted = fake_record(plan.run("a", Point(0.4, 5, 9.0), 0, "report"), loss=-9.0)
    summary = summarise("vision", "quick", [*records, unlisted], grid)
    assert summary.notes == ["1 records of another grid file or other data are left out."]
    rows = {row.contender: row for row in summary.rows}
    assert rows["a"].best == BEST and len(rows["a"].tuning) == 8
    assert rows["a"].edges == ["lr", "warmup"] and len(rows["a"].reports) == 2
    assert rows["b"].best == Point(0.2, 5, 0.25) and rows["b"].edges == ["warmup"]
    assert plan.runnable({record["key"]: record for record in records}) == []


def test_a_search_that_is_not_complete_selects_nothing() -> None:
    plan, done = make_plan(contenders={"a": CONTENDERS["a"]}), {}
    run_all(plan, done)
    last = plan.run("a", Point(0.1, 5, 0.5), 9, "tune")
    records = [record for key, record in done.items() if key != last.key]
    summary = summarise("vision", "quick", records, grid_of(quick=TABLE))
    (row,) = summary.rows
    assert row.best is None and not row.is_tuned and len(row.tuning) == 7
    assert "Tuning is not complete for: a." in summary.notes


def test_the_page_has_a_column_for_the_rest() -> None:
    pytest.importorskip("matplotlib")
    from bench.evidence.report import json_row, training_page

    plan, done = make_plan(contenders=CONTENDERS | {"c": {"kind": "muon", "rest_lr": 0.004}}), {}
    records = []
    while runs := plan.runnable(done):
        run = runs[0]
        point = point_of(dataclasses.asdict(run))
        point = dataclasses.replace(point, rest_ratio=point.rest_ratio or 1.0)
        done[run.key] = fake_record(run, loss_of(point))
        records.append(done[run.key])
    summary = summarise(
        "vision", "quick", records, grid_of(quick=TABLE) | {"contenders": plan.contenders}
    )
    text = training_page(summary)
    assert (
        "was tuned in stages, each at the best point so far: 3 learning rates, then 3 rates of "
        "the rest, then 2 warm-ups, then 3 learning rates, on 1 tuning seed(s); the best"
    ) in text
    assert "| contender | lr | rest | warm-up | seeds |" in text
    assert "| a | 0.4 (edge) | 0.5 | 5 (edge) | 2 |" in text
    assert "| b | 0.2 | 0.25 | 5 (edge) | 2 |" in text
    assert "| c | 0.2 | lr 0.004 | 5 (edge) | 2 |" in text
    ratios = {row.contender: json_row(row).get("rest_ratio") for row in summary.rows}
    assert ratios == {"a": 0.5, "b": 0.25, "c": None}


def test_the_page_of_a_size_that_another_tunes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.evidence.records import append_record, keep_records, kept_path, results_path
    from bench.evidence.report import write_report

    time = {"tuned_by": "vision/quick", "seeds": [4, 5], "settings": {"steps": 7}}
    tuner, done = make_plan(), {}
    run_all(tuner, done)
    keep_records(kept_path(tmp_path, "vision", "quick"), done.values())  # beside the pages alone
    plan = make_plan(size="time", table=time, tuner=tuner)
    strays = [plan.run("a", Point(0.1, 0, 1.0), 9, "tune"), plan.run("a", BEST, 6, "report")]
    for run in [*run_all(plan, dict(done)), *strays]:
        append_record(results_path(tmp_path, "vision", "time"), fake_record(run))
    grid = grid_of(quick=TABLE, time=time)
    assert write_report(tmp_path, tmp_path, grid, ["vision"], ["ti*"]) == 0
    text = (tmp_path / "vision-time.md").read_text()
    assert (
        "Nothing is tuned here: of each contender, the point selected in [vision/quick]"
        "(vision-quick.md) ran on 2 fresh seeds"
    ) in text
    assert "| a | 0.4 (edge) | 0.5 | 5 (edge) | 2 |" in text and "| 0 of 2 | 4.0 |" in text
    assert "2 records of another grid file" in text and "learning rate tried" not in text
    assert not (tmp_path / "vision-quick.md").exists()
    kept_path(tmp_path, "vision", "quick").unlink()
    assert write_report(tmp_path, tmp_path, grid, ["vision"], ["time"]) == 0
    text = (tmp_path / "vision-time.md").read_text()
    assert "| a | not tuned yet |" in text
    assert "Tuning in vision/quick is not complete for: a, b." in text


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("tuned_by = 'vision/gone'", "no task and size vision/gone"),
        ("tuned_by = 'vision/other'", "tuned_by: vision/other is not tuned itself"),
        ("tuned_by = 'vision/full'\nlrs = [1.0]", "tuned_by, and lists to tune"),
        ("lrs = [1.0]\nwarmups = [0]\nsearch = [['lrs']]", "search: expected stages of lrs, warm"),
        ("contenders = ['gone']", "no contender gone"),
    ],
)
def test_a_grid_file_that_cannot_be_meant(tmp_path: Path, table: str, message: str) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(
        "[contenders]\na = { kind = 'adamw' }\n[tasks.vision.full]\nlrs = [1.0]\nwarmups = [0]\n"
        f"[tasks.vision.other]\ntuned_by = 'vision/full'\n[tasks.vision.quick]\n{table}\n"
    )
    with pytest.raises(EvidenceError, match=rf"\[tasks\.vision\.quick\]: .*{message}"):
        load_grid(path)
