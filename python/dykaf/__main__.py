"""`python -m dykaf`: what is installed, for a report of a problem."""

import os

import torch

from dykaf import _C
from dykaf._build_info import CUDA_DECISION


def backends(has_cuda: bool) -> str:
    """What serves which tensors."""
    if os.environ.get("DYKAF_BACKEND") == "aten":
        return "aten (torch's own operations, by DYKAF_BACKEND) for all tensors"
    kernels = "cuda for those on NVIDIA GPUs but float64, " if has_cuda else ""
    return f"cpu for tensors on the CPU, {kernels}aten (torch's own operations) for all others"


def report() -> str:
    """Returns version, backends, architectures, torch, compiler and threads, one a line."""
    info = _C.build_info()
    rows = {
        "dykaf": info["version"],
        "backends": backends(bool(info["cuda"])),
        "cuda": f"{info['cuda']} ({CUDA_DECISION})" if info["cuda"] else CUDA_DECISION,
        "architectures": info["cuda_archs"] or "none",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "compiler": info["compiler"],
        "threads": str(torch.get_num_threads()),
    }
    return "\n".join(f"{name:<14}{value}" for name, value in rows.items())


if __name__ == "__main__":
    print(report())
