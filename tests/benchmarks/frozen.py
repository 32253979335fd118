"""Features of the frozen backbones of ``examples/_zoo.py``, cached on disk."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_logme.features.hooks import CallTrace, Capture, Window
from lightning_logme.features.labels import find_mask
from lightning_logme.features.pooling import pool

sys.path.append(str(Path(__file__).parents[2] / "examples"))  # The folder holds scripts and is no package.

from _zoo import Backbone, Target, target

Array = np.ndarray[Any, Any]

CACHE = Path(os.environ.get("LOGME_CACHE", Path(tempfile.gettempdir()) / "zoo_cache"))


@dataclass(frozen=True)
class Frozen:
    """The features of a task from a frozen backbone.

    Attributes:
        features: (N, D) float32.
        target: (N,).
        layers: the features of the inner layers, in the order of the network.
        parameters: the number of parameters of the backbone without its head.
        seconds: the time of the forward passes, including the preparation of batches.
    """

    features: Array
    target: Array
    layers: list[Array]
    parameters: int
    seconds: float


def frozen(name: str, samples: int | None, folder: Path) -> dict[str, Frozen]:
    """Return the features by backbone. Features that the folder holds are read from it."""
    task = target(name, samples)
    folder = folder / name
    missing = {key: backbone for key, backbone in task.backbones.items() if not (folder / f"{key}.npz").exists()}
    folder.mkdir(parents=True, exist_ok=True)
    for load in dict.fromkeys(backbone.load for backbone in missing.values()):
        # Backbones that differ only in their pooling share a forward pass.
        backbones = {key: backbone for key, backbone in missing.items() if backbone.load is load}
        for key, made in extract(task, backbones).items():
            arrays: dict[str, Any] = {f"layer_{index:02}": layer for index, layer in enumerate(made.layers)}
            arrays |= {field: getattr(made, field) for field in ("features", "target", "parameters", "seconds")}
            np.savez(folder / f"{key}.npz", **arrays)
    return {key: _read(folder / f"{key}.npz") for key in task.backbones}


def _read(path: Path) -> Frozen:
    with np.load(path) as file:
        layers = [file[key] for key in sorted(file.files) if key.startswith("layer_")]
        return Frozen(file["features"], file["target"], layers, int(file["parameters"]), float(file["seconds"]))


@torch.no_grad()
def extract(task: Target, backbones: dict[str, Backbone]) -> dict[str, Frozen]:
    """Return the features by backbone, for backbones that load the same module."""
    backbone = next(iter(backbones.values()))
    torch.manual_seed(0)
    network = headless(backbone).eval()
    window = Window(CallTrace(network))  # Without labels, captures are copies that can be pooled in several ways.
    captures = [Capture(layer, "output", "layer", window) for layer in inner_layers(network)]
    rows: dict[str, list[list[Tensor]]] = {name: [] for name in backbones}
    labels = []
    start = time.perf_counter()
    for batch in task.loader:
        prepared, window.is_open = backbone.transform(batch), True
        outputs = [call(network, prepared), *(tensor for capture in captures for tensor, _ in capture.seen)]
        for capture in captures:
            capture.seen = []
        labels.append(batch[1])
        for name, same in backbones.items():
            rows[name].append([pool(output, same.pooling, mask=find_mask(prepared)) for output in outputs])
    seconds = time.perf_counter() - start
    parameters = sum(parameter.numel() for parameter in network.parameters())
    found = {}
    for name, batches in rows.items():
        features, *layers = (torch.cat(parts).numpy() for parts in zip(*batches, strict=True))
        found[name] = Frozen(features, torch.cat(labels).numpy(), layers, parameters, seconds)
    return found


def headless(backbone: Backbone) -> nn.Module:
    """Return the module of a backbone without its head, so that its output is the features."""
    network = backbone.load()
    if backbone.head is not None:
        network.set_submodule(backbone.head, nn.Identity())
    return network


def call(network: nn.Module, batch: Any) -> Tensor:
    """Return the features before pooling, for a batch (inputs, labels) or for the dict of a transformer."""
    if isinstance(batch, dict):
        hidden: Tensor = network(**{key: value for key, value in batch.items() if key != "labels"}).last_hidden_state
        return hidden
    features: Tensor = network(batch[0])
    return features


def inner_layers(network: nn.Module) -> list[nn.Module]:
    """Return the modules of the longest chain: the blocks of a CNN, or the layers of an encoder."""
    chains = [list(module) for module in network.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    return max(chains, key=len, default=[])
