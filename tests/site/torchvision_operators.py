"""Define two operators of torchvision if its library cannot be loaded, as with a CUDA wheel beside a CPU torch.

Without them `import torchvision` fails, and with it Lightning, timm and transformers. Import this module before those.
"""

from importlib.util import find_spec
from pathlib import Path

_spec = find_spec("torchvision")
if _spec is not None and _spec.origin is not None:
    import torch

    try:
        torch.ops.load_library(Path(_spec.origin).with_name("_C.so"))
    except OSError:
        LIBRARY = torch.library.Library("torchvision", "DEF")  # the operators live as long as this object
        for _name in ("nms", "qnms"):
            LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
