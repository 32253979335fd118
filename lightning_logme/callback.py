"""LogME at every validation of a Lightning Trainer."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from lightning_logme.features.extractor import HEAD, Extractor, Features
from lightning_logme.features.labels import TargetSpec, check_target
from lightning_logme.features.outputs import decide_num_outputs
from lightning_logme.features.pooling import Pooling
from lightning_logme.features.selection import AUTO, Selection, attach_by_tree
from lightning_logme.scores.curve import CurvePoint
from lightning_logme.scores.evidence import Evidence
from lightning_logme.scores.scoring import Scoring
from lightning_logme.tracking.history import History, Row, is_key
from lightning_logme.tracking.probe import Probe
from lightning_logme.tracking.probes import Every, Probes
from lightning_logme.tracking.strategy import is_sharded, why_out_of_step
from lightning_logme.tracking.validation import Validation
from lightning_logme.utilities.checks import Task, check_flags, check_options, check_task, names
from lightning_logme.utilities.compat import (
    AnyCallback,
    LightningModule,
    Trainer,
    callbacks_of_new_trainer,
    rank_zero_info,
    rank_zero_warn,
)

Plots = bool | Literal["auto"]


class LogMECallback(AnyCallback):
    """Track how well the features of a network suit the labels of its validation set, at every validation.

    The input of the classifier head is collected while ``validation_step`` runs, as additive moments on the device,
    and turned into the log of maximum evidence (see :func:`lightning_logme.functional.logme`) when validation ends. No
    forward pass is added. Logged with ``pl_module.log``, so that
    ``ModelCheckpoint(monitor="logme", mode="max")``, ``EarlyStopping``, the progress bar and every logger see them in
    the same epoch:

    - ``logme`` and ``logme_gain``: the score, and its distance from the score of useless features, in nats per sample;
    - ``logme/<layer>`` and ``logme_gain/<layer>`` for each of ``layers``, and for ``layer_mean``;
    - ``logme/<probe>`` and ``logme_gain/<probe>`` for each of ``probes``, and ``logme/<probe>/<layer>``;
    - with Lightning's suffix ``/dataloader_idx_<i>`` where there are several validation loaders.

    A source of D features takes a D × D matrix of float64 on the device while a pass lasts: L layers take L × D² × 8
    bytes, for every validation loader, and with ``curve`` for every doubling of the samples. While there are fewer than
    D samples, the features themselves are kept in its place.

    Checkpoints carry the history: see :func:`lightning_logme.read_history`.

    Args:
        head: where the feature is: "auto" finds the classifier head, reports which module it took, and scores its
            **input**; a dotted name names the head; several names stand for several heads, whose inputs are
            concatenated; None takes the output of the module's ``forward``.
        layers: dotted names of modules whose **output** is scored as well, or glob patterns such as
            "encoder.layer.*", in which * stands for one part of the name.
        layer_mean: score the mean of the layers' pooled features, too.
        features: callable(module, batch) -> features, in place of ``head``, for modules without one; costs a forward
            pass of its own.
        task: "binary", "multiclass", "multilabel" or "regression".
        num_classes: the number of classes or labels; None takes the number of outputs of the head.
        target: where the labels are in a batch: a key, an index, or a callable(batch) -> Tensor; None finds them in
            the usual forms.
        pooling: how tokens (N, T, D) and maps (N, C, H, W) become (N, D). "auto" and "mean" average, tokens under the
            batch's attention mask; the layers that made a map show which of its axes holds the channels.
            "channels_first" and "channels_last" average, too, and name that axis; "cls" takes the first token that is
            not masked, and "last" the last one; a callable(Tensor) -> Tensor returns (N, D). One for all, or a mapping
            by layer (name or pattern, "head" for the head's input).
        name: prefix of everything that is logged; callbacks in one Trainer need different ones.
        fit_intercept: centre features and targets first. The papers do not.
        ignore_index: rows with this label are left out, as in ``torch.nn.functional.cross_entropy``; not used in
            regression.
        normalize: scale the features of each sample to length 1. The papers do not; on real tasks it ranks better.
        class_names: names of the outputs for the figure.
        plots: whether loggers that can show them get histograms and figures at every validation. "auto" leaves out
            figures where drawing takes more than 5 % of the validation.
        curve: record the score of the first 32, 64, 128, … samples and of all (see ``curves``). With more than 16
            classes, the first point is at twice their number. Samples of the validation set come in the order of its
            loader, samples of a probe in a random order.
        probes: by name, labelled loaders of other tasks, or :class:`~lightning_logme.Probe`: at each validation, or at
            the end of each epoch in a run without one, the module's forward runs on them in eval mode, and leaves no
            trace. The feature is that of ``head`` or ``features``. Where ``layers`` are named and ``head`` is "auto", a
            head is looked for only if the validation set is scored; without one the last layer stands for it. One batch
            of each is run in the sanity check, or before the first step of a run without validation, so that mistakes
            surface early.
        probe_every: an integer k runs the probes at the first of every k validations; in between, monitors see the last
            values. "checkpoint" runs them while a checkpoint is being saved, and their results go into that checkpoint
            and to the loggers. That is too late for monitors: none may name a probe. Checkpoints saved with
            ``save_weights_only=True`` hold no state of callbacks, and do not run the probes.
        validation: whether the validation set itself is scored. False where it has no labels, and only probes are to
            be scored.

    Raises:
        ValueError: an argument does not fit; when the run starts, a module or the head is not found; on the first
            batch, features or labels do not fit; before training starts, a probe cannot be scored. After that nothing
            raises: a source that cannot be scored is logged as NaN, with a warning.

    Attributes:
        history: one dict a validation and key, oldest first, as :func:`lightning_logme.read_history` returns it.
        evidence: by key, the last :class:`~lightning_logme.Evidence`, on the CPU.
        curves: by key, the last list of :class:`~lightning_logme.CurvePoint`, where ``curve`` is on.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_logme import LogMECallback
        >>> callback = LogMECallback(target=lambda batch: batch.sum(1), task="regression")
        >>> trainer = Trainer(callbacks=callback, logger=False, enable_progress_bar=False, accelerator="cpu")
        >>> _ = trainer.validate(BoringModel(), verbose=False)
        >>> [(row["key"], row["num_samples"]) for row in callback.history]
        [('logme', 64)]
    """

    def __init__(
        self,
        head: str | Sequence[str] | None = AUTO,
        *,
        layers: Sequence[str] | None = (),
        layer_mean: bool = False,
        features: Features | None = None,
        task: Task = "multiclass",
        num_classes: int | None = None,
        target: TargetSpec = None,
        pooling: Pooling | Mapping[str, Pooling] = "auto",
        name: str = "logme",
        fit_intercept: bool = False,
        ignore_index: int | None = -100,
        normalize: bool = False,
        class_names: Sequence[str] | None = None,
        plots: Plots = "auto",
        curve: bool = False,
        probes: Mapping[str, Probe | DataLoader | Iterable[Any]] | None = None,
        probe_every: Every = 1,
        validation: bool = True,
    ) -> None:
        super().__init__()
        check_task(task)
        check_target(target)
        check_flags(curve=curve, normalize=normalize, validation=validation)
        if not isinstance(plots, bool) and plots != "auto":
            raise ValueError(f"plots must be True, False or 'auto', got {plots!r}.")
        decide_num_outputs(task, num_classes)  # raises where it cannot be
        self.num_classes = num_classes
        ignore_index = None if task == "regression" else ignore_index
        check_options(task, ignore_index, fit_intercept)
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"name must not be empty, and must be a string: it is the key that is logged; got {name!r}."
            )
        if not (validation or probes):
            raise ValueError("validation=False leaves nothing to score without probes.")
        self.head = head
        self.layers = () if layers is None else names("layers", layers)
        self.layer_mean = layer_mean
        self.features = features
        self.task: Task = task
        self.target = target
        self.pooling: Pooling | Mapping[str, Pooling] = pooling
        self.name = name
        self.fit_intercept = fit_intercept
        self.ignore_index = ignore_index
        self.normalize = normalize
        self.class_names = None if class_names is None else names("class_names", class_names)
        self.curve = curve
        self.probes = Probes(probes, probe_every)
        self.validation = validation

        self._selection = Selection(head, self.layers, layer_mean, features, pooling)
        self._scoring = Scoring(task, None, ignore_index, fit_intercept, normalize, curve)
        self._history = History(name, plots)
        self._validation = Validation(name, self._scoring, target, self.class_names, bool(self.probes))
        # State of a run
        self._extractor: Extractor | None = None
        self._started = 0.0  # when the validation began
        self._said: set[str] = set()  # what is reported once
        self._out_of_step: str | None = None

    @property
    def history(self) -> list[Row]:
        return self._history.rows

    @property
    def evidence(self) -> dict[str, Evidence]:
        return self._history.evidence

    @property
    def curves(self) -> dict[str, list[CurvePoint]]:
        return self._history.curves

    @property
    def state_key(self) -> str:
        for other in callbacks_of_new_trainer():
            if isinstance(other, LogMECallback) and other is not self and other.name == self.name:
                raise ValueError(
                    f"name: two LogMECallbacks of one Trainer log under {self.name!r}; give one of them another, as in "
                    f"LogMECallback(name='{self.name}_2')."
                )
        return self._generate_state_key(name=self.name)

    # Hooks of Lightning, in the order in which they come

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._validation.prepare(alone=trainer.world_size == 1)
        self._history.prepare()
        if stage not in ("fit", "validate"):
            return
        if self.features is not None and is_sharded(trainer):
            raise ValueError(
                f"features=callable makes forward passes of its own, which cannot be run under "
                f"{type(trainer.strategy).__name__}, whose processes must make as many as each other; name layers."
            )
        self._out_of_step = why_out_of_step(trainer, pl_module)
        if self._out_of_step is not None:
            rank_zero_warn(f"{self.name} will not be scored: {self._out_of_step}.")
            return
        if stage == "fit":
            self._check_monitors(trainer)
        self.probes.prepare(trainer, self, self.name)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":  # a fit restores epoch and step itself
            self._history.position = int(checkpoint.get("epoch", 0)), int(checkpoint.get("global_step", 0))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._history.load_state_dict(state_dict)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.enable_validation or self.probes:
            self._attach(pl_module)
        else:
            rank_zero_warn(
                "LogMECallback scores the batches of validation_step, and this run has no validation: nothing will be "
                "logged."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (trainer.enable_validation or self._out_of_step or self._extractor is None):  # else in the sanity check
            self.probes.rehearse(trainer, pl_module, self._extractor)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._extractor is None:
            self._attach(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter()
        if self.validation and self._extractor is not None and self._out_of_step is None:
            self._validation.open(self._extractor, trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._validation.start_batch(batch, dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._validation.end_batch(trainer, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._out_of_step is not None or self._extractor is None:
            return
        current = self._validation.close(trainer.sanity_checking)
        if trainer.sanity_checking:
            self.probes.rehearse(trainer, pl_module, self._extractor)
            return
        if current is not None:
            seconds = time.perf_counter() - self._started
            sources = self._extractor.names
            self._history.record(trainer, pl_module, current, sources, seconds, class_names=self.class_names)
            if "width" not in self._said:
                self._compare_width(trainer, current.num_loaders)
        if self.probes:
            self._run_probes(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._history.arrange(trainer)

    on_train_end = on_validation_end  # for the metrics of the last epoch, and for a run without validation

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation and self._out_of_step is None:
            self._run_probes(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.probes.every == "checkpoint" and trainer.state.fn == "fit" and self._out_of_step is None:
            try:
                self._run_probes(trainer, pl_module, is_saving=True)
            except Exception as error:  # a checkpoint must not be lost
                warnings.warn(f"{self.name}: the probes failed: {type(error).__name__}: {error}", stacklevel=2)
            # Lightning has collected the states of callbacks before.
            checkpoint.setdefault("callbacks", {})[self.state_key] = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return self._history.state_dict()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    # Steps

    def _check_monitors(self, trainer: Any) -> None:
        """Warn of callbacks that would keep the worst features: their mode is "min" unless it is given."""
        for callback in trainer.callbacks:
            key = getattr(callback, "monitor", None)
            if is_key(key, self.name) and getattr(callback, "mode", None) == "min":
                name = type(callback).__name__
                rank_zero_warn(
                    f"monitor: {name} takes the lowest {key!r} for the best, and higher is better; write "
                    f"{name}(monitor={key!r}, mode='max')."
                )

    def _attach(self, pl_module: LightningModule) -> None:
        """Find the modules, and capture from them for the whole run."""
        self._detach()
        self._extractor, announcement = attach_by_tree(
            pl_module, self._selection, self.task, self.num_classes, is_scored=self.validation
        )
        self.probes.check_names(self._extractor)
        if announcement is not None and "head" not in self._said:
            self._said.add("head")
            rank_zero_info(f"LogMECallback: {announcement}.")

    def _detach(self) -> None:
        self._validation.drop()
        if self._extractor is not None:
            self._extractor.remove()
            self._extractor = None

    def _compare_width(self, trainer: Trainer, num_loaders: int) -> None:
        """Report once where the head has outputs that no label names: it may not be the classifier."""
        head = None if self._extractor is None else self._extractor.sources.get(HEAD)
        if head is None or head.outputs is None or self.num_classes is not None or self.task != "multiclass":
            return
        if trainer.limit_val_batches != 1.0 or getattr(trainer, "fast_dev_run", False):
            return
        keys = [self.name, *(f"{self.name}/dataloader_idx_{index}" for index in range(num_loaders))]
        present = [self.evidence[key].per_output.isfinite() for key in keys if key in self.evidence]
        known = torch.stack(present).any(0).nonzero() if present else torch.empty(0)
        if len(known) == 0:
            return
        self._said.add("width")
        classes = int(known.max()) + 1
        if classes < head.outputs:
            rank_zero_info(
                f"LogMECallback: {head} has {head.outputs} outputs, and the labels have {classes} classes (0 to "
                f"{classes - 1}). If it is not the classifier, name another head=, or layers=[…], or write head=None; "
                f"if it is, num_classes={head.outputs} says so."
            )

    def _run_probes(self, trainer: Trainer, pl_module: LightningModule, is_saving: bool = False) -> None:
        if self._extractor is not None and self.probes.is_due(trainer, is_saving):
            self.probes.run(trainer, pl_module, self._extractor, self._history, self._scoring, is_saving)
