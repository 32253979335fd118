"""What a logger with pictures gets to see of an evidence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lightning_logme.evidence import Evidence

_MAX_LABELLED = 40  # bars that can carry a name


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
    """Bars of each output's gain, in nats per sample.

    Args:
        evidence: of K outputs.
        class_names: K names; numbers if None.

    Returns:
        A ``matplotlib.figure.Figure``, known to no window system.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    gain = (evidence.per_output - evidence.null).tolist()
    names = list(class_names) if class_names is not None else [str(index) for index in range(len(gain))]
    figure = Figure(figsize=(6, 3), dpi=80)
    axes = figure.add_axes((0.1, 0.28 if class_names is not None else 0.16, 0.88, 0.72 if class_names is None else 0.6))
    axes.bar(range(len(gain)), gain, color="#4c72b0")
    mean = float(evidence.gain)
    axes.axhline(mean, color="#c44e52", linewidth=1)
    axes.set_title(f"gain by output, mean {mean:.3f}; n = {evidence.num_samples}", fontsize=9)
    axes.set_ylabel("nats / sample", fontsize=8)
    axes.tick_params(labelsize=8)
    if len(names) <= _MAX_LABELLED:
        long = sum(map(len, names)) > 60
        axes.set_xticks(range(len(names)), names, rotation=40 if long else 0, ha="right" if long else "center")
    return figure
