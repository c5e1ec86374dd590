"""The faults of mutate.py.

Left out is what changes nothing that can be observed:

- gemm_epilogue.cuh, the predicate on columns in mirror: beside the diagonal tiles are whole in that
  direction, and on it col < row.
- gemm_epilogue.cuh, the predicate on the squares of X: outside of the matrix X and its product are
  zero.
- elements.cu, the early return of the blending: a unit of no elements moves nothing. The alignment
  of a 16-bit gradient: units of flat arrays start at multiples of eight.
- factor_scalars.cu, either one of the two guards of ksl_right: a left norm that vanished makes the
  right one NaN, and otherwise <H^T U H, R> = <U, H R H^T> > 0.
- prepare.cu, which power of two tau is, within wide limits.
"""

from .elements import DEVICE, ELEMENT_KERNELS
from .fault import Mutant
from .gemm import EPILOGUES, FRAGMENTS, MAIN_LOOP, TILE_LOADER
from .library import LIBRARY
from .scalars import FACTOR_SCALARS, GRAD_MAX, PLANS, PREPARE, SECOND_MOMENT
from .skinny import SKINNY

MUTANTS: list[Mutant] = [
    *TILE_LOADER,
    *FRAGMENTS,
    *MAIN_LOOP,
    *EPILOGUES,
    *DEVICE,
    *ELEMENT_KERNELS,
    *FACTOR_SCALARS,
    *PREPARE,
    *SECOND_MOMENT,
    *GRAD_MAX,
    *PLANS,
    *SKINNY,
    *LIBRARY,
]
