"""The cost of a probe compared with its forward passes, and of eight layers compared with one.

Two networks with random weights, in evaluation mode: the small CNN of the ``trainer`` benchmark on 10000 images of
32 × 32 (D = 256), and a BERT of eight layers (D = 384, as MiniLM's) on 512 texts of 64 tokens. The validation set is
one batch, so that the probe takes most of the time.

- ``Trainer.validate`` with a probe is compared with ``Trainer.validate`` without it plus a plain loop over the loader
  of the probe.
- ``Trainer.validate`` with eight scored layers of the BERT is compared with a single scored layer.

The two runs of a pair take turns, and their order changes every round.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_logme import LogMECallback
from tests.benchmarks.common import print_table, timed
from tests.benchmarks.trainer import image_loader, silence, small_cnn

_LAYERS = 8
_CLASSES = 10


class Encoder(LightningModule):
    """A BERT, the mean over tokens, and a head."""

    def __init__(self) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=1000,
            hidden_size=384,
            num_hidden_layers=_LAYERS,
            num_attention_heads=12,
            intermediate_size=1536,
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(384, _CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.bert(ids).last_hidden_state.mean(1))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


class Vision(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = small_cnn()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


def texts(number: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(number) % _CLASSES
    ids = torch.randint(1000, (number, 64), generator=generator)
    ids[:, ::4] = labels[:, None]
    return DataLoader(TensorDataset(ids, labels), 64)


def report(repeats: int, quick: bool) -> None:
    silence()
    rows = []
    for name, module, loader, few in (
        ("CNN, D = 256", Vision(), image_loader(1_000 if quick else 10_000, 32, 256), image_loader(64, 32, 64)),
        ("BERT, D = 384", Encoder(), texts(64 if quick else 512), texts(32)),
    ):
        for curve in (False, True):
            rows.append(_probe_row(name, module.eval(), loader, few, curve, repeats))
    print_table(
        "A probe and its forward passes",
        ("network", "curve", "loop beside, s", "probe in, s", "probe over loop, median (aim)", "least … largest"),
        rows,
    )
    encoder, loader = Encoder(), texts(64 if quick else 512)
    print_table(
        "Eight layers and one, Trainer.validate, D = 384",
        ("logger", "one, s", "eight, s", "eight over one, median (aim)", "least … largest"),
        [_layers_row(encoder, loader, plots, repeats) for plots in (False, True)],
    )


def _probe_row(
    name: str, module: LightningModule, loader: DataLoader[Any], few: DataLoader[Any], curve: bool, repeats: int
) -> tuple[str, ...]:
    callback = LogMECallback(probes={"probe": loader}, curve=curve, validation=False)

    def probe() -> None:
        _trainer(callback).validate(module, few, verbose=False)

    def validate_alone() -> None:
        _trainer().validate(module, few, verbose=False)

    @torch.no_grad()
    def loop() -> None:
        for batch in loader:
            module(batch[0])

    loops, probes = _in_turn([lambda: (loop(), validate_alone()), probe], repeats)
    return (name, "on" if curve else "off", *_ratio(loops, probes, 5))


def _layers_row(module: LightningModule, loader: DataLoader[Any], plots: bool, repeats: int) -> tuple[str, ...]:
    with TemporaryDirectory() as folder:

        def validate(layers: list[str]) -> None:
            logger = TensorBoardLogger(folder) if plots else False
            _trainer(LogMECallback(layers=layers), logger=logger).validate(module, loader, verbose=False)

        one, eight = _in_turn(
            [lambda: validate(["bert.encoder.layer.7"]), lambda: validate(["bert.encoder.layer.*"])], repeats
        )
    return ("TensorBoard" if plots else "none", *_ratio(one, eight, 10))


def _in_turn(calls: list[Callable[[], Any]], repeats: int) -> tuple[list[float], ...]:
    seconds: tuple[list[float], ...] = tuple([] for _ in calls)
    for call in calls:
        call()
    for index in range(repeats):
        for which in range(len(calls)):
            which = (which + index) % len(calls)
            seconds[which].append(timed(calls[which])[0])
    return seconds


def _ratio(base: list[float], other: list[float], aim: float) -> tuple[str, ...]:
    """Return the medians, the median of the ratios of all rounds, and the range of the ratios."""
    ratios = sorted(100 * (b / a - 1) for a, b in zip(base, other, strict=True))
    return (
        f"{median(base):.2f}",
        f"{median(other):.2f}",
        f"{median(ratios):+.1f} % ({aim:g} %)",
        f"{ratios[0]:+.1f} … {ratios[-1]:+.1f}",
    )


def _trainer(*callbacks: LogMECallback, logger: Any = False) -> Trainer:
    return Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
