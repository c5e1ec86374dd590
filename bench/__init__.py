"""Benchmarks; run them from the project root as `python -m bench`."""

import os

# torch's profiler, which counts allocations here, reports each start and stop on stderr otherwise.
# It reads the variable when torch is imported, so this comes first.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
