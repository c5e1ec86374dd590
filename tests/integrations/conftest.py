"""The tools that these tests need come by `make test-integrations`, which runs them."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is to be downloaded

import pytest
import torchvision_stub  # noqa: F401  # before torchvision, which timm and transformers import

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"
sys.path.insert(0, str(RECIPES))


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Its settings are of the process: those of one test would be the next one's."""
    yield
    if "accelerate" not in sys.modules:
        return
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
