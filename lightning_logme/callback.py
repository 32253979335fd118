"""LogME at every validation of a Lightning Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_logme.batch import TargetSpec, conform_target, describe_target, find_mask, find_target
from lightning_logme.collector import Collector
from lightning_logme.distributed import number_of_loaders, rows_without_padding, validation_loader
from lightning_logme.evidence import Evidence
from lightning_logme.history import Row, figures, merge
from lightning_logme.moments import Task, check_task
from lightning_logme.plots import log_plots
from lightning_logme.sources import Sources, attach
from lightning_logme.taps import Pooling, check_pooling, pool

if TYPE_CHECKING:
    _AnyCallback = Callback
else:
    # `lightning` and `pytorch_lightning` are one code with classes of their own; a Trainer of either must know ours.
    try:
        from pytorch_lightning import Callback as _StandaloneCallback

        class _AnyCallback(Callback, _StandaloneCallback):
            pass
    except ImportError:
        _AnyCallback = Callback


class LogMECallback(_AnyCallback):
    """Track how well the features of a network suit the labels of its validation set, at every validation.

    The input of the classifier head is collected while ``validation_step`` runs, as additive moments on the device,
    and turned into the log of maximum evidence (see :func:`lightning_logme.functional.logme`) when validation ends. No
    forward pass is added, and no feature is kept. Logged with ``pl_module.log``, so that
    ``ModelCheckpoint(monitor="logme", mode="max")``, ``EarlyStopping``, the progress bar and every logger see them in
    the same epoch:

    - ``logme`` and ``logme_gain``: the score, and what it exceeds the score of useless features by, in nats per sample;
    - ``logme/<layer>`` and ``logme_gain/<layer>`` for each of ``layers``;
    - with Lightning's suffix ``/dataloader_idx_<i>`` where there are several validation loaders.

    Checkpoints carry the history: see :func:`lightning_logme.read_history`.

    Args:
        head: dotted name of the module whose **input** is the feature; None finds the classifier head and says which
            it took.
        layers: dotted names of modules whose **output** is scored as well.
        task: "binary", "multiclass", "multilabel" or "regression".
        num_classes: the number of classes or labels; None takes what the head puts out.
        target: where the labels are in a batch: a key, an index, or a callable(batch) -> Tensor; None finds them in
            the usual forms.
        pooling: how tokens (N, T, D) and maps (N, C, H, W) become (N, D): "auto" and "mean" average (tokens under the
            batch's attention mask), "cls" takes the first token, "last" the last one, a callable(Tensor) -> Tensor
            does what it does.
        name: prefix of everything that is logged; callbacks in one Trainer need different ones.
        fit_intercept: centre features and targets first. The papers do not.
        ignore_index: rows with this label are left out, as in ``torch.nn.functional.cross_entropy``; has no part in
            regression.
        class_names: names of the outputs for the figure.
        plots: whether loggers that can show them get histograms and a figure at every validation.

    Raises:
        ValueError: an argument does not fit; when the run starts, a module is not found or the head cannot be told; on
            the first batch, features or labels do not fit. After the first batch nothing raises: the validation is
            logged as NaN with a warning.

    Attributes:
        history: one dict a validation and key, oldest first, as :func:`lightning_logme.read_history` returns it.
        evidence: by key, the last :class:`~lightning_logme.Evidence`, on the CPU.

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
        head: str | None = None,
        *,
        layers: Sequence[str] = (),
        task: Task = "multiclass",
        num_classes: int | None = None,
        target: TargetSpec = None,
        pooling: Pooling = "auto",
        name: str = "logme",
        fit_intercept: bool = False,
        ignore_index: int | None = -100,
        class_names: Sequence[str] | None = None,
        plots: bool = True,
    ) -> None:
        check_task(task)
        check_pooling(pooling)
        if isinstance(layers, str):
            raise ValueError(
                f"layers must be a sequence of names, got the string {layers!r}; write layers=[{layers!r}]."
            )
        if head is not None and not isinstance(head, str):
            raise ValueError(
                f"head must be the dotted name of a module, such as 'model.fc', got {type(head).__name__}."
            )
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes must be a positive integer, got {num_classes!r}.")
        if not name:
            raise ValueError("name must not be empty: it is the key that is logged.")
        self.head = head
        self.layers = tuple(layers)
        self.task: Task = task
        self.num_classes = num_classes
        self.target = target
        self.pooling: Pooling = pooling
        self.name = name
        self.fit_intercept = fit_intercept
        self.ignore_index = None if task == "regression" else ignore_index
        self.class_names = class_names
        self.plots = plots

        self.history: list[Row] = []
        self.evidence: dict[str, Evidence] = {}
        self._figures: dict[str, dict[str, Any]] = {}

        # Of a run
        self._sources = Sources()
        self._announced = False
        self._explained = False
        self._origin: tuple[str, str | None] = "", None
        self._proven = False  # whether a batch has gone through: errors raise before, and warn after
        self._checkpoint_position: tuple[int, int] | None = None
        # Of a validation
        self._collector: Collector | None = None
        # Of a batch
        self._batch: Any = None
        self._labels: tuple[Tensor, Tensor | None] | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    # Hooks of Lightning, in the order in which they come

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._proven = False
        self._checkpoint_position = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:  # which restores its own position
            self._checkpoint_position = int(checkpoint.get("epoch", 0)), int(checkpoint.get("global_step", 0))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._checkpoint_position is None:  # the run goes on from the checkpoint, and what came later is undone
            self.history, self._figures = [], {}
        self.history = merge(list(state_dict["history"]), self.history)
        self._figures = {**state_dict["evidence"], **self._figures}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.enable_validation:
            self._attach(pl_module)
        else:
            rank_zero_warn(
                "LogMECallback scores the batches of validation_step, and this run has no validation: nothing will be "
                "logged."
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._sources.taps:
            self._attach(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._collector = Collector(
            self.task, self._sources.num_outputs, ignore_index=self.ignore_index, fit_intercept=self.fit_intercept
        )

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._attempt(batch_idx, self._start_batch, batch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._attempt(batch_idx, self._end_batch, trainer, batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        collector, self._collector = self._collector, None
        if trainer.sanity_checking or collector is None:
            return
        results = dict(collector.evidence(pl_module.device))
        loaders = number_of_loaders(trainer)
        for source in self._sources.taps:
            for index in range(loaders):
                suffix = (f"/{source}" if source else "") + (f"/dataloader_idx_{index}" if loaders > 1 else "")
                if (source, index) not in results and collector.broken is None:
                    warnings.warn(f"{self.name}{suffix} is NaN: the validation loader gave no batch.", stacklevel=2)
                self._publish(trainer, pl_module, suffix, results.get((source, index)))

    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self.history), "evidence": dict(self._figures)}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    # Steps

    def _attach(self, pl_module: LightningModule) -> None:
        """Find the modules, and listen to them for the whole run."""
        self._detach()
        self._sources = attach(pl_module, self.head, self.layers, self.task, self.num_classes)
        if self._sources.announcement and not self._announced:
            self._announced = True
            rank_zero_info(f"LogMECallback: {self._sources.announcement}.")

    def _detach(self) -> None:
        for tap in self._sources.taps.values():
            tap.remove()
        self._sources, self._collector, self._batch, self._labels = Sources(), None, None, None

    def _attempt(self, batch_idx: int, step: Callable[..., None], *args: Any) -> None:
        """Errors of a run's first batch are the user's to know at once; a later one must not end the run."""
        collector = self._collector
        if collector is None or collector.broken is not None:
            return
        try:
            step(collector, *args)
        except Exception as error:
            for tap in self._sources.taps.values():
                tap.stop()
            if not self._proven:
                raise
            collector.broken = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"{self.name} is NaN for this validation, after an error in batch {batch_idx}: {collector.broken}",
                stacklevel=2,
            )

    def _start_batch(self, collector: Collector, batch: Any) -> None:
        # Labels are read before validation_step, which may take them out of the batch.
        self._batch, self._labels = batch, None if batch is None else self._read(batch)
        for tap in self._sources.taps.values():
            tap.start()

    def _end_batch(self, collector: Collector, trainer: Trainer, batch: Any, dataloader_idx: int) -> None:
        # A validation_step that fetches its own batches (dataloader_iter) has had another one by now.
        target, mask = self._labels if self._labels and batch is self._batch else self._read(batch)
        first = collector.rows.get(dataloader_idx, 0)
        collector.rows[dataloader_idx] = first + len(target)
        real = rows_without_padding(validation_loader(trainer, dataloader_idx), first, len(target))
        pooled: list[str] = []
        for source, tap in self._sources.taps.items():
            seen = tap.take()
            if seen.ndim == 1 and len(target) == 1:  # a squeezed batch of one
                seen = seen[None]
            pooled += [f"{tap.name}: {tuple(seen.shape)}"] if seen.ndim > 2 else []
            features = pool(seen, self.pooling, None if source else self._sources.num_features, mask)
            if len(features) != len(target):
                raise ValueError(
                    f"{tap.name} gave {len(features)} features for {len(target)} labels, "
                    f"shapes {tuple(seen.shape)} and {tuple(target.shape)}; name a module that gives one feature a "
                    "label, or let pooling=callable make it one."
                )
            collector.add((source, dataloader_idx), features[:real], target[:real])
        self._check_class_names(self._sources.num_outputs or (target.shape[1] if target.ndim > 1 else 1))
        if not self._explained:
            self._explain(pooled, mask)
        self._batch, self._labels, self._proven = None, None, True

    def _explain(self, pooled: list[str], mask: Tensor | None) -> None:
        """Say once what was taken without being told, for a wrong guess would give a plausible number."""
        self._explained = True
        labels, rivals = self._origin
        how = "the callable" if callable(self.pooling) else repr(self.pooling)
        shapes = f"; pooled by {how}{' under attention_mask' if mask is not None else ''}: {', '.join(pooled)}"
        rank_zero_info(f"LogMECallback: the labels are {labels}{shapes if pooled else ''}.")
        if rivals:
            rank_zero_warn(
                f"LogMECallback took {labels} for the labels, and {rivals} could be as well; say which with target=."
            )

    def _check_class_names(self, num_outputs: int) -> None:
        if self.class_names is not None and len(self.class_names) != num_outputs:
            raise ValueError(
                f"class_names must hold one name for each of {num_outputs} outputs, got {len(self.class_names)}."
            )

    def _read(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        labels = conform_target(find_target(batch, self.target), self.task)
        if not self._explained:  # while the labels are still in the batch
            self._origin = describe_target(batch, self.target)
        return labels, find_mask(batch)

    def _publish(self, trainer: Trainer, pl_module: LightningModule, suffix: str, evidence: Evidence | None) -> None:
        """Log, remember and draw one result; None stands for NaN."""
        key = self.name + suffix
        nan = float("nan")
        numbers = {"logme": nan, "gain": nan, "num_samples": 0} if evidence is None else figures(evidence)
        for logged, value, in_bar in (
            (key, numbers["logme"], not suffix),
            (f"{self.name}_gain{suffix}", numbers["gain"], False),
        ):
            # The values are equal on all ranks; sync_dist tells Lightning so.
            pl_module.log(logged, value, prog_bar=in_bar, sync_dist=trainer.world_size > 1, add_dataloader_idx=False)
        epoch, global_step = self._checkpoint_position or (trainer.current_epoch, trainer.global_step)
        shared = {name: numbers[name] for name in ("logme", "gain", "num_samples")}
        fn = str(trainer.state.fn.value) if trainer.state.fn is not None else ""
        self.history.append({"epoch": epoch, "global_step": global_step, "key": key, **shared, "stage": fn})
        if evidence is None:
            return
        self._figures[key], self.evidence[key] = numbers, evidence
        if self.plots and trainer.is_global_zero:
            try:
                step = trainer.fit_loop.epoch_loop._batches_that_stepped  # as pl_module.log counts
                log_plots(trainer.loggers, key, evidence, self.class_names, step)
            except Exception as error:
                self.plots = False
                warnings.warn(
                    f"LogMECallback draws no more plots, after an error: {type(error).__name__}: {error}", stacklevel=2
                )
