"""Figures of gains and accuracies, drawn with matplotlib but without pyplot.

Each function takes plain numbers and returns a ``matplotlib.figure.Figure`` that belongs to no window. It raises
ImportError if matplotlib is not installed. NaN is left out.

TensorBoard shrinks figures to cards of about 330 pixels. The figures for it are small in inches, so that text of
10 points can still be read there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 4.0, 3.0  # inches
_MARGIN = 1.3  # inches beside the axis
_DPI = 150
_GAIN = "gain in nats per sample"
_LABELS = {
    "gain": _GAIN,
    "accuracy": "leave-one-out accuracy",
    "r2": "leave-one-out R²",
    "f1": "leave-one-out macro F1",
}
_LINE, _CHARACTER = 0.16, 0.085  # inches that text of 10 points takes
_DARK, _LIGHT, _ACCENT = "#4c72b0", "#b0b7c3", "#c44e52"
_MAX_TICKS = 40  # names below an axis
_MAX_LINES = 50
_MOST_NUMBERS = 10  # classes of a confusion matrix with numbers
_MAX_ENTRIES = 40  # entries of a legend
_SHORT, _LONG = 24, 36  # the most characters of a name


def gain_by_output(
    gains: Sequence[float],
    mean: float,
    num_samples: int,
    names: Sequence[str] | None = None,
    output: str = "output",
    axes: Axes | None = None,
) -> Figure:
    """Draw one bar per output and a line at the mean.

    Args:
        gains: one value per output.
        mean: the gain over all outputs.
        num_samples: shown in the title.
        names: one name per output. Outputs are numbered if ``names`` is None or has more than 40 items.
        output: the word for an output, such as "class".
        axes: where to draw; a new figure if None.
    """
    names = () if names is None or len(names) > _MAX_TICKS else names
    axes = _prepared(axes, f"gain by {output} (n = {num_samples})", output, _GAIN, *_size_for(names))
    if any(map(math.isfinite, gains)):
        # One patch for all bars is faster than one rectangle each. Many bars have no gaps, or they would look pale.
        half = 0.4 if len(gains) <= _MAX_TICKS else 0.5
        edges = [index + side for index in range(len(gains)) for side in (-half, half)]
        heights = [height for gain in gains for height in (gain if math.isfinite(gain) else math.nan, math.nan)]
        axes.stairs(heights[:-1], edges, fill=True, color=_DARK)
    if math.isfinite(mean):
        axes.axhline(mean, color=_ACCENT, linewidth=1.2)
        transform = axes.get_yaxis_transform()
        axes.text(1.01, mean, f"mean\n{mean:.3f}", transform=transform, color=_ACCENT, va="center")
    if names:
        _name_ticks(axes, names)
    else:
        axes.locator_params(axis="x", integer=True)
    if gains:
        axes.set_xlim(-0.6, len(gains) - 0.4)
    return _figure(axes)


def confusion(
    counts: Sequence[Sequence[int]],
    accuracy: float,
    stderr: float,
    names: Sequence[str] | None = None,
    axes: Axes | None = None,
) -> Figure:
    """Draw a confusion matrix: for each class, the shares of its samples that are predicted as each class.

    With at most 10 classes, the cells show percentages.

    Args:
        counts: the number of samples by class (row) and predicted class (column).
        accuracy: shown in the title.
        stderr: its standard error.
        names: one name per class. Classes are numbered if ``names`` is None.
        axes: where to draw; a new figure if None.
    """
    names = list(map(str, range(len(counts)))) if names is None else names
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    has_numbers = len(counts) <= _MOST_NUMBERS
    side = max(_HEIGHT - _MARGIN, (1.8 if has_numbers else 1.1) * _LINE * len(counts))
    longest = _CHARACTER * min(max(map(len, names), default=0), _SHORT)
    beside = longest + (0.9 if has_numbers else 1.2 * _MARGIN)
    size = max(_WIDTH, max(_HEIGHT, side) + beside), side + _size_for(names)[1] - _HEIGHT + _MARGIN
    title = f"accuracy {accuracy:.3f} ± {stderr:.3f}"
    axes = _prepared(axes, title, "predicted class", "class", *size)
    # The square root makes rare errors visible.
    image = axes.imshow(
        [[math.sqrt(share) for share in row] for row in shares], cmap="Blues", vmin=0, vmax=1, aspect="auto"
    )
    _name_ticks(axes, names)
    axes.set_yticks(range(len(names)), [_shown(name, _SHORT) for name in names], parse_math=False)
    axes.tick_params(length=0)
    if has_numbers:
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9}
        for row, of_row in enumerate(shares):
            for column, share in enumerate(of_row):
                if share > 0.005:
                    axes.text(column, row, f"{100 * share:.0f}", color="white" if share > 0.3 else "black", **style)
        axes.set_xlabel("predicted class (% of the class)")
    else:
        ticks = (0, 0.01, 0.1, 0.3, 0.6, 1)
        bar = _figure(axes).colorbar(image, cax=axes.inset_axes((1.02, 0, 0.03, 1)), label="share of the class")
        bar.set_ticks([math.sqrt(tick) for tick in ticks], labels=list(map(str, ticks)))
    return _figure(axes)


def gain_by_layer(layers: Sequence[str], gains: Sequence[Sequence[float]], axes: Axes | None = None) -> Figure:
    """Draw one line per validation over the layers. Newer lines are darker.

    Args:
        layers: their dotted names. The prefix that all of them share is not shown.
        gains: one row per validation, oldest first, with one value per layer. Only the newest 50 are drawn.
        axes: where to draw; a new figure if None.
    """
    newest = gains[-_MAX_LINES:]
    title = f"gain by layer (black: newest of {len(gains)})" if len(gains) > 1 else "gain by layer"
    names = _without_shared_prefix(layers)
    axes = _prepared(axes, title, "layer", _GAIN, *_size_for(names))
    for index, row in enumerate(newest):
        age = 1 - (index + 1) / len(newest)
        _line(axes, enumerate(row), color=str(0.85 * age), markersize=3, linewidth=1.2 if age else 2)
    _name_ticks(axes, names)
    return _figure(axes)


def by_samples(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    unfinished: Collection[str] = (),
    what: str = "gain",
    axes: Axes | None = None,
) -> Figure:
    """Draw the gain, or another value, against the number of samples, one line per curve.

    Args:
        curves: by name, pairs of a number of samples and the value.
        unfinished: names of the curves that are dashed.
        what: the value: "gain", "accuracy", "r2" or "f1".
        axes: where to draw; a new figure if None.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, MaxNLocator

    samples = "samples (dashed: not finished)" if any(name in unfinished for name in curves) else "samples"
    labels = [_label(name) for name in curves]
    width = _WIDTH + _CHARACTER * max(map(len, labels), default=0)
    height = max(_HEIGHT, 1 + 1.4 * _LINE * min(len(curves), _MAX_ENTRIES))
    axes = _prepared(axes, f"{what} by number of samples", samples, _LABELS[what], width, height)
    axes.set_xscale("log", base=2)
    numbers: list[int] = []
    for index, (name, points) in enumerate(curves.items()):
        known = [(number, gain) for number, gain in points if number > 0 and math.isfinite(gain)]
        numbers += [number for number, _ in known]
        colour = colormaps["turbo"](0.1 + 0.8 * index / max(len(curves) - 1, 1))
        style = "--" if name in unfinished else "-"
        label = labels[index] if index < _MAX_ENTRIES else "_"
        _line(axes, known, color=colour, linestyle=style, markersize=4, linewidth=1.5, label=label)
    narrow = bool(numbers) and max(numbers) < 4 * min(numbers)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True) if narrow else LogLocator(2, numticks=6))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    if curves:
        more = len(curves) - _MAX_ENTRIES
        title = f"first {_MAX_ENTRIES} of {len(curves)}" if more > 0 else None
        legend = axes.legend(labelspacing=0.4, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, title=title)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return _figure(axes)


def by_candidate(
    names: Sequence[str],
    values: Sequence[float],
    stderrs: Sequence[float],
    highlighted: Sequence[bool],
    what: str = "gain",
    axes: Axes | None = None,
) -> Figure:
    """Draw one horizontal bar per candidate, the first at the top, with its standard error.

    Args:
        names: the names of the candidates.
        values: the value of each candidate. A candidate whose value is NaN is left out.
        stderrs: the standard error of each value. If it is NaN, the bar has no error bar.
        highlighted: whether each candidate is the best or tied with it. Such bars are dark.
        what: the value: "gain", "accuracy", "r2" or "f1".
        axes: where to draw; a new figure if None.
    """
    rows = [row for row in zip(names, values, stderrs, highlighted, strict=True) if math.isfinite(row[1])]
    shown = [_shown(row[0], _LONG) for row in rows]
    title = f"{what} by candidate (dark: best and ties)"
    width = _WIDTH + _CHARACTER * max(map(len, shown), default=0)
    height = max(_HEIGHT, 1.2 + 1.6 * _LINE * len(rows))
    axes = _prepared(axes, title, f"{_LABELS[what]},\n± 1 standard error", "", width, height)
    axes.barh(
        range(len(rows)),
        [value for _, value, _, _ in rows],
        xerr=[stderr if math.isfinite(stderr) else math.nan for _, _, stderr, _ in rows],
        color=[_DARK if dark else _LIGHT for _, _, _, dark in rows],
        capsize=3,
    )
    axes.set_yticks(range(len(rows)), shown, parse_math=False)
    axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)
    return _figure(axes)


def page(draw_left: Callable[[Axes], Any], draw_right: Callable[[Axes], Any], table: str) -> Figure:
    """Draw two figures side by side and a table in monospace below them.

    Args:
        draw_left: draws into the axes on the left.
        draw_right: draws into the axes on the right.
        table: the table as text.
    """
    from matplotlib.figure import Figure

    lines = table.splitlines()
    columns = max(map(len, lines), default=0)
    # The table has about one line for each name beside the axes.
    above, below = max(4.0, 1.6 * _LINE * len(lines)), 0.3 + 1.2 * _LINE * len(lines)
    figure = Figure(figsize=(max(12.0, 0.4 + _CHARACTER * columns), above + below), dpi=100, layout="constrained")
    top, bottom = cast(Any, figure).subfigures(2, 1, height_ratios=(above, below))
    left, right = top.subplots(1, 2)
    draw_left(left)
    draw_right(right)
    text = {"family": "monospace", "fontsize": 10, "verticalalignment": "top", "parse_math": False}
    bottom.text(0.01, 0.98, "\n".join(map(_printed, lines)), **text)
    return figure


def printable(text: str) -> str:
    """Return the text in one line, with a question mark for each character that cannot be shown."""
    return _printed(" ".join(text.split()))


def _printed(line: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in line)


def _prepared(axes: Axes | None, title: str, x: str, y: str, width: float = _WIDTH, height: float = _HEIGHT) -> Axes:
    """Return axes in the style of all figures, in a new figure of this size if they are None."""
    from matplotlib.figure import Figure

    if axes is None:
        axes = Figure(figsize=(width, height), dpi=_DPI, layout="constrained").subplots()
    axes.set_title(title, fontsize=10, y=1.0)  # Without y, matplotlib would search for a free height.
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


def _size_for(names: Sequence[str]) -> tuple[float, float]:
    """Return the width and the height of a figure in which names fit below the axis."""
    width = max(_WIDTH, _MARGIN + 1.1 * _LINE * min(len(names), _MAX_TICKS))
    longest = _CHARACTER * min(max(map(len, names), default=0), _SHORT)
    return width, _HEIGHT + max(0.0, longest * math.sin(math.radians(_angle_of(names))) - 0.6)


def _angle_of(names: Sequence[str]) -> int:
    """Return the angle of names below the axis: long ones are slanted, or vertical if there are many."""
    number = min(len(names), _MAX_TICKS)
    longest = _CHARACTER * (min(max(map(len, names), default=0), _SHORT) + 0.5)
    if longest * number <= _WIDTH - _MARGIN:
        return 0
    return 40 if number <= 10 else 90


def _name_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Write names below the axis at 0, 1, …, and at most 40 of them."""
    every = math.ceil(len(names) / _MAX_TICKS) or 1
    shown = [_shown(name, _SHORT) for name in names[::every]]
    angle = _angle_of(names)
    style: dict[str, Any] = {}
    if angle:
        style = {"rotation": angle, "rotation_mode": "anchor", "ha": "right", "va": "top" if angle < 90 else "center"}
    axes.set_xticks(range(0, len(names), every), shown, parse_math=False, **style)


def _without_shared_prefix(names: Sequence[str]) -> list[str]:
    """Return dotted names without the prefix that all of them share."""
    parts = [name.split(".") for name in names]
    while all(len(part) > 1 for part in parts) and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    return [".".join(part) for part in parts]


def _label(name: str) -> str:
    """Return a name for a legend. matplotlib leaves out empty labels and those that begin with an underscore."""
    label = _shown(name, _SHORT)
    return f" {label}" if label.startswith("_") or not label else label


def _shown(name: str, most: int) -> str:
    """Return a name of at most ``most`` characters, shortened in the middle: names differ at either end."""
    name = printable(name)
    if len(name) <= most:
        return name
    return f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"
