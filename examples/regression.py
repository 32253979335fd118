"""Score a regression on a table of numbers, and let the score stop the training.

A multilayer perceptron learns scikit-learn's diabetes data: 442 patients, 10 measurements, and the progression of the
disease a year later. `EarlyStopping` watches LogME of the last hidden layer instead of the loss. It takes seconds on
one core:

    pip install -e '.[examples]'
    python examples/regression.py
"""

from __future__ import annotations

import torch
from _script import make_parser, require, run_quietly_on_one_thread
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.regression import R2Score

from lightning_logme import LogMECallback


class Regressor(LightningModule):
    """A multilayer perceptron with one output."""

    def __init__(self, num_inputs: int, width: int = 64) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(num_inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )
        self.r2 = R2Score()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, target = batch
        return F.mse_loss(self.network(inputs), target)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        inputs, target = batch
        self.r2(self.network(inputs), target)
        self.log("val_r2", self.r2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def diabetes() -> tuple[TensorDataset, TensorDataset]:
    """Return standardised inputs (N, 10) and targets (N, 1): 300 patients to train and 142 to validate."""
    from sklearn.datasets import load_diabetes

    inputs, target = (torch.from_numpy(array).float() for array in load_diabetes(return_X_y=True, scaled=False))
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    inputs, target = inputs[order], target[order, None]
    inputs = (inputs - inputs[:300].mean(0)) / inputs[:300].std(0)
    target = (target - target[:300].mean(0)) / target[:300].std(0)
    return TensorDataset(inputs[:300], target[:300]), TensorDataset(inputs[300:], target[300:])


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=100, help="largest number of epochs")
    options = parser.parse_args()
    require("sklearn")
    run_quietly_on_one_thread()
    seed_everything(0, verbose=False)

    train, val = diabetes()
    logme, r2 = LogMECallback(task="regression"), []
    trainer = Trainer(
        max_epochs=options.epochs,
        callbacks=[
            logme,
            EarlyStopping(monitor="logme", mode="max", patience=5),
            LambdaCallback(on_validation_end=lambda trainer, _: r2.append(float(trainer.callback_metrics["val_r2"]))),
        ],
        num_sanity_val_steps=0,  # a whole validation comes before training
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    model = Regressor(num_inputs=10)
    loaders = DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=142)
    trainer.validate(model, loaders[1], verbose=False)
    trainer.fit(model, *loaders)

    print(f"\n{'epochs':>6}{'logme':>9}{'gain':>8}{'R²':>8}")
    for epoch, (row, score) in enumerate(zip(logme.history, r2, strict=True)):
        print(f"{epoch:>6}{row['logme']:>9.4f}{row['gain']:>8.4f}{score:>8.3f}")
    best = max(range(len(r2)), key=lambda epoch: logme.history[epoch]["logme"])
    print(f"\nLogME was highest after {best} epochs.")


if __name__ == "__main__":
    main()
