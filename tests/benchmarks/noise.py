"""How much the score varies between validation sets, and so which difference between two epochs is meaningful.

EfficientNet-Lite0, with ImageNet weights and with random weights, computes features of 5000 MNIST digits. Many random
validation sets of each size are drawn without replacement. The table shows the mean and the standard deviation of the
gain, and of the *difference* between the two networks on the same samples.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_logme.functional import evidence
from tests.benchmarks.common import print_table

SIZES = (250, 500, 1000, 2000)


def report(repeats: int, quick: bool) -> None:
    if importlib.util.find_spec("mlxtend") is None or importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        print("Noise: not measured, it needs pip install -e '.[examples]'.\n")
        return
    sys.path.append(str(Path(__file__).parents[2] / "examples"))
    from _data import digits, efficientnet

    images, labels = digits(4999, 1)[0].tensors
    features = {name: embed(efficientnet(name == "pretrained"), images) for name in ("pretrained", "random")}
    rows = []
    for size in SIZES[:1] if quick else SIZES:
        gains = {name: torch.empty(4 * repeats) for name in features}
        for index in range(4 * repeats):
            generator = torch.Generator().manual_seed(index)
            chosen = torch.randperm(len(labels), generator=generator)[:size]
            for name, rows_of_all in features.items():
                gains[name][index] = evidence(rows_of_all[chosen], labels[chosen], num_classes=10).gain
        difference = gains["pretrained"] - gains["random"]
        rows.append((str(size), *(f"{g.mean():.3f} ± {g.std():.3f}" for g in (*gains.values(), difference))))
    print_table(
        f"Noise: gain, mean ± standard deviation over {4 * repeats} validation sets",
        ("samples", *features, "difference on the same samples"),
        rows,
    )


@torch.inference_mode()
def embed(network: nn.Module, images: Tensor) -> Tensor:
    """Return the inputs of the head, in evaluation mode."""
    seen: list[Tensor] = []
    network.eval()._fc.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in images.split(250):
        network(batch)
    return torch.cat(seen)
