"""What tests of the evidence suite share."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any


class InProcess:
    """Stands for ProcessPoolExecutor: worker processes would not see the made-up data."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def submit(self, function: Any, argument: Any) -> Any:
        future: Future[Any] = Future()
        future.set_result(function(argument))
        return future

    def shutdown(self, **kwargs: Any) -> None:
        pass
