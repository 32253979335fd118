"""LogME at every validation of a Lightning Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_logme.arguments import check_flags, check_options, check_task, names, positive_or_none
from lightning_logme.attach import AUTO, Head, attach, check_poolings, checked_head
from lightning_logme.batch import TargetSpec, check_target
from lightning_logme.curve import CurvePoint
from lightning_logme.distributed import is_sharded, number_of_loaders, why_out_of_step
from lightning_logme.evidence import Evidence
from lightning_logme.history import Row
from lightning_logme.journal import Journal, is_key
from lightning_logme.moments import Task
from lightning_logme.packages import (
    AnyCallback,
    LightningModule,
    Trainer,
    callbacks_of_new_trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_logme.pooling import Pooling
from lightning_logme.probe import Probe
from lightning_logme.probes import Every, Probes
from lightning_logme.sources import Features, Sources
from lightning_logme.validation import Validation


class LogMECallback(AnyCallback):
    """Track how well the features of a network suit the labels of its validation set, at every validation.

    The input of the classifier head is collected while ``validation_step`` runs, as additive moments on the device,
    and turned into the log of maximum evidence (see :func:`lightning_logme.functional.logme`) when validation ends. No
    forward pass is added, and no feature is kept. Logged with ``pl_module.log``, so that
    ``ModelCheckpoint(monitor="logme", mode="max")``, ``EarlyStopping``, the progress bar and every logger see them in
    the same epoch:

    - ``logme`` and ``logme_gain``: the score, and what it exceeds the score of useless features by, in nats per sample;
    - ``logme/<layer>`` and ``logme_gain/<layer>`` for each of ``layers``, and for ``layer_mean``;
    - ``logme/<probe>`` and ``logme_gain/<probe>`` for each of ``probes``, and ``logme/<probe>/<layer>``;
    - with Lightning's suffix ``/dataloader_idx_<i>`` where there are several validation loaders.

    A source of D features takes a D × D matrix of float64 on the device while a pass lasts: L layers take L × D² × 8
    bytes, for every validation loader, and with ``curve`` for every doubling of the samples.

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
        num_classes: the number of classes or labels; None takes what the head puts out.
        target: where the labels are in a batch: a key, an index, or a callable(batch) -> Tensor; None finds them in
            the usual forms.
        pooling: how tokens (N, T, D) and maps (N, C, H, W) become (N, D). "auto" and "mean" average, tokens under the
            batch's attention mask; the layers that made a map show which of its axes holds the channels.
            "channels_first" and "channels_last" average and say it; "cls" takes the first token and "last" the last one
            that are not masked; a callable(Tensor) -> Tensor does it itself. One for all, or a mapping by layer (name
            or pattern, "head" for the head's input).
        name: prefix of everything that is logged; callbacks in one Trainer need different ones.
        fit_intercept: centre features and targets first. The papers do not.
        ignore_index: rows with this label are left out, as in ``torch.nn.functional.cross_entropy``; has no part in
            regression.
        class_names: names of the outputs for the figure.
        plots: whether loggers that can show them get histograms and figures at every validation.
        curve: record the score at 32, 64, 128, … samples and at all (see ``curves``); of more than 16 classes it begins
            at twice their number. In the order in which samples come: of the validation set its loader's, of a probe a
            random one.
        probes: by name, labelled loaders of other tasks, or :class:`~lightning_logme.Probe`: at each validation, or at
            the end of each epoch in a run without one, the module's forward runs on them in eval mode, and leaves no
            trace. The feature is that of ``head`` or ``features``. Where ``layers`` are named and ``head`` is "auto", a
            head is looked for only if the validation set is scored; without one the last layer stands for it. One batch
            of each is run in the sanity check, or before the first step of a run without validation, so that mistakes
            surface early.
        probe_every: run the probes at the first of every so many validations, or "checkpoint" for those only whose
            weights a ModelCheckpoint will save. Between them monitors see the values of the last time.
        validation: whether the validation set itself is scored. Where there are probes, and nothing is said of its
            labels (``target``, ``num_classes``, ``class_names``), one that cannot be scored is left out with a warning;
            False leaves it out.

    Raises:
        ValueError: an argument does not fit; when the run starts, a module or the head is not found; on the first
            batch, features or labels do not fit; before training starts, a probe cannot be scored. After that nothing
            raises: a source that cannot be scored is logged as NaN, with a warning.

    Attributes:
        history: one dict a validation and key, oldest first, as :func:`lightning_logme.read_history` returns it.
        evidence: by key, the last :class:`~lightning_logme.Evidence`, on the CPU.
        curves: by key, the last list of :class:`~lightning_logme.curve.CurvePoint`, where ``curve`` is on.

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
        class_names: Sequence[str] | None = None,
        plots: bool = True,
        curve: bool = False,
        probes: Mapping[str, Probe | DataLoader | Iterable[Any]] | None = None,
        probe_every: Every = 1,
        validation: bool = True,
    ) -> None:
        super().__init__()
        check_task(task)
        check_poolings(pooling)
        check_target(target)
        check_flags(layer_mean=layer_mean, plots=plots, curve=curve, validation=validation)
        layers = () if layers is None else names("layers", layers)
        class_names = None if class_names is None else names("class_names", class_names)
        head = checked_head(head)
        num_classes = positive_or_none("num_classes", num_classes)
        ignore_index = None if task == "regression" else ignore_index
        check_options(task, ignore_index, fit_intercept)
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"name must not be empty, and must be a string: it is the key that is logged; got {name!r}."
            )
        if layer_mean and not layers:
            raise ValueError("layer_mean is the mean of layers: name them, as in layers=['encoder.layer.*'].")
        if features is not None and (head != AUTO or not callable(features)):
            raise ValueError(
                f"features must be callable(module, batch), and takes the place of head; got features={features!r} and "
                f"head={head!r}."
            )
        if not (validation or probes):
            raise ValueError("validation=False leaves nothing to score without probes.")
        self.head: Head = head
        self.layers = layers
        self.layer_mean = layer_mean
        self.features = features
        self.task: Task = task
        self.num_classes = num_classes
        self.target = target
        self.pooling = pooling
        self.name = name
        self.fit_intercept = fit_intercept
        self.ignore_index = ignore_index
        self.class_names = class_names
        self.curve = curve
        self.probes = Probes(probes, probe_every)
        self.validation = validation

        # Setting `target`, `num_classes` or `class_names` means that the validation set must be scored.
        self._optional = bool(self.probes) and target is None and num_classes is None and class_names is None
        self._journal = Journal(name, plots)
        self._validation = Validation(
            name,
            task,
            target,
            class_names,
            optional=self._optional,
            curve=curve,
            ignore_index=self.ignore_index,
            fit_intercept=fit_intercept,
        )
        # Of a run
        self._sources = Sources()
        self._announced = False
        self._compared = False
        self._checkpoint_position: tuple[int, int] | None = None
        self._out_of_step: str | None = None

    @property
    def history(self) -> list[Row]:
        return self._journal.history

    @property
    def evidence(self) -> dict[str, Evidence]:
        return self._journal.evidence

    @property
    def curves(self) -> dict[str, list[CurvePoint]]:
        return self._journal.curves

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
        self._checkpoint_position = None
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
        if trainer.state.fn != "fit":  # which restores its own position
            self._checkpoint_position = int(checkpoint.get("epoch", 0)), int(checkpoint.get("global_step", 0))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A run that continues from the checkpoint drops the rows that came later.
        self._journal.load_state_dict(state_dict, keep=self._checkpoint_position is not None)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.enable_validation or self.probes:
            self._attach(pl_module)
        else:
            rank_zero_warn(
                "LogMECallback scores the batches of validation_step, and this run has no validation: nothing will be "
                "logged."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation:  # or the sanity check has done so
            self.probes.rehearse(trainer, pl_module, self._sources)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._sources.names:
            self._attach(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.validation and self._out_of_step is None:
            self._validation.open(self._sources, trainer.global_rank, trainer.world_size)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._validation.start_batch(batch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._validation.end_batch(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._out_of_step is not None:
            return
        collector = self._validation.close(trainer.sanity_checking)
        if trainer.sanity_checking:
            self.probes.rehearse(trainer, pl_module, self._sources)
            return
        if collector is not None:
            self._journal.enter(
                trainer,
                pl_module,
                collector,
                self._sources.names,
                loaders=number_of_loaders(trainer),
                class_names=self.class_names,
                position=self._checkpoint_position,
            )
            self._compare_width(trainer)
        self._run_probes(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation and self._out_of_step is None:
            self._run_probes(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return self._journal.state_dict()

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
        """Find the modules, and listen to them for the whole run."""
        self._detach()
        self._sources = attach(
            pl_module,
            self.head,
            self.layers,
            self.task,
            self.num_classes,
            features=self.features,
            layer_mean=self.layer_mean,
            pooling=self.pooling,
            optional=self._optional or not self.validation,
            validated=self.validation,
        )
        self.probes.check_names(self._sources)
        if self._sources.announcement and not self._announced:
            self._announced = True
            rank_zero_info(f"LogMECallback: {self._sources.announcement}.")

    def _compare_width(self, trainer: Trainer) -> None:
        """Report once where the head has outputs that no label names: it may not be the classifier."""
        head = self._sources.head
        if head is None or head.outputs is None or self.num_classes is not None or self.task != "multiclass":
            return
        if self._compared or trainer.limit_val_batches != 1.0 or getattr(trainer, "fast_dev_run", False):
            return
        keys = [self.name, *(f"{self.name}/dataloader_idx_{index}" for index in range(number_of_loaders(trainer)))]
        present = [self.evidence[key].per_output.isfinite() for key in keys if key in self.evidence]
        known = torch.stack(present).any(0).nonzero() if present else torch.empty(0)
        if len(known) == 0:
            return
        self._compared = True
        classes = int(known.max()) + 1
        if classes < head.outputs:
            rank_zero_info(
                f"LogMECallback: {head} has {head.outputs} outputs, and the labels have {classes} classes (0 to "
                f"{classes - 1}). If it is not the classifier, name another head=, or layers=[…], or write head=None; "
                f"if it is, num_classes={head.outputs} says so."
            )

    def _detach(self) -> None:
        self._sources.remove()
        self._validation.drop()
        self._sources = Sources()

    def _run_probes(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.probes.run(
            trainer,
            pl_module,
            self._sources,
            self._journal,
            self._checkpoint_position,
            curve=self.curve,
            fit_intercept=self.fit_intercept,
        )
