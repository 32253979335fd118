"""Pictures of a ranking."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from lightning_logme.ranking.result import printable

if TYPE_CHECKING:
    from lightning_logme.ranking.result import Ranking, RankingRow

_WIDTH = 7.0  # inches
_MAX_CHARACTERS = 40  # of a name
_LABEL = "gain in nats per sample"
_COLOURS = {True: "#4c72b0", False: "#b0b7c3"}  # tied with the best, or not


def bars(ranking: Ranking, axes: Axes | None = None) -> Figure:
    """The gain of each candidate with its standard error, the best at the top."""
    rows = [row for row in ranking.rows if not math.isnan(row.gain)]
    axes = axes or _axes(1.2 + 0.36 * max(len(rows), 1))
    axes.barh(
        range(len(rows)),
        [row.gain for row in rows],
        xerr=[0.0 if math.isnan(row.stderr) else row.stderr for row in rows],
        color=[_COLOURS[row.tied_with_best] for row in rows],
        capsize=3,
    )
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel(f"{_LABEL}, ± 1 s.e. (dark: the best and its ties)")
    axes.spines[["top", "right"]].set_visible(False)
    return _figure(axes)


def curves(ranking: Ranking, axes: Axes | None = None) -> Figure:
    """The gain of each candidate against the number of samples, as far as it was followed."""
    axes = axes or _axes(4.2)
    for row in ranking.rows:
        points = [point for point in ranking.curves[row.name] if not math.isnan(point.gain)]
        if points:
            style = "-o" if row.ended == "finished" else "--o"
            axes.plot([p.num_samples for p in points], [p.gain for p in points], style, markersize=4, label=_shown(row))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("samples (dashed: did not finish)")
    axes.set_ylabel(_LABEL)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        for text in axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0)).get_texts():
            text.set_parse_math(False)
    return _figure(axes)


def page(ranking: Ranking) -> Figure:
    """Everything on one page: scores, curves, and the table."""
    lines = str(ranking).splitlines()
    figure = Figure(figsize=(2 * _WIDTH, 4.2 + 0.2 * len(lines)), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(4.2, 0.2 * len(lines)))
    above, below = parts
    left, right = above.subplots(1, 2)
    bars(ranking, left)
    curves(ranking, right)
    below.text(0.01, 0.98, "\n".join(lines), family="monospace", fontsize=8, verticalalignment="top", parse_math=False)
    return figure


def _axes(height: float) -> Axes:
    return Figure(figsize=(_WIDTH, height), layout="constrained").subplots()


def _figure(axes: Axes) -> Figure:
    figure = axes.figure
    while isinstance(figure, SubFigure):
        figure = figure.figure
    return figure


def _label(row: RankingRow) -> str:
    return _shown(row) if row.ended == "finished" else f"{_shown(row)} ({row.ended} at {row.num_samples})"


def _shown(row: RankingRow) -> str:
    """A name as a picture can show it. matplotlib leaves labels that begin with an underscore out of legends."""
    name = printable(row.name)
    name = name if len(name) <= _MAX_CHARACTERS else f"{name[: _MAX_CHARACTERS - 1]}…"
    return f" {name}" if name.startswith("_") or not name else name
