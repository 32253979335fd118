"""Pretrain a network without labels, and see when it stops getting better at a labelled task on other images.

A small convolutional network learns from 4500 MNIST images without their labels, by Barlow Twins (Zbontar et al. 2021):
two distorted views of an image must get the same features, and no two features may be correlated. The network has no
classifier. At every validation `LogMECallback` scores its features on two labelled probes: 900 digits of scikit-learn,
which are the task of interest, and 500 other MNIST images. The linear head that is fitted to the 900 digits is
also tested on 897 other digits. `ModelCheckpoint` keeps the weights with the highest score on the digits.

To check the score, the script also fits two models of scikit-learn on the features of the 900 digits, a logistic
regression and a ridge regression, and tests them on the 897 other digits. It takes a minute on one core:

    pip install -e '.[examples]'
    python examples/self_supervised.py
    tensorboard --logdir runs/self_supervised    # while it runs, or afterwards
"""

from __future__ import annotations

from argparse import Namespace

import torch
from _data import mnist, small_digits
from _script import add_output_options, make_figure, make_parser, require, run_quietly_on_one_thread, save_picture
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_logme import LogMECallback, Probe

VALIDATE_EVERY = 3  # epochs

Rows = list[dict[str, float]]


class BarlowTwins(LightningModule):
    """An encoder and a projector, trained without labels. Nothing in it knows about LogME."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            stage(1, 8), stage(8, 16), stage(16, 32), stage(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.projector = nn.Sequential(nn.Linear(32, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 256))

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.encoder(images))

    def loss(self, images: Tensor) -> Tensor:
        """Return the distance between the identity and the correlation matrix of two views' features."""
        first, second = (F.batch_norm(self(distort(images)), None, None, training=True) for _ in range(2))
        correlation = first.T @ second / len(images)
        squares = (correlation - torch.eye(len(correlation), device=self.device)).square()
        diagonal = squares.diagonal().sum()
        return diagonal + 0.01 * (squares.sum() - diagonal)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch[0])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch[0]), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def stage(inputs: int, outputs: int) -> nn.Module:
    """Return a convolution that halves height and width."""
    convolution = nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def distort(images: Tensor) -> Tensor:
    """Return each image turned, stretched, slanted and moved at random."""
    matrices = torch.eye(2, 3) + 0.15 * torch.randn(len(images), 2, 3)
    grid = F.affine_grid(matrices.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


class Check(Callback):
    """Keep what each validation logged, and test the encoder on held-out digits with models of scikit-learn."""

    def __init__(self, probed: TensorDataset, held_out: TensorDataset) -> None:
        self.probed, self.held_out = probed, held_out
        self.rows: Rows = []

    def on_validation_end(self, trainer: Trainer, pl_module: BarlowTwins) -> None:
        if not trainer.sanity_checking:
            row = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.rows.append({**row, **self.test(pl_module.encoder)})

    def test(self, encoder: nn.Module) -> dict[str, float]:
        from sklearn.linear_model import LogisticRegression, RidgeCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        (train_images, train_labels), (images, labels) = self.probed.tensors, self.held_out.tensors
        with torch.inference_mode():
            train_features, features = encoder(train_images).numpy(), encoder(images).numpy()
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        classifier.fit(train_features, train_labels)
        ridge = make_pipeline(StandardScaler(), RidgeCV(alphas=[0.1, 1, 10, 100]))
        ridge.fit(train_features, F.one_hot(train_labels))
        error = torch.from_numpy(ridge.predict(features)) - F.one_hot(labels)
        return {
            "logistic_accuracy": float(classifier.score(features, labels)),
            "squared_error": float(error.square().sum(1).mean()),
        }


def load_data() -> dict[str, TensorDataset]:
    """Return MNIST without labels, to train on; MNIST with labels, to validate on; and digits, to probe and to test."""
    images, labels = mnist()
    digits, digit_labels = small_digits(size=20)
    digits = F.pad(digits, (4, 4, 4, 4))  # MNIST's digits have the same size and margin
    images, digits = images / 255, digits / 255
    return {
        "train": TensorDataset(images[:4500]),
        "val": TensorDataset(images[4500:], labels[4500:]),
        "digits": TensorDataset(digits[:900], digit_labels[:900]),
        "held out": TensorDataset(digits[900:], digit_labels[900:]),
    }


def print_table(rows: Rows) -> None:
    columns = ["val_loss", "logme_gain/mnist", "logme_accuracy/mnist", "logme_gain/digits", "logme_accuracy/digits"]
    columns += ["logistic_accuracy", "squared_error"]
    print("\nepochs" + "".join(f"{column:>{len(column) + 2}}" for column in columns))
    for index, row in enumerate(rows):
        print(f"{index * VALIDATE_EVERY:>6}" + "".join(f"{row[column]:>{len(column) + 2}.3f}" for column in columns))


def draw(rows: Rows, options: Namespace) -> None:
    """Draw loss, gains and held-out error against the epochs of pretraining."""
    figure = make_figure(height=3.6)
    loss, gain, error = figure.subplots(1, 3)
    epochs = [index * VALIDATE_EVERY for index in range(len(rows))]
    best = max(range(1, len(rows)), key=lambda index: rows[index]["logme/digits"])  # 0 is before training
    grey, orange, blue = "0.45", "#dd8452", "#4c72b0"
    for axes, name, colour, label in (
        (loss, "val_loss", grey, None),
        (gain, "logme_gain/mnist", orange, "MNIST"),
        (gain, "logme_gain/digits", blue, "digits"),
        (error, "squared_error", blue, None),
    ):
        values = [row[name] for row in rows]
        axes.plot(epochs, values, marker="o", markersize=4, color=colour, label=label)
        if colour == blue:
            ring = {"marker": "o", "markersize": 12, "fillstyle": "none", "linestyle": "", "color": blue}
            axes.plot(epochs[best], values[best], label="checkpoint kept", **ring)
    loss.set_title("Pretraining loss\n(MNIST, no labels)")
    gain.set_title("LogME gain of probes,\nnats per sample")
    error.set_title("Held-out error on digits,\nridge regression")
    for axes in (loss, gain, error):
        axes.set_xlabel("epochs of pretraining")
        axes.locator_params(nbins=5)
    loss.set_ylim(bottom=0)
    gain.legend(loc="lower right")
    error.legend(loc="upper right")
    save_picture(figure, "self_supervised", options)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    add_output_options(parser, "self_supervised")
    options = parser.parse_args()
    require("mlxtend", "sklearn", "matplotlib", "tensorboard")
    run_quietly_on_one_thread()
    seed_everything(options.seed, verbose=False)

    data = load_data()
    val_loader = DataLoader(data["val"], batch_size=250)
    logme = LogMECallback(
        layers=["encoder"],  # there is no classifier whose input could be scored
        probes={
            "digits": Probe(
                DataLoader(data["digits"], batch_size=300), test=DataLoader(data["held out"], batch_size=300)
            ),
            "mnist": val_loader,
        },
        validation=False,  # only the probes are scored
    )
    best = ModelCheckpoint(monitor="logme/digits", mode="max")
    check = Check(data["digits"], data["held out"])
    trainer = Trainer(
        max_epochs=options.epochs,
        check_val_every_n_epoch=VALIDATE_EVERY,
        callbacks=[logme, best, check],
        logger=TensorBoardLogger(options.logdir, name=None),
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    model = BarlowTwins()
    trainer.validate(model, val_loader, verbose=False)  # before training
    trainer.fit(model, DataLoader(data["train"], batch_size=128, shuffle=True, drop_last=True), val_loader)

    print_table(check.rows)
    print(f"\nCheckpoint with the highest score: {best.best_model_path}")
    draw(check.rows, options)


if __name__ == "__main__":
    main()
