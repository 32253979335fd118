"""What has been scored so far: logged with the module, remembered, and drawn."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_logme.collector import Collector, Result
from lightning_logme.curve import CurvePoint
from lightning_logme.evidence import Evidence
from lightning_logme.history import Row, figures, is_state, merge
from lightning_logme.packages import LightningModule, Trainer
from lightning_logme.plots import curves_figure, layers_figure, log_figure, log_plots
from lightning_logme.sources import HEAD, LAYER_MEAN

_NOTHING = {"logme": math.nan, "gain": math.nan, "num_samples": 0}


def is_key(key: Any, name: str, part: str = "") -> bool:
    """Whether a score or a gain is logged under a key, such as that of a monitor: both are better when larger.

    Args:
        key: of the monitor.
        name: prefix of all keys.
        part: "/" and the name of a probe, for the keys of that probe alone.
    """
    return any(key == start or str(key).startswith(f"{start}/") for start in (f"{name}{part}", f"{name}_gain{part}"))


class Journal:
    """The results of a :class:`~lightning_logme.LogMECallback`.

    Args:
        name: prefix of all keys.
        plots: whether loggers that can show them get histograms and figures.

    Attributes:
        history: one dict a pass and key, oldest first.
        evidence: by key, the last.
        curves: by key, the last.
    """

    def __init__(self, name: str, plots: bool) -> None:
        self.name = name
        self.plots = plots
        self.history: list[Row] = []
        self.evidence: dict[str, Evidence] = {}
        self.curves: dict[str, list[CurvePoint]] = {}
        self._figures: dict[str, dict[str, Any]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, which torch loads without trust."""
        return {"history": list(self.history), "evidence": dict(self._figures)}

    def load_state_dict(self, state_dict: Mapping[str, Any], keep: bool) -> None:
        """Take up what a checkpoint holds; ``keep`` what has come since, or undo it."""
        if not is_state(state_dict):
            warnings.warn(
                f"{self.name}: the checkpoint holds a history in a form that is not known; it is left out.",
                stacklevel=2,
            )
            state_dict = {"history": [], "evidence": {}}
        if not keep:
            self.history, self._figures = [], {}
        self.history = merge(list(state_dict["history"]), self.history)
        self._figures = {**state_dict["evidence"], **self._figures}

    def enter(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        collector: Collector,
        sources: Sequence[str],
        *,
        probe: str | None = None,
        head: str = HEAD,
        loaders: int = 1,
        class_names: Sequence[str] | None = None,
        position: tuple[int, int] | None = None,
    ) -> None:
        """Log, remember and draw what a pass has shown, by source and loader; by all processes in step.

        Args:
            trainer: of the run.
            pl_module: logs.
            collector: of the pass.
            sources: names of what was scored.
            probe: whose samples they were; None for the validation set.
            head: the source that stands for the head's input, which a module may not have.
            loaders: how many validation loaders there are.
            class_names: for the figure.
            position: epoch and step of the weights, where they are not the trainer's own.
        """
        results = dict(collector.results(trainer.strategy.root_device, alone=trainer.world_size == 1))
        prefix = "" if probe is None else f"/{probe}"
        for index in range(loaders):
            ending = f"/dataloader_idx_{index}" if loaders > 1 else ""
            if not (collector.broken or collector.unseen[index] or any(loader == index for _, loader in results)):
                loader = "the validation loader" if probe is None else "its loader"
                warnings.warn(f"{self.name}{prefix}{ending} is NaN: {loader} gave no batch.", stacklevel=2)
            suffixes = {source: prefix + (f"/{source}" if source else "") + ending for source in sources}
            known = {source: results.get((source or head, index)) for source in sources}
            for source, suffix in suffixes.items():
                result = known[source]
                in_bar = probe is None and not source  # what belongs to a layer or a probe would crowd it
                self._enter(trainer, pl_module, suffix, result, collector.curve, position, in_bar)
                if result is not None:
                    key = self.name + suffix
                    self._draw(trainer, log_plots, key, result.evidence, class_names)
            curves = {source or "head": result.curve for source, result in known.items() if result is not None}
            self._draw(trainer, self._draw_sources, prefix + ending, suffixes, curves)

    def _enter(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        suffix: str,
        result: Result | None,
        curve: bool,
        position: tuple[int, int] | None,
        in_bar: bool,
    ) -> None:
        """Log and remember one result; None stands for NaN."""
        key = self.name + suffix
        numbers = _NOTHING if result is None else figures(result.evidence)
        for logged, value in ((key, numbers["logme"]), (f"{self.name}_gain{suffix}", numbers["gain"])):
            try:
                # The values are equal on all ranks; sync_dist tells Lightning so.
                together = trainer.world_size > 1
                pl_module.log(logged, value, prog_bar=in_bar, sync_dist=together, add_dataloader_idx=False)
            except Exception as error:  # as where the module logs something under the same key
                warnings.warn(f"{logged} could not be logged: {type(error).__name__}: {error}", stacklevel=2)
        epoch, global_step = position or (trainer.current_epoch, trainer.global_step)
        fn = str(trainer.state.fn.value) if trainer.state.fn is not None else ""
        row: Row = {"epoch": epoch, "global_step": global_step, "key": key, "stage": fn}
        row |= {name: numbers[name] for name in _NOTHING}
        if curve:
            row["curve"] = [] if result is None else [list(point) for point in result.curve]
        self.history.append(row)
        if result is not None:
            self._figures[key], self.evidence[key], self.curves[key] = numbers, result.evidence, result.curve

    def _draw(self, trainer: Trainer, draw: Callable[..., None], *what: Any) -> None:
        """Draw for the loggers, at the step that ``pl_module.log`` counts."""
        if not (self.plots and trainer.is_global_zero):
            return
        try:
            step = trainer.fit_loop.epoch_loop._batches_that_stepped - int(trainer.training)  # as at an epoch's end
            draw(trainer.loggers, step, *what)
        except Exception as error:
            self.plots = False
            warnings.warn(
                f"LogMECallback draws no more plots, after an error: {type(error).__name__}: {error}", stacklevel=2
            )

    def _draw_sources(
        self,
        loggers: Sequence[Any],
        step: int,
        suffix: str,
        suffixes: Mapping[str, str],
        curves: Mapping[str, Sequence[CurvePoint]],
    ) -> None:
        """What compares the sources of one pass."""
        keys = {source: self.name + ending for source, ending in suffixes.items()}
        layers = {source: key for source, key in keys.items() if source not in (HEAD, LAYER_MEAN)}
        if len(layers) > 1:
            tag = f"{self.name}{suffix}/gain_by_layer"
            log_figure(loggers, step, tag, lambda: layers_figure(self.history, layers))
        if any(len(points) > 1 for points in curves.values()):
            log_figure(loggers, step, f"{self.name}{suffix}/gain_by_samples", lambda: curves_figure(curves))
