"""The results of a callback: log, store and draw them, and read them from checkpoints."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import torch

from lightning_logme.features.extractor import HEAD, LAYER_MEAN
from lightning_logme.scores.accuracy import METRICS, Accuracy
from lightning_logme.scores.curve import CurvePoint
from lightning_logme.scores.evidence import Evidence
from lightning_logme.scores.scoring import Scoring
from lightning_logme.tracking.keys import is_key, prefixes
from lightning_logme.tracking.validation import Key, Pass, Result
from lightning_logme.utilities.compat import LightningModule, Trainer, logged_step, rank_zero_info
from lightning_logme.utilities.loggers import Board
from lightning_logme.utilities.plots import by_samples, confusion, gain_by_layer, gain_by_output

Row = dict[str, Any]

_SHARDED_METADATA = "meta.pt"  # this file of a sharded checkpoint holds everything but the weights
_PER_OUTPUT = ("per_output", "null", "alpha", "beta", "effective_dim", "saturated")
_OUTPUTS = {"multilabel": "label", "regression": "target"}  # "class" in the other tasks
_NO_RESULT: dict[str, Any] = {"logme": math.nan, "gain": math.nan, "num_samples": 0}


class History:
    """The results of a :class:`~lightning_logme.LogMECallback`.

    Args:
        name: prefix of all keys.
        plots: whether to send histograms and figures to loggers; "auto" leaves out slow figures.

    Attributes:
        rows: one dict for each pass and key, oldest first.
        evidence: the last evidence of each key.
        accuracies: the last accuracy of each key.
        curves: the last curve of each key.
        position: epoch and step of weights from a checkpoint; None uses those of the trainer.
    """

    def __init__(self, name: str, plots: bool | Literal["auto"]) -> None:
        self.name = name
        self.rows: list[Row] = []
        self.evidence: dict[str, Evidence] = {}
        self.accuracies: dict[str, Accuracy] = {}
        self.curves: dict[str, list[CurvePoint]] = {}
        self.position: tuple[int, int] | None = None
        self._plots: bool | Literal["auto"] = plots
        self._board: Board | None = None
        self._numbers: dict[str, dict[str, Any]] = {}

    def prepare(self) -> None:
        """Prepare for a new run."""
        self.position, self._board = None, None

    def state_dict(self) -> dict[str, Any]:
        """Return the history and the evidence as plain numbers, which torch loads with ``weights_only=True``."""
        return {"history": list(self.rows), "evidence": dict(self._numbers)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state of a checkpoint. If a fit resumes from it, drop the rows that were recorded after it."""
        if not _is_state(state_dict):
            warnings.warn(
                f"{self.name}: the checkpoint holds a history in an unknown format, which is ignored.",
                stacklevel=2,
            )
            state_dict = {"history": [], "evidence": {}}
        if self.position is None:
            self.rows, self._numbers = [], {}
        known = set(map(repr, state_dict["history"]))  # as text, because NaN does not equal itself
        self.rows = list(state_dict["history"]) + [row for row in self.rows if repr(row) not in known]
        self._numbers = {**state_dict["evidence"], **self._numbers}

    def record(
        self,
        trainer: Trainer,
        module: LightningModule,
        current: Pass,
        results: Mapping[Key, Result | None],
        sources: Sequence[str],
        seconds: float,
        *,
        probe: str | None = None,
        head: str = HEAD,
        class_names: Sequence[str] | None = None,
        is_saving: bool = False,
    ) -> None:
        """Log, store and draw the results of a pass, for each source and loader. All processes call this together.

        Args:
            results: the results of the pass, the same in all processes.
            seconds: duration of the pass.
            probe: name of the probe; None for the validation set.
            head: the source that is logged under the key of the head; without a head, it is the last layer.
            is_saving: whether a checkpoint is being saved. Then ``module.log`` must not be called.
        """
        prefix = "" if probe is None else f"/{probe}"
        if self._board is None and trainer.is_global_zero and trainer.loggers:
            self._board = Board(trainer.loggers, self._plots, info=rank_zero_info)
        if self._board is not None:
            self._board.budget(seconds)
        for index in range(current.num_loaders):
            ending = f"/dataloader_idx_{index}" if current.num_loaders > 1 else ""
            if not (current.errors or current.unseen[index] or any(loader == index for _, loader in results)):
                loader = "the validation loader" if probe is None else "its loader"
                warnings.warn(f"{self.name}{prefix}{ending} is NaN: {loader} gave no batch.", stacklevel=2)
            suffixes = {source: prefix + (f"/{source}" if source else "") + ending for source in sources}
            of_loader = {source: results.get((source or head, index)) for source in sources}
            for source, suffix in suffixes.items():
                values = self._store(trainer, suffix, of_loader[source], current.scoring)
                in_bar = probe is None and not source  # the bar has no room for keys of layers and probes
                self._log(trainer, module, values, in_bar, is_saving)
            if self._board is not None:
                scoring, step = current.scoring, logged_step(trainer)
                self._draw(self._board, step, prefix + ending, suffixes, of_loader, scoring, class_names)

    def _store(self, trainer: Trainer, suffix: str, result: Result | None, scoring: Scoring) -> dict[str, float]:
        """Store one result (None becomes NaN), and return the values to log."""
        key = self.name + suffix
        numbers = _NO_RESULT if result is None else _plain(result.evidence)
        epoch, global_step = self.position or (trainer.current_epoch, trainer.global_step)
        stage = str(trainer.state.fn.value) if trainer.state.fn is not None else ""
        row: Row = {"epoch": epoch, "global_step": global_step, "key": key, "stage": stage}
        row |= {name: numbers[name] for name in _NO_RESULT}
        values = {key: numbers["logme"], f"{self.name}_gain{suffix}": numbers["gain"]}
        if scoring.accuracy:
            accuracy = (result and result.accuracy) or Accuracy(METRICS[scoring.task])
            measured = {accuracy.metric: accuracy.value, f"{accuracy.metric}_stderr": accuracy.stderr}
            row |= measured
            numbers = {**numbers, **measured}
            values[f"{self.name}_{accuracy.metric}{suffix}"] = accuracy.value
            if result is not None:
                self.accuracies[key] = accuracy
        if scoring.curve:
            row["curve"] = [] if result is None else [list(point) for point in result.curve]
        self.rows.append(row)
        if result is not None:
            self._numbers[key], self.evidence[key], self.curves[key] = numbers, result.evidence, result.curve
        return values

    def _log(
        self, trainer: Trainer, module: LightningModule, values: Mapping[str, float], in_bar: bool, is_saving: bool
    ) -> None:
        if is_saving:
            if self._board is not None:
                self._board.scalars(values, logged_step(trainer))
            return
        for key, value in values.items():
            try:
                # All processes have the same values; sync_dist tells Lightning so.
                is_synced = trainer.world_size > 1
                module.log(key, value, prog_bar=in_bar, sync_dist=is_synced, add_dataloader_idx=False)
            except Exception as error:  # for example, the module logs something else under this key
                warnings.warn(f"{key} could not be logged: {type(error).__name__}: {error}", stacklevel=2)

    def _draw(
        self,
        board: Board,
        step: int,
        suffix: str,
        suffixes: Mapping[str, str],
        of_loader: Mapping[str, Result | None],
        scoring: Scoring,
        class_names: Sequence[str] | None,
    ) -> None:
        """Draw the results of one loader."""
        keys = {source: self.name + ending for source, ending in suffixes.items()}
        results = {source: result for source, result in of_loader.items() if result is not None}
        output = _OUTPUTS.get(scoring.task, "class")
        for source, (evidence, accuracy, _) in results.items():
            key, gains = keys[source], (evidence.per_output - evidence.null)
            if not bool(gains.isfinite().any()):
                continue
            board.histogram(f"{key}/gain_per_output", gains, step)
            board.histogram(f"{key}/log10_spectrum", evidence.spectrum.log10(), step)
            mean, num_samples = float(evidence.gain), evidence.num_samples
            draw = partial(gain_by_output, gains.tolist(), mean, num_samples, class_names, output)
            board.figure(f"{key}/gain_by_output", draw, step)
            if source == HEAD and accuracy is not None and accuracy.confusion is not None:
                board.figure(f"{key}/confusion", partial(_confusion, accuracy, class_names), step)
        layers = {source: key for source, key in keys.items() if source not in (HEAD, LAYER_MEAN)}
        if len(layers) > 1:
            tag = f"{self.name}{suffix}/gain_by_layer"
            board.figure(tag, lambda: gain_by_layer(list(layers), self._gains(list(layers.values()))), step)
        curves = {source or "head": result.curve for source, result in results.items()}
        if not any(len(curve) > 1 for curve in curves.values()):
            return
        fields = {"gain": "gain"} | ({METRICS[scoring.task]: "accuracy"} if scoring.accuracy else {})
        for what, field in fields.items():
            points = {name: [(each.num_samples, getattr(each, field)) for each in one] for name, one in curves.items()}
            board.figure(f"{self.name}{suffix}/{what}_by_samples", partial(by_samples, points, what=what), step)

    def arrange(self, trainer: Trainer) -> None:
        """Put the scores, the gains, the accuracies and the module's own metrics side by side in TensorBoard.

        All processes call this together, after the metrics of a pass are logged: reading metrics may reduce them over
        processes.
        """
        logged = trainer.logged_metrics
        if self._board is not None:
            others = [key.split("/dataloader_idx_")[0] for key in logged if not is_key(key, self.name)]
            patterns = {key: rf"{re.escape(key)}(/dataloader_idx_\d+)?$" for key in others}
            own = [key for key in prefixes(self.name) if any(re.match(f"{re.escape(key)}(/|$)", one) for one in logged)]
            patterns = {key: f"{re.escape(key)}(/|$)" for key in own} | patterns
            charts = {key: ["Multiline", [pattern]] for key, pattern in patterns.items()}
            self._board.layout({self.name: charts})

    def _gains(self, keys: Sequence[str]) -> list[list[float]]:
        """Return one list for each validation, with the gain under each key."""
        validations: dict[tuple[Any, ...], dict[str, float]] = {}
        for row in self.rows:
            if row["key"] in keys:
                moment = row["stage"], row["epoch"], row["global_step"]
                validations.setdefault(moment, {})[row["key"]] = row["gain"]
        return [[gains.get(key, math.nan) for key in keys] for gains in validations.values()]


def _plain(evidence: Evidence) -> dict[str, Any]:
    """Return an evidence as plain numbers, without its large tensors."""
    return {
        "logme": float(evidence.score),
        "gain": float(evidence.gain),
        "num_samples": int(evidence.num_samples),
        **{name: getattr(evidence, name).tolist() for name in _PER_OUTPUT},
    }


def _confusion(accuracy: Accuracy, class_names: Sequence[str] | None) -> Any:
    assert accuracy.confusion is not None
    return confusion(accuracy.confusion.tolist(), accuracy.value, accuracy.stderr, class_names)


def read_history(path: str | PathLike[str]) -> list[Row]:
    """Return the history of LogME in a Lightning checkpoint.

    Args:
        path: a ``.ckpt`` file, or the folder that a sharded strategy writes. It is read with ``weights_only=True``, so
            no code in it is executed.

    Returns:
        One dict for each validation and key, oldest first: ``epoch``, ``global_step``, ``key`` (the logged name),
        ``logme`` and ``gain`` (nats per sample), ``num_samples`` and ``stage`` ("fit" or "validate"). With accuracy,
        also ``accuracy`` and ``accuracy_stderr``, or ``r2`` and ``r2_stderr``, or ``f1`` and ``f1_stderr``.

    Raises:
        ValueError: the file has no LogME history, is not a complete checkpoint, or holds objects that could run code.
        OSError: the file does not exist or cannot be opened.
    """
    return [row for state in _states(path) for row in state["history"]]


def read_evidence(path: str | PathLike[str]) -> dict[str, dict[str, Any]]:
    """Return the last evidence of each logged key in a Lightning checkpoint, as plain numbers.

    Args:
        path: a checkpoint, read as in :func:`read_history`.

    Returns:
        A dict for each key: ``logme``, ``gain``, ``num_samples`` and the accuracy, as in :func:`read_history`, and
        lists with one number for each output: ``per_output``, ``null``, ``alpha``, ``beta``, ``effective_dim`` and
        ``saturated``, as in :class:`~lightning_logme.Evidence`.

    Raises:
        ValueError, OSError: as in :func:`read_history`.
    """
    return {key: numbers for state in _states(path) for key, numbers in state["evidence"].items()}


def _is_state(value: Any) -> bool:
    """Return whether a value has the form of a LogMECallback's state."""
    if not (isinstance(value, Mapping) and {"history", "evidence"} <= value.keys()):
        return False
    history, evidence = value["history"], value["evidence"]
    plain = isinstance(history, list) and all(isinstance(row, dict) and _is_plain(row) for row in history)
    return plain and isinstance(evidence, dict) and all(isinstance(numbers, dict) for numbers in evidence.values())


def _is_plain(row: Row) -> bool:
    values = (row.get(name) for name in ("key", "stage", "epoch", "global_step"))
    return all(isinstance(value, (str, int, NoneType)) for value in values)


def _states(path: str | PathLike[str]) -> list[dict[str, Any]]:
    file = Path(path)
    if file.is_dir():
        file /= _SHARDED_METADATA
    with file.open("rb") as opened:
        try:
            checkpoint = torch.load(opened, map_location="cpu", weights_only=True)
        except Exception as error:
            cause = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"{str(path)!r} cannot be read: it is not a complete checkpoint, or holds objects that could run code "
                f"({type(error).__name__}: {cause})."
            ) from error
    callbacks = checkpoint.get("callbacks") if isinstance(checkpoint, dict) else None
    states = [state for state in callbacks.values() if _is_state(state)] if isinstance(callbacks, dict) else []
    if not states:
        raise ValueError(
            f"{str(path)!r} holds no history of LogME; it must be a Lightning checkpoint of a run with LogMECallback, "
            "saved without save_weights_only=True."
        )
    return states
