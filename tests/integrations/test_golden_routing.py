"""Models as they come are routed as the tables in golden/ say (golden.py --update writes them)."""

from __future__ import annotations

import golden
import models
import pytest
from torch import nn

import dykaf


def text_of(name: str) -> str:
    return (golden.FOLDER / f"{name}.txt").read_text()


def releases(origin: str) -> list[str]:
    """Of a table's first line, as 2.13 for 2.13.0; torch changes no model."""
    return [
        library.rpartition(".")[0]
        for library in origin.split(", ")
        if not library.startswith("torch ")
    ]


def skip_another_release(name: str) -> None:
    """Another release of a library has other names and shapes."""
    for library in models.libraries(name):
        pytest.importorskip(library)
    expected, found = text_of(name).splitlines()[0], golden.origin(name)
    if releases(found) != releases(expected):
        pytest.skip(f"the table is of {expected}, and installed is {found}")


@pytest.mark.parametrize("name", models.NAMES)
def test_routing(name: str) -> None:
    skip_another_release(name)
    expected, found = text_of(name).splitlines()[1:], golden.table(name).splitlines()[1:]
    assert found == expected


def test_each_table_belongs_to_a_model() -> None:
    assert {path.stem for path in golden.FOLDER.glob("*")} == set(models.NAMES)


@pytest.mark.parametrize("name", ["wrapped-compile", "wrapped-checkpoint"])
def test_wrappers_change_nothing(name: str) -> None:
    """Of the kept tables: those of the wrapped model and of the model."""
    assert golden.unwrapped(text_of(name)) == golden.unwrapped(text_of("llama"))
    assert text_of(name) != text_of("llama")


def num_entries(text: str) -> int:
    """How many entries the parameters of a table have."""
    total = 0
    headings, *lines = text.splitlines()[2:]
    columns = [headings.index(heading) for heading in ("shape", "count", "bytes")]
    for line in lines:
        size = int(line[columns[1] : columns[2]])
        for side in line[columns[0] : columns[1]].split("x"):
            size *= 1 if side.strip() == "scalar" else int(side)
        total += size
    return total


@pytest.mark.parametrize("name", models.NAMES)
def test_a_table_holds_all_that_trains(name: str) -> None:
    skip_another_release(name)
    model = models.build(name)
    expected = sum(param.numel() for param in model.parameters() if param.requires_grad)
    assert num_entries(text_of(name)) == expected


def test_a_change_of_one_parameter_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its group, of its decay, of its shape as a stack."""
    model = nn.ModuleDict({"mlp": nn.Linear(7, 5), "lm_head": nn.Linear(7, 9, bias=False)})
    monkeypatch.setattr(models, "build", lambda name: model)
    before = golden.table("wrapped-weight-norm")
    groups = dykaf.param_groups
    for argument in ("adam", "no_decay"):
        monkeypatch.setattr(
            dykaf,
            "param_groups",
            lambda model, key=argument: groups(model, **{key: ["mlp.weight"]}),
        )
        after = golden.table("wrapped-weight-norm")
        assert sum(line not in before for line in after.splitlines()) == 1
