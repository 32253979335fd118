"""The result of a ranking: rows, and how they are shown."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Literal

import torch

from lightning_logme.features.extractor import LAYER_MEAN
from lightning_logme.scores.curve import CurvePoint
from lightning_logme.scores.evidence import Evidence
from lightning_logme.utilities import plots
from lightning_logme.utilities.plots import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_CHARACTERS = 120  # of a message in the table; ``RankingRow.message`` has all
_TEXT = (0, 1, 6, 10)  # columns of words, which begin at the left

Ended = Literal["finished", "dropped", "failed", "interrupted"]


@dataclass(frozen=True)
class RankingRow:
    """A candidate's result. Compare only scores of rows with the same ``num_samples``.

    Attributes:
        name: of the candidate, followed by "/" and the layer where it is a layer's.
        logme: log of maximum evidence in nats per sample; NaN if there is none.
        gain: ``logme`` minus the score of useless features; 0 if the features explain nothing.
        stderr: standard error of ``logme``, by the block jackknife. Differences of scores have far smaller ones.
        tied_with_best: whether the paired difference from the best is within chance; true of the best itself.
        feature: what was scored: "input of 'fc'", "output" of the module, or "output of 'layer4'".
        num_features: D.
        num_parameters: of the module.
        num_samples: that it was scored on.
        seconds: spent on building the module, forward passes and evidence, over all layers.
        peak_memory: bytes of accelerator memory at most, None on a CPU.
        ended: "finished"; "dropped", behind the leader by more than chance allows; "failed"; "interrupted".
        message: why it ended so, or what is odd about it; may be empty.
    """

    name: str
    logme: float
    gain: float
    stderr: float
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
    """Candidates in the order of their scores, made by :func:`~lightning_logme.rank_backbones`.

    Attributes:
        rows: one a candidate and source of features, the best first; then those that were dropped, the last to be
            dropped first; then those without a result.
        evidence: by name of the row, the :class:`~lightning_logme.Evidence` behind the score.
        curves: by name of the row, the score after each round.
    """

    rows: list[RankingRow]
    evidence: dict[str, Evidence]
    curves: dict[str, list[CurvePoint]]

    @property
    def best(self) -> str:
        """The name of the first row: the best, though others may be tied with it."""
        return self.rows[0].name

    @property
    def tied(self) -> list[str]:
        """The names that are tied with the best, it included: fine-tune the one that suits you."""
        return [row.name for row in self.rows if row.tied_with_best]

    @property
    def scores(self) -> dict[str, float]:
        """The LogME of each candidate that has one, the best first. See ``rows`` for the samples behind each."""
        return {row.name: row.logme for row in self.rows if not math.isnan(row.logme)}

    def head(self, name: str | None = None, dtype: torch.dtype | None = None) -> torch.nn.Linear:
        """The posterior mean as a linear layer on a candidate's features, see :meth:`Evidence.head`.

        Args:
            name: of the candidate; the best if None.
            dtype: of its parameters; torch's default dtype if None.

        Raises:
            KeyError: no candidate of that name has a score.
            ValueError: its score is NaN.
        """
        name = self.best if name is None else name
        if name not in self.evidence:
            raise KeyError(f"no evidence for {name!r}; there is for {', '.join(map(repr, self.evidence)) or 'none'}")
        return self.evidence[name].head(dtype)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows, with a header."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(RankingRow)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)

    def to_markdown(self) -> str:
        """The table of ``print(ranking)`` in Markdown."""
        header, *body = self._cells()
        lines = [header, ["---"] * len(header), *body]
        return "\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in lines)

    def plot(self, ax: Axes | None = None) -> Figure:
        """The gain of each candidate as a bar, with its standard error.

        Args:
            ax: matplotlib axes to draw in; a figure of its own if None.

        Raises:
            ImportError: matplotlib is not installed.
        """
        rows = [row for row in self.rows if not math.isnan(row.gain)]
        names = [
            row.name if row.ended == "finished" else f"{row.name} ({row.ended} at {row.num_samples})" for row in rows
        ]
        errors = [0.0 if math.isnan(row.stderr) else row.stderr for row in rows]
        tied = [row.tied_with_best for row in rows]
        return plots.gain_by_candidate(names, [row.gain for row in rows], errors, tied, ax)

    def plot_curves(self, ax: Axes | None = None) -> Figure:
        """The gain of each candidate against the number of samples.

        Args:
            ax: matplotlib axes to draw in; a figure of its own if None.

        Raises:
            ImportError: matplotlib is not installed.
        """
        curves = {row.name: [(point.num_samples, point.gain) for point in self.curves[row.name]] for row in self.rows}
        return plots.gain_by_samples(curves, [row.name for row in self.rows if row.ended != "finished"], ax)

    def page(self) -> Figure:
        """Draw scores, curves and the table on one page.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return plots.page(self.plot, self.plot_curves, str(self))

    def __str__(self) -> str:
        header, *body = self._cells()
        widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
        lines = (
            "  ".join(
                cell.ljust(width) if index in _TEXT else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (header, *body)
        )
        return "\n".join(lines)

    def _cells(self) -> list[list[str]]:
        cells = [
            ["", "candidate", "gain", "± s.e.", "LogME", "samples", "feature", "D", "parameters", "seconds", "ended"]
        ]
        for place, row in enumerate(self.rows, 1):
            tied = row.tied_with_best and place > 1
            cells.append(
                [
                    "=" if tied else str(place),
                    printable(row.name),
                    _number(row.gain),
                    _number(row.stderr),
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
    """Return in words which feature a source is; nothing for a head that no batch has shown."""
    if source:
        return "mean of layers" if source == LAYER_MEAN else f"output of {source!r}"
    if heads is None:
        return ""
    return "input of " + " and ".join(map(repr, heads)) if heads else "output"


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"


def _escaped(text: str) -> str:
    """Text that Markdown takes for text: no cell, no link, no tag."""
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
