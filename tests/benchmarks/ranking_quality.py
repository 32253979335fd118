"""How well LogME and other scores rank real backbones for real tasks.

The truth for every task of ``examples/_zoo.py`` is the cross-validated result of a linear model on the frozen features.
For two tasks it is also the result of fine-tuning; there the scores see only the training samples. Agreement with the
truth is measured by the weighted Kendall τ (errors at the top weigh more), by Pearson's correlation, and by the regret
at 1: the best true value minus the true value of the backbone that the score puts first.

Features and the results of linear models and of fine-tuning are cached in a folder (``LOGME_CACHE``). Empty it after a
change of the sizes or recipes below. A full run takes about an hour on one thread, and five minutes with the cache.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch

from tests.benchmarks.common import peak, print_table, reset_peak
from tests.benchmarks.finetuning import Recipe, Tuned, finetune_all, in_process
from tests.benchmarks.frozen import CACHE, Frozen, frozen, target
from tests.benchmarks.ranking import rank_zoo
from tests.benchmarks.scores import SCORES, VARIANTS, Score, gain, logme, probe, task_of

TASKS: dict[str, int | None] = {  # number of samples; None for all
    "mnist": 5000,
    "newsgroups": 4000,
    "r8": 4000,
    "tweets": None,
    "domains": 4000,
    "digits": None,
}
# Learning rates were chosen by the accuracy of one candidate: lite0 (five recipes) and MiniLM-L6 mean (two recipes).
RECIPES = {"mnist": Recipe(640, 1500, learning_rate=3e-3), "tweets": Recipe(512, 800, learning_rate=5e-4)}
_QUICK_TASKS: dict[str, int | None] = {"mnist": 200, "tweets": 200}
_QUICK_RECIPES = {"mnist": Recipe(64, 50, learning_rate=3e-3, epochs=1, seeds=2)}


@dataclass(frozen=True)
class Case:
    """A task with its truth and its scores, by backbone."""

    name: str
    truth: dict[str, float]
    scores: dict[str, dict[str, float]]


def report(repeats: int, quick: bool) -> None:
    """Print the tables. ``repeats`` is ignored: only fine-tuning is random, and its recipe has a number of seeds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Several threads on busy cores are slower than one.
    try:
        _report(CACHE / "quick" if quick else CACHE, quick)
    finally:
        torch.set_num_threads(threads)


def _report(folder: Path, quick: bool) -> None:
    cases = []
    for name, samples in (_QUICK_TASKS if quick else TASKS).items():
        data = frozen(name, samples, folder)
        truth = _probes(data, folder / name / "probes.json")
        cases.append(Case(name, truth, {score: _by_backbone(call, data) for score, call in _ALL.items()}))
        count = len(next(iter(data.values())).target)
        _print_case(cases[-1], f"{name}: {count} samples; linear probe ({_kind(data)}) and scores of the features")
        _print_gain(data)
    for name, recipe in (_QUICK_RECIPES if quick else RECIPES).items():
        data = {key: _first(value, recipe.train) for key, value in frozen(name, TASKS[name], folder).items()}
        tuned = finetune_all(name, recipe, folder)
        truth = {key: fmean(value.scores) for key, value in tuned.items()}
        scores = {score: _by_backbone(call, data) for score, call in _ALL.items()}
        scores["linear probe"] = _by_backbone(probe, data)
        cases.append(Case(f"{name}, fine-tuned", truth, scores))
        _print_tuned(name, recipe, tuned, cases[-1])
    for title, measure in MEASURES.items():
        _print_agreement(title, measure, cases)
    _print_costs(RECIPES if not quick else _QUICK_RECIPES, folder)


def _first(data: Frozen, count: int) -> Frozen:
    layers = [layer[:count] for layer in data.layers]
    return replace(data, features=data.features[:count], target=data.target[:count], layers=layers)


def _by_backbone(score: Score, data: dict[str, Frozen]) -> dict[str, float]:
    return {name: score(features) for name, features in data.items()}


def _probes(data: dict[str, Frozen], path: Path) -> dict[str, float]:
    if not path.exists():
        path.write_text(json.dumps(_by_backbone(probe, data)))
    found: dict[str, float] = json.loads(path.read_text())
    return found


def weighted_tau(truth: list[float], scores: list[float]) -> float:
    from scipy.stats import weightedtau

    return float(weightedtau(truth, scores).statistic)


def pearson(truth: list[float], scores: list[float]) -> float:
    return float(np.corrcoef(truth, scores)[0, 1])


def regret(truth: list[float], scores: list[float]) -> float:
    return max(truth) - truth[int(np.argmax(scores))]


MEASURES = {
    "Weighted Kendall τ with the truth": weighted_tau,
    "Pearson's correlation with the truth": pearson,
    "Regret at 1: accuracy (R² of tweets) lost by taking what the score puts first": regret,
}
_ALL = SCORES | VARIANTS


def _print_case(case: Case, title: str) -> None:
    print_table(
        title,
        ("backbone", "probe", *SCORES),
        (
            (name, f"{case.truth[name]:.3f}", *(_number(case.scores[score][name]) for score in SCORES))
            for name in _best_first(case.truth)
        ),
    )


def _print_gain(data: dict[str, Frozen]) -> None:
    nulls = [logme(features) - gain(features) for features in data.values()]
    spread = max(nulls) - min(nulls)
    print(f"The gain has no column: it is LogME less {nulls[0]:.3f} for all (to {spread:.0e}), and ranks the same.\n")


def _print_tuned(name: str, recipe: Recipe, tuned: dict[str, Tuned], case: Case) -> None:
    shown = ("linear probe", *SCORES)
    print_table(
        f"{name}, fine-tuned on {recipe.train} and tested on {recipe.test} samples, {recipe.epochs} epochs, "
        f"{recipe.seeds} seeds (mean ± standard deviation); scores of the {recipe.train}",
        ("backbone", "fine-tuned", "fastest run, s", *shown),
        (
            (
                key,
                f"{case.truth[key]:.3f} ± {stdev(tuned[key].scores):.3f}",
                f"{min(tuned[key].seconds):.1f}",
                *(_number(case.scores[score][key]) for score in shown),
            )
            for key in _best_first(case.truth)
        ),
    )


def _print_agreement(title: str, measure: Callable[[list[float], list[float]], float], cases: list[Case]) -> None:
    names = dict.fromkeys(score for case in cases for score in case.scores)
    rows = []
    for name in names:
        values = {
            case.name: measure(list(case.truth.values()), list(case.scores[name].values()))
            for case in cases
            if name in case.scores
        }
        mean = f"{fmean(values.values()):.3f}" if len(values) == len(cases) else ""
        rows.append((name, *(f"{values[case.name]:.3f}" if case.name in values else "" for case in cases), mean))
    print_table(title, ("score", *(case.name for case in cases), "mean"), rows)


def _print_costs(recipes: dict[str, Recipe], folder: Path) -> None:
    rows = []
    for name, recipe in recipes.items():
        tuned = finetune_all(name, recipe, folder).values()
        seconds, most = sum(min(run.seconds) for run in tuned), max(run.memory for run in tuned)
        for race in (True, False):
            ranking, peak = in_process(rank, name, recipe.train, race)
            rows.append(
                (
                    f"{name}, {recipe.train} samples",
                    "race" if race else "all to the end",
                    f"{ranking:.1f}",
                    f"{seconds:.0f}",
                    f"{seconds / ranking:.0f}",
                    f"{peak:.0f}",
                    f"{most:.0f}",
                    f"{100 * peak / most:.0f} %",
                )
            )
    print_table(
        "All candidates ranked against all fine-tuned once (fastest seed); memory is the peak above imports and data",
        ("task", "ranking", "ranking, s", "fine-tuning, s", "ratio", "ranking, MiB", "fine-tuning, MiB", "ratio"),
        rows,
    )


def rank(name: str, samples: int, race: bool) -> tuple[float, float]:
    """Return the seconds and the MiB that a ranking of all candidates of a task takes."""
    torch.set_num_threads(1)
    task = target(name, samples)
    for backbone in task.backbones.values():
        backbone.load()
    before = reset_peak()
    start = time.perf_counter()
    rank_zoo(task, race)
    return time.perf_counter() - start, peak() - before


def _best_first(values: dict[str, float]) -> list[str]:
    return sorted(values, key=lambda name: values[name], reverse=True)


def _number(value: float) -> str:
    return f"{value / 1e6:.1f} M" if value > 1e4 else f"{value:.3f}"


def _kind(data: dict[str, Frozen]) -> str:
    return "R²" if task_of(next(iter(data.values()))) == "regression" else "accuracy"
