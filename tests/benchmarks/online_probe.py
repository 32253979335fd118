"""Leave-one-out accuracy against the online probes of libraries for self-supervised learning, on frozen features.

Every method estimates how accurate a linear classifier on the frozen features of 1500 samples is. The truth is
``scores.probe``: a logistic regression on standardised features, cross-validated in five folds with the best of four
penalties. The tasks are MNIST, 20 Newsgroups, and tweets (is the sentiment above 0?), with all their backbones in
``examples/_zoo.py``.

- Leave-one-out uses all samples, and has no settings.
- "Evidence, held out" is the same linear head, fitted and tested like the probes. Its distance from leave-one-out is
  the error of the estimate. Its distance from the truth is the difference between two linear models.
- The other methods train on four of the five folds and are tested on the fifth, as these libraries test on a validation
  set. Each fold is left out with each of five seeds, which set the initial weights and the order of the samples.

The settings are those that the libraries publish. All five probes have batches of 256, drop the last incomplete batch,
and train a plain linear layer by cross-entropy without weight decay:

- lightly, linear evaluation: lightly-ai/lightly, lightly/utils/benchmarking/linear_classifier.py and
  benchmarks/imagenet/resnet50/linear_eval.py.
- lightly, online: ``OnlineLinearClassifier`` in benchmarks/imagenet/resnet50/simclr.py. Its optimizer is LARS, which
  lightly/utils/lars.py reduces to SGD for parameters without weight decay. The rate is 0.075 √256.
- stable-pretraining, default: galilai-group/stable-pretraining, stable_pretraining/callbacks/probe.py, with the
  epochs and batches of its README. solo-learn's online classifier has the same rule plus momentum, for 1000 epochs
  (vturrisi/solo-learn, scripts/pretrain/cifar/simclr.yaml).
- stable-pretraining, AdamW: benchmarks/imagenet10/simclr-vit-small.py, 200 epochs (RESULTS.md there).
- solo-learn, linear evaluation: vturrisi/solo-learn, scripts/linear/imagenet-100/simclr.yaml.
- 20 nearest neighbours: lightly-ai/lightly, lightly/utils/benchmarking/knn.py, with k and temperature of
  docs/source/getting_started/benchmarks/imagenet100_benchmark.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from lightning_logme.functional import evidence, leave_one_out
from tests.benchmarks.common import RESET, class_features, peak, print_table, reset_peak, timed
from tests.benchmarks.finetuning import in_process
from tests.benchmarks.frozen import CACHE, Array, Frozen, frozen
from tests.benchmarks.scores import probe, task_of

_TASKS = ("mnist", "newsgroups", "tweets")
_SAMPLES = 1500
_FOLDS = 5  # as in scores.probe
_SEEDS = 5
_BATCH_SIZE = 256
_EARLY = 10  # epochs
_NEIGHBOURS, _TEMPERATURE = 20, 0.1

Rows = tuple[Tensor, Tensor]  # features (n, D) and labels (n,)


def constant(progress: float) -> float:
    return 1.0


def cosine(progress: float, warm_up: float = 0.0) -> float:
    if progress < warm_up:
        return progress / warm_up
    return (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up))) / 2


def two_drops(progress: float) -> float:
    return 0.1 ** ((progress >= 0.6) + (progress >= 0.8))


@dataclass(frozen=True)
class OnlineProbe:
    """A linear layer trained by gradient descent.

    Attributes:
        optimizer: makes the optimizer of the parameters.
        epochs: number of epochs.
        schedule: factor of the learning rate by progress, which is from 0 to 1.
        trust: None, or η of LARS: a step moves the weights by at most η times their norm.
    """

    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    epochs: int
    schedule: Callable[[float], float] = constant
    trust: float | None = None

    def __call__(self, train: Rows, test: Rows, seed: int, epochs: int | None = None) -> float:
        """Return the accuracy on the test set, after some or all epochs."""
        torch.manual_seed(seed)
        features, labels = train
        head = nn.Linear(features.shape[1], int(labels.max()) + 1)
        optimizer = self.optimizer(head.parameters())
        rate = optimizer.param_groups[0]["lr"]
        size = min(_BATCH_SIZE, len(labels))
        steps = len(labels) // size
        for step in range(steps * (epochs or self.epochs)):
            if step % steps == 0:
                order = torch.randperm(len(labels)).split(size)
            batch = order[step % steps]
            optimizer.zero_grad()
            F.cross_entropy(head(features[batch]), labels[batch]).backward()
            now = rate * self.schedule(step / (steps * self.epochs))
            optimizer.param_groups[0]["lr"] = now
            if self.trust is not None and head.weight.grad is not None:
                ratio = self.trust * head.weight.norm() / (head.weight.grad.norm() + 1e-8)
                head.weight.grad *= (ratio / now).clamp(max=1)
            optimizer.step()
        with torch.no_grad():
            return _accuracy(head(test[0]), test[1])


def neighbours(train: Rows, test: Rows, seed: int) -> float:
    similarity = F.normalize(test[0]) @ F.normalize(train[0]).T
    nearest, index = similarity.topk(_NEIGHBOURS)
    votes = (nearest / _TEMPERATURE).exp()[..., None] * F.one_hot(train[1])[index]
    return _accuracy(votes.sum(1), test[1])


def left_out(train: Rows, test: Rows, seed: int, **options: bool) -> float:
    """Return the leave-one-out accuracy of all rows. There are no test rows."""
    return _accuracy(leave_one_out(*train, **options), train[1])


def held_out(train: Rows, test: Rows, seed: int) -> float:
    """Return the accuracy of the evidence's head on the test rows."""
    head = evidence(*train).head()
    with torch.no_grad():
        return _accuracy(head(test[0]), test[1])


def _accuracy(outputs: Tensor, labels: Tensor) -> float:
    return float((outputs.argmax(1) == labels).double().mean())


Method = Callable[[Rows, Rows, int], float]

_LEFT_OUT, _HELD_OUT = "leave-one-out", "evidence, held out"
_WHOLE: dict[str, Method] = {
    _LEFT_OUT: left_out,
    f"{_LEFT_OUT}, `normalize=True`": partial(left_out, normalize=True),
}
_PROBES: dict[str, OnlineProbe] = {
    "lightly, linear evaluation": OnlineProbe(partial(SGD, lr=0.1, momentum=0.9), 90, cosine),
    "lightly, online": OnlineProbe(partial(SGD, lr=0.075 * 16, momentum=0.9), 100, partial(cosine, warm_up=0.1)),
    "stable-pretraining, default": OnlineProbe(partial(SGD, lr=0.1), 100, trust=0.02),
    "stable-pretraining, AdamW": OnlineProbe(partial(AdamW, lr=0.03, weight_decay=0.0), 200),
    "solo-learn, linear evaluation": OnlineProbe(partial(SGD, lr=1.0, momentum=0.9), 100, two_drops),
}
_METHODS: dict[str, Method] = {
    **_WHOLE,
    _HELD_OUT: held_out,
    **_PROBES,
    f"{_NEIGHBOURS} nearest neighbours": neighbours,
}


@dataclass(frozen=True)
class Result:
    """The accuracies of a method for a backbone.

    Attributes:
        runs: accuracies, (folds, seeds).
        seconds: the median time of one run.
        early: accuracies after the first epochs; empty for methods without epochs.
    """

    runs: Array
    seconds: float
    early: Array


@dataclass(frozen=True)
class Case:
    """A backbone on a task, with the true accuracy, the seconds that it took, and the results by method."""

    task: str
    backbone: str
    data: Frozen
    truth: float
    seconds: float
    results: dict[str, Result]
    scoring: tuple[float, float]  # seconds of the evidence, and those that leave-one-out adds


def report(repeats: int, quick: bool) -> None:
    """Print the tables. ``repeats`` is ignored: the number of seeds is fixed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # like the forward passes, whose seconds are in the cache
    try:
        cases = list(_cases(quick))
        _print_cases(cases)
        _print_summary(cases)
        _print_cost(cases, {} if quick else _memory())
        if not quick:
            _print_regression(frozen("tweets", _SAMPLES, CACHE / "online_probe"))
    finally:
        torch.set_num_threads(threads)


def _cases(quick: bool) -> Iterable[Case]:
    folder = (CACHE / "quick" if quick else CACHE) / "online_probe"
    for task in _TASKS[: 1 if quick else None]:
        every = frozen(task, 200 if quick else _SAMPLES, folder)
        for backbone, data in list(every.items())[: 2 if quick else None]:
            yield _case(task, backbone, data, 2 if quick else _SEEDS)


def _case(task: str, backbone: str, data: Frozen, seeds: int) -> Case:
    if task_of(data) == "regression":
        data = replace(data, target=(data.target > 0).astype(np.int64))
    rows = torch.from_numpy(data.features), torch.from_numpy(data.target)
    parts = torch.arange(len(data.target)).tensor_split(_FOLDS)
    folds = [(_take(rows, torch.cat([*parts[:i], *parts[i + 1 :]])), _take(rows, parts[i])) for i in range(_FOLDS)]
    seconds, truth = timed(lambda: probe(data))
    results = {
        name: _result(method, [(rows, rows)] if name in _WHOLE else folds, seeds) for name, method in _METHODS.items()
    }
    of_evidence, found = timed(lambda: evidence(*rows))
    beside, _ = timed(lambda: found.leave_one_out(*rows))
    return Case(task, backbone, data, truth, seconds, results, (of_evidence, beside))


def _take(rows: Rows, index: Tensor) -> Rows:
    return rows[0][index], rows[1][index]


def _result(method: Method, folds: list[tuple[Rows, Rows]], seeds: int) -> Result:
    runs, seconds, early = [], [], []
    for fold, seed in product(folds, range(seeds)):
        start = time.perf_counter()
        runs.append(method(*fold, seed))
        seconds.append(time.perf_counter() - start)
        if isinstance(method, OnlineProbe):
            early.append(method(*fold, seed, epochs=_EARLY))
    return Result(np.reshape(runs, (len(folds), seeds)), median(seconds), np.reshape(early, (-1, seeds)))


def _print_cases(cases: list[Case]) -> None:
    print_table(
        "Accuracy of the truth, and difference of each method from it (mean over folds and seeds)",
        ("task", "backbone", "D", "truth", *_METHODS),
        (
            (
                case.task,
                case.backbone,
                str(case.data.features.shape[1]),
                f"{case.truth:.3f}",
                *(f"{case.results[name].runs.mean() - case.truth:+.3f}" for name in _METHODS),
            )
            for case in cases
        ),
    )


def _print_summary(cases: list[Case]) -> None:
    header = (
        "method",
        "all pairs",
        "largest",
        "without random networks",
        f"these, after {_EARLY} epochs",
        "these, one fold",
        "s.d. over seeds",
        "largest range over seeds",
        "s.d. over folds",
    )
    trained = np.array(["random" not in case.backbone for case in cases])
    truth = np.array([case.truth for case in cases])[:, None]
    rows = []
    for name in _METHODS:
        runs = np.stack([case.results[name].runs for case in cases])  # (cases, folds, seeds)
        early = np.stack([case.results[name].early for case in cases])
        errors = np.abs(runs.mean(1) - truth).mean(1)
        figures = [
            errors.mean(),
            errors.max(),
            errors[trained].mean(),
            np.abs(early.mean(1) - truth)[trained].mean() if early.size else None,
            np.abs(runs - truth[..., None])[trained].mean() if runs.shape[1] > 1 else None,
            runs.std(2, ddof=1).mean(),
            np.ptp(runs, axis=2).max(),
            runs.std(1, ddof=1).mean() if runs.shape[1] > 1 else None,
        ]
        rows.append((name, *("" if figure is None else f"{figure:.3f}" for figure in figures)))
    print_table(f"Mean distance to the truth over {len(cases)} pairs of task and backbone", header, rows)
    own = [case.results[_LEFT_OUT].runs.mean() - case.results[_HELD_OUT].runs.mean() for case in cases]
    print(f"Leave-one-out less the held-out accuracy of the same head: mean {np.mean(own):+.3f}, ", end="")
    print(f"mean distance {np.mean(np.abs(own)):.3f}, largest {np.max(np.abs(own)):.3f}.\n")


def _print_cost(cases: list[Case], memory: dict[str, float]) -> None:
    tasks = list(dict.fromkeys(case.task for case in cases))
    seconds = {name: [case.results[name].seconds for case in cases] for name in _METHODS}
    seconds["evidence alone"] = [case.scoring[0] for case in cases]
    seconds["leave-one-out beside the evidence"] = [case.scoring[1] for case in cases]
    seconds["truth"] = [case.seconds for case in cases]
    forward = [case.data.seconds for case in cases]
    rows = [("forward passes", *_sums(forward, cases, tasks), "", "")]
    for name, values in seconds.items():
        shares = [100 * value / total for value, total in zip(values, forward, strict=True)]
        span = f"{median(shares):.1f} % [{min(shares):.1f} … {max(shares):.1f}]"
        rows.append((name, *_sums(values, cases, tasks), span, f"{memory[name]:.1f}" if name in memory else ""))
    print_table(
        "Seconds of one result for all backbones of a task, on features in memory, one thread",
        ("method", *tasks, "share of the forward passes, median [range]", "peak extra MiB, 1500 × 1280, 10 classes"),
        rows,
    )


def _print_regression(data: dict[str, Frozen]) -> None:
    rows = []
    for backbone, one in data.items():
        predictions = leave_one_out(one.features, one.target, "regression")[:, 0].numpy()
        r2 = 1 - np.mean((predictions - one.target) ** 2) / np.var(one.target)
        rows.append((backbone, f"{probe(one):.3f}", f"{r2:.3f}"))
    print_table("tweets, sentiment from −4 to 4: R²", ("backbone", "ridge in five folds", "leave-one-out"), rows)


def _sums(values: list[float], cases: list[Case], tasks: list[str]) -> Iterable[str]:
    pairs = list(zip(cases, values, strict=True))
    return (f"{sum(value for case, value in pairs if case.task == task):.2f}" for task in tasks)


def _memory() -> dict[str, float]:
    return {name: in_process(_peak, name) for name in _METHODS} if RESET.exists() else {}


def _peak(name: str) -> float:
    """Return the peak memory of a method above that of its features, which are synthetic. Run in a new process."""
    torch.set_num_threads(1)
    method = _METHODS[name]
    small, rows = class_features(64, 16, 2), class_features(_SAMPLES, 1280, 10)
    test = _take(rows, torch.arange(_SAMPLES // _FOLDS))
    method(small, small, 0)
    before = reset_peak()
    method(rows, test, 0)
    return peak() - before
