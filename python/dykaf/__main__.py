"""`python -m dykaf`: what is installed, for a report of a problem."""

import torch

from dykaf import _C
from dykaf._build_info import CUDA_DECISION


def report() -> str:
    """Returns version, backends, architectures, torch, compiler and threads, one a line."""
    info = _C.build_info()
    rows = {
        "dykaf": info["version"],
        "backends": "cpu, cuda" if info["cuda"] else "cpu",
        "cuda": f"{info['cuda']} ({CUDA_DECISION})" if info["cuda"] else CUDA_DECISION,
        "architectures": info["cuda_archs"] or "none",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "compiler": info["compiler"],
        "threads": str(torch.get_num_threads()),
    }
    return "\n".join(f"{name:<14}{value}" for name, value in rows.items())


if __name__ == "__main__":
    print(report())
