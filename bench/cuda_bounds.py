"""Bytes, flops and launches of a step, counted, and the times that a GPU's peaks allow.

    python -m bench.cuda_bounds
    python -m bench.cuda_bounds --write docs/cuda.md   # between the markers of that file

Nothing here is measured. A time is the larger of bytes over the published memory bandwidth and
flops over the published peak; no kernel reaches either. What is counted: bench/cuda_costs.py.
"""

import argparse
from pathlib import Path

from bench import cuda_costs as costs
from bench.cuda_costs import Matrix, vector
from bench.sass.report import put_between_markers

BEGIN, END = "<!-- bounds: begin -->", "<!-- bounds: end -->"
PERIOD = 10  # precondition_frequency
PASS_BYTES = 1 << 29  # kMaxWorkspaceBytes of csrc/bindings/on_cuda.cpp

# NVIDIA H100 and A100 data sheets, SXM, dense: memory in TB/s; TFLOP/s of float32 without tensor
# cores, in which refreshes run; TFLOP/s by matmul_precision, "highest" being three TF32 products.
PEAKS = {
    "H100": (3.35, 66.9, {"highest": 494.7 / 3, "high": 494.7, "medium": 989.0}),
    "A100": (2.039, 19.5, {"highest": 156.0 / 3, "high": 156.0, "medium": 312.0}),
}

# torch.nn.Linear's (out, in).
MODELS = {
    "GPT-2 small, float32: all parameters": [
        Matrix(2304, 768, 12, 4),  # attention in
        Matrix(768, 768, 12, 4),  # attention out
        Matrix(3072, 768, 12, 4),
        Matrix(768, 3072, 12, 4),
        Matrix(1024, 768, 1, 4),  # positions
        Matrix(50257, 768, 1, 4),  # tokens, tied to the output: a factor of the 768 side alone
        vector(768, 12 * 6 + 2, 4),
        vector(2304, 12, 4),
        vector(3072, 12, 4),
    ],
    "Llama-3-8B, bfloat16, without the embeddings at input and output": [
        Matrix(4096, 4096, 64, 2),  # q, o
        Matrix(1024, 4096, 64, 2),  # k, v
        Matrix(14336, 4096, 64, 2),  # gate, up: no factor of the 14336 side
        Matrix(4096, 14336, 32, 2),  # down
        vector(4096, 65, 2),
    ],
    "Llama-3-8B LoRA of rank 8 on q, k, v, o, bfloat16": [
        Matrix(8, 4096, 128, 2),  # A
        Matrix(4096, 8, 64, 2),  # B of q, o
        Matrix(1024, 8, 64, 2),  # B of k, v
    ],
}

SEQUENCES = {
    "this, a plain step": (costs.ours, None),
    f"this, a refresh every {PERIOD}": (costs.ours, costs.our_refresh),
    "this, skinny_rank=0, a plain step": (costs.ours_dense, None),
    f"this, skinny_rank=0, a refresh every {PERIOD}": (costs.ours_dense, costs.our_dense_refresh),
    'this, integrator="ksl", a plain step': (costs.ours_ksl, None),
    f'this, integrator="ksl", a refresh every {PERIOD}': (costs.ours_ksl, costs.our_dense_refresh),
    "floor of a plain step, all factors in full": (costs.floor, None),
    f"research code, a refresh every {PERIOD}": (costs.research, costs.research_refresh),
    f"SOAP, a refresh every {PERIOD}": (costs.soap, costs.soap_refresh),
}


def totals(model: list[Matrix], step, refresh) -> tuple[float, float, float]:
    """Returns flops of a step, flops of refreshes and bytes, the refreshes spread over PERIOD."""
    flops = {1.0: 0.0, 1 / PERIOD: 0.0}
    data = 0.0
    for p in model:
        for share, sequence in ((1.0, step), (1 / PERIOD, refresh)):
            for cost in sequence(p) if sequence else ():
                flops[share] += share * p.count * cost.flops
                data += share * p.count * (4 * cost.floats + p.param_bytes * cost.params)
    return flops[1.0], flops[1 / PERIOD], data


def number(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def bound_ms(totals: tuple[float, float, float], device: str, precision: str) -> str:
    bandwidth, float32, peaks = PEAKS[device]
    flops, refresh_flops, data = totals
    memory = data / bandwidth / 1e9
    compute = (flops / peaks[precision] + refresh_flops / float32) / 1e9
    return f"{number(max(memory, compute))} {'F' if compute > memory else 'B'}"


def model_table(name: str, model: list[Matrix]) -> str:
    size = sum(p.count * p.m * p.n for p in model)
    text = f"\n**{name}** ({size / 1e6:.1f} M parameters)\n\n"
    text += "| sequence | TFLOP | of refreshes | GB |"
    columns = [(d, q) for d in PEAKS for q in PEAKS[d][2]]
    text += "".join(f" {d} {q} |" for d, q in columns)
    text += "\n|---|" + "---:|" * (3 + len(columns)) + "\n"
    for label, (step, refresh) in SEQUENCES.items():
        if "skinny" in label and not any(costs.is_skinny(p) for p in model):
            continue
        counted = totals(model, step, refresh)
        cells = [label, *(number(x / 1e12) for x in counted[:2]), number(counted[2] / 1e9)]
        cells += [bound_ms(counted, d, q) for d, q in columns]
        text += "| " + " | ".join(cells) + " |\n"
    launches = len({cost.launch for p in model for cost in costs.ours(p)})
    # grad_max in two stages, prepare, the sums of update^2, two scalar launches; see launch_table
    launches += 1 + 1 + 1 + 2
    passes = num_passes(model)
    return text + f"\nLaunches of a plain step: at most {launches} a pass, {passes} pass(es).\n"


def num_passes(model: list[Matrix]) -> int:
    """Passes that the workspace's limit makes of a step, if parameters come sorted as listed."""
    passes = used = 0
    for p in model:
        squares = sum(size * size for size in costs.our_sides(p))
        need = 4 * (3 * p.m * p.n + squares) if squares else 0
        for _ in range(p.count):
            if passes == 0 or (used > 0 and used + need > PASS_BYTES):
                passes, used = passes + 1, 0
            used += need
    return passes


def launch_table() -> str:
    text = (
        "| integrator | second moment | one block shape | all block shapes |\n|---|---|---:|---:|\n"
    )
    for integrator, (general, symmetric, single) in costs.SITES.items():
        for moment, extra in costs.SECOND_MOMENTS.items():
            fixed = costs.ALWAYS + single + extra
            least = fixed + costs.ROTATIONS + general + symmetric
            most = fixed + 4 * (costs.ROTATIONS + general) + 2 * symmetric
            text += f"| {integrator} | {moment} | {least} | {most} |\n"
    least, most = costs.SKINNY
    text += f"\nWith skinny matrices {least} to {most} more."
    once, least, most = costs.ORTHOGONALIZE
    text += f" With `orthogonalize` {once} more, and {least} to {most} for each of its steps."
    return text + f' With `sides="none"` for some matrices at most {costs.UNSIDED} more.\n'


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cuda_bounds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", type=Path, help="put the tables between the file's markers")
    arguments = parser.parse_args()
    text = "\n### Launches of a step, at most\n\n" + launch_table()
    text += "\n### Milliseconds per step that the peaks allow\n"
    text += "\nF: flops bind; B: bytes bind.\n"
    text += "".join(model_table(name, model) for name, model in MODELS.items())
    if arguments.write:
        put_between_markers(arguments.write, BEGIN, END, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
