"""bench.sass: reading of machine code, of names and of budgets; no compiler is needed."""

import dataclasses
import json
from pathlib import Path

import pytest
from bench.sass import budgets, listing, report, toolchain
from bench.sass.kernels import analyse, main_loop, parse_gemm, short_name
from bench.sass.machines import MACHINES, occupancy
from bench.sass.toolchain import Resources

MEDIUM_TILE = "Li64ELi64ELi32ELi32ELi32ELi3ELi3E"


def gemm_name(form: int, precision: int, tile: str = MEDIUM_TILE) -> str:
    return (
        f"_ZN5dykaf4cuda11gemm_kernelINS0_9TileShapeI{tile}ELNS0_8GemmFormE{form}E"
        f"LNS0_15MatmulPrecisionE{precision}EEEvNS0_10GemmLaunchE"
    )


def text_of(name: str, lines: list[str]) -> str:
    """A listing as nvdisasm prints it; a line with a colon is a label."""
    text = [f"\t.section\t.text.{name}", f".text.{name}:"]
    for line in lines:
        address = 16 * sum("/*" in t for t in text)
        guard, _, rest = line.partition(" ") if line.startswith("@") else ("", "", line)
        is_label = line.endswith(":")
        text.append(line if is_label else f"        /*{address:04x}*/ {guard:>10} {rest} ;")
    return "\n".join(text)


# Two paths of loading, 32 products of one stage, and a shorter loop without products.
NUM_HMMA = 32
LOOP = [
    ".L_x_0:",
    "IADD3 R1, R1, 0x1, RZ",
    "@!P0 BRA `(.L_x_0)",
    ".L_x_1:",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "@P1 BRA `(.L_x_2)",
    "IADD3 R2, R2, 0x4, RZ",
    "LDGSTS.E [R2], desc[UR6][R8.64], P3",
    "BRA `(.L_x_3)",
    ".L_x_2:",
    "@!PT LDS RZ, [RZ]",
    "LDGSTS.E.BYPASS.128.ZFILL [R2], desc[UR6][R8.64], P3",
    ".L_x_3:",
    "LDSM.16.M88.4 R4, [R2]",
    *["HMMA.1688.F32.TF32 R8, R4, R6, R8"] * NUM_HMMA,
    "@!P0 BRA `(.L_x_1)",
    "EXIT",
]


def loop_of(lines: list[str], name: str | None = None):
    name = name or gemm_name(form=2, precision=1)
    shape = parse_gemm(name)
    assert shape is not None
    return main_loop(listing.parse(text_of(name, lines))[name], shape, arch=90)


def test_names():
    assert short_name(gemm_name(form=3, precision=0)) == "gemm 64x64 sym NT highest"
    unnamed = "_ZN5dykaf4cuda52_GLOBAL__N__d57cebf7_11_elements_cu_cd2184182"
    assert short_name(f"{unnamed}12blend_kernelENS0_7GroupedE") == "blend"
    adam = f"{unnamed}15elements_kernelINS0_11AdamProblemEEEvNS0_7GroupedE"
    assert short_name(adam) == "elements adam"
    compact = adam.replace("11AdamProblem", "18CompactAdamProblem")
    assert short_name(compact) == "elements compact adam"
    assert short_name(adam.replace("11AdamProblem", "12AdamWProblem")) == "elements adamw"


def test_shape_of_a_product():
    shape = parse_gemm(gemm_name(form=0, precision=0))
    assert shape is not None
    assert (shape.warps, shape.expected_hmma) == (4, 3 * 2 * 4 * 4)
    # A lies along k, B across it: 3 stages of 64 x 36 and 32 x 72 floats.
    assert shape.dynamic_shared_bytes == 4 * 3 * (64 * 36 + 32 * 72)


def test_main_loop_takes_the_aligned_path():
    loop = loop_of(LOOP)
    assert loop.mix["HMMA"] == NUM_HMMA
    assert (loop.mix["LDSM"], loop.mix["LDGSTS128"], loop.mix["never"]) == (1, 1, 1)
    assert "LDGSTS32" not in loop.mix
    # BAR, BRA, the guarded LDS, LDGSTS, LDSM, HMMA, BRA
    assert loop.issued == 5 + NUM_HMMA + 1
    assert loop.limit == "tensor"


def test_the_tensor_cores_run_at_the_rate_of_mma_sync():
    cycles = loop_of(LOOP).cycles["tensor"]  # of four warps, one on each partition
    assert cycles == pytest.approx(NUM_HMMA * 4 / 0.629)


def test_unrolled_loops_count_per_stage():
    body = LOOP[LOOP.index(".L_x_3:") + 1 : -2]
    unrolled = [*LOOP[:-2], *body, *LOOP[-2:]]
    loop = loop_of(unrolled)
    assert loop.mix["HMMA"] == NUM_HMMA
    assert loop.mix["LDGSTS128"] == 0.5


def test_the_second_accumulator_counts_by_its_share():
    name = gemm_name(form=2, precision=0)
    flush = ["@P2 BRA `(.L_x_4)", *["FADD R1, R1, R2"] * 32, ".L_x_4:"]
    products = ["HMMA.1688.F32.TF32 R8, R4, R6, R8"] * (3 * NUM_HMMA - NUM_HMMA)
    loop = loop_of([*LOOP[:-2], *products, *flush, *LOOP[-2:]], name)
    assert loop.mix["fp32"] == 32 * 32 / 256


def test_a_wrong_number_of_products_is_an_error():
    lines = LOOP.copy()
    lines.remove("HMMA.1688.F32.TF32 R8, R4, R6, R8")
    with pytest.raises(ValueError, match="31 HMMA, 32 expected"):
        loop_of(lines)


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "expected"),
    [
        (242, 256, 77000, (1, "registers")),
        (32, 128, 100 << 10, (2, "shared")),
        (32, 256, 0, (8, "registers")),
        (16, 32, 0, (32, "blocks")),
        (16, 1024, 0, (2, "warps")),
    ],
)
def test_occupancy(registers, threads, shared, expected):
    assert occupancy(MACHINES[90], registers, threads, shared) == expected


PTXAS = """\
ptxas info    : Compiling entry function '_Z1fv' for 'sm_90'
ptxas info    : Function properties for _Z1fv
    {stack} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 128 bytes smem
"""


@pytest.mark.parametrize(
    ("stack", "spill", "defects"),
    [(0, 0, []), (8, 4, ["stack frame of 8 bytes", "spills of 8 bytes"])],
)
def test_report_of_ptxas(stack, spill, defects):
    found = toolchain.parse_report(PTXAS.format(stack=stack, spill=spill))["_Z1fv"]
    assert (found.registers, found.shared_bytes) == (64, 128)
    assert found.defects == defects


def a_kernel(arch: int = 90):
    name = gemm_name(form=2, precision=1)
    function = listing.parse(text_of(name, LOOP))[name]
    return analyse(function, Resources(120, 128, 0, 0), arch)


def test_budgets_hold_what_was_recorded():
    kernel = a_kernel()
    assert budgets.excesses([kernel], budgets.make([kernel])) == []


@pytest.mark.parametrize(
    ("what", "budget", "is_excess"),
    [
        ("registers", 119, True),
        ("registers", 121, False),
        ("blocks", 5, True),
        ("hmma", 33, True),
        ("instructions", 36.5, False),  # 38 are within 5 per cent
        ("instructions", 36, True),
    ],
)
def test_an_excess_is_found(what, budget, is_excess):
    kernel = a_kernel()
    changed = budgets.make([kernel])
    changed["sm_90"][kernel.name][what] = budget
    lines = budgets.excesses([kernel], changed)
    assert bool(lines) == is_excess
    assert all(what in line and str(budget) in line for line in lines)


def test_a_large_product_that_waits_for_shared_memory_is_found():
    kernel = a_kernel()
    recorded = budgets.make([kernel])
    assert budgets.excesses([kernel], recorded) == []
    large = dataclasses.replace(kernel, name="gemm 128x128 NT high")
    recorded["sm_90"][large.name] = recorded["sm_90"].pop(kernel.name)
    assert budgets.excesses([large], recorded) == []
    large.loop.cycles["shared"] = large.loop.cycles["tensor"] / 0.79
    assert budgets.excesses([large], recorded) == [
        "sm_90 gemm 128x128 NT high: bound 79%, least 80%"
    ]


def test_budgets_and_kernels_must_match():
    kernel = a_kernel()
    assert budgets.excesses([kernel], {}) == [f"sm_90 {kernel.name}: no budget"]
    changed = {"sm_90": {**budgets.make([kernel])["sm_90"], "other": {}}}
    assert budgets.excesses([kernel], changed) == ["sm_90 other: no such kernel"]


def test_recorded_budgets_cover_the_products():
    recorded = json.loads(budgets.PATH.read_text())
    assert set(recorded) == {f"sm_{a}" for a in budgets.ARCHS}
    for kernels in recorded.values():
        assert sum("hmma" in row for row in kernels.values()) == 48


def test_tables_go_between_their_markers(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.put_between_markers(path, report.BEGIN, report.END, "new")
    assert path.read_text() == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    with pytest.raises(ValueError, match="no lines"):
        report.put_between_markers(path, "<other>", report.END, "new")


@pytest.mark.skipif(
    toolchain.find_nvcc() is None or toolchain.find_nvdisasm() is None,
    reason="nvcc and nvdisasm are needed",
)
def test_a_lowered_budget_is_found_in_a_compiled_kernel(tmp_path):
    """What --check does with all sources, with one small one."""
    csrc = Path(__file__).resolve().parent.parent / "csrc"
    unit = toolchain.compile_unit(csrc, csrc / "cuda" / "kernels" / "prepare.cu", 90, tmp_path)
    functions = listing.parse(unit.listing)
    kernels = [analyse(functions[n], r, unit.arch) for n, r in unit.resources.items()]
    assert report.defects(kernels) == []
    lowered = budgets.make(kernels)
    assert budgets.excesses(kernels, lowered) == []
    lowered["sm_90"]["prepare"]["registers"] -= 1
    assert len(budgets.excesses(kernels, lowered)) == 1
