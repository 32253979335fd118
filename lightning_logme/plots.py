"""What a logger with pictures gets to see of an evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from lightning_logme.curve import CurvePoint, gain_settled_at, order_settled_at
from lightning_logme.evidence import Evidence
from lightning_logme.history import Row

_MAX_LABELLED = 40  # bars that can carry a name
_STRAIGHT_CHARACTERS = 50  # that fit below the axis in one line
_MAX_NAMES = 12  # below the axis of a line figure
_MAX_LINES = 50
_MAX_CHARACTERS = 20  # of a name in a line figure


def log_plots(
    loggers: Iterable[Any], step: int, key: str, evidence: Evidence, class_names: Sequence[str] | None
) -> None:
    """Histograms of the gain and the spectrum, and a figure of the gain by output, for every logger that can show them.

    Loggers are asked for the calls of a TensorBoard writer (``add_histogram``, ``add_figure``) and passed over in
    silence without them; so is the figure where matplotlib is not installed.
    """
    gain = evidence.per_output - evidence.null
    known = gain[torch.isfinite(gain)].cpu()
    if len(known) == 0:
        return
    histograms = {f"{key}/gain_per_output": known, f"{key}/log10_spectrum": evidence.spectrum.cpu().log10()}
    for logger in loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_histogram"):
            for tag, values in histograms.items():
                if len(values):
                    experiment.add_histogram(tag, values, step)
    log_figure(loggers, step, f"{key}/gain_by_output", lambda: gain_figure(evidence, class_names))


def log_figure(loggers: Iterable[Any], step: int, tag: str, draw: Callable[[], Any]) -> None:
    """Show a figure in every logger that can, unless matplotlib is not installed."""
    for logger in loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_figure"):
            try:
                figure = draw()
            except ImportError:
                return
            experiment.add_figure(tag, figure, step)


def gain_figure(evidence: Evidence, class_names: Sequence[str] | None = None) -> Any:
    """Bars of each output's gain, in nats per sample, and a line at their mean.

    Drawn without axes, and with few words: text takes most of the time, and a validation must not wait for its picture.

    Args:
        evidence: of K outputs.
        class_names: K names; numbers if None.

    Returns:
        A ``matplotlib.figure.Figure``, known to no window system.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.collections import LineCollection, PolyCollection
    from matplotlib.figure import Figure

    gains = (evidence.per_output - evidence.null).tolist()
    mean, number = float(evidence.gain), len(gains)
    names = list(class_names) if class_names is not None else [str(index) for index in range(number)]
    slanted = sum(map(len, names)) > _STRAIGHT_CHARACTERS
    slanted = slanted and number <= _MAX_LABELLED
    left, right, bottom, top = 0.14 if slanted else 0.04, 0.98, 0.32 if slanted else 0.12, 0.82
    largest = max([gain for gain in gains if gain == gain], default=0.0)
    scale = (top - bottom) / largest if largest > 0 else 0.0
    step = (right - left) / number

    figure = Figure(figsize=(5, 3), dpi=100)
    bars = []
    for index, (gain, name) in enumerate(zip(gains, names, strict=True)):
        centre, height = left + (index + 0.5) * step, bottom + (gain * scale if gain == gain else 0.0)
        x0, x1 = centre - 0.4 * step, centre + 0.4 * step
        bars.append([(x0, bottom), (x0, height), (x1, height), (x1, bottom)])
        if number <= _MAX_LABELLED:
            figure.text(centre, bottom - 0.02, name, fontsize=9, **_below(slanted))
    lines = [[(left, height), (right, height)] for height in (bottom, bottom + mean * scale)]
    figure.add_artist(PolyCollection(bars, facecolors="#4c72b0", transform=figure.transFigure))
    figure.add_artist(LineCollection(lines, colors=["0.2", "#c44e52"], transform=figure.transFigure))
    title = f"gain in nats per sample: mean {mean:.3f}, largest {largest:.3f}  (n = {evidence.num_samples})"
    figure.text(left, 0.9, title, fontsize=10)
    return figure


def layers_figure(history: Sequence[Row], keys: Mapping[str, str]) -> Any:
    """The gain of each layer, one line a validation, the later the darker.

    Args:
        history: rows of :attr:`~lightning_logme.LogMECallback.history`.
        keys: by layer, the key it is logged under.

    Raises:
        ImportError: matplotlib is not installed.
    """
    validations: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in history:
        if row["key"] in keys.values():
            moment = row["stage"], row["epoch"], row["global_step"]
            validations.setdefault(moment, {})[row["key"]] = row["gain"]
    gains = [[numbers.get(key, math.nan) for key in keys.values()] for numbers in validations.values()]
    gains = gains[-_MAX_LINES:]
    x = [index / max(len(keys) - 1, 1) for index in range(len(keys))]
    names = dict(zip(x, _short(list(keys)), strict=True))
    shades = [str(0.85 * (1 - (index + 1) / len(gains))) for index in range(len(gains))]
    lines = [(list(zip(x, line, strict=True)), shade) for line, shade in zip(gains, shades, strict=True)]
    title = f"gain by layer, {len(gains)} validations, the last one black"
    return _line_figure(title, lines, names, {})


def curves_figure(curves: Mapping[str, Sequence[CurvePoint]]) -> Any:
    """The gain against the number of samples, one line a source of features.

    Args:
        curves: by name; at least one of them has two points.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import colormaps

    curves = {name: [p for p in curve if p.num_samples and p.gain == p.gain] for name, curve in curves.items()}
    curves = {name: curve for name, curve in curves.items() if len(curve) > 1}
    numbers = sorted({point.num_samples for curve in curves.values() for point in curve})
    span = math.log2(numbers[-1] / numbers[0]) or 1.0 if numbers else 1.0
    x = {number: math.log2(number / numbers[0]) / span for number in numbers}
    lines, legend = [], {}
    for index, (name, curve) in enumerate(curves.items()):
        colour = colormaps["turbo"](0.1 + 0.8 * index / max(len(curves) - 1, 1))
        lines.append(([(x[point.num_samples], point.gain) for point in curve], colour))
        legend[name] = colour
    settled = gain_settled_at(next(iter(curves.values()))) if len(curves) == 1 else order_settled_at(curves)
    what = "gain" if len(curves) == 1 else "order"
    hint = f"{what} settled at n = {settled}" if settled else f"{what} not settled"
    names = {x[number]: str(number) for number in numbers}
    return _line_figure(f"gain against samples: {hint}", lines, names, legend)


def _line_figure(
    title: str, lines: Sequence[tuple[Sequence[tuple[float, float]], Any]], names: Mapping[float, str], legend: Any
) -> Any:
    """Lines of (x in 0 … 1, gain ≥ 0) with their colours; without axes, as :func:`gain_figure`."""
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    labels = dict(list(names.items())[:: math.ceil(len(names) / _MAX_NAMES) or 1])
    slanted = sum(map(len, labels.values())) > _STRAIGHT_CHARACTERS
    left, right, bottom, top = 0.14 if slanted else 0.06, 0.7 if legend else 0.96, 0.36 if slanted else 0.14, 0.82
    largest = max((gain for points, _ in lines for _, gain in points if gain == gain), default=0.0)
    scale = (top - bottom) / largest if largest > 0 else 0.0
    figure = Figure(figsize=(5, 3), dpi=100)
    segments, colours = [[(left, bottom), (right, bottom)]], ["0.2"]
    for points, colour in lines:
        known = [(left + x * (right - left), bottom + gain * scale) for x, gain in points if gain == gain]
        if len(known) > 1:
            segments.append(known)
            colours.append(colour)
    figure.add_artist(LineCollection(segments, colors=colours, linewidths=1.5))
    for x, name in labels.items():
        place = left + x * (right - left), bottom - 0.03
        figure.text(*place, name[-_MAX_CHARACTERS:], fontsize=8, **_below(slanted))
    for index, (name, colour) in enumerate(list(legend.items())[-_MAX_NAMES:]):
        height = top - 0.055 * index
        figure.text(right + 0.02, height, name[-_MAX_CHARACTERS:], color=colour, va="top", fontsize=8, parse_math=False)
    figure.text(0.04, 0.91, f"{title}; largest {largest:.3f} nats", fontsize=9)
    return figure


def _below(slanted: bool) -> dict[str, Any]:
    """How a name is set below an axis; what it holds is no mathematics."""
    turned = {"ha": "right", "rotation": 40} if slanted else {"ha": "center"}
    return {"va": "top", "rotation_mode": "anchor", "parse_math": False, **turned}


def _short(names: Sequence[str]) -> list[str]:
    """Dotted names without the parts that all of them begin with."""
    parts = [name.split(".") for name in names]
    while all(len(part) > 1 for part in parts) and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    return [".".join(part) for part in parts]
