"""Time and memory of ``rank_backbones`` apart from its forward passes.

Time is measured on real candidates of ``examples/_zoo.py`` and their tasks, with one thread, if the packages are
installed. Making modules, loading and preprocessing batches, and forward passes are unavoidable. The rest is overhead:
moments, evidence, jackknife, bookkeeping. At 64 × 64, an ImageNet network takes a twelfth of its usual computation, so
224 × 224 is measured too.

Memory is the peak above the resident memory before the call, for features that take no computation, in new processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_logme import Ranking, rank_backbones
from lightning_logme.features.sampling import Samples
from lightning_logme.ranking.candidate import Backbone, Candidate
from tests.benchmarks.common import class_features, peak, print_table, reset_peak

AIM = 0.10  # share of the wall time
_CLASSES = 10
_SIZES = ((2_000, 768), (20_000, 768), (100_000, 768))  # N, D
_QUICK = ((500, 64), (2_000, 64))


def report(repeats: int, quick: bool) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        print_table(
            f"rank_backbones: evidence, jackknife and bookkeeping (aim: at most {AIM:.0%} of the wall time)",
            ("task", "race", "wall, s", "modules, s", "batches, s", "forward, s", "the rest, s", "share"),
            _time_rows(min(repeats, 3), quick),
        )
    finally:
        torch.set_num_threads(threads)
    print_table(
        "rank_backbones: peak extra MiB of two candidates, race=False",
        ("N × D", "peak, MiB", "in matrices of D × D float64"),
        (_memory_row(n, d, min(repeats, 3)) for n, d in (_QUICK if quick else _SIZES)),
    )


def _time_rows(repeats: int, quick: bool) -> Iterator[tuple[str, ...]]:
    from tests.benchmarks.frozen import target

    cases = (("mnist", 64, True), ("mnist", 64, False), ("mnist", 224, True), ("newsgroups", None, True))
    for name, side, race in cases:
        samples = 150 if quick else 400 if side == 224 else 2000
        runs = [_timed_ranking(target(name, samples), side, race) for _ in range(repeats)]
        middle = {part: median(run[part] for run in runs) for part in runs[0]}
        share = median(run["rest"] / run["wall"] for run in runs)
        what = f"{name}, {samples} samples" + (f" of {side} × {side}" if side else "")
        yield what, "yes" if race else "no", *(f"{seconds:.1f}" for seconds in middle.values()), f"{share:.1%}"


def _timed_ranking(task: Any, side: int | None, race: bool) -> dict[str, float]:
    """Return the wall time in seconds, and its parts."""
    clock = dict.fromkeys(("modules", "batches", "forward"), 0.0)

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                clock[part] += time.perf_counter() - start

        return wrapped

    def timed_portions(samples: Samples, *args: Any) -> Iterator[Any]:
        portions = original(samples, *args)
        while (portion := timed("batches", next)(portions, None)) is not None:
            yield portion

    @contextmanager
    def timed_module(candidate: Candidate, *args: Any) -> Iterator[Backbone]:
        with ExitStack() as made:
            yield timed("modules", made.enter_context)(on_device(candidate, *args))

    original, on_device = Samples.portions, Candidate.on_device
    with ExitStack() as stack:
        for patch in (
            mock.patch.object(Samples, "portions", timed_portions),
            mock.patch.object(Backbone, "rows", timed("forward", Backbone.rows)),
            mock.patch.object(Candidate, "on_device", timed_module),
            *([mock.patch("_zoo.SIDE", side)] if side else []),
        ):
            stack.enter_context(patch)
        start = time.perf_counter()
        rank_zoo(task, race)
        wall = time.perf_counter() - start
    return {"wall": wall, **clock, "rest": wall - sum(clock.values())}


def rank_zoo(task: Any, race: bool) -> Ranking:
    """Rank all candidates of a task of the zoo."""
    backbones = task.backbones
    return rank_backbones(
        {name: backbone.load for name, backbone in backbones.items()},
        task.loader,
        task=task.task,
        num_classes=task.num_classes,
        transforms={name: backbone.transform for name, backbone in backbones.items()},
        head={name: backbone.head for name, backbone in backbones.items()},
        pooling={name: backbone.pooling for name, backbone in backbones.items()},
        race=race,
        accelerator="cpu",
        progress=False,
    )


class _Rows(Dataset[tuple[Tensor, Tensor]]):
    """Features and labels that are made on access, so that the data set takes no memory."""

    def __init__(self, n: int, d: int) -> None:
        self.n, self.d = n, d

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        features, _ = class_features(1, self.d, _CLASSES, seed=index)
        return features[0], torch.tensor(index % _CLASSES)


def _memory_row(n: int, d: int, repeats: int) -> tuple[str, ...]:
    command = [sys.executable, "-m", __name__, str(n), str(d)]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(repeats)]
    most = median(json.loads(run) for run in runs)
    return f"{n} × {d}", f"{most:.0f}", f"{most * 2**20 / (8 * d * d):.1f}"


def _peak_of_ranking(n: int, d: int) -> float:
    def rank(n: int, d: int) -> None:
        candidates = {"a": nn.Identity(), "b": nn.Identity()}
        loader = DataLoader(_Rows(n, d), batch_size=256)
        rank_backbones(candidates, loader, num_classes=_CLASSES, race=False, accelerator="cpu", progress=False)

    rank(300, 16)
    before = reset_peak()
    rank(n, d)
    return peak() - before


if __name__ == "__main__":
    print(json.dumps(_peak_of_ranking(int(sys.argv[1]), int(sys.argv[2]))))
