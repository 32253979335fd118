"""A probe: labelled samples of another task, and a run of the module on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lightning_logme.features.calling import Forward, call, copied
from lightning_logme.features.extractor import Errors, Extractor
from lightning_logme.features.hooks import NotCalledError
from lightning_logme.features.isolation import same_generators, undisturbed
from lightning_logme.features.labels import Labels, Target, TargetSpec, check_target, find_mask
from lightning_logme.features.sampling import Portion, Samples
from lightning_logme.scores.scoring import Scoring
from lightning_logme.tracking.held_out import HeldOut
from lightning_logme.tracking.validation import Key, Pass, Result
from lightning_logme.utilities.checks import Task, check_options, check_task, positive_or_none
from lightning_logme.utilities.compat import LightningModule, Trainer, prepared_batch
from lightning_logme.utilities.distributed import reason_of, release

_BAR_DELAY = 2.0  # seconds before a progress bar appears


class Probe:
    """A labelled loader of a target task, for :class:`~lightning_logme.LogMECallback`.

    Samples are read as in :func:`~lightning_logme.rank_backbones`. From a map-style data set, the probe takes all
    samples that the sampler would give, each once, in a fixed random order, stratified by class. From any other loader,
    every process reads all batches in order and keeps its share. Batches pass through the batch hooks of the
    module and its data module, such as ``on_after_batch_transfer``, as in validation. Labels are read before the hooks.

    Args:
        dataloader: a loader of batches with labels, which can be iterated over repeatedly.
        test: a loader of test samples of the same task. The linear head is fitted to ``dataloader``, and
            ``logme_accuracy`` is its accuracy on this loader: the linear-probe protocol of papers. Score, gain and
            ``curve`` still come from ``dataloader``. None measures leave-one-out accuracy.
        task: "binary", "multiclass", "multilabel" or "regression".
        num_classes: K for "multiclass", or the number of labels for "multilabel". None counts the labels of a data set
            that exposes them (``targets``, ``labels``, the tensors of a TensorDataset; also through Subset).
        target: where the labels are in a batch: a key, an index, or a callable(batch) -> Tensor. None takes the second
            item of a tuple, or an entry such as "labels".
        forward: callable(module, batch) that runs the module. None calls module(inputs) or module(**batch).
        limit_batches: how many batches of each loader to use; None uses all.
        ignore_index: label of rows that are left out. Not used in regression.

    Raises:
        ValueError: an argument does not fit.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_logme import LogMECallback, Probe
        >>> data = TensorDataset(torch.randn(40, 8), torch.randn(40))
        >>> callback = LogMECallback(probes={"ratings": Probe(DataLoader(data), task="regression")})
    """

    # Not a dataclass: LightningCLI's parser treats a dataclass as a group of options, in which no loader can be nested.
    def __init__(
        self,
        dataloader: DataLoader | Iterable[Any],
        *,
        test: DataLoader | Iterable[Any] | None = None,
        task: Task = "multiclass",
        num_classes: int | None = None,
        target: TargetSpec = None,
        forward: Forward | None = None,
        limit_batches: int | None = None,
        ignore_index: int | None = -100,
    ) -> None:
        check_task(task)
        check_target(target)
        if forward is not None and not callable(forward):
            raise ValueError(f"forward must be callable(module, batch) or None, got {forward!r}.")
        limit_batches = positive_or_none("limit_batches", limit_batches)
        ignore_index = None if task == "regression" else ignore_index
        check_options(task, ignore_index, fit_intercept=False)
        self.dataloader = dataloader
        self.test = test
        self.task: Task = task
        self.num_classes = positive_or_none("num_classes", num_classes)
        self.target = target
        self.forward = forward
        self.limit_batches = limit_batches
        self.ignore_index = ignore_index


class PreparedProbe:
    """A probe whose first batch has been read, so that wrong labels surface before training starts.

    Raises:
        ValueError: there are no labels, they do not fit the task, or the number of classes is unknown. The message
            names the probe.
    """

    def __init__(self, name: str, probe: Probe) -> None:
        self._name = name
        self._probe = probe
        try:
            with same_generators():
                self._samples = Samples(probe.dataloader, probe.task, probe.target, seed=0, repeatable=False)
                self._num_outputs = self._samples.num_outputs(probe.num_classes, probe.ignore_index)
        except Exception as error:
            raise ValueError(f"probes[{name!r}]: {reason_of(error)}") from error
        self._test: Samples | None = None
        if probe.test is not None:
            try:
                with same_generators():
                    self._test = Samples(probe.test, probe.task, probe.target, seed=0, repeatable=False)
                    self._checked(self._test.first)
            except Exception as error:
                raise ValueError(f"probes[{name!r}].test: {reason_of(error)}") from error

    @property
    def has_test(self) -> bool:
        """Whether the probe has test samples."""
        return self._test is not None

    def run(
        self,
        trainer: Trainer,
        module: LightningModule,
        extractor: Extractor,
        scoring: Scoring,
        limit_batches: int | None = None,
        is_test: bool = False,
    ) -> tuple[Pass, set[str | None]]:
        """Run the module on this process's share of the samples, and leave the module as it was.

        Args:
            scoring: settings of the callback. The probe has its own task, number of outputs and ``ignore_index``.
            limit_batches: how many batches to use, instead of the probe's own limit.
            is_test: run on the test samples instead.

        Returns:
            The pass, with the errors that occurred in it, and the sources whose module was not called.
        """
        current = Pass(self._own(scoring), trainer.global_rank, trainer.world_size)
        samples = self._test if is_test and self._test is not None else self._samples
        return current, self._run(current, samples, trainer, module, extractor, limit_batches)

    def test(
        self,
        trainer: Trainer,
        module: LightningModule,
        extractor: Extractor,
        scoring: Scoring,
        results: dict[Key, Result | None],
        limit_batches: int | None = None,
    ) -> dict[Key, Result | None]:
        """Return results with the accuracy on the test samples. All processes call this together.

        Args:
            scoring, limit_batches: as in :meth:`run`.
            results: the results of the training samples.
        """
        assert self._test is not None
        held_out = HeldOut(results, self._own(scoring), trainer.strategy.root_device)
        self._run(held_out, self._test, trainer, module, extractor, limit_batches)
        return held_out.tested(f"probes[{self._name!r}].test", trainer.world_size == 1)

    def _own(self, scoring: Scoring) -> Scoring:
        """Return the settings of the callback, with the task, number of outputs and ``ignore_index`` of the probe."""
        probe = self._probe
        return replace(scoring, task=probe.task, num_outputs=self._num_outputs, ignore_index=probe.ignore_index)

    def _run(
        self,
        current: Pass | HeldOut,
        samples: Samples,
        trainer: Trainer,
        module: LightningModule,
        extractor: Extractor,
        limit_batches: int | None,
    ) -> set[str | None]:
        """Run the module on this process's share of samples, and return the sources whose module was not called."""
        uncalled: set[str | None] = set()
        try:
            with undisturbed(module, getattr(trainer, "datamodule", None)):
                for portion in self._portions(samples, trainer, limit_batches or self._probe.limit_batches):
                    current.batches[0] += 1
                    for source, error in self._add(current, portion, trainer, module, extractor).items():
                        current.errors.setdefault(source, reason_of(error))
                        release(error)
                        if isinstance(error, NotCalledError):
                            uncalled.add(source)
                    if current.errors.keys() >= set(extractor.names):
                        break
        except Exception as error:
            current.errors[None] = reason_of(error)
            release(error)
        return uncalled

    def _add(
        self, current: Pass | HeldOut, portion: Portion, trainer: Trainer, module: LightningModule, extractor: Extractor
    ) -> Errors:
        """Add the rows of a batch, and return the errors of sources that failed."""
        target = self._checked(portion)
        batch = prepared_batch(copied(portion.batch), trainer, module)  # the module may write to it
        labels = Labels(target, find_mask(batch))
        precision = trainer.precision_plugin.forward_context()
        rows, errors = extractor.run(batch, labels, self._probe.forward or self._call, precision)
        return errors | current.add(rows, labels, range(portion.start, portion.start + len(portion.target)))

    def _checked(self, portion: Portion) -> Target:
        return Target.checked(portion.target, self._probe.task, self._num_outputs, self._probe.ignore_index)

    def _call(self, module: LightningModule, batch: Any) -> Any:
        return call(module, batch, self._probe.target)

    def _portions(self, samples: Samples, trainer: Trainer, limit_batches: int | None) -> Iterator[Portion]:
        """Yield this process's batches, with a progress bar if they take long."""
        rank, world_size = trainer.global_rank, trainer.world_size
        is_shown = rank == 0 and getattr(trainer.progress_bar_callback, "is_enabled", False)
        with tqdm(
            desc=f"probe {self._name}", delay=_BAR_DELAY, leave=False, disable=not is_shown, unit=" batches"
        ) as bar:
            for index, portion in enumerate(samples.portions(0, None, rank, world_size)):
                # Processes take batches in turn.
                if limit_batches is not None and rank + index * world_size >= limit_batches:
                    return
                yield portion
                bar.update()
