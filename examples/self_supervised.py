"""Pretrain a network without labels, and watch a labelled task on other images get easier.

A small convolutional network learns from 4500 MNIST images without their labels, with the loss of Barlow Twins (Zbontar
et al. 2021): two distorted views of an image must get the same features, and features must not repeat one another. The
network has no classifier. `LogMECallback` scores its features at every validation on another data set: scikit-learn's
digits, 8 × 8 pixels, enlarged to the size of MNIST's. `ModelCheckpoint` keeps the checkpoint with the highest score.

The script also checks the score: it fits a logistic regression on the probe's features at every validation, and tests
it on digits that the probe did not see.

    pip install -e '.[examples]'
    python examples/self_supervised.py
    tensorboard --logdir runs/self_supervised
"""

from __future__ import annotations

import torch
from _data import mnist, small_digits
from _script import add_output_options, make_parser, require, run_quietly_on_one_thread, save_picture
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_logme import LogMECallback

SIZE = 28  # pixels


def stage(inputs: int, outputs: int) -> nn.Module:
    """Return a convolution that halves the size of its input."""
    convolution = nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def distort(images: Tensor) -> Tensor:
    """Return each image turned, stretched, slanted and moved at random."""
    identity = torch.eye(2, 3, device=images.device)
    matrices = identity + 0.2 * torch.randn(len(images), 2, 3, device=images.device)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


class BarlowTwins(LightningModule):
    """An encoder and a projector, trained without labels. Nothing in it knows about LogME."""

    def __init__(self, width: int = 32, projection: int = 256, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            stage(1, width), stage(width, 2 * width), stage(2 * width, 4 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.projector = nn.Sequential(
            nn.Linear(4 * width, projection), nn.BatchNorm1d(projection), nn.ReLU(), nn.Linear(projection, projection)
        )
        self.learning_rate = learning_rate

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.encoder(images))

    def loss(self, images: Tensor) -> Tensor:
        """Return how far the correlation of two views' features is from the identity."""
        first, second = (F.batch_norm(self(distort(images)), None, None, training=True) for _ in range(2))
        correlation = first.T @ second / len(images)
        error = (correlation - torch.eye(len(correlation), device=self.device)).square()
        same, repeated = error.diagonal().sum(), error.sum() - error.diagonal().sum()
        return same + 0.01 * repeated

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch[0])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch[0]), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class Check(Callback):
    """Keep what each validation logged, and measure the encoder without LogME."""

    def __init__(self, probed: TensorDataset, held_out: TensorDataset) -> None:
        self.probed, self.held_out = probed, held_out
        self.rows: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: BarlowTwins) -> None:
        if trainer.sanity_checking:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.rows.append({**values, "accuracy": self.accuracy(pl_module.encoder)})

    def accuracy(self, encoder: nn.Module) -> float:
        """Return the accuracy of a logistic regression on digits that neither it nor the probe saw."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        with torch.inference_mode():
            train, test = (encoder(data.tensors[0]).numpy() for data in (self.probed, self.held_out))
        regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        regression.fit(train, self.probed.tensors[1])
        return float(regression.score(test, self.held_out.tensors[1]))


def print_table(rows: list[dict[str, float]]) -> None:
    print(f"\n{'epoch':>5}{'loss on MNIST':>15}{'gain on digits':>16}{'accuracy on other digits':>26}")
    for epoch, row in enumerate(rows):
        print(f"{epoch:>5}{row['val_loss']:>15.1f}{row['logme_gain/digits']:>16.3f}{row['accuracy']:>26.3f}")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    add_output_options(parser, "self_supervised")
    options = parser.parse_args()
    require("mlxtend", "sklearn", "matplotlib", "tensorboard")
    run_quietly_on_one_thread()
    seed_everything(options.seed, verbose=False)

    images = mnist()[0] / 255  # the labels stay unused
    train = DataLoader(TensorDataset(images[:4500]), batch_size=128, shuffle=True, drop_last=True)
    val = DataLoader(TensorDataset(images[4500:]), batch_size=250)
    images, labels = small_digits()
    probed, held_out = TensorDataset(images[:900] / 255, labels[:900]), TensorDataset(images[900:] / 255, labels[900:])

    logme = LogMECallback(
        layers=["projector", "encoder"],  # the last one stands for the head, which this network does not have
        probes={"digits": DataLoader(probed, batch_size=250)},
        validation=False,  # the validation set has no labels
    )
    best = ModelCheckpoint(monitor="logme/digits", mode="max")
    check = Check(probed, held_out)
    trainer = Trainer(
        max_epochs=options.epochs,
        callbacks=[logme, best, check],
        logger=TensorBoardLogger(options.logdir, name=None),
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    model = BarlowTwins()
    trainer.validate(model, val, verbose=False)  # before training
    trainer.fit(model, train, val)

    print_table(check.rows)
    print(f"Best checkpoint for the digits: {best.best_model_path}")


if __name__ == "__main__":
    main()
