from collections.abc import Mapping, Sequence

from torch import Tensor

from dykaf.ops import Place, StepInputs, StepJob
from dykaf.options import StepOptions
from dykaf.products import ProductRule
from dykaf.state import State

def build_info() -> dict[str, str]: ...
def backend_of(tensor: Tensor, name: str) -> str: ...
def use_products(rules: Sequence[ProductRule]) -> None: ...
def has_library() -> bool: ...
def use_aten_alone(alone: bool) -> bool: ...
def grad_max(grads: Sequence[Tensor], counts: Sequence[int]) -> Tensor: ...
def rotate(
    inputs: Sequence[Tensor], states: Sequence[State], into_basis: bool, options: StepOptions
) -> list[Tensor]: ...
def adam_update_(
    grads: Sequence[Tensor], states: Sequence[State], options: StepOptions
) -> list[Tensor]: ...
def orthogonalize_(
    updates: Sequence[Tensor], states: Sequence[State], options: StepOptions
) -> None: ...
def apply_update_(
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    states: Sequence[State],
    streams: Sequence[int],
    options: StepOptions,
    places: Sequence[Place],
) -> None: ...
def factor_update_(
    grads: Sequence[Tensor], states: Sequence[State], options: StepOptions
) -> None: ...
def initialize_(
    grads: Sequence[Tensor],
    states: Sequence[State],
    offsets: Sequence[tuple[int, int]],
    options: StepOptions,
) -> None: ...
def refresh_basis_(states: Sequence[State], side: str, options: StepOptions) -> None: ...
def refresh_due_(
    states: Sequence[State],
    offsets: Sequence[tuple[int, int]],
    options: StepOptions,
    kept: Sequence[Tensor],
    full: Sequence[Tensor],
) -> None: ...

Places = list[list[int]]

class Jobs:
    def __init__(self, jobs: Sequence[StepJob]) -> None: ...
    def run(self, started: Tensor) -> tuple[Places, Places, Places]: ...
    def keep(
        self,
        groups: list[list[Tensor]],
        states: Mapping[Tensor, State],
        places: Sequence[Sequence[int]],
    ) -> bool: ...
    def grad_max(
        self, groups: list[list[Tensor]], states: Mapping[Tensor, State]
    ) -> list[Tensor] | None: ...
    def let_go(self) -> None: ...
    def run_again(
        self, inputs: Sequence[StepInputs], started: Tensor
    ) -> tuple[Places, Places, Places]: ...
