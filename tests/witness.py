"""Compare runs of several processes with one process that has all the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
from models import CLASSES, Classifier, penultimate
from torch.utils.data import TensorDataset

from lightning_logme import LogMECallback
from lightning_logme.functional import evidence


class Quiet(Classifier):
    """A module that logs nothing, so that all metrics, and all warnings about metrics, come from the callback."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])


class CallsHeadTwice(Quiet):
    """Calls its head twice in process 1, so that the batch cannot be scored there.

    Args:
        batches: the indices of these batches; None for all.
    """

    def __init__(self, batches: Sequence[int] | None = None) -> None:
        super().__init__()
        self.batches = batches

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])
        if self.global_rank == 1 and (self.batches is None or batch_idx in self.batches):
            self(batch[0])


class Witness(pl.Callback):
    """Record after each validation what the LogME callback reports, and the scores of all data in this process alone.

    Args:
        callback: the LogME callback of the run.
        datasets: the validation sets.
        curves: by key of a curve, the data set in the order in which the curve takes its samples.
    """

    def __init__(
        self,
        callback: LogMECallback,
        datasets: Sequence[TensorDataset] = (),
        curves: Mapping[str, TensorDataset] | None = None,
    ) -> None:
        self.callback, self.datasets, self.curves = callback, datasets, curves or {}
        self.reports: list[dict[str, Any]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        expected = {}
        for index, data in enumerate(self.datasets):
            key = "logme" if len(self.datasets) == 1 else f"logme/dataloader_idx_{index}"
            whole = evidence(*penultimate(pl_module, "model.2", data), num_classes=CLASSES)
            expected[key] = {"num_samples": len(data), "logme": float(whole.score), "gain": float(whole.gain)}
        curves = {}
        for key, data in self.curves.items():
            features, labels = penultimate(pl_module, "model.2", data)
            curves[key] = [
                (n, score, float(evidence(features[:n], labels[:n], num_classes=CLASSES).score))
                for n, score, *_ in self.callback.curves[key]
            ]
        self.reports.append(
            {
                "history": list(self.callback.history),
                "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
                "expected": expected,
                "curves": curves,
            }
        )


def check_equals_one_process(reports: Sequence[Sequence[dict[str, Any]]], num_samples: Sequence[int]) -> None:
    """Assert that a run of one validation reports the scores of one process, the same in all processes.

    Args:
        reports: the reports of a Witness, by process.
        num_samples: the number of samples in each row of the history.
    """
    assert len(reports) > 1
    assert all(of_process == reports[0] for of_process in reports)  # to the last bit
    (report,) = reports[0]
    assert [row["num_samples"] for row in report["history"]] == list(num_samples)
    assert report["expected"] or report["curves"]
    for key, expected in report["expected"].items():
        row = next(row for row in reversed(report["history"]) if row["key"] == key)
        assert row["num_samples"] == expected["num_samples"]
        assert row["logme"] == pytest.approx(expected["logme"], rel=1e-10)
        assert row["gain"] == pytest.approx(expected["gain"], rel=1e-10, abs=1e-12)
        assert report["metrics"][key] == pytest.approx(row["logme"], rel=1e-6)
    for key, curve in report["curves"].items():
        assert curve
        for _, score, expected in curve:
            assert score == pytest.approx(expected, rel=1e-9)
        assert report["metrics"][key] == pytest.approx(curve[-1][1], rel=1e-6)
