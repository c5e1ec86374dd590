"""The evidence suite: data checks, selection, intervals, resumption, SOAP and KL steps.

Nothing is downloaded here, and no training is longer than a few steps.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence_helpers import InProcess

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.evidence import EvidenceError
from bench.evidence import sources as sources_module
from bench.evidence.grid import (
    MODULES,
    Plan,
    Run,
    baselines_of,
    load_grid,
    settings_of,
    tuning_seeds_of,
    tuning_table,
)
from bench.evidence.optimizers import make_optimizer
from bench.evidence.records import append_record, by_key, read_kept, read_records
from bench.evidence.sources import Source, check_sha256, fetch, members, sha256_of
from bench.evidence.stats import paired_difference, student_cdf, student_quantile
from bench.evidence.summary import current_records, summarise
from bench.evidence.tasks import byte_lm, digits, minilm, vision
from bench.evidence.training import lr_factor, train

HAS_DYKAF = importlib.util.find_spec("dykaf") is not None


# ---- Data ----------------------------------------------------------------------------------------


def test_sha256_check_names_what_was_expected_and_what_came() -> None:
    check_sha256("abc", b"abc", sha256_of(b"abc"))
    with pytest.raises(EvidenceError, match=r"file\.txt: expected sha256 00, got ba7816bf"):
        check_sha256("file.txt", b"abc", "00")


def test_a_cached_archive_is_checked_and_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("tried to download")

    monkeypatch.setattr(sources_module.subprocess, "run", refuse)
    path = tmp_path / "some_thing-1.2.tar.gz"
    path.write_bytes(b"content")
    good = Source("some-thing==1.2", sdist=True, sha256=sha256_of(b"content"))
    assert fetch(good, tmp_path) == path
    with pytest.raises(EvidenceError, match="expected sha256"):
        fetch(dataclasses.replace(good, sha256=sha256_of(b"other")), tmp_path)


def test_a_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def fail(command: list[str], **kwargs: Any) -> Any:
        commands.append(command)
        pins.append(Path(command[command.index("--requirement") + 1]).read_text())
        return sources_module.subprocess.CompletedProcess(command, 1, "", "a\nno such thing\n")

    pins: list[str] = []
    monkeypatch.setattr(sources_module.subprocess, "run", fail)
    with pytest.raises(EvidenceError, match=r"pip download of thing==1 failed: no such thing"):
        fetch(Source("thing==1", sdist=True, sha256="00"), tmp_path)
    assert pins == ["thing==1 --hash=sha256:00\n"]  # pip checks before it runs the sdist's code
    assert "--no-deps" in commands[0] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["tar.gz", "whl"])
def test_members_are_read_without_unpacking(tmp_path: Path, suffix: str) -> None:
    names = ["p/texts/b.txt", "p/texts/a.txt", "p/other.md"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    archive = tmp_path / f"p-1.{suffix}"
    if suffix == "whl":
        with zipfile.ZipFile(archive, "w") as file:
            for name in names:
                file.write(tmp_path / name, name)
    else:
        with tarfile.open(archive, "w:gz") as file:
            file.add(tmp_path / "p", "p")
    found = members(archive, "*/texts/*.txt")
    assert found == {"p/texts/a.txt": b"p/texts/a.txt", "p/texts/b.txt": b"p/texts/b.txt"}
    assert list(found) == sorted(found)
    with pytest.raises(EvidenceError, match=r"expected files like \*\.csv, found none"):
        members(archive, "*.csv")


def test_corpus_split_and_hash() -> None:
    files = {"a": bytes(range(100)), "b": bytes(range(100, 120))}
    train_bytes, validation, digest = byte_lm.split_files(files)
    assert train_bytes.tolist() == [*range(90), *range(100, 118)]
    assert validation.tolist() == [*range(90, 100), 118, 119]
    assert byte_lm.split_files(files)[2] == digest
    assert byte_lm.split_files({**files, "b": files["b"][:-1]})[2] != digest
    # The same bytes in other files are another corpus.
    assert byte_lm.split_files({"a": files["a"] + files["b"][:1], "b": files["b"][1:]})[2] != digest


def test_verses_become_books() -> None:
    verses = [("Ruth", "It came."), ("Jude", "Mercy — unto you."), ("Ruth", "So they two went.")]
    lines = [json.dumps({"book": book, "text": text, "verse": 1}) for book, text in verses]
    assert byte_lm.bible_books("\n".join(lines).encode()) == {
        "Ruth": b"It came.\nSo they two went.\n",
        "Jude": "Mercy — unto you.\n".encode(),
    }


def test_tuning_and_reported_windows_are_disjoint() -> None:
    data = torch.arange(5000, dtype=torch.int32)
    tune = byte_lm.held_out_windows(data, 16, 64, "tune")
    report = byte_lm.held_out_windows(data, 16, 64, "report")
    assert tune.shape == report.shape == (16, 65)
    assert not set(tune.flatten().tolist()) & set(report.flatten().tolist())


def test_tokens_by_longest_match(monkeypatch: pytest.MonkeyPatch) -> None:
    assert minilm.split_words("It's a Café (yes)") == ["it", "'", "s", "a", "cafe", "(", "yes", ")"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##able", "##ab", "a", "!"]
    vocabulary = {word: idx for idx, word in enumerate(words)}
    monkeypatch.setattr(minilm, "load_vocabulary", lambda: vocabulary)
    assert minilm.encode("Unable a!", 10) == [2, 4, 5, 7, 8, 3]
    assert minilm.encode("unx a", 10) == [2, 1, 7, 3]
    assert minilm.encode("a a a a a", 4) == [2, 7, 7, 3]
    ids, is_real = minilm.pad([[2, 3], [2, 7, 3]])
    assert ids.tolist() == [[2, 3, 0], [2, 7, 3]]
    assert is_real.tolist() == [[True, True, False], [True, True, True]]


# ---- Statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dof", "expected"),
    # Printed tables of the 97.5% quantile.
    [(1, 12.706), (2, 4.303), (4, 2.776), (5, 2.571), (7, 2.365), (30, 2.042), (120, 1.980)],
)
def test_student_quantile(dof: int, expected: float) -> None:
    assert student_quantile(0.975, dof) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("dof", [1, 2, 3, 4, 7, 8])
def test_student_cdf_is_the_integral_of_the_density(dof: int) -> None:
    scale = math.gamma((dof + 1) / 2) / math.gamma(dof / 2) / math.sqrt(dof * math.pi)
    t = torch.linspace(0, 2.5, 20001, dtype=torch.float64)
    density = scale * (1 + t**2 / dof) ** (-(dof + 1) / 2)
    assert student_cdf(2.5, dof) == pytest.approx(0.5 + float(torch.trapezoid(density, t)))
    assert student_cdf(-2.5, dof) == pytest.approx(1 - student_cdf(2.5, dof))


def test_paired_difference() -> None:
    ours = {0: 1.0, 1: 2.5, 2: 3.0, 9: 7.0}
    base = {0: 0.5, 1: 1.5, 2: 3.5, 8: 7.0}
    difference = paired_difference(ours, base)
    assert difference is not None and difference.num_pairs == 3
    # Differences 0.5, 1.0, -0.5: mean 1/3, sd sqrt(7/12), t(2) = 4.30265.
    assert difference.mean == pytest.approx(1 / 3)
    assert difference.half_width == pytest.approx(4.30265 * math.sqrt(7 / 12 / 3), rel=1e-5)
    assert not difference.is_clear
    single = paired_difference({0: 1.0}, base)
    assert single is not None and single.half_width == math.inf and not single.is_clear
    assert paired_difference({5: 1.0}, base) is None


# ---- Grid, records, resumption -------------------------------------------------------------------


def test_the_grid_file_is_sound() -> None:
    grid = load_grid()
    assert set(grid["tasks"]) == set(MODULES)
    for task, sizes in grid["tasks"].items():
        assert {"full", "quick"} <= set(sizes)
        for table in sizes.values():
            tuner = tuning_table(grid, table)
            assert not set(tuning_seeds_of(grid, tuner)) & set(table["seeds"])
            if task != "fisher":
                assert set(baselines_of(grid, table)) <= set(table["contenders"])
            if "steps" in table:
                assert set(table["steps"]) == set(table["contenders"])


def test_a_contender_may_start_from_another(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    text = "tasks = {}\n[contenders]\na = { kind = 'adamw', eps = 1 }\n"
    path.write_text(text + "b = { base = 'a', eps = 2 }\n")
    assert load_grid(path)["contenders"]["b"] == {"kind": "adamw", "eps": 2}
    path.write_text(text + "b = { base = 'c' }\n")
    with pytest.raises(EvidenceError, match="b: no contender c"):
        load_grid(path)


def test_every_contender_can_be_made_and_takes_a_step() -> None:
    for name, options in load_grid()["contenders"].items():
        if options["kind"] == "dykaf" and not HAS_DYKAF:
            continue
        if options["kind"] == "muon" and not hasattr(torch.optim, "Muon"):  # before torch 2.9
            continue
        torch.manual_seed(0)
        model = vision.ConvNet([3, 4])
        before = {key: value.clone() for key, value in model.state_dict().items()}
        hidden = ["convs.0.weight", "convs.1.weight"]
        optimizer = make_optimizer(options, model, hidden, 0.1, 0.0)
        for _ in range(3):  # a first gradient may set up bases only
            model.zero_grad()
            model(torch.randn(4, 1, 8, 8)).square().sum().backward()
            optimizer.step()
        moved = [key for key, value in model.state_dict().items() if (value != before[key]).any()]
        assert moved == list(before), name


def make_plan(lrs: list[float]) -> Plan:
    table = {"lrs": lrs, "warmups": [0], "seeds": [0, 1], "settings": {"steps": 3}}
    contenders = {"a": {"kind": "adamw"}, "b": {"kind": "muon"}}
    return Plan("digits", "quick", table, contenders, [1000], "hash")


def test_a_contender_may_have_steps_of_its_own() -> None:
    table = make_plan([0.1]).table | {"steps": {"a": 5}}
    plan = dataclasses.replace(make_plan([0.1]), table=table)
    steps = {run.contender: run.settings["steps"] for run in plan.runnable({})}
    assert steps == {"a": 5, "b": 3}
    records = [fake_record(run, 1.0) for run in plan.runnable({})]
    grid = {"tuning_seed": plan.tuning_seeds[0], "contenders": plan.contenders}
    assert current_records(records, table, grid) == (records, [])
    changed = table | {"steps": {"a": 6}}
    assert current_records(records, changed, grid)[0] == records[1:]
    assert settings_of(table, "b") is table["settings"]


def fake_record(run: Run, loss: float) -> dict[str, Any]:
    environment = {"dykaf_sha256": None, "cpu": "some", "torch": "2"}
    final = {"loss": loss}
    outcome = {"final": final, "diverged": False, "environment": environment}
    return {"key": run.key, **dataclasses.asdict(run), **outcome}


def test_a_plan_goes_on_where_the_records_end() -> None:
    plan = make_plan([0.1, 0.2])
    done: dict[str, Any] = {}
    order = []
    while runs := plan.runnable(done):
        run = runs[0]
        order.append((run.contender, run.role, run.lr, run.seed))
        done[run.key] = fake_record(run, loss=run.lr if run.contender == "a" else 1 - run.lr)
    assert order == [
        *(("a", "tune", 0.1, 1000), ("a", "tune", 0.2, 1000)),
        *(("b", "tune", 0.1, 1000), ("b", "tune", 0.2, 1000)),
        # seed by seed, each contender at its own best rate
        *(("a", "report", 0.1, 0), ("b", "report", 0.2, 0)),
        *(("a", "report", 0.1, 1), ("b", "report", 0.2, 1)),
    ]
    assert len(order) == plan.total(done) == plan.total({})
    # A longer list of rates asks for the new ones alone.
    missing = make_plan([0.1, 0.2, 0.3]).runnable(done)
    assert [(run.contender, run.lr, run.role) for run in missing] == [
        ("a", 0.3, "tune"),
        ("b", 0.3, "tune"),
    ]


def test_a_run_is_known_by_all_that_decides_it() -> None:
    run = make_plan([0.1]).runnable({})[0]
    changes = [{"lr": 0.2}, {"seed": 1}, {"role": "report"}, {"options": {}}, {"data_sha256": ""}]
    keys = {dataclasses.replace(run, **change).key for change in changes}
    assert len(keys | {run.key}) == len(changes) + 1
    assert dataclasses.replace(run).key == run.key


def test_records_survive_a_torn_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    append_record(path, {"key": "a", "loss": 1})
    with path.open("a") as file:
        file.write('{"key": "b", "lo')
    append_record(path, {"key": "a", "loss": 2})
    records = read_records(path)
    assert [record["loss"] for record in records] == [1, 2]
    assert by_key(records)["a"]["loss"] == 2
    assert ":2 is damaged" in capsys.readouterr().err


def test_the_command_resumes_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """End to end in this process, on made-up data and a tiny grid."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    from bench.evidence import command, runner
    from bench.evidence.report import write_report

    X = torch.rand(40, 3, dtype=torch.float64)
    made_up = (X, torch.arange(40) % digits.NUM_CLASSES, "made-up")
    monkeypatch.setattr(digits, "load", lambda: made_up)
    digits.optimum.cache_clear()
    monkeypatch.setattr(runner, "ProcessPoolExecutor", InProcess)
    grid = tmp_path / "grid.toml"
    grid.write_text(
        "tuning_seed = 9\nbaselines = ['adamw']\n[contenders]\nadamw = { kind = 'adamw' }\n"
        "soap-1 = { kind = 'kronecker', precondition_frequency = 1 }\n[tasks.digits.quick]\n"
        "contenders = ['adamw', 'soap-1']\nlrs = [0.1, 0.3]\nwarmups = [0]\nseeds = [0, 1]\n"
        "seconds = 1\nsettings = { steps = 6, eval_every = 3, penalty = 1e-2, clip = 0.0, "
        "weight_decay = 0.0 }\n"
    )
    args = ["--task", "digits", "--quick", "--grid", str(grid), "--out", str(tmp_path)]
    args += ["--jobs", "1"]
    assert command.main([*args, "--contenders", "adamw"]) == 0
    path = tmp_path / "digits-quick.jsonl"
    assert len(read_records(path)) == 4
    assert command.main(args) == 0
    assert "8 runs, 4 done before" in capsys.readouterr().out
    records = read_records(path)
    assert len(records) == 8 and len(by_key(records)) == 8
    before = path.read_bytes()
    assert command.main(args) == 0 and path.read_bytes() == before

    docs = tmp_path / "docs"
    table = load_grid(grid)
    assert write_report(tmp_path, docs, table, ["digits"], ["quick"]) == 0
    page = (docs / "digits-quick.md").read_text()
    assert "| soap-1 |" in page and (docs / "digits-quick.png").exists()
    summary = summarise("digits", "quick", records, table)
    assert {len(row.reports) for row in summary.rows} == {2} and not summary.notes
    # The page's records stay with it: nothing is run again, unless it is asked for.
    path.unlink()
    assert command.main([*args, "--extend", "--docs", str(docs)]) == 0 and not path.exists()
    assert "8 runs, 8 done before" in capsys.readouterr().out
    assert write_report(tmp_path, docs, table, ["digits"], ["quick"]) == 0
    assert (docs / "digits-quick.md").read_text() == page
    assert read_kept(docs / "digits-quick.jsonl.xz") == sorted(
        records, key=lambda record: json.dumps(record, sort_keys=True)
    )
    assert command.main([*args, "--contenders", "adamw"]) == 0 and len(read_records(path)) == 4
    # Records of another grid file do not enter.
    stale = {**records[0], "settings": {}, "key": "stale"}
    assert len(summarise("digits", "quick", [*records, stale], table).notes) == 1


# ---- Training ------------------------------------------------------------------------------------


def test_schedule() -> None:
    assert [lr_factor(step, 6, 2) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert lr_factor(0, 4, 0) == 1.0


class Parabola:
    """loss = ||w||^2 / 2, which a rate above 2 makes grow."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(3, 2, bias=False)
        self.hidden = ["weight"]

    def loss(self) -> torch.Tensor:
        return 0.5 * self.model.weight.square().sum()

    def evaluate(self, *, final: bool) -> dict[str, float]:
        return {"loss": self.loss().item()}


def parabola_run(lr: float) -> Run:
    settings = {"steps": 20, "eval_every": 5, "clip": 0.0, "weight_decay": 0.0}
    return Run("digits", "quick", "adamw", {"kind": "adamw"}, lr, 0, 0, "tune", settings, "")


def test_divergence_is_an_end_above_the_start_or_not_finite() -> None:
    torch.manual_seed(0)
    good = train(parabola_run(0.05), Parabola())
    assert not good["diverged"] and good["final"]["loss"] < good["curve"][0]["loss"]
    assert [point["step"] for point in good["curve"]] == [0, 5, 10, 15, 20]
    worse = train(parabola_run(100.0), Parabola())
    assert worse["diverged"] and worse["final"] is None
    overflow = train(parabola_run(1e30), Parabola())
    assert overflow["diverged"] and len(overflow["curve"]) < 5


# ---- Digits and Fisher ---------------------------------------------------------------------------


def test_the_optimum_of_digits_is_stationary(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(60, 4, generator=generator, dtype=torch.float64)
    y = torch.arange(60) % digits.NUM_CLASSES
    monkeypatch.setattr(digits, "load", lambda: (X, y, ""))
    digits.optimum.cache_clear()
    least = digits.optimum(1e-2)
    digits.optimum.cache_clear()
    W = torch.zeros(digits.NUM_CLASSES, 4, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([W], max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

    def closure() -> torch.Tensor:
        search.zero_grad()
        value = digits.objective(W, X, y, 1e-2)
        value.backward()
        return value

    search.step(closure)
    assert float(digits.objective(W, X, y, 1e-2).detach()) == pytest.approx(least, abs=1e-8)


@pytest.mark.skipif(not HAS_DYKAF, reason="dykaf is not built")
def test_averaged_factors() -> None:
    """Shampoo's: their product has the trace of the running average of vec(G) vec(G)^T."""
    pytest.importorskip("dykaf")
    from bench.evidence.tasks.fisher import AveragedFactors

    first, second = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(5)).double()
    tracker = AveragedFactors(0.9, "shampoo")
    tracker.update(first)
    tracker.update(second)
    L, R = tracker.factors()
    left = 0.09 * first @ first.T + 0.1 * second @ second.T
    right = 0.09 * first.T @ first + 0.1 * second.T @ second
    assert torch.allclose(L, left / left.trace()) and torch.allclose(R, right)


def test_fisher_measures() -> None:
    from bench.evidence.tasks import fisher

    generator = torch.Generator().manual_seed(0)
    L, R = (
        (lambda A: A @ A.T)(torch.randn(d, d, generator=generator, dtype=torch.float64))
        for d in (3, 4)
    )
    noise = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    F = torch.kron(L, R) + 0.1 * (noise @ noise.T)
    singular = torch.linalg.svdvals(fisher.van_loan(F, 3, 4))
    best = fisher.best_error(F, 3, 4)
    assert best == pytest.approx(float(singular[1:].norm()))
    exact = fisher.measures(F, best, L, R)
    doubled = fisher.measures(F, best, 2 * L, R)
    assert doubled["scaled"] == pytest.approx(exact["scaled"]) and exact["scaled"] >= 1
    assert doubled["own"] > 2 * exact["own"] >= 2 * exact["scaled"]
    Q = torch.kron(*(torch.linalg.eigh(S).eigenvectors for S in (L, R)))
    rotated = Q.T @ F @ Q
    share = 1 - float(rotated.diagonal().square().sum() / rotated.square().sum())
    assert exact["off_diagonal"] == pytest.approx(share)
