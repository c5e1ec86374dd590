"""The recorded budgets: what a kernel may use, and how they are compared."""

import json
from pathlib import Path

from bench.sass.kernels import Kernel

PATH = Path(__file__).with_name("budgets.json")
ARCHS = (80, 90)
TOLERANCE = 1.05  # of the main loop's instructions
# Of the rate of mma.sync, for large products in TF32; those in bfloat16 wait for shared memory.
LEAST_BOUND = 0.8

Budgets = dict[str, dict[str, dict[str, float]]]  # architecture -> kernel -> what -> number


def record(kernel: Kernel) -> dict[str, float]:
    numbers: dict[str, float] = {
        "registers": kernel.resources.registers,
        "blocks": kernel.blocks,
    }
    if kernel.loop is not None:
        numbers["hmma"] = round(kernel.loop.mix["HMMA"])
        numbers["instructions"] = round(kernel.loop.issued)
    return numbers


def make(kernels: list[Kernel]) -> Budgets:
    budgets: Budgets = {}
    for kernel in kernels:
        if kernel.arch in ARCHS:
            budgets.setdefault(f"sm_{kernel.arch}", {})[kernel.name] = record(kernel)
    return budgets


def excesses(kernels: list[Kernel], budgets: Budgets) -> list[str]:
    """Returns one line for each number that is outside its budget, each kernel without a budget
    and each budget without a kernel."""
    lines = [
        f"sm_{kernel.arch} {kernel.name}: bound {kernel.loop.bound:.0%}, least {LEAST_BOUND:.0%}"
        for kernel in kernels
        if kernel.loop is not None and kernel.arch in ARCHS and is_large_tf32(kernel.name)
        if kernel.loop.bound < LEAST_BOUND
    ]
    for arch, actual in make(kernels).items():
        allowed = budgets.get(arch, {})
        lines += [f"{arch} {name}: no budget" for name in actual.keys() - allowed.keys()]
        lines += [f"{arch} {name}: no such kernel" for name in allowed.keys() - actual.keys()]
        for name in actual.keys() & allowed.keys():
            for what, number in actual[name].items():
                budget = allowed[name].get(what)
                if budget is None or is_outside(what, number, budget):
                    lines.append(f"{arch} {name}: {what} {number:g}, budget {budget}")
    return sorted(lines)


def is_large_tf32(name: str) -> bool:
    return name.startswith("gemm 128x128") and not name.endswith("medium")


def is_outside(what: str, number: float, budget: float) -> bool:
    if what == "hmma":
        return number != budget
    if what == "blocks":
        return number < budget
    return number > (budget * TOLERANCE if what == "instructions" else budget)


def read() -> Budgets:
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def write(budgets: Budgets) -> None:
    """One line per kernel, so that a change reads well."""
    parts = []
    for arch, by_kernel in sorted(budgets.items()):
        rows = [f'    "{name}": {json.dumps(row)}' for name, row in sorted(by_kernel.items())]
        parts.append(f'  "{arch}": {{\n' + ",\n".join(rows) + "\n  }")
    PATH.write_text("{\n" + ",\n".join(parts) + "\n}\n")
