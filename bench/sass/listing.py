"""Reads machine code as nvdisasm prints it: functions, instructions, loops, the blocks in them."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

FUNCTION = re.compile(r"^\.text\.(\S+):")
LABEL = re.compile(r"^(\.L_\S+):")
INSTRUCTION = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?"
    r"(?P<op>[A-Z][A-Z0-9_.]*)(?P<operands>[^;]*);"
)
TARGET = re.compile(r"`\((\.L_\S+?)\)")


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # the predicate without @; empty: always
    op: str
    operands: str

    @property
    def target(self) -> str:
        """The label that a branch jumps to; empty: no branch."""
        match = TARGET.search(self.operands) if self.op.startswith("BRA") else None
        return match[1] if match else ""

    @property
    def falls_through(self) -> bool:
        if self.op.startswith("EXIT"):
            return self.guard != ""
        # A condition stands before the instruction or, as in BRA.U UP0, among its operands.
        return not self.target or self.guard != "" or not self.operands.lstrip().startswith("`")


@dataclass
class Function:
    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # name -> index of an instruction


Block = list[Instruction]


def parse(text: str) -> dict[str, Function]:
    """Returns the functions of an `nvdisasm -c` listing by their mangled names."""
    functions: dict[str, Function] = {}
    current = None
    for line in text.splitlines():
        if match := FUNCTION.match(line):
            current = functions.setdefault(match[1], Function(match[1]))
        elif current is None:
            continue
        elif match := LABEL.match(line):
            current.labels[match[1]] = len(current.instructions)
        elif match := INSTRUCTION.match(line):
            current.instructions.append(
                Instruction(
                    int(match["address"], 16), match["guard"] or "", match["op"], match["operands"]
                )
            )
    return functions


def loops(function: Function) -> list[range]:
    """Returns the instructions' indices from each backward branch's target up to it."""
    found = []
    for i, instruction in enumerate(function.instructions):
        start = function.labels.get(instruction.target)
        if start is not None and start < i:
            found.append(range(start, i + 1))
    return found


def loop_with_most(function: Function, wanted: Callable[[Instruction], bool]) -> range | None:
    """Returns the smallest of the loops that hold the most wanted instructions; None: no loop
    holds any."""

    def rank(loop: range) -> tuple[int, int]:
        return sum(map(wanted, function.instructions[loop.start : loop.stop])), -len(loop)

    best = max(loops(function), key=rank, default=None)
    return best if best is not None and rank(best)[0] > 0 else None


def path_through(
    function: Function, loop: range, avoid: Callable[[Block], bool]
) -> tuple[list[Block], list[Block]]:
    """Splits a loop's body into basic blocks.

    Returns those on a way from its head to its end that avoids the blocks to be avoided, and the
    others.
    """
    starts = {loop.start}
    for label in function.labels.values():
        if label in loop:
            starts.add(label)
    for i in loop:
        instruction = function.instructions[i]
        if (instruction.target or not instruction.falls_through) and i + 1 in loop:
            starts.add(i + 1)
    ordered = sorted(starts)
    bounds = list(zip(ordered, [*ordered[1:], loop.stop], strict=True))
    blocks = {a: function.instructions[a:b] for a, b in bounds}
    allowed = {a for a, block in blocks.items() if not avoid(block)}

    successors: dict[int, list[int]] = {}
    for a, b in bounds:
        last = blocks[a][-1]
        after = [b] if last.falls_through else []
        if last.target:
            after.append(function.labels[last.target])
        successors[a] = [s for s in after if s in allowed]
    predecessors: dict[int, list[int]] = {a: [] for a in blocks}
    for a, after in successors.items():
        for s in after:
            predecessors[s].append(a)

    kept = reach([loop.start], successors, allowed) & reach([ordered[-1]], predecessors, allowed)
    return [blocks[a] for a in ordered if a in kept], [blocks[a] for a in ordered if a not in kept]


def reach(sources: Iterable[int], edges: dict[int, list[int]], allowed: set[int]) -> set[int]:
    """Returns what can be reached from the sources within the allowed blocks."""
    seen: set[int] = set()
    todo = [s for s in sources if s in allowed]
    while todo:
        block = todo.pop()
        if block not in seen:
            seen.add(block)
            todo.extend(edges[block])
    return seen
