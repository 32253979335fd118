"""The metric on a CUDA device: time and memory of updates and of the score, and the overhead of the callback.

Memory is ``torch.cuda.max_memory_allocated`` above the memory that was allocated before the metric was built. Times are
medians and include the work of the device, which is synchronised before and after. The baseline of an update is one
matrix product FᵀF in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_logme import LogME, LogMECallback
from tests.benchmarks.common import class_features, print_table

_WIDTHS, _ROWS, _CLASSES = (1024, 2048, 4096), 20_000, 100
_QUICK_WIDTHS, _QUICK_ROWS = (64,), 1000
_BATCH = 1024

T = TypeVar("T")


def report(repeats: int, quick: bool) -> None:
    if not torch.cuda.is_available():
        print("GPU: not measured, because there is no CUDA device.\n")
        return
    rows, device = _QUICK_ROWS if quick else _ROWS, torch.device("cuda")
    print_table(
        f"GPU ({torch.cuda.get_device_name()}): {rows} × D bf16 features, {_CLASSES} classes, batches of {_BATCH}",
        ("D", "updates, s", "products alone, s", "ratio", "score, s", "peak of updates / D²·8", "peak of score / D²·8"),
        (metric_row(width, rows, repeats, device) for width in (_QUICK_WIDTHS if quick else _WIDTHS)),
    )
    print_table(
        "GPU: Trainer.validate of a CNN under bf16-mixed",
        ("images", "without, s", "with, s", "difference"),
        [trainer_row(rows, repeats, device)],
    )


def metric_row(width: int, rows: int, repeats: int, device: torch.device) -> tuple[str, ...]:
    """Return one row of the first table."""
    features, target = class_features(rows, width, _CLASSES)
    batches = list(zip(features.to(device, torch.bfloat16).split(_BATCH), target.to(device).split(_BATCH), strict=True))
    gram = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update() -> LogME:
        metric = LogME("multiclass", width, _CLASSES).to(device)
        for part, labels in batches:
            metric.update(part, labels)
        return metric

    def multiply() -> Tensor:
        for part, _ in batches:
            doubled = part.double()
            gram.addmm_(doubled.T, doubled)
        return gram

    updates, products, scores, peaks = [], [], [], []
    for _ in range(repeats):
        seconds, metric, first = _measured(update, device)
        updates.append(seconds)
        products.append(_measured(multiply, device)[0])
        seconds, _, second = _measured(metric.compute, device)
        scores.append(seconds)
        peaks.append((first / gram.nbytes, second / gram.nbytes + 1))
        del metric
    update_peak, score_peak = (median(column) for column in zip(*peaks, strict=True))
    slow, fast = median(updates), median(products)
    times = (f"{slow:.3f}", f"{fast:.3f}", f"{slow / fast:.2f}", f"{median(scores):.3f}")
    return str(width), *times, f"{update_peak:.1f}", f"{score_peak:.1f}"


def trainer_row(rows: int, repeats: int, device: torch.device) -> tuple[str, ...]:
    """Return the row of the second table."""
    module = _Module()
    data = TensorDataset(torch.randn(rows, 3, 32, 32), torch.arange(rows) % _CLASSES)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats + 1):  # The first round is a warm-up.
        for scored in seconds:
            trainer = pl.Trainer(
                accelerator=device.type,
                devices=1,
                precision="bf16-mixed",
                callbacks=[LogMECallback(plots=False)] if scored else [],
                logger=False,
                enable_progress_bar=False,
            )

            def validate(trainer: pl.Trainer = trainer) -> object:
                return trainer.validate(module, DataLoader(data, batch_size=_BATCH), verbose=False)

            seconds[scored].append(_measured(validate, device)[0])
    without, with_ = (median(values[1:]) for values in seconds.values())
    return str(rows), f"{without:.2f}", f"{with_:.2f}", f"{100 * (with_ / without - 1):.1f} %"


class _Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        widths = (3, 64, 128, 256, 512)
        layers = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in pairwise(widths)]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], _CLASSES))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


def _measured(call: Callable[[], T], device: torch.device) -> tuple[float, T, float]:
    """Return the seconds of a call, its result, and the peak of the bytes that it allocated."""
    cuda = device.type == "cuda"
    before = 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    result = call()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, result, (torch.cuda.max_memory_allocated() - before) if cuda else 0
