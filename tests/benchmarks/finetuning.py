"""Fine-tuning of the backbones of ``examples/_zoo.py``, with its time and memory.

All backbones use the same recipe: AdamW for three epochs with batches of 32, learning rates that fall to zero along
half a cosine, all weights trained. The head is a linear layer on standardised features (a BatchNorm without weights),
so that one learning rate of the head suits features of any scale.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import R2Score

from lightning_logme.features.labels import find_mask
from lightning_logme.features.pooling import pool
from tests.benchmarks.common import peak, reset_peak
from tests.benchmarks.frozen import Backbone, call, headless, target

T = TypeVar("T")

_HEAD_RATE = 5e-3


@dataclass(frozen=True)
class Recipe:
    """How to train: on the first ``train`` samples of a task. The next ``test`` samples are the test set."""

    train: int
    test: int
    learning_rate: float  # of the backbone
    epochs: int = 3
    seeds: int = 3
    batch_size: int = 32


@dataclass(frozen=True)
class Tuned:
    """Test accuracy (R² of a regression) and seconds of training by seed, and the peak memory in MiB."""

    scores: list[float]
    seconds: list[float]
    memory: float


def finetune_all(name: str, recipe: Recipe, folder: Path) -> dict[str, Tuned]:
    """Return the results by backbone, each from its own process. Results that the folder holds are read from it."""
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for key in target(name, 1).backbones:
        path = folder / f"{key} tuned.json"
        if not path.exists():
            path.write_text(json.dumps(asdict(in_process(finetune, name, key, recipe))))
        results[key] = Tuned(**json.loads(path.read_text()))
    return results


def in_process(function: Callable[..., T], *args: Any) -> T:
    """Return the result of the function in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *args).result()


def finetune(name: str, key: str, recipe: Recipe) -> Tuned:
    """Fine-tune once for every seed. Memory is the peak above imports and data."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # Lightning logs the devices.
    warnings.filterwarnings("ignore", module="lightning")
    task = target(name, recipe.train + recipe.test)
    task.backbones[key].load()
    rows, collate = range(recipe.train + recipe.test), task.loader.collate_fn
    train: DataLoader[Any] = DataLoader(
        Subset(task.loader.dataset, rows[: recipe.train]),
        recipe.batch_size,
        shuffle=True,
        drop_last=True,  # A single sample cannot be standardised.
        collate_fn=collate,
    )
    test: DataLoader[Any] = DataLoader(Subset(task.loader.dataset, rows[recipe.train :]), 100, collate_fn=collate)
    scores, seconds = [], []
    before = reset_peak()
    for seed in range(recipe.seeds):
        seed_everything(seed, verbose=False)
        model = _Finetuned(task.backbones[key], task.num_classes, recipe.learning_rate, next(iter(test)))
        run = Trainer(
            accelerator="cpu",
            max_epochs=recipe.epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        start = time.perf_counter()
        run.fit(model.train(), train)  # from_pretrained returns a module in eval mode.
        seconds.append(time.perf_counter() - start)
        scores.append(run.test(model, test, verbose=False)[0]["score"])
    return Tuned(scores, seconds, peak() - before)


class _Finetuned(LightningModule):
    def __init__(self, backbone: Backbone, num_classes: int | None, learning_rate: float, example: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.network = headless(backbone)
        self.head = nn.Sequential(nn.LazyBatchNorm1d(affine=False), nn.LazyLinear(num_classes or 1))
        self.metric: Metric = MulticlassAccuracy(num_classes, average="micro") if num_classes else R2Score()
        self.loss = F.cross_entropy if num_classes else F.mse_loss
        self.learning_rate = learning_rate
        with torch.no_grad():
            self.eval()(example)  # The lazy layers of the head need the number of features.

    def forward(self, batch: Any) -> Tensor:
        prepared = self.backbone.transform(batch)
        features = pool(call(self.network, prepared), self.backbone.pooling, mask=find_mask(prepared))
        outputs: Tensor = self.head(features)
        return outputs if outputs.shape[1] > 1 else outputs[:, 0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self(batch), batch[1])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.metric(self(batch), batch[1])
        self.log("score", self.metric, on_epoch=True, on_step=False, batch_size=len(batch[1]))

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": list(self.network.parameters()), "lr": self.learning_rate},
            {"params": list(self.head.parameters()), "lr": _HEAD_RATE},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
