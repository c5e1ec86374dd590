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
from bench.cuda_rates import EAGER, FLOAT, HOST_MATRIX, HOST_VECTOR, LARGE, LAUNCH, Device
from bench.cuda_refresh import Refreshes, Work, refreshes_of

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
    passes: list[list[Launch]]
    num_passes: int
    refreshes: dict[str, list[Refreshes]] = field(default_factory=dict)  # by device, once priced

    @property
    def matrices(self) -> list[Matrix]:
        return [p for group in self.groups for p in group]

    @property
    def kernels(self) -> int:
        return sum(map(len, self.passes)) + GRAD_MAX_KERNELS * len(self.groups)

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
        return grads + sum(launch.bytes for plan in self.passes for launch in plan)

    @property
    def flops(self) -> float:
        return sum(launch.flops for plan in self.passes for launch in plan)

    @property
    def host(self) -> float:
        vectors = sum(p.is_adamw for p in self.matrices)
        per_parameter = HOST_MATRIX.value * (len(self.matrices) - vectors)
        per_parameter += HOST_VECTOR.value * vectors
        launches = self.kernels + self.copies
        return per_parameter + launches * LAUNCH.value + self.operations * EAGER.value


def step_of(model: Model) -> Step:
    groups = [matrices_of(group, model.dtype) for group in model.groups]
    plans = [launches_of(part) for group in groups for part in passes_of(group)]
    return Step(model, groups, plans, len(plans))


def library_seconds(launch: Launch, device: Device, precision: str, how: str) -> float:
    """Estimate of a launch's products by cuBLAS, one call per shape, or by wgmma kernels of ours.

    The library stores plainly: what the epilogue did is a kernel that reads the result again, and a
    symmetric result is computed whole. At "medium" it reads copies of the operands in bfloat16.
    Ours keep epilogues and halves.
    """
    operands = "bfloat16" if precision == "medium" else "TF32"
    seconds = 0.0
    for part, count in launch.parts.items():
        rate = device.library_rate(operands, part.m, part.n, part.k, count)
        data = count * part.bytes
        if how == "wgmma":
            assert device.wgmma is not None
            compute = count * part.blocks * part.block_flops / (rate * device.wgmma.value)
            calls = 1
        else:
            compute = count * 2.0 * part.m * part.n * part.k / rate
            data += count * passes_beside(part, precision)
            calls = 1 + (part.beside > 0) + 2 * (precision == "medium")
        memory = data / device.dram.value / device.copied.value
        seconds += max(compute, memory) + calls * LAUNCH.value
    return seconds


def passes_beside(part: Part, precision: str) -> float:
    """Bytes that a call of the library moves more than our kernel."""
    more = 2 * FLOAT * part.m * part.n if part.beside else 0
    if precision == "medium":  # read 4 bytes, write 2, read 2 in place of 4
        more += 4 * (part.m * part.k + part.k * part.n)
    return more


def may_delegate(launch: Launch, device: Device, precision: str, how: str) -> bool:
    if how == "plan" or launch.tile is not LARGE or device.wgmma is None:
        return False
    if precision == "highest":  # three TF32 products are faster than cuBLAS's float32 ones
        return False
    is_plain = not any(part.is_symmetric for part in launch.parts) or "square" in launch.site
    return how == "wgmma" or is_plain


def plain_times(step: Step, device: Device, precision: str, how: str = "plan") -> Times:
    grads = sum(p.param_bytes * p.size for p in step.matrices) / device.dram.value
    bound, likely = grads, grads / device.copied.value
    likely += (GRAD_MAX_KERNELS * len(step.groups) + step.operations) * LAUNCH.value
    for plan in step.passes:
        for launch in plan:
            bound += launch.seconds(device, precision, reached=False)
            ours = launch.seconds(device, precision, reached=True) + LAUNCH.value
            if may_delegate(launch, device, precision, how):
                ours = min(ours, library_seconds(launch, device, precision, how))
            likely += ours
    return Times(bound, likely, step.host)


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
    for how, text in (
        ("cuBLAS", "large plain products by cuBLAS"),
        ("wgmma", "all large by wgmma"),
    ):
        yield f"plain, {text}", plain_times(step, device, precision, how)
    yield from other_rows(step, device, precision)
