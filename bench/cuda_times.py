"""A plain step, a mean one and the slowest one, priced; and the same of other optimizers.

A bound prices counts at the most that the instruction, the L2 cache and the memory allow; an
estimate at what others have reached with them (bench/cuda_rates.py), and adds launches and the
host. What torch's libraries do is priced at published measurements in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from bench import cuda_others as others
from bench.cuda_costs import Launch, Matrix, Part, launches_of, layout_of, matrices_of, passes_of
from bench.cuda_models import Model
from bench.cuda_rates import EAGER, HOST_MATRIX, HOST_VECTOR, LARGE, LAUNCH, Device
from bench.cuda_refresh import Refreshes, Work, refreshes_of
from dykaf import products

# Of a step, beside the plan's launches: max|G| of each group in two kernels; operations of
# python/dykaf/nonfinite.py, once and for each group, to which the flag goes as an integer.
GRAD_MAX_KERNELS = 2
FLAG_OPS, FLAG_OPS_PER_GROUP = 7, 11 + 1


@dataclass
class Times:
    """Seconds of one step on one device at one precision."""

    bound: float
    likely: float  # on the device
    host: float

    @property
    def estimate(self) -> float:
        """The host runs ahead of the device: the slower one sets the pace."""
        return max(self.likely, self.host)

    def with_work(self, work: Work) -> Times:
        return Times(self.bound + work.bound, self.likely + work.likely, self.host + work.host)


@dataclass
class Step:
    """The counts of a plain step of a model."""

    model: Model
    groups: list[list[Matrix]]
    refreshes: dict[str, list[Refreshes]] = field(default_factory=dict)  # by device, once priced
    known: dict[tuple[int, str], list[list[Launch]]] = field(default_factory=dict)

    @property
    def matrices(self) -> list[Matrix]:
        return [p for group in self.groups for p in group]

    def passes(self, arch: int = 0, precision: str = "highest") -> list[list[Launch]]:
        """By the package's rules for that compute capability; by default without a library."""
        key = (arch, precision)
        if key not in self.known:
            rules = products.read(products.DEFAULT_FILE)

            def is_by_library(part: Part) -> bool:
                sizes = (part.m, part.n, part.k)
                return products.are_by_library(rules, arch, precision, part.form, *sizes)

            self.known[key] = [
                launches_of(part, is_by_library)
                for group in self.groups
                for part in passes_of(group)
            ]
        return self.known[key]

    @property
    def num_passes(self) -> int:
        return len(self.passes())

    def kernels(self, arch: int = 0, precision: str = "highest") -> int:
        """With the library's calls."""
        plans = self.passes(arch, precision)
        return sum(map(len, plans)) + GRAD_MAX_KERNELS * len(self.groups)

    def library_calls(self, arch: int, precision: str) -> int:
        return sum(x.by_library for plan in self.passes(arch, precision) for x in plan)

    @property
    def operations(self) -> int:
        return FLAG_OPS + FLAG_OPS_PER_GROUP * len(self.groups)

    @property
    def copies(self) -> int:
        """To the device: of what max|G| reads of each group, and of each pass's plan."""
        return len(self.groups) + self.num_passes

    @property
    def bytes(self) -> float:
        grads = sum(p.param_bytes * p.size for p in self.matrices)
        return grads + sum(launch.bytes for plan in self.passes() for launch in plan)

    @property
    def flops(self) -> float:
        return sum(launch.flops for plan in self.passes() for launch in plan)

    def host(self, arch: int = 0, precision: str = "highest") -> float:
        vectors = sum(p.is_adamw for p in self.matrices)
        per_parameter = HOST_MATRIX.value * (len(self.matrices) - vectors)
        per_parameter += HOST_VECTOR.value * vectors
        launches = self.kernels(arch, precision) + self.copies
        return per_parameter + launches * LAUNCH.value + self.operations * EAGER.value


def step_of(model: Model) -> Step:
    return Step(model, [matrices_of(group, model.dtype) for group in model.groups])


def wgmma_seconds(launch: Launch, device: Device, precision: str) -> float:
    """Estimate of a launch of large products by kernels of that instruction, one per shape, which
    would keep epilogues and halves. Copies of operands that it may need are not counted."""
    assert device.wgmma is not None
    operands = "bfloat16" if precision == "medium" else "TF32"
    seconds = 0.0
    for part, count in launch.parts.items():
        rate = device.library_rate(operands, part.m, part.n, part.k, count) * device.wgmma.value
        compute = count * part.blocks * part.block_flops / rate
        memory = count * part.bytes / device.dram.value / device.copied.value
        seconds += max(compute, memory) + LAUNCH.value
    return seconds


def plain_times(step: Step, device: Device, precision: str, how: str = "default") -> Times:
    """How: by "default", with the "kernels" alone, or with all large products by "wgmma"."""
    arch = device.arch if how == "default" else 0
    grads = sum(p.param_bytes * p.size for p in step.matrices) / device.dram.value
    bound, likely = grads, grads / device.copied.value
    likely += (GRAD_MAX_KERNELS * len(step.groups) + step.operations) * LAUNCH.value
    for plan in step.passes(arch, precision):
        for launch in plan:
            bound += launch.seconds(device, precision, reached=False)
            ours = launch.seconds(device, precision, reached=True) + LAUNCH.value
            # "highest": three TF32 products, for which the instruction takes copies of operands.
            is_large = launch.tile is LARGE and precision != "highest"
            if how == "wgmma" and is_large and device.wgmma is not None:
                ours = min(ours, wgmma_seconds(launch, device, precision))
            likely += ours
    return Times(bound, likely, step.host(arch, precision))


def refreshes(step: Step, device: Device) -> list[Refreshes]:
    found = step.refreshes.setdefault(device.name, [])
    if not found:
        for params, matrices in zip(step.model.groups, step.groups, strict=True):
            known = {param: layout_of(param, step.model.dtype) for param in set(params)}
            found.append(refreshes_of([known[param] for param in params], matrices, device))
    return found


def other_rows(step: Step, device: Device, precision: str) -> Iterator[tuple[str, Times]]:
    """Means over a refresh period."""
    matrices = [p for p in step.matrices if not p.is_adamw]
    vectors = [p for p in step.matrices if p.is_adamw]
    rest = others.adamw_step(vectors, device)

    def times(work: Work) -> Times:
        return Times(0.0, 0.0, 0.0).with_work(work).with_work(rest)

    yield "AdamW, fused", Times(0.0, 0.0, 0.0).with_work(others.adamw_step(step.matrices, device))
    yield "Muon (torch.optim)", times(others.total(others.muon_step(p, device) for p in matrices))
    for name, forms in (("SOAP", others.SOAP), ("research code", others.RESEARCH)):
        work = Work()
        for p in matrices:
            work.add(others.eager_step(p, forms, device, precision))
            refresh = others.eager_refresh(p, forms, device, precision)
            work.add(refresh, 1 / others.FREQUENCY)
        yield f"{name}, a refresh every {others.FREQUENCY}", times(work)


def rows_of(step: Step, device: Device, precision: str) -> Iterator[tuple[str, Times]]:
    plain = plain_times(step, device, precision)
    yield "a plain step", plain
    found = refreshes(step, device)
    mean, most = plain, plain
    for refresh in found:
        mean, most = mean.with_work(refresh.mean), most.with_work(refresh.most)
    yield "mean with refreshes", mean
    yield "slowest step", most
    yield "plain, without cuBLAS", plain_times(step, device, precision, "kernels")
    yield "plain, all large by wgmma", plain_times(step, device, precision, "wgmma")
    yield from other_rows(step, device, precision)
