"""The callback that computes LogME at every validation of a Lightning Trainer."""

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
from lightning_logme.scores.accuracy import Accuracy
from lightning_logme.scores.curve import CurvePoint
from lightning_logme.scores.evidence import Evidence
from lightning_logme.scores.scoring import Scoring
from lightning_logme.tracking.history import History, Row
from lightning_logme.tracking.keys import warn_of_minimised
from lightning_logme.tracking.probe import Probe
from lightning_logme.tracking.probes import Every, Probes
from lightning_logme.tracking.strategy import is_sharded, why_not_scored
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
    """A callback that tracks, at every validation, how well a network's features suit the labels of its validation set.

    The callback captures the input of the classifier head while ``validation_step`` runs, without an extra forward
    pass. It accumulates moments on the device, and turns them into the log of maximum evidence (see
    :func:`lightning_logme.functional.logme`) when validation ends. It calls ``pl_module.log``, so
    ``ModelCheckpoint(monitor="logme", mode="max")``, ``EarlyStopping``, the progress bar and every logger get the
    values in the same epoch. :class:`~lightning_logme.Ranking` explains how to read them. The keys are:

    - ``logme`` and ``logme_gain``: the score, and the score minus that of useless features, in nats per sample;
    - ``logme_accuracy``: the leave-one-out accuracy of the linear head behind the score; ``logme_r2`` in regression,
      ``logme_f1`` for "multilabel" (see :class:`~lightning_logme.Accuracy`);
    - ``logme/<layer>``, ``logme_gain/<layer>``, …: the same for each layer, and for ``layer_mean``;
    - ``logme/<probe>``, ``logme/<probe>/<layer>``, …: the same for each probe.

    With several validation loaders, keys of the validation set end in Lightning's suffix ``/dataloader_idx_<i>``.

    During a validation, each scored head or layer with D features needs a D × D matrix of float64 on the device, so L
    layers need L × D² × 8 bytes. Accuracy also needs the features of up to 2048 samples. Each loader needs that much,
    and each point of a ``curve`` needs one more matrix. Fewer than D samples are kept themselves, instead of matrices.

    Checkpoints contain the history: see :func:`lightning_logme.read_history`.

    Args:
        head: which feature is scored. "auto" finds the classifier head, reports it, and scores its **input**. A dotted
            name selects the head. With several names, the inputs of these heads are concatenated. None scores the
            output of the module's ``forward``.
        layers: dotted names of modules whose **output** is scored as well, or glob patterns such as
            "encoder.layer.*", where * matches anything but a dot.
        layer_mean: score the mean of the layers' pooled features as well.
        features: callable(module, batch) that returns the features, instead of ``head``. It runs an extra forward pass.
        task: "binary", "multiclass", "multilabel" or "regression".
        num_classes: the number of classes or labels. None takes the number of outputs of the head.
        target: where the labels are in a batch: a key, an index, or a callable(batch) -> Tensor. None takes the second
            item of a tuple, or an entry such as "labels".
        pooling: how tokens (N, T, D) and maps (N, C, H, W) become vectors (N, D). "auto" and "mean" average over
            tokens inside the batch's attention mask, or over the positions of a map; the layers that made the map show
            which axis holds its channels. "channels_first" and "channels_last" also average, and set that axis. "cls"
            takes the first token inside the mask, "last" the last one. A callable(Tensor) -> Tensor returns (N, D).
            Give one value for all, or a mapping by layer (name or pattern; "head" for the head).
        name: prefix of all logged keys. Two callbacks of one Trainer need different names.
        fit_intercept: centre features and targets first. The LogME papers do not.
        ignore_index: label of rows that are left out, as in ``torch.nn.functional.cross_entropy``. Not used in
            regression.
        normalize: scale the features of each sample to length 1. The LogME papers do not, but it often ranks better.
        class_names: names of the outputs, for the figure.
        plots: send histograms, figures and a layout to loggers that can show them, at every validation. "auto" leaves
            out figures if drawing them takes more than 5 % of the validation.
        accuracy: also measure the leave-one-out accuracy of the linear head, on at most 2048 random samples.
        curve: record the score of the first 32, 64, 128, … samples and of all samples (see ``curves``). With more than
            16 classes the curve starts at two samples per class. Samples of the validation set keep the order of its
            loader, so shuffle a sorted set once. Samples of a probe are in a random order.
        probes: labelled loaders of other tasks, or :class:`~lightning_logme.Probe` objects, by name. At each
            validation, or at the end of each epoch if the run has no validation, the module's forward runs on them in
            eval mode. Afterwards, the module is restored. The probes use the feature that ``head`` or ``features``
            selects. With ``layers`` and ``head="auto"``, the callback looks for a head only if the validation set is
            scored. Without a head, ``logme/<probe>`` is the score of the last layer. One batch of each probe runs
            in the sanity check, or before the first step if the run has no validation, so that mistakes surface early.
        probe_every: an integer k runs the probes at the first of every k validations; in the others, monitors see the
            last values. "checkpoint" runs them while a checkpoint is being saved. The results go into that checkpoint
            and to the loggers. They are too late for monitors, so no monitor may use them. Checkpoints that are saved
            with ``save_weights_only=True`` hold no state of callbacks, so the probes do not run for them.
        validation: score the validation set itself. Use False if it has no labels, or if you only need the probes.

    Raises:
        ValueError: an argument does not fit; at the start of a run, a module or the head is not found; on the first
            batch, features or labels do not fit; before training, a probe cannot be scored. Later, if a head or layer
            cannot be scored, it is logged as NaN, with a warning.

    Attributes:
        history: one dict for each validation and key, oldest first, as in :func:`lightning_logme.read_history`.
        evidence: the last :class:`~lightning_logme.Evidence` of each key, on the CPU.
        accuracies: the last :class:`~lightning_logme.Accuracy` of each key; empty with ``accuracy=False``.
        curves: the last curve of each key, a list of :class:`~lightning_logme.CurvePoint`, with ``curve=True``.

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
        accuracy: bool = True,
        curve: bool = False,
        probes: Mapping[str, Probe | DataLoader | Iterable[Any]] | None = None,
        probe_every: Every = 1,
        validation: bool = True,
    ) -> None:
        super().__init__()
        check_task(task)
        check_target(target)
        check_flags(accuracy=accuracy, curve=curve, normalize=normalize, validation=validation)
        if not isinstance(plots, bool) and plots != "auto":
            raise ValueError(f"plots must be True, False or 'auto', got {plots!r}.")
        decide_num_outputs(task, num_classes)  # raises if num_classes does not fit the task
        self.num_classes = num_classes
        ignore_index = None if task == "regression" else ignore_index
        check_options(task, ignore_index, fit_intercept)
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be a non-empty string, because it is the key that is logged, got {name!r}.")
        if not (validation or probes):
            raise ValueError("validation=False: without probes nothing would be scored; give probes=.")
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
        self.accuracy = accuracy
        self.curve = curve
        self.probes = Probes(probes, probe_every, accuracy)
        self._has_probes = bool(self.probes)
        self.validation = validation

        self._selection = Selection(head, self.layers, layer_mean, features, pooling)
        self._scoring = Scoring(task, None, ignore_index, fit_intercept, normalize, curve, accuracy)
        self._history = History(name, plots)
        self._validation = Validation(name, self._scoring, target, self.class_names, self._has_probes)
        self._reported: set[str] = set()  # messages that were already given
        # State of a run
        self._extractor: Extractor | None = None
        self._started = 0.0  # start time of the validation
        self._obstacle: str | None = None  # why nothing can be scored in this run

    @property
    def history(self) -> list[Row]:
        return self._history.rows

    @property
    def evidence(self) -> dict[str, Evidence]:
        return self._history.evidence

    @property
    def accuracies(self) -> dict[str, Accuracy]:
        return self._history.accuracies

    @property
    def curves(self) -> dict[str, list[CurvePoint]]:
        return self._history.curves

    @property
    def state_key(self) -> str:
        for other in callbacks_of_new_trainer():
            if isinstance(other, LogMECallback) and other is not self and other.name == self.name:
                raise ValueError(
                    f"name: two LogMECallbacks of one Trainer log under {self.name!r}; rename one of them, as in "
                    f"LogMECallback(name='{self.name}_2')."
                )
        return self._generate_state_key(name=self.name)

    # Hooks, in the order in which Lightning calls them

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._validation.prepare(alone=trainer.world_size == 1)
        self._history.prepare()
        if stage not in ("fit", "validate"):
            return
        if self.features is not None and is_sharded(trainer):
            raise ValueError(
                f"features: a callable runs extra forward passes, but under {type(trainer.strategy).__name__} all "
                "processes must run the same number; give layers= instead."
            )
        self._obstacle = why_not_scored(trainer, pl_module)
        if self._obstacle is not None:
            rank_zero_warn(f"{self.name} will not be scored: {self._obstacle}.")
            return
        if stage == "fit":
            warn_of_minimised(trainer, self.name)
        self.probes.prepare(trainer, self, self.name)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":  # in a fit, Lightning restores epoch and step itself
            self._history.position = int(checkpoint.get("epoch", 0)), int(checkpoint.get("global_step", 0))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._history.load_state_dict(state_dict)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.enable_validation or self.probes:
            self._attach(pl_module)
        else:
            rank_zero_warn(
                "LogMECallback logs nothing in this run: it scores the batches of validation_step, and the run has no "
                "validation."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # With validation, the probes are rehearsed in the sanity check.
        if not (trainer.enable_validation or self._obstacle or self._extractor is None):
            self.probes.rehearse(trainer, pl_module, self._extractor)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._extractor is None:
            self._attach(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter()
        if self.validation and self._extractor is not None and self._obstacle is None:
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
        if self._obstacle is not None or self._extractor is None:
            return
        current = self._validation.close(trainer.sanity_checking)
        if trainer.sanity_checking:
            self.probes.rehearse(trainer, pl_module, self._extractor)
            return
        if current is not None:
            results = current.results(trainer.strategy.root_device, alone=trainer.world_size == 1)
            seconds = time.perf_counter() - self._started
            sources, names = self._extractor.names, self.class_names
            self._history.record(trainer, pl_module, current, results, sources, seconds, class_names=names)
            if "width" not in self._reported:
                self._compare_width(trainer, current.num_loaders)
        if self._has_probes:
            self._run_probes(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._history.arrange(trainer)

    on_train_end = on_validation_end  # for the metrics of the last epoch, and for a run without validation

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation and self._obstacle is None:
            self._run_probes(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.probes.every == "checkpoint" and trainer.state.fn == "fit" and self._obstacle is None:
            try:
                self._run_probes(trainer, pl_module, is_saving=True)
            except Exception as error:  # an error must not lose the checkpoint
                warnings.warn(f"{self.name}: the probes failed: {type(error).__name__}: {error}", stacklevel=2)
            # Lightning collected the states of callbacks before this hook, without the new results.
            checkpoint.setdefault("callbacks", {})[self.state_key] = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return self._history.state_dict()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    # Helpers of the hooks

    def _attach(self, pl_module: LightningModule) -> None:
        """Attach hooks to the modules that are scored, for the whole run."""
        self._detach()
        self._extractor, announcement = attach_by_tree(
            pl_module, self._selection, self.task, self.num_classes, is_scored=self.validation
        )
        self.probes.check_names(self._extractor)
        if announcement is not None and "head" not in self._reported:
            self._reported.add("head")
            rank_zero_info(f"LogMECallback: {announcement}.")

    def _detach(self) -> None:
        self._validation.drop()
        if self._extractor is not None:
            self._extractor.remove()
            self._extractor = None

    def _compare_width(self, trainer: Trainer, num_loaders: int) -> None:
        """Report once if the head has more outputs than there are classes: it may not be the classifier."""
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
        self._reported.add("width")
        classes = int(known.max()) + 1
        if classes < head.outputs:
            rank_zero_info(
                f"LogMECallback: {head} has {head.outputs} outputs, but the labels have only {classes} classes (0 to "
                f"{classes - 1}). If it is not the classifier, give another head=, layers=[…] or head=None; if it is, "
                f"give num_classes={head.outputs}."
            )

    def _run_probes(self, trainer: Trainer, pl_module: LightningModule, is_saving: bool = False) -> None:
        if self._extractor is not None and self.probes.is_due(trainer, is_saving):
            self.probes.run(trainer, pl_module, self._extractor, self._history, self._scoring, is_saving)
