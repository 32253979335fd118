"""What a logger with pictures gets to see of an evidence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lightning_logme.evidence import Evidence

_MAX_LABELLED = 40  # bars that can carry a name
_STRAIGHT_CHARACTERS = 50  # that fit below the axis in one line


def log_plots(
    loggers: Iterable[Any], key: str, evidence: Evidence, class_names: Sequence[str] | None, step: int
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
        if hasattr(experiment, "add_figure"):
            try:
                figure = gain_figure(evidence, class_names)
            except ImportError:
                continue
            experiment.add_figure(f"{key}/gain_by_output", figure, step)


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
            turned = {"ha": "right", "rotation": 40} if slanted else {"ha": "center"}
            figure.text(centre, bottom - 0.02, name, va="top", fontsize=9, rotation_mode="anchor", **turned)
    lines = [[(left, height), (right, height)] for height in (bottom, bottom + mean * scale)]
    figure.add_artist(PolyCollection(bars, facecolors="#4c72b0", transform=figure.transFigure))
    figure.add_artist(LineCollection(lines, colors=["0.2", "#c44e52"], transform=figure.transFigure))
    title = f"gain in nats per sample: mean {mean:.3f}, largest {largest:.3f}  (n = {evidence.num_samples})"
    figure.text(left, 0.9, title, fontsize=10)
    return figure
