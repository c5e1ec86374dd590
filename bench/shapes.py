"""The shape sets of the step benchmark."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ShapeSet:
    """Matrices that one optimizer steps together.

    Attributes:
        name: as given to --sets.
        description: what the shapes stand for.
        shapes: one (rows, columns) per parameter.
        num_periods: refresh periods measured by default; few where a period is slow.
    """

    name: str
    description: str
    shapes: tuple[tuple[int, int], ...]
    num_periods: int


SHAPE_SETS = {
    shape_set.name: shape_set
    for shape_set in (
        ShapeSet(
            "block",
            "one transformer block of width 768: attention in and out, MLP up and down",
            ((2304, 768), (768, 768), (3072, 768), (768, 3072)),
            num_periods=1,
        ),
        ShapeSet(
            "lora",
            "64 adapters of rank 8 on layers of width 1024",
            ((8, 1024), (1024, 8)) * 64,
            num_periods=1,
        ),
        ShapeSet(
            "small",
            "four blocks of width 256",
            ((256, 256), (768, 256), (1024, 256), (256, 1024)) * 4,
            num_periods=3,
        ),
    )
}
