"""What a user is told of a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from dykaf.distributed.balance import loads_of
from dykaf.distributed.plan import Plan, Spread, Team


def describe(plan: Plan) -> str:
    """A line per team of ranks: who owns how many matrices, and how even that is."""
    return "\n".join(_line(team, plan.by_id.values()) for team in plan.teams)


def _line(team: Team, spreads: Iterable[Spread]) -> str:
    mine = [spread for spread in spreads if spread.team is team]
    tasks = [task for spread in mine for task in spread.tasks]
    owners = [owner for spread in mine for owner in spread.owners]
    num_shards = sum(not spread.owners for spread in mine)
    ranks = f"{team.size} ranks" if team.size > 1 else "1 rank"
    line = f"{ranks}: {len(mine)} parameters"
    if tasks:
        counts = Counter(owners)
        held = [counts[rank] for rank in range(team.size)]
        loads = loads_of(tasks, owners, team.size)
        slowest = max(max(load) for load in loads)
        mean = sum(max(some) for some in zip(*loads, strict=True)) / len(loads[0])
        even = sum(sum(load) for load in loads) / len(loads) / len(loads[0])
        stays = sum(len(spread.owners) for spread in mine if spread.stays)
        line += (
            f", {len(owners)} matrices with {min(held)} to {max(held)} on a rank ({stays} whole "
            f"where they are); the busiest rank computes {mean / even:.2f} times the mean in a "
            f"step, {slowest / even:.2f} in the slowest one"
        )
    if num_shards:
        line += f"; {num_shards} updated shard by shard"
    return line
