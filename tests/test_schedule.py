"""When bases are refreshed, seen through state["next_refresh"] and state["refreshes"]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_helpers import bits, gradient, parameter, params_of, refuses, run, trajectory, two_sided

from dykaf import DyKAF, schedule
from dykaf.schedule import stagger_offsets
from dykaf.state import Layout


def interval(t: int, period: int, schedule: str) -> int:
    """Steps until the next refresh after one at step t."""
    return period if schedule == "fixed" else min(period, max(1, int(0.1 * t + 1e-9)))


def due(t: int, period: int, schedule: str, offset: int) -> int:
    """By search: the last step of the interval, at the offset's place where that is geometric."""
    d = interval(t, period, schedule)
    if schedule == "fixed":
        return t + d
    return max(u for u in range(t + 1, t + d + 1) if (u - offset) % d == 0)


def refresh_dates(optimizer: DyKAF, steps: int) -> list[list[list[int]]]:
    """The refresh dates of each side of each matrix, checked against the bases and next_refresh:
    a basis changes exactly when its count goes up, and that is at the step announced."""
    params = params_of(optimizer)
    dates: list[list[list[int]]] = []
    run(optimizer, range(1))  # the first gradient: no step
    for param in params:
        state = optimizer.state[param]
        assert not bool(state["refreshes"].any())
        dates += [[[], []] for _ in range(state["step"].numel())]
    for step in range(1, steps + 1):
        before = [
            {key: value.clone() for key, value in optimizer.state[param].items()}
            for param in params
        ]
        run(optimizer, range(step, step + 1))
        place = 0
        for param, old in zip(params, before, strict=True):
            new = optimizer.state[param]
            count = new["step"].numel()
            announced = old["next_refresh"].view(count, 2).tolist()
            done = (new["refreshes"] - old["refreshes"]).view(count, 2).tolist()
            for idx in range(count):
                for side, key in enumerate(("Q_L", "Q_R")):
                    assert done[idx][side] == int(announced[idx][side] <= step)
                    shape = (count, *new[key].shape[-2:])
                    moved = bits(old[key].view(shape)[idx]) != bits(new[key].view(shape)[idx])
                    assert moved == bool(done[idx][side])
                    if done[idx][side]:
                        assert announced[idx][side] == step
                        dates[place][side].append(step)
                place += 1
    return dates


def expected_dates(steps: int, period: int, schedule: str, offset: int) -> list[int]:
    dates, t = [], 0
    while (t := due(t, period, schedule, offset)) <= steps:
        dates.append(t)
    return dates


def offsets_of(optimizer: DyKAF) -> list[tuple[int, int]]:
    return stagger_offsets(
        (Layout.of(param, group), group["precondition_frequency"])
        for group in optimizer.param_groups
        for param in group["params"]
    )


# ---- Dates ---------------------------------------------------------------------------------------


def test_geometric_dates_by_hand() -> None:
    """Every step up to 20, where a tenth of the steps is 2; then every second one, and so on. The
    right side is at odd steps, at those of the form 3 k + 1 and then of the form 4 k + 1."""
    optimizer = two_sided([parameter(3, 2)], precondition_frequency=4)
    assert offsets_of(optimizer) == [(0, 1)]
    left = [*range(1, 20), 20, 22, 24, 26, 28, 30, 33, 36, 39, 42, 44, 48, 52, 56, 60]
    right = [*range(1, 20), 20, 21, 23, 25, 27, 29, 31, 34, 37, 40, 41, 45, 49, 53, 57]
    assert refresh_dates(optimizer, 60) == [[left, right]]


def test_fixed_dates_by_hand() -> None:
    """Every side of every matrix."""
    optimizer = two_sided(
        [parameter(3, 2), parameter(4, 4)], precondition_frequency=7, refresh_schedule="fixed"
    )
    assert refresh_dates(optimizer, 30) == [[[7, 14, 21, 28]] * 2] * 2


def test_dates_of_two_matrices_by_hand() -> None:
    """Costs are 27, 8 and 8, 27, the cubes of the sides. The dear ones go first, to places 0 and
    1; then the cheap ones to the emptiest place, which is 2 both times."""
    optimizer = two_sided([parameter(3, 2), parameter(2, 3)], precondition_frequency=3)
    assert offsets_of(optimizer) == [(0, 2), (2, 1)]
    each = list(range(1, 21))
    zero = [*each, 22, 24, 26, 28, 30, 33, 36, 39]
    one = [*each, 21, 23, 25, 27, 29, 31, 34, 37, 40]
    two = [*each, 22, 24, 26, 28, 30, 32, 35, 38, 41]
    assert refresh_dates(optimizer, 41) == [[zero, two], [two, one]]


@pytest.mark.parametrize("schedule", ["geometric", "fixed"])
@pytest.mark.parametrize("period", [1, 3, 5])
def test_dates_follow_the_formula(schedule: str, period: int) -> None:
    shapes = [(4, 2), (3, 3), (2, 5)]
    optimizer = two_sided(
        [parameter(*shape) for shape in shapes],
        precondition_frequency=period,
        refresh_schedule=schedule,
    )
    offsets = offsets_of(optimizer)
    dates = refresh_dates(optimizer, 62)
    for sides, places in zip(dates, offsets, strict=True):
        for side, place in zip(sides, places, strict=True):
            assert side == expected_dates(62, period, schedule, place)
            for last, following in zip([0, *side], side, strict=False):
                assert following - last <= interval(last, period, schedule)


def test_matrices_of_a_stack_take_turns() -> None:
    optimizer = two_sided([parameter(5, 2, 3)], batch_dims=1, precondition_frequency=4)
    ((left, right),) = offsets_of(optimizer)
    dates = refresh_dates(optimizer, 56)
    for idx, sides in enumerate(dates):
        assert sides[0] == expected_dates(56, 4, "geometric", left + idx)
        assert sides[1] == expected_dates(56, 4, "geometric", right + idx)
    # From step 44 on all have the whole period.
    places = [[{date % 4 for date in side if date > 44} for side in sides] for sides in dates]
    assert places[0] == places[4] and places[0] != places[1]


def test_steps_are_counted_from_the_first_gradient() -> None:
    """Zero gradients before it shift everything; a missing gradient stops the clock."""
    options: dict[str, Any] = {"precondition_frequency": 3, "refresh_schedule": "fixed"}
    late, other = parameter(3, 2), parameter(3, 2)
    optimizer = two_sided([late, other], **options)

    def withhold(step: int) -> None:
        if step < 4:
            late.grad.zero_()
        if step == 6:
            late.grad = None

    run(optimizer, range(9), before_step=withhold)
    assert optimizer.state[other]["refreshes"].tolist() == [2, 2]
    assert optimizer.state[other]["next_refresh"].tolist() == [9, 9]
    assert float(optimizer.state[late]["step"]) == 3
    assert optimizer.state[late]["refreshes"].tolist() == [1, 1]
    assert optimizer.state[late]["next_refresh"].tolist() == [6, 6]


def test_a_side_without_a_factor_is_not_refreshed() -> None:
    optimizer = two_sided([parameter(3, 6)], max_precond_dim=4, precondition_frequency=1)
    run(optimizer, range(6))
    assert optimizer.state[params_of(optimizer)[0]]["refreshes"].tolist() == [5, 0]


def test_a_date_missed_is_made_up_for_at_once() -> None:
    """As after a change of the state by hand, or of options: due means due."""
    param = parameter(3, 2)
    optimizer = two_sided([param], precondition_frequency=50, refresh_schedule="fixed")
    run(optimizer, range(5))
    state = optimizer.state[param]
    state["next_refresh"].copy_(torch.tensor([2, 50]))
    run(optimizer, range(5, 6))
    assert state["refreshes"].tolist() == [1, 0]
    assert state["next_refresh"].tolist() == [55, 50]


def test_a_shorter_period_counts_from_the_next_refresh_on() -> None:
    param = parameter(3, 2)
    optimizer = two_sided([param], precondition_frequency=6, refresh_schedule="fixed")
    run(optimizer, range(4))
    optimizer.param_groups[0]["precondition_frequency"] = 2
    run(optimizer, range(4, 13))
    # Steps 6, 8, 10, 12.
    assert optimizer.state[param]["refreshes"].tolist() == [4, 4]
    assert optimizer.state[param]["next_refresh"].tolist() == [14, 14]


def test_a_longer_period_has_places_of_its_own() -> None:
    """The sides shared two places; the eight of them spread over the new period."""
    optimizer = two_sided([parameter(3, 3) for _ in range(4)], precondition_frequency=2)
    run(optimizer, range(25))
    optimizer.param_groups[0]["precondition_frequency"] = 8
    run(optimizer, range(25, 101))
    dates = [optimizer.state[param]["next_refresh"].tolist() for param in params_of(optimizer)]
    assert sorted(date % 8 for pair in dates for date in pair) == list(range(8))
    for pair, places in zip(dates, offsets_of(optimizer), strict=True):
        assert [date % 8 for date in pair] == list(places)


def test_stagger_evens_out_the_steps() -> None:
    """Twelve equal sides, once the period is six: two at every step, or all at once."""

    def per_step(schedule: str) -> list[int]:
        optimizer = two_sided(
            [parameter(3, 3) for _ in range(6)],
            precondition_frequency=6,
            refresh_schedule=schedule,
        )
        dates = refresh_dates(optimizer, 84)
        return [sum(step in side for sides in dates for side in sides) for step in range(67, 85)]

    assert per_step("geometric") == [2] * 18
    assert per_step("fixed") == [0, 0, 0, 0, 0, 12] * 3


@settings(max_examples=20, deadline=None)
@given(
    period=st.integers(1, 12),
    schedule=st.sampled_from(["geometric", "fixed"]),
    num_params=st.integers(1, 3),
    steps=st.integers(1, 60),
)
def test_any_schedule(period: int, schedule: str, num_params: int, steps: int) -> None:
    optimizer = two_sided(
        [parameter(2, 1 + idx) for idx in range(num_params)],
        precondition_frequency=period,
        refresh_schedule=schedule,
    )
    offsets = offsets_of(optimizer)
    run(optimizer, range(steps + 1))
    for param, places in zip(params_of(optimizer), offsets, strict=True):
        state = optimizer.state[param]
        for side, place in enumerate(places):
            dates = expected_dates(steps, period, schedule, place)
            assert int(state["refreshes"][side]) == len(dates)
            following = due(dates[-1] if dates else 0, period, schedule, place)
            assert int(state["next_refresh"][side]) == following


# ---- Offsets -------------------------------------------------------------------------------------


def layout(
    *shape: int, batch_dims: int = 0, max_precond_dim: int = 10_000, sides: str = "both"
) -> Layout:
    group = {
        "batch_dims": batch_dims,
        "max_precond_dim": max_precond_dim,
        "skinny_rank": 0,
        "integrator": "diagonal",
        "second_moment": "full",
        "state_dtype": "float32",
        "low_precision": "stochastic",
        "sides": sides,
    }
    return Layout.of(torch.empty(shape, device="meta"), group)


def loads(layouts: list[Layout], offsets: list[tuple[int, int]], period: int) -> list[int]:
    """The work in each slot of a period, counted matrix by matrix."""
    slots = [0] * period
    for each, places in zip(layouts, offsets, strict=True):
        for size, kept, place in ((each.m, each.left, places[0]), (each.n, each.right, places[1])):
            for idx in range(each.count if kept else 0):
                slots[(place + idx) % period] += size**3
    return slots


def test_no_parameters() -> None:
    assert stagger_offsets([]) == []


def test_what_has_no_factor_takes_no_place() -> None:
    layouts = [layout(5), layout(), layout(9, 9, max_precond_dim=4), layout(2, 2)]
    assert stagger_offsets((each, 3) for each in layouts) == [(0, 0)] * 3 + [(0, 1)]
    one_sided = [layout(2, 9, max_precond_dim=4), layout(9, 2, max_precond_dim=4)]
    assert stagger_offsets((each, 3) for each in one_sided) == [(0, 0), (0, 1)]


def test_periods_have_slots_of_their_own() -> None:
    layouts = [layout(3, 3), layout(3, 3)]
    assert stagger_offsets(zip(layouts, [4, 7], strict=True)) == [(0, 1), (0, 1)]


def test_a_long_period_costs_nothing() -> None:
    """ "Never" is a large number; the work must follow the number of sides."""
    assert stagger_offsets([(layout(3, 2), 10**12), (layout(4, 4), 10**12)]) == [(2, 3), (0, 1)]


def test_a_stack_as_long_as_the_period_is_even_by_itself() -> None:
    layouts = [layout(6, 4, 4, batch_dims=1)]
    offsets = stagger_offsets((each, 6) for each in layouts)
    assert loads(layouts, offsets, 6) == [2 * 64] * 6


def test_a_stack_fills_the_slots_that_follow() -> None:
    """Three matrices take slots 0 to 2, and what comes next the one that is left."""
    layouts = [layout(3, 4, 9, batch_dims=1, max_precond_dim=4), layout(4, 9, max_precond_dim=4)]
    assert stagger_offsets((each, 4) for each in layouts) == [(0, 0), (3, 0)]


def test_sides_that_are_alike_go_together_by_hand() -> None:
    """Twelve sides of 2 and two of 4, in matrices 64 long: a sixteenth of 3,072 + 2,048
    multiply-adds is 320, and all sides of a kind cost 96 and 128. The dearer kind comes first."""
    layouts = [layout(2, 64, max_precond_dim=9)] * 12 + [layout(64, 4, max_precond_dim=9)] * 2
    offsets = stagger_offsets((each, 50) for each in layouts)
    assert offsets == [(1, 0)] * 12 + [(0, 0)] * 2


def test_a_kind_is_cut_where_it_would_be_much_of_a_step() -> None:
    """Nine square matrices of side 3, one factor each: 9 * 27 / 16 is not even one side."""
    layouts = [layout(3, 3, sides="one")] * 9
    offsets = stagger_offsets((each, 50) for each in layouts)
    assert offsets == [(place, 0) for place in range(9)]
    # Four of them beside one that is 32 times as long: 36 * 27 / 16 is two sides.
    layouts = [layout(3, 3, sides="one")] * 4 + [layout(3, 96, sides="one")]
    assert [left for left, _ in stagger_offsets((each, 50) for each in layouts)] == [0, 0, 1, 1, 2]


def test_a_kind_is_cut_into_what_a_batch_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more: nothing would be gained. Five matrices in batches of two are three pieces."""
    monkeypatch.setattr(schedule, "BATCH_ENTRIES", 2 * 2 * 64 + 5)
    layouts = [layout(2, 64, max_precond_dim=9)] * 5
    offsets = stagger_offsets((each, 50) for each in layouts)
    assert [left for left, _ in offsets] == [2, 0, 0, 1, 1]  # the pieces of two are dearer


def test_what_a_batch_holds_is_what_the_backend_takes() -> None:
    source = Path(__file__).parent.parent / "csrc" / "aten" / "matrix.cpp"
    power = schedule.BATCH_ENTRIES.bit_length() - 1
    assert f"kMaxEntries = int64_t{{1}} << {power};" in source.read_text()


@settings(max_examples=100, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20),
    period=st.integers(1, 12),
)
def test_offsets_balance_the_work(shapes: list[tuple[int, int]], period: int) -> None:
    """What shares a slot by being alike is a side, or costs no more than a sixteenth of a product
    with all bases. It goes to the emptiest slot, whose load is at most the mean: no slot exceeds
    the mean by more than that."""
    layouts = [layout(*shape) for shape in shapes]
    offsets = stagger_offsets((each, period) for each in layouts)
    assert all(0 <= place < period for places in offsets for place in places)
    slots = loads(layouts, offsets, period)
    costs = [size**3 for shape in shapes for size in shape]
    assert sum(slots) == sum(costs)
    together = max(max(costs), sum(m * n * (m + n) for m, n in shapes) / 16)
    assert max(slots) <= sum(costs) / period + together
    assert stagger_offsets((each, period) for each in layouts) == offsets


def test_offsets_do_not_hang_on_gradients() -> None:
    """All parameters have their place from the start, so that the dates of one do not hang on
    which others happen to have a gradient."""

    def dates_of_last(with_first: bool) -> list[int]:
        params = [parameter(3, 3) for _ in range(3)]
        optimizer = two_sided(params, precondition_frequency=6)
        for step in range(71):
            for idx, param in enumerate(params):
                param.grad = gradient(param, step, idx) if idx == 2 or with_first else None
            optimizer.step()
        dates: list[int] = optimizer.state[params[2]]["next_refresh"].tolist()
        return dates

    assert dates_of_last(True) == dates_of_last(False) == [74, 71]  # 6 k + 2, 6 k + 5


def test_no_matrix_of_a_large_stack_waits_longer_than_the_interval() -> None:
    """Offsets grow along the stack, beyond the step itself in the first steps."""
    param = torch.nn.Parameter(torch.zeros(40, 2, 2))
    optimizer = two_sided([param], batch_dims=1)
    generator = torch.Generator().manual_seed(0)
    for t in range(30):
        param.grad = torch.randn(40, 2, 2, generator=generator)
        optimizer.step()
        wait = optimizer.state[param]["next_refresh"] - t
        assert int(wait.min()) >= 1
        assert int(wait.max()) <= min(10, max(1, t // 10))


def test_a_step_without_refreshes_and_refresh_make_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What DyKAF.refresh is for is a GPU's; the operations are every backend's."""
    shapes = [(6, 4), (3, 64), (5,)]  # the second one is skinny

    def make() -> DyKAF:
        params = [parameter(*shape, seed=i) for i, shape in enumerate(shapes)]
        return two_sided(params, precondition_frequency=2, skinny_rank=16)

    whole, parts = make(), make()
    run(whole, range(12))
    run(parts, range(2))
    monkeypatch.setattr("dykaf.engine.check_capture", lambda *_: None)
    for step in range(2, 12):
        with monkeypatch.context() as context:
            context.setattr("dykaf.engine.is_capturing", lambda: True)
            run(parts, range(step, step + 1))
        parts.refresh()
    assert trajectory(parts) == trajectory(whole)
    assert float(whole.state[params_of(whole)[0]]["refreshes"].min()) >= 4


def test_a_graph_holds_no_parameters_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = two_sided([parameter(3, 2)])
    run(optimizer, range(2))
    monkeypatch.setattr("dykaf.engine.is_capturing", lambda: True)
    message = (
        "step in a CUDA graph: expected parameters on the GPU, "
        "got param_groups[0]['params'][0] on cpu"
    )
    with refuses(optimizer, message, RuntimeError):
        optimizer.step()
