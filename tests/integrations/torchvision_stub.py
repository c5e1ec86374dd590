"""torchvision beside a torch it was not built for: import this before it.

Its import fails there for want of two operators, which these tests never call.
"""

import torch

try:
    import torchvision  # noqa: F401
except ImportError:
    pass  # it is not installed
except RuntimeError as error:
    if "torchvision::nms does not exist" not in str(error):
        raise
    LIBRARY = torch.library.Library("torchvision", "DEF")  # the operators live as long as this
    for name in ("nms", "qnms"):
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
