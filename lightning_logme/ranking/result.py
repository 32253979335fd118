"""The result of a ranking: rows, tables and figures."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import torch

from lightning_logme.features.extractor import LAYER_MEAN
from lightning_logme.scores.curve import CurvePoint
from lightning_logme.scores.evidence import Evidence
from lightning_logme.utilities import plots
from lightning_logme.utilities.plots import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MESSAGE_LENGTH = 100  # characters of a message in the table; ``RankingRow.message`` has all of them
_LEFT_ALIGNED = (0, 1, 8, 12)  # columns of words

RankBy = Literal["logme", "accuracy"]
METRIC_NAMES = {"accuracy": "accuracy", "r2": "R²", "f1": "F1"}
Ended = Literal["finished", "dropped", "failed", "interrupted"]


@dataclass(frozen=True)
class RankingRow:
    """One row of a ranking: the result of a candidate, or of one of its layers.

    Attributes:
        name: name of the candidate; for a layer, followed by "/" and the layer.
        logme: log of maximum evidence in nats per sample; NaN without evidence. It grows with the number of samples:
            compare only rows with the same ``num_samples``.
        gain: ``logme`` minus the score of useless features; 0 if the features explain nothing.
        stderr: standard error of ``logme`` by the block jackknife. It is itself uncertain by about a quarter. The
            difference between two rows is far more certain, because both see the same samples in the same blocks.
        accuracy: leave-one-out accuracy of the linear head; R² in regression, F1 in "multilabel". See
            :class:`~lightning_logme.Accuracy`.
        accuracy_stderr: standard error of ``accuracy``. The difference between two rows is more certain, as above.
        tied_with_best: whether the row is not significantly behind the best row; true for the best row itself. A row
            that is as good as the best is marked as tied with a probability of at least 95 %.
        feature: the scored feature: "input of 'fc'", "output" of the module, or "output of 'layer4'".
        num_features: D.
        num_parameters: number of parameters of the module.
        num_samples: number of samples behind the score. A dropped candidate keeps the values of its last round.
        seconds: time to build the module, run it and compute the evidence, over all layers.
        peak_memory: peak accelerator memory in bytes; None on a CPU.
        ended: "finished"; "dropped", because it was significantly behind the leader; "failed";
            "interrupted".
        message: why it ended in this way, or what is unusual about it; may be empty.
    """

    name: str
    logme: float
    gain: float
    stderr: float
    accuracy: float
    accuracy_stderr: float
    tied_with_best: bool
    feature: str
    num_features: int | None
    num_parameters: int | None
    num_samples: int
    seconds: float
    peak_memory: int | None
    ended: Ended
    message: str = ""


@dataclass(frozen=True)
class Ranking:
    """A ranking of candidates by score, made by :func:`~lightning_logme.rank_backbones`.

    How to read the numbers, here and in :class:`~lightning_logme.LogMECallback`:

    - **Look at the gain first.** It is the score minus the score of useless features, in nats per sample. 0 means that
      the features explain nothing about the labels. The score ``logme`` is a log density: it may be negative or above
      1, and cannot be compared between tasks.
    - **Compare scores only on the same samples and labels.** Evidence grows with the number of samples, because it
      also measures how a Bayesian regression learns from them. Do not compare a score at 500 samples with one at 5000.
    - **When gain and accuracy differ.** Accuracy says how often the linear head is right, but it hardly differs between
      good candidates. The gain also reflects how confident the head is, so it can be sure of a difference that does not
      matter. Neither orders backbones better than the other. Use accuracy to judge the size of a difference, and the
      gain where accuracies are too close to distinguish.
    - **How large must a difference be?** In a ranking, rely on ``tied``. Between different sets of samples, ignore a
      difference below two or three standard deviations of the score. On real digits the gain had a standard deviation
      of .024 with 250 samples and .011 with 2000 (``python -m tests.benchmarks --only noise``). On the same samples, as
      from epoch to epoch, part of this noise cancels.
    - **Use held-out samples.** A network that has memorised its training set gets a high score on it.
    - **Layers.** The penultimate layer is scored by default. An inner layer, or the mean over layers, can be better.
      Mind the pooling when you compare: BERT's head sees its pooled first token, but a layer's tokens are averaged.
    - **Do not reduce the dimension.** There is no need: the score is also right for fewer samples than features. Scale,
      rotation and columns of zeros do not change it.
    - **When not to trust it.** The score is that of a linear model of the frozen features; fine-tuning can improve
      features by very different amounts. A perfect fit (``saturated`` outputs), or a score far above what seems
      possible, suggests leaked labels. NaN means that there is no evidence, and a warning says why.

    Attributes:
        rows: one row for each candidate, and for each of its layers, the best first. Then come dropped candidates,
            those with the most samples first, and then rows without a result.
        evidence: the :class:`~lightning_logme.Evidence` behind each score, by name of the row.
        curves: the scores after each round, by name of the row.
        metric: what ``accuracy`` means in this task: "accuracy", "r2" or "f1".
        rank_by: what orders the rows, "logme" or "accuracy".
    """

    rows: list[RankingRow]
    evidence: dict[str, Evidence]
    curves: dict[str, list[CurvePoint]]
    metric: str = "accuracy"
    rank_by: RankBy = "logme"
    # For each candidate, a function that puts a linear layer into it. It holds the candidate, so it is not pickled.
    _builders: Mapping[str, Callable[[torch.nn.Linear], torch.nn.Module]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_builders": {}}

    @property
    def best(self) -> str:
        """The name of the best row. Other rows may be tied with it."""
        return self.rows[0].name

    @property
    def tied(self) -> list[str]:
        """The names of the best row and of the rows tied with it. Fine-tune whichever suits you."""
        return [row.name for row in self.rows if row.tied_with_best]

    @property
    def scores(self) -> dict[str, float]:
        """The value that ranks each row with a result: LogME, or accuracy with ``rank_by="accuracy"``.

        Rows keep the order of ``rows``. Their numbers of samples may differ.
        """
        values = {row.name: row.accuracy if self.rank_by == "accuracy" else row.logme for row in self.rows}
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def head(
        self, name: str | None = None, dtype: torch.dtype | None = None, *, calibrated: bool = False
    ) -> torch.nn.Linear:
        """Return the posterior mean as a linear layer on the features of a row; see :meth:`Evidence.head`.

        Args:
            name: name of the row; None takes the best.
            dtype: dtype of the parameters; None takes torch's default.
            calibrated: make the outputs calibrated logits. Not for regression.

        Raises:
            KeyError: no row of that name has evidence.
            ValueError: the score of the row is NaN; or ``calibrated``, and the row has no temperature.
        """
        name = self.best if name is None else name
        if name not in self.evidence:
            raise KeyError(f"no evidence for {name!r}, only for {', '.join(map(repr, self.evidence)) or 'no row'}")
        return self.evidence[name].head(dtype, calibrated=calibrated)

    def model(self, name: str | None = None) -> torch.nn.Module:
        """Return a candidate with the linear head of its row in place of its own head, ready to be trained.

        In classification, the linear head is calibrated (see :meth:`Evidence.head`). The result takes the same inputs
        as the candidate, after its entry of ``transforms``. If the input of a head was scored, that head is replaced.
        If the output was scored, it is pooled as in the ranking, and the linear head follows. The first batch of the
        ranking is run in eval mode, to check that the outputs are those of the linear head on the scored features. In
        training mode, batch norm updates its statistics, and the head may no longer fit: keep such layers in eval mode.
        The ranking keeps the candidates and this batch in memory.

        Args:
            name: name of the candidate; None takes the best row.

        Returns:
            A copy of the module, or a new one from the factory, with the same seed. The candidate stays as it was.

        Raises:
            KeyError: no row of that name has evidence.
            ValueError: the linear head cannot be put into the candidate: the row is that of an inner layer, several
                heads were scored together, or the module uses its head in a different way. The message says what to do.
        """
        name = self.best if name is None else name
        evidence = self.evidence.get(name)
        linear = self.head(name, torch.float64, calibrated=evidence is not None and evidence.temperature is not None)
        if not self._builders:
            raise ValueError("model: a ranking that was copied or loaded holds no candidates; use ranking.head(name).")
        if name not in self._builders:
            raise ValueError(f"model: {name!r} is scored inside the network; use ranking.head(name) to build on it.")
        return self._builders[name](linear)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows to a CSV file. Its header names the metric: ``accuracy``, ``r2`` or ``f1``."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(field.name.replace("accuracy", self.metric) for field in fields(RankingRow))
            writer.writerows(asdict(row).values() for row in self.rows)

    def to_markdown(self) -> str:
        """Return the table of ``print(ranking)`` in Markdown."""
        header, *body = self._cells()
        lines = [header, ["---"] * len(header), *body]
        return "\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in lines)

    def plot(self, ax: Axes | None = None) -> Figure:
        """Plot the gain of each row as a bar with its standard error, or the accuracy with ``rank_by="accuracy"``.

        Args:
            ax: matplotlib axes to draw in; None makes a new figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        by_accuracy = self.rank_by == "accuracy"
        rows = [row for row in self.rows if not math.isnan(row.gain)]
        names = [
            row.name if row.ended == "finished" else f"{row.name} ({row.ended} at {row.num_samples})" for row in rows
        ]
        values = [row.accuracy if by_accuracy else row.gain for row in rows]
        errors = [row.accuracy_stderr if by_accuracy else row.stderr for row in rows]
        tied = [row.tied_with_best for row in rows]
        return plots.by_candidate(names, values, errors, tied, self._shown, ax)

    def plot_curves(self, ax: Axes | None = None) -> Figure:
        """Plot the gain of each row against the number of samples, or the accuracy with ``rank_by="accuracy"``.

        Args:
            ax: matplotlib axes to draw in; None makes a new figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        curves = {
            row.name: [
                (point.num_samples, point.accuracy if self.rank_by == "accuracy" else point.gain)
                for point in self.curves[row.name]
            ]
            for row in self.rows
        }
        return plots.by_samples(curves, [row.name for row in self.rows if row.ended != "finished"], self._shown, ax)

    @property
    def _shown(self) -> str:
        """What the figures show."""
        return self.metric if self.rank_by == "accuracy" else "gain"

    def page(self) -> Figure:
        """Plot scores, curves and the table on one page.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return plots.page(self.plot, self.plot_curves, str(self))

    def __str__(self) -> str:
        header, *body = self._cells()
        widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
        lines = (
            "  ".join(
                cell.ljust(width) if index in _LEFT_ALIGNED else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (header, *body)
        )
        return "\n".join(lines)

    def _cells(self) -> list[list[str]]:
        cells = [
            ["", "candidate", "gain", "± s.e.", METRIC_NAMES[self.metric], "± s.e.", "LogME", "samples"],
        ]
        cells[0] += ["feature", "D", "parameters", "seconds", "ended"]
        for position, row in enumerate(self.rows, 1):
            tied = row.tied_with_best and position > 1
            cells.append(
                [
                    "=" if tied else str(position),
                    printable(row.name),
                    _number(row.gain),
                    _number(row.stderr),
                    _number(row.accuracy),
                    _number(row.accuracy_stderr),
                    _number(row.logme),
                    str(row.num_samples),
                    printable(row.feature),
                    "" if row.num_features is None else str(row.num_features),
                    _count(row.num_parameters),
                    f"{row.seconds:.1f}",
                    row.ended + (f": {_shortened(printable(row.message.splitlines()[0]))}" if row.message else ""),
                ]
            )
        return cells


def row_name(candidate: str, source: str) -> str:
    """Return the name of the row of one source of a candidate."""
    return f"{candidate}/{source}" if source else candidate


def in_words(source: str, heads: Sequence[str] | None = None) -> str:
    """Return a source of features in words; an empty string if the head is not known yet."""
    if source:
        return "mean of layers" if source == LAYER_MEAN else f"output of {source!r}"
    if heads is None:
        return ""
    return "input of " + " and ".join(map(repr, heads)) if heads else "output"


def _shortened(text: str) -> str:
    return text if len(text) <= _MESSAGE_LENGTH else text[: _MESSAGE_LENGTH - 1] + "…"


def _escaped(text: str) -> str:
    """Return text without Markdown's special characters for cells, links and tags."""
    return re.sub(r"([\\|<>\[\]`])", r"\\\1", text)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _count(number: int | None) -> str:
    if number is None:
        return ""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)
