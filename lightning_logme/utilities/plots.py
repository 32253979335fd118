"""Figures of gains, drawn with matplotlib but without pyplot.

Each function takes plain numbers and returns a ``matplotlib.figure.Figure`` that belongs to no window. It raises
ImportError if matplotlib is not installed. NaN is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 6.0, 4.0  # inches
_GAIN = "gain in nats per sample"
_SMALL = 8  # points of a name's font
_DARK, _LIGHT, _ACCENT = "#4c72b0", "#b0b7c3", "#c44e52"
_MAX_TICKS = 40  # names below an axis
_MAX_LINES = 50
_MAX_ENTRIES = 40  # of a legend
_SHORT, _LONG = 24, 36  # characters of a name


def gain_by_output(
    gains: Sequence[float],
    mean: float,
    num_samples: int,
    names: Sequence[str] | None = None,
    axes: Axes | None = None,
) -> Figure:
    """Draw one bar per output and a line at the mean.

    Args:
        gains: one value per output.
        mean: the gain over all outputs.
        num_samples: shown in the title.
        names: one name per output. Outputs are numbered if it is None, or if there are more than 40.
        axes: where to draw; a new figure if None.
    """
    axes = _prepared(axes, f"gain by output (n = {num_samples})", "output", _GAIN)
    if any(map(math.isfinite, gains)):
        # One patch for all bars is faster than one rectangle each. Many bars leave no gaps, which would make them pale.
        half = 0.4 if len(gains) <= _MAX_TICKS else 0.5
        edges = [index + side for index in range(len(gains)) for side in (-half, half)]
        heights = [height for gain in gains for height in (gain if math.isfinite(gain) else math.nan, math.nan)]
        axes.stairs(heights[:-1], edges, fill=True, color=_DARK)
    if math.isfinite(mean):
        axes.axhline(mean, color=_ACCENT, linewidth=1.2)
        transform = axes.get_yaxis_transform()
        axes.text(1.01, mean, f"mean\n{mean:.3f}", transform=transform, color=_ACCENT, fontsize=9, va="center")
    if names is not None and len(names) <= _MAX_TICKS:
        _name_ticks(axes, names)
    else:
        axes.locator_params(axis="x", integer=True)
    if gains:
        axes.set_xlim(-0.6, len(gains) - 0.4)
    return _figure(axes)


def gain_by_layer(layers: Sequence[str], gains: Sequence[Sequence[float]], axes: Axes | None = None) -> Figure:
    """Draw one line per validation over the layers, later ones darker.

    Args:
        layers: their dotted names. The prefix that all of them share is not shown.
        gains: one row per validation, oldest first, with one value per layer. Only the newest 50 are drawn.
        axes: where to draw; a new figure if None.
    """
    newest = gains[-_MAX_LINES:]
    title = f"gain by layer (last of {len(gains)} validations black)" if len(gains) > 1 else "gain by layer"
    axes = _prepared(axes, title, "layer", _GAIN)
    for index, row in enumerate(newest):
        age = 1 - (index + 1) / len(newest)
        _line(axes, enumerate(row), color=str(0.85 * age), markersize=3, linewidth=1.2 if age else 2)
    _name_ticks(axes, _without_shared_prefix(layers))
    return _figure(axes)


def gain_by_samples(
    curves: Mapping[str, Sequence[tuple[int, float]]], unfinished: Collection[str] = (), axes: Axes | None = None
) -> Figure:
    """Draw the gain against the number of samples, one line per curve.

    Args:
        curves: by name, pairs of a number of samples and the gain.
        unfinished: names of the curves that are dashed.
        axes: where to draw; a new figure if None.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, MaxNLocator

    samples = "samples (dashed: not finished)" if any(name in unfinished for name in curves) else "samples"
    height = max(_HEIGHT, 1 + 0.2 * min(len(curves), _MAX_ENTRIES))
    axes = _prepared(axes, "gain by number of samples", samples, _GAIN, height)
    axes.set_xscale("log", base=2)
    numbers: list[int] = []
    for index, (name, points) in enumerate(curves.items()):
        known = [(number, gain) for number, gain in points if number > 0 and math.isfinite(gain)]
        numbers += [number for number, _ in known]
        colour = colormaps["turbo"](0.1 + 0.8 * index / max(len(curves) - 1, 1))
        style = "--" if name in unfinished else "-"
        label = _shown(name, _SHORT)
        # matplotlib leaves labels that begin with an underscore out of legends.
        label = f" {label}" if label.startswith("_") or not label else label
        label = label if index < _MAX_ENTRIES else "_"
        _line(axes, known, color=colour, linestyle=style, markersize=4, linewidth=1.5, label=label)
    narrow = bool(numbers) and max(numbers) < 4 * min(numbers)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True) if narrow else LogLocator(2, numticks=7))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    if curves:
        more = len(curves) - _MAX_ENTRIES
        title = f"first {_MAX_ENTRIES} of {len(curves)}" if more > 0 else None
        legend = axes.legend(
            fontsize=_SMALL, labelspacing=0.4, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, title=title
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    return _figure(axes)


def gain_by_candidate(
    names: Sequence[str],
    gains: Sequence[float],
    stderrs: Sequence[float],
    highlighted: Sequence[bool],
    axes: Axes | None = None,
) -> Figure:
    """Draw one horizontal bar per candidate, the first at the top, with its standard error.

    Args:
        names: of the candidates.
        gains: of the candidates; one without a gain is left out.
        stderrs: of the gains; a NaN has no error bar.
        highlighted: whether a candidate is the best or tied with it; drawn dark.
        axes: where to draw; a new figure if None.
    """
    rows = [row for row in zip(names, gains, stderrs, highlighted, strict=True) if math.isfinite(row[1])]
    title = "gain by candidate (dark: best and ties)"
    axes = _prepared(axes, title, f"{_GAIN}, ± 1 standard error", "", max(_HEIGHT, 1.2 + 0.25 * len(rows)))
    axes.barh(
        range(len(rows)),
        [gain for _, gain, _, _ in rows],
        xerr=[stderr if math.isfinite(stderr) else math.nan for _, _, stderr, _ in rows],
        color=[_DARK if dark else _LIGHT for _, _, _, dark in rows],
        capsize=3,
    )
    axes.set_yticks(range(len(rows)), [_shown(row[0], _LONG) for row in rows], fontsize=_SMALL, parse_math=False)
    axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)
    return _figure(axes)


def page(draw_left: Callable[[Axes], Any], draw_right: Callable[[Axes], Any], table: str) -> Figure:
    """Draw two figures side by side and a table in monospace below them.

    Args:
        draw_left: draws into the axes on the left.
        draw_right: draws into the axes on the right.
        table: its lines.
    """
    from matplotlib.figure import Figure

    lines = table.splitlines()
    columns = max(map(len, lines), default=0)
    # Each line of the table is about one name beside the axes.
    above, below = max(_HEIGHT, 0.25 * len(lines)), 0.3 + 0.15 * len(lines)
    figure = Figure(figsize=(max(2 * _WIDTH, 0.4 + 0.07 * columns), above + below), dpi=100, layout="constrained")
    top, bottom = cast(Any, figure).subfigures(2, 1, height_ratios=(above, below))
    left, right = top.subplots(1, 2)
    draw_left(left)
    draw_right(right)
    text = {"family": "monospace", "fontsize": _SMALL, "verticalalignment": "top", "parse_math": False}
    bottom.text(0.01, 0.98, "\n".join(map(_printed, lines)), **text)
    return figure


def printable(text: str) -> str:
    """Return the text in one line, with a question mark for each character that has no picture."""
    return _printed(" ".join(text.split()))


def _printed(line: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in line)


def _prepared(axes: Axes | None, title: str, x: str, y: str, height: float = _HEIGHT) -> Axes:
    """Return axes in the style of all figures, in a new figure if they are None."""
    from matplotlib.figure import Figure

    if axes is None:
        axes = Figure(figsize=(_WIDTH, height), dpi=100, layout="constrained").subplots()
    axes.set_title(title, fontsize=11, y=1.0)  # Given a height, matplotlib does not search for a free one.
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _figure(axes: Axes) -> Figure:
    """Return the figure at the top, also for axes inside a SubFigure."""
    from matplotlib.figure import SubFigure

    figure: Any = axes.figure
    while isinstance(figure, SubFigure):
        figure = figure.figure
    return figure


def _line(axes: Axes, points: Iterable[tuple[float, float]], **style: Any) -> None:
    """Draw a line through the points whose value is finite."""
    known = [point for point in points if math.isfinite(point[1])]
    axes.plot([x for x, _ in known], [y for _, y in known], marker="o", **style)


def _name_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Write names below the axis at 0, 1, …, slanted or upright where they are long or many."""
    every = math.ceil(len(names) / _MAX_TICKS) or 1
    shown = [_shown(name, _SHORT) for name in names[::every]]
    # A name in a line takes a character more than its own, and 70 characters fit below the axis.
    room = 70 / len(shown) if shown else 70
    style: dict[str, Any] = {}
    if max(map(len, shown), default=0) + 1 > room:
        angle = 40 if len(shown) <= 16 else 90
        style = {"rotation": angle, "rotation_mode": "anchor", "ha": "right", "va": "top" if angle < 90 else "center"}
    axes.set_xticks(range(0, len(names), every), shown, fontsize=_SMALL, parse_math=False, **style)


def _without_shared_prefix(names: Sequence[str]) -> list[str]:
    """Return dotted names without the prefix that all of them share."""
    parts = [name.split(".") for name in names]
    while all(len(part) > 1 for part in parts) and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    return [".".join(part) for part in parts]


def _shown(name: str, most: int) -> str:
    """Return a name of at most ``most`` characters, shortened in the middle: names differ at either end."""
    name = printable(name)
    if len(name) <= most:
        return name
    return f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"
